"""SBoRA: one factor of the pairs is frozen at rows or columns of the identity.  https://arxiv.org/abs/2407.05413

    fa      A = I_n[J] (r, n) frozen, B (m, r) = 0 trained       y = W x + s B x_J            columns J of W change
    fb      B = I_m[:, J] (m, r) frozen, A (r, n) = 0 trained    y = W x, and y_J += s A x    rows J of W change

J are r different indices, drawn once for each module. The rest of W cannot change.
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
from llm_lowrank.numerics.pairs import Pairs

Variant = Literal["fa", "fb"]


class BasisAdapter(PairAdapter):
    """A PairAdapter with one factor of standard basis vectors, which is frozen, and the other zero at the start."""

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: the frozen factor is 1 at (k, J_k), the trained one is zero."""
        assert pairs is None, "SBoRA takes no pairs out of W"
        (m, n), r, columns = self.shape, self.rank, self.trains == "B"
        with torch.device("cpu"):
            chosen = torch.randperm(n if columns else m, generator=generator(self.seed, self.name))[:r].sort().values
            values = {"A": torch.zeros(r, n), "B": torch.zeros(m, r)}
            basis = values["A"] if columns else values["B"].T
            basis[torch.arange(r), chosen] = 1
        return values


class ColumnAdapter(BasisAdapter):
    """r columns of W change: B is trained."""

    trains = "B"


class RowAdapter(BasisAdapter):
    """r rows of W change: A is trained."""

    trains = "A"


@Method.register_subclass("sbora")
@dataclass(frozen=True)
class SBoRA(LoRA):
    """Train rank columns, or rank rows, of every W, chosen at random."""

    rank: int = 32
    """Columns or rows of a module that change: the rank of its change."""
    variant: Variant = "fa"
    """What changes: columns, by a trained B (fa), or rows, by a trained A (fb)."""

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        kind = ColumnAdapter if self.variant == "fa" else RowAdapter
        return kind(name, linear, codec, settings)
