"""The linear layer of a frozen W and the low-rank products added to it, as one autograd Function.

    h_j = (x A_j^T) * d_j            (t, r)                          d_j a gate per pair, or none
    z  = x W^T + s sum_j (h_j C_j^T) B_j^T * o_j                     W = decode(*parts), C_j a core (q, r), or none;
    y  = z * g + b                                                   o_j (m,) a weight per output, or none
                                                                     g = magnitude / |rows of W + s B A|, or 1
    u_j = ((dy * g) * o_j) B_j       (t, q)
    dx = (dy * g) W + s sum_j ((u_j C_j) * d_j) A_j
    dA_j = s ((u_j C_j) * d_j)^T x                   dB_j = s ((dy * g) * o_j)^T (h_j C_j^T)
    dd_j = s sum_t (u_j C_j) * (x A_j^T)             dC_j = s u_j^T h_j
    do_j = s sum_t (dy * g) * (h_j C_j^T B_j^T)      dmagnitude = sum_t dy * (y - b) / magnitude

The layer is LoRA's, https://arxiv.org/abs/2106.09685. RunLoRA, https://arxiv.org/abs/2312.03415, compares the orders of
the small products. m out, n in, r rows of A, q columns of B, k bank pairs, t tokens. Without a core q = r.

**Order.** The small products share x A^T (forward and dB) and g B (dx and dA): 3 t r (m + n) multiplications, all of
them skinny. RunLoRA's two other orders are not used. Computing dA and dB from g^T x is cheaper only for
r > mn / (m + n), and such a rank is not low. One product with W + s B A is cheaper for t > 2 mn / (m + n), but it needs
memory for a second W, and a low-precision W + s B A rounds the update away. The adapter's term is added to the base
product in place, by addmm_, so that no second (t, m) or (t, n) tensor is made. A core costs t q r more, and its
gradient is made of u and h: neither B C nor dB is. The weights of the outputs multiply B, and not the (t, m) result.

**Memory.** The Function keeps x, x A^T and (where a magnitude is trained) y for backward, and references to the
parameters exactly as they were passed in. Decoded, cast and concatenated parameters are computed again in backward: a
kept copy would keep the dense model alive. A sharding engine (ZeRO-3, FSDP2) also swaps the storage behind a parameter
between forward and backward, and only the parameter itself follows that.

**Direction.** |row i of W + s B A|^2 = |w_i|^2 + 2 s b_i (A w_i) + s^2 b_i (A A^T) b_i^T: W + s B A is never made, and
W A^T costs as much as r tokens. The gradient treats the norm as a constant (DoRA, https://arxiv.org/abs/2402.09353
section 4.3).

**Precision.** Everything runs in one dtype, autocast's if autocast is on and otherwise x's. The norms are an exception
and are at least float32. A gradient is returned in the dtype of its tensor. Trainable and bank pairs are concatenated,
so that the sum over all pairs is one product, rounded once: a pair that moves from one side to the other changes only
the order of that sum.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Decode = Callable[..., Tensor]
Multiply = Callable[..., Tensor]  # (x, bias, *parts) -> x W^T + b, without a decoded W; for forwards without gradients


class Product(NamedTuple):
    """The term s ((((x A^T) * gate) core^T) B^T) * out of a layer.   A (r, n), B (m, q); each of them and of the others
    is a constant or trained"""

    A: Tensor
    B: Tensor
    gate: Tensor | None = None  # (r,), or (t, r) for a constant
    core: Tensor | None = None  # (q, r); without it q = r
    out: Tensor | None = None  # (m,)


WIDTH = len(Product._fields)


def frozen_linear(
    x: Tensor,
    parts: tuple[Tensor, ...],
    decode: Decode,
    bias: Tensor | None = None,
    multiply: Multiply | None = None,
) -> Tensor:
    """Return y = x W^T + b with W = decode(*parts) frozen. With `multiply` it is multiply(x, b, *parts).

    W is decoded again in backward; only references to the parts are kept for it.

    x (..., n), W (m, n), bias (m,) -> y (..., m). Only x gets a gradient.
    """
    return _FrozenLinear.apply(x, bias, decode, multiply, *parts)


def adapter_linear(
    x: Tensor,
    parts: tuple[Tensor, ...],
    *,
    decode: Decode,
    products: Sequence[Product],
    scale: float,
    bias: Tensor | None = None,
    bank: Product | None = None,
    dropped: Tensor | None = None,
    direction: tuple[Tensor, Tensor] | None = None,
    multiply: Multiply | None = None,
) -> Tensor:
    """Return y = z * g + b,  z = x W^T + s sum_j ((((x A_j^T) * d_j) C_j^T) B_j^T) * o_j + s (x bank_A^T) bank_B^T.

    x (..., n), W = decode(*parts) (m, n), bias (m,), bank pairs (k, n), (m, k) -> y (..., m). `dropped` is x after
    dropout: the products read it in the place of x, W and the bank read x. `direction` is DoRA's (magnitude (m,), |rows
    of W| (m,)), for one product without a bank; without it g is 1. x, dropped, the products and the magnitude get
    gradients; the parts, the bias, the bank and the norms are frozen. With `multiply`, where there is no direction, W's
    part is multiply(x, b, *parts). https://arxiv.org/abs/2106.09685 eq. 3
    """
    assert direction is None or (len(products) == 1 and bank is None), "a direction is that of one product"
    assert bank is None or products[0][2:] == (None, None, None), "pairs beside a bank have no gate, core or out"
    assert multiply is None or direction is None, "a direction needs the decoded W"
    bank_A, bank_B = (None, None) if bank is None else bank[:2]
    magnitude, norms = (None, None) if direction is None else direction
    flat = [t for product in products for t in product]
    return _AdapterLinear.apply(
        x, dropped, bank_A, bank_B, bias, magnitude, norms, scale, decode, multiply, len(products), *flat, *parts
    )


def _again(decode: Decode, parts: tuple[Tensor, ...], g: Tensor) -> Tensor:
    """Return W in backward.

    torch.compile sees forward and backward together: of two decodings of the same parts it would make one, and keep
    every W from forward to backward. A decoding that also names its gradient g can only be in backward.
    """
    return decode(*parts, after=g) if torch.compiler.is_compiling() else decode(*parts)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, decode: Decode, multiply: Multiply | None, *parts: Tensor
    ) -> Tensor:
        assert not any(ctx.needs_input_grad[1:]), "the bias and the parts of a frozen linear must not require gradients"
        ctx.decode, ctx.dtype, ctx.x_dtype = decode, compute_dtype(x), x.dtype
        ctx.save_for_backward(*parts)
        with without_autocast(x.device):
            if multiply is not None:
                return multiply(x.to(ctx.dtype), bias, *parts)
            return base_linear(x.to(ctx.dtype), decode(*parts), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors
        with without_autocast(g.device):
            dx = (g.to(ctx.dtype) @ _again(ctx.decode, parts, g).to(ctx.dtype)).to(ctx.x_dtype)
        return dx, None, None, None, *(None for _ in parts)


# _AdapterLinear.apply takes x, dropped, bank_A, bank_B, bias, magnitude, norms, scale, decode, multiply, count, and
# behind these the fields of every product and the parts of W. Product j begins at FIXED + WIDTH j.
FIXED = 11


class _AdapterLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        bank_A: Tensor | None,
        bank_B: Tensor | None,
        bias: Tensor | None,
        magnitude: Tensor | None,
        norms: Tensor | None,
        scale: float,
        decode: Decode,
        multiply: Multiply | None,
        count: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        needs = ctx.needs_input_grad
        products, parts = _group_products(tensors[: WIDTH * count]), tensors[WIDTH * count :]
        assert not any(needs[2:5] + needs[6:7] + needs[FIXED + WIDTH * count :]), (
            "bias, bank, norms and W must not require gradients"
        )
        ctx.decode, ctx.scale, ctx.count = decode, scale, count
        ctx.dtype, ctx.x_dtype = compute_dtype(x), x.dtype
        hidden: list[Tensor | None] = []  # x A_j^T, for all gradients of a product but dA
        growth = None
        with without_autocast(x.device):
            # W reads x, the products read x after dropout
            rows = flat_rows(x.to(ctx.dtype))  # (t, n)
            read = rows if dropped is None else flat_rows(dropped.to(ctx.dtype))  # (t, n)
            # W's part; with a magnitude the bias comes last, as it is not multiplied
            w = None
            if multiply is not None:
                y = multiply(rows, bias, *parts)  # (t, m)
            else:
                w = decode(*parts)
                y = base_linear(rows, w, bias if magnitude is None else None)  # (t, m)
            for j, (A, B, gate, core, out) in enumerate(products):
                # the bank reads x too: without dropout it joins the first product, in one sum that is rounded once
                joint = bank_A is not None and dropped is None and j == 0
                h = read @ _all_A(A, bank_A if joint else None, ctx.dtype).T  # (t, r), (t, r + k)
                last = _last(h, gate, core)  # (t, q), (t, r + k)
                y.addmm_(last, _all_B(B, bank_B if joint else None, out, ctx.dtype).T, alpha=scale)
                first = FIXED + WIDTH * j
                kept = h[:, : len(A)].contiguous() if joint else h
                hidden.append(kept if any(needs[first + 1 : first + WIDTH]) else None)
            # the bank's part, outside of the dropout
            if bank_A is not None and bank_B is not None and dropped is not None:
                y.addmm_(rows @ bank_A.to(ctx.dtype).T, bank_B.to(ctx.dtype).T, alpha=scale)
            # DoRA: rows of W + s B A get the trained lengths
            if magnitude is not None and norms is not None:
                assert w is not None
                growth = magnitude / row_norms(w, products[0], scale, norms)  # (m,)
                y.mul_(growth.to(ctx.dtype))
                y = y if bias is None else y.add_(bias.to(ctx.dtype))
        y = unflattened(y, x)  # (..., m)
        # only tensors whose gradients are asked for are kept; parameters as they came, see Memory above
        need_A = any(needs[FIXED + WIDTH * j] for j in range(count))
        output = (y, bias) if needs[5] else (None, None)
        ctx.save_for_backward(read if need_A else None, *output, growth, magnitude, bank_A, bank_B, *hidden, *tensors)
        ctx.dropped = dropped is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        read, y, bias, growth, magnitude, bank_A, bank_B, *rest = ctx.saved_tensors
        count = ctx.count
        of_products, parts = rest[count : (1 + WIDTH) * count], rest[(1 + WIDTH) * count :]
        hidden, products = rest[:count], _group_products(of_products)
        needs, dtype, s = ctx.needs_input_grad, ctx.dtype, ctx.scale
        dx = ddropped = dmagnitude = None
        product_gradients: list[Tensor | None] = []  # those of the fields of each product in turn
        with without_autocast(g.device):
            rows = flat_rows(g.to(dtype))  # (t, m)
            # DoRA: z comes from the kept y; a row of zeros keeps its zero length
            if y is not None:
                z = flat_rows(y) if bias is None else flat_rows(y) - bias.to(dtype)  # (t, m)
                sums = (rows * z).sum(0, dtype=magnitude.dtype)  # (m,)
                dmagnitude = torch.where(magnitude == 0, 0.0, sums / magnitude)  # (m,)
            # from here on rows is dy * g
            if growth is not None:
                rows = rows * growth.to(dtype)
            # W's part
            if needs[0]:
                dx = rows @ _again(ctx.decode, parts, g).to(dtype)  # (t, n)
            # the products' part of the gradient goes to the tensor that they read
            if needs[1]:
                ddropped = torch.zeros_like(dx if dx is not None else read)  # (t, n)
            into = ddropped if ctx.dropped else dx
            # the bank's part, outside of the dropout
            if dx is not None and bank_A is not None and ctx.dropped:
                dx.addmm_(rows @ bank_B.to(dtype), bank_A.to(dtype), alpha=s)
            for j, (product, h) in enumerate(zip(products, hidden, strict=True)):
                needed = needs[FIXED + WIDTH * j : FIXED + WIDTH * (j + 1)]
                # without dropout the bank joins the first product, as in forward
                joint = into is not None and bank_A is not None and not ctx.dropped and j == 0
                bank = (bank_A, bank_B) if joint else (None, None)
                product_gradients += _backward(product, h, rows, read, into, bank=bank, needed=needed, s=s)
        shape = (*g.shape[:-1], products[0].A.shape[1])
        dx, ddropped = (None if t is None else t.view(shape).to(ctx.x_dtype) for t in (dx, ddropped))
        fixed = (dx, ddropped, None, None, None, dmagnitude, None, None, None, None, None)  # in the order of FIXED
        return *fixed, *product_gradients, *(None for _ in parts)


def _backward(
    product: Product,
    h: Tensor | None,
    rows: Tensor,
    read: Tensor | None,
    into: Tensor | None,
    *,
    bank: tuple[Tensor | None, Tensor | None],
    needed: Sequence[bool],
    s: float,
) -> list[Tensor | None]:
    """Return the gradients of a product's fields, as far as they are needed, and add its part of dx to `into`.

    h = x A^T (t, r), rows = dy * g (t, m), read = x (t, n), of which only those are there that a gradient needs. bank:
    what joins the product.
    """
    (A, B, gate, core, out), dtype = product, rows.dtype
    need_A, need_B, need_gate, need_core, need_out = needed
    dA = dB = dgate = dcore = dout = None
    # u is shared by the gradients of the input, of A, of the gate and of the core
    if into is not None or need_A or need_gate or need_core:
        u = rows @ _all_B(B, bank[1], out, dtype)  # (t, q), (t, r + k)
        if into is not None or need_A or need_gate:
            v = u if core is None else u @ core.to(dtype)  # (t, r), (t, r + k)
            gated = v if gate is None else v * gate.to(dtype)
            if into is not None:
                into.addmm_(gated, _all_A(A, bank[0], dtype), alpha=s)
            if need_A and read is not None:
                dA = _scaled_(product_as(gated[:, : len(A)].T, read, A.dtype), s)  # (r, n)
            if need_gate and gate is not None and h is not None:
                dgate = _scaled_((v * h).sum(0, dtype=gate.dtype), s)  # (r,)
        if need_core and core is not None and h is not None:
            dcore = _scaled_(product_as(u.T, _gated(h, gate), core.dtype), s)  # (q, r)
    if (need_B or need_out) and h is not None:
        last = _last(h, gate, core)  # (t, q)
        # (m, q), the gradient of diag(out) B; h^T g runs faster than g^T h
        both = _scaled_(product_as(last.T, rows, B.dtype), s).T
        if need_B:
            dB = both if out is None else both * out.to(B.dtype)[:, None]
        if need_out and out is not None:
            dout = (both * B).sum(1, dtype=out.dtype)  # (m,)
    return [dA, dB, dgate, dcore, dout]


def _scaled_(t: Tensor, s: float) -> Tensor:
    """Return s t, in the place of t. The usual scale is 1, and a kernel that multiplies by it would not be free."""
    return t if s == 1 else t.mul_(s)


def product_as(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a b in `dtype`. On CUDA a float32 product of halves is the accumulator itself, which was not rounded."""
    if a.device.type == "cuda" and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def row_norms(w: Tensor, product: Product, scale: float, norms: Tensor) -> Tensor:
    """Return |rows of W + s B A|, given norms = |rows of W|: w (m, n), norms (m,) -> (m,), at least float32.

    With a core C it is |rows of W + s B C A|. A gate is left out.
    """
    assert product.out is None, "row lengths know no weights of the outputs"
    A, B = product.A, product.B if product.core is None else product.B @ product.core  # (m, r)
    cross = (w @ A.to(w.dtype).T).to(norms.dtype)  # (m, r)
    gram = A @ A.T  # (r, r)
    squares = norms.square() + scale * (B * (2 * cross + scale * (B @ gram))).sum(1)
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _group_products(flat: Sequence[Any]) -> list[Product]:
    return [Product(*flat[i : i + WIDTH]) for i in range(0, len(flat), WIDTH)]


def _gated(h: Tensor, gate: Tensor | None) -> Tensor:
    return h if gate is None else h * gate.to(h.dtype)  # (t, r)


def _last(h: Tensor, gate: Tensor | None, core: Tensor | None) -> Tensor:
    gated = _gated(h, gate)
    return gated if core is None else gated @ core.to(h.dtype).T  # (t, q)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype if autocast is on, otherwise x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A block without autocast. Where autocast is off anyway nothing is entered: in a small layer that can be felt."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def flat_rows(x: Tensor) -> Tensor:
    """x as a matrix: (..., n) -> (t, n)."""
    return x.reshape(-1, x.shape[-1])


def unflattened(y: Tensor, x: Tensor) -> Tensor:
    """y (t, m) in the shape of x (..., n): (..., m), for the result of a Function.

    It has the storage of y, and counts as a tensor of its own: some models add to a layer's result in place (Falcon),
    which autograd forbids for a view of what a Function made.
    """
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))


def base_linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the dtype of x: x (t, n), w (m, n) -> (t, m)."""
    return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _all_A(A: Tensor, bank_A: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (A if bank_A is None else torch.cat([A, bank_A])).to(dtype)  # (r + k, n)


def _all_B(B: Tensor, bank_B: Tensor | None, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    if out is not None:
        return B.to(dtype) * out.to(dtype)[:, None]  # (m, q)
    return (B if bank_B is None else torch.cat([B, bank_B], 1)).to(dtype)  # (m, r + k)
