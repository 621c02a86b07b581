"""SRLoRA: fuse the pairs that matter least, start fresh ones on unused singular directions.
https://arxiv.org/abs/2505.12433

    start      the top r principal pairs of W are trained, as in PiSSA; the next target_rank - r wait
    every step I = |w dL/dw| of every entry of A and B; its moving mean and spread; pair score S_k       (importance.py)
    exchange   K = the r' = gamma r pairs of a module with the smallest S_k; they freeze, the next r' directions become
               trainable, W + s B A does not change; scores start anew

There is no published code: this is SRLoRA as we read the paper, which calls an exchange a switch. We decided three
things that the paper leaves open: exchange k of N follows step round(k total / (N + 1)); scores are ranked within a
module; the second moments of fresh pairs are the mean over the pairs that stay.

The published score grows with the size of a pair: if G = dL/dW stays and both a_k and b_k are c times as long, it is
c^4 times as large. Fresh pairs have the smallest singular values, so it takes them first. Two other scores, ours, do
not depend on the size (`score`; a' and b' are those after the last exchange, or at the start):

    paper      S_k
    unit       S_k / (|a_k|^2 |b_k|^2)                    what S_k would be if a_k and b_k were of length 1
    change     |b_k a_k - b'_k a'_k| / |b'_k a'_k|        Frobenius norms
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from llm_lowrank.adapters import scores
from llm_lowrank.adapters.adapter import Adapter, PairAdapter, as_pair_adapters
from llm_lowrank.adapters.exchange import Exchanged, Into, exchange_, needs_bank
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.numerics.pairs import Pairs

SCORED = ("A", "B")  # the parameters whose entries make a pair's score
PAST = "past_{}"  # in an adapter's memory: this rank's span of A or B after the last exchange
SHORT = 10  # steps; the last 7 gradients have 1 - 0.85^7 = 68 % of the weight in the mean importance


@Method.register_subclass("srlora")
@dataclass(frozen=True)
class SRLoRA(PiSSA):
    """Train target_rank singular directions in turn, rank at a time."""

    target_rank: int = 32
    """Directions that are trained in the whole run."""
    gamma: float = 0.5
    """Share of the pairs replaced at an exchange."""
    beta1: float = 0.85
    """Decay of the mean importance."""
    beta2: float = 0.85
    """Decay of the spread of the importance (uncertainty)."""
    into: Into = "auto"
    """Where frozen pairs go: into the weight, or unrounded into a bank beside it; auto: weight if it is float32, else
    bank."""
    score: Literal["paper", "unit", "change"] = "paper"
    """What an exchange ranks pairs by. paper: the published score, which replaces the pairs that came last. unit: that
    score as if all pairs had the length 1. change: the share of itself by which a pair changed since the last
    exchange."""
    moments: Literal["seeded", "zeroed"] = "seeded"
    """Second moment of fresh pairs: mean of those that stay, or zero (first updates up to 6.5 times too large)."""
    paper_schedule: bool = False
    """Use the published interval, with the last exchange at the last step."""

    adapter_roles = ("frozen",)

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.target_rank < self.rank:
            complaints.append(f"method.target_rank ({self.target_rank}) must be at least method.rank ({self.rank})")
        if not 0 < self.gamma <= 1:
            complaints.append(f"method.gamma must be in (0, 1], not {self.gamma}")
        complaints += self.wrong_decays("beta1", "beta2")
        if self.subspace:
            complaints.append(
                "method.subspace leaves nothing for srlora to exchange: its pairs come out of W; remove it, or take "
                "method.type: pissa"
            )
        if self.rank_pattern:
            complaints.append(
                "method.rank_pattern cannot be used with srlora: modules would need different numbers of exchanges; "
                "remove it"
            )
        return complaints

    @property
    def swap(self) -> int:
        """r' = gamma r rounded, halves upwards, at least 1."""
        return max(1, math.floor(self.gamma * self.rank + 0.5))

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        layers = as_pair_adapters(adapters)
        if self.score == "change":  # A and B as they were
            return sum(a.A.nbytes + a.B.nbytes for a in layers), super().statistics(adapters)[1]
        return scores.statistics_bytes(layers, SCORED), super().statistics(adapters)[1]

    def bank(self, codec: Codec) -> int:
        return self.target_rank - self.rank if needs_bank(self.into, codec) else 0

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        self.check_fits("method.target_rank", self.target_rank, name, linear)
        return super().build(name, linear, codec, seed)

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        if self.target_rank == self.rank:
            return ()
        exchanges = exchange_schedule(
            total_steps,
            rank=self.rank,
            target_rank=self.target_rank,
            swap=self.swap,
            at_the_end=self.paper_schedule,
        )
        return tuple(step for step, _ in exchanges)

    def advice(self, exchange_steps: Sequence[int]) -> list[str]:
        shortest = min((b - a for a, b in pairwise((0, *exchange_steps))), default=SHORT)
        if shortest >= SHORT or self.score == "change":
            return []
        return [
            f"the shortest interval between exchanges has {shortest} steps: scores of fewer than {SHORT} rank pairs by "
            "little more than one gradient; lower method.target_rank, raise method.gamma or train longer"
        ]

    def starting_pairs(self, adapters: list[Adapter], engine: Engine) -> Iterator[Pairs | None]:
        layers = as_pair_adapters(adapters)
        principal = self.principal_pairs(layers, engine, [self.target_rank] * len(layers))
        for adapter, pairs in zip(layers, principal, strict=True):
            # all directions leave W and wait in the bank, or they stay in W and wait in the reserve of rank 0
            if adapter.bank_room:
                yield pairs
            else:
                adapter.reserve = pairs.take(slice(self.rank, None)) if engine.main else None
                yield pairs.take(slice(self.rank))

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        for adapter in as_pair_adapters(adapters):
            # so many directions have been trained; at the same time the number of the next one
            adapter.memory["visited"] = torch.tensor(self.rank)
            # 1 for the pairs that came at the last exchange
            adapter.memory["fresh"] = torch.zeros(self.rank, dtype=torch.int64, device=engine.device)
            # 1 for the pairs of the start
            adapter.memory["first"] = torch.ones(self.rank, dtype=torch.int64, device=engine.device)
            # how many pairs the last exchange replaced: (all, those that had come at the exchange before it)
            adapter.memory["replaced"] = torch.zeros(2, dtype=torch.int64)
            if self.score == "change":
                remember_past(adapter, engine)
        if self.score != "change":
            scores.remember(adapters, engine, SCORED)

    def observe(self, adapters: list[Adapter], engine: Engine) -> None:
        if self.score != "change":
            scores.observe(adapters, engine, SCORED, beta1=self.beta1, beta2=self.beta2)

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        layers = as_pair_adapters(adapters)
        # the last exchange has the directions that are left
        count = min(self.swap, self.target_rank - int(layers[0].memory["visited"]))
        found = self.scores(layers, engine)
        choice = self.choose(layers, found, engine, count)
        events, decisions = [], [choice]  # every rank must have decided alike
        for adapter, index in zip(layers, choice, strict=True):
            visited = int(adapter.memory["visited"])
            waiting = slice(visited - self.rank, visited - self.rank + count)
            # the next directions come out of the bank, or rank 0 sends them from its reserve
            if adapter.bank_room:
                events.append(exchange_(engine, adapter, index, slots=waiting, moments=self.moments))
            else:
                b, a = engine.broadcast(partial(_waiting, adapter, waiting))
                decisions += [b, a]
                events.append(exchange_(engine, adapter, index, fresh=Pairs(b, a), moments=self.moments))
            adapter.memory["visited"] += count
            fresh = adapter.memory["fresh"]
            adapter.memory["replaced"].copy_(torch.tensor([count, int(fresh[index].sum())]))
            fresh.zero_()
            fresh[index] = 1
            adapter.memory["first"][index] = 0
            if self.score == "change":
                remember_past(adapter, engine)
            else:
                scores.begin_anew(adapter, SCORED)
        engine.same("the exchanged pairs", *decisions)
        replaced = 1 - torch.stack([adapter.memory["first"] for adapter in layers]).double().mean(1)
        by_module = {"importance": found.mean(1).tolist(), "replaced_share": replaced.tolist()}
        return Exchanged.total(events, by_module)

    def metrics(self, adapters: list[Adapter], engine: Engine) -> dict[str, float]:
        """Return how the pairs' scores differ, and how many fresh pairs the last exchange replaced again. Collective.

            replaced_fresh         of the pairs that the last exchange replaced in all modules, those that had come at
                                   the exchange before it; 0 before the second exchange
            replaced_fresh_share   the same, divided by all pairs that the last exchange replaced; 0 before the second.
                                   A choice by chance would have r' / r
            never_replaced_share   of all trained pairs, those of the start; by chance (1 - r' / r)^exchanges
            score_variation        std_k(S_k) / mean_k(S_k) over the r pairs of a module, mean over the modules; 0 where
                                   all pairs matter alike, sqrt(r - 1) where only one does. Missing directly after an
                                   exchange, where there are no scores yet

        The standard deviation is that of the population: divided by r.
        """
        layers = as_pair_adapters(adapters)
        replaced, fresh = torch.stack([a.memory["replaced"] for a in layers]).sum(0).tolist()
        found = self.scores(layers, engine)
        scored, first = found.sum(1) > 0, torch.stack([a.memory["first"] for a in layers]).double().mean()
        variations = (found.std(1, correction=0) / found.mean(1)).where(scored, 0.0).sum()
        # all figures in one copy: each read by itself would wait for the device
        modules, first_share, variation = torch.stack([scored.sum().double(), first, variations]).tolist()
        numbers = {
            "replaced_fresh": fresh,
            "replaced_fresh_share": fresh / replaced if replaced else 0.0,
            "never_replaced_share": first_share,
        }
        return numbers | ({"score_variation": variation / modules} if modules else {})

    def choose(self, adapters: list[PairAdapter], found: Tensor, engine: Engine, count: int) -> Tensor:
        """Return the indices of the `count` pairs of every module that have the smallest `scores`: (modules, count).

        Rank 0 decides. Collective.
        """
        if not torch.isfinite(found).all():
            bad = adapters[int((~torch.isfinite(found)).any(1).nonzero()[0])].name
            raise RuntimeError(
                f"{bad}: importance is not finite; a gradient was NaN or infinite since the last exchange"
            )
        (choice,) = engine.broadcast(lambda: [torch.argsort(found, dim=1, stable=True)[:, :count].sort(1).values])
        return choice

    def scores(self, adapters: list[PairAdapter], engine: Engine) -> Tensor:
        """Return what `score` names, of every pair: (modules, r) float64. Collective."""
        tiny = torch.finfo(torch.float64).tiny  # a pair of length 0, which has no gradient, scores 0
        if self.score == "change":
            return relative_changes(adapters, engine, tiny)
        found = torch.stack(scores.scores(adapters, engine, SCORED))
        if self.score == "unit":
            found = found / squared_lengths(adapters, engine).prod(1).clamp_min(tiny)
        return found


def _waiting(adapter: PairAdapter, where: slice) -> list[Tensor]:
    assert adapter.reserve is not None
    fresh = adapter.reserve.take(where)
    return [fresh.B, fresh.A]


def remember_past(adapter: Adapter, engine: Engine) -> None:
    """Remember A and B as they are now, each rank its spans. Local."""
    for name in SCORED:
        adapter.memory[PAST.format(name)] = engine.span(getattr(adapter, name)).value.clone()
        adapter.spans[PAST.format(name)] = name


def squared_lengths(adapters: Sequence[PairAdapter], engine: Engine) -> Tensor:
    """Return |a_k|^2 and |b_k|^2 of every pair: (modules, 2, r) float64. Collective."""
    mine = []
    for adapter in adapters:
        values = {name: engine.span(getattr(adapter, name)).value.double() for name in SCORED}
        mine.append(torch.stack([scores.pair_totals(adapter, engine, name, v * v) for name, v in values.items()]))
    return engine.sum(torch.stack(mine))


def relative_changes(adapters: Sequence[PairAdapter], engine: Engine, tiny: float) -> Tensor:
    """Return |b_k a_k - b'_k a'_k| / |b'_k a'_k| of every pair: (modules, r) float64. Collective.

    a' and b' are what `remember_past` remembered. With da = a - a' and db = b - b' the change is db a + b' da, whose
    square is |db|^2 |a|^2 + |b'|^2 |da|^2 + 2 (b' . db) (a . da): exactly 0 if nothing moved.
    """
    mine = []
    for adapter in adapters:
        sums = []
        for name in SCORED:
            now = engine.span(getattr(adapter, name)).value.double()
            past = adapter.memory[PAST.format(name)].double()
            one, moved = now if name == "A" else past, now - past
            products = (one * one, moved * moved, one * moved, past * past)
            sums.append(torch.stack([scores.pair_totals(adapter, engine, name, product) for product in products]))
        mine.append(torch.stack(sums))
    of_A, of_B = engine.sum(torch.stack(mine)).unbind(1)  # (modules, 4, r) each
    (a, da, a_da, past_a), (b, db, b_db, past_b) = of_A.unbind(1), of_B.unbind(1)
    squares = db * a + b * da + 2 * b_db * a_da
    return (squares.clamp_min(0) / (past_a * past_b).clamp_min(tiny)).sqrt()


def exchange_schedule(
    total: int, *, rank: int, target_rank: int, swap: int, at_the_end: bool = False
) -> tuple[tuple[int, int], ...]:
    """Return (completed steps, pairs exchanged) of every exchange of a run with `total` steps.

        N = ceil((target_rank - rank) / swap),   exchange k = 1..N after step round(k total / (N + 1))

    so that the last fresh pairs still have total / (N + 1) steps to learn. With `at_the_end` the interval is total / N,
    as published, and the last exchange comes at the last step. The last exchange replaces the rest of
    target_rank - rank pairs. Raise ValueError when two exchanges would fall on one step, or the first on step 0.
    https://arxiv.org/abs/2505.12433
    """
    spare = target_rank - rank
    count = math.ceil(spare / swap)
    parts = count if at_the_end else count + 1
    steps = [round(k * total / parts) for k in range(1, count + 1)]
    if len(set(steps)) != count or 0 in steps:
        raise ValueError(
            f"{count} exchanges do not fit into {total} steps; lower target_rank, raise gamma or train longer"
        )
    return tuple((step, min(swap, spare - k * swap)) for k, step in enumerate(steps))
