"""A rank that is done ends. Its own processes, since the pools of tests/ranks.py must keep their groups."""

from __future__ import annotations

import multiprocessing as mp
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llm_lowrank.methods.lora import LoRA
from tests import tiny

# With DDP's reducer left alive one of the first five runs hung; a second run under ZeRO met the group of the first one.
RUNS = {"plain": 20, "fsdp": 20, "zero2": 2, "zero3": 2}


def _train_and_close(rank: int, rendezvous: str, engine: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    for run in range(RUNS[engine]):
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}-{run}", rank=rank, world_size=2)
        trainee = tiny.Trainee(LoRA(rank=4), engine)
        trainee.step(0)
        trainee.engine.close()
        del trainee  # the wrapped model outlives the process group, as in a run


@pytest.mark.parametrize(
    "engine", ["plain", "zero3", *(pytest.param(name, marks=pytest.mark.wide) for name in ("fsdp", "zero2"))]
)
def test_ranks_end_after_close_though_the_wrapped_model_is_still_there(tmp_path: Path, engine: str):
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_train_and_close, args=(rank, str(tmp_path / "meet"), engine)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]  # None: still there
    for process in processes:
        process.kill()
    assert codes == [0, 0]
