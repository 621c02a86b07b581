"""AltLoRA: project the full gradient onto what A can do, then onto what B can do, with a momentum that follows.
https://arxiv.org/abs/2505.12455

The nearest that A alone comes to a step along G, and that B alone does, are

    a = (1 / s^2) (B^T B + d I)^-1 g_A          s B a = P_B G          for d = 0
    b = (1 / s^2) g_B (A A^T + d I)^-1          s b A = G P_A

In turn A and B are moved, each by its momentum M <- b1 M + (1 - b1) a, divided by 1 - b1^k at its step k. The momentum
of A belongs to B: s B M_A is a change of W. When B has moved to B', M_A becomes what comes nearest to this change:

    M_A <- (B'^T B' + d I)^-1 B'^T B M_A          M_B <- M_B A A'^T (A' A'^T + d I)^-1

With d = 0 the run of B A does not depend on how B A is factored (theorem 4). There is no second moment. AltLoRA+, which
adds one per entry and is not invariant, is not built.

A factor that is not moved rests from weight decay too. The first step, of A, does nothing where B is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Direction, Update
from llm_lowrank.numerics.gram import Spectrum
from llm_lowrank.numerics.pairs import Pairs


@Direction.register_subclass("altlora")
@dataclass(frozen=True)
class AltLoRA(Direction):
    """Move A and B in turn along projections of the full gradient (arXiv 2505.12455)."""

    own_step: ClassVar[bool] = True

    beta1: float = 0.999
    """Decay of the momentum."""
    damping: float = 1e-3
    """d, which is added to the eigenvalues of both Gram matrices; 0: pseudo-inverses."""

    def complaints(self) -> list[str]:
        complaints = self.wrong_decays("beta1")
        if not self.damping >= 0:
            complaints.append(f"method.direction.damping must be at least 0, not {self.damping:g}")
        return complaints

    def remembered(self, rank: int, m: int, n: int) -> int:
        return 4 * rank * (m + n) + 8

    def start(self, pairs: Pairs) -> dict[str, Tensor]:
        """The momentum before the first step: M_A (n, r), transposed, and M_B (m, r)."""
        r, like = len(pairs), pairs.A
        return {
            "alt_steps": like.new_zeros((), dtype=torch.int64),
            "alt_M_A": like.new_zeros(like.shape[1], r, dtype=torch.float32),
            "alt_M_B": like.new_zeros(len(pairs.B), r, dtype=torch.float32),
        }

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        if "alt_steps" not in memory:  # where a method has its own entries too
            memory.update(self.start(pairs))
        # steps are counted here, since a step that was left out must not change whose turn it is
        made = int(memory["alt_steps"])
        memory["alt_steps"] += 1
        moving, resting = ("A", "B") if made % 2 == 0 else ("B", "A")
        factors, found = {"A": pairs.A.T, "B": pairs.B}, {"A": gradients.A.T, "B": gradients.B}  # (n or m, r) each
        projected = found[moving] @ self._inverse(factors[resting]) / update.scale**2
        M = self.beta1 * memory[f"alt_M_{moving}"].double() + (1 - self.beta1) * projected
        memory[f"alt_M_{moving}"].copy_(M)
        step = M / (1 - self.beta1 ** (made // 2 + 1))
        moved = factors[moving] - update.rate * (step + update.weight_decay * factors[moving])
        self._follow(memory[f"alt_M_{resting}"], factors[moving], moved)
        directed = {moving: step, resting: -update.weight_decay * factors[resting]}
        return Pairs(directed["B"], directed["A"].T)

    def rebase(self, before: Pairs, after: Pairs, memory: dict[str, Tensor]) -> None:
        if "alt_steps" in memory:
            self._follow(memory["alt_M_A"], before.B, after.B)
            self._follow(memory["alt_M_B"], before.A.T, after.A.T)

    def _follow(self, M: Tensor, before: Tensor, after: Tensor) -> None:
        """Change the momentum of a factor as the other one changed from `before` to `after`."""
        M.copy_(M.double() @ (before.T @ after) @ self._inverse(after))

    def _inverse(self, factor: Tensor) -> Tensor:
        """(F^T F + d I)^-1 of a factor F (m, r), (r, r)."""
        gram = Spectrum.of(factor.T @ factor)
        return gram.damped_inverse(self.damping) if self.damping else gram.power(-1.0)
