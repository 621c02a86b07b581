"""Codecs: rows stand alone bit for bit, errors stay within the half step of each format, and what bitsandbytes stores
is what we store.
"""

import subprocess
import sys
from typing import get_args

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_lowrank.codecs import CODECS as TABLE
from llm_lowrank.codecs import Codec, CodecName, Dense, Int8, Nf4, make
from llm_lowrank.codecs import nf4 as nf4_module
from llm_lowrank.codecs.nf4 import _quantize, _quantize_by_kernel
from tests import tiny

pytestmark = pytest.mark.quick

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTIZED = [codec for dtype in DTYPES for codec in (Nf4(dtype), Nf4(dtype, double_quant=True), Int8(dtype))]
OTHERS = [kind(dtype) for dtype in DTYPES for kind in TABLE.values() if kind not in (Dense, Nf4, Int8)]
CODECS = QUANTIZED + OTHERS + [Dense(dtype) for dtype in [*DTYPES, torch.float64]]
SHAPES = [(43, 42), (14, 42), (42, 43), (7, 130), (1, 64), (1, 1), (3, 128), (576, 1536)]
LEVELS = bnb.get_4bit_type("nf4", device="cpu")
HALF_GAP = (LEVELS[1:] - LEVELS[:-1]).max().item() / 2  # 0.3038 / 2, between the two lowest levels


def normal(m: int, n: int, seed: int = 0) -> Tensor:
    """Rows of very different sizes, so that a scale taken from a neighbour shows."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=rng) * torch.logspace(-3, 2, m)[torch.randperm(m, generator=rng)][:, None]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def in_blocks(w: Tensor) -> Tensor:
    """(m, n) -> (m, blocks, 64), zeros at the end of a row."""
    return torch.nn.functional.pad(w, (0, -w.shape[1] % 64)).view(w.shape[0], -1, 64)


def rounding(codec: Codec, w: Tensor) -> Tensor:
    """Half a unit in the last place of the decoded type, and the float32 arithmetic before it."""
    limits = torch.finfo(codec.dtype)
    return w.abs() * (limits.eps + 1e-6) + limits.smallest_normal * limits.eps


def in_a_byte_buffer(parts: dict[str, Tensor], offset: int) -> dict[str, Tensor]:
    """The parts one after another in one flat buffer of bytes, as a sharding engine keeps them, the first `offset`
    bytes from its start.
    """
    flat = torch.cat(
        [torch.zeros(offset, dtype=torch.uint8), *(part.flatten().view(torch.uint8) for part in parts.values())]
    )
    views, start = {}, offset
    for name, part in parts.items():
        stop = start + part.numel() * part.element_size()
        views[name] = flat[start:stop].view(part.dtype).view(part.shape)
        start = stop
    return views


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:-1], (0, 42)], ids=str)
def test_layout_tells_what_encode_makes(codec, shape):
    m, n = shape
    w = normal(m, n)
    parts = codec.encode(w)
    assert {name: (part.shape, part.dtype) for name, part in parts.items()} == {
        name: ((m, width), dtype) for name, (width, dtype) in codec.layout(n).items()
    }
    assert all(part.is_contiguous() for part in parts.values())
    decoded = codec.decode(parts, n)
    assert decoded.shape == shape and decoded.dtype == codec.dtype and decoded.is_contiguous()


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_stand_alone_bit_for_bit(codec, shape):
    m, n = shape
    w = normal(m, n)
    parts = codec.encode(w)
    whole = codec.decode(parts, n)
    for a, b in [(0, 1), (0, m // 2), (m // 3, m // 3 + 1), (m // 2, m), (m, m)]:
        alone = codec.encode(w[a:b])
        assert all(same(alone[name], part[a:b]) for name, part in parts.items()), (a, b)
        assert same(codec.decode({name: part[a:b] for name, part in parts.items()}, n), whole[a:b]), (a, b)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(QUANTIZED),
    st.integers(1, 9),
    st.integers(1, 200),
    st.integers(0, 99),
    st.sampled_from([1e-20, 1.0, 1e30]),
)
def test_error_is_at_most_half_a_step(codec, m, n, seed, size):
    if codec.dtype == torch.float16:
        size = 1.0
    w = normal(m, n, seed) * size
    parts = codec.encode(w)
    error = (codec.decode(parts, n).float() - w).abs()
    blocks = in_blocks(w).abs().amax(2)  # (m, blocks)
    if isinstance(codec, Int8):
        bound = (w.abs().amax(1, keepdim=True) / 254).expand(m, n)
    else:
        bound = (HALF_GAP * blocks).repeat_interleave(64, 1)[:, :n]
        if codec.double_quant:  # levels are at most 1, so an error of the scale is one of the element at most
            bound = bound + (blocks.amax(1) - blocks.amin(1))[:, None] / 510
    assert (error <= bound * (1 + 1e-5) + rounding(codec, w.abs() + bound)).all(), (error - bound).max()


@pytest.mark.parametrize("shape", [(43, 64), (1, 64), (1, 128), (100, 192), (576, 1536)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nf4_is_that_of_bitsandbytes(shape, dtype):
    w = normal(*shape)
    w[0, :64] = 0
    w[-1, -1] = 1e-39  # below the smallest scale that has a reciprocal
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    parts = Nf4(dtype).encode(w)
    assert same(parts["codes"], packed.view(shape[0], -1))
    assert same(parts["scales"].view(torch.float32), state.absmax.view(shape[0], -1))
    state.dtype = dtype
    assert same(Nf4(dtype).decode(parts, shape[1]), bnb.dequantize_4bit(packed, state))


def test_nf4_chooses_as_bitsandbytes_at_and_beside_every_midpoint():
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    above, below = (middle.nextafter(torch.tensor(towards)) for towards in (2.0, -2.0))
    x = torch.cat([LEVELS, middle, above, below, torch.zeros(3)])[None]  # (1, 64)
    for block in (x, -x, x * 3e38, x * 0.1, x * 1e-30):
        for ours, theirs in zip(_quantize(block), _quantize_by_kernel(block), strict=True):
            assert same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [64, 42, 130])
def test_nf4_decodes_with_one_rounding(dtype, n):
    parts = Nf4().encode(normal(20, n))
    exact = Nf4().decode(parts, n)
    packed = parts["codes"].long()
    by_hand = (
        LEVELS[torch.stack([packed >> 4, packed & 15], 2)].view(20, -1, 64)
        * parts["scales"].view(torch.float32)[..., None]
    )
    assert same(exact, by_hand.view(20, -1)[:, :n])
    assert same(Nf4(dtype).decode(parts, n), exact.to(dtype))


@pytest.mark.parametrize("n", [1, 42, 65])
@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_padding_is_zeros_and_is_cut_off(n, double_quant):
    codec, w = Nf4(double_quant=double_quant), normal(5, n)
    padded = in_blocks(w).view(5, -1)
    parts = codec.encode(w)
    assert all(same(part, parts[name]) for name, part in codec.encode(padded).items())
    whole = codec.decode(parts, padded.shape[1])
    assert same(codec.decode(parts, n), whole[:, :n]) and not whole[:, n:].any()


def test_double_quant_keeps_the_codes_and_the_scales_to_half_a_step():
    w = normal(31, 1536)
    plain, double = Nf4().encode(w), Nf4(double_quant=True).encode(w)
    assert same(plain["codes"], double["codes"])
    s, kept = Nf4()._scales(plain), Nf4(double_quant=True)._scales(double)  # (31, 24)
    low, high = s.amin(1, keepdim=True), s.amax(1, keepdim=True)
    assert ((kept - s).abs() <= (high - low) / 510 + 1e-6 * high).all()
    assert same(kept.amin(1, keepdim=True), low)
    assert double["scales"].unique().numel() > 200  # all 8 bits are used


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-39, 3e38])
@pytest.mark.parametrize("n", [40, 128])
def test_double_quant_of_equal_scales_is_exact(value, n):
    w, plain, double = torch.full((3, n), value), Nf4(), Nf4(double_quant=True)
    assert same(plain.decode(plain.encode(w), n), double.decode(double.encode(w), n))


@pytest.mark.parametrize("n", [1, 42, 1536])
def test_int8_is_that_of_bitsandbytes(n):
    w = normal(43, n)
    codes, absmax, _ = bnb.int8_vectorwise_quant(w)
    parts = Int8().encode(w)
    assert same(parts["codes"], codes) and same(parts["scales"].view(torch.float32).flatten(), absmax)
    torch.testing.assert_close(Int8().decode(parts, n), bnb.int8_vectorwise_dequant(codes, absmax), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_decodes_with_one_rounding(dtype):
    parts = Int8().encode(normal(43, 42))
    assert same(Int8(dtype).decode(parts, 42), Int8().decode(parts, 42).to(dtype))


def test_int8_holds_the_largest_and_the_smallest_rows():
    w = torch.tensor([[3.4e38, -3.4e38, 1e38], [1e-37, 0, -3e-38], [1e-44, 0, -1e-44], [0, 0, 0], [1e-30, 0, 5e-31]])
    decoded = Int8().decode(Int8().encode(w), 3)
    assert decoded.isfinite().all()
    assert ((decoded - w).abs() <= w.abs().amax(1, keepdim=True).clamp(min=1e-36) / 254 * (1 + 1e-4)).all()


@pytest.mark.parametrize("codec", QUANTIZED, ids=str)
@pytest.mark.parametrize("n", [42, 128])
def test_zeros_stay_zeros(codec, n):
    w = normal(6, n)
    w[2] = 0
    w[4, :64] = 0
    decoded = codec.decode(codec.encode(w), n)
    assert decoded.isfinite().all() and not decoded[2].any() and not decoded[4, :64].any()
    zeros = torch.zeros(3, n)
    assert same(codec.decode(codec.encode(zeros), n), zeros.to(codec.dtype))


@pytest.mark.parametrize("codec", [Nf4(), Nf4(double_quant=True), Int8()], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_what_no_scale_can_hold_is_refused(codec, value):
    w = normal(5, 70).double()
    w[3, 65] = value
    with pytest.raises(ValueError, match="NaN, infinity or a value beyond float32"):
        codec.encode(w)


def test_the_kernel_path_refuses_too():
    with pytest.raises(ValueError, match="NaN"):
        _quantize_by_kernel(torch.full((1, 64), torch.nan))


@pytest.mark.parametrize("codec", QUANTIZED, ids=str)
def test_a_rank_without_rows(codec):
    parts = codec.encode(torch.zeros(0, 42))
    assert all(part.shape[0] == 0 for part in parts.values())
    # an engine cannot tell an empty run's width
    for given_parts in (parts, {name: part.view(0, 0) for name, part in parts.items()}):
        empty = codec.decode(given_parts, 42)
        assert empty.shape == (0, 42) and empty.dtype == codec.dtype


@pytest.mark.parametrize("codec", QUANTIZED, ids=str)
@pytest.mark.parametrize("shape", [(5, 64), (5, 42), (1, 64), (4, 130)], ids=str)
def test_parts_may_lie_anywhere_in_a_flat_buffer(codec, shape):
    m, n = shape
    parts = codec.encode(normal(m, n))
    expected = codec.decode(parts, n)
    for offset in range(1, 5):
        assert same(codec.decode(in_a_byte_buffer(parts, offset), n), expected), offset
    apart = {name: torch.stack([part, part], 2)[..., 0] for name, part in parts.items()}  # not contiguous
    assert same(codec.decode(apart, n), expected)


@pytest.mark.parametrize("codec", QUANTIZED, ids=str)
@pytest.mark.parametrize("n", [42, 64])
def test_a_decoded_weight_is_fresh_memory_without_a_gradient(codec, n):
    parts = codec.encode(torch.nn.Parameter(normal(5, n)))
    before = {name: part.clone() for name, part in parts.items()}
    frozen = {name: torch.nn.Parameter(part, requires_grad=False) for name, part in parts.items()}
    first = codec.decode(frozen, n)
    assert not first.requires_grad and not any(part.requires_grad for part in parts.values())
    first.fill_(7)
    assert all(same(part, before[name]) for name, part in parts.items())
    assert not (codec.decode(parts, n) == 7).any()


@pytest.mark.parametrize("codec", QUANTIZED, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [70, 128])
def test_encoding_is_done_in_float32_whatever_comes_in(codec, dtype, n):
    w = normal(9, n).to(dtype)
    kept = w.clone()
    expected = codec.encode(w.float())
    for given_w in (w, w.T.contiguous().T, torch.stack([w, w], 2)[..., 0]):
        assert all(same(part, expected[name]) for name, part in codec.encode(given_w).items())
    assert same(w, kept)


def test_encoding_does_not_touch_a_float32_weight():
    w = normal(9, 128)
    kept = w.clone()
    for codec in QUANTIZED:
        codec.encode(w)
    assert same(w, kept)


def test_dense_takes_flat_runs_and_copies_nothing():
    run = normal(3, 7).flatten()[2:17]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parts = Dense(dtype).encode(run)
        assert same(parts["weight"], run.to(dtype)) and Dense(dtype).decode(parts, 7) is parts["weight"]
    assert Dense().encode(run)["weight"].data_ptr() == run.data_ptr()


def test_what_may_be_written_to():
    assert [c.writable for c in (Dense(), Dense(torch.bfloat16), Nf4(), Int8())] == [True, True, False, False]
    assert [c.holds_small_updates for c in (Dense(), Dense(torch.bfloat16), Nf4(), Int8())] == [
        True,
        False,
        False,
        False,
    ]


def test_make():
    assert make("dense", torch.bfloat16) == Dense(torch.bfloat16)
    assert make("int8", torch.bfloat16) == Int8(torch.bfloat16)
    assert make("nf4", torch.float16) == Nf4(torch.float16)
    assert make("nf4", torch.float16, double_quant=True) == Nf4(torch.float16, True)
    with pytest.raises(ValueError, match=r"int4 is unknown; use dense, .* or nf4"):
        make("int4", torch.float32)
    for name in ("dense", "int8"):
        with pytest.raises(ValueError, match="codec_double_quant: true is for codec: nf4"):
            make(name, torch.float32, double_quant=True)


def test_every_codec_of_the_table_is_a_choice_of_the_recipe_and_runs_under_the_laws():
    assert tuple(TABLE) == get_args(CodecName)
    assert {codec.name for codec in tiny.CODECS.values()} == set(TABLE)


def test_a_codec_names_the_packages_that_it_needs(monkeypatch):
    kinds = (Dense, Nf4, Int8)
    assert [kind.missing() for kind in kinds] == [[], [], []]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert [kind.missing() for kind in kinds] == [[], ["bitsandbytes"], []]


def test_bitsandbytes_is_needed_for_nf4_only():
    body = """
import sys
sys.modules["bitsandbytes"] = None
import torch
from llm_lowrank.codecs import Int8, Nf4
w = torch.ones(2, 3)
assert torch.equal(Int8().decode(Int8().encode(w), 3), w)
try:
    Nf4().encode(w)
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "pip install bitsandbytes" in result.stdout


def test_encoding_again_loses_a_small_update():
    """Why a quantized W is not writable: less than half of an update D is left after W + D was encoded again, if D is
    2 % of W or less in nf4, or 0.5 % or less in int8.

    What is lost may exceed D: an element that sets a scale keeps its update, and drags the other elements of its block
    along.
    """
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(512, 512, generator=rng)
    update = torch.randn(512, 8, generator=rng) @ torch.randn(8, 512, generator=rng)
    lost = {}
    for codec in (Nf4(), Int8()):
        stored = codec.decode(codec.encode(w), 512)
        for size in (0.1, 0.02, 0.005, 0.001):
            d = update * (size * w.norm() / update.norm())
            kept = codec.decode(codec.encode(stored + d), 512) - stored
            lost[codec.name, size] = ((kept - d).norm() / d.norm()).item()
    print(
        "\n|kept - D| / |D|",
        *(f"{name:5} |D| = {size:6.1%} |W|: lost {part:6.1%}" for (name, size), part in lost.items()),
        sep="\n",
    )
    assert all(lost["nf4", size] > 0.5 for size in (0.02, 0.005, 0.001))
    assert lost["int8", 0.001] > 0.5 and lost["int8", 0.005] > 0.5


# Products with codes. On the CPU bitsandbytes' operator decodes W too; only CUDA has a kernel of its own for it.

CPU = torch.device("cpu")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n", [(43, 64), (1, 64), (1, 128), (14, 192), (576, 1536)])
def test_a_product_with_codes_is_that_of_the_decoded_weight(monkeypatch, m, n, dtype, double_quant):
    codec = Nf4(dtype, double_quant=double_quant)
    assert not codec.multiplies(n, dtype, CPU)
    monkeypatch.setattr(nf4_module, "MULTIPLIES", ("cpu",))
    assert codec.multiplies(n, dtype, CPU)
    parts = codec.encode(normal(m, n))
    w = codec.decode(parts, n).double()
    random = torch.Generator().manual_seed(1)
    bias = torch.randn(m, generator=random)
    for shape in ((1,), (1, 1), (2, 3), (16,)):
        x = torch.randn(*shape, n, generator=random).to(dtype)
        for b in (None, bias):
            y = codec.multiply(x, parts, n, b)
            wanted = x.double() @ w.T + (0 if b is None else b.double())
            assert y.dtype == dtype and y.shape == (*shape, m)
            size = x.double().norm(dim=-1) * w.norm() + (0 if b is None else b.norm())
            error = (y - wanted).norm(dim=-1) / size
            assert error.max() <= 4 * torch.finfo(dtype).eps
    for offset in (1, 2, 4):  # as ZeRO-3 gathers them
        shifted = codec.multiply(x, in_a_byte_buffer(parts, offset), n, bias)
        assert torch.equal(shifted, codec.multiply(x, parts, n, bias))


def test_products_with_codes_are_refused_where_the_layout_or_the_type_is_another(monkeypatch):
    monkeypatch.setattr(nf4_module, "MULTIPLIES", ("cpu",))
    bf16, fp32 = torch.bfloat16, torch.float32
    assert not Nf4(bf16).multiplies(130, bf16, CPU)  # rows end within a block, and are filled up
    assert not Nf4(bf16).multiplies(128, fp32, CPU)  # W is rounded to bfloat16, and the kernel would not do that
    assert not Nf4(bf16).multiplies(128, bf16, torch.device("meta"))
    assert not any(codec.multiplies(128, codec.dtype, CPU) for codec in CODECS if not isinstance(codec, Nf4))
    nf4_module._has_product.cache_clear()
    monkeypatch.setattr(nf4_module.torch.ops, "bitsandbytes", object())  # an older one
    assert not Nf4(bf16).multiplies(128, bf16, CPU)
    nf4_module._has_product.cache_clear()
