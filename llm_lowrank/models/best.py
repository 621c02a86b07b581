"""The best state of a run, by its evaluations, and whether to go on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_lowrank.engines import Engine
from llm_lowrank.models.checkpoint import STATE, Checkpoint, folder_of

WORDS = {"loss": "held-out loss", "exact_match": "exact match"}


@dataclass
class Best:
    """The best evaluation so far: the lowest held-out loss or the most exact matches, and the earliest of equal ones.

    It is the same on every rank, and every checkpoint has it. Its state is in a checkpoint of its own, as soon as it
    is the best one, and no newer checkpoint removes that.
    """

    output: Path  # of the run
    metric: str = ""  # loss or exact_match; "": the last state is kept, and nothing is compared
    patience: int = 0  # evaluations in a row that may be no better; 0: any number
    step: int = 0  # 0: there is none
    value: float = math.nan
    waited: int = 0  # evaluations since then
    folder: Path = Path()  # of the checkpoint after this step

    @property
    def exhausted(self) -> bool:
        """Whether so many evaluations in a row were no better that the run ends."""
        return 0 < self.patience <= self.waited

    @property
    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps."""
        if not self.metric:
            return None
        value = self.value if self.step else None
        return {"metric": self.metric, "step": self.step, "value": value, "waited": self.waited}

    def is_before(self, step: int) -> bool:
        """Whether the best state is an earlier one than that after this step."""
        return 0 < self.step < step

    def hear(self, engine: Engine, step: int, value: float | None) -> bool:
        """Compare the metric of an evaluation, and return whether it is the best so far. Collective."""
        if not self.metric:
            return False
        value = float(str(engine.gather(value)[0]))  # one number for all ranks, which stop together
        lower = self.metric == "loss"
        better = math.isfinite(value) and (not self.step or (value < self.value if lower else value > self.value))
        self.waited += 1
        if better:
            self.step, self.value, self.waited = step, value, 0
            self.folder = folder_of(self.output, step)
        return better

    def resume(self, engine: Engine, point: Checkpoint) -> list[str]:
        """Take up what the checkpoint of a resume has; return a line if its best state is gone. Collective."""
        then = point.state.get("best") or {}
        if not then.get("step") or then["metric"] != self.metric:
            return []
        mine = folder_of(self.output, then["step"])
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
        metric = WORDS[self.metric]
        why = ""
        if self.exhausted:
            why = f"stopped after step {last} of {total}: {metric} no better in {self.waited} evaluations; "
        if not self.step:
            return f"{why}kept: the last state, as no {metric} was a number"
        at = "the last state" if self.step == last else f"the state after step {self.step}"
        return f"{why}kept: {at}, with the best {metric}, {self.value:.4g}"
