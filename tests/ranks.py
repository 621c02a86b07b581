"""Runs a test body on several ranks: persistent gloo workers, one pool per world size, shared by the whole session.

    results = ranks.run(2, body, *args, **kwargs)    # body: a module-level function; results[rank]: what it returned

Rendezvous is a file, so that pools never fight for a port. A body that raises fails the test with the traceback of
every rank that raised; one that hangs is killed after `timeout` seconds. After either the pool is thrown away and
started anew.
"""

from __future__ import annotations

import atexit
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

from benchmarks.soak import FORK

TIMEOUT = 60.0
START = 60.0  # more for the first body of a pool, before which everything may have to be imported


def _worker(rank: int, world: int, rendezvous: str, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    import warnings

    import torch

    from llm_lowrank.engines import fsdp

    # A mesh makes a process group, and a thread of gloo in it wakes a hundred times a second for as long as the process
    # lives: hundreds of engines, one after the other in the same processes, kept the machine busy with that alone. Here
    # a mesh of one shape is made once.
    fsdp.init_device_mesh = cache(fsdp.init_device_mesh)
    # DeepSpeed calls names that torch renames
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    while (job := pipe.recv()) is not None:
        body, args, kwargs = job
        try:
            answer = (True, body(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        # pickled here: the pipe's own pickler would send every tensor as an open file, and a test soon runs out of them
        pipe.send_bytes(pickle.dumps(answer))


class Pool:
    def __init__(self, world: int) -> None:
        self.world = world
        rendezvous = tempfile.mktemp(prefix="ranks-")
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(target=_worker, args=(rank, world, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, body: Callable[..., Any], args: tuple, kwargs: dict, timeout: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((body, args, kwargs))
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * self.world
        failures = []
        for rank, pipe in enumerate(self.pipes):
            # Once a rank has failed the others may wait for it forever: they get a few seconds to fail too.
            limit = deadline if not failures else min(deadline, time.monotonic() + 3)
            try:
                if not pipe.poll(max(0.0, limit - time.monotonic())):
                    failures.append((rank, f"no answer within {timeout:g} s" if not failures else "still waiting"))
                    continue
                good, results[rank] = pickle.loads(pipe.recv_bytes())
                if not good:
                    failures.append((rank, results[rank]))
            except EOFError:
                failures.append((rank, f"died with exit code {self.processes[rank].exitcode}"))
        if failures:
            raise RanksFailed(
                "\n".join(f"[rank {rank}] {line}" for rank, text in failures for line in str(text).splitlines())
            )
        return results

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def caught(call: Callable[[], object], *kinds: type[Exception]) -> str:
    """What a call raises, told by a body to its test: errors of the other ranks are not lost with the first."""
    try:
        call()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


class RanksFailed(AssertionError):
    """What the ranks raised, every line with its rank."""


_pools: dict[int, Pool] = {}


def run(world: int, body: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
    if world not in _pools:
        _pools[world] = Pool(world)
        timeout += START
    try:
        return _pools[world].run(body, args, kwargs, timeout)
    except BaseException:
        _pools.pop(world).kill()
        raise


@atexit.register
def _stop() -> None:
    for pool in _pools.values():
        pool.kill()
