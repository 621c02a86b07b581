"""What a device can do at most, by its data sheet, and how much memory a process has used on it.

The figures are NVIDIA's data sheets (A100, H100, H200, HGX B200, L40S, L4, A10) and architecture white papers (GeForce
RTX 3090, RTX 4090, RTX A6000). Where a sheet gives tensor-core figures with sparsity, the dense one is half of it. None
of them was measured here. For the network of a node there is no sheet of a GPU: it is that of NVIDIA's DGX with 8 such
GPUs, or one port of 100 Gb/s for cards that come in all sorts of hosts.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

GPUS_PER_NODE = 8
ONE_PORT = 12.5  # GB/s of 100 Gb/s


@dataclass(frozen=True)
class Gpu:
    """The peak figures of one GPU."""

    names: tuple[str, ...]  # as torch.cuda.get_device_name has them
    bfloat16: float  # TFLOP/s of dense products in bfloat16 with sums in float32
    float32: float  # TFLOP/s of products in float32, without TF32
    memory: float  # GB/s of its memory
    link: float  # GB/s to another GPU of its node, in one direction: NVLink, or else 16 lanes of PCIe
    network: float = ONE_PORT  # GB/s of its node to other nodes, in one direction, shared by GPUS_PER_NODE of them

    def peak(self, dtype: str) -> float:
        """Return TFLOP/s of products in a recipe's dtype."""
        return self.float32 if dtype == "float32" else self.bfloat16


GPUS: dict[str, Gpu] = {
    "a100": Gpu(("NVIDIA A100-SXM4-80GB",), 312, 19.5, 2039, 300, 200),
    "a100-40gb": Gpu(("NVIDIA A100-SXM4-40GB",), 312, 19.5, 1555, 300, 200),
    "a100-pcie": Gpu(("NVIDIA A100 80GB PCIe",), 312, 19.5, 1935, 32),
    "h100": Gpu(("NVIDIA H100 80GB HBM3",), 989, 67, 3350, 450, 400),
    "h100-pcie": Gpu(("NVIDIA H100 PCIe",), 756, 51, 2000, 64),
    "h100-nvl": Gpu(("NVIDIA H100 NVL",), 835, 60, 3900, 64),
    "h200": Gpu(("NVIDIA H200",), 989, 67, 4800, 450, 400),
    "b200": Gpu(("NVIDIA B200",), 2250, 75, 7700, 900, 400),
    "l40s": Gpu(("NVIDIA L40S",), 362, 91.6, 864, 32),
    "l4": Gpu(("NVIDIA L4",), 121, 30.3, 300, 32),
    "a10": Gpu(("NVIDIA A10",), 125, 31.2, 600, 32),
    "a6000": Gpu(("NVIDIA RTX A6000",), 154.8, 38.7, 768, 32),
    "rtx4090": Gpu(("NVIDIA GeForce RTX 4090",), 165.2, 82.6, 1008, 32),
    "rtx3090": Gpu(("NVIDIA GeForce RTX 3090",), 71, 35.6, 936, 32),
}

if TYPE_CHECKING:
    GpuName = str  # a type checker knows no Literal that is computed
else:
    GpuName = Literal["none", *GPUS]


def find(name: str) -> Gpu | None:
    """Return the GPU that torch.cuda.get_device_name calls so; None for one that is not in the table.

    The whole name must agree: a slice of a GPU (MIG) and a variant with another clock have other peaks.
    """
    return next((gpu for gpu in GPUS.values() if name in gpu.names), None)


def peak(device: torch.device, dtype: str) -> float | None:
    """Return the TFLOP/s of products in a recipe's dtype on this device; None for a CPU and for unknown GPUs."""
    gpu = find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.peak(dtype)


def peak_memory(device: torch.device) -> tuple[int, int]:
    """Return the most bytes that this process has used so far, and the most that it has reserved for them.

    On CUDA: what torch's allocator has given out and has taken from the device; the driver's context and other
    libraries come on top. On a CPU: the peak resident set of the process, twice. No wait for the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    resident = _peak_resident()
    return resident, resident


def _peak_resident() -> int:
    # Linux hands the peak of getrusage down to a program that another one started, so that a small program which a
    # large one starts begins with the large one's peak; the peak of /proc is that of this program alone.
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
