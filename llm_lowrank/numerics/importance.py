"""Which pairs matter: smoothed sensitivity times uncertainty (AdaLoRA, https://arxiv.org/abs/2303.10512, eqs. 8-10).

    I = |w g|      mean <- b1 mean + (1 - b1) I      spread <- b2 spread + (1 - b2) |I - mean|      s(w) = mean * spread

elementwise; then per pair (SRLoRA, https://arxiv.org/abs/2505.12433)

    S_k = 1/m sum_i s(B[i, k]) + 1/n sum_j s(A[k, j])

A rank keeps these statistics for its own span of the flattened A and B only. The caller sums over the ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def update_(
    mean: list[Tensor], spread: list[Tensor], *, w: list[Tensor], g: list[Tensor], beta1: float, beta2: float
) -> None:
    """Make one step of both moving averages of |w g|, in place.

    The lists hold many flat spans, so that few kernels run instead of many.
    """
    now = list(torch._foreach_mul(w, g))
    torch._foreach_abs_(now)
    smooth_(mean, spread, now=now, beta1=beta1, beta2=beta2)


def smooth_(mean: list[Tensor], spread: list[Tensor], *, now: list[Tensor], beta1: float, beta2: float) -> None:
    """Make one step of both moving averages of the importance `now`, in place. `now` is overwritten."""
    torch._foreach_lerp_(mean, now, 1 - beta1)
    torch._foreach_sub_(now, mean)
    torch._foreach_abs_(now)
    torch._foreach_lerp_(spread, now, 1 - beta2)


def pair_sums(score: Tensor, start: int, *, rank: int, row_length: int, rows_are_pairs: bool) -> Tensor:
    """Sum a flat span of elementwise scores per pair: (rank,) float64, zero for pairs that this span does not touch.

    The span begins at flat position `start` of a row-major matrix with rows of length `row_length`. A pair is a row of
    A (r, n) and a column of B (m, r).
    """
    at = torch.arange(start, start + score.numel(), device=score.device)
    pair = at // row_length if rows_are_pairs else at % row_length
    return torch.zeros(rank, dtype=torch.float64, device=score.device).index_add_(0, pair, score.double())
