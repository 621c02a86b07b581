"""The results of a run: a plain PEFT LoRA over the untouched base, and a merged Hugging Face checkpoint.

    trained layer = W0 + sum(ledger) + s B A + s bank_B bank_A          (other adapters: W0 + sum(ledger) + `change`)

Whatever a method did to W, to the pairs or to the bank, the sum of all changes of W0 is one low-rank matrix.
`save_adapter` writes this matrix as LoRA factors. `merge` adds LoRA factors to the stored W0, one tensor in memory at a
time. It takes any PEFT LoRA folder whose settings it understands completely.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from llm_lowrank.adapters.adapter import Adapter, PairAdapter
from llm_lowrank.adapters.method import Method, match_pattern
from llm_lowrank.codecs import Codec, make
from llm_lowrank.engines.base import Engine
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.files import file_sha256, stored_names, stream_safetensors, sync, write_json, write_safetensors
from llm_lowrank.models.loading import blocks, encode_rows
from llm_lowrank.models.prequantized import without_announcement
from llm_lowrank.models.source import INDEX, SINGLE, Source
from llm_lowrank.numerics.pairs import Pairs

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ALL = "untruncated.safetensors"  # beside truncated WEIGHTS: all pairs of every module, scaling 1
BACKBONE = "backbone.safetensors"
TEMPLATE = "chat_template.jinja"  # beside CONFIG if the run had a template; transformers' name for it
PREFIX = "base_model.model."


# --- the adapter ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedAdapter:
    """The report of an exported adapter."""

    path: Path
    rank: int  # of every factor in the file
    ranks: dict[str, int]  # module -> pairs that its change needs
    error: float  # the largest |dropped| / |change| of a module, from compression

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        needs = f"{high}" if low == high else f"{low} to {high}"
        cut = f"; CUT DOWN: {ALL} beside it has all, and merging uses that" if high > self.rank else ""
        lora = f"PEFT LoRA of rank {self.rank} over {len(self.ranks)} modules"
        return f"{self.path}: {lora} (exact rank {needs}, dropped {self.error:.1e}{cut})"


def delta(engine: Engine, adapter: Adapter) -> Pairs | None:
    """Return sum(ledger) + the adapter's change with as few pairs as possible on rank 0, None elsewhere.

    Collective.
    """
    change = _change(engine, adapter)
    return change.compress()[0] if change is not None else None


def save_adapter(
    engine: Engine, adapters: Sequence[Adapter], *, method: Method, path: str | Path, base_model_name_or_path: str
) -> SavedAdapter | None:
    """Write a PEFT LoRA folder on rank 0 and return a report there; return None elsewhere. Collective.

    Adapters that never froze a pair are written as they were trained. Otherwise every module gets balanced factors,
    scaling 1 and the largest rank that a module needs, at most `method.export_rank`. Modules that need less are padded
    with pairs of zeros, as vLLM wants one rank. If ranks were truncated, ALL holds the untruncated pairs.
    """
    factors: dict[str, Pairs] = {}
    extras: dict[str, Tensor] = {}
    # all ranks must agree, but only rank 0 has the ledgers
    as_trained = all(engine.gather(all(adapter.only_pairs and not adapter.ledger for adapter in adapters)))
    # gathering is collective, one adapter at a time; the factors are on rank 0
    error = 0.0
    for adapter in adapters:
        if as_trained:
            assert isinstance(adapter, PairAdapter)
            a, b = engine.whole(adapter.A), engine.whole(adapter.B)
            tensors = adapter.extras(engine.whole)
            if engine.main:
                factors[adapter.name] = Pairs(b, a).to("cpu")
                extras |= {f"{PREFIX}{adapter.name}.{k}": v.cpu() for k, v in tensors.items()}
        elif (change := _change(engine, adapter)) is not None:
            factors[adapter.name], dropped = change.compress()
            cut = _norm(factors[adapter.name].take(slice(method.export_rank, None))) if method.export_rank else 0.0
            error = max(error, math.hypot(dropped, cut) / max(_norm(change), torch.finfo(torch.float64).tiny))
    if not engine.main:
        return None

    # one rank for all modules
    ranks = {name: len(pairs) for name, pairs in factors.items()}
    rank = max(1, *ranks.values())
    written: dict[str, dict[str, Tensor]] = {WEIGHTS: extras}
    if not as_trained and method.export_rank and rank > method.export_rank:
        rank = method.export_rank
        written[ALL] = _peft_names(factors)
    if not as_trained:
        factors = {name: _of_rank(pairs, rank) for name, pairs in factors.items()}
    written[WEIGHTS] |= _peft_names(factors)
    # ALL names the WEIGHTS that it belongs to, so that WEIGHTS are written first
    (Path(path) / ALL).unlink(missing_ok=True)
    settings = json.dumps({"type": method.get_choice_name(type(method)), **asdict(method)})
    notes = {"format": "pt", "written_by": "llm_lowrank", "method": settings}
    for file, tensors in written.items():
        write_safetensors(Path(path) / file, tensors, notes)
        notes = notes | {"of": file_sha256(Path(path) / WEIGHTS)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": _target_modules(list(ranks), method.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **(method.peft() if as_trained else {}),
    }
    write_json(Path(path) / CONFIG, config)  # last: a folder with a config is complete
    return SavedAdapter(Path(path), rank, ranks, error)


def _peft_names(factors: dict[str, Pairs]) -> dict[str, Tensor]:
    """A (rank, n) and B (m, rank) of every module under PEFT's names."""
    letters = {f"{PREFIX}{name}.lora_A.weight": pairs.A.contiguous() for name, pairs in factors.items()}
    return letters | {f"{PREFIX}{name}.lora_B.weight": pairs.B.contiguous() for name, pairs in factors.items()}


def _of_rank(pairs: Pairs, rank: int) -> Pairs:
    """The first `rank` pairs, or all pairs with pairs of zeros behind them."""
    (m, n), more = pairs.shape, max(0, rank - len(pairs))
    return Pairs.cat([pairs.take(slice(rank)), Pairs(torch.zeros(m, more), torch.zeros(more, n))])


def _change(engine: Engine, adapter: Adapter) -> Pairs | None:
    """Return all changes of W0, uncompressed, on the host of rank 0; None elsewhere. Collective."""
    trained = adapter.change(engine.whole)
    if not engine.main:
        return None
    return Pairs.cat([*(entry.pairs() for entry in adapter.ledger), trained.to("cpu", torch.float32)])


def _norm(pairs: Pairs) -> float:
    """|B A| without forming it: |B A|^2 = <B^T B, A A^T>."""
    b, a = pairs.B.double(), pairs.A.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def _target_modules(adapted: list[str], targets: Sequence[str]) -> list[str]:
    """The user's names of the target modules, if PEFT matches them as we do, otherwise the full names.

    PEFT reads all-linear differently.
    """
    by_name = all(any(name == target or name.endswith(f".{target}") for target in targets) for name in adapted)
    return sorted(targets if by_name else adapted)


# --- the merged checkpoint --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """The report of a merged checkpoint."""

    path: Path
    lost: dict[str, float]  # module -> |realized - wanted| / |wanted|: the share of its update that rounding took

    @property
    def worst(self) -> str:
        """The module whose update lost most."""
        return max(self.lost, key=self.lost.__getitem__)

    def __str__(self) -> str:
        most = self.lost[self.worst]
        advice = "; merge into float32, or use the adapter unmerged, to keep all of it" if most > 0.05 else ""
        error = f"rounding error at most {most:.2%} of an update ({self.worst})"
        return f"{self.path}: {len(self.lost)} modules merged, {error}{advice}"


@dataclass(frozen=True)
class Update:
    """An adapter's update of a weight, W + s B A; with a `magnitude` the rows get these lengths.

    DoRA: https://arxiv.org/abs/2402.09353 eq. 5
    """

    pairs: Pairs
    scaling: float
    magnitude: Tensor | None = None  # (m,)

    def change(self, w: Tensor) -> Tensor:
        """The matrix that is added to a float32 W: (m, n) -> (m, n)."""
        added = self.scaling * self.pairs.to(dtype=torch.float32).product()
        if self.magnitude is None:
            return added
        updated = w + added
        lengths = updated.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)  # (m,)
        return updated * (self.magnitude.float() / lengths)[:, None] - w


@dataclass(frozen=True)
class Lora:
    """A PEFT LoRA folder, read one module at a time."""

    path: Path
    modules: list[str]
    config: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Lora:
        """Open a PEFT LoRA folder. Raise ValueError if something in it is missing, damaged or not understood."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise ValueError(f"{path} has no {CONFIG}: not a PEFT adapter folder")
        config = json.loads((path / CONFIG).read_text())
        _refuse_unknown(path, config)
        if not (path / WEIGHTS).is_file():
            pickled = (
                " (adapter_model.bin is pickled: save it again with PEFT)"
                if (path / "adapter_model.bin").is_file()
                else ""
            )
            raise ValueError(f"{path} has no {WEIGHTS}{pickled}")
        keys = set(stored_names(path / WEIGHTS))
        parts = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.get("use_dora") else [])]
        modules = sorted({key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in keys if ".lora_A." in key})
        strange = sorted(keys ^ {f"{PREFIX}{module}.{part}" for module in modules for part in parts})
        if strange or not modules:
            raise ValueError(
                f"{path / WEIGHTS} is not made of {' and '.join(parts)} of every module: see "
                f"{strange[:3] or 'no tensors'}"
            )
        if (path / ALL).is_file():
            with safe_open(path / ALL, framework="pt") as handle:
                if (handle.metadata() or {}).get("of") != file_sha256(path / WEIGHTS):
                    raise ValueError(
                        f"{path / ALL} belongs to another {WEIGHTS} than the one beside it; remove it to merge what is "
                        "there"
                    )
        return cls(path, modules, config)

    def update(self, module: str) -> Update:
        """Read the update of a module: the untruncated one, if there is one."""
        if (self.path / ALL).is_file():
            with safe_open(self.path / ALL, framework="pt") as handle:
                a, b = (handle.get_tensor(f"{PREFIX}{module}.lora_{letter}.weight") for letter in "AB")
            return Update(Pairs(b, a), 1.0)
        with safe_open(self.path / WEIGHTS, framework="pt") as handle:
            a, b = (handle.get_tensor(f"{PREFIX}{module}.lora_{letter}.weight") for letter in "AB")
            magnitude = (
                handle.get_tensor(f"{PREFIX}{module}.lora_magnitude_vector") if self.config.get("use_dora") else None
            )
        pairs = Pairs(b, a)
        rank = match_pattern(self.config.get("rank_pattern") or {}, module, self.config["r"])
        alpha = match_pattern(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        if len(pairs) != rank:
            raise ValueError(f"{self.path}: {module} has {len(pairs)} pairs, but {CONFIG} says rank {rank}")
        return Update(pairs, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank), magnitude)


# Settings of a LoRA config that this merge applies; all others must be off.
UNDERSTOOD = {
    "peft_type",
    "init_lora_weights",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
}
NO_MATTER = {  # settings that do not change W + scaling B A
    *(
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "lora_dropout",
    ),
    # the tensors say which modules there are
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_config", "megatron_core", "runtime_config", "eva_config", "qalora_group_size", "ensure_weight_tying"),
}
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")  # other starting values are subtracted from the base


def _refuse_unknown(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} is a PEFT adapter of type {config.get('peft_type')}; only LORA can be merged here")
    off: tuple[Any, ...] = (None, False, {}, [], "", "none")
    unknown = {key: value for key, value in config.items() if key not in UNDERSTOOD | NO_MATTER and value not in off}
    if unknown:
        what = ", ".join(f"{key}={json.dumps(value)}" for key, value in unknown.items())
        raise ValueError(f"{path}: this merge does not know how to apply {what}; use PEFT's merge_and_unload instead")
    if (start := config.get("init_lora_weights", True)) not in KEEP_THE_BASE:
        raise ValueError(
            f"{path}: init_lora_weights={start!r} means that the base weights were changed too; convert it to a plain "
            "LoRA first (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )


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


@dataclass
class Merging:
    """The tensors of a merged checkpoint, one at a time: base + adapter in float32, rounded once.

    The base is the checkpoint's W0 or, with a backbone, the quantized weight on which the run trained.
    """

    source: Source
    lora: Lora
    dtype: torch.dtype | None = None  # of every floating-point tensor; None: each keeps its dtype
    backbone: Backbone | None = None

    def __post_init__(self) -> None:
        self.updated = _find_weights(self.source, self.lora)
        self.quantized = {f"{name}.weight": name for name in (self.backbone.modules if self.backbone else [])}
        self.layout = {name: self.source.layout(name) for name in self.source.names()}
        if self.dtype is not None:
            self.layout = {
                name: (self.dtype if stored.is_floating_point else stored, shape)
                for name, (stored, shape) in self.layout.items()
            }
        self.lost: dict[str, float] = {}  # module -> |realized - wanted| / |wanted|

    def tensor(self, name: str) -> Tensor:
        """Compute one tensor of the merged checkpoint; for an adapted module also note what rounding took."""
        weight, target = self.source.tensor(name), self.layout[name][0]
        if self.backbone is not None and name in self.quantized and not self.source.is_nf4(name):
            weight = self.backbone.base(self.quantized[name], weight)
        if name not in self.updated:
            return weight.to(target)
        module = self.updated[name]
        merged, self.lost[module] = add_rounded(weight, self.lora.update(module), target)
        return merged


def merge(
    source: Source,
    adapter_dir: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    backbone: Backbone | None = None,
) -> Merged:
    """Write base + adapter as a Hugging Face checkpoint, one tensor in memory at a time, and return a report.

    `dtype` converts every floating-point tensor; by default each keeps its dtype. With a `backbone` the adapter is
    merged into the quantized weights on which the run trained, instead of the checkpoint's weights. The folder is
    written under another name and renamed when it is complete. Call on one rank. Raise ValueError if the output exists,
    or if the adapter does not fit the base.
    """
    output = Path(output)
    _check_output(output)
    merging = Merging(source, Lora.open(adapter_dir), dtype, backbone)
    progress = tqdm(total=len(merging.layout), desc="merging", unit="tensor", disable=None)

    def produce(name: str) -> Tensor:
        progress.update()
        return merging.tensor(name)

    aside = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        for file, names in source.shards():
            stream_safetensors(aside / file, {name: merging.layout[name] for name in names}, produce, {"format": "pt"})
        if set(source.files.values()) != {SINGLE}:
            size = sum(stored.itemsize * math.prod(shape) for stored, shape in merging.layout.values())
            write_json(aside / INDEX, {"metadata": {"total_size": size}, "weight_map": source.files})
        _copy_the_rest(source, aside, dtype)
        if (template := Path(adapter_dir) / TEMPLATE).is_file():  # the template that the model was trained with
            shutil.copyfile(template, aside / TEMPLATE)
        sync(aside)
        os.replace(aside, output)  # over an empty folder too
        sync(output.parent)
    finally:
        progress.close()
        shutil.rmtree(aside, ignore_errors=True)
    return Merged(output, merging.lost)


@dataclass(frozen=True)
class Gap:
    """The difference between the answers of a merged model and those of the trained model."""

    logits: float  # |merged - trained| / |trained|
    agreement: float  # share of positions with the same most likely token

    def __str__(self) -> str:
        return f"logits {self.logits:.1%} apart, the same most likely token at {self.agreement:.1%} of the positions"


@torch.no_grad()
def gaps(
    model: torch.nn.Module, wrapped: torch.nn.Module, inputs: dict[str, Tensor], mergings: Sequence[Merging | None]
) -> list[Gap | None]:
    """Compare the answers of the trained model with those of each merged model, without writing it. Collective.

    For each merging the model answers again with every frozen linear replaced by the weight that would be written; one
    such weight is in memory at a time. Only rank 0 has mergings. The other ranks pass None in their places and get
    None: they take part in the forward, and their answers are ignored.
    """
    attended = inputs["attention_mask"].bool()

    def answers() -> Tensor:
        return wrapped(**inputs, use_cache=False).logits[attended].float()

    frozen = [(name, m) for name, m in model.named_modules() if isinstance(m, FrozenLinear)]
    trained, by_merging = answers(), list[Gap | None]()
    for merging in mergings:
        # each layer's forward is replaced on the object, so that engines still gather at the module's call
        try:
            for name, layer in frozen:
                if merging is not None:
                    layer.forward = partial(_merged_forward, merging, name, layer)  # type: ignore[method-assign]
            merged = answers()
        finally:
            for _, layer in frozen:
                vars(layer).pop("forward", None)
        distance = float((merged - trained).norm() / trained.norm())
        agreement = float((merged.argmax(-1) == trained.argmax(-1)).float().mean())
        by_merging.append(None if merging is None else Gap(distance, agreement))
    return by_merging


def _merged_forward(merging: Merging, name: str, layer: FrozenLinear, x: Tensor) -> Tensor:
    w = merging.tensor(f"{name}.weight").to(x.device, x.dtype)
    return torch.nn.functional.linear(x, w, None if layer.bias is None else layer.bias.to(x.dtype))


def add_rounded(weight: Tensor, update: Update, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Return the updated W, computed in float32 and rounded once, and the share of the update that rounding took.

    lost = |realized - wanted| / |wanted|,  wanted = the update,  realized = round(W + wanted) - round(W)
    """
    wanted = update.change(weight.float())  # (m, n)
    merged = (weight.float() + wanted).to(dtype)
    realized = merged.float() - weight.to(dtype).float()
    size = float(wanted.norm())
    return merged, float((realized - wanted).norm()) / size if size else 0.0


def _check_output(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty folder; give another output or remove it")


def _find_weights(source: Source, lora: Lora) -> dict[str, str]:
    """Tensor name -> module, for every module of the adapter.

    Raise ValueError if a module's weight is missing from the checkpoint, tied to another one or of another shape.
    """
    tied = json.loads((source.path / "config.json").read_text()).get("tie_word_embeddings", False)
    stored = set(source.names())
    for module in lora.modules:
        name = f"{module}.weight"
        if (tied or name not in stored) and module.rsplit(".", 1)[-1] in ("lm_head", "embed_tokens"):
            raise ValueError(
                f"{lora.path} adapts {module}, which shares its weight with the other end of the model in "
                f"{source.path} (tie_word_embeddings); merged, it would change both. Leave it out of target_modules or "
                "use the adapter unmerged"
            )
        if name not in stored:
            near = difflib.get_close_matches(name, stored, 2)
            hint = f" (it has {', '.join(near)})" if near else ""
            raise ValueError(
                f"{lora.path} adapts {module}, but {source.path} has no tensor {name}{hint}; is it the right base "
                "model?"
            )
        shape, wanted = tuple(source.layout(name)[1]), lora.update(module).pairs.shape
        if shape != wanted:
            raise ValueError(
                f"{lora.path}: {module} updates a {wanted} weight, in {source.path} it is {shape}; is that the right "
                "base?"
            )
    return {f"{module}.weight": module for module in lora.modules}


def _copy_the_rest(source: Source, output: Path, dtype: torch.dtype | None) -> None:
    """Copy config.json, tokenizer, chat template, generation config: every small file except the index."""
    for file in sorted(source.path.iterdir()):
        if file.suffix in (".json", ".txt", ".model", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, output / file.name)
    if dtype is not None or source.prequantized:
        config = json.loads((source.path / "config.json").read_text())
        config = without_announcement(config)  # decoded weights are stored plainly
        if dtype is not None:
            config.pop("torch_dtype", None)  # the name before transformers 5
            config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(output / "config.json", config)
