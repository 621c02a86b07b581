"""A linear layer whose weight is frozen and stored by a codec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llm_lowrank.codecs import Codec, empty_parts, opaque
from llm_lowrank.numerics.functional import Multiply, compute_dtype, frozen_linear


class FrozenLinear(nn.Module):
    """y = x decode(parts)^T + bias.   x (..., n), y (..., m)

    The layer owns the parts as frozen parameters, so that an engine shards them like any other parameter. They are
    decoded in forward and again in backward; a decoded W is never kept.

    The parts of a linear on the meta device have no values; an engine fills them.
    """

    rowwise = True  # whether a row of y depends on its row of x alone, wherever that stands
    # modules whose parameters the forward reads too; a tuple, so that they are not registered here
    borrows: tuple[nn.Module, ...] = ()
    multiplies_codes = False  # set by `codes_multiplied`

    def __init__(self, linear: nn.Linear, codec: Codec) -> None:
        super().__init__()
        self.shape = (linear.out_features, linear.in_features)  # (m, n)
        self.codec, self.codec_name = codec, opaque.name_of(codec)
        self.stored_rows = self.shape[0]
        self.part_names = tuple(codec.layout(self.shape[1]))
        w = linear.weight
        self._own(empty_parts(codec, *self.shape, "meta") if w.is_meta else codec.encode(w.data))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)

    def _own(self, parts: dict[str, Tensor]) -> None:
        for name, part in parts.items():
            self.register_parameter(name, nn.Parameter(part, requires_grad=False))

    def pad_rows(self, multiple: int) -> None:
        """Make room for rows of zeros up to a multiple, before there are values.

        Then each of so many ranks holds whole rows of a quantized W. A dense W stays as it is, for its rows may be cut.
        """
        if not self.codec.writable and self.shape[0] % multiple:
            self.stored_rows = -(-self.shape[0] // multiple) * multiple
            self._own(empty_parts(self.codec, self.stored_rows, self.shape[1], "meta"))

    @property
    def makes_w(self) -> bool:
        """Whether `decode` makes a W, instead of returning the stored one."""
        return not self.codec.writable

    def named_parts(self) -> dict[str, nn.Parameter]:
        return {name: getattr(self, name) for name in self.part_names}

    def parts(self) -> tuple[nn.Parameter, ...]:
        return tuple(self.named_parts().values())

    def decode(self, *parts: Tensor, after: Tensor | None = None) -> Tensor:
        """Return W (m, n) of its parts. after: a tensor that a compiled graph must have computed before."""
        if torch.compiler.is_compiling() and not self.codec.writable:
            return opaque.decode(list(parts), self.codec_name, self.shape[1], after)[: self.shape[0]]
        w = self.codec.decode(dict(zip(self.part_names, parts, strict=True)), self.shape[1])
        return w if self.stored_rows == self.shape[0] else w[: self.shape[0]]

    def multiply(self, x: Tensor) -> Multiply | None:
        """Return what multiplies x with the codes as they are, within `codes_multiplied`; None where W is decoded."""
        if not self.multiplies_codes or torch.is_grad_enabled():
            return None
        return self._multiply if self.codec.multiplies(self.shape[1], compute_dtype(x), x.device) else None

    def _multiply(self, x: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        rows = {name: part[: self.shape[0]] for name, part in zip(self.part_names, parts, strict=True)}
        return self.codec.multiply(x, rows, self.shape[1], bias)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.parts(), self.decode, self.bias, self.multiply(x))

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, codec={self.codec}"


@contextmanager
def codes_multiplied(model: nn.Module) -> Iterator[None]:
    """Within this block forwards without gradients do not decode W where its codec has a kernel for x W^T.

    That is for generation, whose few rows would each time wait for a decoded W. The kernel rounds its sum otherwise, so
    that nothing that is compared with training may be computed here.
    """
    layers = [module for module in model.modules() if isinstance(module, FrozenLinear)]
    for layer in layers:
        layer.multiplies_codes = True
    try:
        yield
    finally:
        for layer in layers:
            layer.multiplies_codes = False


def persistent_size(model: nn.Module) -> int:
    """Return the elements up to which ZeRO-3 may leave a parameter gathered between uses: trained or lent, but no W.

    What layers borrow is frozen in some methods, and would travel once for each of them. What few layers borrow may do
    so: its lender has `stays_gathered` false. A trained parameter can be larger than a W: LoSiA's rows of an output
    layer are larger than the projections of a small head.
    """
    layers = [m for m in model.modules() if isinstance(m, FrozenLinear)]
    lenders = [lender for layer in layers for lender in layer.borrows if getattr(lender, "stays_gathered", True)]
    lent = [p for lender in lenders for p in lender.parameters()]
    wanted = max((p.numel() for p in [*lent, *(p for p in model.parameters() if p.requires_grad)]), default=0)
    weights = [max(part.numel() for part in m.parts()) for m in layers]
    return max(0, min([wanted, *(size - 1 for size in weights)]))
