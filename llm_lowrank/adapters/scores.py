"""Scores of pairs: how much each matters, from the values and the gradients of every step (AdaLoRA, SRLoRA).

    I = |w g| of every entry; its moving mean and spread, see numerics/importance.py; s = mean * spread, and per pair

    S_k = mean_j s(A[k, j]) + mean_i s(B[i, k]) + s(e[k])         for the parameters that are named; e a vector (r,)

A rank keeps mean and spread of its own spans alone, in adapter.memory, so that nothing is communicated in a step, and a
checkpoint saves them. The scores themselves are sums over the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_lowrank.adapters.adapter import Adapter, PairAdapter
from llm_lowrank.engines.base import Engine
from llm_lowrank.numerics import importance

STATISTICS = ("mean", "spread")


def remember(adapters: Sequence[Adapter], engine: Engine, names: Sequence[str]) -> None:
    """Begin the statistics of these parameters, all zero. Called in Method.start. Local."""
    for adapter in adapters:
        for name in names:
            for statistic in STATISTICS:
                adapter.memory[f"{statistic}_{name}"] = torch.zeros_like(engine.span(getattr(adapter, name)).value)
                adapter.spans[f"{statistic}_{name}"] = name


def observe(adapters: Sequence[Adapter], engine: Engine, names: Sequence[str], *, beta1: float, beta2: float) -> None:
    """Take the gradients of this step into the statistics. Called in Method.observe. Local."""
    params = [(a, name, getattr(a, name)) for a in adapters for name in names]
    mean = [a.memory[f"mean_{name}"] for a, name, _ in params]
    spread = [a.memory[f"spread_{name}"] for a, name, _ in params]
    values = [engine.span(p).value for _, _, p in params]
    gradients = [engine.gradient(p) for _, _, p in params]
    importance.update_(mean, spread, w=values, g=gradients, beta1=beta1, beta2=beta2)


def begin_anew(adapter: Adapter, names: Sequence[str]) -> None:
    """Set the statistics of an adapter to zero. Local."""
    for name in names:
        for statistic in STATISTICS:
            adapter.memory[f"{statistic}_{name}"].zero_()


def scores(adapters: Sequence[PairAdapter], engine: Engine, names: Sequence[str]) -> list[Tensor]:
    """Return S_k of every pair of every adapter: (r,) float64 each. Collective: one sum for all of them.

    The columns of B are pairs, the rows of all other parameters.
    """
    mine = [sum(_spans(adapter, engine, name) for name in names) for adapter in adapters]
    assert all(isinstance(score, Tensor) for score in mine)
    return list(engine.sum(torch.cat(mine)).split([len(score) for score in mine]))  # type: ignore[arg-type]


def statistics_bytes(adapters: Sequence[Adapter], names: Sequence[str]) -> int:
    """The bytes of the statistics of all ranks together, for Method.statistics. Before the model is sharded."""
    return sum(len(STATISTICS) * getattr(adapter, name).nbytes for adapter in adapters for name in names)


def pair_totals(adapter: PairAdapter, engine: Engine, name: str, along: Tensor) -> Tensor:
    """Sum numbers per pair that lie along this rank's span of a parameter: (r,) float64. Local."""
    row_length = {"A": adapter.shape[1], "B": adapter.rank}.get(name, 1)
    start = engine.span(getattr(adapter, name)).start
    return importance.pair_sums(along, start, rank=adapter.rank, row_length=row_length, rows_are_pairs=name != "B")


def _spans(adapter: PairAdapter, engine: Engine, name: str) -> Tensor:
    """This rank's part of a parameter's scores, summed per pair and divided by the entries of a pair: (r,)."""
    memory, entries = adapter.memory, {"A": adapter.shape[1], "B": adapter.shape[0]}.get(name, 1)
    return pair_totals(adapter, engine, name, memory[f"mean_{name}"] * memory[f"spread_{name}"]) / entries
