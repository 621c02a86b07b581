"""launch/inspect_data.py: what it shows is what a run would train."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from launch import inspect_data
from tests.test_data import CHATML, write_jsonl
from tests.test_launch import place  # noqa: F401 - a fixture

ROWS = [{"instruction": f"Say {k}.", "output": "yes " * k} for k in range(1, 31)]


def shown(capsys, *arguments: object) -> str:
    assert inspect_data.main(list(map(str, arguments))) == 0
    return capsys.readouterr().out


@pytest.fixture
def settings(place, tmp_path) -> list[object]:  # noqa: F811
    rows = [*ROWS, {"instruction": "Say nothing.", "output": ""}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = {"dataset": path, "held_out": 3, "max_length": 100, "bad_rows": "drop"}
    return [f"--model_name_or_path={place / 'model'}", *(f"--data.{name}={value}" for name, value in data.items())]


def test_examples_lengths_and_shares_are_those_of_the_data(settings, capsys):
    out = shown(capsys, *settings, "--examples", 2, "--color", "never")
    # what is trained, and nothing else, in brackets
    assert len(re.findall(r"<\|start\|>assistant\n\[(?:yes )+<\|end\|>\]", out)) == 2
    whole = [4 + len(f"user\nSay {k}.\nassistant\n\n") + 4 * k for k in range(1, 31)]  # 4 marks, a token a byte
    cut, lengths = sum(length > 100 for length in whole), [min(100, length) for length in whole]
    assert f"held out 3, dropped 1, cut to 100 tokens {cut}" in out and cut > 5
    assert "answers end with <|end|> (257), where generation stops" in out
    assert "dropped 1: the answer is empty" in out and "prompts: chat; [brackets]: trained" in out
    total = re.search(r"to train on 27: ([\d,]+) tokens, ([\d,]+) of them trained", out)
    assert total and 0 < int(total[2].replace(",", "")) < int(total[1].replace(",", "")) <= sum(lengths)
    assert sum(int(row[1]) for row in re.findall(r"^ +(\d+) +(\d+) #*$", out, re.MULTILINE)) == 27
    padded, grouped, packed = (float(share) for share in re.findall(r"([\d.]+)%", out.splitlines()[-1]))
    assert grouped < padded and 0 <= packed < 100


def test_colour_marks_the_same_tokens(settings, capsys):
    out = shown(capsys, *settings, "--examples", 1, "--color", "always")
    assert re.search(r"\x1b\[32m(?:yes )+<\|end\|>\x1b\[0m", out) and "green: trained" in out


def test_a_stream_is_shown_without_lengths(settings, capsys):
    out = shown(capsys, *settings, "--data.streaming=true", "--examples", 1)
    assert "a stream: its lengths are not known" in out


def test_mistakes_are_one_line(settings, capsys):
    assert inspect_data.main([*settings, "--data.formt=alpaca"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown setting 'data.formt'")


def test_it_starts_as_a_script():
    script = Path(inspect_data.__file__)
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--examples" in done.stdout


def test_flags_unused_columns_and_the_date_are_shown(place, tmp_path, capsys):  # noqa: F811
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%Y') }}|" + CHATML)
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "BAD", "weight": 0},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "GOOD", "weight": 1},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages, "id": 7}])
    arguments = {"data.dataset": path, "data.held_out": 0, "data.chat_template": template, "examples": 1}
    out = shown(capsys, f"--model_name_or_path={place / 'model'}", *(f"--{k}={v}" for k, v in arguments.items()))
    assert "assistant\nBAD<|end|>" in out and "assistant\n[GOOD<|end|>]" in out
    assert "columns not used: id (1 row)" in out
    assert f"the chat template writes the date: {date.today().isoformat()} here" in out
