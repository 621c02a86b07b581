"""How a frozen weight is stored: one file per codec, and here the table of them.

What a codec knows is a tensor W with rows. Sharding, layers and files belong to the floors above.
"""

from typing import TYPE_CHECKING, Literal

import torch

from llm_lowrank.codecs.base import Codec, empty_parts
from llm_lowrank.codecs.dense import Dense
from llm_lowrank.codecs.int8 import Int8
from llm_lowrank.codecs.nf4 import Nf4

__all__ = ["CODECS", "Codec", "CodecName", "Dense", "Int8", "Nf4", "empty_parts", "make"]

CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (Dense, Nf4, Int8)}

if TYPE_CHECKING:
    CodecName = str
else:
    CodecName = Literal[tuple(CODECS)]  # what a recipe may say; made here, so that the table stays the only list


def make(name: str, dtype: torch.dtype, double_quant: bool = False) -> Codec:
    """Return the codec that a recipe names; ValueError if there is none, or none with these settings."""
    if name not in CODECS:
        *others, last = sorted(CODECS)
        raise ValueError(f"codec: {name} is unknown; use {', '.join(others)} or {last}")
    if name == Nf4.name:
        return Nf4(dtype, double_quant)
    if double_quant:
        raise ValueError(f"codec_double_quant: true is for codec: nf4, not for codec: {name}")
    return CODECS[name](dtype)
