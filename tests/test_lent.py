"""Frozen parameters that several layers borrow: one copy, no gradient, and every engine gathers them for each layer."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, Shared, Whole, fill_, generator
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.frozen import persistent_size
from llm_lowrank.numerics.functional import Product, adapter_linear
from llm_lowrank.numerics.pairs import Pairs
from llm_lowrank.run.memory import sizes_of
from tests import ranks
from tests.tiny import Trainee

RANK, STEPS = 5, 3


class Pair(Shared):
    """A (r, n) and B (m, r) for all layers, which use the first n columns and the first m rows (VeRA)."""

    def __init__(self, layers: list[Adapter]) -> None:
        super().__init__()
        m, n = (max(layer.shape[i] for layer in layers) for i in (0, 1))
        self.A, self.B = layers[0].factor(RANK, n, trained=False), layers[0].factor(m, RANK, trained=False)
        fill_(self)

    def initial(self) -> dict[str, Tensor]:
        random = generator(0, "pair")
        with torch.device("cpu"):
            return {name: torch.randn(p.shape, generator=random) / 4 for name, p in (("A", self.A), ("B", self.B))}


class Layer(Adapter):
    """y = W x + out * (B (gate * (A x)))"""

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> None:
        super().__init__(name, linear, codec, seed)
        self.gate, self.out = self.factor(RANK), self.factor(self.shape[0])

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        with torch.device("cpu"):
            return {"gate": torch.full((RANK,), 0.5), "out": torch.zeros(self.shape[0])}

    def forward(self, x: Tensor) -> Tensor:
        (lender,), (m, n) = self.borrows, self.shape
        product = Product(
            lender.read("A", self.first)[:, :n], lender.read("B", self.first)[:m], self.gate, out=self.out
        )
        return adapter_linear(x, self.parts(), decode=self.decode, products=[product], scale=1.0, bias=self.bias)

    def change(self, whole: Whole) -> Pairs:
        (lender,), (m, n) = self.borrows, self.shape
        B = whole(self.out)[:, None] * whole(lender.B)[:m] * whole(self.gate)
        return Pairs(B, whole(lender.A)[:, :n])


@dataclass(frozen=True)
class Lending(Method):
    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        return Layer(name, linear, codec, seed)

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        model.pair = Pair(adapters)
        for adapter in adapters:
            adapter.borrows, adapter.first = (model.pair,), adapter is adapters[0]


def trained(engine: str, reentrant: bool) -> tuple[list[float], dict[str, Tensor]]:
    t = Trainee(Lending(target_modules=["k_proj", "o_proj", "down_proj"]), engine)
    if reentrant:
        t.model.gradient_checkpointing_enable({"use_reentrant": True})
        t.model.enable_input_require_grads()
    losses = [t.step(step) for step in range(STEPS)]
    return losses, t.values()


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("engine, world", [("plain", 2), ("zero2", 3), ("zero3", 3), ("fsdp", 2)])
def test_a_lent_frozen_pair_trains_as_on_one_process(engine, world, reentrant):
    wanted_losses, wanted = ranks.run(1, trained, "plain", False)[0]
    assert wanted_losses[-1] < wanted_losses[0] and {"pair.A", "pair.B"} <= wanted.keys()
    for losses, values in ranks.run(world, trained, engine, reentrant):
        assert losses == pytest.approx(wanted_losses, rel=2e-6)
        for name, value in wanted.items():
            if name.startswith("pair"):
                assert torch.equal(values[name], value), name
            else:
                torch.testing.assert_close(values[name], value, rtol=1e-3, atol=1e-5)


def test_it_counts_as_a_bank_and_stays_gathered_under_zero3():
    t = Trainee(Lending(target_modules=["k_proj"]), "plain")
    lent = sum(p.numel() for p in t.model.pair.parameters())
    sizes = sizes_of(t.model, t.method)
    assert sizes.parts[1] == 4 * lent
    assert persistent_size(t.model) == max(p.numel() for p in t.model.pair.parameters())
