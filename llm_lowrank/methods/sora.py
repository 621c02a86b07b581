"""SoRA, sparse low-rank adaptation: a gate for each pair, and an L1 penalty that makes gates exactly zero.
https://arxiv.org/abs/2311.11696

    y = W x + s B diag(g) A x        A (r, n) as in LoRA, B (m, r) = 0, g (r,) from N(0, 1) at the start; all trained
    g <- prox(g'),  prox(v) = sign(v) max(|v| - rate * penalty, 0)        g' the optimizer's step

A pair whose gate is zero adds nothing, and is not exported. Its A and B have no gradient, but its gate has one, so that
the pair comes back if the optimizer moves the gate by more than rate * penalty. A step of AdamW is about
rate * m / sqrt(v), whatever the loss is scaled by: a gate stays zero while |m| / sqrt(v) is below the penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings, Whole, generator
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.functional import Product
from llm_lowrank.numerics.pairs import Pairs


class SparseAdapter(PairAdapter):
    """A PairAdapter with a trained gate (r,), which is penalized."""

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings, *, penalty: float) -> None:
        super().__init__(name, linear, codec, settings)
        self.gate = self.factor(self.rank)
        self.groups, self.penalties = {"gate": 1}, {"gate": penalty}

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: B is zero, so that the function starts as it was, and the gate is normal."""
        with torch.device("cpu"):
            gate = torch.randn(self.rank, generator=generator(self.seed, f"{self.name}.gate"))
        return super().initial(pairs) | {"gate": gate}

    def products(self, x: Tensor) -> list[Product]:
        return [Product(self.A, self.B, gate=self.gate)]

    def pairs(self, whole: Whole) -> Pairs:
        return Pairs(whole(self.B) * whole(self.gate), whole(self.A))

    @property
    def only_pairs(self) -> bool:
        return False  # pairs with a gate of zero are not written: the change is compressed


@Method.register_subclass("sora")
@dataclass(frozen=True)
class SoRA(LoRA):
    """Train pairs with gates, and let an L1 penalty set gates to zero."""

    rank: int = 8
    """Pairs per module at the start."""
    penalty: float = 0.375
    """Weight of the L1 norm of the gates; a step shrinks each gate by the learning rate times this. The authors' code
    shrinks by 3e-4 at a rate of 8e-4."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if not 0 <= self.penalty < math.inf:
            complaints.append(f"method.penalty must be at least 0, not {self.penalty}")
        if self.directs:
            complaints.append(
                f"method.direction.type {self.direction_name} is for a product B A, and sora trains B diag(g) A; "
                "remove it"
            )
        return complaints

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return SparseAdapter(name, linear, codec, settings, penalty=self.penalty)

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        super().link(model, adapters)
        for adapter in adapters:  # a penalty holds for a whole group, so that gates have one of their own
            adapter.groups = {**adapter.groups, "gate": 1 if self.b_rate == 1 else 2}

    def rates(
        self, adapters: Sequence[Adapter], step: int, total_steps: int, rate: Callable[[int], float]
    ) -> list[float]:
        return [*super().rates(adapters, step, total_steps, rate), rate(step)]

    def metrics(self, adapters: list[Adapter], engine: Engine) -> dict[str, float]:
        """Return the pairs whose gates are not zero: of all modules, and of those with the fewest and the most."""
        live = [int(gate.count_nonzero()) for gate in engine.whole_masters([_gate(adapter) for adapter in adapters])]
        return {"live_pairs": sum(live), "fewest_pairs": min(live), "most_pairs": max(live)}


def _gate(adapter: Adapter) -> nn.Parameter:
    assert isinstance(adapter, SparseAdapter)
    return adapter.gate
