"""What a run leaves to look at: metrics.jsonl, one record a line, and the same numbers for trackers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from llm_lowrank.numerics.files import write_text

PROJECT = "llm_lowrank"


# accelerate's trackers, and what they call the name of a run
NAMED_BY = {"mlflow": "run_name", "comet_ml": "", "clearml": "task_name", "swanlab": "experiment_name"}
TRACKERS = ("tensorboard", "wandb", "trackio", *NAMED_BY)


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


class Accelerated:
    """A tracker of accelerate. These ask accelerate's state which process they are in: it is made here, if none is."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        self.made_state = not PartialState._shared_state
        PartialState(cpu=True)  # the device is not accelerate's business
        self.tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, **({at: folder.name} if (at := NAMED_BY[name]) else {}))
        self.tracker.start()
        self.tracker.store_init_configuration(settings)
        self.log = self.tracker.log

    def finish(self) -> None:
        self.tracker.finish()
        if self.made_state:  # an Accelerator that comes later must find the devices itself
            PartialState._reset_state()


def chosen(report_to: str | Sequence[str]) -> list[str]:
    """Return the trackers that report_to names, each once: `all` are those that are installed."""
    names = report_to.split(",") if isinstance(report_to, str) else report_to
    if list(names) == ["all"]:
        return [name for name in TRACKERS if importlib.util.find_spec(name)]
    return [] if list(names) == ["none"] else list(dict.fromkeys(names))


def tracker(name: str, folder: Path, resume_step: int | None, settings: dict[str, Any]) -> Tracker:
    """Return a tracker. Where it uploads, and whether, is set in its own environment."""
    if name == "tensorboard":
        return TensorBoard(folder, resume_step)
    if name in NAMED_BY:
        return Accelerated(name, folder, settings)
    module = importlib.import_module(name)  # wandb and trackio have the same functions
    module.init(project=PROJECT, name=folder.name, config=settings)
    return module


class Metrics:
    """Appends records to output_dir/metrics.jsonl and reports their numbers to trackers.

    Ranks other than 0 do nothing.
    """

    def __init__(
        self,
        output_dir: str | Path,
        report_to: str | Sequence[str],
        main: bool,
        resume_step: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """`resume_step`: the step from which the run resumes; records of later steps are dropped."""
        self.file, self.trackers = None, list[Tracker]()
        if not main:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if resume_step is not None and path.is_file():
            write_text(path, "".join(_up_to(resume_step, path.read_text(encoding="utf-8"))))
        mode = "w" if resume_step is None else "a"
        self.file = path.open(mode, encoding="utf-8", buffering=1)  # a line at a time: readable while it runs
        self.trackers = [tracker(name, folder, resume_step, settings or {}) for name in chosen(report_to)]

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Write one record: its kind (train, eval, exchange, ...), the completed steps, and named values.

        Values are what JSON has; a tracker gets those that are numbers.
        """
        if self.file is not None:
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.trackers if numbers else ():
            tracker.log(numbers, step=step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self.file.close()
        for tracker in reversed(self.trackers):
            tracker.finish()


def _up_to(step: int, text: str) -> Iterator[str]:
    """The whole records of steps up to this one; a killed run may have left half a line."""
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                yield line + "\n"
        except ValueError:
            continue
