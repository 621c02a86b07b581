"""One frozen W (m, n), of which this rank holds some elements: products, row norms and low-rank updates without a
gather.

    W x = sum over ranks of (my rows) x          W^T y = sum over ranks of (my rows)^T y[my rows]
    W += L R  needs on each rank only the rows of L that the rank holds: no communication at all.

A rank holds one span of the row-major flattened W, described by its flat start. ZeRO-3 cuts a dense W in the middle of
a row. The block of rows that such a rank reads has zeros where the elements of another rank belong, so that sums over
ranks stay right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_lowrank.codecs import Codec
from llm_lowrank.numerics.pairs import Change


def _alone(t: Tensor) -> Tensor:
    return t


@dataclass(kw_only=True)
class Weight:
    """A frozen W, as far as this rank holds it."""

    shape: tuple[int, int]  # (m, n) of the whole W
    codec: Codec
    parts: dict[str, Tensor]  # this rank's span of each part, flat views into the engine's storage
    start: int  # flat position of the span in W
    numel: int  # elements of W in the span; 0 on a rank that holds none
    device: torch.device  # where the arithmetic happens; the parts may live elsewhere (offload)
    sum: Callable[[Tensor], Tensor]  # over the ranks that share W; the identity where every rank holds all of it
    written: Callable[[], None] = lambda: None  # asks the engine to renew its other copies of W

    @classmethod
    def everything(
        cls, shape: tuple[int, int], codec: Codec, parts: Mapping[str, Tensor], device: torch.device
    ) -> Weight:
        """Return a W of which every rank holds all, in row-shaped parts."""
        return cls.of_rows(shape, codec, parts, first=0, stop=shape[0], device=device, sum=_alone)

    @classmethod
    def of_rows(
        cls,
        shape: tuple[int, int],
        codec: Codec,
        parts: Mapping[str, Tensor],
        *,
        first: int,
        stop: int,
        device: torch.device,
        sum: Callable[[Tensor], Tensor],
    ) -> Weight:
        """Return a W of which this rank stores the rows first..stop; those from m on are padding."""
        m, n = shape
        first, stop = min(first, m), min(stop, m)
        layout = codec.layout(n)
        spans = {name: part.detach().view(-1)[: (stop - first) * layout[name][0]] for name, part in parts.items()}
        return cls(
            shape=shape,
            codec=codec,
            parts=spans,
            start=first * n,
            numel=(stop - first) * n,
            device=device,
            sum=sum,
        )

    def __post_init__(self) -> None:
        n, stop = self.shape[1], self.start + self.numel
        # every row of which this rank holds an element
        self.rows = slice(self.start // n, -(-stop // n)) if self.numel else slice(0, 0)
        # the elements of other ranks in the first of these rows and in the last
        self.cut = (self.start - self.rows.start * n, self.rows.stop * n - stop)
        self.whole_rows = not any(self.cut) or not self.numel

    def read(self) -> Tensor:
        """Return my rows, decoded, at least float32: (rows, n), zero where an element belongs to another rank."""
        count, n = self.rows.stop - self.rows.start, self.shape[1]
        if self.whole_rows:
            layout = self.codec.layout(n)
            block = self.codec.decode({k: v.view(count, layout[k][0]) for k, v in self.parts.items()}, n)
        else:
            # Only a dense W is cut within a row, and its elements are decoded one by one: a flat span will do. Zeros
            # on either side complete it to rows.
            span = self.codec.decode(self.parts, n)
            block = torch.nn.functional.pad(span, self.cut).view(count, n)
        return block.to(self.device, torch.promote_types(block.dtype, torch.float32))

    def write(self, block: Tensor) -> None:
        """Encode my rows again and store them; elements of other ranks in a shared row are ignored."""
        assert self.codec.writable, f"{self.codec}: a quantized weight is never written again"
        if self.numel:
            if not self.whole_rows:
                block = block.flatten()[self.cut[0] : block.numel() - self.cut[1]]
            for k, part in self.codec.encode(block).items():
                self.parts[k].copy_(part.flatten())
        # a rank that holds no element comes here too, for renewing the copies is collective
        self.written()

    def matmul(self, x: Tensor) -> Tensor:
        """Return W x: (n, k) -> (m, k). Collective."""
        y = x.new_zeros(self.shape[0], x.shape[1])
        y[self.rows] = self.read() @ x
        return self.sum(y)

    def rmatmul(self, y: Tensor) -> Tensor:
        """Return W^T y: (m, k) -> (n, k). Collective."""
        return self.sum(self.read().T @ y[self.rows])

    def row_norms(self) -> Tensor:
        """Return the Euclidean norm of every row: (m,). Collective."""
        squares = torch.zeros(self.shape[0], device=self.device)
        squares[self.rows] = self.read().square().sum(1)
        return self.sum(squares).sqrt()

    def mine_(self, block: Tensor) -> Tensor:
        """Set to zero what belongs to other ranks in a block of my rows."""
        if not self.whole_rows:
            block.flatten()[: self.cut[0]] = 0
            block.flatten()[block.numel() - self.cut[1] :] = 0
        return block

    @torch.no_grad()
    def add_(self, change: Change) -> Tensor:
        """W += change, rounded once. No communication of W.

        Return (|asked|^2, |stored - asked|^2, elements whose stored value changed) over this rank's elements, in
        float64: what rounding to the stored type took away is measured, never assumed.
        """
        before = self.read().clone()  # a float32 W is read in place
        asked = self.mine_(change.of_rows(self.rows))
        self.write(before + asked)
        stored = self.read() - before
        changed = (stored != 0).sum().double()

        def square(t: Tensor) -> Tensor:
            # in pieces, so that never all rows are in float64
            return torch.stack([part.double().square().sum() for part in t.flatten().split(2**18)]).sum()

        return torch.stack([square(asked), square(stored.sub_(asked)), changed])
