"""A linear layer whose weight is frozen and stored by a codec."""

from __future__ import annotations

from torch import Tensor, nn

from llm_lowrank.codecs import Codec
from llm_lowrank.functional import frozen_linear


class FrozenLinear(nn.Module):
    """y = x decode(parts)^T + bias.   x (..., n), y (..., m)

    Owns the parts as frozen parameters, so that an engine shards them like any other parameter. They are decoded in
    forward and again in backward; a decoded W is never kept.
    """

    def __init__(self, linear: nn.Linear, codec: Codec) -> None:
        super().__init__()
        self.shape = (linear.out_features, linear.in_features)  # (m, n)
        self.codec = codec
        parts = codec.encode(linear.weight.data)
        self.part_names = tuple(parts)
        for name, part in parts.items():
            assert part.shape[0] == self.shape[0], (name, part.shape)
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)

    def parts(self) -> tuple[nn.Parameter, ...]:
        return tuple(getattr(self, name) for name in self.part_names)

    def decode(self, *parts: Tensor) -> Tensor:
        return self.codec.decode(dict(zip(self.part_names, parts, strict=True)))

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.parts(), self.decode, self.bias)

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, codec={self.codec}"
