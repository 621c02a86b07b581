"""What every rank holds in memory under each engine, as a table for the dry run, and what a run then measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from llm_lowrank.adapters.adapter import Adapter, Shared
from llm_lowrank.adapters.method import Method
from llm_lowrank.engines import ENGINES, Engine, Held, Sizes
from llm_lowrank.engines.frozen import FrozenLinear, persistent_size
from llm_lowrank.engines.fsdp import decoder_layers
from llm_lowrank.run.build import engine_settings, optimization
from llm_lowrank.run.hardware import peak_memory
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run
from llm_lowrank.run.recipe import Recipe

GIB = 2**30


def sizes_of(model: nn.Module, method: Method) -> Sizes:
    """Return the sizes of a model with its adapters; it needs no values."""
    parts: dict[str, list[tuple[int, int]]] = {"frozen": [], "bank": [], "trained": []}
    seen: set[int] = set()  # a parameter that two modules share counts once
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in seen:
                parts[part_of(module, name, p)].append((p.numel(), p.nbytes))
                seen.add(id(p))
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in _layers(model)]
    made = [m for m in model.modules() if isinstance(m, FrozenLinear) and m.makes_w]
    return Sizes(
        **parts,
        statistics=method.statistics([m for m in model.modules() if isinstance(m, Adapter)]),
        layer=max(layers),
        layers=sum(layers),
        decoded=max((m.shape[0] * m.shape[1] * m.codec.dtype.itemsize for m in made), default=0),
        persistent=persistent_size(model),
    )


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers, or the whole model where they are not known: FSDP2, which needs them, refuses it."""
    try:
        return decoder_layers(model)
    except ValueError:
        return [model]


def part_of(module: nn.Module, name: str, p: nn.Parameter) -> str:
    """Return what a parameter of a module is to the run: trained, bank (what is frozen beside W) or frozen."""
    if p.requires_grad:
        return "trained"
    beside = isinstance(module, Shared) or (isinstance(module, Adapter) and name not in (*module.part_names, "bias"))
    return "bank" if beside else "frozen"


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One way to spread a model over ranks."""

    held: Held
    chosen: bool  # whether it is the recipe's

    @property
    def heading(self) -> str:
        return f"*{self.held.title}" if self.chosen else self.held.title


def columns(recipe: Recipe, sizes: Sizes, world: int) -> list[Column]:
    """Return what a rank holds under each engine."""
    found = []
    for name, kind in ENGINES.items():
        settings = engine_settings(recipe) if name == recipe.engine else None
        held = kind.held(sizes, world, settings, optimization(recipe))
        found += [Column(way, name == recipe.engine and way.chosen) for way in held]
    return found


def table(recipe: Recipe, sizes: Sizes, world: int) -> str:
    """Return what every rank holds under each engine, and the formulas, as two tables; a star marks the recipe's."""
    ways = columns(recipe, sizes, world)
    rows = {way.heading: way.held.rows(sizes, world) for way in ways}  # heading -> label -> bytes and formula
    labels = list(next(iter(rows.values())))
    totals = [sum(nbytes for nbytes, _ in amounts.values()) for amounts in rows.values()]
    lines = [cells(f"memory per rank, GiB, {world} rank(s)", list(rows))]
    lines += [cells(label, [f"{amounts[label][0] / GIB:.3f}" for amounts in rows.values()]) for label in labels]
    lines += [cells("total", [f"{total / GIB:.3f}" for total in totals]), ""]
    lines += [cells("formulas", list(rows))]
    lines += [cells(label, [amounts[label][1] for amounts in rows.values()]) for label in labels]
    legends = [way.held.legend for way in ways if way.held.legend]
    notes = [note for way in ways if way.chosen for note in way.held.notes]
    return "\n".join([*lines, *LETTERS, *legends, NOT_COUNTED, *notes])


LETTERS = (
    "W, K, T: bytes of the frozen weights, of the bank with all else that is frozen beside a weight, of what is",
    "trained (both float32). N: ranks",
    "S, E: what the method remembers of gradients, over all ranks, on each. D: the largest W that is made for use",
)
NOT_COUNTED = (
    "Not counted: activations and logits, communication buckets, the ledger and the waiting pairs on rank 0's host"
)


def cells(label: str, values: list[str]) -> str:
    """Return a line of a table."""
    return label.ljust(36) + "".join(f"{value:>10}" for value in values)


# --- predicted and measured -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predicted:
    """What the table says about this run."""

    nbytes: float  # a rank, without what NOT_COUNTED names
    held: Held
    sizes: Sizes
    before: int  # bytes that the process had used before the model was loaded


def predict(run: Run) -> Predicted:
    """Return the prediction for a run. Call it before the model is loaded: afterwards it may be sharded."""
    sizes, world = sizes_of(run.model, run.recipe.method), run.engine.world
    (held,) = [way.held for way in columns(run.recipe, sizes, world) if way.chosen]
    total = sum(nbytes for nbytes, _ in held.rows(sizes, world).values())
    return Predicted(total, held, sizes, peak_memory(run.engine.device)[0])


def compare(engine: Engine, predicted: Predicted, metrics: Metrics, step: int) -> str:
    """Record the prediction and what the run peaked at on any rank, and return the line about it. Collective."""
    used, reserved = peak_memory(engine.device)
    by_rank: list[Any] = engine.gather((used, reserved, predicted.before))
    used, reserved, before = (max(column) for column in zip(*by_rank, strict=True))
    metrics.write(
        "memory",
        step,
        predicted_gb=predicted.nbytes / 1e9,
        measured_gb=used / 1e9,
        reserved_gb=reserved / 1e9,
        before_loading_gb=before / 1e9,
    )
    if engine.device.type == "cuda":
        more = f" (with {reserved / 1e9:.2f} GB reserved)"
    else:
        more = f", {before / 1e9:.2f} GB of it before the model was loaded"
    line = (
        f"memory: predicted {predicted.nbytes / 1e9:.2f} GB a rank without activations and logits, measured at most "
        f"{used / 1e9:.2f} GB{more}"
    )
    return "\n".join([line, *predicted.held.notes])
