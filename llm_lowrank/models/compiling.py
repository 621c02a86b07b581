"""torch.compile, one decoder layer at a time: norms, rotations and activations become few kernels.

All layers of a shape share one graph, so that a model of any depth compiles in the time of a layer. Decoding is one
operator of that graph (codecs/opaque.py). An adapter that no graph can hold says so, by torch.compiler.disable at its
forward, and runs as it is between two graphs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from transformers import PreTrainedModel

from llm_lowrank.engines.fsdp import decoder_layers


def eagerly() -> AbstractContextManager[None]:
    """Within this block nothing is compiled: for a few forwards of other shapes, which are not worth a graph."""
    return torch.compiler.set_stance("force_eager")


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer when it is first called; ValueError if the decoder layers are not known."""
    for layer in decoder_layers(model):
        layer.compile()
