"""PeriodicLoRA: unload a share of the pairs into W again and again, and train on with the rest.
https://arxiv.org/abs/2402.16141

    every `interval` steps    W <- W + q s B A      then  A <- sqrt(1 - q) A,  B <- sqrt(1 - q) B     the function stays
    with q = 1                W <- W + s B A        then  A <- fresh and random,  B <- 0               ReLoRA's restart
    moments of both factors   first ones times sqrt(1 - q), second ones times 1 - q

The paper calls q a momentum. As both factors shrink, so do their gradients, and the moments follow exactly: g_B is
proportional to A, and g_A to B. If W cannot hold a small update, the share goes to a bank, as in ReLoRA. The paper
leaves open when the last unload comes: here every multiple of `interval` before the end has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_lowrank.adapters.adapter import Adapter, as_pair_adapters
from llm_lowrank.adapters.exchange import Exchanged
from llm_lowrank.adapters.method import Method
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.relora import Restarting


@Method.register_subclass("plora")
@dataclass(frozen=True)
class PLoRA(Restarting):
    """Unload a share of all pairs every `interval` steps, and train on with what is left of them."""

    interval: int = 250
    """Steps between unloads."""
    share: float = 0.1
    """q, the share of s B A that an unload takes. With 1 new random pairs start, as in ReLoRA."""
    moments: Literal["seeded", "zeroed", "pruned", "kept"] = "kept"
    """Optimizer state after an unload: it shrinks with the pairs (kept), or second moments become their mean (seeded),
    or the largest entries stay (pruned), or all is zeroed. With share 1: not kept."""

    adapter_roles = ("trained", "frozen")

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.interval < 1:
            complaints.append(f"method.interval must be at least 1, not {self.interval}")
        if not 0 < self.share <= 1:
            complaints.append(
                f"method.share must be above 0 and at most 1, not {self.share:g}; without an unload, take type: lora"
            )
        if self.share == 1 and self.moments == "kept":
            complaints.append(
                "method.moments: kept is for pairs of which a share stays, and method.share: 1 starts new ones; set "
                "method.moments: seeded"
            )
        return complaints

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        if self.interval >= total_steps:
            raise ValueError(
                f"method.interval ({self.interval}) leaves no unload in a run of {total_steps} steps; lower it, train "
                "longer or set method.type: lora"
            )
        return tuple(range(self.interval, total_steps, self.interval))

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        if self.share == 1:
            return super().exchange(adapters, engine, step, total_steps)
        layers, moments = as_pair_adapters(adapters), self.moments
        return Exchanged.total([self.freeze(adapter, engine, share=self.share, moments=moments) for adapter in layers])
