"""The batches of a step, made in a thread while the step before it runs. They are the batches that they would be
without the thread: it makes one step after another, and none that the run does not make.
"""

from contextlib import nullcontext
from queue import SimpleQueue
from threading import Thread

import torch

from llm_lowrank.data.batches import Batches, MicroBatch, StreamBatches

NAME = "batches made ahead"  # of the thread
PATIENCE = 10.0  # seconds that a failed run waits for its thread, which may wait for a network


class Ahead:
    """The batches of steps up to `stop`, one step ahead. Enter it before the first step; leaving it ends the thread.

    device: where the batches are used; for an accelerator they are put into pinned memory.
    """

    def __init__(self, batches: Batches | StreamBatches, stop: int, device: torch.device) -> None:
        self.batches, self.stop, self.device = batches, stop, device
        self.asked: SimpleQueue[int | None] = SimpleQueue()  # steps to make; None: no more
        self.made: SimpleQueue[list[MicroBatch] | BaseException] = SimpleQueue()
        self.coming: int | None = None  # the step that was asked for last
        # a daemon, so that a read that hangs does not keep a failed run from its end
        self.thread = Thread(target=self._make, name=NAME, daemon=True)

    def __enter__(self) -> "Ahead":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.asked.put(None)
        self.thread.join(PATIENCE)

    def step(self, t: int) -> list[MicroBatch]:
        """Return the micro-batches of step t, and let the thread make those of the next step.

        The first step may be any; each other one follows the step before. An error in the thread is raised here, at the
        step that it belongs to.
        """
        if self.coming is None:
            self._ask(t)
        assert self.coming == t, (self.coming, t)
        micros = self.made.get()
        if isinstance(micros, BaseException):
            raise micros
        if t + 1 < self.stop:
            self._ask(t + 1)
        return micros

    def _ask(self, t: int) -> None:
        self.coming = t
        self.asked.put(t)

    def _make(self) -> None:
        """Make what is asked for, in the thread."""
        while (t := self.asked.get()) is not None:
            try:
                micros = self.batches.step(t)
                if self.device.type != "cpu":
                    # a thread begins on device 0
                    with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                        micros = [micro.pinned() for micro in micros]
                self.made.put(micros)
            except BaseException as error:
                self.made.put(error)
