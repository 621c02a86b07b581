"""LoRA-One: start with the best step of its rank along the gradient already made.  https://arxiv.org/abs/2502.01235

    -G = U diag(S) V^T      B = U_r sqrt(S_r / S_1) / sqrt(gamma)      A = sqrt(S_r / S_1) V_r^T / sqrt(gamma)

G (m, n) is the gradient of W; U_r, S_r and V_r are the r largest triplets of -G. W stays as it is, so that the function
changes at the start, on purpose: by s B A = s / gamma U_r diag(S_r / S_1) V_r^T, a step of W down the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_lowrank.adapters.adapter import PairAdapter
from llm_lowrank.adapters.method import Method
from llm_lowrank.methods.lora_ga import GradientStart
from llm_lowrank.numerics.pairs import Pairs
from llm_lowrank.numerics.spectrum import Triplets


@Method.register_subclass("lora_one")
@dataclass(frozen=True)
class LoRAOne(GradientStart):
    """Start one step down the gradient of the first samples; the function changes."""

    samples: int = 8
    """Samples whose gradient gives the start: the first ones of the run."""
    gamma: float = 128.0
    """How small the starting step is: W + s B A is s / gamma away from W, in the spectral norm."""
    svd_niter: int = 16
    """Iterations of the randomized SVD of the gradient, of two passes over the samples each; two more passes come
    before and after."""

    def directions(self, rank: int) -> int:
        return rank

    def starting(self, adapter: PairAdapter, found: Triplets) -> Pairs:
        root = (found.S / found.S[0] / self.gamma).sqrt()
        return Pairs(-found.U * root, (found.V * root).T)
