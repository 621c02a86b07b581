"""Quantized checkpoints: how a config announces them, and the 4 bits of bitsandbytes, read without quantizing again.

    W[i, j] = map[code[i, j]] * absmax[i, j // 64]
    absmax[b] = nested_map[byte[b]] * nested_absmax[b // 256] + offset     if absmax is quantized too; b counts by rows

https://arxiv.org/abs/2305.14314: map is nf4, 16 quantiles of a normal distribution. A file stores a quantized weight
(m, n) as

    X.weight                                uint8 (m n / 2, 1): two codes a byte, the first in the high bits (or the
                                            same bytes as wider words)
    X.weight.absmax                         float32 (m n / 64,), or uint8 if nested
    X.weight.quant_map                      float32 (16,)
    X.weight.quant_state.bitsandbytes__nf4  JSON as uint8: quant_type, blocksize, dtype, shape, nested_blocksize,
                                            nested_offset, ...
    X.weight.nested_absmax                  float32 (m n / 64 / 256,), only if nested
    X.weight.nested_quant_map               float32 (256,), only if nested

As n is a multiple of 64, no block crosses a row, and any rows can be decoded from their own bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_lowrank.codecs.base import to_bytes
from llm_lowrank.codecs.nf4 import BLOCK, Nf4, kernels, levels
from llm_lowrank.models import scaled
from llm_lowrank.models.part import START_OVER, Part, whole
from llm_lowrank.models.scaled import READ, ScaledWeight

KIND = ".quant_state.bitsandbytes__"
STATE = f"{KIND}nf4"
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)


@dataclass(frozen=True)
class Nf4Weight:
    """One quantized weight (m, n), with the dtype that it had before."""

    dtype: torch.dtype
    shape: list[int]
    words: Part  # the codes
    absmax: Part
    nested: Nested | None

    def rows(self, start: int, stop: int) -> Tensor:
        """Decode the rows start .. stop, (rows, n), from the bytes of these rows only."""
        return Nf4(self.dtype).decode(self.parts(start, stop), self.shape[1])

    def parts(self, start: int, stop: int) -> dict[str, Tensor]:
        """Read the rows start .. stop as the parts of Nf4.

        codes uint8 (rows, n / 2), scales float32 (rows, n / 64) as bytes.
        """
        rows, n = stop - start, self.shape[1]
        words, blocks = n // 2 // self.words.dtype.itemsize, n // BLOCK  # in a row
        codes = self.words.rows(start * words, stop * words).view(torch.uint8)
        scales = self.absmax.rows(start * blocks, stop * blocks)  # (rows n / 64,)
        if self.nested is not None:
            scales = self.nested.decode(scales, start * blocks)
        return {"codes": codes.view(rows, n // 2), "scales": to_bytes(scales.view(rows, blocks))}


@dataclass(frozen=True)
class Nested:
    """map[byte[b]] * absmax[b // blocksize] + offset: how the scales themselves were quantized."""

    map: Part
    absmax: Part
    blocksize: int
    offset: float

    def decode(self, stored: Tensor, first: int) -> Tensor:
        """Decode the scales first, first + 1, ... from their bytes."""
        block = torch.arange(first, first + len(stored)) // self.blocksize
        return whole(self.map)[stored.int()] * whole(self.absmax)[block] + self.offset


# Keys of a config, at any depth, that announce weights in codes.
ANNOUNCED = re.compile(r"quantization_config|compression_config|quantization|quant_config|quantize_config|quant_method")
# Files that other tools write beside config.json for the same purpose.
FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")


def announcement(path: Path) -> Mapping[str, Any] | None:
    """What a checkpoint's config says about quantization, None if it says nothing.

    ValueError if it says so in a way that is not read.
    """
    found = _announced(json.loads((path / "config.json").read_text(encoding="utf-8")))
    if found is None:
        for file in FILES:
            if (path / file).is_file():
                raise ValueError(
                    f"{path} has a {file}, so its weights are quantized, and config.json does not say how; {START_OVER}"
                )
        return None
    key, quantization = found
    if not isinstance(quantization, Mapping):
        raise ValueError(f"{path}: config.json has {key}: {quantization!r}, which is not read; {START_OVER}")
    return quantization


def _announced(config: Mapping[str, Any]) -> tuple[str, Any] | None:
    for key, value in config.items():
        if ANNOUNCED.fullmatch(key) and value:
            return key, value
    inner = (_announced(value) for value in config.values() if isinstance(value, Mapping))
    return next((found for found in inner if found is not None), None)


def without_announcement(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config for a checkpoint whose weights are written plainly."""
    return {
        key: without_announcement(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not ANNOUNCED.fullmatch(key)
    }


def decode_all(
    path: Path, quantization: Mapping[str, Any], stored: Mapping[str, Part], dtype: torch.dtype
) -> tuple[dict[str, Nf4Weight | ScaledWeight], set[str]]:
    """Return the quantized weights among the stored tensors, and the names of the tensors that only describe them.

    dtype: what weights in 8 bits are decoded to. ValueError for a kind of quantization that is not read.
    """
    if quantization.get("quant_method") in ("fp8", "compressed-tensors"):
        in_bytes, beside = scaled.collect(path, quantization, stored, dtype)
        return {**in_bytes}, beside
    check_config(path, quantization)
    in_4_bits, beside = collect(path, stored)
    return {**in_4_bits}, beside


def check_config(path: Path, quantization: Mapping[str, Any]) -> None:
    """Raise ValueError for every quantized checkpoint except nf4 of bitsandbytes."""
    method = str(quantization.get("quant_method", "unknown method"))
    if method == "bitsandbytes" and quantization.get("load_in_4bit"):
        method = str(quantization.get("bnb_4bit_quant_type"))
        if method == "nf4":
            return
    elif method == "bitsandbytes":
        method = "bitsandbytes int8"
    raise ValueError(f"{path} stores quantized weights ({method}); {READ}; {START_OVER}")


def collect(path: Path, stored: Mapping[str, Part]) -> tuple[dict[str, Nf4Weight], set[str]]:
    """Return the quantized weights among the stored tensors, and the names of the tensors that only describe them."""
    try:
        kernels()  # a missing package is reported before a file needs it
    except ImportError as error:
        raise ValueError(
            f"reading a checkpoint in 4 bits needs bitsandbytes ({error}): pip install bitsandbytes"
        ) from error
    weights: dict[str, Nf4Weight] = {}
    beside: set[str] = set()
    for key in stored:
        name, separator, kind = key.partition(KIND)
        if separator:
            if kind != "nf4":
                raise ValueError(f"{path}: {name} is stored in {kind}, of 4 bit types only nf4 is read; {START_OVER}")
            weights[name] = _weight(f"{path}: {name}", name, stored)
            beside |= {name + end for end in BESIDE}
    if not weights:
        raise ValueError(
            f"{path}: config.json speaks of nf4 weights but there are none; if all are plain, delete its "
            "quantization_config"
        )
    return weights, beside


def _weight(where: str, name: str, stored: Mapping[str, Part]) -> Nf4Weight:
    try:
        words, absmax, quant_map = (stored[name + end] for end in ("", ".absmax", ".quant_map"))
        state = json.loads(bytes(whole(stored[name + STATE]).numpy()))
        dtype, shape, blocksize = getattr(torch, state["dtype"]), state["shape"], state["blocksize"]
        nested = None
        if f"{name}.nested_absmax" in stored:
            map_, scales = stored[f"{name}.nested_quant_map"], stored[f"{name}.nested_absmax"]
            nested = Nested(map_, scales, state["nested_blocksize"], state["nested_offset"])
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{where} is not described completely ({error}); download the checkpoint again") from error
    if blocksize != BLOCK:
        raise ValueError(f"{where} is quantized in blocks of {blocksize}, only {BLOCK} is read; {START_OVER}")
    if len(shape) != 2 or shape[1] % BLOCK:
        raise ValueError(f"{where} has shape {shape}, not rows of whole blocks of {BLOCK}; {START_OVER}")
    nf4 = levels(torch.device("cpu"))
    # the same tolerance as in bitsandbytes
    if quant_map.shape != [16] or not torch.allclose(whole(quant_map), nf4, rtol=0, atol=1e-6):
        raise ValueError(f"{where} has a quant_map that is not that of nf4; {START_OVER}")
    blocks = shape[0] * shape[1] // BLOCK
    stored_as = words.dtype.itemsize * words.shape[0], absmax.dtype, absmax.shape
    if stored_as != (blocks * BLOCK // 2, torch.uint8 if nested else torch.float32, [blocks]) or (
        nested and nested.absmax.shape != [-(-blocks // nested.blocksize)]
    ):
        raise ValueError(
            f"{where} has codes or scales that do not fit its shape {shape}; download the checkpoint again"
        )
    return Nf4Weight(dtype, shape, words, absmax, nested)
