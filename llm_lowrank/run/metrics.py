"""What a run leaves to look at: metrics.jsonl, one record a line, and the same numbers for a tracker."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from llm_lowrank.files import write_text

PROJECT = "llm_lowrank"


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...
    def finish(self) -> None: ...


class TensorBoard:
    """output_dir/tensorboard"""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1
        )

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def finish(self) -> None:
        self.board.close()


def tracker(report_to: str, folder: Path, resume_step: int | None, settings: dict[str, Any]) -> Tracker | None:
    """Return the tracker that report_to names.

    wandb and trackio have the same functions. Where they upload, and whether, is set in their own environment.
    """
    if report_to == "none":
        return None
    if report_to == "tensorboard":
        return TensorBoard(folder, resume_step)
    module = importlib.import_module(report_to)
    module.init(project=PROJECT, name=folder.name, config=settings)
    return module


class Metrics:
    """Appends records to output_dir/metrics.jsonl and reports their numbers to a tracker.

    Ranks other than 0 do nothing.
    """

    def __init__(
        self,
        output_dir: str | Path,
        report_to: str,
        main: bool,
        resume_step: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """`resume_step`: the step from which the run resumes; records of later steps are dropped."""
        self.file = self.tracker = None
        if not main:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if resume_step is not None and path.is_file():
            write_text(path, "".join(_up_to(resume_step, path.read_text(encoding="utf-8"))))
        mode = "w" if resume_step is None else "a"
        self.file = path.open(mode, encoding="utf-8", buffering=1)  # a line at a time: readable while it runs
        self.tracker = tracker(report_to, folder, resume_step, settings or {})

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write one record: its kind (train, eval, exchange, ...), the completed steps, and named values.

        Values are what JSON has; a tracker gets those that are numbers.
        """
        if self.file is not None:
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        if self.tracker is not None and numbers:
            self.tracker.log(numbers, step=step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()
        if self.tracker is not None:
            self.tracker.finish()


def _up_to(step: int, text: str) -> Iterator[str]:
    """The whole records of steps up to this one; a killed run may have left half a line."""
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                yield line + "\n"
        except ValueError:
            continue
