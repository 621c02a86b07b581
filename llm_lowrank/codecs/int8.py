"""W in 8 bits per element and one scale per row: the vector-wise absmax of LLM.int8()."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from llm_lowrank.codecs.base import Quantized, absmax, empty_parts, from_bytes, row_slices, to_bytes


@dataclass(frozen=True)
class Int8(Quantized):
    """W_ij ~ s_i c_ij / 127,  s_i = max_j |W_ij|,  c_ij = round(127 W_ij / s_i).

    https://arxiv.org/abs/2208.07339 section 2.1, without the outlier columns, which belong to activations. This is the
    formula of bitsandbytes' int8_vectorwise_quant in torch. The CUDA kernel of bitsandbytes takes float16 only, which
    would round W before it is encoded and overflow above 65504, and it divides by zero for a row of zeros. Here W is
    encoded in float32 and decoded with one rounding, by the same arithmetic on every device.

    codes   int8  (m, n)
    scales  uint8 (m, 4)    float32 s_i as bytes
    """

    name: ClassVar[str] = "int8"

    def layout(self, n: int) -> dict[str, tuple[int, torch.dtype]]:
        return {"codes": (n, torch.int8), "scales": (4, torch.uint8)}

    def encode(self, w: Tensor) -> dict[str, Tensor]:
        m, n = w.shape
        parts = empty_parts(self, m, n, w.device)
        for rows in row_slices(w):
            block = w.detach()[rows].float()  # (rows, n)
            # 127 / s must be finite, and a row of zeros has codes of zero
            scales = absmax(block).clamp(min=1e-36)  # (rows, 1)
            parts["codes"][rows] = (block * (127.0 / scales)).round_().to(torch.int8)
            parts["scales"][rows] = to_bytes(scales)
        return parts

    def decode(self, parts: dict[str, Tensor], n: int) -> Tensor:
        codes = parts["codes"]
        w = torch.empty(codes.shape[0], n, dtype=self.dtype, device=codes.device)
        # an accelerator reads 1 byte and writes 2 of an element in one kernel; a CPU is faster within its cache
        if codes.device.type != "cpu":
            return torch.mul(codes, from_bytes(parts["scales"]) / 127, out=w)
        for rows in row_slices(w):
            # s is divided before it is multiplied by c, for s c might overflow
            step = from_bytes(parts["scales"][rows]) / 127  # (rows, 1)
            w[rows] = codes[rows].float().mul_(step)
        return w

    def decode_fused(self, parts: dict[str, Tensor], n: int) -> Tensor:
        """Return the same by one kernel of torch's inductor, made for each shape when it is first used.

        Mixed types take torch's slow loops: 0.26 ms for a W of 14336 x 4096 on an H200, where its bytes take 0.06. Not
        by torch.compile, which would compile anew in backward, where other dispatch keys are set, and no more than 8
        times; and not for any shape at once, as a kernel would divide by an unknown n for every element.
        """
        codes = parts["codes"]
        step = from_bytes(parts["scales"]) / 127  # outside of the kernel, as inductor's division may round otherwise
        key = (codes.shape, codes.stride(), codes.device, self.dtype)
        if key not in _KERNELS:
            from torch import _inductor  # seconds, and only compiled runs need it

            _KERNELS[key] = _inductor.compile(torch.fx.symbolic_trace(_Product(self.dtype)), [codes, step])
        (w,) = _KERNELS[key](codes, step)
        return w


_KERNELS: dict[object, Callable[[Tensor, Tensor], Sequence[Tensor]]] = {}


class _Product(nn.Module):
    """s_i c_ij / 127: codes (m, n), step (m, 1) -> (m, n)."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, codes: Tensor, step: Tensor) -> tuple[Tensor]:
        return ((codes.float() * step).to(self.dtype),)
