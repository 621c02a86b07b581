"""Singular pairs from products only, against torch.linalg.svd; remembered on disk; the same from a sharded weight."""

import pytest
import torch
from torch import Tensor

from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics import spectrum
from llm_lowrank.numerics.spectrum import OVERSAMPLE, Matrix, Triplets, cached_triplets, top_triplets
from tests import ranks
from tests.tiny import DTYPES, Trainee

pytestmark = pytest.mark.quick

EPS = torch.finfo(torch.float32).eps


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.linalg.qr(
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )[0]


def decaying(m: int, n: int, decay: float = 0.8, seed: int = 0) -> Tensor:
    """Singular values 1, decay, decay^2, ..."""
    q = min(m, n)
    s = decay ** torch.arange(q, dtype=torch.float64)
    return ((orthonormal(m, q, seed) * s) @ orthonormal(n, q, seed + 1).T).float()


class Spy:
    """What top_triplets may know of W: its shape and two products. Anything else raises AttributeError."""

    __slots__ = ("_matrix", "calls", "shape")

    def __init__(self, w: Tensor) -> None:
        self._matrix, self.calls, self.shape = Matrix(w), [], tuple(w.shape)

    def matmul(self, x: Tensor) -> Tensor:
        self.calls.append(("W", x.shape[1]))
        return self._matrix.matmul(x)

    def rmatmul(self, y: Tensor) -> Tensor:
        self.calls.append(("W^T", y.shape[1]))
        return self._matrix.rmatmul(y)


def assert_triplets(found: Triplets, w: Tensor, k: int, vectors: float) -> None:
    """Singular values to the rounding of float32 products; vectors to `vectors`; both sides orthonormal."""
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    assert [t.shape for t in found] == [(w.shape[0], k), (k,), (w.shape[1], k)]
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in found)
    # a product over n terms in float32 is off by about sqrt(n) eps |W|_2; a singular value by no more (Weyl)
    assert float((found.S.double() - s[:k]).abs().max()) <= 20 * EPS * float(s[0])
    for side, exact in ((found.U, u), (found.V, vt.T)):
        torch.testing.assert_close(
            side.double().T @ side.double(), torch.eye(k, dtype=torch.float64), rtol=0, atol=20 * EPS
        )
        # the cosine: the length of a float32 column is off by a few eps, as allowed above
        overlap = (side.double() * exact[:, :k]).sum(0).abs() / side.double().norm(dim=0)
        assert float((1 - overlap).max()) <= vectors
    # both signs belong together: U^T W V = diag(S), not diag(+-S)
    torch.testing.assert_close(found.U.T @ w @ found.V, torch.diag(found.S), rtol=0, atol=30 * EPS * float(s[0]))


@pytest.mark.parametrize("exact", [False, True], ids=["randomized", "exact"])
@pytest.mark.parametrize("shape", [(60, 45), (45, 60), (50, 50)], ids=str)
def test_top_triplets_of_a_decaying_spectrum_are_those_of_the_full_svd(shape, exact):
    w, k = decaying(*shape), 6
    # rounding turns a vector by about eps s_1 / gap <= 20 eps / (0.2 * 0.8^5), and 1 - cos = angle^2 / 2. What 4
    # iterations leave of the rest is (s_15 / s_6)^9 = 0.134^9 = 1e-8 of an angle: nothing.
    angle = 20 * EPS / (0.2 * 0.8**5)
    assert_triplets(top_triplets(Matrix(w), k, niter=4, exact=exact), w, k, vectors=angle**2 / 2 + 4 * EPS)


def test_more_iterations_come_closer_on_a_slow_spectrum():
    w, k = decaying(120, 100, decay=0.97), 5
    exact = torch.linalg.svdvals(w.double())[:k]
    errors = [float((top_triplets(Matrix(w), k, niter=niter).S - exact).abs().max()) for niter in (0, 1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    # none: the span of W X; 8: (s_14 / s_5)^17 = 0.76^17 = 1e-2 of an angle, squared
    assert errors[0] > 0.1 and errors[-1] < 1e-3


@pytest.mark.parametrize(
    "shape,k", [((9, 7), 7), ((7, 9), 7), ((30, 20), 20), ((20, 30), 13), ((1, 5), 1), ((5, 1), 1)], ids=str
)
@pytest.mark.parametrize("exact", [False, True], ids=["randomized", "exact"])
def test_k_may_go_up_to_min_m_n(shape, k, exact):
    w = decaying(*shape, decay=0.7)
    # gaps down to 0.3 * 0.7^19 = 3e-4: eps / gap, squared
    assert_triplets(top_triplets(Matrix(w), k, exact=exact), w, k, vectors=1e-5)


@pytest.mark.parametrize("k", [8, 100, 0, -1])
def test_k_beyond_min_m_n_is_refused_with_what_to_do(k):
    with pytest.raises(
        ValueError, match=rf"{k} singular directions asked of a 9 x 7 matrix, which has 7; lower rank or target_rank"
    ):
        top_triplets(Matrix(decaying(9, 7)), k)


def test_directions_beyond_the_rank_of_w_are_orthonormal_with_value_zero():
    w = decaying(40, 30, decay=0.5)[:, :3] @ torch.eye(3, 30)
    found = top_triplets(Matrix(w), 6, niter=2)
    assert float(found.S[3:].max()) <= 20 * EPS and float(found.S[2]) > 1e-2
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(6), rtol=0, atol=20 * EPS)
    torch.testing.assert_close((found.U * found.S) @ found.V.T, w, rtol=0, atol=30 * EPS)


@pytest.mark.parametrize("exact", [False, True], ids=["randomized", "exact"])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=str)
def test_the_largest_entry_of_every_left_vector_is_positive(shape, exact):
    for w in (decaying(*shape), -decaying(*shape), decaying(*shape, seed=5)):
        u = top_triplets(Matrix(w), 5, exact=exact).U
        assert bool((u.max(0).values == u.abs().max(0).values).all())


def test_the_same_seed_gives_bitwise_the_same_whatever_was_drawn_before():
    w = decaying(60, 45, decay=0.95)
    torch.manual_seed(1)
    first = top_triplets(Matrix(w), 6, niter=1, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = top_triplets(Matrix(w), 6, niter=1, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global generator either
    assert not torch.equal(top_triplets(Matrix(w), 6, niter=1, seed=4).S, first.S)


@pytest.mark.parametrize("niter", [0, 1, 4])
def test_randomized_asks_for_thin_products_only(niter):
    spy, k = Spy(decaying(60, 45)), 6
    found = top_triplets(spy, k, niter=niter)
    assert spy.calls == [("W", k + OVERSAMPLE), ("W^T", k + OVERSAMPLE)] * (niter + 1)
    assert torch.equal(found.S, top_triplets(Matrix(decaying(60, 45)), k, niter=niter).S)


@pytest.mark.parametrize("shape,side", [((60, 45), "W"), ((45, 60), "W^T")], ids=str)
@pytest.mark.parametrize("k,exact", [(6, True), (45 - OVERSAMPLE, False)], ids=["exact", "k-near-min"])
def test_exact_asks_once_for_min_m_n_columns(shape, side, k, exact):
    spy = Spy(decaying(*shape))
    top_triplets(spy, k, exact=exact)
    assert spy.calls == [(side, 45)]


# ---- the cache


@pytest.fixture
def computed(monkeypatch):
    """Counts the decompositions."""
    calls = []

    def count(w, *args, **kwargs):
        calls.append(args)
        return top_triplets(w, *args, **kwargs)

    monkeypatch.setattr(spectrum, "top_triplets", count)
    return calls


ASK = dict(k=4, niter=2, exact=False, seed=0)


def same(a: Triplets, b: Triplets) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_hit_is_bitwise_what_was_computed_and_computes_nothing(tmp_path, computed, dtype):
    w = decaying(40, 30).to(DTYPES[dtype])
    first = cached_triplets(w, **ASK, cache=tmp_path / "not" / "there")
    again = cached_triplets(w.clone(), **ASK, cache=tmp_path / "not" / "there")
    assert len(computed) == 1 and same(first, again)
    assert same(first, top_triplets(Matrix(w.float()), ASK["k"], niter=ASK["niter"]))
    assert same(first, cached_triplets(w, **ASK, cache=None)) and len(computed) == 2


def test_a_view_that_is_not_contiguous_hits_its_own_content(tmp_path, computed):
    w = decaying(40, 30)
    cached_triplets(w, **ASK, cache=tmp_path)
    cached_triplets(w.T.contiguous().T, **ASK, cache=tmp_path)
    assert len(computed) == 1


@pytest.mark.parametrize(
    "change",
    [
        dict(k=3),
        dict(niter=3),
        dict(exact=True),
        dict(seed=1),
        dict(w=lambda w: w.view(20, 60)),
        dict(w=lambda w: w.view(torch.int32)),
        dict(w=lambda w: torch.where(torch.arange(1200).view(40, 30) == 1199, torch.nextafter(w, w + 1), w)),
    ],
    ids=["k", "niter", "exact", "seed", "shape", "dtype", "last-bit-of-the-last-entry"],
)
def test_anything_that_changes_the_result_misses(tmp_path, computed, change):
    w = decaying(40, 30)
    cached_triplets(w, **ASK, cache=tmp_path)
    changed = {**ASK, **{key: value for key, value in change.items() if key != "w"}}
    found = cached_triplets(change.get("w", lambda w: w)(w), **changed, cache=tmp_path)
    assert len(computed) == 2 and len(list(tmp_path.iterdir())) == 2
    assert len(found.S) == changed["k"]
    cached_triplets(w, **ASK, cache=tmp_path)  # the first entry is still there
    assert len(computed) == 2


def test_a_changed_algorithm_misses(tmp_path, computed, monkeypatch):
    cached_triplets(decaying(40, 30), **ASK, cache=tmp_path)
    monkeypatch.setattr(spectrum, "ALGORITHM", spectrum.ALGORITHM + 1)
    cached_triplets(decaying(40, 30), **ASK, cache=tmp_path)
    assert len(computed) == 2


@pytest.mark.parametrize(
    "damage", [b"", b"not a tensor", "half", "other"], ids=["empty", "garbage", "cut-short", "another-file"]
)
def test_a_damaged_entry_is_computed_and_written_anew(tmp_path, computed, damage):
    w = decaying(40, 30)
    first = cached_triplets(w, **ASK, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    if damage == "other":
        spectrum.write_safetensors(entry, {"x": torch.zeros(2)})
    else:
        entry.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    assert same(first, cached_triplets(w, **ASK, cache=tmp_path)) and len(computed) == 2
    assert entry.read_bytes() == whole and list(tmp_path.iterdir()) == [entry]
    cached_triplets(w, **ASK, cache=tmp_path)
    assert len(computed) == 2


def test_without_a_cache_nothing_is_written_and_each_call_computes(tmp_path, computed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cached_triplets(decaying(40, 30), **ASK, cache=None)
    assert len(computed) == 2 and list(tmp_path.iterdir()) == []


# ---- sharded


def sharded(dtype: str, exact: bool) -> list[tuple[str, Triplets, bool]]:
    """top_triplets of every weight through collective products, and whether W was ever whole here."""
    trainee = Trainee(LoRA(rank=2), "zero3", dtype, num_hidden_layers=1)
    found = []
    for adapter in trainee.adapters:
        weight = trainee.engine.weight(adapter)
        found.append(
            (adapter.name, top_triplets(weight, 4, niter=3, exact=exact), weight.numel < adapter.weight.ds_numel)
        )
    return found


@pytest.mark.parametrize("exact", [False, True], ids=["randomized", "exact"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sharded_weight_gives_the_pairs_of_the_whole_matrix(dtype, exact):
    whole = Trainee(LoRA(rank=2), "plain", dtype, num_hidden_layers=1)
    for rank in ranks.run(2, sharded, dtype, exact):
        assert len(rank) == 7
        for (name, found, cut), adapter in zip(rank, whole.adapters, strict=True):
            assert name == adapter.name and cut
            w = adapter.weight.detach().float()
            alone = top_triplets(Matrix(w), 4, niter=3, exact=exact)
            # the same random start, the same algorithm: only the order of summation over ranks differs. Rounding turns
            # a vector by eps s_1 / gap; neighbouring values of these random matrices differ by 1 % of s_1 or more.
            tolerance = 20 * EPS / 0.01
            torch.testing.assert_close(found.S, alone.S, rtol=0, atol=20 * EPS * float(alone.S[0]))
            torch.testing.assert_close(found.U, alone.U, rtol=0, atol=tolerance)
            torch.testing.assert_close(found.V, alone.V, rtol=0, atol=tolerance)


def test_the_cache_tells_devices_apart(tmp_path, monkeypatch):
    """A GPU rounds in another way; its entry is not the CPU's."""
    w = torch.randn(9, 7, generator=torch.Generator().manual_seed(0))
    arguments = dict(niter=1, exact=True, seed=0, cache=tmp_path)
    cached_triplets(w, 3, device="cpu", **arguments)
    monkeypatch.setattr(spectrum, "top_triplets", lambda matrix, k, **_: Triplets(*torch.zeros(3, 2, 2)))
    assert cached_triplets(w, 3, device="cpu", **arguments).S.any()  # the entry of the CPU
    assert not cached_triplets(w, 3, device="meta", **arguments).S.any()
    assert len(list(tmp_path.iterdir())) == 2
