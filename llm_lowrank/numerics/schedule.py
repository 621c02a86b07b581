"""The learning rate of every step of a run. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear", "constant", "warmup_stable_decay"]
DECAY_SHARE = 0.1  # of a run, over which warmup_stable_decay decays


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up, then a shape from the peak down to a lowest rate. Steps are counted from 0.

        step < warmup    rate = peak (step + 1) / warmup
        later            rate = peak (min_rate + (1 - min_rate) f(t)),  t = (step - from) / (total - from) in [0, 1)

        cosine                 f(t) = (1 + cos(pi t)) / 2           from = warmup
        linear                 f(t) = 1 - t                         from = warmup
        constant               f(t) = 1
        warmup_stable_decay    f(t) = 1 up to from, then cosine     from = max(warmup, total - ceil(total / 10))

    No step has rate 0: the lowest rate would be that of step `total`, which is none of the run's. warmup_stable_decay
    is the schedule of https://arxiv.org/abs/2404.06395, with transformers' default decay; its share of the run is
    fixed.
    """

    peak: float
    total: int  # steps of the run
    warmup: int = 0  # steps
    shape: Shape = "cosine"
    min_rate: float = 0.0  # the lowest rate as a share of the peak, in [0, 1]

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * (self.min_rate + (1 - self.min_rate) * self._height(step))

    def _height(self, step: int) -> float:
        """f(t) of a step after warm-up: from 1 down to 0, or constant."""
        start = self.warmup
        if self.shape == "warmup_stable_decay":
            start = max(start, self.total - math.ceil(DECAY_SHARE * self.total))
        if self.shape == "constant" or step < start:
            return 1.0
        done = (step - start) / max(1, self.total - start)
        return 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))

    def __str__(self) -> str:
        steps = "1 step" if self.warmup == 1 else f"{self.warmup} steps"
        warm = f"warm-up of {steps} to" if self.warmup else "from the start"
        lowest = "" if self.shape == "constant" else f" down to {self.peak * self.min_rate:g}"
        return f"{warm} {self.peak:g}, then {self.shape}{lowest}"
