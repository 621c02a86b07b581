"""A run that is asked to stop: SIGTERM and SIGUSR1, agreed on by all ranks."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch

from llm_lowrank.engines.base import Engine


class Preempted(Exception):
    """A signal asked the run to stop; what it had done is in a checkpoint."""


class Signals:
    """While entered, let SIGTERM and SIGUSR1 ask the run to stop at its next step boundary.

    A second signal changes nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self.handlers_before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in the main thread only
            self.handlers_before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.handlers_before.items():
            signal.signal(kind, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def anywhere(self, engine: Engine, *, saving: bool = False) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether any rank still writes a checkpoint. Collective."""
        if engine.world == 1:
            return self.asked, saving
        flags = torch.tensor([float(self.asked), float(saving)])  # on the host, which need not wait for the device
        asked, writing = engine.sum(flags).tolist()
        return bool(asked), bool(writing)

    def check(self, engine: Engine) -> None:
        """Raise Preempted if any rank was asked before the first step: there is nothing new to save. Collective."""
        if self.anywhere(engine)[0]:
            raise Preempted(
                "stopped by a signal before the first step of this start; resume with --resume_from_checkpoint auto"
            )
