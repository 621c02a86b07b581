"""What a task is asked for and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel

Metrics = dict[str, float | int | str]


@dataclass(frozen=True)
class Found:
    results: dict[str, Metrics]  # name in the record -> metric -> value; n: how many were asked
    answers: list[dict[str, Any]] = field(default_factory=list)  # one line each in the file beside the record


class Task(Protocol):
    """Made, and checked, before the model is loaded."""

    @property
    def name(self) -> str: ...

    def run(self, model: PreTrainedModel) -> Found: ...
