"""RefLoRA: step as if the pairs were balanced first.  https://arxiv.org/abs/2505.18877 theorem 3

B A = (B P^-T)(P^T A) for every invertible P: the factors are a free choice at each step. The upper bound of the loss
that the paper minimizes over P is smallest where both Gram matrices are equal, which P P^T = S does:

    S = (A A^T)^-1 # (B^T B)          S (A A^T) S = B^T B          # is the geometric mean
    g_A <- S^-1 g_A                   g_B <- g_B S                 then AdamW, with its usual moments

The step is taken in the balanced factors and brought back, so that only the gradients change.

Where B has fewer directions than r, S is singular: its inverse there would be infinite, and B, which gets g_B S, would
stay where it is forever. From B = 0, the usual start, that is all of B. So the first `warmup` steps take the gradients
themselves, and so does a later step in which A or B lacks a direction.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llm_lowrank.adapters.direction import Direction, Update
from llm_lowrank.numerics.gram import balancing
from llm_lowrank.numerics.pairs import Pairs


@Direction.register_subclass("reflora")
@dataclass(frozen=True)
class RefLoRA(Direction):
    """Step as if the pairs were balanced first (arXiv 2505.18877)."""

    warmup: int = 100
    """The first steps, which take the gradients as they are. 0 is for methods whose B does not start at zero."""

    def complaints(self) -> list[str]:
        return self.wrong_warmup(self.warmup)

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        if update.step < self.warmup:
            return gradients
        found = balancing(pairs.A @ pairs.A.T, pairs.B.T @ pairs.B)
        if found is None:
            return gradients
        S, inverse = found
        return Pairs(gradients.B @ S, inverse @ gradients.A)
