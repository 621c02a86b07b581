"""From scores of matrices to ranks that meet a budget of parameters, and two numbers that such scores are made of.

    sum_k r_k cost_k <= budget,     r_k whole,     least <= r_k <= most_k         cost = m + n of a matrix (m, n)

    stable rank               |W|_F^2 / sigma_1^2                                      https://arxiv.org/abs/2507.00327
    intrinsic dimension       the slope of -log(1 - F(mu)) over log mu through 0, mu = distance of a point's second
                              nearest neighbour / distance of its nearest (TwoNN,
                              https://doi.org/10.1038/s41598-017-11873-y)

Nothing here knows about models or files.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from llm_lowrank.numerics.spectrum import Matrix, top_triplets

NITER = 12  # iterations for sigma_1; the randomized SVD of principal pairs, which wants directions, makes 4
FARTHEST = 0.1  # share of the points with the largest mu that TwoNN leaves out, as its paper does


def share_out(
    weights: Sequence[float], costs: Sequence[int], budget: int, *, least: int, most: Sequence[int]
) -> list[int]:
    """Return r_k = c w_k, rounded, with the largest c that the budget allows. Weights are at least 0.

    Rounded down first. What is left goes to the largest remainders, in turn, until no matrix can take one more: less
    than the cost of one pair is left over. Of equal remainders the first matrix is first. Raise ValueError if the
    budget is less than `least` everywhere or more than `most` everywhere, or if no weight is above 0.
    """
    check_budget(costs, budget, least=least, most=most)
    if not max(weights) > 0:
        raise ValueError("all scores are 0: they give no order; take another --rule, or more --samples")

    def clipped(c: float) -> list[float]:
        return [min(float(top), max(float(least), c * w)) for w, top in zip(weights, most, strict=True)]

    # the sum grows with c: bisection, until floats are next to each other
    low, high = 0.0, max(top / w for w, top in zip(weights, most, strict=True) if w > 0)
    for _ in range(200):
        middle = (low + high) / 2
        over = sum(r * cost for r, cost in zip(clipped(middle), costs, strict=True)) > budget
        low, high = (low, middle) if over else (middle, high)
    wanted = clipped(low)
    ranks = [int(r) for r in wanted]
    left = budget - sum(r * cost for r, cost in zip(ranks, costs, strict=True))
    order = sorted(range(len(ranks)), key=lambda k: ranks[k] - wanted[k])
    while takers := [k for k in order if ranks[k] < most[k] and costs[k] <= left]:
        for k in takers:
            if costs[k] <= left:
                ranks[k] += 1
                left -= costs[k]
    return ranks


def share_out_components(
    components: Sequence[Tensor], costs: Sequence[int], budget: int, *, least: int, most: Sequence[int]
) -> list[int]:
    """Return how many components each matrix gets, if those with the largest value of all matrices are taken first.

    components: of each matrix, at least most_k values, descending. The first `least` of each are taken in any case.
    Raise ValueError as `share_out` does.
    """
    check_budget(costs, budget, least=least, most=most)
    ranks = [least] * len(costs)
    left = budget - least * sum(costs)
    heap = [(-float(components[k][least]), k) for k in range(len(costs)) if least < most[k]]
    heapq.heapify(heap)
    while heap:
        _, k = heapq.heappop(heap)
        if costs[k] <= left:  # else all further components of this matrix cost too much as well
            ranks[k] += 1
            left -= costs[k]
            if ranks[k] < most[k]:
                heapq.heappush(heap, (-float(components[k][ranks[k]]), k))
    return ranks


def check_budget(costs: Sequence[int], budget: int, *, least: int, most: Sequence[int]) -> None:
    """Raise ValueError if no ranks between `least` and `most` meet the budget."""
    few, many = least * sum(costs), sum(top * cost for top, cost in zip(most, costs, strict=True))
    if budget < few:
        raise ValueError(
            f"a budget of {budget:,} parameters is less than the {few:,} of rank {least} everywhere; raise --budget or "
            "lower --min"
        )
    if budget > many:
        raise ValueError(
            f"a budget of {budget:,} parameters is more than the {many:,} of the largest ranks that are allowed; raise "
            "--max or lower --budget"
        )


def stable_rank(w: Tensor, seed: int = 0) -> float:
    """Return |W|_F^2 / sigma_1^2 of a float32 matrix; 0 of a matrix of zeros. sigma_1 is that of a randomized SVD."""
    sigma = float(top_triplets(Matrix(w), 1, niter=NITER, seed=seed, device=w.device).S[0])
    return float(w.double().square().sum()) / sigma**2 if sigma else 0.0


def intrinsic_dimension(points: Tensor) -> float:
    """Return the TwoNN dimension of the manifold on which points (count, d) lie.

    Of points that are there twice the nearest neighbour has no distance: they are left out. Raise ValueError if fewer
    than three points are left.
    """
    distances = torch.cdist(points.double(), points.double())  # (count, count)
    distances.fill_diagonal_(torch.inf)
    nearest, second = distances.topk(min(2, len(points)), largest=False).values.T[[0, -1]]
    mu = (second / nearest)[(nearest > 0) & second.isfinite()].sort().values
    kept = int(len(mu) * (1 - FARTHEST))
    if kept < 3:
        raise ValueError(
            f"{len(points)} samples have {len(mu)} different points with two neighbours; too few for an intrinsic "
            "dimension, raise --samples"
        )
    share = torch.arange(1, kept + 1, dtype=torch.float64, device=mu.device) / len(mu)  # F(mu)
    x, y = mu[:kept].log(), -(1 - share).log()
    return float((x * y).sum() / (x * x).sum())
