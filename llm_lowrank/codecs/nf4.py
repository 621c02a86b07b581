"""W in 4 bits per element and one scale per 64 elements: the NF4 of QLoRA, stored so that every row stands alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from llm_lowrank.codecs.base import Quantized, absmax, align, empty_parts, from_bytes, row_slices, to_bytes

BLOCK = 64  # elements that share a scale
MULTIPLIES = ("cuda",)  # devices on which bitsandbytes' product with codes is a kernel of its own


@dataclass(frozen=True)
class Nf4(Quantized):
    """W_ij ~ s_ib t[c_ij],  b = j // 64,  s_ib = max |W_ij| over block b.

    c_ij is the index of the one of the 16 levels t that is nearest to W_ij / s_ib. The format is that of
    https://arxiv.org/abs/2305.14314 section 3; levels and kernels are those of bitsandbytes. With `double_quant` the
    scales of a row are stored in 8 bits,  s ~ lo + step q,  q = round((s - lo) / step),  step = (hi - lo) / 255, with
    lo and hi of that row alone. QLoRA shares them among 256 blocks, which would make rows depend on one another.

    N is n, rounded up to a multiple of 64; a row is filled with zeros.

    codes        uint8 (m, N / 2)       two to a byte, the left one in the high bits
    scales       uint8 (m, 4 N / 64)    float32 as bytes; with double_quant q itself, (m, N / 64)
    scale_range  uint8 (m, 8)           float32 lo and step as bytes, with double_quant only
    """

    name: ClassVar[str] = "nf4"
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes",)

    double_quant: bool = False

    def layout(self, n: int) -> dict[str, tuple[int, torch.dtype]]:
        blocks = -(-n // BLOCK)
        widths = {"codes": blocks * BLOCK // 2, "scales": blocks if self.double_quant else 4 * blocks}
        if self.double_quant:
            widths["scale_range"] = 8
        return {name: (width, torch.uint8) for name, width in widths.items()}

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        m, n = w.shape
        quantize = _quantize if w.device.type == "cpu" else _quantize_by_kernel
        parts = empty_parts(self, m, n, w.device)
        for rows in row_slices(w):
            block = torch.nn.functional.pad(w.detach()[rows].float(), (0, -n % BLOCK)).contiguous()  # (rows, N)
            parts["codes"][rows], scales = quantize(block)  # (rows, N / 2), (rows, N / 64)
            if self.double_quant:
                low = scales.amin(1, keepdim=True)
                step = (scales.amax(1, keepdim=True) - low) / 255  # (rows, 1); 0 where all scales of a row are equal
                parts["scale_range"][rows] = to_bytes(torch.cat([low, step], 1))
                parts["scales"][rows] = ((scales - low) / step.where(step > 0, 1)).round_().to(torch.uint8)
            else:
                parts["scales"][rows] = to_bytes(scales)
        return parts

    def decode(self, parts: dict[str, Tensor], n: int) -> Tensor:
        codes = parts["codes"]
        m, device = codes.shape[0], codes.device
        if m == 0:  # a rank may hold no row, and the kernels refuse an empty tensor
            return torch.empty(0, n, dtype=self.dtype, device=device)
        functional, shape = kernels(), torch.Size((m, -(-n // BLOCK) * BLOCK))
        state = functional.QuantState(
            self._scales(parts).flatten(), shape, levels(device), BLOCK, quant_type="nf4", dtype=self.dtype
        )
        # the codes are handed over as a column, for bitsandbytes returns the transpose of a single row
        w = functional.dequantize_4bit(align(codes).view(-1, 1), state)  # (m, N)
        return w[:, :n].contiguous()

    def multiplies(self, n: int, dtype: torch.dtype, device: torch.device) -> bool:
        # a row of whole blocks is stored as bitsandbytes stores it; the kernel decodes into the type of x
        return device.type in MULTIPLIES and n % BLOCK == 0 and dtype == self.dtype and _has_product()

    def multiply(self, x: Tensor, parts: dict[str, Tensor], n: int, bias: Tensor | None) -> Tensor:
        codes, scales = align(parts["codes"]), self._scales(parts)
        shape, b = (len(codes), n), None if bias is None else bias.to(x.dtype)
        return torch.ops.bitsandbytes.gemm_4bit(x, codes.view(-1, 1), shape, scales.flatten(), BLOCK, "nf4", b)

    def _scales(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the scales in float32: (m, N / 64)."""
        if not self.double_quant:
            return from_bytes(parts["scales"])
        low, step = from_bytes(parts["scale_range"]).split(1, 1)  # (m, 1) each
        return low + step * parts["scales"]


def _quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of bitsandbytes, bit for bit, 4 times as fast on a CPU.

    x (m, N) -> codes uint8 (m, N / 2), scales (m, N / 64);  c = #{midpoints of neighbouring levels below x / s}.
    Counting 15 comparisons is vectorized if their result is float32; torch's comparisons into bool and the binary
    search of `torch.bucketize` are not.
    """
    scales = absmax(x.view(x.shape[0], -1, BLOCK))  # (m, N / 64, 1)
    steps = levels(x.device)
    scaled = (x.view(x.shape[0], -1, BLOCK) * (1.0 / scales.clamp(min=1e-38))).view(x.shape)
    above, codes = torch.empty_like(scaled), torch.zeros_like(scaled)  # (m, N)
    for midpoint in ((steps[:-1] + steps[1:]) / 2).tolist():
        codes += torch.gt(scaled, midpoint, out=above)
    return (16 * codes[:, ::2] + codes[:, 1::2]).to(torch.uint8), scales.squeeze(-1)


def _quantize_by_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same as `_quantize`, by the kernel that bitsandbytes has for x's device."""
    absmax(x)  # it refuses NaN, which a kernel may encode without a complaint
    codes, state = kernels().quantize_4bit(x, blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return codes.view(x.shape[0], -1), state.absmax.view(x.shape[0], -1)


@cache
def levels(device: torch.device) -> Tensor:
    """Return the 16 levels t in ascending order, -1 to 1."""
    return kernels().get_4bit_type("nf4", device=device)


@cache
def _has_product() -> bool:
    """Return whether this bitsandbytes has a product with codes."""
    kernels()  # importing it defines its operators
    return hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def kernels() -> ModuleType:
    """Import bitsandbytes.functional when it is first used: that takes seconds, and only this codec needs it."""
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError("codec: nf4 needs bitsandbytes: pip install bitsandbytes") from error
    return functional
