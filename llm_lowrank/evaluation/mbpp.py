"""pass@k on MBPP, short Python tasks with tests: how likely one of k programs is right.  https://arxiv.org/abs/2108.07732

`mbpp:PATH` names the dataset as it is published (google-research-datasets/mbpp, full or sanitized): a .jsonl, .json or
.parquet file, or a folder with the files of its splits. The problems are those of the test split, tasks 11 to 510. The
plain prompt is the paper's, with tasks 2, 3 and 4 as examples. In a chat the model is told the task alone. The programs
run in the sandbox; test_list decides, and challenge_test_list is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_lowrank.data import style_of
from llm_lowrank.data.reading import File, kind_of, read
from llm_lowrank.evaluation import sandbox
from llm_lowrank.evaluation.human_eval import Coding

MBPP = "mbpp:"
TEST = range(11, 511)  # tasks of the test split
SHOTS = (2, 3, 4)  # tasks that the plain prompt shows
SHOWN = 3  # tests of a problem that the model sees


@dataclass(frozen=True, kw_only=True)
class Mbpp(Coding):
    """The problems of MBPP."""

    shots: Sequence[dict[str, Any]] = ()  # problems that the plain prompt shows with their solutions
    stops = ("[DONE]",)

    @classmethod
    def of(
        cls, name: str, tokenizer: PreTrainedTokenizerBase, style: str, *, limit: int | None = None, **asked: Any
    ) -> Mbpp:
        """Read the problems, the first `limit` of them. asked: the other fields. ValueError if they cannot be read,
        OSError if this system cannot hold the programs back.
        """
        path = name.removeprefix(MBPP)
        rows = read_rows(path)
        problems = [row for task, row in sorted(rows.items()) if task in TEST][:limit]
        if not problems:
            raise ValueError(f"{name}: no row has a task_id from {TEST[0]} to {TEST[-1]}, which are the tasks to solve")
        style, shots = style_of(tokenizer, style), []
        if style == "plain":
            if missing := [task for task in SHOTS if task not in rows]:
                raise ValueError(
                    f"{name}: the plain prompt shows the tasks {', '.join(map(str, SHOTS))} as examples, and "
                    f"{missing[0]} is not there; give the folder that has the split prompt too, or --prompt_style chat"
                )
            shots = [rows[task] for task in SHOTS]
        sandbox.run("")  # raises its OSError now, not after hours of generation
        return cls(name=name, tokenizer=tokenizer, problems=problems, style=style, shots=shots, **asked)

    def prompt(self, problem: dict[str, Any]) -> str:
        if self.style != "plain":
            return f"{_task(problem)}\n\nAnswer with the code in one block of code."
        shown = [f"{_task(shot)}\n[BEGIN]\n{shot['code']}\n[DONE]\n\n" for shot in self.shots]
        return f"{''.join(shown)}{_task(problem)}\n[BEGIN]\n"

    def program(self, problem: dict[str, Any], code: str) -> str:
        before = problem.get("test_imports") or []
        after = [problem.get("test_setup_code") or "", *problem["test_list"]]
        return "\n".join([*before, code, *after]) + "\n"


def _task(problem: dict[str, Any]) -> str:
    tests = "\n".join(problem["test_list"][:SHOWN])
    text = problem.get("text") or problem["prompt"]  # the sanitized rows call it prompt
    asked = f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:"
    return f"{asked}\n\n{tests}"


def read_rows(path: str) -> dict[int, dict[str, Any]]:
    """Return the rows of a file, or of the files in a folder, by their task_id. ValueError if they are not MBPP's."""
    place = Path(path).expanduser()
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    files = [file for file in files if kind_of(file.name) and file.is_file()]
    if not files:
        raise ValueError(f"{MBPP}{path}: is no .jsonl, .json or .parquet file, and no folder with some")
    rows: dict[int, dict[str, Any]] = {}
    for file in files:
        for number, (_, row) in enumerate(read(File(str(file), str(file)))):
            tests, code = row.get("test_list"), row.get("code")
            said = [row.get("text") or row.get("prompt"), code, *(tests if isinstance(tests, list) else [None])]
            row["task_id"] = task = int(row["task_id"]) if str(row.get("task_id")).isdigit() else None
            if task is None or not all(isinstance(text, str) for text in said) or not tests:
                raise ValueError(
                    f"{MBPP}{path}: row {number} of {file.name} is none of MBPP's: it needs task_id, text or prompt, "
                    "code and test_list"
                )
            if task in rows:
                raise ValueError(f"{MBPP}{path}: task {task} is there twice; give one variant of the dataset")
            rows[task] = row
    return rows
