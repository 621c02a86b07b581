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


def switches(
    total: int, rank: int, target_rank: int, swap: int, at_the_end: bool = False
) -> tuple[tuple[int, int], ...]:
    """(completed steps, pairs exchanged) of every SRLoRA switch (https://arxiv.org/abs/2505.12433).

        N = ceil((target_rank - rank) / swap),   switch k = 1..N after step round(k total / (N + 1))

    so that the last fresh pairs still have total / (N + 1) steps to learn. The published interval, total / N, has the
    last switch at the last step: at_the_end=True. The last switch exchanges what is left of target_rank - rank. Raises
    ValueError when there are not enough steps to keep the switches apart.
    """
    spare = target_rank - rank
    count = math.ceil(spare / swap)
    parts = count if at_the_end else count + 1
    steps = [round(k * total / parts) for k in range(1, count + 1)]
    if len({0, *steps}) != count + 1:
        raise ValueError(
            f"{count} switches do not fit into {total} steps; lower target_rank, raise gamma or train longer"
        )
    return tuple((step, min(swap, spare - k * swap)) for k, step in enumerate(steps))
