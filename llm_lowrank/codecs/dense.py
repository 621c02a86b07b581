"""W stored as it is, in float32, bfloat16 or float16 (float64 for tests)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """parts = {"weight": W rounded once to `dtype`}; the name is the one in the checkpoint."""

    dtype: torch.dtype = torch.float32

    @property
    def holds_small_updates(self) -> bool:
        return torch.finfo(self.dtype).bits >= 32

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        return {"weight": w.to(self.dtype)}

    def decode(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["weight"]
