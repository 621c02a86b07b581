"""Loss, tokens, products, time and memory between two reports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from llm_lowrank.data import MicroBatch
from llm_lowrank.engines.base import Engine
from llm_lowrank.run.flops import Shape, Work
from llm_lowrank.run.hardware import peak, peak_memory
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run


class Meter:
    """Sums since the last report. The loss stays on the device: reading it every step would wait for the device.

    work: what a token is multiplied by, see flops.py; without it operations are not counted. peak: TFLOP/s of a device.
    """

    def __init__(self, work: Work | None = None, peak: float | None = None, whole_logits: bool = False) -> None:
        self.work, self.peak, self.whole_logits = work, peak, whole_logits
        self.loss_of_step: Tensor | float = 0.0  # of the step that is being made
        self._restart()

    def _restart(self) -> None:
        self.loss: Tensor | float = 0.0
        self.tokens, self.steps, self.good_steps, self.began = 0, 0, 0, time.perf_counter()
        self.model_flops = self.hardware_flops = 0.0

    def add(self, loss: Tensor, micro: MicroBatch) -> None:
        """Count a micro-batch."""
        self.loss_of_step = self.loss_of_step + loss.detach()
        self.tokens += micro.real
        if self.work is not None:
            shape = Shape.of(micro)
            self.model_flops += self.work.model(shape)
            self.hardware_flops += self.work.hardware(shape, self.whole_logits)

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

        Memory is the most that any rank has used since its start. MFU = model FLOPs / s / peak, over all devices, see
        flops.py; it is left out where the peak is not known. Collective.
        """
        # numbers of the host are filled in by the device, as a copy would wait for it; of memory, which is not summed,
        # each rank has its own place
        sums = torch.zeros(4 + 2 * engine.world, dtype=torch.float64, device=engine.device)
        sums[0].add_(self.loss)
        at = 4 + 2 * engine.rank
        for place, number in (
            *enumerate((self.tokens, self.model_flops, self.hardware_flops), 1),
            *enumerate(peak_memory(engine.device), at),
        ):
            sums[place].fill_(number)
        loss, tokens, model_flops, hardware_flops, *memory = engine.sum(sums).tolist()
        seconds, steps, good_steps = time.perf_counter() - self.began, self.steps, self.good_steps
        self._restart()
        record: dict[str, float | None] = {
            "loss": loss / good_steps if good_steps else None,
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / engine.world,
            "seconds_per_step": seconds / steps,
        }
        if self.work is not None:
            teraflops = model_flops / seconds / engine.world / 1e12
            record["tflops_per_device"] = teraflops
            record["hardware_tflops_per_device"] = hardware_flops / seconds / engine.world / 1e12
            if self.peak is not None:
                record["mfu"] = teraflops / self.peak
        return record | {"memory_gb": max(memory[::2]) / 1e9, "memory_reserved_gb": max(memory[1::2]) / 1e9}


def meter_of(run: Run) -> Meter:
    """Return the meter of a run whose model is loaded."""
    return Meter(run.work, peak(run.engine.device, run.recipe.dtype), whole_logits=run.loss_layer is None)


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
    speed: dict[str, str] = {}
    if (mfu := record.get("mfu")) is not None:
        speed["mfu"] = f"{mfu:.1%}"
    elif (teraflops := record.get("tflops_per_device")) is not None:
        speed["tflops"] = f"{teraflops:.3g}"
    bar.set_postfix(
        loss="none" if record["loss"] is None else f"{record['loss']:.4f}",
        lr=f"{rate:.2e}",
        tok_s=f"{record['tokens_per_second']:.0f}",
        **speed,
        mem=f"{record['memory_gb']:.1f}GB",
        next_exchange=next((upcoming for upcoming in run.exchange_steps if upcoming > step), None),
    )
