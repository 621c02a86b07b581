"""Pairs: bookkeeping moves columns with their rows, and compression keeps the product with as few pairs as it needs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_lowrank.numerics.pairs import Pairs

pytestmark = pytest.mark.quick

EPS = torch.finfo(torch.float64).eps


def integers(*shape: int, seed: int) -> Tensor:
    """Small whole numbers: their products and sums are exact in float32."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def random(m: int, k: int, n: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Pairs:
    rng = torch.Generator().manual_seed(seed)
    return Pairs(*(torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in ((m, k), (k, n))))


def spectral(values: list[float], m: int = 12, n: int = 9) -> Pairs:
    """Pairs whose product has these singular values."""
    noise = random(m, len(values), n)
    u, v = torch.linalg.qr(noise.B)[0], torch.linalg.qr(noise.A.T)[0]
    return Pairs(u * torch.tensor(values, dtype=torch.float64), v.T)


def sum_of_pairs(pairs: Pairs) -> Tensor:
    """sum_k B[:, k] A[k, :], pair by pair in float64."""
    total = torch.zeros(pairs.shape, dtype=torch.float64)
    for k in range(len(pairs)):
        total += pairs.B[:, k, None].double() * pairs.A[k].double()
    return total


# ---- bookkeeping


@pytest.mark.parametrize(
    "index", [torch.tensor([4, 0, 2]), slice(1, 3), slice(5, 9), torch.tensor([], dtype=torch.long)], ids=str
)
def test_take_picks_columns_of_b_with_the_same_rows_of_a(index):
    pairs = random(6, 5, 4)
    taken = pairs.take(index)
    wanted = torch.arange(5)[index].tolist()
    assert len(taken) == len(wanted) and taken.shape == pairs.shape
    for k, source in enumerate(wanted):
        assert torch.equal(taken.B[:, k], pairs.B[:, source]) and torch.equal(taken.A[k], pairs.A[source])


def test_take_by_a_tensor_is_a_copy_that_survives_put():
    pairs = random(6, 5, 4)
    before, index = Pairs(pairs.B.clone(), pairs.A.clone()), torch.tensor([3, 1])
    old = pairs.take(index)
    pairs.put_(index, random(6, 2, 4, seed=1))
    assert torch.equal(old.B, before.B[:, index]) and torch.equal(old.A, before.A[index])


def test_put_overwrites_these_pairs_in_place_and_no_others():
    pairs, fresh, index = random(6, 5, 4), random(6, 2, 4, seed=1), torch.tensor([3, 1])
    before, storage = Pairs(pairs.B.clone(), pairs.A.clone()), (pairs.B.data_ptr(), pairs.A.data_ptr())
    pairs.put_(index, fresh)
    assert (pairs.B.data_ptr(), pairs.A.data_ptr()) == storage
    for k, source in enumerate(index.tolist()):
        assert torch.equal(pairs.B[:, source], fresh.B[:, k]) and torch.equal(pairs.A[source], fresh.A[k])
    for k in (0, 2, 4):
        assert torch.equal(pairs.B[:, k], before.B[:, k]) and torch.equal(pairs.A[k], before.A[k])


def test_put_wants_as_many_pairs_as_go():
    with pytest.raises(AssertionError):
        random(6, 5, 4).put_(torch.tensor([0, 1, 2]), random(6, 1, 4))  # would broadcast silently


@pytest.mark.parametrize("b,a", [((6, 5), (4, 3)), ((6, 5), (5,)), ((6, 5, 1), (5, 4))])
def test_shapes_that_do_not_multiply_are_refused(b, a):
    with pytest.raises(AssertionError):
        Pairs(torch.zeros(b), torch.zeros(a))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_cat_is_the_sum_of_the_products(ranks):
    parts = [Pairs(integers(5, k, seed=k), integers(k, 7, seed=k + 9)) for k in ranks]
    whole = Pairs.cat(parts)
    assert len(whole) == sum(ranks) and whole.shape == (5, 7)
    assert torch.equal(whole.product(), sum(p.product() for p in parts))  # whole numbers: exact


@pytest.mark.parametrize("s", [2.0, -1.0, 0.0, 0.7])
def test_scaled_scales_the_product_and_leaves_a(s):
    pairs = random(6, 3, 4)
    kept = pairs.B.clone()
    torch.testing.assert_close(pairs.scaled(s).product(), s * pairs.product(), rtol=8 * EPS, atol=8 * EPS)
    assert torch.equal(pairs.scaled(s).A, pairs.A) and torch.equal(pairs.B, kept)


def test_product_is_the_sum_over_pairs():
    pairs = random(6, 3, 4)
    torch.testing.assert_close(pairs.product(), sum_of_pairs(pairs), rtol=8 * EPS, atol=8 * EPS)


def test_to_changes_the_type_of_both_factors():
    moved = random(6, 3, 4).to("cpu", torch.bfloat16)
    assert moved.B.dtype == moved.A.dtype == torch.bfloat16
    assert torch.equal(moved.B, random(6, 3, 4).B.bfloat16())


# ---- compression


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 12), st.integers(0, 999))
def test_compress_finds_the_exact_rank_and_keeps_the_product(m, n, k, hidden, seed):
    # k pairs that are combinations of `hidden` ones, more or fewer than m and n; whole numbers, so that float32 holds
    # them exactly
    pairs = Pairs(integers(m, hidden, seed=seed) @ integers(hidden, k, seed=seed + 1), integers(k, n, seed=seed + 2))
    dense = sum_of_pairs(pairs)
    small, error = pairs.to(dtype=torch.float64).compress()
    scale = float(pairs.B.double().norm() * pairs.A.double().norm())
    assert len(small) == int(torch.linalg.matrix_rank(dense, rtol=1e-7))
    assert small.shape == (m, n)
    bound = 50 * EPS * scale  # a few QR, SVD and products of at most 12 columns, each within a few ulps of the operands
    assert float((sum_of_pairs(small) - dense).norm()) <= error + bound and error <= bound


def test_compress_finds_rank_12_of_a_rank_20_ledger():
    # five events of 4 pairs over 12 directions, as a run with repeated visits would leave
    rng = torch.Generator().manual_seed(0)
    ub, ua = torch.randn(40, 12, generator=rng), torch.randn(12, 30, generator=rng)
    pairs = Pairs(torch.cat([ub, ub[:, :8]], 1), torch.cat([ua, 2 * ua[:8]], 0))
    small, error = pairs.compress()
    assert len(pairs) == 20 and len(small) == 12
    dense = sum_of_pairs(pairs)
    # the factors come back in float32: half an ulp each, over 12 balanced pairs
    assert float((sum_of_pairs(small) - dense).norm()) <= 2e-7 * float(dense.norm()) and error <= 1e-12 * float(
        dense.norm()
    )


def test_compress_reports_the_frobenius_norm_of_what_it_dropped():
    pairs = spectral([5.0, 1e-1, 3e-4, 4e-4])
    small, error = pairs.compress(tol=1e-3)  # keeps what is above 5e-3
    assert len(small) == 2
    assert error == pytest.approx(5e-4, rel=1e-10)  # sqrt(3^2 + 4^2)
    assert float((small.product() - pairs.product()).norm()) == pytest.approx(error, rel=1e-8)


@pytest.mark.parametrize("tol,rank", [(1e-1, 1), (1e-3, 2), (1e-5, 3), (1e-7, 4), (0.0, 4)])
def test_tol_is_relative_to_the_largest_singular_value(tol, rank):
    small, _ = spectral([100.0, 1.0, 1e-2, 1e-4]).compress(tol)
    assert len(small) == rank


@pytest.mark.parametrize(
    "pairs",
    [
        Pairs(torch.zeros(6, 3), torch.ones(3, 4)),
        Pairs(torch.ones(6, 9), torch.zeros(9, 4)),
        Pairs.cat([random(20, 4, 15, torch.float32), random(20, 4, 15, torch.float32).scaled(-1)]),
        Pairs(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 2.0], [1.0, 2.0]])),
    ],
    ids=["B=0", "A=0", "done-and-undone", "opposite-pairs"],
)
def test_a_zero_product_needs_no_pairs(pairs):
    small, error = pairs.compress()
    assert len(small) == 0 and small.shape == pairs.shape
    assert torch.equal(small.product(), torch.zeros(pairs.shape))
    assert error <= 50 * EPS * float(pairs.B.norm() * pairs.A.norm())


def test_no_pairs_compress_to_no_pairs():
    small, error = Pairs(torch.zeros(6, 0), torch.zeros(0, 4)).compress()
    assert (len(small), small.shape, error) == (0, (6, 4), 0.0)


def test_compressed_factors_are_balanced():
    # |b_k| = |a_k| = sqrt(s_k), and both sides orthogonal
    values = [5.0, 0.1, 1e-3]
    small, _ = spectral(values).compress()
    wanted = torch.diag(torch.tensor(values, dtype=torch.float64))
    torch.testing.assert_close(small.B.T @ small.B, wanted, rtol=0, atol=20 * EPS * 5)
    torch.testing.assert_close(small.A @ small.A.T, wanted, rtol=0, atol=20 * EPS * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compress_keeps_the_type_and_computes_in_float64(dtype):
    pairs = random(30, 6, 20, dtype)
    small, _ = Pairs.cat([pairs, pairs.scaled(0.5)]).compress()
    assert small.B.dtype == small.A.dtype == dtype and len(small) == 6
    dense = 1.5 * sum_of_pairs(pairs)  # halves are exact in any binary type
    # only the last rounding of B and A is in `dtype`: relative eps / 2 in each factor, of balanced pairs
    assert float((sum_of_pairs(small) - dense).norm()) <= torch.finfo(dtype).eps * float(dense.norm())


def test_compress_never_forms_the_product():
    m = n = 200_000  # the product would take 320 GB
    pairs = Pairs(torch.ones(m, 2), torch.ones(2, n))
    small, _ = pairs.compress()
    assert len(small) == 1
    torch.testing.assert_close(small.B[:3] @ small.A[:, :3], torch.full((3, 3), 2.0))
