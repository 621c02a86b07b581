"""The move itself, for both destinations on every kind of engine: its equation, its ledger, its report and its own
checks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, generator
from llm_lowrank.adapters.exchange import (
    PROBES,
    Exchanged,
    compress_bank_,
    exchange_,
    measure_exchange,
    renew_moments_,
    rewrite_,
)
from llm_lowrank.codecs import Codec
from llm_lowrank.engines import base
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.engines.weight import Weight
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.optimizers import OPTIMIZERS
from llm_lowrank.numerics.pairs import Pairs
from tests import ranks
from tests.tiny import Trainee

RANK, BANK, SCALE = 4, 5, 0.75
INDEX, SLOTS = [3, 0, 1], slice(1, 4)  # out of order: pair INDEX[k] goes to slot 1 + k
MODULES = ["k_proj", "down_proj"]  # 14 x 42 and 42 x 43
PERSISTED = {"stage3_param_persistence_threshold": 10**6}  # ZeRO-3 leaves every parameter gathered between steps
ENGINES: dict[str, tuple[str, int, dict]] = {
    "plain-1": ("plain", 1, {}),
    "plain-2": ("plain", 2, {}),
    "zero2-3": ("zero2", 3, {}),
    "zero3-2": ("zero3", 2, {}),
    "zero3-3": ("zero3", 3, {}),
    "zero3-2-persisted": ("zero3", 2, PERSISTED),
    "fsdp-1": ("fsdp", 1, {}),
    "fsdp-2": ("fsdp", 2, {}),
    "fsdp-3": ("fsdp", 3, {}),
    "fsdp-2-gathered": ("fsdp", 2, {"reshard_after_forward": False}),
    "fsdp-2-replicas": ("fsdp", 2, {"shard_size": 1}),
}
every_engine = pytest.mark.parametrize("engine", ENGINES)
both = pytest.mark.parametrize("into", ["weight", "bank"])
every_dtype = pytest.mark.parametrize("dtype", ["fp32", "bf16"])


@dataclass(frozen=True)
class Banked(LoRA):
    """LoRA with a bank that starts with random pairs, taken out of W; what is trained adds nothing at the start."""

    def bank(self, codec: Codec) -> int:
        return BANK

    def starting_pairs(self, adapters: list[Adapter], engine: base.Engine) -> Iterator[Pairs]:
        for a in adapters:
            trained = random_pairs(a, RANK, 2)
            yield Pairs.cat([Pairs(torch.zeros_like(trained.B), trained.A), random_pairs(a, BANK, 0)])


def trainee(engine: str, dtype: str = "fp32") -> Trainee:
    name, _, zero = ENGINES[engine]
    return Trainee(Banked(rank=RANK, alpha=RANK * SCALE, target_modules=MODULES), name, dtype, zero=zero)


def random_pairs(adapter: Adapter, count: int, step: int) -> Pairs:
    """Of the size of the principal pairs of a real layer: products of about a tenth of W."""
    (m, n), noise = adapter.shape, generator(7, adapter.name, step)
    return Pairs(torch.randn(m, count, generator=noise) / 10, torch.randn(count, n, generator=noise) / 10)


# --- one exchange, seen from outside ----------------------------------------------------------------------------------


@dataclass
class Layer:
    """Everything of one adapter, as the forward sees it."""

    W: Tensor
    trained: Pairs
    bank: Pairs
    moments: dict[str, Tensor]  # A.exp_avg, ...

    @classmethod
    def now(cls, t: Trainee, adapter: Adapter) -> Layer:
        a, b, bank_a, bank_b = (t.engine.whole(p) for p in adapter.factors())
        moments = {f"{name}.{k}": v for name in "AB" for k, v in t.engine.slot(getattr(adapter, name)).moments.items()}
        return cls(t.engine.whole(adapter.weight), Pairs(b, a), Pairs(bank_b, bank_a), moments)

    def map(self) -> Tensor:
        return self.W.double() + SCALE * sum(p.to(dtype=torch.float64).product() for p in (self.trained, self.bank))


@dataclass
class Seen:
    W0: Tensor
    start: Layer
    bank: Pairs  # what was taken out of W0
    error: float  # that loading reported
    before: Layer
    after: Layer
    fresh: Pairs | None
    event: Exchanged
    ledger: list[Pairs]
    logits: tuple[Tensor, Tensor]  # before and after all modules had theirs

    def asked(self) -> Tensor:
        """What W was asked to become more by: s (old pairs - fresh pairs)."""
        assert self.fresh is not None
        old = self.before.trained.take(torch.tensor(INDEX))
        return SCALE * (old.to(dtype=torch.float64).product() - self.fresh.to(dtype=torch.float64).product())


def exchange_everywhere(engine: str, dtype: str, into: str) -> dict[str, Seen]:
    """Trains two steps, exchanges three pairs of every module."""
    t = trainee(engine, dtype)
    index, found = torch.tensor(INDEX), {}
    started = {a.name: Layer.now(t, a) for a in t.adapters}
    for step in range(2):
        t.step(step)
    logits = t.logits()
    for a in t.adapters:
        before, fresh = Layer.now(t, a), random_pairs(a, len(INDEX), 1) if into == "weight" else None
        event = exchange_(t.engine, a, index, fresh=fresh, slots=None if fresh else SLOTS)
        found[a.name] = Seen(
            t.original[f"{a.name}.weight"],
            started[a.name],
            random_pairs(a, BANK, 0),
            t.loaded.errors[a.name],
            before,
            Layer.now(t, a),
            fresh,
            event,
            a.ledger,
            (logits, logits),
        )
    after = t.logits()
    for seen in found.values():
        seen.logits = (logits, after)
    return found


@functools.cache
def exchanged(engine: str, dtype: str, into: str) -> list[dict[str, Seen]]:
    return ranks.run(ENGINES[engine][1], exchange_everywhere, engine, dtype, into)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


@every_dtype
@both
@every_engine
def test_w_plus_s_b_a_stays(engine, into, dtype):
    for seen in exchanged(engine, dtype, into)[0].values():
        difference = relative(seen.after.map(), seen.before.map())
        if into == "bank":
            assert difference <= 1e-15  # the same pairs, added in another order in float64
        elif dtype == "fp32":
            assert 0 < difference <= 1e-7  # one rounding of W: 2^-24 / sqrt(3) of an entry
        else:
            assert 1e-4 < difference <= 2**-9  # one rounding to 8 bits
        before, after = seen.logits
        assert relative(after, before) <= (1e-6 if dtype == "fp32" else 2**-5)


@every_dtype
@both
@every_engine
def test_pairs_go_where_they_were_sent_and_nothing_else_moves(engine, into, dtype):
    stay, kept = [2], [0, 4]
    for told in exchanged(engine, dtype, into):
        for seen in told.values():
            before, after = seen.before, seen.after
            fresh = seen.fresh if seen.fresh else before.bank.take(SLOTS)
            assert equal(after.trained.take(torch.tensor(INDEX)), fresh)
            assert equal(after.trained.take(torch.tensor(stay)), before.trained.take(torch.tensor(stay)))
            assert equal(after.bank.take(torch.tensor(kept)), before.bank.take(torch.tensor(kept)))
            if into == "bank":
                assert equal(after.bank.take(SLOTS), before.trained.take(torch.tensor(INDEX)))
                assert torch.equal(after.W.view(torch.uint8), before.W.view(torch.uint8))
            else:
                assert equal(after.bank, before.bank)
                assert not torch.equal(after.W, before.W)
            assert after.W.dtype == seen.W0.dtype


def equal(one: Pairs, two: Pairs) -> bool:
    return torch.equal(one.B, two.B) and torch.equal(one.A, two.A)


@every_engine
def test_w_gets_the_old_pairs_and_loses_the_fresh_ones(engine):
    for seen in exchanged(engine, "fp32", "weight")[0].values():
        assert relative(seen.after.W, seen.before.W.double() + seen.asked()) <= 1e-7


@every_dtype
@every_engine
def test_the_bank_was_taken_out_of_w_at_the_start_and_the_error_of_that_is_reported(engine, dtype):
    for told in exchanged(engine, dtype, "weight"):
        for seen in told.values():
            rest = seen.W0.double() + seen.bank.scaled(-SCALE).to(dtype=torch.float64).product()
            # rounded once, whoever holds how many rows
            assert torch.equal(seen.start.W, rest.to(torch.float32).to(seen.W0.dtype))
            assert equal(seen.start.bank, seen.bank) and not seen.start.trained.B.any() and seen.start.trained.A.all()
            kept = seen.start.W.double() - seen.bank.scaled(-SCALE).to(dtype=torch.float64).product()
            error = relative(kept.float(), seen.W0)
            # ZeRO-3 cuts dense rows: the two ranks that read such a row both count it
            assert seen.error == pytest.approx(error, rel=0.2 if engine.startswith("zero3") else 1e-3)
            assert 0 < error <= 1e-7 if dtype == "fp32" else 1e-4 < error <= 2**-9
            assert relative(seen.start.map(), seen.W0) <= (1e-7 if dtype == "fp32" else 2**-9)


@both
@every_engine
def test_the_ledger_adds_up_to_what_w_received_and_is_rank_0s(engine, into):
    first, *others = exchanged(engine, "fp32", into)
    for seen in first.values():
        assert len(seen.ledger) == (2 if into == "weight" else 1)  # the start, the exchange
        assert relative(seen.ledger[0].product(), -SCALE * seen.bank.to(dtype=torch.float64).product()) <= 1e-6
        total = seen.W0.double() + sum(update.to(dtype=torch.float64).product() for update in seen.ledger)
        assert relative(seen.after.W, total) <= 1e-7
        assert relative(seen.after.W, seen.W0) > 0.05
    assert all(not seen.ledger for other in others for seen in other.values())


@both
@every_engine
def test_fresh_pairs_start_with_m_zero_and_the_mean_v_and_the_rest_keeps_its_moments_bitwise(engine, into):
    for told in exchanged(engine, "fp32", into):
        for seen in told.values():
            before, after = seen.before.moments, seen.after.moments
            assert sorted(before) == ["A.exp_avg", "A.exp_avg_sq", "B.exp_avg", "B.exp_avg_sq"]
            for key, was in before.items():
                was, now = (was, after[key]) if key[0] == "A" else (was.T, after[key].T)
                assert torch.equal(now[2], was[2]) and was[2].any()
                expected = was[2].double().mean() if key.endswith("sq") else 0.0
                assert torch.allclose(
                    now[INDEX].double(), torch.full((), float(expected), dtype=torch.float64), rtol=1e-6, atol=0
                )


@every_dtype
@both
@every_engine
def test_the_report_equals_an_independent_measurement(engine, into, dtype):
    name = ENGINES[engine][0]
    for told in exchanged(engine, dtype, into):
        for module, seen in told.items():
            event, x = seen.event, torch.randn(seen.W0.shape[1], PROBES, generator=generator(0, module)).double()
            assert (event.pairs, event.into, event.modules) == (3, into, 1)
            drift = relative(seen.after.map() @ x, seen.before.map() @ x)
            if into == "weight" and dtype == "bf16":
                assert event.drift == pytest.approx(drift, rel=1e-2) and drift > 1e-4
                lost = relative(seen.after.W.double() - seen.before.W.double(), seen.asked())
                assert event.lost == pytest.approx(lost, rel=1e-3) and lost > 1e-3
            else:
                assert event.drift <= 1e-6  # float32 arithmetic on the probe
                assert event.lost == 0 if into == "bank" else 0 < event.lost <= 1e-6
            assert event.seconds > 0
            # copies that a rank holds whole need no collective
            assert (event.traffic > 0) == (name != "plain" and engine not in ("fsdp-1", "fsdp-2-replicas"))


# --- edges ------------------------------------------------------------------------------------------------------------


def test_totals_are_sums_and_the_worst_drift_and_loss():
    one = Exchanged(pairs=2, into="weight", drift=1e-7, lost=0.5, seconds=1.0, traffic=10)
    two = Exchanged(pairs=3, into="weight", drift=1e-5, lost=0.1, seconds=2.0, traffic=5)
    more = Exchanged(pairs=4, into="weight", drift=0.0, lost=0.0, seconds=4.0, traffic=1, modules=3)
    assert Exchanged.total([one, two, more]) == Exchanged(9, "weight", 1e-5, 0.5, 7.0, 16, modules=5)


def test_measured_counts_all_of_a_hook():
    t = trainee("plain-1")

    def hook() -> Exchanged:
        t.engine.traffic += 1000
        return Exchanged(1, "bank", 0.0, 0.0, seconds=0.0, traffic=0)

    event = measure_exchange(t.engine, hook)
    assert event is not None and event.traffic == 1000 and event.seconds > 0 and event.pairs == 1
    assert measure_exchange(t.engine, lambda: None) is None


@both
def test_when_all_pairs_are_replaced_v_is_the_mean_of_all(into):
    t = trainee("plain-1")
    a = t.adapters[0]
    t.step(0)
    t.step(1)
    before, index = Layer.now(t, a), torch.arange(RANK)
    fresh = random_pairs(a, RANK, 1) if into == "weight" else None
    exchange_(t.engine, a, index, fresh=fresh, slots=None if fresh else slice(1, 5))
    after = Layer.now(t, a)
    for key, was in before.moments.items():
        expected = float(was.double().mean()) if key.endswith("sq") else 0.0
        assert torch.allclose(
            after.moments[key].double(), torch.full((), expected, dtype=torch.float64), rtol=1e-6, atol=0
        )


@both
def test_zeroed_moments_are_zero(into):
    t = trainee("plain-1")
    a = t.adapters[0]
    t.step(0)
    t.step(1)
    fresh = random_pairs(a, 1, 1) if into == "weight" else None
    exchange_(t.engine, a, torch.tensor([2]), fresh=fresh, slots=None if fresh else slice(0, 1), moments="zeroed")
    after = Layer.now(t, a)
    for key, now in after.moments.items():
        assert not (now if key[0] == "A" else now.T)[2].any() and now.any()


def test_before_the_first_step_there_are_no_moments_to_write():
    t = trainee("plain-1")
    a = t.adapters[0]
    event = exchange_(t.engine, a, torch.tensor([1]), fresh=random_pairs(a, 1, 1))
    assert event.pairs == 1 and not Layer.now(t, a).moments
    t.step(0)


def test_an_exchange_of_nothing_changes_nothing_and_leaves_no_entry_in_the_ledger():
    t = trainee("plain-1")
    a = t.adapters[0]
    before, none, entries = Layer.now(t, a), torch.tensor([], dtype=torch.long), list(a.ledger)
    for fresh, slots in ((random_pairs(a, 0, 1), None), (None, slice(2, 2))):
        event = exchange_(t.engine, a, none, fresh=fresh, slots=slots)
        assert (event.pairs, event.drift, event.lost) == (0, 0.0, 0.0)
    after = Layer.now(t, a)
    assert torch.equal(before.W, after.W) and equal(before.trained, after.trained) and equal(before.bank, after.bank)
    assert len(entries) == len(a.ledger) == 1 and a.ledger[0] is entries[0]  # the start's


# --- a bank that grows ------------------------------------------------------------------------------------------------

a_few_engines = pytest.mark.parametrize(
    "engine", ["plain-1", "plain-2", "zero2-3", "zero3-3", "fsdp-2", "fsdp-2-replicas"]
)


@dataclass(frozen=True)
class Growing(LoRA):
    """LoRA with an empty bank."""

    def bank(self, codec: Codec) -> int:
        return BANK


def growing(engine: str, **settings: object) -> Trainee:
    name, _, zero = ENGINES[engine]
    t = Trainee(Growing(rank=RANK, alpha=RANK * SCALE, target_modules=MODULES), name, zero=zero, **settings)
    for step in range(2):
        t.step(step)
    return t


def nothing_yet(adapter: Adapter, count: int) -> Pairs:
    fresh = random_pairs(adapter, count, 1)
    return Pairs(torch.zeros_like(fresh.B), fresh.A)


def grow(engine: str) -> tuple[Layer, Layer, Pairs, Exchanged, tuple[Tensor, Tensor], int]:
    t = growing(engine)
    a, logits = t.adapters[1], t.logits()
    before, fresh = Layer.now(t, a), nothing_yet(a, len(INDEX))
    event = exchange_(t.engine, a, torch.tensor(INDEX), fresh=fresh, slots=SLOTS)
    return before, Layer.now(t, a), fresh, event, (logits, t.logits()), len(a.ledger)


@a_few_engines
def test_with_fresh_pairs_and_slots_the_old_ones_fill_empty_slots_bitwise_and_w_plus_s_b_a_stays(engine):
    index, stay, empty = torch.tensor(INDEX), torch.tensor([2]), torch.tensor([0, 4])
    for before, after, fresh, event, logits, entries in ranks.run(ENGINES[engine][1], grow, engine):
        assert before.trained.B.any(0).all() and not before.bank.B.any()
        assert equal(after.bank.take(SLOTS), before.trained.take(index)) and not after.bank.take(empty).B.any()
        assert equal(after.trained.take(index), fresh) and equal(after.trained.take(stay), before.trained.take(stay))
        assert torch.equal(after.W, before.W) and entries == 0
        assert relative(after.map(), before.map()) <= 1e-15  # added in another order in float64
        assert relative(logits[1], logits[0]) <= 1e-6
        assert (event.pairs, event.into, event.lost) == (3, "bank", 0.0) and event.drift <= 1e-6
        for key, was in before.moments.items():
            was, now = (was, after.moments[key]) if key[0] == "A" else (was.T, after.moments[key].T)
            assert torch.equal(now[2], was[2]) and was[2].any()


def fill_and_compress(engine: str) -> tuple[Layer, Layer, list[tuple[int, float]]]:
    """Three pairs in a bank of five, brought down to two; then to as many as it needs."""
    t = growing(engine)
    a = t.adapters[1]
    exchange_(t.engine, a, torch.tensor(INDEX), fresh=nothing_yet(a, len(INDEX)), slots=SLOTS)
    before = Layer.now(t, a)
    first = compress_bank_(t.engine, a, 2)
    after = Layer.now(t, a)
    return before, after, [first, compress_bank_(t.engine, a, 4)]


@a_few_engines
def test_a_compressed_bank_is_the_best_of_its_rank_and_the_error_is_what_was_dropped(engine):
    told = ranks.run(ENGINES[engine][1], fill_and_compress, engine)
    for before, after, ((used, lost), (again, nothing)) in told:
        whole = before.bank.to(dtype=torch.float64).product()
        u, sigma, vt = torch.linalg.svd(whole, full_matrices=False)
        best = (u[:, :2] * sigma[:2]) @ vt[:2]  # Eckart-Young
        assert used == again == 2 and not after.bank.B[:, 2:].any() and not after.bank.A[2:].any()
        assert relative(after.bank.to(dtype=torch.float64).product(), best) <= 1e-6
        assert lost == pytest.approx(float((whole - best).norm() / whole.norm()), rel=1e-5) and lost > 0.01
        assert nothing <= 1e-7  # of two pairs nothing has to go
        assert torch.equal(after.W, before.W) and equal(after.trained, before.trained)
        assert all(torch.equal(after.moments[key], was) for key, was in before.moments.items())
        assert equal(after.bank, told[0][1].bank)


def test_an_empty_bank_is_compressed_to_nothing():
    t = growing("plain-1")
    assert compress_bank_(t.engine, t.adapters[0], 2) == (0, 0.0)


def test_slots_that_are_taken_and_fresh_pairs_that_add_something_are_refused():
    t = growing("plain-1")
    a, index = t.adapters[0], torch.tensor([0, 1])
    none = nothing_yet(a, 2)
    assert "must add nothing" in caught(
        lambda: exchange_(t.engine, a, index, fresh=random_pairs(a, 2, 1), slots=slice(0, 2))
    )
    exchange_(t.engine, a, index, fresh=none, slots=slice(0, 2))
    assert "are not empty" in caught(
        lambda: exchange_(t.engine, a, torch.tensor([2, 3]), fresh=none, slots=slice(1, 3))
    )


def test_of_pairs_that_add_nothing_the_ledger_keeps_nothing():
    t = growing("plain-1")
    a = t.adapters[0]
    old = Layer.now(t, a).trained
    for _ in range(2):  # the second time there is nothing but such pairs
        exchange_(t.engine, a, torch.arange(RANK), fresh=nothing_yet(a, RANK))
    (entry,) = a.ledger
    assert equal(entry, old.scaled(SCALE))


# --- moments that are pruned ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [[3, 0, 1], [2], [0, 1, 2, 3]])
@pytest.mark.parametrize("prune", [0.0, 0.5, 0.9, 1.0])
def test_pruned_keeps_the_largest_entries_of_the_replaced_pairs_and_no_first_moment_over_a_second_of_zero(prune, index):
    t = growing("plain-1")
    a = t.adapters[0]
    before = Layer.now(t, a).moments
    exchange_(t.engine, a, torch.tensor(index), fresh=nothing_yet(a, len(index)), moments="pruned", prune=prune)
    after = Layer.now(t, a).moments
    for letter in "AB":
        rows = {k: (before[f"{letter}.{k}"], after[f"{letter}.{k}"]) for k in OPTIMIZERS["adamw"].moments}
        rows = {k: pair if letter == "A" else (pair[0].T, pair[1].T) for k, pair in rows.items()}
        masks = {}
        for k, (was, now) in rows.items():
            sizes = was[index].abs().flatten().tolist()
            largest = sorted(range(len(sizes)), key=lambda i, sizes=sizes: -sizes[i])[: round((1 - prune) * len(sizes))]
            masks[k] = torch.zeros(len(sizes), dtype=torch.bool)
            masks[k][largest] = True
            stay = [k for k in range(RANK) if k not in index]
            assert torch.equal(now[stay], was[stay])
        masks["exp_avg"] &= masks["exp_avg_sq"]
        for k, (was, now) in rows.items():
            assert torch.equal(now[index].flatten(), was[index].flatten() * masks[k])


def test_lion_has_one_moment_to_prune():
    t = growing("plain-1", optimization={"optim": "lion"})
    a = t.adapters[0]
    before = Layer.now(t, a).moments
    exchange_(t.engine, a, torch.arange(RANK), fresh=nothing_yet(a, RANK), moments="pruned", prune=0.75)
    after = Layer.now(t, a).moments
    assert sorted(after) == ["A.exp_avg", "B.exp_avg"]
    for key, was in before.items():
        kept = after[key] != 0
        assert int(kept.sum()) == was.numel() // 4 and torch.equal(after[key][kept], was[kept])
        assert was[kept].abs().min() >= was[~kept].abs().max()


# --- what is refused --------------------------------------------------------------------------------------------------


def caught(call: Callable[[], object]) -> str:
    return ranks.caught(call, AssertionError, RuntimeError)


def test_an_exchange_has_a_destination_and_as_many_pairs_come_as_go():
    t = trainee("plain-1")
    a = t.adapters[0]
    fresh, index = random_pairs(a, 2, 1), torch.tensor([0, 1])
    assert "has a destination" in caught(lambda: exchange_(t.engine, a, index))
    assert caught(lambda: exchange_(t.engine, a, torch.tensor([0]), fresh=fresh)).startswith("AssertionError")
    assert caught(lambda: exchange_(t.engine, a, index, slots=slice(0, 3))).startswith("AssertionError")


COPIES = {  # what of a parameter an edit does not reach -> what is said
    "forward": "did not reach the forward",
    "master": "an edited master did not persist",
    "exp_avg": "edited moments did not persist",
    "exp_avg_sq": "edited moments did not persist",
}


def stale_copy(engine: str, into: str, copy: str) -> tuple[str, str]:
    """An exchange whose write leaves one copy of one parameter as it was."""
    t = trainee(engine)
    for step in range(2):
        t.step(step)
    a = t.adapters[1]
    victim, real = a.B, t.engine.put

    def storage() -> Tensor:
        if copy == "master":
            return t.engine.span(victim).value
        if copy in OPTIMIZERS["adamw"].moments:
            return t.engine.span(victim).moments[copy]
        return victim.ds_tensor.data if hasattr(victim, "ds_tensor") and copy == "forward" else victim.data

    def put(p: nn.Parameter, slot: base.Slot) -> None:
        before = storage().clone() if p is victim else None
        real(p, slot)
        if before is not None:
            storage().copy_(before)

    t.engine.put = put
    fresh = random_pairs(a, len(INDEX), 1) if into == "weight" else None
    return a.name, caught(
        lambda: exchange_(t.engine, a, torch.tensor(INDEX), fresh=fresh, slots=None if fresh else SLOTS)
    )


CASES = [
    (engine, into, copy)
    for engine, copies in {
        "plain-1": ["exp_avg", "exp_avg_sq", "master"],  # one tensor is both the master and what the forward sees
        "plain-2": ["exp_avg_sq", "master"],
        "zero2-3": ["forward", "master", "exp_avg", "exp_avg_sq"],
        "zero3-2": ["forward", "master", "exp_avg", "exp_avg_sq"],
        "fsdp-2": ["master", "exp_avg", "exp_avg_sq"],  # the forward gathers the masters
        "fsdp-2-replicas": ["master", "exp_avg_sq"],
    }.items()
    for copy in copies
    for into in ("weight", "bank")
]


@pytest.mark.parametrize("engine, into, copy", CASES, ids=["-".join(case) for case in CASES])
def test_an_exchange_that_leaves_a_copy_stale_ends_the_run(engine, into, copy):
    found = ranks.run(ENGINES[engine][1], stale_copy, engine, into, copy)
    assert any(COPIES[copy] in message for _, message in found), found
    if copy == "forward":
        assert all(
            message == f"AssertionError: {name}: an exchanged factor did not reach the forward"
            for name, message in found
        ), found


def moving_weight(engine: str) -> list[str]:
    """Something changes W while pairs are swapped with the bank."""
    t = trainee(engine)
    a = t.adapters[1]
    t.step(0)
    real = t.engine.put

    def put(p: nn.Parameter, slot: base.Slot) -> None:
        real(p, slot)
        for part in t.engine.weight(a).parts.values():
            part.mul_(1.001)

    t.engine.put = put
    return [a.name, caught(lambda: exchange_(t.engine, a, torch.tensor(INDEX), slots=SLOTS))]


@pytest.mark.parametrize("engine", ["plain-1", "zero2-3", "zero3-2", "fsdp-2"])
def test_a_weight_that_changes_during_a_swap_ends_the_run(engine):
    for name, message in ranks.run(ENGINES[engine][1], moving_weight, engine):
        assert message.startswith(f"RuntimeError: {name}: an exchange changed the layer's function by"), message


def wrong_map(engine: str, into: str) -> list[str]:
    """W receives another update than asked for; in bank mode the pairs change on their way."""
    t = trainee(engine)
    a = t.adapters[1]
    t.step(0)
    weight, put_ = t.engine.weight, Pairs.put_

    def another(linear: FrozenLinear) -> Weight:
        found = weight(linear)
        add_ = found.add_
        found.add_ = lambda change: add_(change.scaled(1.1))
        return found

    fresh = random_pairs(a, len(INDEX), 1) if into == "weight" else None
    try:
        if into == "weight":
            t.engine.weight = another
        else:
            Pairs.put_ = lambda self, index, fresh: put_(self, index, fresh.scaled(1.1))
        return [
            a.name,
            caught(lambda: exchange_(t.engine, a, torch.tensor(INDEX), fresh=fresh, slots=None if fresh else SLOTS)),
        ]
    finally:
        Pairs.put_ = put_


@both
@pytest.mark.parametrize("engine", ["plain-1", "zero2-3", "zero3-2", "fsdp-2", "fsdp-2-replicas"])
def test_an_exchange_that_changes_the_function_ends_the_run(engine, into):
    for name, message in ranks.run(ENGINES[engine][1], wrong_map, engine, into):
        assert message.startswith(f"RuntimeError: {name}: an exchange changed the layer's function by"), message


# --- a share of pairs, and what is meant to change the function -------------------------------------------------------


SHARE = 0.19  # sqrt(1 - 0.19) = 0.9


def share_everywhere(engine: str, into: str) -> dict[str, Seen]:
    name, _, zero = ENGINES[engine]
    t = Trainee(Growing(rank=RANK, alpha=RANK * SCALE, target_modules=MODULES), name, zero=zero)
    for step in range(2):
        t.step(step)
    found = {}
    for a in t.adapters:
        before, logits = Layer.now(t, a), t.logits()
        slots = slice(0, len(INDEX)) if into == "bank" else None
        event = exchange_(t.engine, a, torch.tensor(INDEX), slots=slots, share=SHARE, moments="kept")
        found[a.name] = Seen(
            before.W, before, before.bank, 0.0, before, Layer.now(t, a), None, event, a.ledger, (logits, t.logits())
        )
    return found


@both
@a_few_engines
def test_of_a_share_the_rest_stays_trainable_and_the_function_stays(engine, into):
    for told in ranks.run(ENGINES[engine][1], share_everywhere, engine, into):
        for name, seen in told.items():
            before, after = seen.before, seen.after
            old, rest = before.trained.take(torch.tensor(INDEX)), after.trained.take(torch.tensor(INDEX))
            for now, was in ((rest.A, old.A), (rest.B, old.B)):
                torch.testing.assert_close(now, was * 0.9)
            assert relative(after.map(), before.map()) <= 2e-7, name
            assert relative(seen.logits[1], seen.logits[0]) <= 1e-6 and seen.event.drift <= 1e-6
            frozen = SHARE * SCALE * old.to(dtype=torch.float64).product()
            if into == "bank":
                assert torch.equal(before.W, after.W)
                moved = SCALE * after.bank.to(dtype=torch.float64).product()
                assert relative(moved - SCALE * before.bank.to(dtype=torch.float64).product(), frozen) <= 1e-6
            else:
                assert relative(after.W.double() - before.W.double(), frozen) <= 1e-4  # W rounds it to float32
            index, stay = torch.tensor(INDEX), torch.tensor([2])
            for key, moment in after.moments.items():
                rows, was = (moment, before.moments[key]) if key[0] == "A" else (moment.T, before.moments[key].T)
                factor = 0.9 if key.endswith("exp_avg") else 0.81
                torch.testing.assert_close(rows[index], was[index] * factor)
                assert torch.equal(rows[stay], was[stay])


def test_a_share_is_between_0_and_1_and_fresh_pairs_have_no_place_beside_it():
    t = trainee("plain-1")
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"share": 0.5, "fresh": random_pairs(t.adapters[0], 3, 1)}):
        with pytest.raises(AssertionError):
            exchange_(t.engine, t.adapters[0], torch.tensor(INDEX), **wrong)


def rewrite_everywhere(engine: str) -> list[tuple[Layer, Layer, Exchanged, float]]:
    t = trainee(engine)
    for step in range(2):
        t.step(step)
    found = []
    for a in t.adapters:

        def drop_first(sa, sb) -> None:
            Pairs(sb.value, sa.value).put_(torch.tensor([0]), Pairs(sb.value[:, :1] * 0, sa.value[:1] * 0))
            starts = t.engine.settings.kind.moments
            renew_moments_(sa, sb, index=torch.tensor([0]), moments="zeroed", starts=starts)

        before = Layer.now(t, a)
        hook = functools.partial(rewrite_, t.engine, a, (a.A, a.B), drop_first, pairs=1)
        with pytest.raises(AssertionError, match="declares"):
            measure_exchange(t.engine, lambda: Exchanged(1, "itself", 0.0, 0.0, 0.0, 0, meant=True))
        event = measure_exchange(t.engine, hook, changes_function=True)
        found.append((before, Layer.now(t, a), event, float(t.engine.weight(a).matmul(torch.eye(a.shape[1])).norm())))
        t.step(2)
        assert not t.engine.whole(a.A)[0].any() and not t.engine.whole(a.B)[:, 0].any(), "an idle pair stays idle"
    return found


@a_few_engines
def test_what_is_meant_to_change_the_function_is_measured_and_w_stays(engine):
    for told in ranks.run(ENGINES[engine][1], rewrite_everywhere, engine):
        for before, after, event, _ in told:
            change = SCALE * sum(p.to(dtype=torch.float64).product() for p in (before.trained, before.bank))
            gone = SCALE * before.trained.take(torch.tensor([0])).to(dtype=torch.float64).product()
            assert event.meant and event.into == "itself" and event.pairs == 1
            assert event.lost == pytest.approx(float(gone.norm() / change.norm()), rel=1e-4)
            assert 0 < event.drift < 1 and relative(after.map(), before.map()) > 1e-4
            assert torch.equal(before.W, after.W) and equal(before.bank, after.bank)
            assert all(not (m if k[0] == "A" else m.T)[0].any() for k, m in after.moments.items())
