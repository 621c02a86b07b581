"""W stored as it is, in float32, bfloat16 or float16 (float64 for tests)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llm_lowrank.codecs.base import Codec


@dataclass(frozen=True)
class Dense(Codec):
    """parts = {"weight": W rounded once to `dtype`}; the name of the part is the one in the checkpoint.

    Elements are independent of one another, so a span of the flattened W is encoded and decoded as the whole W is.
    """

    name: ClassVar[str] = "dense"

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
