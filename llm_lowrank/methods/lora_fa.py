"""LoRA-FA: A is frozen at its random start, and B alone is trained.  https://arxiv.org/abs/2308.03303

    y = W x + s B A x          A (r, n) drawn once, B (m, r) = 0 at the start and trained

Of the input x the adapter keeps x A^T alone for the backward, r numbers for a token in the place of n.

The paper's second version corrects the gradient of B, g_B (A A^T)^-1 / s^2, so that the step of s B A is as near to a
step of W as A allows. If the rows of A are orthogonal and of one length, the correction multiplies g_B by a number,
which Adam does not see. With `a_init: orthonormal` no correction is needed, and there is none here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairAdapter, PairSettings, generator
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.pissa import ROW_LENGTH
from llm_lowrank.numerics.pairs import Pairs

Start = Literal["kaiming", "orthonormal"]


class FrozenA(PairAdapter):
    """A PairAdapter of which B alone is trained."""

    trains = "B"

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings, *, a_init: Start) -> None:
        super().__init__(name, linear, codec, settings)
        self.a_init = a_init

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: B is zero, so that the function starts as it was."""
        values = super().initial(pairs)
        if self.a_init == "kaiming":
            return values
        n = self.shape[1]
        with torch.device("cpu"):
            drawn = torch.randn(n, self.rank, generator=generator(self.seed, self.name), dtype=torch.float64)
            return values | {"A": (torch.linalg.qr(drawn)[0].T * ROW_LENGTH).float().contiguous()}


@Method.register_subclass("lora_fa")
@dataclass(frozen=True)
class LoRAFA(LoRA):
    """Train B beside an A that stays as it was drawn."""

    a_init: Start = "orthonormal"
    """A: as in LoRA (kaiming), or orthogonal rows of the same length, with which Adam needs no correction of B's
    gradient."""

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return FrozenA(name, linear, codec, settings, a_init=self.a_init)
