"""A run on several ranks that stands still ends in bounded time, and says which rank it waited for, and in what.

A collective waits for the rank that does not come: for half an hour, and then its library ends the process, gloo by
SIGABRT, without a word that names the rank. Here every rank notes its signs of life (its phase, the collectives that it
entered), tells them to the others through the store that the launcher gave, and, when there was none for `timeout`
seconds, reads those of the others, says who is behind or does not answer, and ends the process. Threads do it: the main
one may be in a call that never returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

LOST = 69  # exit code, EX_UNAVAILABLE of sysexits.h: a rank did not come to where the others waited
ANSWER = 10.0  # seconds in which the store, and a rank that lives, answer


@dataclass(frozen=True)
class Life:
    """What a rank tells of itself."""

    host: str
    phase: str
    calls: int  # collectives and micro-batches that it came to; equal on all ranks at the same place
    told: int  # how often it told: a rank that is stopped tells no more


class Watch:
    def __init__(self, rank: int, world: int, timeout: float, store: dist.Store) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.interval = min(ANSWER, timeout / 8)
        self.phase, self.calls, self.told = "start", 0, 0
        self.last = time.monotonic()
        self.over = threading.Event()
        self.store = dist.PrefixStore("llm_lowrank/watch", another(store))
        self.store.set_timeout(timedelta(seconds=self.interval))
        self.threads = [
            threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True)
            for work in (self._tell, self._judge)
        ]
        for thread in self.threads:
            thread.start()

    def at(self, phase: str) -> None:
        """The run has come to this."""
        self.phase = phase
        self.beat()

    def beat(self) -> None:
        """It goes on."""
        self.last = time.monotonic()

    def call(self) -> None:
        """It goes on, to where all ranks come."""
        self.calls += 1
        self.beat()

    def close(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(self.interval)

    # ---- what the threads do

    def _tell(self) -> None:
        while True:
            self.told += 1
            life = Life(socket.gethostname(), self.phase, self.calls, self.told)
            with contextlib.suppress(RuntimeError):  # the next try may reach the store; the judge reports a lost one
                self.store.set(str(self.rank), json.dumps(asdict(life)))
            if self.over.wait(self.interval):
                return

    def _judge(self) -> None:
        while not self.over.wait(min(1.0, self.interval)):
            if time.monotonic() - self.last > self.timeout:
                message = self._verdict()
                if self.over.is_set() or time.monotonic() - self.last < self.timeout:  # it went on meanwhile
                    continue
                if message is not None:
                    print(f"error: {message}", file=sys.stderr, flush=True)
                os._exit(LOST)

    def _verdict(self) -> str | None:
        """What is to be said here; None where another rank says it."""
        first = within(ANSWER, self._everyone)
        answering = first is not None and not self.over.wait(2 * self.interval + 1)
        second = within(ANSWER, self._everyone) if answering else None
        rank = f"rank {self.rank} on {socket.gethostname()}"
        here = f"{rank}: nothing went on for {self.timeout:g} s in {self.phase}, {where()}"
        if first is None or second is None:
            meeting = os.environ.get("MASTER_ADDR", "the first host")
            return f"{here}; {meeting}, where the ranks meet, does not answer: the host or the link to it is down"
        silent = [rank for rank, life in second.items() if rank in first and life.told == first[rank].told]
        latest = max(life.calls for life in second.values())
        behind = [rank for rank, life in second.items() if life.calls < latest and rank not in silent]
        lost = [rank for rank in range(self.world) if rank not in second]
        speaker = min((rank for rank in second if rank not in (*silent, *behind)), default=self.rank)
        if self.rank not in (speaker, *behind):
            return None
        why = "does not answer: it is stopped, or its host or link is down"
        said = [f"rank {rank} {why}" for rank in lost]
        said += [f"rank {rank} on {second[rank].host}, last heard of in {second[rank].phase}, {why}" for rank in silent]
        said += [
            f"rank {rank} on {second[rank].host}, in {second[rank].phase}, is behind the others" for rank in behind
        ]
        said = said or ["all ranks answer and are at the same place: a link between two of them may be down"]
        return f"{here}; {'; '.join(said)}. If it only takes long, raise --ddp_timeout"

    def _everyone(self) -> dict[int, Life]:
        """What every rank told last."""
        keys = [str(rank) for rank in range(self.world)]
        known = [key for key in keys if self.store.check([key])]
        return {int(key): Life(**json.loads(self.store.get(key))) for key in known}


def another(store: dist.Store) -> dist.Store:
    """A second connection to it, for the first one may be waiting.

    RuntimeError after a few times ANSWER if its host is gone.
    """
    before = store.timeout  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=ANSWER))  # a new connection is tried for as long as the old one would wait
    try:
        return store.clone()  # type: ignore[attr-defined]
    finally:
        store.set_timeout(before)


def within(seconds: float, ask: Callable[[], dict[int, Life]]) -> dict[int, Life] | None:
    """The answer, or None if it fails or does not come: a connection over a link that is cut does not return."""
    answers: list[dict[int, Life]] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def where() -> str:
    """The line of this package that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    if frame is None:
        return "outside of llm_lowrank"
    file = os.path.relpath(frame.f_code.co_filename, os.path.dirname(package))
    return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"
