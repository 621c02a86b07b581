"""A tensor in a file, as the readers of quantized weights see it, and what cannot be a weight that is trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

START_OVER = "start from the unquantized checkpoint"
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Last names of tensors that no plain model has: codes and scales of GPTQ, AWQ, HQQ, AQLM, bitsandbytes, torchao, quanto
# and compressed-tensors.
CODES = re.compile(
    r"qweight|qzeros|g_idx|W_q|SCB|codebooks?|absmax|quant_map|nested_(absmax|quant_map)|bitsandbytes__\w+|"
    r"weight_(packed|shape|scale\w*|zero_point\w*|zeros?|global_scale|g_idx|format|qdata|min|max)|"
    r"_weight_(qdata|scale\w*|zero_point\w*)|scale_inv"
)
# Last names that are scales if a matrix `weight` lies beside them; alone they may be anything.
BESIDE = re.compile(r"scales?|scaling_factor|zeros?|zero_points?|zp|_data|_scale|_shift")


class Part(Protocol):
    """A tensor in a file."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def shape(self) -> list[int]: ...
    def rows(self, start: int, stop: int) -> Tensor: ...


def whole(part: Part) -> Tensor:
    """Read all of a tensor."""
    return part.rows(0, part.shape[0]) if part.shape else part.rows(0, 1)


def refuse_codes(path: Path, tensors: Mapping[str, Part]) -> None:
    """Raise ValueError if a tensor named weight holds no plain numbers, or if a tensor looks like codes or scales.

    Whoever reads a quantized checkpoint takes its tensors out first: what is left would be trained on as it stands.
    """
    for name, part in tensors.items():
        if name.rpartition(".")[2] == "weight" and part.dtype not in PLAIN:
            raise ValueError(
                f"{path}: {name} is stored as {str(part.dtype).removeprefix('torch.')}, which are codes of a quantized "
                f"weight, and config.json does not say how to read them; {START_OVER}"
            )
    for name in tensors:
        module, _, kind = name.rpartition(".")
        owner = tensors.get(f"{module.removesuffix('.weight')}.weight")
        if CODES.fullmatch(kind) or (BESIDE.fullmatch(kind) and owner is not None and len(owner.shape) > 1):
            raise ValueError(
                f"{path}: {name} looks like the scales or codes of a quantized weight, and config.json does not say "
                f"how to read them: the stored numbers are not the weights of the model; {START_OVER}"
            )
