"""LoRA-GA: start where the first step of LoRA is the best step of its rank towards full fine-tuning.
https://arxiv.org/abs/2407.05000

    G = U diag(S) V^T      A = c V[:, :r]^T      B = c U[:, r:2r]      c = m^(1/4) / sqrt(gamma)      W <- W - s B A

G (m, n) is the gradient of W. A reads the r largest input directions of G, and B writes to the r output directions that
come next, so that the first step moves 2 r directions of W. W is not written: the pairs (-B, A) in the bank stand
beside it, and W - s B A is exact over any stored W.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.methods.gradient_start import GradientStart
from llm_lowrank.numerics.pairs import Pairs
from llm_lowrank.numerics.spectrum import Triplets


@Method.register_subclass("lora_ga")
@dataclass(frozen=True)
class LoRAGA(GradientStart):
    """Start from the gradient of the first samples; the function stays."""

    samples: int = 128
    """Samples whose gradient gives the start: the first ones of the run (the paper: 64 batches of 2)."""
    gamma: float = 16.0
    """How small the starting pairs are: both factors are divided by its root."""

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        rank = self.rank_of(name)
        self.check_fits("2 x method.rank =", self.directions(rank), name, linear)
        return self.layer(name, linear, codec, self.pair_settings(name, rank, seed))

    def directions(self, rank: int) -> int:
        return 2 * rank

    def starting(self, adapter: PairAdapter, found: Triplets) -> Pairs:
        r = adapter.rank
        c = adapter.shape[0] ** 0.25 / self.gamma**0.5
        return Pairs(c * found.U[:, r : 2 * r], c * found.V[:, :r].T)
