"""Riemannian preconditioning: divide each gradient by the Gram matrix of the other factor.
https://arxiv.org/abs/2402.02347 eq. 3

    g_A <- (B^T B + d I)^-1 g_A          g_B <- g_B (A A^T + d I)^-1

With d = 0 and plain gradient descent the change of B A depends, to first order, on B A alone and not on how it is
factored. With the d that is used, and with AdamW behind it, that is no longer so.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llm_lowrank.adapters.direction import Direction, Update
from llm_lowrank.numerics.gram import Spectrum
from llm_lowrank.numerics.pairs import Pairs


@Direction.register_subclass("riemannian")
@dataclass(frozen=True)
class Riemannian(Direction):
    """Divide each gradient by the Gram matrix of the other factor (arXiv 2402.02347)."""

    damping: float = 1e-2
    """d, which is added to the eigenvalues of both Gram matrices (reg in PEFT)."""

    def complaints(self) -> list[str]:
        if self.damping > 0:
            return []
        return [
            f"method.direction.damping must be above 0, not {self.damping:g}: B is zero at the start, and B^T B has no "
            "inverse"
        ]

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        of_B, of_A = Spectrum.of(pairs.B.T @ pairs.B), Spectrum.of(pairs.A @ pairs.A.T)
        return Pairs(gradients.B @ of_A.damped_inverse(self.damping), of_B.damped_inverse(self.damping) @ gradients.A)
