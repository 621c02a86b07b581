"""LoRA-Pro: the step of A and B whose effect on W is nearest to that of the full gradient.
https://arxiv.org/abs/2407.18242 theorems 2.1 and 2.2

Directions a of A and b of B change W by s B a + s b A. Nearest to G is the projection of G onto what pairs can do:

    s B a + s b A = P_B G + (I - P_B) G P_A          P_B = B (B^T B)^-1 B^T          P_A = A^T (A A^T)^-1 A
    a = (1 / s^2) (B^T B)^-1 g_A + X A
    b = (1 / s^2) (I - P_B) g_B (A A^T)^-1 - B X

for every X (r, r). Of these, the X that leaves a and b nearest to g_A and g_B solves a Sylvester equation:

    B^T B X + X A A^T = -(1 / s^2) (B^T B)^-1 g_A A^T

AdamW then follows a and b. This is the paper's efficient mode. Its full mode keeps Adam's moments of the whole
s B a + s b A, twice the size of W, and is not built.

Just off B = 0, the usual start, (B^T B)^-1 is 1e8 and more, and AdamW's second moment remembers such directions for a
thousand steps. So the first `warmup` steps take the gradients themselves. The Gram matrices are damped relative to
their size: by damping times the mean of their eigenvalues. The paper's 1e-8 is absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Direction, Update
from llm_lowrank.numerics.gram import Spectrum, sylvester
from llm_lowrank.numerics.pairs import Pairs


@Direction.register_subclass("lora_pro")
@dataclass(frozen=True)
class LoRAPro(Direction):
    """Step so that the change of W is nearest to the full gradient (arXiv 2407.18242)."""

    warmup: int = 100
    """The first steps, which take the gradients as they are. 0 is for methods whose B does not start at zero."""
    damping: float = 1e-6
    """What is added to the eigenvalues of both Gram matrices, as a share of their mean."""

    def complaints(self) -> list[str]:
        complaints = self.wrong_warmup(self.warmup)
        if not self.damping > 0:
            complaints.append(
                f"method.direction.damping must be above 0, not {self.damping:g}: a factor of a lower rank has a Gram "
                "matrix without an inverse"
            )
        return complaints

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        if update.step < self.warmup:
            return gradients
        B, A = pairs.B, pairs.A
        of_B, of_A = Spectrum.of(B.T @ B), Spectrum.of(A @ A.T)
        inverse_B, inverse_A = self._inverse(of_B), self._inverse(of_A)
        a = inverse_B @ gradients.A / update.scale**2
        b = gradients.B @ inverse_A / update.scale**2
        b = b - B @ (inverse_B @ (B.T @ b))  # never the (m, m) projection
        X = sylvester(of_B, of_A, -a @ A.T, self._damping(of_B) + self._damping(of_A))
        return Pairs(b - B @ X, a + X @ A)

    def _damping(self, gram: Spectrum) -> Tensor:
        return self.damping * gram.values.mean()

    def _inverse(self, gram: Spectrum) -> Tensor:
        """The damped inverse, (r, r); zero along the directions that the factor does not have, all of them at B = 0."""
        return (gram.V * torch.where(gram.values > 0, 1 / (gram.values + self._damping(gram)), 0.0)) @ gram.V.T
