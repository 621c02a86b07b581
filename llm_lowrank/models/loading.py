"""From a checkpoint to a sharded model, tensor by tensor: read my rows, take out the starting pairs, encode, drop the
source.

    stored W = encode(W - s B A)        B A the pairs with which a method starts: trainable and bank

Both happen on the unquantized rows as they stream by, so that nothing is ever re-quantized, and the residual without
its principal directions is also easier to quantize. What a rank reads at once is its rows of one tensor; the rank that
decomposes a weight holds that weight.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, Shared
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec, Nf4, empty_parts
from llm_lowrank.engines.base import Engine, Optimization
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.numerics.pairs import Pairs

# |function after loading - function of the checkpoint| / |function of the checkpoint|, Frobenius. Measured: 4e-7
# float32, 2e-3 bfloat16, 6e-3 int8, 9e-2 nf4. Beyond these a layer was not loaded but damaged.
EXACT, ROUNDED, CODED = 1e-4, 2e-2, 0.5
BLOCK = 2**21  # elements of W that are worked on at a time: 16 MB in float64, a few times over


class Tensors(Protocol):
    """Where values come from: a checkpoint on disk (source.py)."""

    def names(self) -> list[str]: ...
    def tensor(self, name: str) -> Tensor: ...  # whole
    def rows(self, name: str, start: int, stop: int) -> Tensor: ...  # of dim 0
    def layout(self, name: str) -> tuple[torch.dtype, list[int]]: ...  # dtype and shape
    def is_nf4(self, name: str) -> bool: ...  # stored in 4 bits already
    def nf4_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]: ...  # as the parts of Nf4


class Resumed(Protocol):
    """Where a run that goes on takes what is beside W from: a checkpoint of the run (checkpoint.py)."""

    def tensor(self, name: str) -> Tensor: ...
    # what left W at the start, with the sign that it left it
    def starting_change(self, adapter: Adapter) -> Pairs | None: ...


@dataclass
class Loaded:
    """What loading did, over all ranks."""

    modules: int = 0  # linear modules whose W is frozen
    pairs: int = 0  # taken out of W
    bytes: int = 0  # that this rank asked of the checkpoint
    seconds: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)  # module -> |loaded - W| / |W|, adapter included

    @property
    def worst(self) -> str:
        return max(self.errors, key=self.errors.__getitem__)

    def figures(self) -> dict[str, float]:
        """The numbers of metrics.jsonl's record of loading."""
        return {
            "seconds": self.seconds,
            "bytes": self.bytes,
            "modules": self.modules,
            "pairs": self.pairs,
            "error": self.errors[self.worst],
        }

    def __str__(self) -> str:
        mean = sum(self.errors.values()) / len(self.errors)
        taken = f"{self.pairs} pairs taken out of W, " if self.pairs else ""
        return (
            f"loaded {self.bytes / 1e9:.2f} GB a rank in {self.seconds:.1f} s: {self.modules} frozen linear modules, "
            f"{taken}"
            f"|loaded - W| / |W| {mean:.1e} on average, at most {self.errors[self.worst]:.1e} ({self.worst})"
        )


def skeleton(folder: str | Path, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of a checkpoint's config, its parameters on the meta device, its buffers real."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path: cannot read the config of {folder}: {str(error).splitlines()[0]}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the codec stores the weights, not transformers
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    model.tie_weights()
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def bind(model: PreTrainedModel, adapters: list[Adapter], tensors: Tensors) -> list[str]:
    """Says where every value will come from; ValueError if the checkpoint lacks one.

    Returns the tensors that nothing asks for.
    """
    stored, wanted, seen = set(tensors.names()), set(), set()
    for name, module in model.named_modules():
        for k, p in () if isinstance(module, Shared) else module.named_parameters(recurse=False):
            if isinstance(module, FrozenLinear) and k != "bias":
                wanted.add(f"{name}.weight")
            elif p not in seen:  # tied to one before
                wanted.add(f"{name}.{k}")
            seen.add(p)
    missing = sorted(wanted - stored)
    if missing:
        raise ValueError(
            f"the checkpoint holds no tensor {missing[0]} ({len(missing)} of {len(wanted)} are missing): nothing to "
            "load, nowhere to merge "
            "back; save the model with save_pretrained of plain transformers, names and weights unfused"
        )
    for adapter in adapters:
        adapter.source = partial(tensors.tensor, f"{adapter.name}.weight")
    return sorted(stored - wanted)


def load(
    engine: Engine,
    model: PreTrainedModel,
    adapters: list[Adapter],
    method: Method,
    tensors: Tensors,
    settings: Optimization,
    resumed: Resumed | None = None,
) -> tuple[nn.Module, Loaded]:
    """Shards, fills and wraps the model, and starts the method; the model to call, and what happened. Collective.

    With `resumed` the method is not started: what it remembers comes from there as well, by checkpoint.restore.
    """
    began = time.perf_counter()
    pairs = method.starting_pairs(adapters, engine) if resumed is None else iter(())
    reader = _Reader(engine, model, tensors, pairs, resumed)
    with reader.progress:
        wrapped = engine.wrap(model, settings, reader)
    reader.check_sharded_bytes()
    if resumed is None:
        method.start(adapters, engine)
    loaded = reader.report()
    loaded.seconds = time.perf_counter() - began
    return wrapped, loaded


def blocks(rows: slice, n: int) -> Iterator[slice]:
    """Some rows of a W with n columns, a few at a time."""
    step = max(1, BLOCK // n)
    for first in range(rows.start, rows.stop, step):
        yield slice(first, min(first + step, rows.stop))


def add_change(w: Tensor, change: Pairs, rows: slice) -> Tensor:
    """W + B A for some rows of W, rounded once to float32.

    In float64: float32 products of more or fewer rows differ in their last bit, and a code on an edge would tip over.
    """
    return (w.double() + change.B[rows].double() @ change.A.double()).float()


def encode_rows(codec: Codec, w: Tensor, change: Pairs | None, rows: slice) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of some rows of W + C, and decode(parts) - C: what has become of these rows of W. C is B A."""
    parts = codec.encode(w if change is None else add_change(w, change, rows))
    decoded = codec.decode(parts, w.shape[1])
    return parts, decoded if change is None else add_change(decoded, change.scaled(-1), rows)


def _out_of_w(layer: nn.Module, pairs: Pairs) -> Pairs:
    """What is added to W when these pairs leave it."""
    assert isinstance(layer, PairAdapter)
    return pairs.scaled(-layer.scale)


class _Reader:
    """Gives an engine the rows that it asks for, module by module."""

    def __init__(
        self,
        engine: Engine,
        model: PreTrainedModel,
        tensors: Tensors,
        pairs: Iterator[Pairs | None],
        resumed: Resumed | None,
    ) -> None:
        self.engine, self.tensors, self.pairs, self.resumed = engine, tensors, pairs, resumed
        self.loaded = Loaded()
        self.squares: dict[str, tuple[Tensor, Codec]] = {}  # (|loaded - W|^2, |W|^2) of my rows
        self.witness: tuple[FrozenLinear, slice, dict[str, Tensor]] | None = None  # a coded layer, my rows, their parts
        total = sum(p.numel() for p in model.parameters())
        self.progress = tqdm(
            total=total, desc="load", unit="param", unit_scale=True, disable=not engine.main, leave=False
        )

    def __call__(self, name: str, module: nn.Module, rows: dict[str, slice]) -> dict[str, Tensor]:
        pairs = next(self.pairs) if isinstance(module, Adapter) and self.resumed is None else None  # collective
        with self.engine.together(), torch.no_grad():
            values: dict[str, Tensor] = {}
            change = _out_of_w(module, pairs) if pairs is not None else None
            if self.resumed is not None and isinstance(module, Adapter):
                change = self.resumed.starting_change(module)
            if isinstance(module, FrozenLinear):
                mine = rows[module.part_names[0]]
                values |= self._encode(name, module, mine, change)
                if self.witness is None and not module.codec.writable:
                    self.witness = module, mine, {k: part.clone() for k, part in values.items()}
            if change is not None:
                assert isinstance(module, Adapter)
                self.loaded.pairs += len(change)
                module.taken = 1
                if self.engine.main:
                    module.ledger.append(change)
            if isinstance(module, Adapter | Shared):
                if self.resumed is not None:
                    own = (k for k in rows if k not in values and not (k == "bias" and isinstance(module, Adapter)))
                    initial = {k: self.resumed.tensor(f"{name}.{k}") for k in own}
                else:
                    initial = module.initial(pairs) if isinstance(module, Adapter) else module.initial()
                # copies, as they are trained in place: the ledger keeps the pairs as they were
                values |= {k: v[rows[k]].clone() for k, v in initial.items()}
            for k, run in rows.items():
                if k not in values:
                    values[k] = self._plain(f"{name}.{k}", getattr(module, k), run)
        self.progress.update(sum(getattr(module, k).numel() for k in rows))
        return values

    def _read(self, name: str, rows: slice) -> Tensor:
        found = self.tensors.rows(name, rows.start, rows.stop)
        self.loaded.bytes += found.nbytes
        speed = self.loaded.bytes / 1e9 / max(1e-9, self.progress.format_dict["elapsed"])
        self.progress.set_postfix_str(f"{speed:.2f} GB/s", refresh=False)
        return found

    def _plain(self, name: str, p: nn.Parameter, rows: slice) -> Tensor:
        self._check_shape(name, tuple(p.shape))
        return self._read(name, rows).to(p.dtype)

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        found = tuple(self.tensors.layout(name)[1])
        if found != wanted:
            raise ValueError(
                f"{name}: the checkpoint holds {found}, the model {wanted}; is config.json that of this checkpoint?"
            )

    def _encode(self, name: str, layer: FrozenLinear, stored: slice, change: Pairs | None) -> dict[str, Tensor]:
        """The parts of my rows: encode(W + change)."""
        key, device = f"{name}.weight", self.engine.device
        self.loaded.modules += 1
        rows = slice(min(stored.start, layer.shape[0]), min(stored.stop, layer.shape[0]))  # without filling
        self._check_shape(key, layer.shape)
        if self.tensors.is_nf4(key) and not layer.codec.writable:
            return self._as_it_is(key, layer, stored, rows, change)
        n = layer.shape[1]
        parts = empty_parts(layer.codec, stored.stop - stored.start, n, device)
        for part in parts.values():
            part[rows.stop - stored.start :] = 0  # filling
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        change = change.to(device) if change is not None else None
        for block in blocks(rows, n):
            w = self._read(key, block).to(device)
            try:
                mine, kept = encode_rows(layer.codec, w, change, block)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
            squares += torch.stack([(kept - w).double().square().sum(), w.double().square().sum()])
            for k, part in mine.items():
                parts[k][block.start - stored.start : block.stop - stored.start] = part
        self.squares[name] = squares, layer.codec
        return parts

    def _as_it_is(
        self, key: str, layer: FrozenLinear, stored: slice, rows: slice, change: Pairs | None
    ) -> dict[str, Tensor]:
        """Codes and scales of a checkpoint that is quantized already."""
        if change is not None:
            raise ValueError(
                f"{key} is quantized in the checkpoint; a method that starts from singular directions needs the "
                "unquantized model: "
                "give that as model_name_or_path, or use method.type: lora"
            )
        if not isinstance(layer.codec, Nf4) or layer.codec.double_quant:
            raise ValueError(
                f"{key} is stored in nf4 already, with single scales: set codec: nf4, codec_double_quant: false"
            )
        found = self.tensors.nf4_rows(key, rows.start, rows.stop)
        self.loaded.bytes += sum(part.nbytes for part in found.values())
        missing = stored.stop - stored.start - (rows.stop - rows.start)
        self.squares[key.removesuffix(".weight")] = (
            torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.engine.device),
            layer.codec,
        )
        return {k: torch.nn.functional.pad(part, (0, 0, 0, missing)) for k, part in found.items()}

    def check_sharded_bytes(self) -> None:
        """Gathers one coded weight and compares it with what was handed over: a cast or a swap on the way would be
        silent. Collective.
        """
        if self.witness is None:
            return
        layer, rows, handed = self.witness
        whole = {name: self.engine.whole(part) for name, part in layer.named_parts().items()}
        with self.engine.together():
            for name, part in handed.items():
                if not torch.equal(whole[name][rows].cpu(), part.cpu()):
                    raise RuntimeError(
                        f"{layer.extra_repr()}: the bytes of {name} changed while they were sharded; "
                        f"{type(self.engine).__name__} on "
                        f"{self.engine.device.type} cannot hold coded weights with these versions: use codec: dense, "
                        "and please report it"
                    )
        self.witness = None

    def report(self) -> Loaded:
        """The errors of every layer, summed over the ranks' rows; raises when one is more than rounding can do.

        Collective.

        A row that two ranks of ZeRO-3 share counts twice.
        """
        sums = self.engine.sum(torch.stack([squares for squares, _ in self.squares.values()]))  # (modules, 2)
        for (name, (_, codec)), (lost, whole) in zip(self.squares.items(), sums.tolist(), strict=True):
            error = (lost / whole) ** 0.5 if whole else float(lost > 0)
            limit = EXACT if codec.holds_small_updates else ROUNDED if codec.writable else CODED
            if not error <= limit:
                raise RuntimeError(
                    f"{name}: loading changed the layer's function by {error:.1e}, more than {limit:g}: not training on"
                )
            self.loaded.errors[name] = error
        return self.loaded
