"""Lion with decoupled weight decay, on every engine, against its rule (https://arxiv.org/abs/2302.06675 algorithm 2)
written naively:

    u = sign(beta1 m + (1 - beta1) g)        p <- p - rate (u + decay p)        m <- beta2 m + (1 - beta2) g
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.run.build import optimization
from llm_lowrank.run.recipe import parse
from tests import ranks
from tests.tiny import Trainee

MODULES = ["k_proj", "up_proj"]
METHOD = LoRA(rank=4, alpha=6, target_modules=MODULES)
SWITCHING = SRLoRA(rank=4, alpha=6, target_rank=8, gamma=0.5, target_modules=MODULES, svd_cache="", into="bank")
BETA1, BETA2, DECAY = 0.9, 0.95, 0.1
RATES = (1e-2, 5e-3, 2e-3, 1e-2)
LION = dict(optim="lion", betas=(BETA1, BETA2), weight_decay=DECAY)
ENGINES = pytest.mark.parametrize(
    "engine, world", [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]
)


def stepped(engine: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    t = Trainee(METHOD, engine, optimization=LION)
    for step, rate in enumerate(RATES):
        t.step(step, rate)
    return t.values(), t.moments()


def naive() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    t = Trainee(METHOD, "plain", optimization=LION)
    trained = {name: p for name, p in t.model.named_parameters() if p.requires_grad}
    mean = {name: torch.zeros_like(p) for name, p in trained.items()}
    for step, rate in enumerate(RATES):
        t.forward_backward(step)
        for name, p in trained.items():
            update = torch.sign(BETA1 * mean[name] + (1 - BETA1) * p.grad)
            p.data = p.data - rate * (update + DECAY * p.data)
            mean[name] = BETA2 * mean[name] + (1 - BETA2) * p.grad
            p.grad = None
        t.engine.micro = 0  # what the engine's own step does
    return t.values(), mean


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


@ENGINES
def test_a_few_steps_are_those_of_the_rule(engine, world):
    values, means = ranks.run(1, naive)[0]
    for found, moments in ranks.run(world, stepped, engine):
        assert found.keys() == values.keys()
        assert all(relative(found[name], value) <= 1e-5 for name, value in values.items())
        assert moments.keys() == {f"{name}.exp_avg" for name in means}  # there is no second moment
        assert all(relative(moments[f"{name}.exp_avg"], mean) <= 1e-4 for name, mean in means.items())


def several_groups(engine: str) -> dict[str, Tensor]:
    """LoSiA has a group of parameters per layer; ZeRO-3 steps one group at a time and empties the others."""
    t = Trainee(LoSiA(factor=0.25, output_factor=0, period=50, target_modules=MODULES), engine, optimization=LION)
    for step, rate in enumerate(RATES):
        t.step(step, rate)
    return t.values()


@pytest.mark.parametrize("engine, world", [("zero3", 2), ("fsdp", 2)])
def test_groups_are_stepped_with_and_without_gradients(engine, world):
    (wanted,) = ranks.run(1, several_groups, "plain")
    for found in ranks.run(world, several_groups, engine):
        assert all(relative(found[name], value) <= 1e-5 for name, value in wanted.items())


def switched(engine: str) -> dict[str, list[dict[str, Tensor]]]:
    """Values and means before and after a switch, and after the step that follows."""
    t = Trainee(SWITCHING, engine, optimization=LION)
    told: dict[str, list[dict[str, Tensor]]] = {"values": [], "moments": []}

    def look() -> None:
        told["values"].append(t.values())
        told["moments"].append(t.moments())

    for step in range(2):
        t.step(step, 1e-3)
    look()
    t.method.exchange(t.adapters, t.engine, 2, t.total)
    look()
    t.step(2, 1e-3)
    look()
    return told


@ENGINES
def test_a_switch_zeroes_the_mean_of_the_fresh_pairs_and_nothing_else(engine, world):
    reference = ranks.run(1, switched, "plain")[0]
    for told in ranks.run(world, switched, engine):
        (was, now, _), (before, after, last) = told["values"], told["moments"]
        assert before.keys() == after.keys() and all(key.endswith(".exp_avg") for key in after)
        for key in (key for key in before if key.endswith(".A.exp_avg")):
            name = key.removesuffix(".A.exp_avg")
            fresh = (was[f"{name}.A"] != now[f"{name}.A"]).any(1)
            assert int(fresh.sum()) == 2
            for letter, rows in (("A", lambda t: t), ("B", lambda t: t.T)):
                then, since = (rows(moments[f"{name}.{letter}.exp_avg"]) for moments in (before, after))
                assert then.any(1).all() and not since[fresh].any() and torch.equal(then[~fresh], since[~fresh])
                assert rows(last[f"{name}.{letter}.exp_avg"])[fresh].any()
        for name, value in reference["values"][2].items():
            assert relative(told["values"][2][name], value) <= 1e-4, name


def test_a_recipe_asks_for_it():
    settings = optimization(
        parse(["--optim", "lion", "--adam_beta1", "0.9", "--adam_beta2", "0.95", "--learning_rate", "1e-4"])
    )
    assert (settings.optim, settings.betas, settings.learning_rate) == ("lion", (0.9, 0.95), 1e-4)
    assert optimization(parse([])).optim == "adamw"
