"""LoRA-RITE: an Adam whose moments do not depend on how B A is factored.  https://arxiv.org/abs/2410.20625 algorithm 1

B = Q_B H_B with H_B = (B^T B)^(1/2), and A^T = Q_A H_A likewise. The moments of A are those of its gradient against the
orthonormal Q_B ("unmagnified"), which is the same for every factorization of B A up to a rotation. For A:

    u = H_B^-1 g_A                           (r, n)    s Q_B^T G
    V <- b2' V + (1 - b2') u u^T / n         (r, r)
    z = (V^(1/2) + eps I)^-1 u               (r, n)
    M <- b1' M + (1 - b1') z                 (r, n)
    A <- A - rate (H_B^-1 M + decay A)

and for B with transposes. b' = b (1 - b^(t-1)) / (1 - b^t) at step t = 1, 2, ..., so that no bias is to be corrected.
Afterwards the moments go to the basis of the new B, whose r x r Gram matrices are all that is needed:

    P = H_B(new)^-1 (B_new^T B_old) H_B(old)^-1  =  Q_B(new)^T Q_B(old)          V <- P V P^T          M <- P M

The authors change the basis at the next step and keep the old one for it. Here the new factors are known as soon as the
step is, so that no old factor is kept.

A direction that B does not have has H_B^-1 = 0: from B = 0, A stands still for one step. Directions that an exchange
brings start with M = 0 and with the mean second moment, as the exchanges of an Adam do. With V = 0 so late in a run the
first steps along them would be too long, since b2' is near 1 (see adapters/exchange.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Direction, Update
from llm_lowrank.numerics.gram import Spectrum
from llm_lowrank.numerics.pairs import Pairs


@Direction.register_subclass("lora_rite")
@dataclass(frozen=True)
class LoRARITE(Direction):
    """An Adam whose moments do not depend on how B A is factored (arXiv 2410.20625)."""

    own_step: ClassVar[bool] = True

    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment, an r x r matrix."""
    eps: float = 1e-6
    """Added to the square root of the second moment."""

    def complaints(self) -> list[str]:
        return [*self.wrong_decays("beta1", "beta2"), *self.wrong_eps(self.eps)]

    def remembered(self, rank: int, m: int, n: int) -> int:
        return 4 * rank * (m + n) + 8 * (2 * rank * rank + 3)

    def start(self, pairs: Pairs) -> dict[str, Tensor]:
        """The moments before the first step: M_A (r, n), M_B (r, m), and V_A, V_B (r, r)."""
        r, like = len(pairs), pairs.A
        memory = {"rite_steps": like.new_zeros(())}
        for name, length in (("A", pairs.A.shape[1]), ("B", pairs.B.shape[0])):
            memory[f"rite_M_{name}"] = like.new_zeros(r, length, dtype=torch.float32)
            memory[f"rite_V_{name}"] = like.new_zeros(r, r)
            # the second moment of a direction that appears; above 0 only in the step after an exchange
            memory[f"rite_fresh_{name}"] = like.new_zeros(())
        return memory

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        if "rite_steps" not in memory:  # where a method has its own entries too
            memory.update(self.start(pairs))
        memory["rite_steps"] += 1
        of_B, of_A = _inverse_root(pairs.B), _inverse_root(pairs.A.T)
        step_A = self._step("A", gradients.A, of_B, memory)
        step_B = self._step("B", gradients.B.T, of_A, memory).T
        kept = 1 - update.rate * update.weight_decay  # as the optimizer will do it
        _change_basis("A", pairs.B, kept * pairs.B - update.rate * step_B, of_B, memory)
        _change_basis("B", pairs.A.T, kept * pairs.A.T - update.rate * step_A.T, of_A, memory)
        memory["rite_fresh_A"].zero_()
        memory["rite_fresh_B"].zero_()
        return Pairs(step_B, step_A)

    def _step(self, name: str, gradient: Tensor, inverse_root: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """Update the moments of a factor and return its step, (r, n). inverse_root: H^-1 of the other factor."""
        M, V, t = memory[f"rite_M_{name}"], memory[f"rite_V_{name}"], memory["rite_steps"]
        u = inverse_root @ gradient
        V.lerp_(u @ u.T / u.shape[1], 1 - _decay(self.beta2, t))
        second = Spectrum.of(V)
        z = (second.V / (second.values.sqrt() + self.eps)) @ second.V.T @ u
        first = torch.lerp(z, M.double(), _decay(self.beta1, t))
        M.copy_(first)
        return inverse_root @ first

    def rebase(self, before: Pairs, after: Pairs, memory: dict[str, Tensor]) -> None:
        if "rite_steps" not in memory:  # no step was made yet
            return
        for name, old, new in (("A", before.B, after.B), ("B", before.A.T, after.A.T)):
            memory[f"rite_fresh_{name}"].copy_(memory[f"rite_V_{name}"].diagonal().mean())
            _change_basis(name, old, new, _inverse_root(old), memory)


def _decay(beta: float, t: Tensor) -> Tensor:
    """b (1 - b^(t-1)) / (1 - b^t): the weight of the past in the mean of t values."""
    return beta * (1 - beta ** (t - 1)) / (1 - beta**t)


def _inverse_root(factor: Tensor) -> Tensor:
    """(F^T F)^(-1/2) of a factor (m, r), (r, r)."""
    return Spectrum.of(factor.T @ factor).power(-0.5)


def _change_basis(name: str, old: Tensor, new: Tensor, inverse_root: Tensor, memory: dict[str, Tensor]) -> None:
    """Express the moments of a factor in the basis of the new other factor. inverse_root: H^-1 of the old one."""
    P = _inverse_root(new) @ (new.T @ old) @ inverse_root
    M, V, fresh = memory[f"rite_M_{name}"], memory[f"rite_V_{name}"], memory[f"rite_fresh_{name}"]
    M.copy_(P @ M.double())
    rotated = P @ V @ P.T + fresh * (torch.eye(len(P), dtype=P.dtype, device=P.device) - P @ P.T)
    V.copy_((rotated + rotated.T) / 2)
