"""RefLoRA-S: AdamW on pairs that are rescaled at each step, so that both factors have the same norm.
https://arxiv.org/abs/2505.18877

RefLoRA's S, restricted to multiples of I. AdamW does not see a multiple of a gradient, so that the authors rescale
the factors and their moments for real before each step:

    p^2 = |B| / |A|  (Frobenius)          A~ = p A,  B~ = B / p          |A~| = |B~|

The same change of B A comes from pairs that are left as they are. With m and v Adam's moments of the raw gradients:

    A <- A - rate (1/p) (m_A / p) / (sqrt(v_A) / p + eps)          B <- B - rate p (p m_B) / (p sqrt(v_B) + eps)

Where eps is small this is AdamW with the rates rate / p for A and rate p for B. Weight decay is the same for both, as a
rescaled pair decays by the same share.

At B = 0, the usual start, p is 0: B's rate would be 0 and A's infinite, and B would stay 0 forever. So the first
`warmup` steps take p = 1, which is AdamW, and so does a later step in which A or B is zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Direction, Update
from llm_lowrank.numerics.pairs import Pairs


@Direction.register_subclass("reflora_s")
@dataclass(frozen=True)
class RefLoRAS(Direction):
    """AdamW on pairs that are rescaled to equal norms at each step (arXiv 2505.18877)."""

    own_step: ClassVar[bool] = True
    survives_exchange: ClassVar[bool] = False

    warmup: int = 100
    """The first steps, which are AdamW's. 0 is for methods whose B does not start at zero."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""

    def complaints(self) -> list[str]:
        return [
            *self.wrong_warmup(self.warmup),
            *self.wrong_decays("beta1", "beta2"),
            *self.wrong_eps(self.eps),
        ]

    def remembered(self, rank: int, m: int, n: int) -> int:
        return 2 * 4 * rank * (m + n) + 8

    def start(self, pairs: Pairs) -> dict[str, Tensor]:
        """The moments before the first step: m_A, v_A (r, n) and m_B, v_B (m, r)."""
        memory = {"adam_steps": pairs.A.new_zeros(())}
        for name, factor in (("A", pairs.A), ("B", pairs.B)):
            memory[f"adam_m_{name}"] = torch.zeros_like(factor, dtype=torch.float32)
            memory[f"adam_v_{name}"] = torch.zeros_like(factor, dtype=torch.float32)
        return memory

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        if "adam_steps" not in memory:
            memory.update(self.start(pairs))
        memory["adam_steps"] += 1
        p = (pairs.B.norm() / pairs.A.norm()).sqrt()
        if update.step < self.warmup or not 0 < float(p) < float("inf"):
            p = torch.ones_like(p)
        step_A = self._adam("A", gradients.A, 1 / p, memory)
        step_B = self._adam("B", gradients.B, p, memory)
        return Pairs(step_B, step_A)

    def _adam(self, name: str, gradient: Tensor, c: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """Update the moments of a factor and return its step. c: d(rescaled gradient) / d(gradient)."""
        t, moments = memory["adam_steps"], (memory[f"adam_m_{name}"], memory[f"adam_v_{name}"])
        m = torch.lerp(gradient, moments[0].double(), self.beta1)
        v = torch.lerp(gradient.square(), moments[1].double(), self.beta2)
        for moment, value in zip(moments, (m, v), strict=True):
            moment.copy_(value)
        mean, size = m / (1 - self.beta1**t), (v / (1 - self.beta2**t)).sqrt()
        return c * (c * mean) / (c * size + self.eps)
