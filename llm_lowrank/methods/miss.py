"""MiSS: one trained shard is added to every block of columns of W.  https://arxiv.org/abs/2409.15371

    W'[:, j] = W[:, j] + D[:, j mod r]          D (m, r) = 0 at the start and trained
    y = W x + D (the sum of x over its blocks of r entries)

This is LoRA with a fixed A = [I_r I_r ... I_r], cut to n columns, with B = D and s = 1. An earlier version of the paper
calls it Bone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairAdapter, PairSettings
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.pairs import Pairs


class ShardAdapter(PairAdapter):
    """A PairAdapter whose A sums x over its blocks of r entries; B, the shard, is trained."""

    trains = "B"

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: row i of A has ones at the columns j with j mod r = i, and B is zero."""
        assert pairs is None, "MiSS takes no pairs out of W"
        m, n = self.shape
        with torch.device("cpu"):
            blocks = torch.eye(self.rank).repeat(1, -(-n // self.rank))
            return {"A": blocks[:, :n].contiguous(), "B": torch.zeros(m, self.rank)}


@Method.register_subclass("miss")
@dataclass(frozen=True)
class MiSS(LoRA):
    """Train one shard of rank columns per module, which is added to every block of columns of W."""

    rank: int = 64
    """Columns of a module's shard: the rank of its change."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        scaled = {"alpha": self.alpha is not None, "alpha_pattern": self.alpha_pattern, "use_rslora": self.use_rslora}
        return complaints + [
            f"method.{setting} cannot be used with miss: the shard is added to W without a scale; remove it"
            for setting, given in scaled.items()
            if given
        ]

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return ShardAdapter(name, linear, codec, settings)
