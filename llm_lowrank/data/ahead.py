"""The batches of a step, made in a thread while the step before it runs. They are the batches that they would be
without the thread: it asks for the steps one after another, and never for one that the run does not make.
"""

from threading import Thread
from types import TracebackType

import torch

from llm_lowrank.data.batches import Batches, MicroBatch, StreamBatches

PATIENCE = 10.0  # seconds that a failed run waits for its thread, which may wait for a network


class Ahead:
    """The batches of the steps before `stop`, one step ahead. Entered and left with the run, which has no thread then.

    device: where the batches are used; for an accelerator they are put into pinned memory.
    """

    def __init__(self, batches: Batches | StreamBatches, stop: int, device: torch.device) -> None:
        self.batches, self.stop, self.device = batches, stop, device
        self.coming: _Making | None = None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.coming is not None:
            self.coming.join(PATIENCE)
            self.coming = None

    def step(self, t: int) -> list[MicroBatch]:
        """Return the micro-batches of step t and let the thread make those of the next step.

        An error of the thread is raised here, at the step that it belongs to.
        """
        making = self.coming or _Making(self.batches, t, self.device)
        assert making.t == t, (making.t, t)
        micros = making.result()
        self.coming = _Making(self.batches, t + 1, self.device) if t + 1 < self.stop else None
        return micros


class _Making(Thread):
    """A thread that makes the batches of one step."""

    def __init__(self, batches: Batches | StreamBatches, t: int, device: torch.device) -> None:
        # a daemon, so that a read that hangs does not keep a failed run from its end
        super().__init__(name=f"batches of step {t}", daemon=True)
        self.batches, self.t, self.device = batches, t, device
        self.micros: list[MicroBatch] = []
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.micros = self.batches.step(self.t)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # each thread begins on device 0
            if self.device.type != "cpu":
                self.micros = [micro.pinned() for micro in self.micros]
        except BaseException as error:
            self.error = error

    def result(self) -> list[MicroBatch]:
        self.join()
        if self.error is not None:
            raise self.error
        return self.micros
