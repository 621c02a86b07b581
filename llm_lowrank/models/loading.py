"""From a checkpoint to a sharded model, tensor by tensor: read my rows, take out the starting pairs, encode, drop the
source.

    stored W = encode(W - s B A)        B A: the pairs with which a method starts, trainable and bank

The subtraction and the encoding work on the unquantized rows, so that nothing is ever quantized twice. The residual
without its principal directions is also easier to quantize. A rank reads its rows of one tensor at a time; only the
rank that decomposes a weight holds the whole of it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, Shared
from llm_lowrank.adapters.method import Method
from llm_lowrank.adapters.tokens import TokenRows
from llm_lowrank.adapters.whole import Whole
from llm_lowrank.codecs import Codec, Nf4, empty_parts
from llm_lowrank.engines.base import Engine, Optimization
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.models.architectures import wanted
from llm_lowrank.models.part import PLAIN, START_OVER
from llm_lowrank.numerics.pairs import Pairs

# |function after loading - function of the checkpoint| / |function of the checkpoint|, Frobenius. Measured: 4e-7
# float32, 2e-3 bfloat16, 6e-3 int8, 9e-2 nf4. A larger error means that loading damaged the layer.
EXACT, ROUNDED, QUANTIZED = 1e-4, 2e-2, 0.5
BLOCK = 2**21  # elements of W that are encoded at a time: 16 MB in float64, a few times over


class Tensors(Protocol):
    """The tensors of a model's checkpoint on disk (source.py)."""

    def names(self) -> list[str]: ...
    def tensor(self, name: str) -> Tensor: ...  # the whole tensor
    def rows(self, name: str, start: int, stop: int) -> Tensor: ...  # of dim 0
    def layout(self, name: str) -> tuple[torch.dtype, list[int]]: ...  # dtype and shape
    def is_nf4(self, name: str) -> bool: ...  # whether it is stored in 4 bits already
    def nf4_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]: ...  # as the parts of Nf4


class ResumePoint(Protocol):
    """The trained values of a run that resumes: a checkpoint of the run (checkpoint.py)."""

    def tensor(self, name: str) -> Tensor: ...
    # what was added to W at the start: the starting pairs with a minus
    def starting_change(self, adapter: Adapter) -> Pairs | None: ...


@dataclass
class Loaded:
    """The report of loading, over all ranks."""

    modules: int = 0  # linear modules whose W is frozen
    pairs: int = 0  # taken out of W
    bytes: int = 0  # that this rank read from the checkpoint
    seconds: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)  # module -> |loaded - W| / |W|, adapter included

    @property
    def worst(self) -> str:
        """The module with the largest error."""
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
            f"{taken}|loaded - W| / |W| {mean:.1e} on average, at most {self.errors[self.worst]:.1e} ({self.worst})"
        )


PART_OF_A_LAYER = re.compile(r"(.+?)\.(bias|weight_g|weight_v|lora_[^.]+(?:\..+)?)")


def bind(model: PreTrainedModel, adapters: list[Adapter], tensors: Tensors) -> list[str]:
    """Check that the checkpoint holds every tensor of the model, and give each adapter its source.

    Return the names of the tensors that nothing asks for. Raise ValueError if one is missing or holds codes.
    """
    stored, asked = set(tensors.names()), wanted(model)
    if missing := sorted(set(asked) - stored):
        raise ValueError(
            f"the checkpoint holds no tensor {missing[0]} ({len(missing)} of {len(asked)} are missing), under its name "
            f"in {type(model).__name__} or under one that transformers would rename: nothing to load, nowhere to merge "
            "back; is config.json that of this checkpoint?"
        )
    modules = dict(model.named_modules())
    for name in sorted(stored - set(asked)):
        part = PART_OF_A_LAYER.fullmatch(name)
        if part and isinstance(modules.get(part[1]), nn.Linear | FrozenLinear):
            remedy = "merge the adapter first" if "lora_" in part[2] else "is config.json that of this checkpoint?"
            raise ValueError(
                f"the checkpoint holds {name}, for which {type(model).__name__} has no place: without it, {part[1]} "
                f"would compute something else; {remedy}"
            )
    for name in asked:
        dtype = tensors.layout(name)[0]
        if dtype not in PLAIN:
            raise ValueError(
                f"{name} is stored as {str(dtype).removeprefix('torch.')}, which are codes of a quantized weight, and "
                f"config.json does not say how to read them; {START_OVER}"
            )
    for adapter in adapters:
        adapter.source = partial(_untouched, tensors, adapter)
    for module in modules.values():
        if isinstance(module, TokenRows):
            module.sources = {k: partial(tensors.rows, f"{at}.weight") for k, at in module.modules_of.items()}
    return sorted(stored - set(asked))


def _untouched(tensors: Tensors, adapter: Adapter) -> Tensor:
    """W before a method touches it: that of the checkpoint, and an inherited adapter that is frozen."""
    w = tensors.tensor(f"{adapter.name}.weight")
    inherited = adapter.inherited if isinstance(adapter, PairAdapter) else None
    if inherited is None or inherited.place == "trained":
        return w
    return add_change(w, inherited.read().scaled(adapter.scale), slice(None))


def load(
    engine: Engine,
    model: PreTrainedModel,
    *,
    adapters: list[Adapter],
    method: Method,
    tensors: Tensors,
    settings: Optimization,
    resume_from: ResumePoint | None = None,
) -> tuple[nn.Module, Loaded]:
    """Shard, fill and wrap the model, and start the method. Collective.

    Return the wrapped model, which is the one to call, and a report. With `resume_from` the trained values come from
    there, and the method is not started: checkpoint.restore gives back what it remembers.
    """
    began = time.perf_counter()
    if method.inherits and not any(isinstance(a, PairAdapter) and a.inherited for a in adapters):
        raise RuntimeError(
            f"method.adapter names {method.inherits}, and no layer has its pairs; call llm_lowrank.models.inherited."
            "inherit before loading"
        )
    pairs = method.starting_pairs(adapters, engine) if resume_from is None else iter(())
    reader = _Reader(engine, model, tensors=tensors, pairs=pairs, resume_from=resume_from)
    with reader.progress:
        wrapped = engine.wrap(model, settings, reader)
    reader.check_sharded_bytes()
    if resume_from is None:
        method.start(adapters, engine)
        for adapter in adapters:
            adapter.started()
            if method.calibration:
                adapter.await_calibration(type(method).__name__)
    loaded = reader.report()
    loaded.seconds = time.perf_counter() - began
    return wrapped, loaded


def blocks(rows: slice, n: int) -> Iterator[slice]:
    """Yield some rows of a W with n columns in slices of at most BLOCK elements."""
    step = max(1, BLOCK // n)
    for first in range(rows.start, rows.stop, step):
        yield slice(first, min(first + step, rows.stop))


def add_change(w: Tensor, change: Pairs, rows: slice) -> Tensor:
    """W + B A for some rows of W, rounded once to float32.

    The sum is made in float64: float32 products of more or fewer rows differ in the last bit, and a value on the edge
    between two codes would get another code.
    """
    return (w.double() + change.B[rows].double() @ change.A.double()).float()


def encode_rows(codec: Codec, w: Tensor, change: Pairs | None, rows: slice) -> tuple[dict[str, Tensor], Tensor]:
    """Return the encoded parts of some rows of W + C, and the stored W without C, decode(parts) - C.

    C = B A, w (rows, n) are the rows of W, decode(parts) - C is (rows, n).
    """
    parts = codec.encode(w if change is None else add_change(w, change, rows))
    decoded = codec.decode(parts, w.shape[1])
    return parts, decoded if change is None else add_change(decoded, change.scaled(-1), rows)


def _starting_change(layer: nn.Module, pairs: Pairs | None) -> Pairs | None:
    """The change of W at the start, or None if W stays as it is: starting pairs leave it, -s B A, and an inherited
    adapter may enter it.
    """
    if not isinstance(layer, PairAdapter):
        assert pairs is None
        return None
    changes = [pairs.scaled(-layer.scale)] if pairs is not None and layer.takes else []
    if _enters_w(layer):
        assert layer.inherited is not None
        changes.append(layer.inherited.read().scaled(layer.scale))
    return Pairs.cat(changes) if changes else None


def _enters_w(layer: Adapter) -> int:
    """The pairs of an inherited adapter that are frozen into W."""
    inherited = layer.inherited if isinstance(layer, PairAdapter) else None
    return inherited.rank if inherited is not None and inherited.place == "weight" else 0


class _Reader:
    """Gives an engine the rows that it asks for, module by module. All ranks ask for the modules in the same order."""

    def __init__(
        self,
        engine: Engine,
        model: PreTrainedModel,
        *,
        tensors: Tensors,
        pairs: Iterator[Pairs | None],
        resume_from: ResumePoint | None,
    ) -> None:
        self.engine, self.tensors, self.pairs, self.resume_from = engine, tensors, pairs, resume_from
        self.loaded = Loaded()
        self.squares: dict[str, tuple[Tensor, Codec]] = {}  # (|loaded - W|^2, |W|^2) of my rows
        # the first quantized layer with my rows and their parts, for check_sharded_bytes
        self.witness: tuple[FrozenLinear, slice, dict[str, Tensor]] | None = None
        total = sum(p.numel() for p in model.parameters())
        self.progress = tqdm(
            total=total, desc="load", unit="param", unit_scale=True, disable=not engine.main, leave=False
        )

    def __call__(self, name: str, module: nn.Module, rows: dict[str, slice]) -> dict[str, Tensor]:
        """Return my rows of the parameters in `rows`. Collective."""
        # the starting pairs are collective, so that every rank asks for them before anything local may fail
        pairs = next(self.pairs) if isinstance(module, Adapter) and self.resume_from is None else None
        with self.engine.together(), torch.no_grad():
            values: dict[str, Tensor] = {}
            # the pairs leave W: those that the method takes, or that it took when the run began
            change = _starting_change(module, pairs)
            if self.resume_from is not None and isinstance(module, Adapter):
                change = self.resume_from.starting_change(module)
            # my rows of W without the pairs, encoded
            if isinstance(module, FrozenLinear):
                my_rows = rows[module.part_names[0]]
                values |= self._encode(name, module, my_rows, change)
                if self.witness is None and not module.codec.writable:
                    self.witness = module, my_rows, {k: part.clone() for k, part in values.items()}
            # the ledger begins with the pairs that left W or entered it
            if change is not None:
                assert isinstance(module, Adapter)
                self.loaded.pairs += len(change) - _enters_w(module)
                module.taken = 1
                if self.engine.main:
                    module.ledger.append(change)
            # trained values: those of the run's checkpoint, or the method's starting values
            if isinstance(module, Adapter | Shared):
                if self.resume_from is not None:
                    trained = (k for k in rows if k not in values and not (k == "bias" and isinstance(module, Adapter)))
                    initial = {k: self.resume_from.tensor(f"{name}.{k}") for k in trained}
                else:
                    initial = module.initial(pairs) if isinstance(module, Adapter) else module.initial()
                # copies, as training changes them in place: the ledger keeps the pairs as they were
                values |= {k: v[rows[k]].clone() for k, v in initial.items()}
            # modules that are trained as wholes: those of the run's checkpoint
            if isinstance(module, Whole) and self.resume_from is not None:
                values |= {k: self.resume_from.tensor(f"{name}.{k}")[rows[k]].clone() for k in rows}
            # embeddings, norms, biases: as the model's checkpoint has them
            for k, k_rows in rows.items():
                if k not in values:
                    values[k] = self._plain(f"{name}.{k}", getattr(module, k), k_rows)
        self.progress.update(sum(getattr(module, k).numel() for k in rows))
        return values

    def _read(self, name: str, rows: slice) -> Tensor:
        tensor = self.tensors.rows(name, rows.start, rows.stop)
        self.loaded.bytes += tensor.nbytes
        speed = self.loaded.bytes / 1e9 / max(1e-9, self.progress.format_dict["elapsed"])
        self.progress.set_postfix_str(f"{speed:.2f} GB/s", refresh=False)
        return tensor

    def _plain(self, name: str, p: nn.Parameter, rows: slice) -> Tensor:
        self._check_shape(name, tuple(p.shape))
        return self._read(name, rows).to(p.dtype)

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        shape = tuple(self.tensors.layout(name)[1])
        if shape != expected:
            raise ValueError(
                f"{name}: the checkpoint holds {shape}, the model {expected}; is config.json that of this checkpoint?"
            )

    def _encode(self, name: str, layer: FrozenLinear, stored: slice, change: Pairs | None) -> dict[str, Tensor]:
        """Return the parts of my rows, encode(W + change).

        `stored` are the rows that this rank stores. Those behind the last row of W are padding, zeros.
        """
        key, device = f"{name}.weight", self.engine.device
        self.loaded.modules += 1
        rows = slice(min(stored.start, layer.shape[0]), min(stored.stop, layer.shape[0]))  # without the padding
        self._check_shape(key, layer.shape)
        if self.tensors.is_nf4(key) and not layer.codec.writable:
            return self._copy_nf4(key, layer, stored=stored, rows=rows, change=change)
        n = layer.shape[1]
        parts = empty_parts(layer.codec, stored.stop - stored.start, n, device)
        for part in parts.values():
            part[rows.stop - stored.start :] = 0
        # block by block: read, encode, and measure what became of W
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        change = change.to(device) if change is not None else None
        for block in blocks(rows, n):
            w = self._read(key, block).to(device)
            try:
                block_parts, stored_w = encode_rows(layer.codec, w, change, block)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error
            squares += torch.stack([(stored_w - w).double().square().sum(), w.double().square().sum()])
            for k, part in block_parts.items():
                parts[k][block.start - stored.start : block.stop - stored.start] = part
        self.squares[name] = squares, layer.codec
        return parts

    def _copy_nf4(
        self, key: str, layer: FrozenLinear, *, stored: slice, rows: slice, change: Pairs | None
    ) -> dict[str, Tensor]:
        """Return codes and scales as a quantized checkpoint stores them."""
        if change is not None:
            raise ValueError(
                f"{key} is quantized in the checkpoint; a method that starts from singular directions needs the "
                "unquantized model: give that as model_name_or_path, or use method.type: lora"
            )
        if not isinstance(layer.codec, Nf4) or layer.codec.double_quant:
            raise ValueError(
                f"{key} is stored in nf4 already, with single scales: set codec: nf4, codec_double_quant: false"
            )
        parts = self.tensors.nf4_rows(key, rows.start, rows.stop)
        self.loaded.bytes += sum(part.nbytes for part in parts.values())
        padding = stored.stop - stored.start - (rows.stop - rows.start)
        no_error = torch.tensor([0.0, 1.0], dtype=torch.float64, device=self.engine.device)
        self.squares[key.removesuffix(".weight")] = no_error, layer.codec
        return {k: torch.nn.functional.pad(part, (0, 0, 0, padding)) for k, part in parts.items()}

    def check_sharded_bytes(self) -> None:
        """Gather one quantized weight and compare it with the bytes that the engine got. Collective.

        Otherwise nobody would notice that an engine casts or reorders the bytes. Raise RuntimeError if one changed.
        """
        if self.witness is None:
            return
        layer, rows, parts = self.witness
        gathered = {name: self.engine.whole(part) for name, part in layer.named_parts().items()}
        with self.engine.together():
            for name, part in parts.items():
                if not torch.equal(gathered[name][rows].cpu(), part.cpu()):
                    raise RuntimeError(
                        f"{layer.extra_repr()}: the bytes of {name} changed while they were sharded; "
                        f"{type(self.engine).__name__} on {self.engine.device.type} cannot hold quantized weights with "
                        "these versions: use codec: dense, and please report it"
                    )
        self.witness = None

    def report(self) -> Loaded:
        """Return the report of loading with the error of every layer, from the sums over the ranks' rows. Collective.

        A row that two ranks of ZeRO-3 share counts twice. Raise RuntimeError if an error is too large for rounding.
        """
        sums = self.engine.sum(torch.stack([squares for squares, _ in self.squares.values()]))  # (modules, 2)
        for (name, (_, codec)), (lost, total) in zip(self.squares.items(), sums.tolist(), strict=True):
            error = (lost / total) ** 0.5 if total else float(lost > 0)
            if not math.isfinite(total) or math.isnan(lost):
                raise ValueError(
                    f"{name}: its weight in the checkpoint holds NaN or infinity; take another checkpoint, or download "
                    "it again"
                )
            limit = EXACT if codec.holds_small_updates else ROUNDED if codec.writable else QUANTIZED
            if not error <= limit:
                raise RuntimeError(
                    f"{name}: loading changed the layer's function by {error:.1e}, more than {limit:g}: not training on"
                )
            self.loaded.errors[name] = error
        return self.loaded
