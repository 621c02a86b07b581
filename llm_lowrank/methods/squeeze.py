"""LoRA-Squeeze: train with many pairs, and compress what they learned to fewer, in stages during the training.
https://arxiv.org/abs/2602.10993

    at `squeezes` steps     s B A  ->  s B' A'    the best approximation of rank r_k, r_0 = rank, ... r_K = target_rank
    by an SVD               B A = U S V^T        B' = U_k sqrt(S_k)        A' = sqrt(S_k) V_k^T

The ranks fall geometrically, all stages are equally long, and s stays. The pairs that a squeeze leaves out become
(0, 0). Their gradients are zero from then on, so that they stay (0, 0), and every parameter keeps its shape. This is
the paper's In-Squeeze; its Post-Squeeze is `export_rank` of any method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings, as_pair_adapters
from llm_lowrank.adapters.exchange import Exchanged, renew_moments_, rewrite_
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine, Slot
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.pairs import Pairs


class SqueezedAdapter(PairAdapter):
    """A PairAdapter whose last pairs may be idle, so that what is exported has a lower rank than what is trained."""

    @property
    def only_pairs(self) -> bool:
        return False  # idle pairs are not written: the change is compressed


@Method.register_subclass("squeeze")
@dataclass(frozen=True)
class Squeeze(LoRA):
    """Train rank pairs, and squeeze them to target_rank pairs in stages."""

    rank: int = 32
    """Trainable pairs per module at the start."""
    target_rank: int = 8
    """Trainable pairs per module after the last squeeze; in proportion, rounded up, for a module with another rank."""
    squeezes: int = 2
    """Squeezes on the way, at equal distances; the ranks fall geometrically (32, 16, 8)."""
    moments: Literal["seeded", "zeroed"] = "seeded"
    """Optimizer state after a squeeze: second moments start at their mean over the pairs before it, or all at zero."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if not 1 <= self.target_rank <= self.rank:
            complaints.append(
                f"method.target_rank must be between 1 and method.rank ({self.rank}), not {self.target_rank}"
            )
        elif self.squeezes < 1:
            complaints.append(f"method.squeezes must be at least 1, not {self.squeezes}; without one, take type: lora")
        elif self.target_rank < self.rank and len(set(self.ranks())) != self.squeezes + 1:
            complaints.append(
                f"method.squeezes ({self.squeezes}) from rank {self.rank} to {self.target_rank}: a squeeze would cut "
                f"nothing, the ranks are {', '.join(map(str, self.ranks()))}; lower squeezes"
            )
        if self.directs:
            complaints.append(
                f"method.direction.type {self.direction_name} divides by the lengths of pairs, and squeeze sets pairs "
                "to zero; remove it, or squeeze at the end alone: method.type lora with method.export_rank"
            )
        return complaints

    def ranks(self) -> tuple[int, ...]:
        """The number of pairs of a stage: rank, ..., target_rank."""
        falls = (self.target_rank / self.rank) ** (1 / self.squeezes)
        return tuple(round(self.rank * falls**k) for k in range(self.squeezes + 1))

    def rank_after(self, squeezes: int, rank: int) -> int:
        """The number of live pairs of a module that was built with `rank`, after so many squeezes."""
        return -(-self.ranks()[squeezes] * rank // self.rank)

    @property
    def changes_function(self) -> bool:
        return True

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return SqueezedAdapter(name, linear, codec, settings)

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        if self.target_rank == self.rank:
            return ()
        if total_steps <= self.squeezes:
            raise ValueError(
                f"{self.squeezes} squeezes do not fit into {total_steps} steps; lower method.squeezes or train longer"
            )
        return tuple(round(k * total_steps / (self.squeezes + 1)) for k in range(1, self.squeezes + 1))

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        for adapter in adapters:
            adapter.memory["squeezes"] = torch.tensor(0)  # how many are done

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        events = []
        for adapter in as_pair_adapters(adapters):
            done = int(adapter.memory["squeezes"])
            live, left = (self.rank_after(count, adapter.rank) for count in (done, done + 1))
            squeeze = partial(squeeze_, engine, live=live, left=left, moments=self.moments)
            events.append(rewrite_(engine, adapter, (adapter.A, adapter.B), squeeze, pairs=live))
            adapter.memory["squeezes"] += 1
        return Exchanged.total(events)

    def metrics(self, adapters: list[Adapter], engine: Engine) -> dict[str, float]:
        """Return the number of live pairs of all modules together."""
        layers = as_pair_adapters(adapters)
        return {"live_pairs": sum(self.rank_after(int(a.memory["squeezes"]), a.rank) for a in layers)}


def squeeze_(engine: Engine, a: Slot, b: Slot, *, live: int, left: int, moments: Literal["seeded", "zeroed"]) -> None:
    """Compress the first `live` pairs to `left` in place, and make the others (0, 0) with moments of zero.

    Rank 0 decomposes. If the product needs fewer than `left` pairs, the others start again as (0, a), a the rows of A
    that were there: (0, 0) could never learn again. Collective.
    """

    def compress() -> list[Tensor]:
        small, _ = Pairs(b.value, a.value).compress(most=left)
        return [small.B, small.A]

    small_B, small_A = engine.broadcast(compress)
    engine.same("the squeezed pairs", small_B, small_A)
    used = len(small_A)
    a.value[:used], b.value[:, :used] = small_A, small_B
    a.value[left:] = 0.0
    b.value[:, used:] = 0.0
    # the mean is over the pairs that were live
    index = torch.arange(live, device=a.value.device)
    first = Slot(a.value[:live], {name: moment[:live] for name, moment in a.moments.items()})
    second = Slot(b.value[:, :live], {name: moment[:, :live] for name, moment in b.moments.items()})
    renew_moments_(first, second, index=index, moments=moments, starts=engine.settings.kind.moments)
    for moment in (*a.moments.values(), *(moment.T for moment in b.moments.values())):
        moment[left:] = 0.0
