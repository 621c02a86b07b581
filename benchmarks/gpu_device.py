"""The device of benchmarks/gpu.py: its name, and seconds and bytes on it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
CPU = torch.device("cpu")


def card_name() -> str:
    return torch.cuda.get_device_name() if CUDA else "cpu"


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object]) -> float:
    """The seconds between two events on the device, or on the host's clock."""
    if not CUDA:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1000


def median_of(call: Callable[[], object], warm: int = 3, rounds: int = 10) -> float:
    """The median seconds of a call."""
    for _ in range(warm):
        call()
    return statistics.median(seconds_of(call) for _ in range(rounds))


_left = 0  # bytes on the device that `start` found


def start() -> float:
    """Free what nothing refers to, and let peaks count from what is held now, which earlier work left; return its GB.

    DeepSpeed, for one, keeps its buffers until a process ends.
    """
    global _left
    gc.collect()  # models hang together in circles
    if CUDA:
        torch.cuda.empty_cache()
    _left = reset_peak()
    return _left / 1e9


def reset_peak() -> int:
    """Let the peak of memory start from what is held now; return that."""
    if not CUDA:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(above: int | None = None) -> dict[str, float]:
    """The peak of the device's memory above so many bytes, or above what `start` found; no figure on the CPU."""
    return {"peak GB": (torch.cuda.max_memory_allocated() - (_left if above is None else above)) / 1e9} if CUDA else {}
