"""What a run would do, before anything is loaded: settings, parameter counts, schedule and memory, from the model's
config alone.

The model is built on torch's meta device: names, shapes and dtypes, no bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.method import Method
from llm_lowrank.engines.frozen import FrozenLinear, persistent_size
from llm_lowrank.engines.fsdp import Sharding, decoder_layers
from llm_lowrank.models.source import DEMO, Source
from llm_lowrank.run.recipe import (
    Recipe,
    attention,
    build_model,
    deepspeed_config,
    dump,
    optimization,
    output_dir_conflict,
    read_data,
    schedule_of,
)

GIB = 2**30
ENGINES = ("plain", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2")


def describe(recipe: Recipe, world: int) -> str:
    """The resolved recipe, the parameters, the exchanges and the memory per rank of a run on `world` ranks, as
    text.
    """
    folder = model_folder(recipe.model_name_or_path)
    model, adapters = build_model(recipe, folder)
    sizes = Sizes.of(model, recipe.method)
    notes = [message] if (message := output_dir_conflict(recipe)) else []
    kernel = "attention on this machine: " + ", ".join(attention(recipe))
    plan = [kernel, parameters(model), schedule(recipe, folder, world, adapters), memory(recipe, sizes, world)]
    return "\n\n".join([dump(recipe).rstrip(), *plan, *notes])


def model_folder(name: str) -> str:
    """Where config and tokenizer are: a folder, or a hub name of which nothing but these is downloaded.

    GGUF files are converted first.
    """
    path = Path(name).expanduser()
    if name == DEMO or path.suffix == ".gguf":
        return str(Source.open(name).path)
    return str(path) if path.is_dir() else name


# --- parameters -------------------------------------------------------------------------------------------------------


def parameters(model: nn.Module) -> str:
    """A table of the parameters by the type of their module."""
    rows: dict[str, Row] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            rows.setdefault(_kind(name, module), Row()).add(module, seen)
    lines = [_columns("parameters", "modules", "shape", "frozen", "bank", "trainable")]
    lines += [_columns(kind, str(row.modules), row.shape, *row.numbers()) for kind, row in rows.items()]
    whole = Row(**{part: sum(getattr(row, part) for row in rows.values()) for part in ("frozen", "bank", "trained")})
    total = whole.frozen + whole.bank + whole.trained
    lines.append(_columns("total", "", "", *whole.numbers()))
    lines.append(f"trainable {whole.trained:,} of {total:,} ({whole.trained / total:.2%})")
    return "\n".join(lines)


@dataclass
class Row:
    """The modules of one type; elements."""

    modules: int = 0
    shape: str = ""
    frozen: int = 0
    bank: int = 0
    trained: int = 0

    def add(self, module: nn.Module, seen: set[int]) -> None:
        """A parameter that two modules share belongs to the first."""
        shape = _shape(module)
        self.shape = shape if self.shape in ("", shape) else "several"
        self.modules += 1
        for name, p in module.named_parameters(recurse=False):
            kind = _part(name, p)
            setattr(self, kind, getattr(self, kind) + p.numel() * (id(p) not in seen))
            seen.add(id(p))

    def numbers(self) -> list[str]:
        frozen = f"{self.frozen:,}" if self.frozen else "-" if self.trained else "shared"
        return [frozen, *(f"{elements:,}" if elements else "-" for elements in (self.bank, self.trained))]


def _columns(kind: str, modules: str, shape: str, frozen: str, bank: str, trained: str) -> str:
    return f"{kind:<24}{modules:>8}{shape:>16}{frozen:>18}{bank:>14}{trained:>14}"


def _part(name: str, p: nn.Parameter) -> str:
    """What a parameter is to the run: trained, bank or frozen."""
    return "trained" if p.requires_grad else "bank" if name.rpartition(".")[2].startswith("bank_") else "frozen"


def _kind(name: str, module: nn.Module) -> str:
    """q_proj, k_proj, ... lm_head by their own names; embeddings and norms by what they are."""
    if isinstance(module, nn.Embedding):
        return "embed"
    return "norm" if "norm" in type(module).__name__.lower() else name.rpartition(".")[2]


def _shape(module: nn.Module) -> str:
    shape = module.shape if isinstance(module, FrozenLinear) else next(module.parameters(recurse=False)).shape
    return " x ".join(map(str, shape))


# --- schedule ---------------------------------------------------------------------------------------------------------


def schedule(recipe: Recipe, folder: str, world: int, adapters: list[Adapter]) -> str:
    """Length of the run and the steps after which pairs are exchanged."""
    per_device, accumulated = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    batch = f"global batch {per_device * accumulated * world} = {per_device} per rank x {accumulated} accumulated x {world} rank(s)"
    try:
        total = total_steps(recipe, folder, world)
    except (ValueError, OSError) as error:
        return f"schedule, {batch}\nsteps and exchanges are not known without the data (or max_steps): {str(error).splitlines()[0]}"
    steps = recipe.method.schedule(total, adapters)
    when = f"after step {', '.join(map(str, steps))}" if steps else "none"
    rates = schedule_of(recipe, total)
    return f"schedule, {batch}\n{total} optimizer steps, {len(steps)} exchanges: {when}\nlearning rate: {rates}"


def total_steps(recipe: Recipe, folder: str, world: int) -> int:
    """max_steps, or what num_train_epochs of the data take: then the data is loaded and tokenized."""
    if recipe.max_steps > 0:
        return recipe.max_steps
    return read_data(recipe, folder, 0, world)[2].total_steps


# --- memory -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """(elements, bytes) of every parameter."""

    frozen: list[tuple[int, int]]
    bank: list[tuple[int, int]]
    trained: list[tuple[int, int]]
    statistics: tuple[int, int]  # bytes that the method remembers: over all ranks, and on each
    layer: int  # bytes of the largest decoder layer
    layers: int  # bytes of all of them; the rest is embeddings, the output layer and the last norm
    decoded: int  # bytes of the largest coded W, decoded; 0 without
    persistent: int  # elements up to which ZeRO-3 leaves a parameter gathered

    @classmethod
    def of(cls, model: nn.Module, method: Method) -> "Sizes":
        found: dict[str, list[tuple[int, int]]] = {"frozen": [], "bank": [], "trained": []}
        for name, p in model.named_parameters():
            found[_part(name, p)].append((p.numel(), p.nbytes))
        statistics = method.statistics([m for m in model.modules() if isinstance(m, Adapter)])
        layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
        coded = [m for m in model.modules() if isinstance(m, FrozenLinear) and not m.codec.writable]
        decoded = max((m.shape[0] * m.shape[1] * m.codec.dtype.itemsize for m in coded), default=0)
        size = persistent_size(model)
        return cls(
            **found, statistics=statistics, layer=max(layers), layers=sum(layers), decoded=decoded, persistent=size
        )


def memory(recipe: Recipe, sizes: Sizes, world: int) -> str:
    """A table of what every rank holds under each engine, with the formulas; a star marks the recipe's."""
    config = _resolve_deepspeed(recipe, sizes, world)
    zero = config.get("zero_optimization", {})
    chosen = f"ZeRO-{zero['stage']}" if zero else {"fsdp": "FSDP2"}.get(recipe.engine, recipe.engine)
    rows = memory_rows(sizes, world, zero, recipe.fsdp, 1 if recipe.optim == "lion" else 2)
    heads = [f"*{engine}" if engine == chosen else engine for engine in ENGINES]
    lines = [f"memory per rank, GiB, {world} rank(s)".ljust(36) + "".join(f"{head:>10}" for head in heads)]
    for label, values, formula in rows:
        lines.append(label.ljust(36) + "".join(f"{value / GIB:>10.3f}" for value in values) + f"   {formula}")
    totals = [sum(values[i] for _, values, _ in rows) for i in range(len(ENGINES))]
    lines.append("total".ljust(36) + "".join(f"{total / GIB:>10.3f}" for total in totals))
    lines.append("W, K, T: bytes of the frozen weights, of the bank, of what is trained (both float32)")
    lines.append("N ranks; under FSDP2 with fsdp.shard_size: the ranks that share one copy of the model")
    lines.append("Gathered: stage3_max_live_parameters of ZeRO-3; the root and two decoder layers of FSDP2")
    lines.append(
        "Not counted: activations and logits, communication buckets, the ledger and the waiting pairs on rank 0's host"
    )
    for section in ("offload_param", "offload_optimizer"):
        if (zero.get(section) or {}).get("device", "none") != "none":
            lines.append(
                f"{section}: part of this lies in {zero[section]['device']} memory, as {recipe.deepspeed} says."
            )
    if recipe.engine == "fsdp" and recipe.fsdp.cpu_offload:
        lines.append("fsdp.cpu_offload: what FSDP2 shards lies in host memory between uses.")
    return "\n".join(lines)


def memory_rows(
    sizes: Sizes, n: int, zero: dict[str, Any], sharding: Sharding, moments: int = 2
) -> list[tuple[str, list[float], str]]:
    """(what, bytes under each of ENGINES on n ranks, formula).

    `zero`: the zero_optimization section, "auto" resolved.
    """
    w, k, t = (sum(nbytes for _, nbytes in part) for part in (sizes.frozen, sizes.bank, sizes.trained))
    everything = sizes.frozen + sizes.bank + sizes.trained
    small = zero.get("stage3_param_persistence_threshold", sizes.persistent)
    whole = sum(nbytes for elements, nbytes in everything if elements <= small)
    live = zero.get("stage3_max_live_parameters", 10**9) * max(nbytes / elements for elements, nbytes in sizes.frozen)
    gathered = min(w + k + t - whole, live)
    alone = n == 1  # then a slice is the whole
    shared, own = sizes.statistics
    f = sharding.shards(n)
    root = w + k + t - sizes.layers
    # one in use, one on its way
    groups = root + (min(2 * sizes.layer, sizes.layers) if sharding.reshard_after_forward else sizes.layers)
    return [
        ("frozen weights", [w, w, w, w / n, w / f], "W; ZeRO-3, FSDP2: W / N"),
        ("bank", [k, k, k, k / n, k / f], "K; ZeRO-3, FSDP2: K / N"),
        ("adapters", [t, t, t, t / n, t / f], "T; ZeRO-3, FSDP2: T / N"),
        ("adapters, master copy", [0, t / n, t / n, t / n, 0], "ZeRO: T / N"),
        ("gradients", [t if alone else 2 * t, t, t / n, t / n, t / f], "T, DDP 2 T, sharded T / N"),
        (
            "moments",
            [moments * part for part in (t, t / n, t / n, t / n, t / f)],
            f"{moments} T; sharded: {moments} T / N",
        ),
        ("importance statistics", [shared / n + own] * 5, "in N shares; LoSiA: a layer"),
        ("small parameters, kept whole", [0, 0, 0, 0 if alone else whole, 0], "persistence threshold"),
        ("gathered for use, at most", [0, 0, 0, 0 if alone else gathered, groups], "live parameters; groups"),
        ("decoded for use", [sizes.decoded] * 5, "the largest coded W"),
    ]


def _resolve_deepspeed(recipe: Recipe, sizes: Sizes, world: int) -> dict[str, Any]:
    """The DeepSpeed configuration as the run will use it; what the run refuses, this refuses."""
    if recipe.engine != "deepspeed":
        return {}
    from llm_lowrank.engines.zero import resolve

    return resolve(
        json.loads(deepspeed_config(recipe).read_text(encoding="utf-8")), optimization(recipe), world, sizes.persistent
    )
