"""The move: pairs freeze, fresh pairs become trainable, the function does not change.

    into the weight   W <- W + s sum_K b_k a_k - s sum_K b'_k a'_k       then  (b, a)_K <- (b', a')       METHODS: the papers' step
    into the bank     (b, a)_K  <->  (b', a')_bank slots                 W is never touched

W + s B A (+ s bank_B bank_A) stays. Into a float32 weight the move is exact to its rounding. A bfloat16, float16 or coded
weight would round small updates away; there pairs go to the bank, bitwise. Every exchange checks itself: what the forward
sees is read back and compared, the drift of the layer's function on a probe is measured, and what rounding took from an
update of W is measured too.

Adam: the first moment of a fresh pair is 0, its second moment the mean over the pairs of the same matrix that stay. With
zero the first updates would be up to 6.5 times too large, for the step count is shared and stays high.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from llm_lowrank.adapter import PairAdapter, generator
from llm_lowrank.engines.base import Engine
from llm_lowrank.pairs import Pairs

Moments = Literal["seeded", "zeroed"]
PROBES = 2  # columns of the probe on which the drift is measured
# A drift beyond these is a fault, not rounding: measured are at most 6e-7 with exact destinations, 1e-2 into bfloat16.
EXACT_DRIFT, ROUNDED_DRIFT = 1e-4, 1e-1


@dataclass(frozen=True)
class Exchanged:
    """What happened to one layer, or to many (see `total`)."""

    pairs: int  # trainable pairs replaced
    into: str  # weight or bank
    drift: float  # |f(x) - f_before(x)| / |f_before(x)| on a random probe
    lost: float  # |stored - asked| / |asked| of the update of W: what rounding took; 0 into the bank
    seconds: float
    traffic: int  # bytes that this rank gave to collectives
    modules: int = 1  # whose trainable pairs were replaced

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
        )


def measured(engine: Engine, hook: Callable[[], Exchanged | None]) -> Exchanged | None:
    """What a method's hook did, with all of its time and traffic: deciding and sending fresh pairs too. Collective."""
    began, traffic = time.perf_counter(), engine.traffic
    event = hook()
    return None if event is None else replace(event, seconds=time.perf_counter() - began, traffic=engine.traffic - traffic)


@torch.no_grad()
def exchange_(
    engine: Engine, adapter: PairAdapter, index: Tensor, *, fresh: Pairs | None = None, slots: slice | None = None,
    moments: Moments = "seeded",
) -> Exchanged:  # fmt: skip
    """pairs[index] freeze; `fresh` pairs, or those in the bank's `slots`, become trainable. Collective.

    With `fresh` the old pairs go into the weight, with `slots` they take the fresh pairs' places in the bank. Arguments
    are the same on every rank. Object identity, shape and requires_grad of every Parameter stay.
    """
    assert (fresh is None) != (slots is None), "an exchange has one destination"
    began, traffic = time.perf_counter(), engine.traffic
    index = index.to(engine.device)
    moving = adapter.factors() if slots is not None else adapter.factors()[:2]
    probe = _probe(engine, adapter)
    staying = _applied(adapter, [engine.whole(p) for p in adapter.factors()[len(moving) :]], probe)
    before = engine.weight(adapter).matmul(probe) + staying
    lost = 0.0
    with engine.edit(*moving) as (a, b, *bank):
        before += _applied(adapter, [s.value for s in (a, b, *bank)], probe)
        trained = Pairs(b.value, a.value)
        old = trained.take(index)  # a copy, as index is a tensor
        if slots is not None:
            banked = Pairs(bank[1].value, bank[0].value)
            where = torch.arange(len(banked), device=engine.device)[slots]
            fresh = banked.take(where)
            banked.put_(where, old)
        else:
            assert fresh is not None
            fresh = fresh.to(engine.device)
            lost = into_weight_(engine, adapter, [old, fresh.scaled(-1)])
        trained.put_(index, fresh)
        stay = torch.ones(adapter.rank, dtype=torch.bool, device=engine.device)
        stay[index] = False
        for name in a.moments:
            m_a, m_b = a.moments[name], b.moments[name]  # (r, n), (m, r)
            seeded = moments == "seeded" and name == "exp_avg_sq"
            keep = stay if stay.any() else ~stay
            m_a[index] = m_a[keep].mean() if seeded else 0.0
            m_b[:, index] = m_b[:, keep].mean() if seeded else 0.0
        expected = [s.value for s in (a, b, *bank)]
    seen = [engine.whole(p) for p in moving]
    for value, wanted in zip(seen, expected, strict=True):
        assert torch.equal(value, wanted), f"{adapter.name}: an exchanged factor did not reach the forward"
    after = engine.weight(adapter).matmul(probe) + staying + _applied(adapter, seen, probe)
    drift = float((after - before).norm() / before.norm().clamp_min(1e-30))
    limit = EXACT_DRIFT if slots is not None or adapter.codec.holds_small_updates else ROUNDED_DRIFT
    if not drift <= limit:
        raise RuntimeError(f"{adapter.name}: an exchange changed the layer's function by {drift:.1e}, more than {limit:g}: not training on")
    engine.release(4 * math.prod(adapter.shape))  # as float32
    into = "weight" if slots is None else "bank"
    return Exchanged(len(index), into, drift, lost, time.perf_counter() - began, engine.traffic - traffic)


def into_weight_(engine: Engine, adapter: PairAdapter, parts: list[Pairs]) -> float:
    """W += s (sum of the parts), recorded in the ledger; returns the share of the update that rounding took.

    Every rank adds its own elements: only the parts have travelled, W does not.
    """
    update = Pairs.cat(parts).scaled(adapter.scale)
    weight = engine.weight(adapter)
    asked, lost, changed = weight.sum(weight.add_(update.B, update.A)).tolist()
    if asked == 0.0:
        assert changed == 0, f"{adapter.name}: an update of nothing changed {changed:g} elements"
        return 0.0
    if engine.main:
        adapter.ledger.append(update.to("cpu"))
    return (lost / asked) ** 0.5


def _probe(engine: Engine, adapter: PairAdapter) -> Tensor:
    return torch.randn(adapter.shape[1], PROBES, generator=generator(0, adapter.name)).to(engine.device)  # (n, 2)


def _applied(adapter: PairAdapter, factors: list[Tensor], x: Tensor) -> Tensor:
    """s B A x, summed over the pairs of factors (A, B, A', B', ...): (n, p) -> (m, p)."""
    y = x.new_zeros(adapter.shape[0], x.shape[1])
    for a, b in zip(factors[::2], factors[1::2], strict=True):
        y += adapter.scale * (b @ (a @ x))
    return y
