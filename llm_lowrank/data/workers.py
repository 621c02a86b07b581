"""Rows become tokens in several processes. The result is that of one process: the same examples in the same order.

A worker is a fresh interpreter, started with a command of its own. Nothing of the run's process is forked, so that its
threads, its CUDA context and its process group stay out of the worker, and a script that starts a run is not run again.
The rows are dealt out in turn, one batch to a worker at a time, and taken back in the same order. A worker that has no
run any more, or that the run has no use for, ends.
"""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from math import ceil
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pyarrow as pa

from llm_lowrank.data.formats import Row
from llm_lowrank.data.rows import FEATURES, encode_rows

BATCH = 250  # rows that are encoded and written at a time
# A signal to all processes of a job is for the run, which stops its workers.
COMMAND = """
import signal, sys
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
from llm_lowrank.data.workers import serve
serve(int(sys.argv[1]))
"""


def encode_all(rows: Iterator[Row], count: int, options: dict[str, Any], workers: int) -> Iterator[pa.RecordBatch]:
    """Yield `count` rows in batches of FEATURES, encoded by as many processes as there is work for.

    options: the arguments of encode_row beside the row. ChildProcessError if a worker ends.
    """
    batches = iter(lambda: list(islice(rows, BATCH)), [])
    workers = min(workers, ceil(count / BATCH))
    if workers == 1:
        yield from (encode_rows(batch, options) for batch in batches)
        return
    team: list[Worker] = []
    try:
        for _ in range(workers):  # they start side by side
            team.append(Worker())
        for worker in team:
            worker.send(options)
        yield from _dealt_out(batches, team)
    finally:
        for worker in team:
            worker.close()


def _dealt_out(batches: Iterator[list[Row]], team: Sequence["Worker"]) -> Iterator[pa.RecordBatch]:
    """Yield the encoded batches in their order. No worker has more than one batch, and rows are read meanwhile."""
    idle, busy = list(team), deque[Worker]()
    for batch in batches:
        done = None
        if not idle:
            idle.append(busy.popleft())
            done = idle[0].receive()
        busy.append(idle.pop())
        busy[-1].send(batch)
        if done is not None:
            yield done
    for worker in busy:
        yield worker.receive()


class Worker:
    """A process that encodes batches of rows."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        # in a group of its own: Ctrl-C in a terminal is for the run
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", COMMAND, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            process_group=0,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
        theirs.close()  # only the worker has it now, so that its end is seen here

    def send(self, message: Any) -> None:
        try:
            self.pipe.send(message)
        except ConnectionError:
            raise self._ended() from None
        except Exception as error:  # each class has its own, and only the tokenizer is of a class that is not known
            raise ValueError(
                f"data.workers: this tokenizer cannot be given to another process ({error}); set data.workers 1"
            ) from error

    def receive(self) -> pa.RecordBatch:
        """Return the encoded batch. An error in encoding a row is raised here as it was raised there."""
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise self._ended() from None
        if isinstance(answer, Exception):
            raise answer
        return pa.ipc.read_record_batch(pa.py_buffer(answer), FEATURES.arrow_schema)

    def close(self) -> None:
        """End the process, whatever it does."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()

    def _ended(self) -> ChildProcessError:
        code = self.process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        remedy = "it may have run out of memory: set data.workers lower" if code < 0 else "its own message stands above"
        return ChildProcessError(f"data.workers: a process that turns rows into tokens {how}; {remedy}")


def serve(handle: int) -> None:
    """Answer every batch of rows that comes through a pipe with its examples, until the run closes the pipe."""
    with Connection(handle) as pipe:
        try:
            options = pipe.recv()
            while True:
                pipe.send(_answer(pipe.recv(), options))
        except (EOFError, ConnectionError):
            return


def _answer(batch: list[Row], options: dict[str, Any]) -> bytes | Exception:
    try:
        return encode_rows(batch, options).serialize().to_pybytes()
    except Exception as error:
        return error
