"""metrics.jsonl and the trackers that hear the same numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tqdm import tqdm

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.engines.base import Engine
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.meter import Meter, log_step
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.recipe import Recipe

pytestmark = pytest.mark.quick


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(folder: Path, report_to: str, **settings: Any) -> None:
    with Metrics(folder, report_to, main=True, **settings) as metrics:
        metrics.write("train", 1, loss=2.0, learning_rate=1e-3)
        metrics.write("exchange", 2, what="exchange", pairs=4)
        metrics.write("eval", 2, loss=None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_hears_the_settings_and_every_number(tmp_path, monkeypatch, name):
    heard: list[tuple] = []
    fake = ModuleType(name)
    fake.init = lambda **settings: heard.append(("init", settings))  # type: ignore[attr-defined]
    fake.log = lambda values, step: heard.append((step, values))  # type: ignore[attr-defined]
    fake.finish = lambda: heard.append(("finish",))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, fake)
    told(tmp_path / "run", name, settings={"seed": 42})
    assert heard == [
        ("init", {"project": "llm_lowrank", "name": "run", "config": {"seed": 42}}),
        (1, {"train/loss": 2.0, "train/learning_rate": 1e-3}),
        (2, {"exchange/pairs": 4}),
        ("finish",),
    ]
    assert len(records(tmp_path / "run")) == 3


def test_tensorboard_has_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told(tmp_path, "tensorboard")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"train/loss", "train/learning_rate", "exchange/pairs"}
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 2.0)]


class Counting(LoRA):
    """A method with numbers of its own."""

    def metrics(self, adapters: list[Adapter], engine: Engine) -> dict[str, float]:
        return {"adapters": len(adapters), "on_rank": engine.rank}


@pytest.mark.parametrize("kind, expected", [(Counting, {"adapters": 3, "on_rank": 0}), (LoRA, None)])
def test_numbers_of_the_method_are_written_beside_those_of_the_step(tmp_path, kind, expected):
    run = SimpleNamespace(
        recipe=Recipe(method=kind()), engine=Plain(), adapters=[None] * 3, skipped=0, exchange_steps=()
    )
    meter = Meter()
    meter.add(torch.tensor(2.0), SimpleNamespace(real=7))
    meter.step(True)
    with Metrics(tmp_path, "none", main=True) as metrics, tqdm(disable=True) as bar:
        log_step(run, metrics, meter, 4, rate=1e-3, norm=0.5, bar=bar)
    train, *of_method = records(tmp_path)
    assert (train["kind"], train["step"], train["loss"]) == ("train", 4, 2.0)
    assert of_method == ([] if expected is None else [{"kind": "method", "step": 4, **expected}])


def test_other_ranks_write_nothing(tmp_path):
    with Metrics(tmp_path / "run", "tensorboard", main=False) as metrics:
        metrics.write("train", 1, loss=2.0)
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_keeps_what_was_recorded_up_to_its_step(tmp_path):
    with Metrics(tmp_path, "none", main=True) as metrics:
        for step in range(1, 6):
            metrics.write("train", step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed in the middle of a line
    with Metrics(tmp_path, "none", main=True, resume_step=3) as metrics:
        metrics.write("train", 4, loss=40.0)
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda found: None if found == name else object())
    with pytest.raises(RecipeError, match=rf'report_to: {name} is not installed; pip install "llm-lowrank\[{name}\]"'):
        validate(Recipe(output_dir=str(tmp_path / "out"), report_to=name, engine="plain"))
