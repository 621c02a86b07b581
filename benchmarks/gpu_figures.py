"""Seconds of the pieces of a step, one at a time: ceilings, decoding, a linear, attention, the loss."""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.gpu_device import CUDA, DEVICE, median_of, peak, reset_peak
from benchmarks.gpu_results import Results, Row
from llm_lowrank.codecs import Codec, Int8, Nf4
from llm_lowrank.models import loss
from llm_lowrank.models.attention import varlen
from llm_lowrank.numerics.functional import Product, adapter_linear

BF16 = torch.bfloat16


def random(*shape: int, trained: bool = False) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=BF16, requires_grad=trained)


def copy_rate(small: bool) -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    a, b = (torch.empty(2**24 if small else 2**31, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * a.numel() / median_of(lambda: b.copy_(a))


def ceilings(args: argparse.Namespace, results: Results) -> None:
    """What the memory and the matrix units can do at best."""
    k = 256 if args.small else 8192

    def product() -> Row:
        x, y = random(k, k), random(k, k)
        return {"TFLOP/s": 2e-12 * k**3 / median_of(lambda: x @ y)}

    results.cell("copy", lambda: {"TB/s": copy_rate(args.small) / 1e12})
    results.cell("bf16 product", product)


def shape(args: argparse.Namespace) -> tuple[int, int]:
    return (96, 128) if args.small else (14336, 4096)


def decode(args: argparse.Namespace, results: Results) -> None:
    """Decoding one W: the bytes that it has to read and write per second, as a share of a copy's."""
    m, n = shape(args)
    copied = copy_rate(args.small)

    def cell(codec: Codec, fused: bool = False) -> Row:
        w = random(m, n)
        parts = codec.encode(w)
        nbytes = sum(part.nbytes for part in parts.values()) + 2 * m * n
        decode = codec.decode_fused if fused else codec.decode
        assert torch.equal(decode(parts, n), codec.decode(parts, n))
        seconds = median_of(lambda: decode(parts, n))
        encoding = median_of(lambda: codec.encode(w), 1, 3)
        share = nbytes / seconds / copied
        return {"decode ms": 1e3 * seconds, "of copy": share, "encode ms": 1e3 * encoding}

    results.cell("nf4", partial(cell, Nf4(BF16)))
    results.cell("nf4, double", partial(cell, Nf4(BF16, double_quant=True)))
    results.cell("int8", partial(cell, Int8(BF16)))
    results.cell("int8, compiled", partial(cell, Int8(BF16), fused=True))  # as under torch_compile: true


def layer(args: argparse.Namespace, results: Results) -> None:
    """Forward and backward of one linear, of the attention of one layer, and of the output layer with the loss."""
    linear(args, results)
    attention(args, results)
    the_loss(args, results)


def linear(args: argparse.Namespace, results: Results) -> None:
    m, n = shape(args)
    w, x, g = random(m, n), random(args.tokens, n, trained=True), random(args.tokens, m)
    a, b = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((args.rank, n), (m, args.rank)))
    frozen = median_of(lambda: F.linear(x, w).backward(g))

    def ours() -> Row:
        y = partial(adapter_linear, x, (w,), decode=lambda p: p, products=[Product(a, b)], scale=1.0)
        seconds = median_of(lambda: y().backward(g))
        return {"ms": 1e3 * seconds, "ratio": seconds / frozen}

    results.add("linear, frozen", ms=1e3 * frozen)
    results.cell("linear, lora", ours)


def attention(args: argparse.Namespace, results: Results) -> None:
    """One layer's attention, as it is without a mask, with one, and over 8 packed examples."""
    t, heads, groups, d = (64, 4, 2, 32) if args.small else (args.tokens, 32, 8, 128)
    q = random(1, heads, t, d, trained=True)
    k, v = (random(1, groups, t, d, trained=True) for _ in range(2))
    wide = [z.repeat_interleave(heads // groups, 1).detach().requires_grad_() for z in (k, v)]
    causal = torch.ones(t, t, dtype=torch.bool, device=DEVICE).tril()
    example = torch.arange(t, device=DEVICE) // (t // 8)
    starts = torch.arange(0, t + 1, t // 8, device=DEVICE, dtype=torch.int32)
    call = F.scaled_dot_product_attention

    g = random(1, heads, t, d)

    def masked(mask: torch.Tensor) -> Row:
        return {"ms": 1e3 * median_of(lambda: call(q, *wide, attn_mask=mask[None, None]).backward(g))}

    def packed() -> Row:
        def run() -> None:
            flat = [z[0].transpose(0, 1) for z in (q, *wide)]
            varlen(*flat, starts=starts, longest=t // 8, scaling=None).backward(g[0].transpose(0, 1))

        return {"ms": 1e3 * median_of(run)}

    def plain() -> Row:
        return {"ms": 1e3 * median_of(lambda: call(q, k, v, is_causal=True, enable_gqa=True).backward(g))}

    results.cell("attention, causal", plain)
    results.cell("attention, a mask", partial(masked, causal))
    results.cell("attention, packed, a mask", partial(masked, causal & (example[:, None] == example)))
    if CUDA:
        results.cell("attention, packed, varlen", packed)
    else:
        results.add("attention, packed, varlen", skipped="torch has this kernel for CUDA only")


def the_loss(args: argparse.Namespace, results: Results) -> None:
    """The loss in blocks of so many rows, and from whole logits."""
    v, n, t = (512, 128, 64) if args.small else (128256, 4096, args.tokens)
    output = nn.Linear(n, v, bias=False, device=DEVICE, dtype=BF16).requires_grad_(False)
    x, labels = random(1, t, n, trained=True), torch.randint(v, (1, t))

    def blocks() -> None:
        with loss.answering(output, labels):
            output(x).sum().backward()

    def whole() -> None:
        loss.nll(output(x)[0, :-1], labels[0, 1:].to(DEVICE)).backward()

    def cell(rows: int) -> Row:
        before, call = loss.block_rows, blocks if rows else whole
        loss.block_rows = lambda vocabulary, device: rows
        try:
            call()
            held = reset_peak()
            return {"ms": 1e3 * median_of(call, 2, 5), **peak(held)}
        finally:
            loss.block_rows = before

    for rows in (261, 256, 512, 1024):
        results.cell(f"loss, {rows} rows", partial(cell, rows))
    results.cell("loss, whole logits", partial(cell, 0))
