"""MoRA: a square matrix between sums of inputs and copies to outputs.  https://arxiv.org/abs/2405.12130 eq. 6 (sharing)

    q = round(sqrt((m + n) r)), at most min(m, n)          about as many numbers as LoRA's of rank r

    h[c] = sum of x'[j] over j mod q = c                   (q,)     x' is x, continued by its first entries to a
    u    = M h                                             (q,)     multiple of q
    y[i] = (W x)[i] + u[i mod q]                           (m,)     M (q, q) = 0 at the start and trained

So dW = C M S, with C (m, q) the copies and S (q, n) the sums, has rank q, where LoRA's has rank r. There is no scale.

S and C are not made in a step: sums and copies of entries take t (n + m) additions, where products with matrices of
zeros and ones would take t q (m + n). The published code computes the same layer (its mora_type 1), and caps q nowhere.
Its other types, of which type 6 has another dW of full rank, are not here: see the card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llm_lowrank.adapters.adapter import Adapter, Whole
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.functional import flat_rows, frozen_linear, product_as, unflattened, without_autocast
from llm_lowrank.numerics.pairs import Pairs


def sums(x: Tensor, q: int) -> Tensor:
    """Return h (..., q), h[c] the sum of the entries j of x (..., n) with j mod q = c; q at most n.

    Where q does not divide n, the first entries of x come once more at its end.
    """
    missing = -x.shape[-1] % q
    whole = torch.cat([x, x[..., :missing]], -1) if missing else x
    return whole.unflatten(-1, (-1, q)).sum(-2)


def copies(u: Tensor, m: int) -> Tensor:
    """Return y (..., m) with y[i] = u[i mod q] of u (..., q)."""
    q = u.shape[-1]
    # one kernel each way for any m / q; joining u with itself would take m / q of them in the backward
    return u.unsqueeze(-2).expand(*u.shape[:-1], -(-m // q), q).flatten(-2)[..., :m]


def sums_matrix(n: int, q: int) -> Tensor:
    """Return S (q, n) with S x = sums(x, q), on the host."""
    missing = -n % q
    with torch.device("cpu"):
        S = copies(torch.eye(q), n)
        again = torch.arange(missing)  # these columns are summed a second time
        S[q - missing + again, again] += 1
    return S


class _Square(torch.autograd.Function):
    """h M^T, (t, q), in the dtype of h. The backward keeps M and no cast copy of it, see numerics/functional.py."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, M: Tensor) -> Tensor:
        ctx.save_for_backward(h, M)
        return h @ M.to(h.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        h, M = ctx.saved_tensors
        need_h, need_M = ctx.needs_input_grad
        with without_autocast(g.device):
            dh = g @ M.to(g.dtype) if need_h else None
            dM = product_as(g.T, h, M.dtype) if need_M else None
        return dh, dM


class SquareAdapter(Adapter):
    """A frozen linear with M (q, q), which is trained."""

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, *, side: int, dropout: float, seed: int) -> None:
        super().__init__(name, linear, codec, seed)
        self.side, self.dropout = side, dropout
        self.M = self.factor(side, side)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting value: M is zero, so that the function starts as it was; its gradient is not zero."""
        assert pairs is None, "MoRA takes no pairs out of W"
        return {"M": torch.zeros(self.side, self.side, device="cpu")}

    def forward(self, x: Tensor) -> Tensor:
        rows = flat_rows(x)
        y = frozen_linear(rows, self.parts(), self.decode, self.bias, self.multiply(rows))  # (t, m)
        read = F.dropout(rows, self.dropout) if self.dropout and self.training else rows
        with without_autocast(x.device):
            u = _Square.apply(sums(read.to(y.dtype), self.side), self.M)  # (t, q)
            return unflattened(y.add_(copies(u, self.shape[0])), x)

    def change(self, whole: Whole) -> Pairs:
        """C M and S. Collective."""
        (m, n), M = self.shape, whole(self.M)
        return Pairs(copies(M.T, m).T, sums_matrix(n, self.side).to(M))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, side={self.side}"


@Method.register_subclass("mora")
@dataclass(frozen=True)
class MoRA(LoRA):
    """Train a square matrix per module, with about as many numbers as a LoRA of this rank."""

    rank: int = 8
    """Rank of the LoRA that has about as many parameters; the square matrix has sqrt((m + n) rank) rows and columns."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        scaled = {"alpha": self.alpha is not None, "alpha_pattern": self.alpha_pattern, "use_rslora": self.use_rslora}
        complaints += [
            f"method.{setting} cannot be used with mora: its change is added to W without a scale; remove it"
            for setting, given in scaled.items()
            if given
        ]
        if self.b_rate != 1:
            complaints.append("method.b_rate is the rate of LoRA's B, which mora does not have; remove it")
        return complaints

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> SquareAdapter:
        rank = self.rank_of(name)
        self.check_fits("rank", rank, name, linear)
        m, n = linear.weight.shape
        side = min(round(math.sqrt((m + n) * rank)), m, n)
        return SquareAdapter(name, linear, codec, side=side, dropout=self.dropout, seed=seed)
