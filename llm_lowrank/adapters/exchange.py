"""The exchange: pairs freeze, fresh pairs become trainable, the function does not change.

    into the weight      W <- W + s sum_K b_k a_k - s sum_K b'_k a'_k       then  (b, a)_K <- (b', a')
    a swap with a bank   (b, a)_K  <->  (b', a')_bank slots                 W is never touched
    into a growing bank  empty bank slots <- (b, a)_K                       then  (b, a)_K <- (0, a')
    a share q of pairs   W or empty slots <- q s sum_K b_k a_k              then  (b, a)_K <- sqrt(1 - q) (b, a)_K

W + s B A (+ s bank_B bank_A) stays. An exchange into a float32 weight is exact to the rounding of float32. A bfloat16,
float16 or quantized weight would round small updates away, so that there the pairs go to the bank, bitwise. Every
exchange checks itself: it reads back the factors that the forward uses and compares them, it measures the drift of the
layer's function on a probe, and it measures the share of the update of W that rounding took. A bank without enough
empty slots is compressed before the exchange (compress_bank_). Only this compression may change the function; its error
is measured and reported.

Moments, for Adam: the first moment of a fresh pair is 0, its second moment is the mean over the pairs of the same
matrix that stay. With a second moment of zero the first updates would be up to 6.5 times too large, as the step count
is shared and stays high. A method that lowers the rate after an exchange may keep the largest entries of the old
moments instead ("pruned").

Some methods cut what was learned (LoRA-Squeeze), or set pairs to zero (AdaLoRA). Such an event is meant to change the
function: the method says so (Method.changes_function), `rewrite_` measures by how much, and W is not touched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, generator
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine, Slot
from llm_lowrank.numerics.optimizers import Start
from llm_lowrank.numerics.pairs import Change, Pairs

Moments = Literal["seeded", "zeroed", "pruned", "kept"]
Into = Literal["auto", "weight", "bank"]
PROBES = 2  # columns of the probe on which the drift is measured
# A larger drift is a fault, not rounding. The largest measured ones are 6e-7 for exact destinations, 1e-2 for bfloat16.
EXACT_DRIFT, ROUNDED_DRIFT = 1e-4, 1e-1


@dataclass(frozen=True)
class Exchanged:
    """The report of an exchange in one layer, or in many (see `total`)."""

    pairs: int  # trainable pairs replaced; for LoSiA entries, see unit
    into: str  # weight or bank
    drift: float  # |f(x) - f_before(x)| / |f_before(x)| on a random probe
    # Into the weight: |stored - update| / |update|, the share of the update of W that rounding took. Into the bank:
    # |dropped| / |bank|, the share that compressing the bank took; 0 while the bank has room.
    lost: float
    seconds: float
    traffic: int  # bytes that this rank gave to collectives
    modules: int = 1  # modules whose trainable pairs were replaced
    unit: str = "pairs"
    # Whether the function was meant to change, see rewrite_. Then `into` is "itself", `drift` says how far the function
    # went, and `lost` is |dC| / |C|, C the change of W that was trained.
    meant: bool = False
    # What the method decided by, for the report: name of a figure -> its value in every module, in the adapters' order.
    by_module: Mapping[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def total(events: list[Exchanged], by_module: Mapping[str, list[float]] | None = None) -> Exchanged:
        """The report of several exchanges: sums, and the largest drift and loss."""
        return Exchanged(
            pairs=sum(e.pairs for e in events),
            into=events[0].into,
            drift=max(e.drift for e in events),
            lost=max(e.lost for e in events),
            seconds=sum(e.seconds for e in events),
            traffic=sum(e.traffic for e in events),
            modules=sum(e.modules for e in events),
            unit=events[0].unit,
            meant=events[0].meant,
            by_module=by_module or {},
        )


def measure_exchange(
    engine: Engine, hook: Callable[[], Exchanged | None], changes_function: bool = False
) -> Exchanged | None:
    """Call a method's hook and return its report, with the time and traffic of the whole hook.

    These include the decision and the sending of fresh pairs. changes_function: what the method declares. Collective.
    """
    began, traffic = time.perf_counter(), engine.traffic
    event = hook()
    if event is None:
        return None
    assert event.meant == changes_function, "a method declares whether its exchanges are meant to change the function"
    return replace(event, seconds=time.perf_counter() - began, traffic=engine.traffic - traffic)


def needs_bank(into: Into, codec: Codec) -> bool:
    """Whether frozen pairs go to a bank; auto: unless the codec's weights hold small updates.

    Raise ValueError for into = "weight" if the codec's weights are never written again.
    """
    if into == "weight" and not codec.writable:
        raise ValueError(
            f"method.into: weight cannot be used with codec: {codec.name}: encoding W again would "
            "round away all of an update of 2 % of W in nf4 and of 0.5 % in int8, and LoRA updates are smaller; set "
            "method.into: bank (or auto), which loses nothing"
        )
    return into == "bank" or (into == "auto" and not codec.holds_small_updates)


@torch.no_grad()
def exchange_(
    engine: Engine,
    adapter: PairAdapter,
    index: Tensor,
    *,
    fresh: Pairs | None = None,
    slots: slice | None = None,
    share: float = 1.0,
    moments: Moments = "seeded",
    prune: float = 0.99,
) -> Exchanged:
    """Freeze pairs[index] and make other pairs trainable in their places; return a report. Collective.

        fresh alone        into the weight: W takes the old pairs and gives up the fresh ones
        slots alone        a swap: the pairs in the bank's slots become trainable, the old pairs take the slots
        fresh and slots    into a growing bank: the old pairs fill empty slots; the fresh pairs must have B = 0, since
                           nothing leaves W
        share below 1      W, or with slots a growing bank, takes this share of the old pairs; the rest stays trainable

    `moments` says how the moments of the replaced pairs start, see renew_moments_; `prune` is the share that "pruned"
    sets to zero. All arguments must be the same on every rank. Identity, shape and requires_grad of every Parameter
    stay.
    """
    assert fresh is not None or slots is not None or share < 1, "an exchange has a destination"
    assert share == 1 or (fresh is None and 0 < share < 1), "what is left of the pairs stays in their places"
    began, traffic = time.perf_counter(), engine.traffic
    index = index.to(engine.device)
    # the layer's answer to a probe before: W, the factors that stay and, inside of the block, those that are edited
    moving = adapter.factors() if slots is not None else adapter.factors()[:2]
    x = probe(engine, adapter)
    staying = _apply_pairs(adapter, [engine.whole(p) for p in adapter.factors()[len(moving) :]], x)
    before = engine.weight(adapter).matmul(x) + staying
    lost = 0.0
    with engine.edit(*moving) as (a, b, *bank):
        before += _apply_pairs(adapter, [s.value for s in (a, b, *bank)], x)
        trained = Pairs(b.value, a.value)
        before_exchange = trained.to(dtype=torch.float64)  # copies
        old = trained.take(index)  # a copy, as index is a tensor
        if share < 1:
            rest = math.sqrt(1 - share)
            fresh, old = Pairs(old.B * rest, old.A * rest), old.scaled(share)
        # the old pairs go to the bank, into slots that hold the next pairs or that are empty
        if slots is not None:
            fresh = _into_bank_(adapter, Pairs(bank[1].value, bank[0].value), slots, old, fresh, whole=share == 1)
        # or W takes them, and gives up what the fresh pairs will add, unless these are what is left of the old ones
        else:
            assert fresh is not None
            new = fresh.to(engine.device).scaled(-1)
            update = (Pairs.cat([old, new]) if share == 1 else old).scaled(adapter.scale)
            # pairs with B = 0 change nothing, and the ledger need not have them
            lost = into_weight_(engine, adapter, update.take(update.B.any(0)))
        trained.put_(index, fresh.to(engine.device))
        adapter.rule.rebase(before_exchange, trained.to(dtype=torch.float64), adapter.memory)
        starts = engine.settings.kind.moments
        renew_moments_(a, b, index=index, moments=moments, prune=prune, starts=starts, share=share)
        expected = [s.value for s in (a, b, *bank)]
    # the forward must see bitwise the factors that were written, and the function must not have changed
    seen = _reached(engine, adapter, moving, expected)
    after = engine.weight(adapter).matmul(x) + staying + _apply_pairs(adapter, seen, x)
    drift = check_drift(adapter, before, after, exact=slots is not None)
    engine.release(4 * math.prod(adapter.shape))  # as float32
    into = "weight" if slots is None else "bank"
    return Exchanged(
        len(index),
        into=into,
        drift=drift,
        lost=lost,
        seconds=time.perf_counter() - began,
        traffic=engine.traffic - traffic,
    )


def _into_bank_(
    adapter: PairAdapter, banked: Pairs, slots: slice, old: Pairs, fresh: Pairs | None, *, whole: bool
) -> Pairs:
    """Put the old pairs into the bank's slots; return the pairs that become trainable.

    whole: whether all of the old pairs freezes, so that fresh pairs must add nothing.
    """
    where = torch.arange(len(banked), device=banked.A.device)[slots]
    if fresh is None:
        fresh = banked.take(where)
    else:
        assert not banked.B[:, where].any(), f"{adapter.name}: bank slots {slots} are not empty"
        assert not (whole and fresh.B.any()), f"{adapter.name}: fresh pairs beside a growing bank must add nothing"
    banked.put_(where, old)
    return fresh


def _reached(
    engine: Engine, adapter: Adapter, params: Sequence[nn.Parameter], written: Sequence[Tensor]
) -> list[Tensor]:
    """Return the parameters as the forward sees them, which must be what was written, bitwise. Collective."""
    seen = [engine.whole(p) for p in params]
    for value, wanted in zip(seen, written, strict=True):
        assert torch.equal(value, wanted), f"{adapter.name}: an exchanged factor did not reach the forward"
    return seen


@torch.no_grad()
def rewrite_(
    engine: Engine, adapter: Adapter, params: Sequence[nn.Parameter], edit: Callable[..., None], *, pairs: int
) -> Exchanged:
    """Edit trained parameters in a way that is meant to change the function; return a report. Collective.

        C  the change of W that the adapter's parameters make
        lost = |C' - C| / |C|      drift = |C' x - C x| / |W x + C x|, x a random probe

    edit(*slots) changes the slots of `params` in place, values and moments, alike on every rank; renew_moments_ helps.
    pairs: how many are rewritten, for the report. W is not touched. Identity, shape and requires_grad of every
    Parameter stay.
    """
    began, traffic = time.perf_counter(), engine.traffic
    x = probe(engine, adapter)
    before = adapter.change(engine.whole)
    with engine.edit(*params) as slots:
        edit(*slots)
        written = [s.value for s in slots]
    _reached(engine, adapter, params, written)
    after = adapter.change(engine.whole)
    answer = engine.weight(adapter).matmul(x) + before.B @ (before.A @ x)
    moved = after.B @ (after.A @ x) - before.B @ (before.A @ x)
    size = before.norm()
    return Exchanged(
        pairs,
        into="itself",
        drift=float(moved.norm() / answer.norm().clamp_min(1e-30)),
        lost=Pairs.cat([after, before.scaled(-1)]).norm() / size if size else 0.0,
        seconds=time.perf_counter() - began,
        traffic=engine.traffic - traffic,
        meant=True,
    )


def into_weight_(engine: Engine, adapter: Adapter, update: Change) -> float:
    """Add the update to W, record it in the ledger, and return the share of the update that rounding took.

    Every rank adds its own elements: the update has travelled, W does not. Collective.
    """
    weight = engine.weight(adapter)
    size, lost, changed = weight.sum(weight.add_(update)).tolist()  # |update|^2, |stored - update|^2, elements
    assert changed <= update.entries, f"{adapter.name}: {changed:g} elements changed, more than {update.entries}"
    if size == 0.0:
        assert changed == 0, f"{adapter.name}: an update of nothing changed {changed:g} elements"
        return 0.0
    if engine.main:
        adapter.ledger.append(update.to("cpu"))
    return (lost / size) ** 0.5


@torch.no_grad()
def compress_bank_(engine: Engine, adapter: PairAdapter, most: int) -> tuple[int, float]:
    """Compress the bank into its first slots, the fewest that its product needs and `most` at most; empty the others.
    The slots of an inherited adapter stay as they are.

    Return the number of filled slots and |dropped| / |bank|. Rank 0 decomposes. Collective.
    """
    assert adapter.bank_A is not None and adapter.bank_B is not None
    with engine.edit(adapter.bank_A, adapter.bank_B) as (a, b):
        room = adapter.bank_room
        bank = Pairs(b.value, a.value).take(slice(room))

        def compress() -> list[Tensor]:
            small, dropped = bank.compress(most=most)
            # the compressed pairs are an SVD, and |b_k| |a_k| its singular values
            sizes = small.B.norm(dim=0).double() * small.A.norm(dim=1).double()
            size = math.hypot(float(sizes.norm()), dropped)  # |bank|
            return [small.B, small.A, torch.tensor(dropped / size if size else 0.0, dtype=torch.float64)]

        small_B, small_A, lost = engine.broadcast(compress)
        used = len(small_A)
        a.value[:used], a.value[used:room] = small_A, 0.0
        b.value[:, :used], b.value[:, used:room] = small_B, 0.0
    engine.same("the compressed bank", small_B, small_A)
    for p, slot in ((adapter.bank_A, a), (adapter.bank_B, b)):
        assert torch.equal(engine.whole(p), slot.value), f"{adapter.name}: a compressed bank did not reach the forward"
    return used, float(lost)


def renew_moments_(
    a: Slot,
    b: Slot,
    *,
    index: Tensor,
    moments: Moments,
    starts: Mapping[str, Start],
    prune: float = 0.99,
    share: float = 1.0,
) -> None:
    """Start the moments of the replaced pairs anew, separately for A and for B. All other moments stay.

        zeroed   every moment is 0
        seeded   a second moment is the mean over the pairs of its matrix that stay, a first moment is 0
        pruned   the largest 1 - prune of each moment stay, the others become 0
        kept     every moment stays that of the same pair, of which `share` was frozen. Both factors are sqrt(1 - share)
                 as long then, and so is each gradient: first moments get this factor, second moments its square

    `starts` says for each moment how a fresh pair's starts: "mean" marks a second moment. When "pruned" sets a second
    moment to 0, the first moment m of this entry becomes 0 too. Otherwise its first update would be the rate times
    m / eps, as A's gradient is zero while B is.
    """
    for matrix in (a.moments, {name: moment.T for name, moment in b.moments.items()}):  # each (r, n or m), views
        replaced = {name: moment[index] for name, moment in matrix.items()}  # copies
        if moments == "pruned":
            masks = {name: _largest(moment, 1 - prune) for name, moment in replaced.items()}
            second = [masks[name] for name in matrix if starts[name] == "mean"]
            for name in (name for name in matrix if starts[name] == "zero"):
                for mask in second:
                    masks[name] &= mask
            renewed = {name: moment * masks[name] for name, moment in replaced.items()}
        elif moments == "kept":
            rest = {"zero": math.sqrt(1 - share), "mean": 1 - share} if share < 1 else {"zero": 1.0, "mean": 1.0}
            renewed = {name: moment * rest[starts[name]] for name, moment in replaced.items()}
        else:
            renewed = {name: torch.zeros_like(moment) for name, moment in replaced.items()}
            for name in (name for name in matrix if moments == "seeded" and starts[name] == "mean"):
                stay = torch.ones(len(matrix[name]), dtype=torch.bool, device=index.device)
                stay[index] = False
                renewed[name] += matrix[name][stay if stay.any() else ~stay].mean()  # of all pairs, if none stays
        for name, moment in matrix.items():
            moment[index] = renewed[name]


def _largest(t: Tensor, share: float) -> Tensor:
    """A mask of the largest |t|, `share` of all entries; of equal entries the first."""
    order = t.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[: round(share * len(order))]] = True
    return mask.view(t.shape)


def probe(engine: Engine, adapter: Adapter) -> Tensor:
    """A random input of the layer, the same on every rank: (n, PROBES)."""
    return torch.randn(adapter.shape[1], PROBES, generator=generator(0, adapter.name)).to(engine.device)


def check_drift(adapter: Adapter, before: Tensor, after: Tensor, exact: bool) -> float:
    """Return the drift |after - before| / |before| of a layer's answers to a probe.

    `exact`: W was not changed. Raise RuntimeError if the drift is too large for rounding.
    """
    drift = float((after - before).norm() / before.norm().clamp_min(1e-30))
    limit = EXACT_DRIFT if exact or adapter.codec.holds_small_updates else ROUNDED_DRIFT
    if not drift <= limit:
        raise RuntimeError(
            f"{adapter.name}: an exchange changed the layer's function by {drift:.1e}, more than {limit:g}: not "
            "training on"
        )
    return drift


def _apply_pairs(adapter: PairAdapter, factors: list[Tensor], x: Tensor) -> Tensor:
    """s B A x, summed over the pairs of factors (A, B, A', B', ...): (n, p) -> (m, p)."""
    y = x.new_zeros(adapter.shape[0], x.shape[1])
    for a, b in zip(factors[::2], factors[1::2], strict=True):
        y += adapter.scale * (b @ (a @ x))
    return y
