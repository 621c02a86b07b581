"""SOAP (https://arxiv.org/abs/2409.11321), as a control of CORE: Adam in the eigenbases of both sides of a gradient. It
is a direction, for A and B, and an optimizer, for whole weights.

    L <- b L + (1 - b) g g^T        R <- b R + (1 - b) g^T g        Q_L, Q_R their eigenvectors, every `interval` steps
    m, v: Adam's moments, v of Q_L^T g Q_R

After an exchange (benchmarks/remedies.py) the replaced pairs have no first moment, and in the r x r matrix the mean of
those that stay; v_ij <- l_i r_j / tr, l and r the eigenvalues of both sides, as after K = 1 / (1 - b) steps.

It keeps an m x m and an n x n matrix for each module, 822 MB in float32 for 14336 columns: no method of the library.
Import it to register it as the direction `soap`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Direction, Update
from llm_lowrank.methods.core import FLOOR
from llm_lowrank.numerics.pairs import Pairs

BETA1, BETA2, DECAY, EPS = 0.9, 0.999, 0.95, 1e-8


@Direction.register_subclass("soap")
@dataclass(frozen=True)
class Soap(Direction):
    """Adam in the eigenbases of the gradient's covariances."""

    own_step: ClassVar[bool] = True
    interval: int = 10
    """Steps between two decompositions."""

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        return Pairs(self.step("B", gradients.B, memory), self.step("A", gradients.A, memory))

    def step(self, name: str, g: Tensor, memory: dict[str, Tensor], turned: str = "LR") -> Tensor:
        """Return the step of one factor. turned: the sides whose basis turns, L, R or both."""
        if f"{name}_t" not in memory:
            sides = {"L": g.new_zeros(len(g), len(g)), "R": g.new_zeros(g.shape[1], g.shape[1])}
            kept = {side: sides[side] for side in turned}
            kept |= {"m": torch.zeros_like(g), "v": torch.zeros_like(g), "t": g.new_zeros(())}
            memory.update({f"{name}_{key}": value for key, value in kept.items()})
        m, v, t = (memory[f"{name}_{key}"] for key in ("m", "v", "t"))
        t += 1
        for side in turned:
            covariance = memory[f"{name}_{side}"].lerp_(g @ g.T if side == "L" else g.T @ g, 1 - DECAY)
            if int(t) in (1, 2, 4) or int(t) % self.interval == 0:
                memory[f"{name}_Q_{side}"] = torch.linalg.eigh(covariance)[1]

        def turn(x: Tensor, back: bool = False) -> Tensor:
            for side in turned:
                Q = memory[f"{name}_Q_{side}"]
                x = (Q if back else Q.T) @ x if side == "L" else x @ (Q.T if back else Q)
            return x

        m.lerp_(g, 1 - BETA1)
        v.lerp_(turn(g).square(), 1 - BETA2)
        mean = turn(m) / (1 - BETA1**t)
        return turn(mean / ((v / (1 - BETA2**t)).sqrt() + EPS), back=True)

    def rebase(self, before: Pairs, after: Pairs, memory: dict[str, Tensor]) -> None:
        went, K = (before.A != after.A).any(1), round(1 / (1 - DECAY))
        for name in ("A", "B") if memory else ():
            L, R, m, v, t = (memory[f"{name}_{key}"] for key in ("L", "R", "m", "v", "t"))
            own, other, rows = (L, R, m) if name == "A" else (R, L, m.T)  # own: of the pairs
            stays = own.diagonal()[~went].mean()
            own[went], own[:, went] = 0.0, 0.0
            own.diagonal()[went] = stays
            rows[went] = 0.0
            (left, memory[f"{name}_Q_L"]), (right, memory[f"{name}_Q_R"]) = torch.linalg.eigh(L), torch.linalg.eigh(R)
            second = torch.outer(left.clamp_min(0), right.clamp_min(0)) / other.trace()
            v.copy_((second + FLOOR * second.mean()) * (1 - BETA2**K))
            m *= (1 - BETA1**K) / (1 - BETA1**t)
            t.fill_(K)


@Direction.register_subclass("soap_small_side")
@dataclass(frozen=True)
class SmallSide(Soap):
    """The same with the r x r side of each factor alone, which any model can keep; for runs without exchanges."""

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        return Pairs(self.step("B", gradients.B, memory, "R"), self.step("A", gradients.A, memory, "L"))


class SoapOptimizer(torch.optim.Optimizer):
    """The same steps for any matrices."""

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * Soap().step("W", p.grad, self.state[p]))
