"""Weight: products and updates of a frozen W of which a rank holds a span that may start and stop within a row.

Ranks are simulated in one process: one flat tensor is cut into spans, and sums over ranks are made by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_lowrank.codecs import Codec, Dense, Int8, Nf4
from llm_lowrank.engines.weight import Weight
from llm_lowrank.numerics.pairs import Block, Pairs

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@dataclass
class Cut:
    """W (m, n), cut at `bounds` of its flattened form."""

    m: int
    n: int
    bounds: list[int]
    seed: int

    def integers(self, *shape: int) -> Tensor:
        """Small whole numbers: all their products and sums are exact in float32, and exact in bfloat16 up to 256."""
        self.seed += 1
        return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(self.seed)).float()

    def normal(self, *shape: int) -> Tensor:
        self.seed += 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def weights(self, flat: Tensor) -> list[Weight]:
        """One Weight per rank, views into `flat` as an engine's storage is."""
        spans = zip(self.bounds[:-1], self.bounds[1:], strict=True)
        return [
            Weight(
                shape=(self.m, self.n),
                codec=Dense(flat.dtype),
                parts={"weight": flat[start:stop]},
                start=start,
                numel=stop - start,
                device=CPU,
                sum=lambda t: t,
            )
            for start, stop in spans
        ]


@st.composite
def cuts(draw) -> Cut:
    m, n = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    inner = draw(st.lists(st.integers(0, m * n), max_size=4))  # anywhere, several at the same place: empty spans too
    return Cut(m, n, [0, *sorted(inner), m * n], draw(st.integers(0, 10**6)))


def over_ranks(weights: list[Weight], call: Callable[[Weight], Tensor]) -> list[Tensor]:
    """What each rank returns when `sum` really sums over all of them."""
    shares: list[Tensor] = []
    for weight in weights:
        weight.sum = lambda t: shares.append(t.clone()) or t
        call(weight)
    assert len(shares) == len(weights)  # one collective each, the ranks without an element too
    total = sum(shares)
    for weight in weights:
        weight.sum = lambda t: t.copy_(total)
    return [call(weight) for weight in weights]


law = settings(max_examples=80, deadline=None)


@law
@given(cuts())
def test_read_gives_my_rows_with_zeros_where_others_hold_the_element(cut):
    flat = cut.integers(cut.m * cut.n) + 9  # no zero among them
    total = torch.zeros(cut.m, cut.n)
    for weight in cut.weights(flat):
        block = weight.read()
        assert block.shape == (weight.rows.stop - weight.rows.start, cut.n)
        assert int((block != 0).sum()) == weight.numel
        total[weight.rows] += block
    assert torch.equal(total.view(-1), flat)


@law
@given(cuts(), st.sampled_from(DTYPES))
def test_products_and_row_norms_are_those_of_the_whole_on_every_rank(cut, dtype):
    flat = cut.integers(cut.m * cut.n).to(dtype)
    weights, w = cut.weights(flat), flat.view(cut.m, cut.n).double().clone()
    wide = torch.promote_types(dtype, torch.float32)
    x, y = cut.integers(cut.n, 3).to(wide), cut.integers(cut.m, 2).to(wide)
    for found in over_ranks(weights, lambda weight: weight.matmul(x)):
        assert found.dtype == wide and torch.equal(found.double(), w @ x.double())
    for found in over_ranks(weights, lambda weight: weight.rmatmul(y)):
        assert found.dtype == wide and torch.equal(found.double(), w.T @ y.double())
    for found in over_ranks(weights, lambda weight: weight.row_norms()):
        assert torch.equal(found, w.square().sum(1).float().sqrt())
    assert torch.equal(flat.view(cut.m, cut.n).double(), w)  # looking changes nothing


@law
@given(cuts(), st.sampled_from(DTYPES))
def test_write_stores_my_elements_and_ignores_those_of_others(cut, dtype):
    for which in range(len(cut.bounds) - 1):
        flat = cut.integers(cut.m * cut.n).to(dtype)
        before, weight = flat.clone(), cut.weights(flat)[which]
        block = torch.full((weight.rows.stop - weight.rows.start, cut.n), 77.0)
        weight.write(block)
        mine = slice(weight.start, weight.start + weight.numel)
        assert bool((flat[mine] == 77).all())
        assert torch.equal(flat[: mine.start], before[: mine.start]) and torch.equal(
            flat[mine.stop :], before[mine.stop :]
        )
        assert bool((block == 77).all())


@law
@given(cuts(), st.integers(0, 3), st.sampled_from(DTYPES))
def test_add_over_all_ranks_is_w_plus_the_product_and_counts_right(cut, k, dtype):
    # whole numbers up to 4 + 3 * 16 fit every type: nothing may be lost
    flat = cut.integers(cut.m * cut.n).to(dtype)
    before = flat.view(cut.m, cut.n).double().clone()  # a float64 W would be the same tensor
    wide = torch.promote_types(dtype, torch.float32)
    left, right = cut.integers(cut.m, k).to(wide), cut.integers(k, cut.n).to(wide)
    update = left.double() @ right.double()
    counts = [weight.add_(Pairs(left, right)) for weight in cut.weights(flat)]
    assert torch.equal(flat.view(cut.m, cut.n).double(), before + update)
    assert sum(counts).tolist() == [float(update.square().sum()), 0.0, float((update != 0).sum())]


@law
@given(cuts(), st.sampled_from(DTYPES))
def test_add_on_one_rank_leaves_elements_of_others_untouched_and_counts_its_own_only(cut, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    left, right = cut.integers(cut.m, 2).to(wide), cut.integers(2, cut.n).to(wide)
    update = (left @ right).view(-1).double()
    for which in range(len(cut.bounds) - 1):
        flat = cut.integers(cut.m * cut.n).to(dtype)
        before, weight = flat.clone(), cut.weights(flat)[which]
        counts = weight.add_(Pairs(left, right)).tolist()
        mine = slice(weight.start, weight.start + weight.numel)
        assert torch.equal(flat[: mine.start], before[: mine.start]) and torch.equal(
            flat[mine.stop :], before[mine.stop :]
        )
        assert torch.equal(flat[mine].double(), before[mine].double() + update[mine])
        assert counts == [float(update[mine].square().sum()), 0.0, float((update[mine] != 0).sum())]


@law
@given(cuts(), st.sampled_from([1e-3, 1e-2, 1.0]))
def test_add_measures_what_bf16_rounding_took(cut, size):
    flat = cut.normal(cut.m * cut.n).bfloat16()
    before = flat.view(cut.m, cut.n).double()
    left, right = cut.normal(cut.m, 2) * size, cut.normal(2, cut.n)
    asked = (left @ right).double()
    found = sum(weight.add_(Pairs(left, right)) for weight in cut.weights(flat))
    stored = flat.view(cut.m, cut.n).double() - before
    # the product of some rows may round in float32 otherwise than that of all rows: asked is off by 1e-7 of itself
    assert float(found[0]) == pytest.approx(float(asked.square().sum()), rel=1e-5)
    # |stored - asked| itself is what remains of two such numbers, so its bound is absolute
    assert float(found[1]) ** 0.5 == pytest.approx(
        float((stored - asked).norm()), rel=1e-3, abs=1e-6 * float(asked.norm())
    )
    assert float(found[2]) == float((stored != 0).sum())
    # half an ulp each
    assert float((stored - asked).norm()) <= 2**-8 * float((before + asked).norm()) + 1e-6 * float(asked.norm())


@law
@given(cuts(), st.sampled_from([1e-3, 1e-2, 1.0]))
def test_add_to_a_float32_weight_loses_its_rounding_only(cut, size):
    flat = cut.normal(cut.m * cut.n)
    before = flat.view(cut.m, cut.n).double()
    left, right = cut.normal(cut.m, 2) * size, cut.normal(2, cut.n)
    asked = (left @ right).double()
    found = sum(weight.add_(Pairs(left, right)) for weight in cut.weights(flat))
    # half an ulp of W + D where it is stored, and another of D where the difference is formed
    assert float(found[1]) ** 0.5 <= 2**-24 * float((before + asked).norm() + asked.norm())
    assert float(found[0]) == pytest.approx(float(asked.square().sum()), rel=1e-5)
    assert int(found[2]) == int((flat.view(cut.m, cut.n).double() != before).sum())
    torch.testing.assert_close(flat.view(cut.m, cut.n).double(), before + asked, rtol=2**-23, atol=1e-6 * size)


@pytest.mark.parametrize("bounds", [[0, 15], [0, 4, 11, 15]], ids=["whole", "cut"])
@pytest.mark.parametrize(
    "ulps,stored",
    [
        (0.0, 0.0),
        (0.25, 0.0),
        (0.5, 0.0),
        (0.75, 1.0),
        (1.0, 1.0),
        (1.25, 1.0),
        (2.0, 2.0),
        (-0.25, 0.0),
        (-0.375, -0.5),
    ],
)
def test_lost_and_changed_follow_the_rounding_of_a_bf16_one(bounds, ulps, stored):
    # around 1 the spacing of bf16 is u = 2^-7 above and u / 2 below; ties go to the even neighbour, which 1 is
    u = 2.0**-7
    flat = torch.ones(15, dtype=torch.bfloat16)
    left, right = torch.full((5, 1), ulps * u), torch.ones(1, 3)
    expected = [15 * (ulps * u) ** 2, 15 * ((ulps - stored) * u) ** 2, 15.0 if stored else 0.0]
    assert sum(w.add_(Pairs(left, right)) for w in Cut(5, 3, bounds, 0).weights(flat)).tolist() == expected
    assert flat.tolist() == [1 + stored * u] * 15


def test_an_update_far_below_the_spacing_of_bf16_is_reported_as_lost():
    cut = Cut(40, 30, [0, 401, 1200], 0)
    flat = cut.normal(1200).bfloat16()
    left, right = cut.normal(40, 2) * 1e-5, cut.normal(2, 30)
    asked, lost, changed = sum(weight.add_(Pairs(left, right)) for weight in cut.weights(flat)).tolist()
    assert (lost / asked) ** 0.5 > 0.9 and changed < 60  # only elements near zero have a spacing as fine as that


def test_products_are_made_on_the_device_in_float32_at_least():
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        (weight,) = Cut(2, 3, [0, 6], 0).weights(torch.ones(6, dtype=dtype))
        assert weight.read().dtype == wide


def test_writing_asks_the_engine_on_every_rank_to_renew_its_copies():
    asked: list[int] = []
    weights = Cut(3, 4, [0, 5, 12, 12], 0).weights(torch.zeros(12))
    for rank, weight in enumerate(weights):
        weight.written = lambda rank=rank: asked.append(rank)
        weight.add_(Pairs(torch.ones(3, 1), torch.ones(1, 4)))
    assert asked == [0, 1, 2]  # the one without an element too: renewing is collective


def test_a_codec_with_several_parts_reads_its_rows():
    class Scaled:  # codes and one scale per row, as a quantized weight has
        writable = True

        def layout(self, n: int) -> dict[str, tuple[int, torch.dtype]]:
            return {"codes": (n, torch.float32), "scale": (1, torch.float32)}

        def encode(self, w: Tensor) -> dict[str, Tensor]:
            scale = w.abs().amax(1, keepdim=True)
            return {"codes": w / scale, "scale": scale}

        def decode(self, parts: dict[str, Tensor], n: int) -> Tensor:
            return parts["codes"] * parts["scale"]

    w = torch.arange(1.0, 13.0).view(3, 4)
    parts = {name: part.view(-1) for name, part in Scaled().encode(w).items()}
    for rows in (slice(0, 2), slice(2, 3), slice(3, 3)):
        mine = {"codes": parts["codes"][4 * rows.start : 4 * rows.stop], "scale": parts["scale"][rows]}
        weight = Weight(
            shape=(3, 4),
            codec=Scaled(),
            parts=mine,
            start=4 * rows.start,
            numel=4 * (rows.stop - rows.start),
            device=CPU,
            sum=lambda t: t,
        )
        torch.testing.assert_close(weight.read(), w[rows])
        weight.add_(Pairs(torch.ones(3, 1), torch.full((1, 4), 12.0)))
        torch.testing.assert_close(weight.read(), w[rows] + 12)


@pytest.mark.parametrize("codec", [Nf4(), Nf4(double_quant=True), Int8(), Dense()], ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_rows_of_a_quantized_weight_with_padding_give_the_products_of_the_whole(codec: Codec, world: int):
    """Every rank stores equally many rows; those from m on are padding. 7 rows over 8 ranks leave one without any."""
    m, n = 7, 70
    w = Cut(m, n, [], 0).normal(m, n)
    parts, each = codec.encode(w), -(-m // world)
    whole = codec.decode(parts, n)
    weights = []
    for rank in range(world):
        # padding of anything but zeros
        rows = {name: part.new_full((each, part.shape[1]), 7) for name, part in parts.items()}
        mine = slice(min(rank * each, m), min((rank + 1) * each, m))
        for name, part in parts.items():
            rows[name][: mine.stop - mine.start] = part[mine]
        first, stop = rank * each, (rank + 1) * each
        weights.append(Weight.of_rows((m, n), codec, rows, first=first, stop=stop, device=CPU, sum=lambda t: t))
        assert (weights[-1].start, weights[-1].numel) == (mine.start * n, (mine.stop - mine.start) * n) and weights[
            -1
        ].whole_rows
        assert torch.equal(weights[-1].read(), whole[mine])
    x, y = torch.eye(n), torch.eye(m)
    for found in over_ranks(weights, lambda weight: weight.matmul(x)):
        assert torch.equal(found, whole)
    for found in over_ranks(weights, lambda weight: weight.rmatmul(y)):
        assert torch.equal(found, whole.T)
    for found in over_ranks(weights, lambda weight: weight.row_norms()):
        torch.testing.assert_close(found, whole.norm(dim=1))


def test_all_of_a_weight_is_a_view_of_what_the_engine_stores():
    flat = torch.ones(3, 4)
    stored = {"weight": torch.nn.Parameter(flat, requires_grad=False)}
    Weight.everything((3, 4), Dense(), stored, CPU).add_(Pairs(torch.ones(3, 1), torch.ones(1, 4)))
    assert flat.tolist() == [[2.0] * 4] * 3


@pytest.mark.parametrize("codec", [Nf4(), Int8()], ids=str)
def test_a_quantized_weight_is_never_written(codec: Codec):
    parts = codec.encode(Cut(4, 64, [], 0).normal(4, 64))
    before = {name: part.clone() for name, part in parts.items()}
    weight = Weight.everything((4, 64), codec, parts, CPU)
    for call in (lambda: weight.write(weight.read()), lambda: weight.add_(Pairs(torch.ones(4, 1), torch.ones(1, 64)))):
        with pytest.raises(AssertionError, match="a quantized weight is never written again"):
            call()
    assert all(torch.equal(part, before[name]) for name, part in parts.items())


@law
@given(cuts(), st.data())
def test_adding_a_block_changes_its_entries_alone_whoever_holds_them(cut, data):
    rows = sorted(data.draw(st.sets(st.integers(0, cut.m - 1))))
    columns = sorted(data.draw(st.sets(st.integers(0, cut.n - 1))))
    # odd: no zero among them
    values, before = cut.integers(len(rows), len(columns)) * 2 + 1, cut.integers(cut.m * cut.n)
    flat = before.clone()
    at = torch.tensor(rows, dtype=torch.int64), torch.tensor(columns, dtype=torch.int64)
    measured = sum(
        (weight.add_(Block(*at, values, (cut.m, cut.n))) for weight in cut.weights(flat)),
        torch.zeros(3, dtype=torch.float64),
    )
    wanted = before.view(cut.m, cut.n).clone()
    wanted[at[0][:, None], at[1]] += values
    assert torch.equal(flat.view(cut.m, cut.n), wanted)
    assert measured.tolist() == [float(values.square().sum()), 0.0, values.numel()]


@law
@given(cuts())
def test_what_is_mine_of_a_block_covers_it_once_over_all_ranks(cut):
    whole, total = cut.integers(cut.m, cut.n) + 9, torch.zeros(cut.m, cut.n)
    for weight in cut.weights(cut.integers(cut.m * cut.n)):
        mine = weight.mine_(whole[weight.rows].clone())
        assert int((mine != 0).sum()) == weight.numel
        total[weight.rows] += mine
    assert torch.equal(total, whole)
