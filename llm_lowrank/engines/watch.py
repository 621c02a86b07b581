"""A run on several ranks that stands still ends in bounded time, and says which rank it waited for, and in what.

A collective waits half an hour for a rank that does not come. Then its library ends the process (gloo by SIGABRT), and
no message names the rank. Here every rank notes its signs of life (its phase, the collectives that it entered) and
reports them to the others through the store that the launcher gave. After `timeout` seconds without a sign of its own,
a rank reads the reports of the others, prints who is behind or does not answer, and ends its process. Threads do this,
because the main thread may be in a call that never returns.
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
    """What a rank reports of itself."""

    host: str
    phase: str
    calls: int  # collectives and micro-batches that it came to; equal on all ranks at the same place
    reports: int  # how many it has sent, with this one: a rank that is stopped sends no more


class Watch:
    """The signs of life of this rank, and the two threads that report and judge them."""

    def __init__(self, rank: int, world: int, timeout: float, store: dist.Store) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self.interval = min(ANSWER, timeout / 8)
        self.phase, self.calls, self.reports = "start", 0, 0
        self.last = time.monotonic()
        self.over = threading.Event()
        self.store = dist.PrefixStore("llm_lowrank/watch", another(store))
        self.store.set_timeout(timedelta(seconds=self.interval))
        self.threads = [
            threading.Thread(target=work, name=f"watch{work.__name__}", daemon=True)
            for work in (self._report, self._judge)
        ]
        for thread in self.threads:
            thread.start()

    def at(self, phase: str) -> None:
        """Note that the run has come to this phase."""
        self.phase = phase
        self.beat()

    def beat(self) -> None:
        """Note a sign of life."""
        self.last = time.monotonic()

    def call(self) -> None:
        """Note that this rank has come to something that all ranks come to."""
        self.calls += 1
        self.beat()

    def close(self) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(self.interval)

    # ---- what the threads do

    def _report(self) -> None:
        while True:
            self.reports += 1
            life = Life(socket.gethostname(), self.phase, self.calls, self.reports)
            with contextlib.suppress(RuntimeError):  # the next try may reach the store; the judge reports a lost one
                self.store.set(str(self.rank), json.dumps(asdict(life)))
            if self.over.wait(self.interval):
                return

    def _judge(self) -> None:
        while not self.over.wait(min(1.0, self.interval)):
            if time.monotonic() - self.last > self.timeout:
                message = self._verdict()
                if self.over.is_set() or time.monotonic() - self.last < self.timeout:  # the run went on meanwhile
                    continue
                if message is not None:
                    print(f"error: {message}", file=sys.stderr, flush=True)
                os._exit(LOST)

    def _verdict(self) -> str | None:
        """Return what is to be printed here; None where another rank prints it."""
        # two readings, far enough apart that every rank that lives has reported in between
        first = within(ANSWER, self._everyone)
        answering = first is not None and not self.over.wait(2 * self.interval + 1)
        second = within(ANSWER, self._everyone) if answering else None
        rank = f"rank {self.rank} on {socket.gethostname()}"
        here = f"{rank}: nothing went on for {self.timeout:g} s in {self.phase}, {where()}"

        # without the store nothing is known of the other ranks
        if first is None or second is None:
            meeting = os.environ.get("MASTER_ADDR", "the first host")
            return f"{here}; {meeting}, where the ranks meet, does not answer: the host or the link to it is down"

        # a rank without a new report is silent, one that came to fewer collectives than the others is behind, and one
        # that never reported is lost
        silent = [rank for rank, life in second.items() if rank in first and life.reports == first[rank].reports]
        latest = max(life.calls for life in second.values())
        behind = [rank for rank, life in second.items() if life.calls < latest and rank not in silent]
        lost = [rank for rank in range(self.world) if rank not in second]

        # The first rank that is fine prints for all, so that a log holds the message once. A rank that is behind prints
        # too, for it alone knows the line that it is in.
        speaker = min((rank for rank in second if rank not in (*silent, *behind)), default=self.rank)
        if self.rank not in (speaker, *behind):
            return None

        why = "does not answer: it is stopped, or its host or link is down"
        reasons = [f"rank {rank} {why}" for rank in lost]
        reasons += [
            f"rank {rank} on {second[rank].host}, last heard of in {second[rank].phase}, {why}" for rank in silent
        ]
        reasons += [
            f"rank {rank} on {second[rank].host}, in {second[rank].phase}, is behind the others" for rank in behind
        ]
        reasons = reasons or ["all ranks answer and are at the same place: a link between two of them may be down"]
        return f"{here}; {'; '.join(reasons)}. If it only takes long, raise --ddp_timeout"

    def _everyone(self) -> dict[int, Life]:
        """Return what every rank reported last."""
        keys = [str(rank) for rank in range(self.world)]
        known = [key for key in keys if self.store.check([key])]
        return {int(key): Life(**json.loads(self.store.get(key))) for key in known}


def another(store: dist.Store) -> dist.Store:
    """Return a second connection to the store, for the first one may be waiting.

    RuntimeError after a few times ANSWER if the store's host is gone.
    """
    before = store.timeout  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=ANSWER))  # a new connection is tried for as long as the old one would wait
    try:
        return store.clone()  # type: ignore[attr-defined]
    finally:
        store.set_timeout(before)


def within(seconds: float, ask: Callable[[], dict[int, Life]]) -> dict[int, Life] | None:
    """Return the answer, or None if it fails or does not come: a call over a link that is cut never returns."""
    answers: list[dict[int, Life]] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None


def where() -> str:
    """Return the line of this package that the main thread is in."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    while frame is not None and not frame.f_code.co_filename.startswith(package):
        frame = frame.f_back
    if frame is None:
        return "outside of llm_lowrank"
    file = os.path.relpath(frame.f_code.co_filename, os.path.dirname(package))
    return f"{file}:{frame.f_lineno} ({frame.f_code.co_name})"
