"""The linear layer of a frozen W with a low-rank adapter beside it, as one autograd Function.

    y  = x W^T + b + s (x A^T) B^T                    W = decode(*parts)
    dx = g W + s (g B) A        dA = s (g B)^T x        dB = s g^T (x A^T)          g = dL/dy

LoRA: https://arxiv.org/abs/2106.09685. Which order of the small products is cheapest: RunLoRA, https://arxiv.org/abs/2312.03415.
m out, n in, r pairs, k bank pairs, t tokens.

**Order.** The small products share x A^T (forward and dB) and g B (dx and dA): 3 t r (m + n) multiplications, all of them skinny.
RunLoRA's two other orders are not taken. dA and dB by way of g^T x are cheaper only from r > mn / (m + n) on, which is no low rank. One
product with W + s B A is cheaper from t > 2 mn / (m + n) on, but holds a second W, and a low-precision W + s B A rounds the update away.
The adapter's term is added to the base product in place, by addmm_: no second (t, m) or (t, n) is made.

**Memory.** Kept for backward: x and x A^T, beside references to the parameters just as they were passed in. A decoded, cast or concatenated
parameter is made again in backward: keeping one would keep the dense model alive, and a sharding engine (ZeRO-3, FSDP2) swaps the storage
behind a parameter between forward and backward, which only the parameter itself follows.

**Precision.** Everything runs in one dtype, autocast's where it is on and otherwise x's; gradients are returned in the dtype of A and B.
Trainable and bank pairs are concatenated, so that the sum over all pairs is one product, rounded once: moving a pair from one side to the
other changes nothing but the order of that sum.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Decode = Callable[..., Tensor]


def frozen_linear(x: Tensor, parts: tuple[Tensor, ...], decode: Decode, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b with W = decode(*parts) frozen, decoded again in backward. Nothing but references to the parts is kept.

    x (..., n), W (m, n), bias (m,) -> y (..., m). Gradient for x only.
    """
    return _FrozenLinear.apply(x, bias, decode, *parts)


def adapter_linear(
    x: Tensor,
    parts: tuple[Tensor, ...],
    decode: Decode,
    A: Tensor,
    B: Tensor,
    scale: float,
    bias: Tensor | None = None,
    bank_A: Tensor | None = None,
    bank_B: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b + s (x A^T) B^T + s (x bank_A^T) bank_B^T with W = decode(*parts).  https://arxiv.org/abs/2106.09685 eq. 3

    x (..., n), W (m, n), A (r, n), B (m, r), bias (m,), bank_A (k, n), bank_B (m, k) -> y (..., m).
    Gradients for x, A and B; the parts, the bias and the bank are frozen. Dropout on the adapter's input has no place in here, as W and A
    read the same x.
    """
    return _AdapterLinear.apply(x, A, B, bank_A, bank_B, bias, scale, decode, *parts)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, decode: Decode, *parts: Tensor) -> Tensor:
        assert not any(ctx.needs_input_grad[1:]), "the bias and the parts of a frozen linear must not require gradients"
        ctx.decode, ctx.dtype, ctx.x_dtype = decode, _compute_dtype(x), x.dtype
        ctx.save_for_backward(*parts)
        with torch.autocast(x.device.type, enabled=False):
            return _base(x.to(ctx.dtype), decode(*parts), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            dx = (g.to(ctx.dtype) @ ctx.decode(*parts).to(ctx.dtype)).to(ctx.x_dtype)
        return dx, None, None, *(None for _ in parts)


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        bank_A: Tensor | None,
        bank_B: Tensor | None,
        bias: Tensor | None,
        scale: float,
        decode: Decode,
        *parts: Tensor,
    ) -> Tensor:
        assert not any(ctx.needs_input_grad[3:]), "the bias, the bank and the parts of an adapter must not require gradients"
        ctx.decode, ctx.scale, ctx.dtype, ctx.x_dtype = decode, scale, _compute_dtype(x), x.dtype
        _, need_A, need_B = ctx.needs_input_grad[:3]
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(ctx.dtype)
            rows = _rows(x)                                                         # (t, n)
            h = rows @ _all_A(A, bank_A, ctx.dtype).T                               # (t, r + k)
            y = _base(rows, decode(*parts), bias)                                   # (t, m)
            y.addmm_(h, _all_B(B, bank_B, ctx.dtype).T, alpha=scale)
        kept = h[:, : len(A)].contiguous() if need_B else None                      # (t, r): the bank has no gradient
        ctx.save_for_backward(x if need_A else None, kept, A, B, bank_A, bank_B, *parts)
        return y.view(*x.shape[:-1], len(B))                                        # (..., m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B, bank_A, bank_B, *parts = ctx.saved_tensors
        need_x, need_A, need_B = ctx.needs_input_grad[:3]
        dx = dA = dB = None
        with torch.autocast(g.device.type, enabled=False):
            rows = _rows(g.to(ctx.dtype))                                           # (t, m)
            if need_x:
                u = rows @ _all_B(B, bank_B, ctx.dtype)                             # (t, r + k)
                dx = rows @ ctx.decode(*parts).to(ctx.dtype)                        # (t, n)
                dx.addmm_(u, _all_A(A, bank_A, ctx.dtype), alpha=ctx.scale)
                dx = dx.view(*g.shape[:-1], A.shape[1]).to(ctx.x_dtype)             # (..., n)
            elif need_A:
                u = rows @ B.to(ctx.dtype)                                          # (t, r)
            if need_A:
                dA = (u[:, : len(A)].T @ _rows(x)).to(A.dtype).mul_(ctx.scale)      # (r, n)
            if need_B:
                dB = (h.T @ rows).T.to(B.dtype).mul_(ctx.scale)                     # (m, r); h^T g runs faster than g^T h
        return dx, dA, dB, None, None, None, None, None, *(None for _ in parts)


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _base(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _all_A(A: Tensor, bank_A: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (A if bank_A is None else torch.cat([A, bank_A])).to(dtype)              # (r + k, n)


def _all_B(B: Tensor, bank_B: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (B if bank_B is None else torch.cat([B, bank_B], 1)).to(dtype)           # (m, r + k)
