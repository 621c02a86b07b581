"""Between the last backward and the step: what the optimizer gets in the place of the gradients, on every engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Direction, Update
from llm_lowrank.adapters.method import Method
from llm_lowrank.adapters.redirect import redirect
from llm_lowrank.methods.directions.riemannian import Riemannian
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.numerics.pairs import Pairs
from tests import ranks, tiny
from tests.tiny import Trainee

ENGINES = pytest.mark.parametrize(
    "engine, world", [(name, world) for name in tiny.ENGINES for world in (1, 2, 3)], ids=lambda x: str(x)
)
RATE, STEPS = 1e-2, 6
# what remembers something, and one rule that does not
REMEMBERING = ["riemannian", *(name for name, rule in tiny.DIRECTIONS.items() if rule.own_step)]
OFFLOAD = {"device": "cpu", "pin_memory": False}


def ramp(t: Tensor) -> Tensor:
    return torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view_as(t)


@dataclass(frozen=True)
class Constant(Direction):
    """A direction that no gradient looks like: every element of A and B has a value of its own."""

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        return Pairs(
            *(torch.linspace(-1, 1, t.numel(), device=t.device).view_as(t).double() for t in (pairs.B, pairs.A))
        )


@dataclass(frozen=True)
class Itself(Direction):
    """The gradients: a run along them is the run without a direction."""

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        return gradients


@dataclass(frozen=True)
class Broken(Direction):
    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        return gradients.scaled(math.nan)


def lora(rule: Direction, **settings: object) -> LoRA:
    return LoRA(**{**dict(rank=3, alpha=6, direction=rule), **settings})


def follow(engine: str, accumulation: int, zero: dict | None = None) -> tuple[dict, dict]:
    t = Trainee(
        lora(Constant()), engine, accumulation=accumulation, samples=12, optimization={"optim": "sgd"}, zero=zero
    )
    before = t.values()
    t.step(0, RATE)
    return before, t.values()


@ENGINES
def test_a_direction_that_was_put_is_the_one_that_is_stepped_along(engine, world):
    for before, after in ranks.run(world, follow, engine, 2):
        for name, value in before.items():
            expected = value - RATE * ramp(value)
            torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "engine, zero",
    [
        ("zero2", {"offload_optimizer": OFFLOAD}),
        ("zero3", {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}),
        ("zero3", {"stage3_param_persistence_threshold": 10**6}),
        ("fsdp", {"cpu_offload": True}),
        ("fsdp", {"shard_size": 1}),
        ("fsdp", {"reshard_after_forward": False}),
    ],
    ids=["zero2-offload", "zero3-offload", "zero3-persisted", "fsdp-offload", "fsdp-hybrid", "fsdp-gathered"],
)
def test_a_direction_is_stepped_along_wherever_parameters_lie(engine, zero):
    for before, after in ranks.run(2, follow, engine, 2, zero):
        for name, value in before.items():
            torch.testing.assert_close(after[name], value - RATE * ramp(value), rtol=0, atol=1e-7)


def runs(engine: str, clip: float) -> list[tuple[list[float], list[float], dict, dict]]:
    found = []
    for rule in (Direction.get_known_choices()["none"](), Itself()):
        t = Trainee(lora(rule), engine, max_grad_norm=clip)
        losses, norms = [], []
        for step in range(3):
            losses.append(t.forward_backward(step))
            norms.append(t.update(step))
        found.append((losses, norms, t.values(), t.moments()))
    return found


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    "engine, world", [("plain", 1), ("plain", 2), ("zero1", 2), ("zero2", 3), ("zero3", 3), ("fsdp", 2)]
)
def test_a_run_along_its_gradients_is_the_run_without_a_direction(engine, world, clip):
    for (losses, norms, values, moments), directed in ranks.run(world, runs, engine, clip):
        assert directed[0] == pytest.approx(losses, abs=1e-6)
        assert directed[1] == pytest.approx(norms, rel=1e-5)  # the norm of the gradients, not of what was stepped along
        assert max(norms) > 0.05, "nothing was clipped"
        for name, value in values.items():
            torch.testing.assert_close(directed[2][name], value, rtol=1e-4, atol=1e-6)
        assert directed[3].keys() == moments.keys()
        for name, moment in moments.items():  # AdamW's steps do not depend on the length of a gradient: its moments do
            torch.testing.assert_close(directed[3][name], moment, rtol=1e-3, atol=1e-9)


def lengths(engine: str) -> tuple[dict, dict]:
    t = Trainee(DoRA(rank=3, direction=Itself()), engine, max_grad_norm=0.01)
    u = Trainee(DoRA(rank=3), engine, max_grad_norm=0.01)
    for trainee in (t, u):
        trainee.step(0)
    return t.moments(), u.moments()


@pytest.mark.parametrize("engine, world", [("plain", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2)])
def test_what_no_direction_concerns_is_clipped_too(engine, world):
    for directed, plain in ranks.run(world, lengths, engine):
        assert any("magnitude" in name for name in plain)
        for name, moment in plain.items():
            torch.testing.assert_close(directed[name], moment, rtol=1e-3, atol=1e-9)


def poisoned(engine: str) -> tuple[float, bool]:
    t = Trainee(lora(Constant()), engine)
    t.step(0)
    before = t.values()
    t.forward_backward(1)
    mine = t.engine.gradient(t.adapters[0].A)
    if mine.numel():
        mine[0] = math.inf
    norm = t.update(1)
    return norm, all(torch.equal(before[name], value) for name, value in t.values().items())


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero2", 2), ("zero3", 2), ("fsdp", 2)])
def test_a_gradient_that_is_not_finite_is_not_hidden_by_a_direction(engine, world):
    for norm, unchanged in ranks.run(world, poisoned, engine):
        assert norm == math.inf
        assert unchanged


def test_a_direction_that_is_not_finite_ends_the_run():
    t = Trainee(lora(Broken()), "plain")
    t.forward_backward(0)
    with pytest.raises(RuntimeError, match="Broken made a direction that is not finite from finite gradients"):
        redirect(t.engine, t.adapters, 0, [RATE], 0.0)


def count(engine: str) -> tuple[int, int, int]:
    """Bytes that redirecting gave to collectives, bytes of what is trained, and sums over ranks."""
    t = Trainee(lora(Itself()), engine)
    t.forward_backward(0)
    before = t.engine.traffic
    with patch.object(t.engine, "sum", wraps=t.engine.sum) as sums:
        redirect(t.engine, t.adapters, 0, [RATE], 0.0)
    return t.engine.traffic - before, sum(4 * value.numel() for value in t.values().values()), sums.call_count


@pytest.mark.parametrize("engine, times", [("plain", 1), ("zero1", 1), ("zero2", 1), ("zero3", 2), ("fsdp", 2)])
def test_gradients_travel_once_and_values_where_they_are_sharded(engine, times):
    for traffic, elements, sums in ranks.run(2, count, engine):
        assert traffic - 8 == times * elements  # 8 bytes: the sum for the norm
        # one buffer for each of the two decoder layers, and the norm; DDP sends rank 0's results and sums nothing else
        assert sums == 1 + (0 if engine == "plain" else 2 * times)


def stopped_and_whole(engine: str, folder: str) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Direction -> values after four steps of a run that was stopped after two of them, and of one that was not."""
    found = {}
    for name in REMEMBERING:
        rule = tiny.DIRECTIONS[name]
        method = SRLoRA(rank=3, target_rank=6, svd_cache="", into="bank") if rule.survives_exchange else LoRA(rank=3)
        method = replace(method, direction=rule)
        exchanges = method.schedule(STEPS)

        def advance(t: Trainee, steps: range, method: Method = method, exchanges: tuple = exchanges) -> Trainee:
            for step in steps:
                t.step(step)
                if step + 1 in exchanges:
                    method.exchange(t.adapters, t.engine, step + 1, t.total)
            return t

        whole = advance(Trainee(method, engine, total=STEPS), range(STEPS))
        half = advance(Trainee(method, engine, total=STEPS), range(STEPS // 2))
        saved = half.save(Path(folder) / name, STEPS // 2)
        resumed = advance(Trainee(method, engine, total=STEPS, resume_from=saved), range(STEPS // 2, STEPS))
        found[name] = resumed.values(), whole.values()
    return found


@pytest.mark.parametrize(
    "engine, world",
    [("plain", 1), ("zero3", 2), *(pytest.param(name, 2, marks=pytest.mark.wide) for name in ("zero2", "fsdp"))],
)
def test_a_resumed_run_is_the_uninterrupted_one_bitwise(engine, world, tmp_path):
    """With an exchange before the stop and another one behind it, where the direction allows exchanges."""
    assert len(SRLoRA(rank=3, target_rank=6, svd_cache="").schedule(STEPS)) >= 2
    for found in ranks.run(world, stopped_and_whole, engine, str(tmp_path), timeout=250):
        assert found.keys() == set(REMEMBERING)
        for name, (resumed, whole) in found.items():
            assert all(torch.equal(resumed[key], value) for key, value in whole.items()), name


def test_a_direction_over_other_layers_is_refused():
    with pytest.raises(ValueError, match=r"method.direction.type riemannian is for layers .* A and B; rasa trains"):
        Trainee(RaSA(rank=3, direction=Riemannian()), "plain")


def test_a_direction_with_its_own_steps_does_not_leave_lengths_to_plain_gradient_descent():
    with pytest.raises(ValueError, match=r"dora trains magnitude too, and optim: sgd would step these along their gra"):
        Trainee(DoRA(rank=3, direction=tiny.DIRECTIONS["lora_rite"]), "plain")
