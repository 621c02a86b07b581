"""What a finished run returns to Python: what it measured, and where its files lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_lowrank.run.held_out import Evaluation
from llm_lowrank.run.recipe import Recipe


@dataclass(frozen=True)
class Trained:
    """What a finished run measured, the same on every rank, and where its files lie, which rank 0 writes."""

    recipe: Recipe
    steps: int
    """Optimizer steps of the whole run, those before a resume included."""
    kept: int
    """The step after which the model was what is exported: the last one, or with load_best_model_at_end the best."""
    before: Evaluation | None
    """The evaluation before training: loss, exact_match, count, samples. None if the run resumed."""
    after: Evaluation
    """The same after training, of what is exported."""

    @property
    def output(self) -> Path:
        """output_dir, which also holds recipe.yaml, metrics.jsonl and report.html."""
        return self.recipe.output

    @property
    def adapter(self) -> Path:
        """The folder of the PEFT LoRA."""
        return self.output / "adapter"

    @property
    def merged(self) -> Path | None:
        """The folder of the merged model, or None with `save_merged: false`."""
        return self.output / "merged" if self.recipe.save_merged else None

    def records(self, kind: str) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl of a kind, such as train, eval or exchange, each with its step.

        The file lies where rank 0 wrote it.
        """
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]
