"""ReLoRA: a sum of low-rank updates has a high rank, so exchange all pairs of LoRA again and again.
https://arxiv.org/abs/2307.05695

    every `interval` steps    W <- W + s B A      then  A <- fresh and random,  B <- 0        the function stays
    the optimizer             of the moments of A and B the largest 1 - prune_ratio stay, the others become 0
    the rate                  behind exchange step e:  rate(t) min(1, (t - e + 1) / restart_warmup)     a jagged cosine

The paper calls an exchange a restart. If W cannot hold a small update, the old pairs are kept in a bank of fixed
capacity. A full bank is compressed to make room for the next exchange, and the error of the compression is printed. The
paper leaves open when the last exchange comes: here every exchange leaves at least one step at the full rate.

Flora (https://arxiv.org/abs/2402.03293) is `trains: B` with `moments: carried`. A random A that stays compresses the
gradient of W, g_B = s G A^T, and B collects it:

    P = sqrt(3 n / r) A        E[P^T P] = I, as the entries of A have the variance 1 / (3 n)
    m_B <- m_B P_old P_new^T   at an exchange: the old moment, decompressed by P_old and compressed by P_new
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import (
    Adapter,
    PairAdapter,
    PairSettings,
    as_pair_adapters,
    generator,
    uniform_rows,
)
from llm_lowrank.adapters.exchange import Exchanged, Into, Moments, compress_bank_, exchange_, needs_bank
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.lora_fa import FrozenA
from llm_lowrank.numerics.pairs import Pairs


@dataclass(frozen=True)
class Restarting(LoRA):
    """Freeze all pairs and start new random ones. ReLoRA, COLA and PLoRA say when, and at which rate they are trained.

    PLoRA also freezes a share of the pairs.
    """

    into: Into = "auto"
    """Where frozen pairs go: into the weight, or unrounded into a bank beside it; auto: weight if it is float32, else
    bank."""
    bank_pairs: int | None = None
    """Pairs that the bank has room for, more than rank; in proportion for a module with another rank; by default 2
    rank."""
    moments: Literal["seeded", "zeroed", "pruned", "kept", "carried"] = "pruned"
    """Optimizer state at an exchange; each method says which of the choices it has."""
    prune_ratio: float = 0.99
    """Share of each moment that `moments: pruned` sets to zero, smallest first."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.bank_pairs is not None and self.bank_pairs <= self.rank:
            complaints.append(
                f"method.bank_pairs ({self.bank_pairs}) must be more than method.rank ({self.rank}): a restart fills "
                "rank of them, and what was frozen before needs some, too"
            )
        if not 0 <= self.prune_ratio <= 1:
            complaints.append(f"method.prune_ratio must be in [0, 1], not {self.prune_ratio}")
        return complaints

    def bank_of(self, rank: int) -> int:
        """The room in the bank of a module with this rank, in pairs: bank_pairs * rank / self.rank, rounded up."""
        return 2 * rank if self.bank_pairs is None else -(-self.bank_pairs * rank // self.rank)

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        rank = self.rank_of(name)
        self.check_fits("rank", rank, name, linear)
        bank = self.bank_of(rank) if needs_bank(self.into, codec) else 0
        return self.layer(name, linear, codec, self.pair_settings(name, bank, seed))

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        for adapter in as_pair_adapters(adapters):
            if adapter.bank_room:
                adapter.memory["used"] = torch.tensor(0)  # so many of the bank's first slots are filled

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        layers = as_pair_adapters(adapters)
        fresh = [fresh_pairs(adapter, step) for adapter in layers]
        engine.same("the fresh pairs", *(pairs.A for pairs in fresh))
        return Exchanged.total(
            [self.restart(adapter, engine, pairs) for adapter, pairs in zip(layers, fresh, strict=True)]
        )

    def restart(self, adapter: PairAdapter, engine: Engine, fresh: Pairs) -> Exchanged:
        """Exchange all pairs of a module for fresh ones. Collective."""
        assert self.moments != "carried", "by ReLoRA alone"
        return self.freeze(adapter, engine, fresh=fresh, moments=self.moments)

    def freeze(
        self, adapter: PairAdapter, engine: Engine, *, fresh: Pairs | None = None, share: float = 1.0, moments: Moments
    ) -> Exchanged:
        """Freeze all pairs of a module, or a share of each, see exchange_. Collective."""
        slots, lost = self._take_slots(adapter, engine) if adapter.bank_room else (None, 0.0)
        event = exchange_(
            engine,
            adapter,
            torch.arange(adapter.rank),  # all pairs
            fresh=fresh,
            slots=slots,
            share=share,
            moments=moments,
            prune=self.prune_ratio,
        )
        return replace(event, lost=event.lost + lost)  # one of the two is 0

    def _take_slots(self, adapter: PairAdapter, engine: Engine) -> tuple[slice, float]:
        """Reserve the bank's next empty slots; also return what compressing a full bank took, see Exchanged.lost.

        Collective.
        """
        capacity, used, lost = self.bank_of(adapter.rank), int(adapter.memory["used"]), 0.0
        if used + adapter.rank > capacity:
            used, lost = compress_bank_(engine, adapter, capacity - adapter.rank)
        adapter.memory["used"].fill_(used + adapter.rank)
        return slice(used, used + adapter.rank), lost


@Method.register_subclass("relora")
@dataclass(frozen=True)
class ReLoRA(Restarting):
    """Freeze all pairs and start new random ones, every `interval` steps."""

    moments: Literal["seeded", "zeroed", "pruned", "carried"] = "pruned"
    """Optimizer state at an exchange: the largest entries stay, or second moments become their mean (seeded), or all is
    zeroed, or B's are carried over to the new A, as in Flora (carried, with trains B)."""
    interval: int = 1000
    """Steps between exchanges (the paper's pre-training: 5000)."""
    restart_warmup: int = 50
    """Steps of linear warm-up after an exchange, towards the rate of the recipe (the paper: 50 to 100)."""
    trains: Literal["AB", "B"] = "AB"
    """What is trained: both factors, or B alone beside a random A, as in Flora (arXiv 2402.03293)."""

    adapter_roles = ("trained", "frozen")

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.restart_warmup < 0:
            complaints.append(f"method.restart_warmup must be at least 0, not {self.restart_warmup}")
        if self.interval <= self.restart_warmup:
            complaints.append(
                f"method.interval ({self.interval}) must be more than method.restart_warmup ({self.restart_warmup})"
            )
        if self.moments == "carried" and self.trains != "B":
            complaints.append(
                "method.moments: carried needs method.trains: B, since the gradient of B alone is a projection of W's "
                "by an A that stays; set it, or method.moments: pruned"
            )
        if self.trains == "B" and self.adapter and self.adapter_role == "trained":
            complaints.append(
                "method.adapter with adapter_role: trained brings an A of its own, and method.trains: B needs a random "
                "one; set adapter_role: frozen, or method.trains: AB"
            )
        return complaints

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        if self.trains == "B":
            return FrozenA(name, linear, codec, settings, a_init="kaiming")
        return super().layer(name, linear, codec, settings)

    def restart(self, adapter: PairAdapter, engine: Engine, fresh: Pairs) -> Exchanged:
        if self.moments != "carried":
            return super().restart(adapter, engine, fresh)
        old, moments = engine.whole(adapter.A), engine.slot(adapter.B).moments
        event = self.freeze(adapter, engine, fresh=fresh, moments="seeded")
        starts = engine.settings.kind.moments

        def carry() -> list[Tensor]:
            return [
                carry_first(m, old, fresh.A.to(m.device)) if starts[name] == "zero" else carry_second(m)
                for name, m in moments.items()
            ]

        carried = engine.broadcast(carry)
        with engine.edit(adapter.B) as (b,):
            for name, moment in zip(moments, carried, strict=True):
                b.moments[name].copy_(moment)
        return event

    def exchange_steps(self, total_steps: int) -> range:
        """Every multiple of interval that leaves at least one step at the full rate behind its warm-up."""
        return range(self.interval, total_steps - self.restart_warmup, self.interval)

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        steps = self.exchange_steps(total_steps)
        if not steps:
            raise ValueError(
                f"method.interval ({self.interval}) with method.restart_warmup ({self.restart_warmup}) leaves no "
                f"restart in a run of {total_steps} steps; lower them, train longer or set method.type: lora"
            )
        return tuple(steps)

    def rates(
        self, adapters: Sequence[Adapter], step: int, total_steps: int, rate: Callable[[int], float]
    ) -> list[float]:
        done = [exchanged for exchanged in self.exchange_steps(total_steps) if exchanged <= step]
        warm = min(1.0, (step - done[-1] + 1) / max(1, self.restart_warmup)) if done else 1.0
        return [each * warm for each in super().rates(adapters, step, total_steps, rate)]


def carry_first(moment: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """Return m P_old P_new^T with P = sqrt(3 n / r) A, the first moment (m, r) of B beside a new A (r, n).

    Over random A this is the expected moment that B would have if the new A had been there from the start.
    """
    r, n = old.shape
    return (moment.double() @ (old.double() @ new.double().T) * (3 * n / r)).to(moment.dtype)


def carry_second(moment: Tensor) -> Tensor:
    """Return the mean of each row of a second moment (m, r) of B: the rows of a random A are alike to row i of B."""
    return moment.mean(1, keepdim=True).expand_as(moment)


def fresh_pairs(adapter: PairAdapter, step: int) -> Pairs:
    """A random A with B = 0, the same on every rank."""
    m, n = adapter.shape
    return Pairs(
        torch.zeros(m, adapter.rank), uniform_rows(adapter.rank, n, generator(adapter.seed, adapter.name, step))
    )
