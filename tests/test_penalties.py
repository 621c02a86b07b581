"""The proximal step of an L1 penalty: the soft threshold itself, and the same zeros on every engine."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairAdapter, PairSettings, Whole
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import optimizer
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.functional import Product
from llm_lowrank.numerics.optimizers import OPTIMIZERS, Optimization, shrink_
from llm_lowrank.numerics.pairs import Pairs
from tests import ranks
from tests.tiny import Trainee

RATE, PENALTY, STEPS = 1e-3, 0.9, 6
ENGINES = [("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]


class Gated(PairAdapter):
    """A PairAdapter with a trained gate for each pair, whose L1 norm is penalized (SoRA)."""

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> None:
        super().__init__(name, linear, codec, settings)
        self.gate = self.factor(self.rank)
        self.groups, self.penalties = {"gate": 1}, {"gate": PENALTY}

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        return super().initial(pairs) | {"gate": torch.linspace(0.002, 0.02, self.rank, device="cpu")}

    def products(self, x: Tensor) -> list[Product]:
        return [Product(self.A, self.B, self.gate)]

    def pairs(self, whole: Whole) -> Pairs:
        return Pairs(whole(self.B) * whole(self.gate), whole(self.A))


@dataclass(frozen=True)
class GatedLoRA(LoRA):
    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return Gated(name, linear, codec, settings)

    def rates(self, adapters, step, total_steps, rate):
        return [rate(step), rate(step)]


def trained(engine: str, optim: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The values after every step but the last, and at the end."""
    method = GatedLoRA(rank=4, alpha=6, target_modules=["k_proj", "up_proj"])
    t = Trainee(method, engine, optimization={"optim": optim, "betas": (0.9, 0.99)})
    for step in range(STEPS):
        before = t.values()
        t.step(step, RATE)
    return before, t.values()


@pytest.mark.quick
def test_it_is_the_soft_threshold():
    p = nn.Parameter(torch.tensor([0.5, -0.5, 0.1, -0.1, 0.0, 0.2, 0.21]))
    q = nn.Parameter(torch.tensor([0.1]))
    shrink_([{"params": [p], "lr": 0.1, "penalty": 2.0}, {"params": [q], "lr": 0.1, "penalty": 0.0}])
    torch.testing.assert_close(p.detach(), torch.tensor([0.3, -0.3, 0, 0, 0, 0, 0.01]))
    assert torch.equal(p == 0, torch.tensor([False, False, True, True, True, True, False])) and q.item() > 0


@pytest.mark.quick
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_step_of_every_optimizer_ends_with_one_threshold(optim):
    settings = Optimization(learning_rate=0.1, optim=optim)
    found = {}
    for penalty in (0.0, 2.0):
        layer = nn.Linear(3, 3, bias=False)
        layer.penalties = {"weight": penalty}
        layer.weight.data = torch.arange(9.0).view(3, 3) - 4
        stepped = optimizer(layer, settings)
        for _ in range(2):
            layer.weight.grad = torch.full((3, 3), 1e-3)
            stepped.step()
            found.setdefault(penalty, layer.weight.detach().clone())  # after the first step
    wanted = nn.functional.softshrink(found[0.0], 0.2)
    assert torch.equal(found[2.0] == 0, wanted == 0)
    torch.testing.assert_close(found[2.0], wanted)


@pytest.mark.parametrize("optim", ["adamw", "lion"])
@pytest.mark.parametrize("engine, world", ENGINES)
def test_every_engine_has_the_same_zeros(engine, world, optim):
    before, wanted = ranks.run(1, trained, "plain", optim)[0]
    zeros = sum(int((value == 0).sum()) for name, value in wanted.items() if name.endswith("gate"))
    assert 0 < zeros < 16, f"{zeros} of 16 gates are 0"
    for _, values in ranks.run(world, trained, engine, optim):
        for name, value in wanted.items():
            assert torch.equal(values[name] == 0, value == 0), name
            torch.testing.assert_close(values[name], value, rtol=1e-3, atol=1e-6)
    assert any(not torch.equal(before[name], wanted[name]) for name in wanted)
