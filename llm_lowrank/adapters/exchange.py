"""The move: pairs freeze, fresh pairs become trainable, the function does not change.

    into the weight      W <- W + s sum_K b_k a_k - s sum_K b'_k a'_k       then  (b, a)_K <- (b', a')
    a swap               (b, a)_K  <->  (b', a')_bank slots                 W is never touched
    into a growing bank  empty bank slots <- (b, a)_K                       then  (b, a)_K <- (0, a')

W + s B A (+ s bank_B bank_A) stays. Into a float32 weight the move is exact to its rounding. A bfloat16, float16 or
coded weight would round small updates away; there pairs go to the bank, bitwise. Every exchange checks itself: what the
forward sees is read back and compared, the drift of the layer's function on a probe is measured, and what rounding took
from an update of W is measured too. A bank that has no empty slots left is compressed before the move (compress_bank_):
that is the one thing here that may change the function, by an error that is measured and told.

Adam: the first moment of a fresh pair is 0, its second moment the mean over the pairs of the same matrix that stay.
With zero the first updates would be up to 6.5 times too large, for the step count is shared and stays high. A method
that lowers the rate after an exchange may keep the largest entries of the old moments instead ("pruned").
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, generator
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine, Slot
from llm_lowrank.numerics.optimizers import Start
from llm_lowrank.numerics.pairs import Change, Pairs

Moments = Literal["seeded", "zeroed", "pruned"]
Into = Literal["auto", "weight", "bank"]
PROBES = 2  # columns of the probe on which the drift is measured
# A drift beyond these is a fault, not rounding: measured are at most 6e-7 with exact destinations, 1e-2 into bfloat16.
EXACT_DRIFT, ROUNDED_DRIFT = 1e-4, 1e-1


@dataclass(frozen=True)
class Exchanged:
    """What happened to one layer, or to many (see `total`)."""

    pairs: int  # trainable pairs replaced; of LoSiA entries
    into: str  # weight or bank
    drift: float  # |f(x) - f_before(x)| / |f_before(x)| on a random probe
    # Into the weight |stored - asked| / |asked| of the update of W: what rounding took. Into the bank |dropped| /
    # |bank|: what compressing it took, 0 while it had room.
    lost: float
    seconds: float
    traffic: int  # bytes that this rank gave to collectives
    modules: int = 1  # whose trainable pairs were replaced
    unit: str = "pairs"

    @staticmethod
    def total(events: list[Exchanged]) -> Exchanged:
        """Sums, and the worst drift and loss."""
        return Exchanged(
            pairs=sum(e.pairs for e in events),
            into=events[0].into,
            drift=max(e.drift for e in events),
            lost=max(e.lost for e in events),
            seconds=sum(e.seconds for e in events),
            traffic=sum(e.traffic for e in events),
            modules=sum(e.modules for e in events),
            unit=events[0].unit,
        )


def measure_exchange(engine: Engine, hook: Callable[[], Exchanged | None]) -> Exchanged | None:
    """What a method's hook did, with all of its time and traffic: deciding and sending fresh pairs too. Collective."""
    began, traffic = time.perf_counter(), engine.traffic
    event = hook()
    return (
        None if event is None else replace(event, seconds=time.perf_counter() - began, traffic=engine.traffic - traffic)
    )


def needs_bank(into: Into, codec: Codec) -> bool:
    """Whether frozen pairs are kept beside such a weight; auto: unless it holds small updates.

    ValueError if it takes none at all.
    """
    if into == "weight" and not codec.writable:
        raise ValueError(
            f"method.into: weight cannot be used with codec: {codec.name}: encoding W again would "
            "round away all "
            "of an update of 2 % of W in nf4 and of 0.5 % in int8, and LoRA updates are smaller; set method.into: bank "
            "(or auto), "
            "which loses nothing"
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
    moments: Moments = "seeded",
    prune: float = 0.99,
) -> Exchanged:
    """pairs[index] freeze; `fresh` pairs, or those in the bank's `slots`, become trainable. Collective.

    With `fresh` the old pairs go into the weight, with `slots` they take the fresh pairs' places in the bank. With both
    they fill empty slots, and the fresh pairs must add nothing yet, for nothing leaves W. `prune`: the share of the
    replaced pairs' moments that "pruned" sets to zero. Arguments are the same on every rank. Object identity, shape and
    requires_grad of every Parameter stay.
    """
    assert fresh is not None or slots is not None, "an exchange has a destination"
    began, traffic = time.perf_counter(), engine.traffic
    index = index.to(engine.device)
    moving = adapter.factors() if slots is not None else adapter.factors()[:2]
    x = probe(engine, adapter)
    staying = _apply_pairs(adapter, [engine.whole(p) for p in adapter.factors()[len(moving) :]], x)
    before = engine.weight(adapter).matmul(x) + staying
    lost = 0.0
    with engine.edit(*moving) as (a, b, *bank):
        before += _apply_pairs(adapter, [s.value for s in (a, b, *bank)], x)
        trained = Pairs(b.value, a.value)
        old = trained.take(index)  # a copy, as index is a tensor
        if slots is not None:
            banked = Pairs(bank[1].value, bank[0].value)
            where = torch.arange(len(banked), device=engine.device)[slots]
            if fresh is None:
                fresh = banked.take(where)
            else:
                assert not banked.B[:, where].any(), f"{adapter.name}: bank slots {slots} are not empty"
                assert not fresh.B.any(), f"{adapter.name}: fresh pairs beside a growing bank must add nothing"
            banked.put_(where, old)
        else:
            assert fresh is not None
            update = Pairs.cat([old, fresh.to(engine.device).scaled(-1)]).scaled(adapter.scale)
            # of a pair that adds nothing the ledger keeps nothing
            lost = into_weight_(engine, adapter, update.take(update.B.any(0)))
        trained.put_(index, fresh.to(engine.device))
        renew_moments_(a, b, index, moments, prune, engine.settings.kind.moments)
        expected = [s.value for s in (a, b, *bank)]
    seen = [engine.whole(p) for p in moving]
    for value, wanted in zip(seen, expected, strict=True):
        assert torch.equal(value, wanted), f"{adapter.name}: an exchanged factor did not reach the forward"
    after = engine.weight(adapter).matmul(x) + staying + _apply_pairs(adapter, seen, x)
    drift = checked_drift(adapter, before, after, exact=slots is not None)
    engine.release(4 * math.prod(adapter.shape))  # as float32
    into = "weight" if slots is None else "bank"
    return Exchanged(len(index), into, drift, lost, time.perf_counter() - began, engine.traffic - traffic)


def into_weight_(engine: Engine, adapter: Adapter, update: Change) -> float:
    """W += update, recorded in the ledger; returns the share of the update that rounding took.

    Every rank adds its own elements: only the update has travelled, W does not.
    """
    weight = engine.weight(adapter)
    asked, lost, changed = weight.sum(weight.add_(update)).tolist()
    assert changed <= update.entries, f"{adapter.name}: {changed:g} elements changed, more than {update.entries}"
    if asked == 0.0:
        assert changed == 0, f"{adapter.name}: an update of nothing changed {changed:g} elements"
        return 0.0
    if engine.main:
        adapter.ledger.append(update.to("cpu"))
    return (lost / asked) ** 0.5


@torch.no_grad()
def compress_bank_(engine: Engine, adapter: PairAdapter, most: int) -> tuple[int, float]:
    """The bank with as few pairs as its product needs, `most` at most, in its first slots; the others are empty.

    Returns how many there are, and |dropped| / |bank|. Rank 0 decomposes. Collective.
    """
    assert adapter.bank_A is not None and adapter.bank_B is not None
    with engine.edit(adapter.bank_A, adapter.bank_B) as (a, b):
        bank = Pairs(b.value, a.value)

        def compress() -> list[Tensor]:
            small, dropped = bank.compress(most=most)
            # what is kept is an SVD: |b_k| |a_k| are its values
            sizes = small.B.norm(dim=0).double() * small.A.norm(dim=1).double()
            whole = math.hypot(float(sizes.norm()), dropped)
            return [small.B, small.A, torch.tensor(dropped / whole if whole else 0.0, dtype=torch.float64)]

        small_B, small_A, lost = engine.broadcast(compress)
        used = len(small_A)
        a.value[:used], a.value[used:] = small_A, 0.0
        b.value[:, :used], b.value[:, used:] = small_B, 0.0
    engine.same("the compressed bank", small_B, small_A)
    for p, slot in ((adapter.bank_A, a), (adapter.bank_B, b)):
        assert torch.equal(engine.whole(p), slot.value), f"{adapter.name}: a compressed bank did not reach the forward"
    return used, float(lost)


def renew_moments_(
    a: Slot, b: Slot, index: Tensor, moments: Moments, prune: float, starts: Mapping[str, Start]
) -> None:
    """The moments of the pairs that were replaced, those of A and of B each for itself; all others stay as they are.

    Pruned: the largest (1 - prune) of each moment stay. A first moment goes where its second went too: over a second
    moment of zero, and A's gradient is zero while B is, its first update would be the rate times m / eps.
    """
    for mine in (a.moments, {name: moment.T for name, moment in b.moments.items()}):  # each (r, n or m), views
        replaced = {name: moment[index] for name, moment in mine.items()}  # copies
        if moments == "pruned":
            kept = {name: _largest(moment, 1 - prune) for name, moment in replaced.items()}
            second = [kept[name] for name in mine if starts[name] == "mean"]
            for name in (name for name in mine if starts[name] == "zero"):
                for mask in second:
                    kept[name] &= mask
            renewed = {name: moment * kept[name] for name, moment in replaced.items()}
        else:
            renewed = {name: torch.zeros_like(moment) for name, moment in replaced.items()}
            for name in (name for name in mine if moments == "seeded" and starts[name] == "mean"):
                stay = torch.ones(len(mine[name]), dtype=torch.bool, device=index.device)
                stay[index] = False
                renewed[name] += mine[name][stay if stay.any() else ~stay].mean()
        for name, moment in mine.items():
            moment[index] = renewed[name]


def _largest(t: Tensor, share: float) -> Tensor:
    """Where the largest of |t| are, that share of its entries; of equal ones the first."""
    order = t.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros_like(order, dtype=torch.bool)
    mask[order[: round(share * len(order))]] = True
    return mask.view(t.shape)


def probe(engine: Engine, adapter: Adapter) -> Tensor:
    """A random input, the same on every rank: (n, 2)"""
    return torch.randn(adapter.shape[1], PROBES, generator=generator(0, adapter.name)).to(engine.device)


def checked_drift(adapter: Adapter, before: Tensor, after: Tensor, exact: bool) -> float:
    """|after - before| / |before| of what a layer answers to a probe; RuntimeError if it is no rounding.

    `exact`: W took nothing.
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
