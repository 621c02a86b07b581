"""What a codec owes: W (m, n) to parts and back, rows independent of one another."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Codec(Protocol):
    """Blocks never cross a row, so a shard of rows decodes alone and every part has W's rows as its dim 0."""

    @property
    def holds_small_updates(self) -> bool:
        """Whether an update of a thousandth of W survives being stored."""
        ...

    def encode(self, w: Tensor) -> dict[str, Tensor]: ...  # (m, n) -> parts, dim 0 = rows
    def decode(self, parts: dict[str, Tensor]) -> Tensor: ...  # parts -> (m, n)
