"""Whole runs over other data than prompts and completions: packed, streamed, grouped by length, with a chat template of
one's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import tiny
from tests.test_data import CHATML, byte_tokenizer, write_jsonl
from tests.test_launch import place, recipe, records  # noqa: F401 - place is a fixture


def settings(place: Path, output: Path, **changes: object) -> list[str]:  # noqa: F811
    chosen = {
        "engine": "plain",
        "report_to": "none",
        "output_dir": output,
        "save_merged": False,
        "max_steps": 4,
        **changes,
    }
    common = [a for a in recipe(place) if not a.startswith("--method.") and a.split("=")[0][2:] not in chosen]
    return [*common, "--method.type=lora", "--method.rank=4", *(f"--{name}={value}" for name, value in chosen.items())]


@pytest.mark.parametrize("way", ["data.packing", "data.group_by_length", "data.streaming"])
def test_a_run_learns_however_its_rows_are_made(place, tmp_path, way, capsys):  # noqa: F811
    train(parse(settings(place, tmp_path / "out", **{way: True})))
    before, after = (record["loss"] for record in records(tmp_path / "out", "eval"))
    assert after < before - 0.05
    said = capsys.readouterr().out
    expected = {
        "data.packing": "rows from 16, into which 32 examples are packed",
        "data.group_by_length": "samples from 32 (8 held out)",
        "data.streaming": "samples from a stream (8 held out)",
    }[way]
    assert expected in said and "prompts: chat; padding: <|end|>, masked and never trained" in said


def test_going_on_over_other_data_is_refused(place, tmp_path):  # noqa: F811
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(40)]
    write_jsonl(path, rows)
    start = settings(place, tmp_path / "out", **{"data.dataset": path, "save_steps": 2})
    train(parse(start))
    write_jsonl(path, [*rows[:-1], {"prompt": "39 + 1 =", "completion": "41"}])
    again = [*start, f"--resume_from_checkpoint={tmp_path / 'out/checkpoints/step-000002'}"]
    with pytest.raises(
        ValueError, match=r"data.dataset: .*the examples of .*data.jsonl are not those of the checkpoint"
    ):
        train(parse(again))
    write_jsonl(path, rows)
    train(parse(again))


def test_a_template_of_ones_own_is_handed_back(tmp_path):
    tokenizer = byte_tokenizer(None)
    tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "mine.jinja").write_text(CHATML)
    rows = [
        {"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": str(i + 1)}]}
        for i in range(20)
    ]
    data = {
        "data.dataset": write_jsonl(tmp_path / "chat.jsonl", rows),
        "data.chat_template": tmp_path / "mine.jinja",
        "data.held_out": 4,
    }
    run = settings(tmp_path, tmp_path / "out", model_name_or_path=tmp_path / "model", save_merged=True, **data)
    train(parse(run))
    for folder in ("adapter", "merged"):
        assert (tmp_path / "out" / folder / "chat_template.jinja").read_text() == CHATML
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged").chat_template == CHATML
    assert "loss" in records(tmp_path / "out", "eval")[-1]


def test_what_cannot_be_packed_or_streamed_is_refused_before_anything_is_loaded(place, tmp_path):  # noqa: F811
    for changes, message in (
        (
            {"data.packing": True, "method.type": "droplora", "method.mask": "sample"},
            "method.mask: sample cannot tell them apart",
        ),
        (
            {"data.streaming": True, "max_steps": -1},
            "data.streaming: how long the data is cannot be known; set max_steps",
        ),
    ):
        with pytest.raises(RecipeError, match=message):
            validate(parse(settings(place, tmp_path / "out", **changes)))
