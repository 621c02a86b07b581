"""MBPP: rows in the published format, asked as lm-eval asks, judged by the sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import lm_eval.tasks
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from launch import evaluate as script
from llm_lowrank.evaluation import human_eval, sandbox
from llm_lowrank.evaluation.mbpp import Mbpp, read_rows
from tests.test_data import CHATML, byte_tokenizer
from tests.test_evaluate import Device, results
from tests.test_launch import place  # noqa: F401 - place is a fixture


def row(task: int, text: str, code: str, *tests: str, setup: str = "") -> dict:
    """A row of the full variant. Published code has the line ends of Windows."""
    code = code.replace("\n", "\r\n")
    empty = {"test_setup_code": setup, "challenge_test_list": []}
    return {"text": text, "code": code, "task_id": task, "test_list": list(tests), **empty}


ROWS = [
    row(1, "Not shown.", "def f():\n    return 1", "assert f() == 1"),
    row(
        2,
        "Write a function to double.",
        "def double(x):\n  return 2 * x",
        *[f"assert double({k})=={2 * k}" for k in range(4)],
    ),
    row(3, "Write a function to halve.", "def half(x):\n  return x / 2", *["assert half(2) == 1"] * 3),
    row(4, "Write a function to negate.", "def minus(x):\n  return -x", *["assert minus(2) == -2"] * 3),
    row(11, "Write a function to add.", "def add(a, b):\n  return a + b", *["assert add(1, 2) == 3"] * 3),
    row(
        12,
        "Write a function that builds a node.",
        "class Node:\n  def __init__(self, x):\n    self.x = x\ndef build(x):\n  return Node(x)",
        *["assert build(root.x).x == 5"] * 3,
        setup="root = Node(5)",
    ),
    row(
        510,
        "Write a function to square.",
        "def square(x):\n  return x * x",
        "assert square(3) == 9",
        "assert square(0) == 0",
    ),
    row(511, "Of another split.", "def g():\n    return 1", "assert g() == 1"),
]
OPTIONS = {"system": "", "samples": 1, "pass_at": (1,), "temperature": 0.0, "max_new_tokens": 9, "batch_size": 2}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def task(path: Path, style: str, **changes: object) -> Mbpp:
    return Mbpp.of(f"mbpp:{path}", byte_tokenizer(CHATML), style, **OPTIONS | changes)


def test_the_plain_prompt_is_that_of_lm_eval_with_three_examples(file):
    settings = yaml.load(
        (Path(lm_eval.tasks.__file__).parent / "mbpp/mbpp.yaml").read_text().replace("!function", ""), yaml.SafeLoader
    )
    asks, answers = (
        jinja2.Template(settings[key], keep_trailing_newline=True) for key in ("doc_to_text", "doc_to_target")
    )
    shots = "".join(asks.render(row) + answers.render(row, is_fewshot=True) + "\n\n" for row in ROWS[1:4])
    asked = task(file, "plain")
    assert [problem["task_id"] for problem in asked.problems] == [11, 12, 510]  # the test split
    assert asked.prompt(asked.problems[0]) == shots + asks.render(ROWS[4])
    assert asked.stops == tuple(settings["generation_kwargs"]["until"]) and settings["num_fewshot"] == 3


def test_in_a_chat_the_task_alone_is_asked(file):
    asked = task(file, "chat")
    prompt = asked.tokenizer.decode(asked.question(asked.problems[0]).prompt_ids)
    assert prompt.startswith("<|start|>user") and "Write a function to add." in prompt and "[BEGIN]" not in prompt
    assert "assert add(1, 2) == 3" in prompt and "double" not in prompt


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_reference_solutions_pass_and_others_do_not(file, style, monkeypatch):
    def score(*answers: str) -> dict:
        shown = [text if style == "plain" else f"So:\n```python\n{text}\n```" for text in answers]
        monkeypatch.setattr(human_eval, "answer", lambda *_, **__: shown)
        return task(file, style).run(Device())

    right = [row["code"] for row in ROWS[4:7]]
    found = score(*right)
    assert found.results == {f"mbpp:{file}": {"pass@1": 1.0, "n": 3, "samples": 1}}
    assert [row["task_id"] for row in found.answers] == [11, 12, 510]
    wrong = score("def add(a, b):\n  return a - b", "def build(x):\n  return None", "import sys\nsys.exit(0)")
    assert wrong.results[f"mbpp:{file}"]["pass@1"] == 0.0
    assert score(right[0], "", right[2]).results[f"mbpp:{file}"]["pass@1"] == pytest.approx(2 / 3)


def test_the_sanitized_variant_and_a_folder_of_splits_are_read(tmp_path):
    def sanitized(row: dict) -> dict:
        named = {
            "source_file": "x",
            "prompt": row["text"],
            "test_imports": ["import math"] if row["task_id"] == 11 else [],
        }
        return {**named, **{key: row[key] for key in ("task_id", "code", "test_list")}}

    rows = [sanitized(row) for row in ROWS if not row["test_setup_code"]]
    rows[4]["test_list"] = ["assert add(1, math.floor(2.5)) == 3"]
    for split, part in {"prompt": rows[:4], "test": rows[4:]}.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"{split}-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("---\n---\n")
    asked = task(tmp_path, "plain", limit=1)
    assert [problem["task_id"] for problem in asked.problems] == [11] and len(asked.shots) == 3
    assert asked.prompt(asked.problems[0]).count("Write a function") == 4
    assert sandbox.run(asked.program(asked.problems[0], ROWS[4]["code"])).passed
    (tmp_path / "sanitized-mbpp.json").write_text(json.dumps(rows))
    assert read_rows(str(tmp_path / "sanitized-mbpp.json")).keys() == {row["task_id"] for row in rows}
    with pytest.raises(ValueError, match="task 1 is there twice"):
        read_rows(str(tmp_path))
    with pytest.raises(ValueError, match="tasks 2, 3, 4 as examples, and 2 is not there"):
        task(tmp_path / "test-00000-of-00001.parquet", "plain")
    assert task(tmp_path / "test-00000-of-00001.parquet", "chat").problems
    with pytest.raises(ValueError, match="no row has a task_id from 11 to 510"):
        task(tmp_path / "prompt-00000-of-00001.parquet", "chat")


@pytest.mark.parametrize(
    "change", [{"task_id": "x"}, {"test_list": []}, {"test_list": "assert 1"}, {"code": None}, {"text": ""}]
)
def test_a_row_of_something_else_is_named(tmp_path, change):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [ROWS[4], ROWS[5] | change]))
    with pytest.raises(ValueError, match="row 1 of rows\\.jsonl is none of MBPP's"):
        read_rows(str(tmp_path / "rows.jsonl"))


def test_from_the_command_line(place, file, tmp_path, capsys, monkeypatch):  # noqa: F811
    arguments = [
        "--checkpoint",
        str(place / "model"),
        "--tasks",
        f"mbpp:{file}",
        "--max_new_tokens",
        "4",
        "--limit",
        "2",
    ]
    assert script.main(arguments) == 2 and "--allow_code_execution lets it" in capsys.readouterr().err
    arguments.append("--allow_code_execution")
    assert script.main([*arguments[:3], "mbpp:/nowhere", *arguments[4:]]) == 2
    assert "mbpp:/nowhere: is no .jsonl, .json or .parquet file" in capsys.readouterr().err
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: ((), "bubblewrap (bwrap) is not installed"))
    assert script.main([*arguments, "--sandbox", "bubblewrap"]) == 2
    assert "--sandbox bubblewrap: bubblewrap (bwrap) is not installed" in capsys.readouterr().err
    assert script.main([*arguments, "--output", str(tmp_path / "r.json")]) == 0
    assert "warning: generated programs may write and delete the files" in capsys.readouterr().out
    assert results(tmp_path / "r.json") == {f"mbpp:{file}": {"pass@1": 0.0, "n": 2, "samples": 1}}
