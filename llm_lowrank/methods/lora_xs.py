"""LoRA-XS: a small matrix between frozen singular directions of W is trained.  https://arxiv.org/abs/2405.17604

    W = U diag(S) V^T      A = diag(S[:r]) V[:, :r]^T (r, n)      B = U[:, :r] (m, r)      both frozen, W stays whole

    y = W x + s B R A x          R (r, r) = 0 at the start and trained

The published code draws R from N(0, 1e-10). With R = 0 the gradient of R is s B^T (dL/dW) A^T, which is not zero, and
the function starts bitwise as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings, Whole, as_pair_adapters
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.numerics.functional import Product
from llm_lowrank.numerics.pairs import Pairs


class CoreAdapter(PairAdapter):
    """A PairAdapter with frozen A and B, and with `R` (r, r) between them, which is trained."""

    trains = ""
    takes = False  # the directions are looked at, and W keeps them

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> None:
        super().__init__(name, linear, codec, settings)
        self.R = self.factor(self.rank, self.rank)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: A and B are the pairs that were looked at, and R is zero."""
        return super().initial(pairs) | {"R": torch.zeros(self.rank, self.rank, device="cpu")}

    def products(self, x: Tensor) -> list[Product]:
        return [Product(self.A, self.B, core=self.R)]

    def pairs(self, whole: Whole) -> Pairs:
        return Pairs(whole(self.B) @ whole(self.R), whole(self.A))


@Method.register_subclass("lora_xs")
@dataclass(frozen=True)
class LoRAXS(PiSSA):
    """Train a rank x rank matrix per module between the principal singular directions of W."""

    rank: int = 64
    """Rows and columns of a module's trained matrix: the rank of what is exported."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.subspace:
            name = Method.get_choice_name(type(self))
            complaints.append(f"method.subspace is a start of pissa's B and A, which {name} does not train; remove it")
        return complaints

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return CoreAdapter(name, linear, codec, settings)

    def starting_pairs(self, adapters: list[Adapter], engine: Engine) -> Iterator[Pairs | None]:
        layers = as_pair_adapters(adapters)
        for u, s, v in self.principal_triplets(layers, engine, [layer.rank for layer in layers]):
            yield Pairs(u, (v * s).T.contiguous())
