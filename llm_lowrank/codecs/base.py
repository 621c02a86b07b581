"""What a codec owes: W (m, n) to parts and back, rows independent of one another."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec(ABC):
    """A way to store W: decode(encode(W)) ~ W, and bit for bit

        encode(W)[a:b] = encode(W[a:b])    decode(parts)[a:b] = decode(parts[a:b])

    Blocks never cross a row, so that a shard of rows can be decoded alone and every part has W's rows as its dim 0.
    """

    name: ClassVar[str]  # in a recipe and in the files of a run
    packages: ClassVar[tuple[str, ...]] = ()  # what must be installed beside torch

    dtype: torch.dtype = torch.float32  # of a decoded W

    @property
    @abstractmethod
    def writable(self) -> bool:
        """Whether a stored W may be changed.

        A quantized W may not: encoding again rounds most of a small update away.
        """

    @property
    @abstractmethod
    def holds_small_updates(self) -> bool:
        """Whether an update of a thousandth of W survives being stored."""

    @abstractmethod
    def layout(self, n: int) -> dict[str, tuple[int, torch.dtype]]:
        """Return part -> (elements per row of W, stored dtype): enough to allocate the parts before W is read."""

    @abstractmethod
    def encode(self, w: Tensor) -> dict[str, Tensor]:
        """Return the parts of W, each (m, width) and contiguous. W (m, n) may have any floating dtype."""

    @abstractmethod
    def decode(self, parts: dict[str, Tensor], n: int) -> Tensor:
        """Return W (m, n) in `dtype`."""

    def decode_fused(self, parts: dict[str, Tensor], n: int) -> Tensor:
        """Return the same, bit for bit, by a kernel that torch.compile makes if that is faster."""
        return self.decode(parts, n)

    def multiplies(self, n: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Return whether `multiply` can be called: whether there is a kernel for x (t, n) of this type and device."""
        return False

    def multiply(self, x: Tensor, parts: dict[str, Tensor], n: int, bias: Tensor | None) -> Tensor:
        """Return x decode(parts)^T + b, up to the rounding of the sum, without a decoded W.

        x (..., n), W (m, n), bias (m,) -> (..., m)
        """
        raise NotImplementedError(f"{self.name} has no kernel for products")

    @classmethod
    def missing(cls) -> list[str]:
        """Return the packages that this codec needs and that are not installed."""
        return [package for package in cls.packages if importlib.util.find_spec(package) is None]


class Quantized(Codec):
    """What the codecs that round W have in common: a stored W is final."""

    @property
    def writable(self) -> bool:
        return False

    @property
    def holds_small_updates(self) -> bool:
        return False


def empty_parts(codec: Codec, m: int, n: int, device: torch.device | str) -> dict[str, Tensor]:
    """Allocate the parts of m rows of a W with n columns."""
    return {name: torch.empty(m, width, dtype=dtype, device=device) for name, (width, dtype) in codec.layout(n).items()}


def row_slices(x: Tensor) -> Iterator[slice]:
    """Yield the rows of x (m, n), a few at a time, so that no copy of all of x is made on the way to another type."""
    # 2^16 elements stay in the cache of a CPU; an accelerator is done with 2^26 in the time of a few launches
    elements = 2**16 if x.device.type == "cpu" else 2**26
    step = max(1, elements // x.shape[1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def absmax(x: Tensor) -> Tensor:
    """Return max |x| over the last dimension: (..., n) -> (..., 1).

    This is the one place where a codec reads every element, so a W that no scale can hold is refused here: ValueError.
    """
    largest = x.abs().amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError(
            "W holds NaN, infinity or a value beyond float32, and no scale can hold that; use codec: dense"
        )
    return largest


def to_bytes(x: Tensor) -> Tensor:
    """Return the bytes of a float32 tensor: (m, k) -> uint8 (m, 4k).

    Sharding engines cast floating parameters to the type of the model and leave bytes alone.
    """
    return x.contiguous().view(torch.uint8)


def from_bytes(part: Tensor) -> Tensor:
    """Return the float32 tensor of these bytes: uint8 (m, 4k) -> (m, k)."""
    return align(part).view(torch.float32)


def align(part: Tensor) -> Tensor:
    """Return the part contiguous and at a multiple of 4 bytes.

    A view into an engine's flat buffer may be neither; then this is a copy.
    """
    if part.data_ptr() % 4 or part.storage_offset() % 4:
        return part.clone(memory_format=torch.contiguous_format)
    return part.contiguous()
