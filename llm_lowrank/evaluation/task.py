"""The interface of a task and of its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel

Metrics = dict[str, float | int | str]


@dataclass(frozen=True)
class TaskResult:
    """The figures of a task and the model's answers."""

    results: dict[str, Metrics]  # name in the record -> metric -> value; n: number of questions
    answers: list[dict[str, Any]] = field(default_factory=list)  # one line each in the file of answers


class Task(Protocol):
    """A task is made, and everything about it checked, before the model is loaded."""

    @property
    def name(self) -> str: ...

    def run(self, model: PreTrainedModel) -> TaskResult:
        """Ask the model and score its answers."""
        ...
