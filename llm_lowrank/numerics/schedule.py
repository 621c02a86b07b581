"""When things happen: the learning rate of a step and the steps after which pairs are exchanged. Pure arithmetic."""

from __future__ import annotations

import math
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]


def learning_rate(step: int, total: int, peak: float, warmup: int, shape: Shape) -> float:
    """Rate of 0-based optimizer step `step`: linear warm-up from peak / warmup to peak, then the chosen shape down to
    0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)  # in [0, 1)
    if shape == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done) if shape == "linear" else peak
