"""The table of optimizers: an entry is all that an optimizer needs, and a state that no entry describes is refused.

The optimizer that is added here is SGD with momentum, on every engine, against its rule written naively:

    m <- beta1 m + g        p <- p - rate m
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models import checkpoint
from llm_lowrank.numerics.optimizers import OPTIMIZERS, Optimization, OptimizerKind, check_state, initial_state
from llm_lowrank.run.recipe import Recipe
from tests import ranks
from tests.tiny import Trainee

BETA1, RATE, STEPS, STOP, EXCHANGE = 0.8, 1e-2, 4, 1, 2  # stops after step 1, exchanges after step 2
METHOD = SRLoRA(rank=4, alpha=6, target_rank=8, target_modules=["k_proj", "up_proj"], svd_cache="", into="bank")
SETTINGS = {"optim": "sgd", "betas": (BETA1, 0.0)}
ENGINES = pytest.mark.parametrize(
    "engine, world", [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2)]
)


def build(groups: list, o: Optimization) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=o.learning_rate, momentum=o.betas[0], weight_decay=o.weight_decay)


def sgd(**moments: str) -> OptimizerKind:
    return OptimizerKind("SGD", build, moments, counter=False, settings=("adam_beta1",))


GOOD = {"sgd": sgd(momentum_buffer="zero")}


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_recipe_offers_the_table():
    assert get_args(get_type_hints(Recipe)["optim"]) == tuple(OPTIMIZERS)
    assert all(hasattr(Recipe, setting) for kind in OPTIMIZERS.values() for setting in kind.settings)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_entry_describes_the_state_of_its_optimizer(name):
    settings = Optimization(optim=name)
    check_state(settings)
    p = torch.nn.Parameter(torch.randn(3, 4))
    optimizer = settings.kind.build([{"params": [p]}], settings)
    for step in range(1, 4):
        p.grad = torch.randn(3, 4)
        optimizer.step()
        primed = initial_state(p.detach(), step, settings)
        assert list(optimizer.state[p]) == list(primed)  # in the same order
        assert [k for k in primed if k != "step"] == list(settings.kind.moments)
        assert settings.kind.counter == ("step" in primed)
        assert all(not primed[k].any() and primed[k].shape == p.shape for k in settings.kind.moments)
        if settings.kind.counter:
            assert torch.equal(optimizer.state[p]["step"], primed["step"])


def test_a_step_of_adamw_is_one_operator_for_all_parameters():
    """A small model waits for operators, not for numbers."""
    settings = Optimization(optim="adamw")
    params = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(5)]
    optimizer = settings.kind.build([{"params": params}], settings)
    for _ in range(2):  # the first step makes the state
        for p in params:
            p.grad = torch.randn(3, 4)
        with Operators() as seen:
            optimizer.step()
    assert seen.names == ["aten::_foreach_add_", "aten::_fused_adamw_"]  # the steps are counted, and made


class Operators(TorchDispatchMode):
    """The names of the operators on tensors that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":  # not the profiler's marks
            self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_moments_are_those_of_the_papers():
    assert OPTIMIZERS["adamw"].moments == {"exp_avg": "zero", "exp_avg_sq": "mean"}
    assert OPTIMIZERS["lion"].moments == {"exp_avg": "zero"}


@pytest.mark.parametrize(
    "kind, found",
    [
        (sgd(), r"keeps \{'momentum_buffer': 'float32 \(2, 3\)'\} .*, but OPTIMIZERS says nothing"),
        (sgd(exp_avg="zero"), r"keeps \{'momentum_buffer'.*, but OPTIMIZERS says \{'exp_avg'"),
        (sgd(momentum_buffer="zero", exp_avg_sq="mean"), r"but OPTIMIZERS says .*'exp_avg_sq'"),
        (OptimizerKind("SGD", build, {"momentum_buffer": "zero"}, True, ()), r"but OPTIMIZERS says \{'step': "),
        (OptimizerKind("AdamW", OPTIMIZERS["adamw"].build, OPTIMIZERS["adamw"].moments, False, ()), r"keeps \{'step'"),
        (  # two moments, of rows and of columns, that are smaller than the parameter
            OptimizerKind("Adafactor", lambda groups, o: torch.optim.Adafactor(groups), {"row_var": "mean"}, True, ()),
            r"'row_var': 'float32 \(2, 1\)'",
        ),
    ],
    ids=["none-named", "another-name", "one-too-many", "no-counter", "a-counter", "factored"],
)
def test_a_state_that_the_table_does_not_describe_is_refused(kind, found):
    with patch.dict(OPTIMIZERS, sgd=kind), pytest.raises(AssertionError, match=found) as error:
        check_state(Optimization(optim="sgd", betas=(BETA1, 0.0)))
    assert "what the table does not name would be neither saved nor renewed at an exchange" in str(error.value)


def wrapped(engine: str) -> str:
    with patch.dict(OPTIMIZERS, sgd=sgd()):
        return ranks.caught(lambda: Trainee(METHOD, engine, optimization=SETTINGS), AssertionError)


@ENGINES
def test_no_engine_wraps_a_model_for_an_optimizer_whose_state_it_would_lose(engine, world):
    for message in ranks.run(world, wrapped, engine):
        assert re.search("optim: sgd keeps .*momentum_buffer", message), message


# --- an entry is enough -----------------------------------------------------------------------------------------------


def trainee(engine: str, resumed: checkpoint.Checkpoint | None = None) -> Trainee:
    return Trainee(METHOD, engine, optimization=SETTINGS, resume_from=resumed)


def save(t: Trainee, folder: str, step: int, skipped: int) -> None:
    checkpoint.save(
        t.engine,
        t.model,
        adapters=t.adapters,
        output=Path(folder),
        step=step,
        skipped=skipped,
        recipe={},
        base="base",
        data={},
        keep=2,
    ).finish()


def walk(t: Trainee, steps: range) -> dict[str, list[dict[str, Tensor]]]:
    """Values and moments after every step, and after the exchange."""
    seen: dict[str, list[dict[str, Tensor]]] = {"values": [], "moments": []}

    def look() -> None:
        seen["values"].append(t.values())
        seen["moments"].append(t.moments())

    for step in steps:
        t.step(step, RATE)
        look()
        if step + 1 == EXCHANGE:
            t.method.exchange(t.adapters, t.engine, EXCHANGE, t.total)
            look()
    return seen


def uninterrupted(engine: str) -> dict[str, list[dict[str, Tensor]]]:
    with patch.dict(OPTIMIZERS, GOOD):
        return walk(trainee(engine), range(STEPS))


def stopped(engine: str, folder: str) -> None:
    with patch.dict(OPTIMIZERS, GOOD):
        t = trainee(engine)
        walk(t, range(STOP))
        save(t, folder, STOP, skipped=0)


def resumed(engine: str, folder: str) -> dict[str, list[dict[str, Tensor]]]:
    with patch.dict(OPTIMIZERS, GOOD):
        found, _ = checkpoint.newest(Path(folder))
        assert found is not None
        return walk(trainee(engine, found), range(STOP, STEPS))


def naive() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and moments after two steps, when the exchange comes."""
    with patch.dict(OPTIMIZERS, GOOD):
        t = trainee("plain")
        trained = {name: p for name, p in t.model.named_parameters() if p.requires_grad}
        mean = {name: torch.zeros_like(p) for name, p in trained.items()}
        for step in range(EXCHANGE):
            t.forward_backward(step)
            for name, p in trained.items():
                mean[name] = BETA1 * mean[name] + p.grad
                p.data = p.data - RATE * mean[name]
                p.grad = None
            t.engine.micro = 0  # what the engine's own step does
        return t.values(), mean


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


@ENGINES
def test_an_entry_is_all_that_an_optimizer_needs(tmp_path, engine, world):
    values, means = ranks.run(1, naive)[0]
    ranks.run(world, stopped, engine, str(tmp_path))
    everyone = zip(
        ranks.run(world, uninterrupted, engine), ranks.run(world, resumed, engine, str(tmp_path)), strict=True
    )
    for whole, rest in everyone:
        _, before, after, *_ = whole["moments"]
        # the rule, and the moments by their names
        assert all(relative(whole["values"][1][name], value) <= 1e-5 for name, value in values.items())
        assert before.keys() == {f"{name}.momentum_buffer" for name in means}
        assert all(relative(before[f"{name}.momentum_buffer"], mean) <= 1e-4 for name, mean in means.items())
        # an exchange zeroes those of the fresh pairs, and no others
        for name in (name for name in values if name.endswith(".A")):
            fresh = (whole["values"][1][name] != whole["values"][2][name]).any(1)
            assert int(fresh.sum()) == METHOD.swap
            for key, rows in ((name, lambda t: t), (f"{name[:-1]}B", lambda t: t.T)):
                then, now = (rows(moments[f"{key}.momentum_buffer"]) for moments in (before, after))
                assert then.any(1).all() and not now[fresh].any() and torch.equal(then[~fresh], now[~fresh])
        # a resume continues bitwise
        for part in ("values", "moments"):
            for wanted, found in zip(whole[part][STOP:], rest[part], strict=True):
                assert wanted.keys() == found.keys() and all(torch.equal(wanted[k], found[k]) for k in wanted)


# --- a run in which every step was skipped ----------------------------------------------------------------------------


def nothing_yet(engine: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    t = Trainee(METHOD, engine)
    save(t, folder, 1, skipped=1)
    t.step(1)
    return t.values(), t.moments()


def from_nothing(engine: str, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found, _ = checkpoint.newest(Path(folder))
    t = Trainee(METHOD, engine, resume_from=found)
    t.step(1)
    return t.values(), t.moments()


@ENGINES
def test_a_checkpoint_of_an_optimizer_that_made_no_step_resumes(tmp_path, engine, world):
    wanted = ranks.run(world, nothing_yet, engine, str(tmp_path))
    found = ranks.run(world, from_nothing, engine, str(tmp_path))
    for these, those in zip(wanted, found, strict=True):
        for a, b in zip(these, those, strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
