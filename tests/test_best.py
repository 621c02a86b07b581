"""load_best_model_at_end: a run hands back the state of its best evaluation, exactly, and stops when none is better."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from llm_lowrank import Data, LoRA, Recipe, train
from llm_lowrank.models.best import Best
from llm_lowrank.models.checkpoint import complete_checkpoints
from llm_lowrank.run import train as loop
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.held_out import Evaluation
from llm_lowrank.run.prepare import make_engine
from llm_lowrank.run.report import write_report
from llm_lowrank.run.signals import Preempted, Signals
from tests import ranks
from tests.test_launch import place  # noqa: F401 - place is a fixture
from tests.test_laws import METHODS, refused

STEPS, BEST = 4, 2
LOSSES = {1: 3.0, BEST: 1.0, 3: 2.0, 4: 1.0}


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """An engine with a group of one process says so in the environment, which is no other test's business."""
    with mock.patch.dict(os.environ):
        yield


def recipe_of(folder: Path, output: Path, **changes: object) -> Recipe:
    settings: dict[str, object] = dict(
        model_name_or_path=str(folder / "model"),
        output_dir=str(output),
        data=Data(dataset=str(folder / "data.jsonl"), held_out=8, max_length=64),
        method=LoRA(rank=4),
        engine="plain",
        max_steps=STEPS,
        logging_steps=1,
        warmup_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        save_merged=False,
        eval_steps=1,
        load_best_model_at_end=True,
    )
    return Recipe(**{**settings, **changes})  # type: ignore[arg-type]


def evaluations(losses: dict[int, float]) -> mock._patch:
    """Let the evaluations of a run give these losses; that of the state which is kept is not asked."""

    def evaluate(run, model, step, metrics, kept=False):
        metrics.write("kept" if kept else "eval", step, loss=losses.get(step, 9.0))
        return Evaluation(losses.get(step, 9.0))

    return mock.patch.object(loop, "evaluate", evaluate)


# --- the state that is kept is that of a run that stopped there -------------------------------------------------------


def life(engine: str, method: str, dtype: str, folder: str, output: str, stops: bool) -> tuple[int, int]:
    """Train, whole or only up to the best step, and return the steps and the one that was kept."""
    codec = "nf4" if dtype == "nf4" else "dense"
    name, config = ("deepspeed", f"ds_configs/{engine}.json") if engine.startswith("zero") else (engine, "")
    recipe = recipe_of(Path(folder), Path(output), engine=name, deepspeed=config, codec=codec, method=METHODS[method])
    there = property(lambda best: stops and best.step == BEST)
    joined, before = make_engine(recipe), []
    real, load_best = loop.train_steps, loop.load_best

    def train_steps(run, model, *rest):
        before.extend(map(weakref.ref, run.model.parameters()))
        return real(run, model, *rest)

    def alone(run):
        model = load_best(run)
        kept = [p for p in (found() for found in before) if p is not None]
        assert before and not any(p.numel() or p.ds_tensor.numel() for p in kept), "two models are in memory"
        return model

    with (
        evaluations(LOSSES),
        mock.patch.object(Best, "exhausted", there),
        Signals() as signals,
        mock.patch.multiple(loop, train_steps=train_steps, load_best=alone),
    ):
        _, trained = loop._train(recipe, joined, signals)
    joined.unload()  # the process group is that of all tests
    return trained.steps, trained.kept


PLACES = [("plain", 1), ("zero2", 2), ("zero3", 2), ("fsdp", 2)]
CELLS = [  # W itself changes, or a bank is filled
    ("srlora-weight", "plain", 1, "fp32"),
    ("losia-weight", "zero2", 2, "fp32"),
    ("relora-weight", "zero3", 2, "fp32"),
    ("core-bank", "fsdp", 2, "nf4"),
]
TURNS = [  # every method, in turn at one of the places
    (method, *PLACES[(i + j) % len(PLACES)], dtype)
    for i, method in enumerate(METHODS)
    for j, dtype in enumerate(("fp32", "nf4"))
    if not refused(method, dtype)
]
MORE = [("core-weight", "fsdp", 2, "fp32"), ("srlora-bank", "zero3", 2, "nf4"), *TURNS]
WIDE = [cell for cell in dict.fromkeys(MORE) if cell not in CELLS]


@pytest.mark.parametrize(
    "method, engine, world, dtype", [*CELLS, *(pytest.param(*cell, marks=pytest.mark.wide) for cell in WIDE)]
)
def test_what_is_exported_is_what_a_run_that_stopped_there_exports(place, tmp_path, method, engine, world, dtype):  # noqa: F811
    found = {}
    for name, stops in (("whole", False), ("stopped", True)):
        output = tmp_path / name
        steps = ranks.run(world, life, engine, method, dtype, str(place), str(output), stops)
        assert steps == [(BEST if stops else STEPS, BEST)] * world
        files = ["adapter/adapter_model.safetensors", *(["backbone.safetensors"] if dtype == "nf4" else [])]
        found[name] = [(output / file).read_bytes() for file in files]
    assert found["whole"] == found["stopped"]


# --- when a run stops, and what it says -------------------------------------------------------------------------------


def records(output: Path, kind: str) -> list[dict]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def weights(output: Path) -> bytes:
    return (output / "adapter/adapter_model.safetensors").read_bytes()


EARLY = dict(max_steps=8, early_stopping_patience=2, save_steps=1, save_total_limit=1)


@pytest.fixture(scope="module")
def early(place) -> Path:  # noqa: F811
    """The output of a run whose second of eight steps was the best, and which waited for two evaluations."""
    with evaluations(LOSSES):
        trained = train(recipe_of(place, place / "early", **EARLY))
    assert (trained.steps, trained.kept, trained.after.loss) == (4, BEST, LOSSES[4])
    return trained.output


def test_a_run_stops_when_none_is_better_and_says_which_state_it_kept(early, capsys):
    why = "stopped after step 4 of 8: held-out loss no better in 2 evaluations; kept: the state after step 2, with the"
    said, known = records(early, "kept")
    assert said["why"].startswith(why) and (said["step"], said["of_step"], said["early"]) == (4, BEST, True)
    assert known["step"] == 4 and [r["step"] for r in records(early, "train")] == [1, 2, 3, 4]
    # the best checkpoint outlives newer ones than save_total_limit allows
    assert [folder.name for folder in complete_checkpoints(early)] == ["step-000004", "step-000002"]
    page = write_report(early).read_text()
    assert why in page and "has not finished" not in page


def test_a_run_that_waited_long_enough_stops_at_once_when_it_resumes(early, place):  # noqa: F811
    before, kept = len(records(early, "train")), weights(early)
    with evaluations(LOSSES):
        trained = train(recipe_of(place, early, **EARLY, resume_from_checkpoint="auto"))
    assert (trained.steps, trained.kept) == (4, BEST)
    assert len(records(early, "train")) == before and weights(early) == kept


def test_the_best_and_the_patience_survive_a_signal(early, place, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "out"

    def asked(self, engine, *, saving=False):  # after step 3
        return (output / "metrics.jsonl").exists() and len(records(output, "train")) == 3, saving

    recipe = recipe_of(place, output, **{**EARLY, "save_steps": 0})
    with evaluations(LOSSES), mock.patch.object(Signals, "anywhere", asked), pytest.raises(Preempted):
        train(recipe)
    with evaluations(LOSSES):
        trained = train(replace(recipe, resume_from_checkpoint="auto"))
    assert (trained.steps, trained.kept) == (4, BEST) and weights(output) == weights(early)


def test_a_best_state_without_a_checkpoint_is_not_waited_for(place, tmp_path, capsys):  # noqa: F811
    recipe = recipe_of(place, tmp_path / "out", save_steps=3, save_total_limit=1)
    with evaluations(LOSSES):
        train(recipe)
        best, newest = (tmp_path / f"out/checkpoints/step-00000{step}" for step in (BEST, STEPS))
        best.rename(tmp_path / "away")
        trained = train(replace(recipe, resume_from_checkpoint=str(newest)))
    assert "the best state so far, after step 2, has no checkpoint" in capsys.readouterr().out
    assert (trained.steps, trained.kept) == (STEPS, STEPS)


@pytest.mark.parametrize("metric", ["loss", pytest.param("exact_match", marks=pytest.mark.wide)])
def test_the_state_that_is_kept_measures_what_it_measured_then(place, tmp_path, metric, capsys):  # noqa: F811
    output = tmp_path / "out"
    data = Data("reasoning-gym:chain_sum", size=40, held_out=4, max_length=96, task={"max_terms": 2, "max_digits": 1})
    trained = train(recipe_of(place, output, learning_rate=10.0, max_steps=2, metric_for_best_model=metric, data=data))
    known = {}
    for record in records(output, "eval"):
        known.setdefault(record["step"], {}).update(record)
    values = {step: record[metric] for step, record in known.items() if step}
    best = (min if metric == "loss" else max)(values, key=values.__getitem__)
    assert trained.kept == best < 2 and getattr(trained.after, metric) == values[best]
    assert trained.after.loss == pytest.approx(known[best]["loss"], rel=1e-6)
    assert f"step {best}: held-out loss {known[best]['loss']:.4f}" in capsys.readouterr().out


def test_without_it_the_last_state_is_exported(early, place, tmp_path):  # noqa: F811
    with evaluations(LOSSES):
        trained = train(recipe_of(place, tmp_path / "out", max_steps=8, eval_steps=0, load_best_model_at_end=False))
    assert (trained.steps, trained.kept) == (8, 8) and weights(tmp_path / "out") != weights(early)
    assert not records(tmp_path / "out", "kept") and not (tmp_path / "out/checkpoints").exists()


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"eval_steps": 0}, "eval_steps: 0 makes none within the run, which has 4 steps; set eval_steps"),
        ({"eval_steps": 4}, "eval_steps: 4 makes none within the run, which has 4 steps"),
        ({"max_steps": -1, "eval_steps": 99}, "eval_steps: 99 makes none within the run, which has 16 steps"),
        ({"load_best_model_at_end": False, "early_stopping_patience": 1}, "early_stopping_patience is for load_best"),
        ({"early_stopping_patience": -1}, "early_stopping_patience must be at least 0"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(place, tmp_path, changes, says):  # noqa: F811
    with pytest.raises(RecipeError, match=says):
        train(recipe_of(place, tmp_path / "out", **changes))


def test_a_metric_needs_its_data(place, tmp_path):  # noqa: F811
    data = Data(dataset=str(place / "data.jsonl"), held_out=0, max_length=64)
    with pytest.raises(RecipeError, match=r"there are none; set data\.held_out"):
        train(recipe_of(place, tmp_path / "out", data=data))
    rows = [json.dumps({"text": f"some text {k}"}) for k in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    data = Data(dataset=str(tmp_path / "text.jsonl"), held_out=8, max_length=64)
    with pytest.raises(RecipeError, match="exact_match is of data with questions"):
        train(recipe_of(place, tmp_path / "out", data=data, metric_for_best_model="exact_match"))
