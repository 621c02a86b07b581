"""llm_lowrank.train: what it returns, and that a process may call it again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
from peft import PeftConfig

import llm_lowrank
from llm_lowrank import Data, LoRA, Recipe, train
from llm_lowrank.run.command_line import RecipeError
from tests.test_launch import place  # noqa: F401 - place is a fixture


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """An engine with a group of one process says so in the environment, which is no other test's business."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def recipe(place, tmp_path) -> Recipe:  # noqa: F811
    return Recipe(
        model_name_or_path=str(place / "model"),
        output_dir=str(tmp_path / "first"),
        data=Data(dataset=str(place / "data.jsonl"), held_out=8, max_length=64),
        method=LoRA(rank=4),
        engine="plain",
        max_steps=2,
        logging_steps=1,
        warmup_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
    )


def test_two_runs_in_one_process_are_the_same_on_every_engine(recipe, tmp_path):
    losses = {}
    for engine in ("plain", "fsdp", "deepspeed"):
        for name in ("first", "second"):
            output = tmp_path / f"{engine}-{name}"
            trained = train(replace(recipe, engine=engine, output_dir=str(output), save_merged=False))
            losses[engine, name] = [r["loss"] for r in trained.records("train")] + [trained.after.loss]
            assert trained.output == output and trained.merged is None
        assert losses[engine, "first"] == losses[engine, "second"]
        assert losses[engine, "first"] == pytest.approx(losses["plain", "first"], rel=1e-5)


def test_what_was_measured_and_where_it_lies(recipe, tmp_path):
    trained = train(recipe)
    assert trained.recipe is recipe and trained.steps == 2
    assert trained.after.loss < trained.before.loss
    evaluations = [r for r in map(json.loads, (tmp_path / "first/metrics.jsonl").open()) if r["kind"] == "eval"]
    assert [r["loss"] for r in evaluations] == [trained.before.loss, trained.after.loss]
    assert trained.records("eval") == evaluations and [r["step"] for r in trained.records("train")] == [1, 2]
    assert PeftConfig.from_pretrained(trained.adapter).r == 4
    assert (trained.merged / "model.safetensors").is_file() and (trained.output / "recipe.yaml").is_file()


def test_a_mistake_is_said_before_anything_is_loaded_and_the_next_call_works(recipe, tmp_path):
    with pytest.raises(RecipeError, match="learning_rate must be above 0, not -1"):
        train(replace(recipe, learning_rate=-1.0))
    with pytest.raises(RecipeError, match="dry_run is for the command line"):
        train(replace(recipe, dry_run=True))
    with pytest.raises(ValueError, match="nowhere"):
        train(replace(recipe, model_name_or_path=str(tmp_path / "nowhere")))
    assert not (tmp_path / "first").exists()
    train(replace(recipe, save_merged=False))
    with pytest.raises(RecipeError, match="is not empty"):
        train(recipe)


def test_every_name_of_the_package_is_there():
    for name in llm_lowrank.__all__:
        assert getattr(llm_lowrank, name).__name__ == name
