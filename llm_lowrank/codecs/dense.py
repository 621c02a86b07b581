"""W stored as it is, in float32, bfloat16 or float16 (float64 for tests)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """parts = {"weight": W rounded once to `dtype`}; the name is the one in the checkpoint.

    Elements are independent of one another, so a flat run of W is encoded and decoded like a whole one.
    """

    dtype: torch.dtype = torch.float32

    @property
    def writable(self) -> bool:
        return True

    @property
    def holds_small_updates(self) -> bool:
        return torch.finfo(self.dtype).bits >= 32

    def layout(self, n: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"weight": (n, self.dtype)}

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        return {"weight": w.to(self.dtype).contiguous()}

    def decode(self, parts: dict[str, Tensor], n: int) -> Tensor:
        return parts["weight"]
