"""How a frozen weight is stored: one file per codec."""

import torch

from llm_lowrank.codecs.base import Codec, empty_parts
from llm_lowrank.codecs.dense import Dense
from llm_lowrank.codecs.int8 import Int8
from llm_lowrank.codecs.nf4 import Nf4

__all__ = ["Codec", "Dense", "Int8", "Nf4", "empty_parts", "make"]


def make(name: str, dtype: torch.dtype, double_quant: bool = False) -> Codec:
    """The codec that a recipe names."""
    if name not in ("dense", "int8", "nf4"):
        raise ValueError(f"codec: {name} is unknown; use dense, int8 or nf4")
    if name == "nf4":
        return Nf4(dtype, double_quant)
    if double_quant:
        raise ValueError(f"codec_double_quant: true is for codec: nf4, not for codec: {name}")
    return Dense(dtype) if name == "dense" else Int8(dtype)
