"""What several files of tests share: the small run of benchmarks/soak.py, made once in a session."""

from __future__ import annotations

import gc
import os
import re
import sys
from pathlib import Path

# One thread a rank, before torch is imported, here and in every process that a test starts: the launchers give each
# rank one thread or all of them, and bitwise comparisons need sums in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ranks of gloo and tensors of the host: without -m gpu no test knows of a GPU, so that a machine that has some runs
# what every other machine runs. A worker of xdist has the environment of the process that read the command line.
if "PYTEST_XDIST_WORKER" not in os.environ and not re.search(r"-m[ =]?['\"]?gpu", " ".join(sys.argv)):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import hypothesis
import pytest

from benchmarks import soak

hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("tests")
soak.FORK.set_forkserver_preload(["tests.preloaded"])

# These have few tests and take minutes, some of them by waiting: two workers (-n 2 --dist loadfile) begin with them, so
# that neither waits for the other one's last file.
FIRST = (
    *("test_laws.py", "test_slurm.py", "test_hosts.py", "test_faults.py", "test_launch.py"),
    *("test_notebook.py", "test_compiling.py", "test_whole.py", "test_trainer.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False  # as they are collected, not those with the most tests first


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish() -> None:
    """Leave what the collection made out of every later collection of garbage: 0.6 s each, and a run makes several."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with a small model, its tokenizer and data."""
    folder = tmp_path_factory.mktemp("place")
    soak.place(folder)
    return folder


@pytest.fixture(scope="session")
def whole(place) -> tuple[bytes, list[tuple[int, float]]]:
    """What a run on two ranks of one host comes to that nothing happened to: ZeRO-3."""
    life = soak.live(soak.arguments_of(place, place / "whole", "deepspeed"))
    assert life.codes == [0, 0], life.said[-3000:]
    return soak.result(place / "whole")
