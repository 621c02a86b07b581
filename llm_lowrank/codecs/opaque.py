"""Decoding as one operator that torch.compile does not look into.

A kernel of bitsandbytes and a loop over rows would each end the compiled graph. An operator with a shape that is known
without running it is a node of the graph instead. Without torch.compile codecs are called directly.

What a codec computes in torch alone is compiled inside of the operator, see Codec.decode_fused. It cannot be a part of
the graph around it, for there torch would keep W from forward to backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_lowrank.codecs.base import Codec

_KNOWN: dict[str, Codec] = {}  # an operator takes no objects: a codec goes by what it prints


def name_of(codec: Codec) -> str:
    """Return the name by which `decode` knows a codec with its settings."""
    _KNOWN[str(codec)] = codec
    return str(codec)


@torch.library.custom_op("llm_lowrank::decode", mutates_args=())
def decode(parts: list[Tensor], codec: str, n: int, after: Tensor | None = None) -> Tensor:
    """Return W (m, n) of the parts, in the order of the codec's layout. after: is not read; see functional.py."""
    known = _KNOWN[codec]
    return known.decode_fused(dict(zip(known.layout(n), parts, strict=True)), n)


@decode.register_fake
def _shape(parts: list[Tensor], codec: str, n: int, after: Tensor | None = None) -> Tensor:
    return parts[0].new_empty(parts[0].shape[0], n, dtype=_KNOWN[codec].dtype)
