"""What a run writes to output_dir while it trains: at most one checkpoint is on its way."""

from __future__ import annotations

import shutil
import time

import draccus

from llm_lowrank.models import checkpoint
from llm_lowrank.models.backbone import BACKBONE
from llm_lowrank.models.foreign import DATE
from llm_lowrank.numerics.files import write_text
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run
from llm_lowrank.run.recipe import save


class Saving:
    """The checkpoints of a run. A thread writes beside the training; a step boundary completes what it has written."""

    def __init__(self, run: Run, metrics: Metrics) -> None:
        self.run, self.metrics = run, metrics
        self.writing: checkpoint.Writing | None = None
        self.step, self.waited = 0, 0.0

    @property
    def busy(self) -> bool:
        """Whether this rank's thread still writes."""
        return self.writing is not None and self.writing.busy

    def begin(self, step: int) -> None:
        """Copy what is to be saved after `step` and start writing; the checkpoint before is completed first.

        Collective.
        """
        self.finish()
        run, began = self.run, time.perf_counter()
        run.engine.at(f"saving after step {step}")
        self.step = step
        self.writing = checkpoint.save(
            run.engine,
            run.model,
            adapters=run.adapters,
            output=run.recipe.output,
            step=step,
            skipped=run.skipped,
            recipe=draccus.encode(run.recipe),
            base=run.source.fingerprint,
            data=run.facts,
            keep=run.recipe.save_total_limit,
            best=run.best.state,
        )
        self.waited = time.perf_counter() - began

    def finish(self) -> None:
        """Complete the checkpoint that is on its way, if there is one. Collective."""
        if self.writing is None:
            return
        began, writing, self.writing = time.perf_counter(), self.writing, None
        folder = writing.finish()
        size = sum(file.stat().st_size for file in folder.iterdir()) if self.run.engine.main else 0
        waited = self.waited + time.perf_counter() - began
        self.metrics.write("save", self.step, waited=waited, beside=writing.seconds, bytes=size)
        self.run.say(f"step {self.step}: saved {folder}")


def prepare_output(run: Run) -> None:
    """Remove what an earlier run left in output_dir, and write the recipe and the date of the prompts there. Call on
    rank 0.

    overwrite_output_dir, or resuming, has allowed it. Nothing of two runs is mixed; files of other names stay. A folder
    that cannot be removed is an error now, not after the training.
    """
    output = run.recipe.output
    resuming = run.resume_from is not None
    for name in ("adapter", "merged", *([] if resuming else ["tensorboard", checkpoint.FOLDER])):
        if (output / name).exists():
            shutil.rmtree(output / name)
    if run.resume_from is not None and run.recipe.overwrite_output_dir:
        for folder in checkpoint.later_ones(output, run.resume_from.path):
            shutil.rmtree(folder)
    for file in (BACKBONE, DATE):
        (output / file).unlink(missing_ok=True)
    save(run.recipe, output / "recipe.yaml")
    if run.corpus.date:
        write_text(output / DATE, f"{run.corpus.date}\n")
