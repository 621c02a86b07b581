"""COLA, Chain of LoRA: train a LoRA, merge it, start a new one, a few times.  https://arxiv.org/abs/2401.04151

    links i = 1 .. M of T / M steps     W_i = W_(i-1) + s B_i A_i      then  A <- fresh and random,  B <- 0
    the rate                            of the recipe over each link: rate((t - t_i) T / (t_(i+1) - t_i))

A knot between two links is ReLoRA's exchange, so that the function stays, and pairs go into the weight or into a bank.
Where ReLoRA warms one long schedule up again, each link here has the whole schedule, as a LoRA of its own has.

XGBLoRA (https://arxiv.org/abs/2410.19694) is a chain of many short links of rank 1, each of which trains a few decoder
layers, drawn at random. `layers_per_link` says how many. The pairs of the other layers rest as (0, 0): all of their
gradients are zero, so that they stay (0, 0), and W of such a layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from llm_lowrank.adapters.adapter import Adapter, as_pair_adapters, generator, layer_number
from llm_lowrank.adapters.exchange import Exchanged
from llm_lowrank.adapters.method import Method
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.relora import Restarting, fresh_pairs
from llm_lowrank.numerics.pairs import Pairs


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
    layers_per_link: int | None = None
    """Decoder layers that each link trains, drawn at random for each link, as in XGBLoRA (arXiv 2410.19694); by default
    all."""

    adapter_roles = ("frozen",)

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.links < 1:
            complaints.append(f"method.links must be at least 1, not {self.links}")
        if self.layers_per_link is not None and self.layers_per_link < 1:
            complaints.append(f"method.layers_per_link must be at least 1, not {self.layers_per_link}")
        return complaints

    def bank_of(self, rank: int) -> int:
        return (self.links - 1) * rank if self.bank_pairs is None else super().bank_of(rank)

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        super().link(model, adapters)
        layers = len({layer_number(adapter.name) for adapter in adapters})
        if self.layers_per_link is not None and self.layers_per_link > layers:
            raise ValueError(
                f"method.layers_per_link is {self.layers_per_link}, and {layers} layers have adapted modules; lower it"
            )

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

    # ---- resting layers

    def awake(self, adapters: Sequence[Adapter], link: int) -> list[bool]:
        """Which adapters a link trains, counted from 0: the same on every rank and after a resume."""
        numbers = [layer_number(adapter.name) for adapter in adapters]
        layers = sorted(set(numbers))
        order = torch.randperm(len(layers), generator=generator(adapters[0].seed, "layers of a link", link))
        chosen = {layers[i] for i in order[: self.layers_per_link].tolist()}
        return [number in chosen for number in numbers]

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        super().start(adapters, engine)
        if self.layers_per_link is None:
            return
        layers = as_pair_adapters(adapters)
        for adapter, now in zip(layers, self.awake(layers, 0), strict=True):
            adapter.memory["link"] = torch.tensor(0)
            if not now:
                with engine.edit(adapter.A) as (a,):
                    a.value.zero_()

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        if self.layers_per_link is None:
            return super().exchange(adapters, engine, step, total_steps)
        layers, events = as_pair_adapters(adapters), []
        link = int(layers[0].memory["link"])
        for adapter, was, now in zip(layers, self.awake(layers, link), self.awake(layers, link + 1), strict=True):
            adapter.memory["link"] += 1
            fresh = fresh_pairs(adapter, step)
            if was and now:
                events.append(self.restart(adapter, engine, fresh))
            elif was:  # a first moment that is left would move the pair away from zero
                idle = Pairs(fresh.B, torch.zeros_like(fresh.A))
                moments: Literal["zeroed", "seeded"] = "zeroed" if self.moments == "zeroed" else "seeded"
                events.append(self.freeze(adapter, engine, fresh=idle, moments=moments))
            elif now:
                with engine.edit(adapter.A) as (a,):
                    a.value.copy_(fresh.A)
        return Exchanged.total(events)
