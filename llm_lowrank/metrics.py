"""What a run leaves to look at: metrics.jsonl, one record a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from llm_lowrank.files import write_text


def _up_to(step: int, text: str) -> Iterator[str]:
    """The whole records of steps up to this one; a killed run may have left half a line."""
    for line in text.splitlines():
        try:
            if json.loads(line)["step"] <= step:
                yield line + "\n"
        except ValueError:
            continue


class Metrics:
    """Appends to output_dir/metrics.jsonl and, if asked, output_dir/tensorboard. On ranks other than 0 it does nothing."""

    def __init__(self, output_dir: str | Path, tensorboard: bool, main: bool, resumed: int | None = None) -> None:
        """`resumed`: the step from which a run goes on; what was recorded of later steps is dropped."""
        self.file = self.board = None
        if not main:
            return
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if resumed is not None and path.is_file():
            write_text(path, "".join(_up_to(resumed, path.read_text(encoding="utf-8"))))
        mode = "w" if resumed is None else "a"
        self.file = path.open(mode, encoding="utf-8", buffering=1)  # a line at a time: readable while it runs
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=None if resumed is None else resumed + 1)

    def write(self, kind: str, step: int, **values: float | str | None) -> None:
        """One record: what it is about (train, eval, exchange, ...), completed steps, named values."""
        if self.file is not None:
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()
