"""What a codec owes: W (m, n) to parts and back, rows independent of one another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """decode(encode(W)) ~ W, and bit for bit  encode(W)[a:b] = encode(W[a:b])  and  decode(parts)[a:b] =
    decode(parts[a:b]).

    Blocks never cross a row, so a shard of rows decodes alone and every part has W's rows as its dim 0.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Of a decoded W."""
        ...

    @property
    def writable(self) -> bool:
        """Whether a stored W may be changed. A coded one may not: encoding again rounds most of a small update away."""
        ...

    @property
    def holds_small_updates(self) -> bool:
        """Whether an update of a thousandth of W survives being stored."""
        ...

    def layout(self, n: int) -> dict[str, tuple[int, torch.dtype]]:
        """part -> (elements per row of W, stored dtype): enough to allocate the parts of a W that is not there yet."""
        ...

    def encode(self, w: Tensor) -> dict[str, Tensor]: ...  # (m, n), any float dtype -> parts (m, width), contiguous
    def decode(self, parts: dict[str, Tensor], n: int) -> Tensor: ...  # parts -> (m, n) in self.dtype


class Coded:
    """What the codecs that round W have in common: a stored W is final."""

    @property
    def writable(self) -> bool:
        return False

    @property
    def holds_small_updates(self) -> bool:
        return False


def empty_parts(codec: Codec, m: int, n: int, device: torch.device | str) -> dict[str, Tensor]:
    """Room for the parts of m rows of a W with n columns."""
    return {name: torch.empty(m, width, dtype=dtype, device=device) for name, (width, dtype) in codec.layout(n).items()}


def row_slices(x: Tensor) -> Iterator[slice]:
    """The rows of x (m, n), a few at a time, so that no copy of all of x is made on the way to another type."""
    elements = 2**16 if x.device.type == "cpu" else 2**22  # what stays in a cache; what fills an accelerator
    step = max(1, elements // x.shape[1])
    return (slice(start, start + step) for start in range(0, x.shape[0], step))


def absmax(x: Tensor) -> Tensor:
    """max |x| over the last dimension: (..., n) -> (..., 1).

    The one place where a codec meets every element, so it refuses here.
    """
    largest = x.abs().amax(-1, keepdim=True)
    if not largest.isfinite().all():
        raise ValueError(
            "W holds NaN, infinity or a value beyond float32, and no scale can hold that; use codec: dense"
        )
    return largest


def to_bytes(x: Tensor) -> Tensor:
    """float32 (m, k) -> uint8 (m, 4k): sharding engines cast floating parameters to the type of the model, and leave
    bytes alone.
    """
    return x.contiguous().view(torch.uint8)


def align(part: Tensor) -> Tensor:
    """Contiguous and at a multiple of 4 bytes; a view into an engine's flat buffer may be neither, and is copied then."""
    return (
        part.clone(memory_format=torch.contiguous_format)
        if part.data_ptr() % 4 or part.storage_offset() % 4
        else part.contiguous()
    )


def from_bytes(part: Tensor) -> Tensor:
    """uint8 (m, 4k) -> float32 (m, k)."""
    return align(part).view(torch.float32)
