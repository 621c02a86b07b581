"""COLA, Chain of LoRA: train a LoRA, merge it, start a new one, a few times.  https://arxiv.org/abs/2401.04151

    links i = 1 .. M of T / M steps     W_i = W_(i-1) + s B_i A_i      then  A <- fresh and random,  B <- 0
    the rate                            of the recipe over each link: rate((t - t_i) T / (t_(i+1) - t_i))

A knot between two links is ReLoRA's exchange, so that the function stays, and pairs go into the weight or into a bank.
Where ReLoRA warms one long schedule up again, each link here has the whole schedule, as a LoRA of its own has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.method import Method
from llm_lowrank.methods.relora import Restarting


@Method.register_subclass("cola")
@dataclass(frozen=True)
class COLA(Restarting):
    """Train a chain of LoRAs one after the other, each with the recipe's whole schedule of the rate."""

    links: int = 2
    """LoRAs in the chain; together they have the steps of the run."""
    bank_pairs: int | None = None
    """Pairs that the bank has room for, more than rank; in proportion for a module with another rank; by default those
    of all links but the last."""
    moments: Literal["seeded", "zeroed", "pruned"] = "seeded"
    """Optimizer state of a new link: second moments become their mean (seeded), or all is zeroed, or the largest
    entries stay."""

    def complaints(self) -> list[str]:
        return super().complaints() + (
            [] if self.links >= 1 else [f"method.links must be at least 1, not {self.links}"]
        )

    def bank_of(self, rank: int) -> int:
        return (self.links - 1) * rank if self.bank_pairs is None else super().bank_of(rank)

    def starts(self, total_steps: int) -> list[int]:
        """The 0-based step with which each link begins."""
        return [round(link * total_steps / self.links) for link in range(self.links)]

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        if total_steps < self.links:
            raise ValueError(f"{self.links} links do not fit into {total_steps} steps; lower method.links")
        return tuple(self.starts(total_steps)[1:])

    def rates(
        self, adapters: Sequence[Adapter], step: int, total_steps: int, rate: Callable[[int], float]
    ) -> list[float]:
        begun = [*self.starts(total_steps), total_steps]
        link = sum(start <= step for start in begun[:-1])
        first, end = begun[link - 1], begun[link]
        return super().rates(adapters, (step - first) * total_steps // (end - first), total_steps, rate)
