"""metrics.jsonl and the trackers that hear the same numbers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tqdm import tqdm

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.engines.base import Engine
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.meter import Meter, log_step
from llm_lowrank.run.metrics import NAMED_BY, Metrics, chosen
from llm_lowrank.run.recipe import Recipe

pytestmark = pytest.mark.quick


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(folder: Path, report_to: str | list[str], **settings: Any) -> None:
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


class Mlflow(ModuleType):
    """What accelerate asks of mlflow, written down in the place of a server."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.heard: list[tuple] = []
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def search_experiments(self, filter_string: str) -> list:
        assert filter_string == "name = 'llm_lowrank'"
        return []

    def create_experiment(self, name: str, **settings: Any) -> str:
        return name

    def start_run(self, **settings: Any) -> None:
        self.heard.append(("run", settings["experiment_id"], settings["run_name"]))

    def log_params(self, values: dict) -> None:
        self.heard.append(("settings", values))

    def log_metrics(self, values: dict, step: int) -> None:
        self.heard.append((step, values))

    def end_run(self) -> None:
        self.heard.append(("finish",))


def test_several_trackers_hear_the_same_and_accelerate_keeps_nothing(tmp_path, monkeypatch):
    fake, other = Mlflow(), Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "wandb", other)
    for name, of in (("init", "start_run"), ("log", "log_metrics"), ("finish", "end_run")):
        setattr(other, name, getattr(other, of) if name != "init" else lambda **settings: None)
    told(tmp_path / "run", ["mlflow", "wandb", "tensorboard", "mlflow"], settings={"seed": 42})
    numbers = [(1, {"train/loss": 2.0, "train/learning_rate": 1e-3}), (2, {"exchange/pairs": 4})]
    assert fake.heard == [("run", "llm_lowrank", "run"), ("settings", {"seed": 42}), *numbers, ("finish",)]
    assert other.heard == [*numbers, ("finish",)] and (tmp_path / "run/tensorboard").is_dir()
    assert not PartialState._shared_state
    PartialState(cpu=True)  # of somebody else, in a notebook
    try:
        told(tmp_path / "again", "mlflow")
        assert PartialState._shared_state
    finally:
        PartialState._reset_state()


def test_all_trackers_are_those_that_are_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda found: found in ("tensorboard", "swanlab") or None)
    assert chosen(["all"]) == ["tensorboard", "swanlab"] and chosen("none") == [] == chosen([])
    assert chosen("wandb,mlflow") == ["wandb", "mlflow"]


def test_accelerate_has_every_tracker_that_is_left_to_it():
    assert set(NAMED_BY) <= LOGGER_TYPE_TO_CLASS.keys()


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


@pytest.mark.parametrize(
    "name, install",
    [
        ("wandb", '"llm-lowrank[wandb]"'),
        ("trackio", '"llm-lowrank[trackio]"'),
        ("mlflow", "mlflow"),
        ("comet_ml", "comet-ml"),
    ],
)
def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch, name, install):
    monkeypatch.setattr("importlib.util.find_spec", lambda found: None if found == name else object())
    said = f"report_to: {name} is not installed; pip install {install} or --report_to none"
    with pytest.raises(RecipeError, match=re.escape(said)):
        validate(Recipe(output_dir=str(tmp_path / "out"), report_to=["tensorboard", name], engine="plain"))


@pytest.mark.parametrize("given", ["tensorbord", "wandb,none", ["all", "wandb"]])
def test_what_is_no_tracker_is_refused(tmp_path, given):
    with pytest.raises(RecipeError, match="is no tracker; take some of tensorboard, wandb"):
        validate(Recipe(output_dir=str(tmp_path / "out"), report_to=given, engine="plain"))
