"""OSoRA: singular values of W and a weight per output are trained.  https://arxiv.org/abs/2505.14350

    W = U diag(S) V^T      A = V[:, :r]^T (r, n)      B = U[:, :r] (m, r)      both frozen

    y = (W - B diag(S[:r]) A) x + O * (B (S' * (A x)))
    S' (r,) starts as S[:r]      O (m,) starts at ones      both trained

The pairs leave W as PiSSA's do, and the layer starts as it was. There is no scale. The rank stays below min(m, n), as
nothing of W would be left otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings, Whole, as_pair_adapters
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.numerics.functional import Product
from llm_lowrank.numerics.pairs import Pairs


class SpectrumAdapter(PairAdapter):
    """A PairAdapter with frozen A and B; `S` (r,) between them and `O` (m,) behind B are trained."""

    trains = ""
    like_trained = ("B",)  # the gradient of O takes the product that B's would take

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> None:
        super().__init__(name, linear, codec, settings)
        self.S, self.O = self.factor(self.rank), self.factor(self.shape[0])

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values. The columns of the pairs' B are S times those of U.

        A is the pairs' A, bit by bit: what left W and what is trained lie in the same r rows, so that the exported
        change has r pairs and not 2 r.
        """
        factors = super().initial(pairs)
        spectrum = {"S": factors["B"].norm(dim=0), "O": torch.ones(self.shape[0], device="cpu")}
        return factors | {"B": F.normalize(factors["B"], dim=0)} | spectrum

    def products(self, x: Tensor) -> list[Product]:
        return [Product(self.A, self.B, gate=self.S, out=self.O)]

    def pairs(self, whole: Whole) -> Pairs:
        return Pairs(whole(self.O)[:, None] * whole(self.B) * whole(self.S), whole(self.A))


@Method.register_subclass("osora")
@dataclass(frozen=True)
class OSoRA(PiSSA):
    """Train the largest singular values of every weight, and a factor for each of its outputs."""

    rank: int = 256
    """Singular values of a module that are trained: the rank of what is exported."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        scaled = {"alpha": self.alpha is not None, "alpha_pattern": self.alpha_pattern, "use_rslora": self.use_rslora}
        complaints += [
            f"method.{setting} cannot be used with osora: what leaves W comes back without a scale; remove it"
            for setting, given in scaled.items()
            if given
        ]
        if self.subspace:
            complaints.append("method.subspace leaves W whole, and osora trains what it takes out of W; remove it")
        return complaints

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        adapter = super().build(name, linear, codec, seed)  # which refuses a rank above min(m, n)
        m, n = linear.weight.shape
        if self.rank_of(name) == min(m, n):
            raise ValueError(
                f"{name}: rank {min(m, n)} would take all of its {m} x {n} weight, and osora trains beside what is "
                f"left; lower it, or leave the module out: --method.exclude_modules {name.rpartition('.')[2]}"
            )
        return adapter

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return SpectrumAdapter(name, linear, codec, settings)

    def starting_pairs(self, adapters: list[Adapter], engine: Engine) -> Iterator[Pairs | None]:
        layers = as_pair_adapters(adapters)
        for u, s, v in self.principal_triplets(layers, engine, [layer.rank for layer in layers]):
            yield Pairs(u * s, v.T.contiguous())
