"""W in 8 bits per element and one scale per row: the vector-wise absmax of LLM.int8()."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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
