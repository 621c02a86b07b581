"""Whether torch may take algorithms whose result depends on the order in which a GPU's threads happen to add."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")  # the workspaces with which cuBLAS repeats its results; the first is the faster one


@contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Within this block torch takes deterministic algorithms only, if asked for. Enter it before CUDA starts.

    An operation that has none raises RuntimeError. ValueError if CUDA has started without cuBLAS's setting.
    https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html
    """
    if not deterministic:
        yield
        return
    if os.environ.get(CUBLAS) not in REPEATABLE:
        if torch.cuda.is_initialized():
            raise ValueError(
                f"deterministic: true: CUDA has started in this process without {CUBLAS}; set it to {REPEATABLE[0]} in "
                "the environment"
            )
        os.environ[CUBLAS] = REPEATABLE[0]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
