"""AdaLoRA: the pairs of all modules compete for one budget, which shrinks during the training.
https://arxiv.org/abs/2303.10512

    y = W x + s B diag(E) A x          A, B from N(0, 0.02^2), E (r,) = 0 at the start
    R = 1/(2 modules) sum (|A A^T - I| + |B^T B - I|), and the loss is that of the data + orthogonal R
    S_k = s(E_k) + mean_j s(A_kj) + mean_i s(B_ik)                the score of a pair, see adapters/scores.py
    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3   the budget: pairs of all modules that stay

Every `interval` steps between t_i and T - t_f, and at T - t_f, the pairs with the lowest scores are pruned until b(t)
are left. Here a pruned pair is (0, 0, 0) and stays so, as all its gradients are zero. In the published code E alone is
set to zero. Its gradient and its momentum revive the pair at the next step, and only the last T - t_f steps have the
budget; `regrow` is that rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llm_lowrank.adapters import scores
from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings, Whole, as_pair_adapters, generator
from llm_lowrank.adapters.direction import Update
from llm_lowrank.adapters.exchange import Exchanged, rewrite_
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine, Slot
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.functional import Product
from llm_lowrank.numerics.pairs import Pairs

SCORED = ("A", "B", "E")
STD = 0.02  # of A and B at the start


class GatedAdapter(PairAdapter):
    """A PairAdapter with a trained weight `E` (r,) for each pair."""

    pull = 0.0  # orthogonal / (2 modules): what the penalty of one matrix weighs in the loss

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> None:
        super().__init__(name, linear, codec, settings)
        self.E = self.factor(self.rank)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: A and B are normal, and E is zero, so that the function starts as it was."""
        (m, n), random = self.shape, generator(self.seed, self.name)
        with torch.device("cpu"):
            a = torch.empty(self.rank, n).normal_(0.0, STD, generator=random)
            b = torch.empty(m, self.rank).normal_(0.0, STD, generator=random)
            return {"A": a, "B": b, "E": torch.zeros(self.rank)}

    def products(self, x: Tensor) -> list[Product]:
        return [Product(self.A, self.B, gate=self.E)]

    def pairs(self, whole: Whole) -> Pairs:
        return Pairs(whole(self.B) * whole(self.E), whole(self.A))

    @property
    def only_pairs(self) -> bool:
        return False  # pruned pairs are not written: the change is compressed

    def direct(self, values: dict[str, Tensor], gradients: dict[str, Tensor], update: Update) -> None:
        """Add the gradient of the penalty to those of A and B."""
        gradients["A"] += self.pull * orthogonality_gradient(values["A"])
        gradients["B"] += self.pull * orthogonality_gradient(values["B"].T).T

    @property
    def directing(self) -> str:
        return "the penalty of method.orthogonal"


def orthogonality_gradient(a: Tensor) -> Tensor:
    """Return d|A A^T - I| / dA = 2 (A A^T - I) A / |A A^T - I|, (r, n); I has a 0 for each row of A that is zero.

    A zero row is a pruned pair: it stays zero and counts for nothing.
    """
    gap = a @ a.T - torch.diag(a.any(1).to(a.dtype))
    return 2 * (gap @ a) / gap.norm().clamp_min(1e-12)


@Method.register_subclass("adalora")
@dataclass(frozen=True)
class AdaLoRA(LoRA):
    """Train pairs with weights, and prune those of all modules that matter least, down to target_rank on average."""

    rank: int = 12
    """Pairs per module at the start."""
    target_rank: int = 8
    """Mean number of pairs per module after the last pruning, in proportion where rank_pattern gives other ranks."""
    interval: int = 10
    """Steps between prunings."""
    initial_share: float = 0.1
    """Share of the run before the budget begins to shrink: t_i / T."""
    final_share: float = 0.3
    """Share of the run after the last pruning: t_f / T."""
    orthogonal: float = 0.1
    """Weight of the penalty that keeps the rows of A, and the columns of B, nearly orthonormal; 0: no penalty."""
    beta1: float = 0.85
    """Decay of the mean of |w g|."""
    beta2: float = 0.85
    """Decay of its spread."""
    regrow: bool = False
    """Prune as published: only E is set to zero, its momentum stays, and pairs come back until the last pruning."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if not 1 <= self.target_rank <= self.rank:
            complaints.append(
                f"method.target_rank must be between 1 and method.rank ({self.rank}), not {self.target_rank}"
            )
        if self.interval < 1:
            complaints.append(f"method.interval must be at least 1, not {self.interval}")
        complaints += self.wrong_decays("beta1", "beta2")
        if not (self.initial_share >= 0 and self.final_share > 0 and self.initial_share + self.final_share < 1):
            complaints.append(
                f"method.initial_share ({self.initial_share:g}) must be at least 0, method.final_share "
                f"({self.final_share:g}) above 0, and both together below 1"
            )
        if not 0 <= self.orthogonal < math.inf:
            complaints.append(f"method.orthogonal must be at least 0, not {self.orthogonal}")
        if super().directs:
            complaints.append(
                f"method.direction.type {self.direction_name} is for a product B A, and adalora trains B diag(E) A; "
                "remove it"
            )
        return complaints

    @property
    def directs(self) -> bool:
        return self.orthogonal > 0

    @property
    def changes_function(self) -> bool:
        return True

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        return scores.statistics_bytes(adapters, SCORED), 0

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return GatedAdapter(name, linear, codec, settings)

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        super().link(model, adapters)
        for adapter in adapters:
            assert isinstance(adapter, GatedAdapter)
            adapter.pull = self.orthogonal / (2 * len(adapters))

    # ---- the budget

    def phases(self, total_steps: int) -> tuple[int, int]:
        """(t_i, T - t_f) in steps. The first pruning comes after t_i, and the last one at T - t_f."""
        # E is zero before the first step, and with it the first gradients of A and B: there are no scores yet
        first = max(1, round(self.initial_share * total_steps))
        return first, min(total_steps - 1, total_steps - round(self.final_share * total_steps))

    def budget(self, step: int, total_steps: int, pairs: int) -> int:
        """b(step), rounded down: how many of so many `pairs` stay."""
        first, last = self.phases(total_steps)
        target = pairs * self.target_rank // self.rank
        if step >= last:
            return target
        return int(target + (pairs - target) * (1 - max(0, step - first) / (last - first)) ** 3)

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        if self.target_rank == self.rank:
            return ()
        first, last = self.phases(total_steps)
        if first >= last:
            raise ValueError(
                f"{total_steps} steps have no room for a pruning between method.initial_share "
                f"({self.initial_share:g}) and method.final_share ({self.final_share:g}); lower them or train longer"
            )
        return (*(step for step in range(first + 1, last) if step % self.interval == 0), last)

    # ---- the hooks of a run

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        for adapter in as_pair_adapters(adapters):
            adapter.memory["live"] = torch.ones(adapter.rank, dtype=torch.int64)  # 1 for pairs that are not pruned
        scores.remember(adapters, engine, SCORED)

    def observe(self, adapters: list[Adapter], engine: Engine) -> None:
        scores.observe(adapters, engine, SCORED, beta1=self.beta1, beta2=self.beta2)

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        layers = as_pair_adapters(adapters)
        for_good = not self.regrow or step >= self.phases(total_steps)[1]
        budget = self.budget(step, total_steps, sum(adapter.rank for adapter in layers))
        kept = self.choose(layers, engine, budget)
        events = []
        for adapter, keep in zip(layers, kept, strict=True):
            assert isinstance(adapter, GatedAdapter)
            live = adapter.memory["live"]
            pruned = (keep.to(live.device) == 0).nonzero()[:, 0]
            if not self.regrow:
                pruned = pruned[live[pruned] == 1]  # those that were pruned before are idle
            live.copy_(keep)
            if len(pruned):
                params = [adapter.A, adapter.B, adapter.E] if for_good else [adapter.E]
                edit = partial(prune_, pruned.to(engine.device), idle=for_good)
                events.append(rewrite_(engine, adapter, params, edit, pairs=len(pruned)))
        live_pairs = [float(keep.sum()) for keep in kept]
        return Exchanged.total(events, {"live_pairs": live_pairs}) if events else None

    def choose(self, adapters: list[PairAdapter], engine: Engine, budget: int) -> list[Tensor]:
        """Return for every adapter which of its pairs stay, 1 or 0, (r,): the `budget` with the highest scores.

        Of equal scores the first ones stay. Rank 0 decides. Collective.
        """
        found = torch.cat(scores.scores(adapters, engine, SCORED))
        if not found.isfinite().all():
            raise RuntimeError("the scores of adalora's pairs are not finite; a gradient was NaN or infinite")
        if not self.regrow:  # what was pruned stays pruned
            live = torch.cat([adapter.memory["live"] for adapter in adapters]).to(found.device)
            found = found.where(live == 1, -1.0)

        def decide() -> list[Tensor]:
            keep = torch.zeros(len(found), dtype=torch.int64, device=found.device)
            keep[found.argsort(descending=True, stable=True)[:budget]] = 1
            return [keep]

        (kept,) = engine.broadcast(decide)
        engine.same("the pruned pairs", kept)
        return list(kept.split([adapter.rank for adapter in adapters]))

    def metrics(self, adapters: list[Adapter], engine: Engine) -> dict[str, float]:
        """Return the pairs that the last pruning kept: of all modules, and of the modules with the fewest and most."""
        live = [int(adapter.memory["live"].sum()) for adapter in adapters]
        return {"live_pairs": sum(live), "fewest_pairs": min(live), "most_pairs": max(live)}


def prune_(index: Tensor, *slots: Slot, idle: bool) -> None:
    """Set pairs to zero in the slots of E, or of A, B and E; with `idle` their moments too. Local."""
    a_b_e = slots if len(slots) == 3 else (None, None, slots[0])
    for slot, columns in zip(a_b_e, (False, True, False), strict=True):
        if slot is not None:
            for value in (slot.value, *(slot.moments.values() if idle else ())):
                (value.T if columns else value)[index] = 0.0
