"""Which evaluation of a run was the best, and whether to go on: load_best_model_at_end, early_stopping_patience."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_lowrank.engines import Engine
from llm_lowrank.models.checkpoint import STATE, Checkpoint, folder_of
from llm_lowrank.run.recipe import Recipe

WORDS = {"loss": "held-out loss", "exact_match": "exact match"}


@dataclass
class Best:
    """The best evaluation so far: the lowest held-out loss or the most exact matches, and the earliest of equal ones.

    It is the same on every rank, and every checkpoint has it. Its state is in a checkpoint of its own, as soon as it
    is the best one, and no newer checkpoint removes that.
    """

    recipe: Recipe
    step: int = 0  # 0: there is none
    value: float = math.nan
    waited: int = 0  # evaluations since then
    folder: Path = Path()  # of the checkpoint after this step

    @property
    def wanted(self) -> bool:
        return self.recipe.load_best_model_at_end

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations in a row as the recipe allows were no better."""
        return 0 < self.recipe.early_stopping_patience <= self.waited

    @property
    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps."""
        if not self.wanted:
            return None
        value = self.value if self.step else None
        return {"metric": self.recipe.metric_for_best_model, "step": self.step, "value": value, "waited": self.waited}

    def due(self, step: int, total: int) -> bool:
        """Whether to evaluate after a step, here the last one only if its state may be the best."""
        every = self.recipe.eval_steps
        return self.wanted if step == total else every > 0 and step % every == 0

    def is_before(self, step: int) -> bool:
        """Whether the best state is an earlier one than that after this step."""
        return 0 < self.step < step

    def hear(self, engine: Engine, step: int, value: float | None) -> bool:
        """Compare the metric of an evaluation, and return whether it is the best so far. Collective."""
        if not self.wanted:
            return False
        value = float(str(engine.gather(value)[0]))  # one number for all ranks, which stop together
        lower = self.recipe.metric_for_best_model == "loss"
        better = math.isfinite(value) and (not self.step or (value < self.value if lower else value > self.value))
        self.waited += 1
        if better:
            self.step, self.value, self.waited = step, value, 0
            self.folder = folder_of(self.recipe.output, step)
        return better

    def resume(self, engine: Engine, point: Checkpoint) -> list[str]:
        """Take up what the checkpoint of a resume has; return a line if its best state is gone. Collective."""
        then = point.state.get("best") or {}
        if not (self.wanted and then.get("step")) or then["metric"] != self.recipe.metric_for_best_model:
            return []
        mine = folder_of(self.recipe.output, then["step"])
        places = [point.path] if point.step == then["step"] else [point.path.with_name(mine.name), mine]
        whole = [place for place in places if (place / STATE).is_file()]
        found = engine.gather(str(whole[0]) if whole else "")[0]
        if not found:
            return [
                f"the best state so far, after step {then['step']}, has no checkpoint in {point.path.parent} any more: "
                "only states from here on are compared"
            ]
        self.step, self.value, self.waited = then["step"], then["value"], then["waited"]
        self.folder = Path(str(found))
        return []

    def verdict(self, last: int, total: int) -> str:
        """Say which state is kept after `last` of `total` steps, and why the run stopped."""
        metric = WORDS[self.recipe.metric_for_best_model]
        why = ""
        if self.exhausted:
            why = f"stopped after step {last} of {total}: {metric} no better in {self.waited} evaluations; "
        if not self.step:
            return f"{why}kept: the last state, as no {metric} was a number"
        at = "the last state" if self.step == last else f"the state after step {self.step}"
        return f"{why}kept: {at}, with the best {metric}, {self.value:.4g}"
