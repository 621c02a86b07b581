"""EDoRA: LoRA-XS for the direction of the rows of W, DoRA for their lengths.  https://arxiv.org/abs/2501.12067

    W' = diag(M / |W + s B R A|) (W + s B R A)

    W = U diag(S) V^T      A = diag(S[:r]) V[:, :r]^T (r, n)      B = U[:, :r] (m, r)      both frozen, W stays whole
    R (r, r) = 0 at the start and trained      M (m,) starts as |W|, lengths of rows, and is trained; so W' = W

The gradient treats |W + s B R A| as a constant, as DoRA's does. The published code draws R from N(0, 1e-10): R = 0 is a
start too, as in methods/lora_xs.py. The published script loads a setting with random A and B, and the line with the
singular directions is a comment. So both are offered, and the paper's equations are the default.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from llm_lowrank.adapters.adapter import (
    Adapter,
    PairAdapter,
    PairSettings,
    as_pair_adapters,
    generator,
    uniform_rows,
)
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.dora import DirectionAdapter, measure
from llm_lowrank.methods.lora_xs import CoreAdapter, LoRAXS
from llm_lowrank.numerics.pairs import Pairs


class CoreDirectionAdapter(CoreAdapter, DirectionAdapter):
    """A CoreAdapter with DoRA's row lengths: R (r, r) and `magnitude` (m,) are trained."""


@Method.register_subclass("edora")
@dataclass(frozen=True)
class EDoRA(LoRAXS):
    """Train a rank x rank matrix for the direction of the rows of W and a vector for their lengths."""

    rank: int = 32
    """Rows and columns of a module's trained matrix: the rank of what is exported."""
    factors: Literal["svd", "random"] = "svd"
    """What A and B are: principal singular directions of W, as in the paper, or uniform random numbers, as in the
    script that is published beside it."""

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return CoreDirectionAdapter(name, linear, codec, settings)

    def starting_pairs(self, adapters: list[Adapter], engine: Engine) -> Iterator[Pairs | None]:
        if self.factors == "svd":
            return super().starting_pairs(adapters, engine)
        return map(draw, as_pair_adapters(adapters))

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        measure(adapters, engine)

    def peft(self) -> dict[str, Any]:
        return super().peft() | {"use_dora": True}


def draw(adapter: PairAdapter) -> Pairs:
    """Random factors with the bounds of the published code: A (r, n) in +-1/sqrt(r), B (m, r) in +-1/sqrt(m)."""
    (m, n), random = adapter.shape, generator(adapter.seed, adapter.name)
    A, B = uniform_rows(n, adapter.rank, random), uniform_rows(adapter.rank, m, random)
    return Pairs(B.T.contiguous(), A.T.contiguous())
