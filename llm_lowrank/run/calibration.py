"""Before the first step: a method looks at gradients of the run's first samples, which are then forgotten.

A method that `recalibrates` looks at those of the next samples after each exchange.

Nothing of it is left but what the method wrote. Gradients, moments, random numbers and the order of the data are
bitwise what they would be without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import ceil

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.exchange import Exchanged
from llm_lowrank.adapters.method import Method
from llm_lowrank.data import IGNORE, Batches, MicroBatch, StreamBatches
from llm_lowrank.engines import Engine
from llm_lowrank.models.compiling import eagerly
from llm_lowrank.run.held_out import training_loss
from llm_lowrank.run.prepare import Run


def exchange(run: Run, model: nn.Module, step: int) -> Exchanged | None:
    """Let the method exchange pairs when so many steps are done, and then look at gradients, if it asks for that.

    model: the wrapped one. Collective.
    """
    event = run.recipe.method.exchange(run.adapters, run.engine, step, run.total_steps)
    if run.recipe.method.recalibrates:
        calibrate(run, model, step)
    return event


def calibrate(run: Run, model: nn.Module, done: int = 0) -> None:
    """Let the method look at gradients, if it asks for that, when so many steps of a run are done. Collective.

    model: the wrapped one.
    """
    method, engine = run.recipe.method, run.engine
    if not method.calibration:
        return
    engine.at(f"the calibration after step {done}" if done else "the calibration")
    began, passes = time.perf_counter(), 0
    micros = first_samples(run.batches, method.calibration, done)
    counts = torch.tensor(
        [sum(sum_of) for sum_of in zip(*map(_content, micros), strict=True)], dtype=torch.float64, device=engine.device
    )
    rows, tokens = (int(count) for count in engine.sum(counts).tolist())

    def loss_of(micro: MicroBatch) -> Tensor:
        method.batch(run.adapters, 0, micro.samples)
        return training_loss(run, model, micro) / tokens

    def losses() -> Iterator[Tensor]:
        nonlocal passes
        passes += 1
        return map(loss_of, micros)

    calibrate_on(engine, model, method, run.adapters, losses)
    when = f"step {done}: " if done else ""
    run.say(
        f"{when}calibrated on {rows} samples with {tokens} trained tokens: {passes} passes forward and backward "
        f"in {time.perf_counter() - began:.1f} s"
    )


def calibrate_on(
    engine: Engine,
    model: nn.Module,
    method: Method,
    adapters: Sequence[Adapter],
    losses: Callable[[], Iterator[Tensor]],
) -> None:
    """Call `method.calibrate`, with a backward over the losses. Collective.

    losses: yields this rank's shares of the loss, one for each micro-batch of some whole steps, each made when it is
    asked for. model: the wrapped one.
    """

    def backward() -> None:
        model.train()
        with same_random_numbers(engine.device):
            for count, loss in enumerate(losses(), 1):
                engine.backward(loss)
                if count % engine.settings.accumulation == 0:
                    engine.forget()

    for adapter in adapters:
        adapter.started()  # the samples go through the model as it is now
    with eagerly():  # no graph of a layer has probes
        method.calibrate(list(adapters), engine, backward)


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Leave the random state behind the block as it was before it."""
    on_host = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(on_host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)


def first_samples(batches: Batches | StreamBatches, count: int, done: int = 0) -> list[MicroBatch]:
    """Return this rank's micro-batches of the first steps, which hold the first `count` samples; others have no label.

    done: the first steps are those that come after so many. With packing a sample is a row of examples. Of data that is
    shorter as many samples are taken as an epoch has.
    """
    steps = ceil(count / batches.global_batch)
    if isinstance(batches, StreamBatches):
        batches = batches.again()
    else:
        steps = min(steps, batches.steps_per_epoch)
    found = []
    for step in range(steps):
        # the rows of a global batch are dealt out to the ranks in turn
        first = step * batches.global_batch + batches.rank
        for k, micro in enumerate(batches.step(done + step)):
            numbers = first + batches.world * (k * batches.per_device + torch.arange(batches.per_device))
            labels = micro.labels.masked_fill((numbers >= count)[:, None], IGNORE)
            found.append(micro._replace(labels=labels))
    return found


def _content(micro: MicroBatch) -> tuple[int, int]:
    """Rows with a label, and labels, which are those of the loss."""
    wanted = micro.labels[:, 1:] != IGNORE
    return int(wanted.any(1).sum()), int(wanted.sum())
