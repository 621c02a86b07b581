"""Modules of the model that are trained as wholes, beside the adapters: norms, the embedding, the output layer.

    y = f(x; round(W))      W in float32 is trained; round(W) has the dtype in which the model has W

W starts as the checkpoint has it, so that the function at the start is the base model's, bit for bit. f is the module's
own forward. PEFT has such modules under the name modules_to_save.

Where the output layer shares the embedding's matrix, both are trained as one W.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from llm_lowrank.adapters.tokens import embed_scale, look_as


class Whole(nn.Module):
    """A module whose own parameters are all trained. They keep their names, which the checkpoint knows."""


def master(p: nn.Parameter) -> nn.Parameter:
    """The float32 parameter that is trained in the place of one of the model's."""
    return nn.Parameter(p.detach().float())


class WholeNorm(Whole):
    """A norm, or another module that has vectors alone: they are rounded and its own forward uses them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = (norm,)  # a tuple, so that its frozen parameters are not registered here
        self.dtypes = {name: p.dtype for name, p in norm.named_parameters()}
        for name, p in norm.named_parameters():
            self.register_parameter(name, master(p))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rounded = {name: getattr(self, name).to(dtype) for name, dtype in self.dtypes.items()}
        return functional_call(self.inner[0], rounded, args, kwargs)

    def extra_repr(self) -> str:
        return repr(self.inner[0])


class WholeEmbedding(Whole, nn.Embedding):
    """An embedding. The rows are looked up in W and rounded, which is less work than to round all of W."""

    def __init__(self, embedding: nn.Embedding, weight: nn.Parameter) -> None:
        """weight: W (v, n), which an output layer may share."""
        nn.Module.__init__(self)
        look_as(self, embedding, len(weight))
        self.dtype, self.weight = embedding.weight.dtype, weight
        self.scale: Tensor | None
        self.register_buffer("scale", embed_scale(embedding), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        found = F.embedding(input, self.weight, self.padding_idx).to(self.dtype)
        return found if self.scale is None else found * self.scale.to(found.dtype)


class WholeHead(Whole, nn.Linear):
    """An output layer."""

    def __init__(self, linear: nn.Linear, weight: nn.Parameter) -> None:
        """weight: W (v, n), which the embedding may share."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = weight, None if linear.bias is None else master(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
