"""Importance against AdaLoRA's equations written naively in numpy, and pair sums over runs that are cut anywhere."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_lowrank.numerics.importance import pair_sums, update_

pytestmark = pytest.mark.quick


def naive(steps: list[tuple[np.ndarray, np.ndarray]], beta1: float, beta2: float) -> tuple[np.ndarray, np.ndarray]:
    """Entry by entry: I = |w g|, mean <- b1 mean + (1 - b1) I, spread <- b2 spread + (1 - b2) |I - mean| with the new
    mean.
    """
    mean, spread = np.zeros_like(steps[0][0]), np.zeros_like(steps[0][0])
    for w, g in steps:
        for i in np.ndindex(w.shape):
            now = abs(w[i] * g[i])
            mean[i] = beta1 * mean[i] + (1 - beta1) * now
            spread[i] = beta2 * spread[i] + (1 - beta2) * abs(now - mean[i])
    return mean, spread


def history(numel: int, count: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(numel)
    return [tuple(torch.randn(numel, generator=rng, dtype=torch.float64).to(dtype) for _ in "wg") for _ in range(count)]


@pytest.mark.parametrize("beta1,beta2", [(0.85, 0.85), (0.85, 0.6), (0.0, 0.9), (0.3, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_update_is_the_equations_over_several_steps_and_many_runs(dtype, beta1, beta2):
    runs = [history(numel, 5, dtype) for numel in (7, 1, 0, 12)]  # a rank may hold nothing of a matrix
    mean, spread = ([torch.zeros_like(run[0][0]) for run in runs] for _ in range(2))
    storage = [t.data_ptr() for t in mean + spread]
    for step in range(5):
        w, g = [run[step][0].clone() for run in runs], [run[step][1].clone() for run in runs]
        update_(mean, spread, w=w, g=g, beta1=beta1, beta2=beta2)
        for run, (left, right) in zip(runs, zip(w, g, strict=True), strict=True):
            assert torch.equal(left, run[step][0]) and torch.equal(right, run[step][1])  # read only
    assert [t.data_ptr() for t in mean + spread] == storage
    for run, found_mean, found_spread in zip(runs, mean, spread, strict=True):
        wanted = naive([(w.double().numpy(), g.double().numpy()) for w, g in run], beta1, beta2)
        for found, exact in zip((found_mean, found_spread), wanted, strict=True):
            # averages of numbers up to 9 or so, a handful of roundings of each
            np.testing.assert_allclose(found.double().numpy(), exact, rtol=0, atol=30 * torch.finfo(dtype).eps)


def test_spread_measures_from_the_mean_that_already_knows_this_step():
    mean, spread = [torch.zeros(1)], [torch.zeros(1)]
    w, g = [torch.tensor([-2.0])], [torch.tensor([4.0])]
    update_(mean, spread, w=w, g=g, beta1=0.75, beta2=0.5)  # I = 8
    assert mean[0].item() == 2.0  # 0.25 * 8
    assert spread[0].item() == 3.0  # 0.5 * |8 - 2|, not 0.5 * |8 - 0|


@given(
    st.integers(1, 5),
    st.integers(1, 7),
    st.lists(st.integers(0, 35), max_size=5),
    st.booleans(),
    st.lists(st.integers(-9, 9), min_size=35, max_size=35),
)
def test_pair_sums_over_runs_cut_anywhere_add_up_to_the_whole(r, d, cuts, rows_are_pairs, scores):
    shape = (r, d) if rows_are_pairs else (d, r)
    score = torch.tensor(scores[: r * d], dtype=torch.float32).view(shape)
    bounds = [0, *sorted(min(cut, r * d) for cut in cuts), r * d]  # equal neighbours: an empty run
    parts = [
        pair_sums(score.view(-1)[start:stop], start, rank=r, row_length=shape[1], rows_are_pairs=rows_are_pairs)
        for start, stop in itertools.pairwise(bounds)
    ]
    assert all(part.shape == (r,) and part.dtype == torch.float64 for part in parts)
    assert torch.equal(sum(parts), score.double().sum(1 if rows_are_pairs else 0))  # whole numbers: exact


def test_a_run_says_nothing_about_pairs_that_it_does_not_touch():
    ones = torch.ones(5)
    assert pair_sums(ones, start=5, rank=4, row_length=4, rows_are_pairs=True).tolist() == [0, 3, 2, 0]
    assert pair_sums(ones[:2], start=5, rank=4, row_length=4, rows_are_pairs=False).tolist() == [0, 1, 1, 0]


def test_pair_sums_do_not_lose_small_scores_beside_large_ones():
    score = torch.tensor([1e8, 1.0, 1.0, 1.0, 1.0])  # in float32 1e8 + 1 = 1e8
    assert pair_sums(score, 0, rank=1, row_length=5, rows_are_pairs=True).item() == 1e8 + 4
