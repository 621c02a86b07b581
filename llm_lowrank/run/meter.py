"""Loss, tokens and time between two reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from llm_lowrank.data import MicroBatch
from llm_lowrank.engines.base import Engine
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run


class Meter:
    """Sums since the last report. The loss stays on the device: reading it every step would wait for the device."""

    def __init__(self) -> None:
        self.loss_of_step: Tensor | float = 0.0  # of the step that is being made
        self._restart()

    def _restart(self) -> None:
        self.loss: Tensor | float = 0.0
        self.tokens, self.steps, self.good_steps, self.began = 0, 0, 0, time.perf_counter()

    def add(self, loss: Tensor, micro: MicroBatch) -> None:
        """Count a micro-batch."""
        self.loss_of_step = self.loss_of_step + loss.detach()
        self.tokens += micro.real

    def step(self, good: bool) -> None:
        """Close a step; the loss of a skipped step does not count."""
        if good:
            self.loss, self.good_steps = self.loss + self.loss_of_step, self.good_steps + 1
        self.loss_of_step, self.steps = 0.0, self.steps + 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the clock stand still, for an evaluation between two steps."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def report(self, engine: Engine) -> dict[str, float | None]:
        """Return means over the steps since the last report, of all ranks; a loss of None: all were skipped.

        Collective.
        """
        # numbers of the host are filled in by the device: a copy would wait for it
        tokens_and_loss = [torch.full((), self.tokens, dtype=torch.float64, device=engine.device)]
        tokens_and_loss.append(torch.as_tensor(self.loss, dtype=torch.float64, device=engine.device))
        tokens, loss = engine.sum(torch.stack(tokens_and_loss)).tolist()
        seconds, steps, good_steps = time.perf_counter() - self.began, self.steps, self.good_steps
        self._restart()
        return {
            "loss": loss / good_steps if good_steps else None,
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / steps,
        }


def progress_bar(run: Run) -> tqdm:
    """The bar over the steps of a run, on rank 0; it begins behind the steps that a checkpoint has."""
    done = run.resume_step or 0
    return tqdm(total=run.total_steps, initial=done, desc="train", unit="step", disable=not run.engine.main)


def log_step(run: Run, metrics: Metrics, meter: Meter, step: int, *, rate: float, norm: float, bar: tqdm) -> None:
    """Write the record of the steps since the last one, and show it on the progress bar. Collective."""
    record = meter.report(run.engine) | {"learning_rate": rate, "grad_norm": norm}
    if run.skipped:
        record["skipped"] = run.skipped
    metrics.write("train", step, **record)
    if of_method := run.recipe.method.metrics(run.adapters, run.engine):
        metrics.write("method", step, **of_method)
    bar.set_postfix(
        loss="none" if record["loss"] is None else f"{record['loss']:.4f}",
        lr=f"{rate:.2e}",
        tok_s=f"{record['tokens_per_second']:.0f}",
        next_exchange=next((upcoming for upcoming in run.exchange_steps if upcoming > step), None),
    )
