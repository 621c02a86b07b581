"""From scores to ranks under a budget, and the numbers that scores are made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_lowrank.numerics.budget import intrinsic_dimension, share_out, share_out_components, stable_rank

pytestmark = pytest.mark.quick

MATRIX = st.tuples(st.floats(0, 1e6), st.integers(2, 3000), st.integers(1, 64))  # weight, cost, highest rank


def spent(ranks: list[int], costs: tuple[int, ...] | list[int]) -> int:
    return sum(r * cost for r, cost in zip(ranks, costs, strict=True))


@given(st.lists(MATRIX, min_size=1, max_size=20), st.floats(0, 1))
def test_the_budget_is_met_as_near_as_whole_pairs_allow(matrices, share):
    weights, costs, most = zip(*matrices, strict=True)
    budget = round(sum(costs) + share * (spent(most, costs) - sum(costs)))
    if not max(weights):
        with pytest.raises(ValueError, match="all scores are 0"):
            share_out(weights, costs, budget, least=1, most=most)
        return
    ranks = share_out(weights, costs, budget, least=1, most=most)
    assert all(1 <= r <= top for r, top in zip(ranks, most, strict=True))
    left = budget - spent(ranks, costs)
    # no module that may have one pair more would still fit
    assert left >= 0 and all(r == top or cost > left for r, cost, top in zip(ranks, costs, most, strict=True))


def test_ranks_are_proportional_and_the_largest_remainders_come_first():
    # c = 16/6: 2.67, 5.33, 8 pairs; the remainder of the first is the largest
    assert share_out([1.0, 2.0, 3.0], [10] * 3, 160, least=1, most=[99] * 3) == [3, 5, 8]
    assert share_out([100.0, 200.0, 300.0], [10] * 3, 160, least=1, most=[99] * 3) == [3, 5, 8]
    assert share_out([1.0, 1.0, 1.0], [10] * 3, 200, least=1, most=[99] * 3) == [7, 7, 6]  # ties: the first ones
    assert share_out([1.0, 2.0, 3.0], [10] * 3, 160, least=4, most=[7] * 3) == [4, 5, 7]  # clipped at both ends
    assert share_out([1.0, 0.0], [10, 10], 120, least=1, most=[8, 8]) == [8, 4]  # the rest goes where it may


def test_components_of_all_matrices_compete():
    shares = [torch.tensor([0.5, 0.3, 0.1]), torch.tensor([0.4, 0.35, 0.2]), torch.tensor([0.9, 0.05, 0.0])]
    assert share_out_components(shares, [10] * 3, 60, least=1, most=[3] * 3) == [2, 3, 1]
    assert share_out_components(shares, [10] * 3, 60, least=2, most=[3] * 3) == [2, 2, 2]
    # a pair that costs too much is left out, and cheaper ones still come
    assert share_out_components(shares, [10, 35, 10], 85, least=1, most=[3] * 3) == [3, 1, 2]


@pytest.mark.parametrize("share, scores", [(share_out, [1.0, 1.0]), (share_out_components, [torch.ones(9)] * 2)])
def test_a_budget_that_cannot_be_met_says_what_to_change(share, scores):
    with pytest.raises(ValueError, match="budget of 30 parameters is less than the 40 of rank 2 everywhere; raise --"):
        share(scores, [10, 10], 30, least=2, most=[9, 9])
    with pytest.raises(ValueError, match="more than the 180 of the largest ranks that are allowed; raise --max or"):
        share(scores, [10, 10], 190, least=2, most=[9, 9])


def test_the_stable_rank_is_that_of_a_full_svd_and_no_scale_changes_it():
    w = torch.randn(60, 140, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 141)
    sigma = torch.linalg.svdvals(w.double())
    assert stable_rank(w) == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-4)
    assert stable_rank(7 * w) == pytest.approx(stable_rank(w), rel=1e-5)
    assert stable_rank(torch.eye(30)) == pytest.approx(30, rel=1e-4) and stable_rank(torch.zeros(4, 4)) == 0


@pytest.mark.parametrize("d", [2, 4])
@pytest.mark.parametrize("kind", ["plane", "sphere"])
def test_the_dimension_of_known_manifolds_in_fifty_dimensions(kind, d):
    random = torch.Generator().manual_seed(d)
    rotation = torch.linalg.qr(torch.randn(50, 50, generator=random))[0]
    points = torch.rand(2000, d, generator=random)
    if kind == "sphere":
        points = torch.nn.functional.normalize(torch.randn(2000, d + 1, generator=random), dim=1)
    points = points @ rotation[: points.shape[1]]
    assert intrinsic_dimension(points) == pytest.approx(d, rel=0.05)
    twice = torch.cat([points, points[:50]])  # points that are there twice say nothing
    assert intrinsic_dimension(twice) == pytest.approx(d, rel=0.07)


def test_too_few_points_are_refused():
    with pytest.raises(ValueError, match=r"4 samples have 0 different points .* raise --samples"):
        intrinsic_dimension(torch.ones(4, 5))
    with pytest.raises(ValueError, match="1 samples"):
        intrinsic_dimension(torch.ones(1, 5))
