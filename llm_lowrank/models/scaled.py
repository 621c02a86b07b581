"""Weights that a checkpoint stores in 8 bits with scales beside them, decoded row by row.

    W[i, j] = code[i, j] * scale[i // a, j // b]           a x b: the elements that share a scale

Two layouts are read:

    fp8                  DeepSeek, Qwen, transformers: X.weight float8, X.weight_scale_inv with one scale for each block
                         of `weight_block_size`, 128 x 128 as a rule, or one scale for the whole weight. In spite of its
                         name the scale is multiplied.
    compressed-tensors   llm-compressor, vLLM: X.weight float8 or int8, X.weight_scale with one scale for the whole
                         weight, for each row ("channel") or for each block; symmetric, so that there is no zero point.

https://huggingface.co/docs/transformers/quantization/finegrained_fp8
https://huggingface.co/docs/transformers/quantization/compressed_tensors

Scales of activations (input_scale, activation_scale) are for a product in 8 bits. Here products are computed in the
recipe's dtype, so that these scales are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_lowrank.models.part import START_OVER, Part, whole

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
READ = "bitsandbytes nf4, fp8 with weight_scale_inv, and fp8 or symmetric int8 of compressed-tensors are read"
ACTIVATIONS = ("input_scale", "output_scale", "activation_scale", "input_zero_point", "output_zero_point")


@dataclass(frozen=True)
class ScaledWeight:
    """One weight (m, n) in codes of 8 bits. `dtype` is what it is decoded to: the dtype that the config names."""

    dtype: torch.dtype
    shape: list[int]
    codes: Part
    scales: Part
    block: tuple[int, int]  # rows and columns that share a scale

    def rows(self, start: int, stop: int) -> Tensor:
        """Decode the rows start .. stop, (rows, n), from the bytes of these rows and the scales."""
        (m, n), (a, b) = self.shape, self.block
        scales = whole(self.scales).float().reshape(-(-m // a), -(-n // b))
        of_rows = scales[torch.arange(start, stop) // a]  # (rows, n / b)
        return (self.codes.rows(start, stop).float() * of_rows.repeat_interleave(b, 1)[:, :n]).to(self.dtype)


@dataclass(frozen=True)
class Layout:
    """What a checkpoint's config says about its codes and scales."""

    scale: str  # name of the scales behind the module's name
    codes: tuple[torch.dtype, ...]
    # rows and columns that share a scale; 0: all of them
    block: tuple[int, int]


def layout(path: Path, quantization: Mapping[str, Any]) -> Layout:
    """Return the layout that the config announces. ValueError if it is none of those that are read."""
    method = str(quantization.get("quant_method"))
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise ValueError(f"{path}: weight_block_size {block} is not read, only two numbers are; {START_OVER}")
        return Layout("weight_scale_inv", FP8, tuple(block) if block else (0, 0))
    kinds = {_compressed(path, group.get("weights") or {}) for group in _groups(path, quantization)}
    if len(kinds) != 1:
        raise ValueError(
            f"{path}: its quantization has {len(kinds)} groups of weights that differ, one is read; {START_OVER}"
        )
    return kinds.pop()


def _groups(path: Path, quantization: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The groups of a compressed-tensors config."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{path}: its compressed-tensors config names no config_groups; {START_OVER}")
    stored = quantization.get("format")
    if stored not in ("float-quantized", "int-quantized", "naive-quantized"):
        raise ValueError(f"{path} stores compressed-tensors weights of format {stored}; {READ}; {START_OVER}")
    if quantization.get("sparsity_config"):
        raise ValueError(f"{path} stores sparse compressed-tensors weights, which are not read; {START_OVER}")
    return list(groups.values())


def _compressed(path: Path, weights: Mapping[str, Any]) -> Layout:
    """The layout of one group of compressed-tensors."""
    kind, strategy = (weights.get("type"), weights.get("num_bits")), weights.get("strategy")
    known: dict[Any, tuple[torch.dtype, ...]] = {("float", 8): FP8, ("int", 8): (torch.int8,)}
    codes = known.get(kind)
    block: dict[Any, Any] = {"tensor": (0, 0), "channel": (1, 0), "block": weights.get("block_structure")}
    if codes is None or weights.get("symmetric") is False or not block.get(strategy):
        symmetric = "symmetric" if weights.get("symmetric", True) else "asymmetric"
        raise ValueError(
            f"{path} stores weights of compressed-tensors as {kind[0]} of {kind[1]} bits, {symmetric}, with scales by "
            f"{strategy}; {READ}; {START_OVER}"
        )
    return Layout("weight_scale", codes, tuple(block[strategy]))


def collect(
    path: Path, quantization: Mapping[str, Any], stored: Mapping[str, Part], dtype: torch.dtype
) -> tuple[dict[str, ScaledWeight], set[str]]:
    """Return the weights with codes among the stored tensors, and the names of the tensors that only describe them."""
    wanted = layout(path, quantization)
    weights: dict[str, ScaledWeight] = {}
    beside: set[str] = set()
    for name in stored:
        module, _, kind = name.rpartition(".")
        if kind == wanted.scale:
            key = f"{module}.weight"
            weights[key] = _weight(f"{path}: {key}", wanted, stored.get(key), stored[name], dtype)
            beside.add(name)
        elif kind in ACTIVATIONS:
            beside.add(name)
    if not weights:
        raise ValueError(
            f"{path}: config.json speaks of {quantization.get('quant_method')} weights, but there is no tensor named "
            f"{wanted.scale}; if all weights are plain, delete its quantization_config"
        )
    return weights, beside


def _weight(where: str, wanted: Layout, codes: Part | None, scales: Part, dtype: torch.dtype) -> ScaledWeight:
    if codes is None:
        raise ValueError(f"{where} is missing, only its {wanted.scale} is there; download the checkpoint again")
    if codes.dtype not in wanted.codes or len(codes.shape) != 2:
        raise ValueError(
            f"{where} is stored as {_name(codes.dtype)} {codes.shape} with scales, not as a matrix of "
            f"{' or '.join(map(_name, wanted.codes))}; {START_OVER}"
        )
    m, n = codes.shape
    a, b = (size or whole_size for size, whole_size in zip(wanted.block, (m, n), strict=True))
    count = scales.shape
    # a column of scales may be written flat, and one scale as a number
    expected = -(-m // a), -(-n // b)
    if not scales.dtype.is_floating_point or [k for k in count if k != 1] != [k for k in expected if k != 1]:
        raise ValueError(
            f"{where} {codes.shape} has scales {_name(scales.dtype)} {count}, not {list(expected)} for blocks of "
            f"{a} x {b}; download the checkpoint again"
        )
    return ScaledWeight(dtype, list(codes.shape), codes, scales, (a, b))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
