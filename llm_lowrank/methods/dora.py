"""DoRA: train the length of every row of W separately from its direction.  https://arxiv.org/abs/2402.09353 eq. 5

    W' = diag(M / |W + s B A|) (W + s B A)          M (m,) starts as |W|, lengths of rows; so W' = W at the start

The gradient treats |W + s B A| as a constant (section 4.3). The rows of W here are the columns of W^T in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings, Whole
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine, Slot
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.pairs import Pairs


class DirectionAdapter(PairAdapter):
    """A PairAdapter with M, `magnitude` (m,), which is trained, and |W|, `norms` (m,), which is not.

    With |W| at hand |W + s B A| costs as much as r more tokens, see functional.row_norms.
    """

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> None:
        super().__init__(name, linear, codec, settings)
        self.magnitude, self.norms = self.factor(self.shape[0]), self.factor(self.shape[0], trained=False)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values; `start` replaces the ones by the row lengths of the stored W."""
        ones = torch.ones(self.shape[0], device="cpu")
        return super().initial(pairs) | {"magnitude": ones, "norms": ones}

    def direction(self) -> tuple[Tensor, Tensor]:
        return self.magnitude, self.norms

    def extras(self, whole: Whole) -> dict[str, Tensor]:
        return {"lora_magnitude_vector": whole(self.magnitude)}


def measure(adapters: list[Adapter], engine: Engine) -> None:
    """Set M = |W|. Collective."""
    for adapter in adapters:
        assert isinstance(adapter, DirectionAdapter)
        lengths = engine.weight(adapter).row_norms()
        for p in (adapter.magnitude, adapter.norms):
            engine.put(p, Slot(lengths, {}))


@Method.register_subclass("dora")
@dataclass(frozen=True)
class DoRA(LoRA):
    """Train pairs for the direction of the rows of W and a vector for their lengths."""

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return DirectionAdapter(name, linear, codec, settings)

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        measure(adapters, engine)

    def peft(self) -> dict[str, Any]:
        return super().peft() | {"use_dora": True}
