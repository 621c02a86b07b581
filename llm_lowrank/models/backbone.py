"""The quantized weights on which a run trained, as a file from which they are computed again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.codecs import Codec, make
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.models.loading import blocks, encode_rows
from llm_lowrank.numerics.files import stored_names, write_safetensors
from llm_lowrank.numerics.pairs import Pairs

BACKBONE = "backbone.safetensors"


@dataclass(frozen=True)
class Backbone:
    """The quantized weights on which a run trained: `output_dir/backbone.safetensors`.

        base = decode(encode(W0 + C)) - C        C: what was added to W before encoding, minus the starting pairs

    base + adapter is the trained layer. The base is computed from W0 and C row by row, as it was when the run loaded
    the model. No weights are stored.
    """

    codec: Codec
    modules: list[str]  # all quantized ones, adapted or not
    path: Path
    # The device that encoded the weights: on another one a value on the edge between two codes may get the other code.
    device: str

    @staticmethod
    def save(path: str | Path, model: torch.nn.Module) -> None:
        """Write the file. Call on rank 0, which has the ledgers."""
        quantized = {
            name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear) and not m.codec.writable
        }
        tensors: dict[str, Tensor] = {"none": torch.zeros(0)}  # a safetensors file cannot be empty
        for name, layer in quantized.items():
            if isinstance(layer, Adapter) and layer.ledger:
                start = layer.ledger[0].pairs()
                assert len(layer.ledger) == 1  # a quantized weight never changes after it was encoded
                tensors |= {f"{name}.B": start.B.contiguous(), f"{name}.A": start.A.contiguous()}
        codec = next(iter(quantized.values())).codec
        settings = {
            "name": codec.name,
            "dtype": str(codec.dtype),
            "double_quant": getattr(codec, "double_quant", False),
        }
        device = "cuda" if torch.cuda.is_available() else "cpu"
        notes = {"codec": json.dumps(settings), "modules": json.dumps(list(quantized)), "device": device}
        write_safetensors(path, tensors, {"format": "pt", **notes})

    @classmethod
    def open(cls, path: str | Path) -> Backbone:
        """Open the file of a run. Raise ValueError if it does not exist, is damaged or was not written by a run."""
        if not Path(path).is_file():
            raise ValueError(
                f"{path} does not exist: runs with codec nf4 or int8 write it, the only ones with a base to dequantize"
            )
        stored_names(path)  # refuses a damaged file
        with safe_open(path, framework="pt") as handle:
            notes = handle.metadata() or {}
        if "codec" not in notes:
            raise ValueError(f"{path} says nothing about a codec: it was not written by a run")
        settings = json.loads(notes["codec"])
        dtype = getattr(torch, settings["dtype"].removeprefix("torch."))
        codec = make(settings["name"], dtype, settings["double_quant"])
        return cls(codec, json.loads(notes["modules"]), Path(path), notes["device"])

    def base(self, name: str, w: Tensor) -> Tensor:
        """Return the base of a module in float32, given w = W0: (m, n) -> (m, n)."""
        with safe_open(self.path, framework="pt") as handle:
            has = f"{name}.B" in handle.keys()  # noqa: SIM118 - a handle is not iterable
            change = Pairs(handle.get_tensor(f"{name}.B"), handle.get_tensor(f"{name}.A")) if has else None
        device = "cuda" if self.device == "cuda" and torch.cuda.is_available() else "cpu"
        change = None if change is None else change.to(device)
        m, n = w.shape
        base = torch.empty(m, n)
        for rows in blocks(slice(0, m), n):
            base[rows] = encode_rows(self.codec, w[rows].to(device), change, rows)[1].to("cpu", torch.float32)
        return base
