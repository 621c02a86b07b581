"""Law 4: a run that was stopped and goes on is the run that was never stopped.

Over every method, engine and stored type.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.models import checkpoint
from llm_lowrank.models.checkpoint import Checkpoint
from tests import ranks, tiny
from tests.ranks import caught
from tests.test_laws import FEWER, METHODS, MODULES, refused
from tests.tiny import DTYPES, Trainee

STEPS, STOP = 4, 2  # SRLoRA is in the middle of an importance window, LoSiA between two slots, ReLoRA just restarted
MIDDLE = LoSiA(factor=0.5, output_factor=0, period=3, target_modules=MODULES)  # in the middle of a slot
RUNS = METHODS | {"losia-in-a-slot": MIDDLE}


def walk(t: Trainee, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(t.step(step))
        if step + 1 in t.method.schedule(STEPS, t.adapters):
            t.method.exchange(t.adapters, t.engine, step + 1, t.total)
    return losses


def saved(t: Trainee, folder: str, step: int, keep: int = 2) -> Path:
    return checkpoint.save(
        t.engine,
        t.model,
        adapters=t.adapters,
        output=Path(folder),
        step=step,
        skipped=0,
        recipe={},
        base="base",
        data={},
        keep=keep,
    ).finish()


def state(t: Trainee) -> dict[str, Tensor]:
    places = {f"{a.name}#{k}": v.clone() for a in t.adapters for k, v in a.memory.items() if k not in a.spans}
    weights = {f"{a.name}#W": t.engine.weight(a).matmul(torch.eye(a.shape[1])) for a in t.adapters}
    return t.values() | t.moments() | places | weights | {"logits": t.logits()}


def never_stopped(method: str, engine: str, dtype: str) -> tuple[list[float], dict[str, Tensor], int]:
    t = Trainee(RUNS[method], engine, dtype, total=STEPS)
    losses = walk(t, range(STEPS))
    return losses, state(t), len(t.adapters[0].ledger)


def stopped(method: str, engine: str, dtype: str, folder: str) -> None:
    t = Trainee(RUNS[method], engine, dtype, total=STEPS)
    walk(t, range(STOP))
    saved(t, folder, STOP)


def going_on(method: str, engine: str, dtype: str, folder: str) -> tuple[list[float], dict[str, Tensor], int]:
    found, damaged = checkpoint.newest(Path(folder))
    assert found is not None and found.step == STOP and not damaged
    t = Trainee(RUNS[method], engine, dtype, total=STEPS, resume_from=found)
    losses = walk(t, range(STOP, STEPS))
    return losses, state(t), len(t.adapters[0].ledger)


PLACES = [("plain", 1, "fp32"), ("zero2", 2, "bf16"), ("zero3", 3, "fp32"), ("fsdp", 2, "nf4")]
THROUGH = ("srlora-bank", "losia-in-a-slot")  # over all places and changes, the others over one of each on few ranks


def places(i: int, method: str) -> list[tuple[str, int, str]]:
    turned = PLACES[i % 4 :] + PLACES[: i % 4]
    possible = [place for place in turned if method not in METHODS or not refused(method, place[2])]
    if method in THROUGH:
        return possible
    engine, world, dtype = possible[0]
    return [(engine, min(world, 2), dtype)]


CELLS = [(method, *place) for i, method in enumerate(RUNS) for place in places(i, method)]
EVERY_CELL = [
    (method, *place, dtype)
    for method in RUNS
    for place in FEWER
    for dtype in DTYPES
    if method not in METHODS or not refused(method, dtype)
]


def over(names: tuple[str, ...], always: list[tuple], every: list[tuple]) -> pytest.MarkDecorator:
    """Some cells always, the others with -m wide."""
    wide = [
        pytest.param(*cell, marks=pytest.mark.wide, id="-".join(map(str, cell))) for cell in every if cell not in always
    ]
    return pytest.mark.parametrize(
        names, [*(pytest.param(*cell, id="-".join(map(str, cell))) for cell in always), *wide]
    )


@over(("method", "engine", "world", "dtype"), CELLS, EVERY_CELL)
def test_resume_is_bitwise_never_having_stopped(tmp_path, method, engine, world, dtype):
    uninterrupted = ranks.run(world, never_stopped, method, engine, dtype)
    ranks.run(world, stopped, method, engine, dtype, str(tmp_path))
    resumed = ranks.run(world, going_on, method, engine, dtype, str(tmp_path))
    for (losses, wanted, entries), (found, values, again) in zip(uninterrupted, resumed, strict=True):
        assert found == losses[STOP:]
        assert values.keys() == wanted.keys() and entries == again
        for name, value in wanted.items():
            assert torch.equal(values[name], value), name


CHANGES = [
    ("zero3", 3, "fsdp", 2),
    ("fsdp", 2, "plain", 1),
    ("plain", 1, "zero3", 2),
    ("zero2", 2, "zero3", 3),
    ("plain", 2, "zero1", 3),
]


FEW_CHANGES = [
    ("zero3", 2, "plain", 1),
    ("fsdp", 2, "plain", 1),
    ("plain", 1, "zero3", 2),
    ("zero2", 2, "plain", 1),
    ("plain", 1, "zero1", 2),
]
EVERY_MOVE = [(method, *change) for method in RUNS for change in CHANGES]
MOVES = [(method, *change) for method in THROUGH for change in CHANGES]
MOVES += [(m, *FEW_CHANGES[i % len(FEW_CHANGES)]) for i, m in enumerate(RUNS) if m not in THROUGH]


@over(("method", "before", "world", "after", "others"), MOVES, EVERY_MOVE)
def test_resume_on_another_engine_and_number_of_ranks_goes_on_alike(tmp_path, method, before, world, after, others):
    losses, wanted, _ = ranks.run(world, never_stopped, method, before, "fp32")[0]
    ranks.run(world, stopped, method, before, "fp32", str(tmp_path))
    found, values, _ = ranks.run(others, going_on, method, after, "fp32", str(tmp_path))[0]
    assert found == pytest.approx(losses[STOP:], rel=1e-5)
    for name, value in wanted.items():
        if not name.endswith(("exp_avg", "exp_avg_sq")):  # a sum that cancels
            assert (values[name] - value).double().norm() <= 1e-3 * value.double().norm() + 1e-7, name


def another_base(folder: str) -> str:
    found = Checkpoint.open(checkpoint.complete_checkpoints(Path(folder))[0])

    def resume() -> None:
        torch.manual_seed(0)
        original, tiny.kept = tiny.kept, lambda build, *rest: changed(build, original(build, *rest))
        try:
            Trainee(METHODS["lora"], "plain", total=STEPS, resume_from=found)
        finally:
            tiny.kept = original

    def changed(build: Callable[..., torch.nn.Module], model: torch.nn.Module) -> torch.nn.Module:
        model = copy.deepcopy(model)
        if build is tiny._llama:  # a skeleton has no values
            model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)
        return model

    return caught(resume, ValueError)


def test_another_base_is_refused(tmp_path):
    ranks.run(1, stopped, "lora", "plain", "fp32", str(tmp_path))
    said = ranks.run(1, another_base, str(tmp_path))[0]
    assert "the weight of model.layers.1.mlp.up_proj is" in said and "is model_name_or_path the same model" in said


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no state", "not json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    t = Trainee(METHODS["lora"], "plain", total=STEPS)
    t.step(0)
    first, second = saved(t, str(tmp_path), 1), saved(t, str(tmp_path), 2)
    victim = second / "trained-00000.safetensors"
    raw = victim.read_bytes()
    if damage == "cut":
        victim.write_bytes(raw[:-10])
    elif damage == "flipped":
        victim.write_bytes(raw[:-10] + bytes([raw[-10] ^ 1]) + raw[-9:])
    elif damage == "missing":
        victim.unlink()
    elif damage == "no state":
        (second / "state.json").unlink()
    else:
        (second / "state.json").write_text("{")
    found, damaged = checkpoint.newest(tmp_path)
    assert found is not None and found.path == first
    assert bool(damaged) == (damage != "no state") and all(str(second) in line for line in damaged), (
        "an unfinished one is none"
    )


def test_a_checkpoint_of_another_format_is_refused_and_not_read_without_what_it_calls_otherwise(tmp_path):
    t = Trainee(METHODS["lora"], "plain", total=STEPS)
    t.step(0)
    folder = saved(t, str(tmp_path), 1)
    state = json.loads((folder / "state.json").read_text())
    assert state["format"] == checkpoint.FORMAT
    (folder / "state.json").write_text(json.dumps(state | {"format": 1}))
    with pytest.raises(ValueError, match=f"{folder} has format 1, this version reads {checkpoint.FORMAT}"):
        Checkpoint.open(folder)


def test_only_the_last_ones_are_kept_and_a_save_that_fails_keeps_all(tmp_path, monkeypatch):
    t = Trainee(METHODS["lora"], "plain", total=STEPS)
    for step in (1, 2, 3):
        saved(t, str(tmp_path), step)
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["step-000003", "step-000002"]
    assert (tmp_path / "checkpoints/LATEST").read_text() == "step-000003\n"

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        saved(t, str(tmp_path), 4)
    monkeypatch.undo()
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["step-000003", "step-000002"]
    saved(t, str(tmp_path), 4)  # over what was left behind
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["step-000004", "step-000003"]
    assert not [p for p in tmp_path.rglob("*") if "tmp" in p.name]


def test_a_later_one_that_is_damaged_takes_no_room(tmp_path):
    t = Trainee(METHODS["lora"], "plain", total=STEPS)
    for step in (6, 1, 2, 3):
        saved(t, str(tmp_path), step)
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["step-000006", "step-000003", "step-000002"]


def test_every_stored_type_has_a_cell():
    assert {dtype for *_, dtype in CELLS} == set(DTYPES) - {"int8"} and {move[1:] for move in MOVES} == {
        *CHANGES,
        *FEW_CHANGES,
    }
