"""The kernels of nf4 and int8:  pytest -m gpu tests/gpu

benchmarks/gpu.py runs the same checks, there on a CPU too. Not run by the ordinary test command, which has no GPU.
"""

from __future__ import annotations

import pytest
import torch

from llm_lowrank.codecs import Int8, Nf4
from llm_lowrank.numerics.functional import Product, adapter_linear

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda") if CUDA else torch.device("cpu")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]
CODECS = [
    Nf4(torch.bfloat16),
    Nf4(torch.bfloat16, double_quant=True),
    Int8(torch.bfloat16),
    Nf4(torch.float32),
    Int8(torch.float32),
]
SHAPES = [(43, 42), (7, 130), (1, 64), (4096, 1024)]
NF4 = [codec for codec in CODECS if isinstance(codec, Nf4)]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)


def random(*shape: int) -> torch.Tensor:
    """The same values on every device; no block of 64 is zero, whose codes bitsandbytes may choose freely."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@every_codec
@pytest.mark.parametrize("m, n", SHAPES)
def test_codes_decode_as_on_the_cpu(codec, m, n):
    """Codes may differ where a value lies on the edge between two levels; what they decode to may then differ by one
    level.
    """
    w = random(m, n)
    parts, wanted = codec.encode(w), codec.encode(w.cpu())
    assert {k: (v.shape, v.dtype) for k, v in parts.items()} == {k: (v.shape, v.dtype) for k, v in wanted.items()}
    assert all(v.device.type == DEVICE.type for v in parts.values())
    found = codec.decode(parts, n).cpu().float()
    # the same bytes, decoded by either device
    moved = codec.decode({k: v.to(DEVICE) for k, v in wanted.items()}, n).cpu().float()
    assert torch.allclose(moved, codec.decode(wanted, n).float(), rtol=2**-7, atol=1e-6)
    differ = (found != moved).float().mean()
    assert differ < 1e-3


@every_codec
def test_rows_are_independent(codec):
    w = random(96, 320)
    whole, part = codec.encode(w), codec.encode(w[32:64])
    assert all(torch.equal(whole[k][32:64], part[k]) for k in whole)
    assert torch.equal(codec.decode(whole, 320)[32:64], codec.decode(part, 320))


@every_codec
def test_views_at_odd_offsets_decode_alike(codec):
    """ZeRO-3 and FSDP2 gather several parts into one buffer of bytes."""
    parts = codec.encode(random(8, 128))
    shifted = {}
    for k, v in parts.items():
        buffer = torch.empty(v.numel() + 3, dtype=v.dtype, device=DEVICE)
        buffer[3:].copy_(v.flatten())
        shifted[k] = buffer[3:].view(v.shape)
    assert torch.equal(codec.decode(shifted, 128), codec.decode(parts, 128))


@every_codec
def test_the_fused_linear_over_codes_equals_the_dense_one(codec):
    m, n, r = 96, 128, 4
    parts = codec.encode(random(m, n) / n**0.5)
    w = codec.decode(parts, n)
    a, b = (random(*shape).requires_grad_() for shape in ((r, n), (m, r)))
    x = random(5, n).to(codec.dtype).requires_grad_()
    y = adapter_linear(
        x,
        tuple(parts.values()),
        decode=lambda *found: codec.decode(dict(zip(parts, found, strict=True)), n),
        products=[Product(a, b)],
        scale=0.5,
    )
    wanted = x @ w.T + 0.5 * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
    tolerance = 2**-6 if codec.dtype == torch.bfloat16 else 1e-5
    assert (y - wanted).norm() <= tolerance * wanted.norm()
    for one, two in zip(
        torch.autograd.grad(y.sum(), (x, a, b)), torch.autograd.grad(wanted.sum(), (x, a, b)), strict=True
    ):
        assert (one - two).norm() <= tolerance * two.norm()


@pytest.mark.parametrize("codec", NF4, ids=str)
def test_products_with_codes_are_those_of_the_decoded_weight(codec):
    """Of one row, of a few and of many, for which bitsandbytes has different kernels."""
    m, n = 1024, 512
    assert not CUDA or codec.multiplies(n, codec.dtype, DEVICE)
    parts, bias = codec.encode(random(m, n)), random(m)
    for rows in (1, 3, 16, 300):
        x = random(rows, n).to(codec.dtype)
        found, wanted = codec.multiply(x, parts, n, bias), x.double() @ codec.decode(parts, n).double().T + bias
        assert (found - wanted).norm() <= (2**-6 if codec.dtype == torch.bfloat16 else 1e-4) * wanted.norm()


CHECKS = (
    test_rows_are_independent,
    test_views_at_odd_offsets_decode_alike,
    test_the_fused_linear_over_codes_equals_the_dense_one,
)
