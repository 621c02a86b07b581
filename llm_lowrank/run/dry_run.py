"""What a run would do, before anything is loaded: settings, parameter counts, schedule and memory, from the model's
config alone.

The model is built on torch's meta device: names, shapes and dtypes, no bytes.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.method import Method
from llm_lowrank.engines import ENGINES, Sizes
from llm_lowrank.engines.frozen import FrozenLinear, persistent_size
from llm_lowrank.engines.fsdp import decoder_layers
from llm_lowrank.engines.memory import Amount
from llm_lowrank.models.coverage import coverage
from llm_lowrank.models.source import config_folder
from llm_lowrank.run.build import attention, build_model, engine_settings, optimization, read_data, schedule_of
from llm_lowrank.run.checks import output_dir_conflict
from llm_lowrank.run.recipe import Recipe, dump

GIB = 2**30


def describe(recipe: Recipe, world: int) -> str:
    """Return the resolved recipe, the parameters, the exchanges and the memory per rank of a run on `world` ranks."""
    folder = config_folder(recipe.model_name_or_path, recipe.model_revision)
    model, adapters = build_model(recipe, folder)
    sizes = sizes_of(model, recipe.method)
    notes = [message] if (message := output_dir_conflict(recipe)) else []
    kernel = "attention on this machine: " + ", ".join(attention(recipe, model))
    plan = [
        kernel,
        f"{parameters(model)}\n{coverage(model).describe(recipe.codec)}",
        schedule(recipe, folder, world, adapters),
        memory(recipe, sizes, world),
    ]
    return "\n\n".join([dump(recipe).rstrip(), *plan, *notes])


# --- parameters -------------------------------------------------------------------------------------------------------


def parameters(model: nn.Module) -> str:
    """Return a table of the parameters by the type of their module."""
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
    """The modules of one type, and the elements of their parameters."""

    modules: int = 0
    shape: str = ""
    frozen: int = 0
    bank: int = 0
    trained: int = 0

    def add(self, module: nn.Module, seen: set[int]) -> None:
        """Count a module. A parameter that two modules share belongs to the first."""
        shape = _shape(module)
        self.shape = shape if self.shape in ("", shape) else "several"
        self.modules += 1
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in seen:
                part = _part(name, p)
                setattr(self, part, getattr(self, part) + p.numel())
                seen.add(id(p))

    def numbers(self) -> list[str]:
        frozen = f"{self.frozen:,}" if self.frozen else "-" if self.trained else "shared"
        return [frozen, *(f"{elements:,}" if elements else "-" for elements in (self.bank, self.trained))]


def _columns(kind: str, modules: str, shape: str, frozen: str, bank: str, trained: str) -> str:
    return f"{kind:<24}{modules:>8}{shape:>16}{frozen:>18}{bank:>14}{trained:>14}"


def _part(name: str, p: nn.Parameter) -> str:
    """Return what a parameter is to the run: trained, bank or frozen."""
    return "trained" if p.requires_grad else "bank" if name.rpartition(".")[2].startswith("bank_") else "frozen"


def _kind(name: str, module: nn.Module) -> str:
    """Return the own name of a projection (q_proj, ..., lm_head); embed or norm for the others."""
    if isinstance(module, nn.Embedding):
        return "embed"
    return "norm" if "norm" in type(module).__name__.lower() else name.rpartition(".")[2]


def _shape(module: nn.Module) -> str:
    shape = module.shape if isinstance(module, FrozenLinear) else next(module.parameters(recurse=False)).shape
    return " x ".join(map(str, shape))


# --- schedule ---------------------------------------------------------------------------------------------------------


def schedule(recipe: Recipe, folder: Path, world: int, adapters: list[Adapter]) -> str:
    """Return the length of the run and the steps after which pairs are exchanged, as text."""
    per_device, accumulated = recipe.per_device_train_batch_size, recipe.gradient_accumulation_steps
    batch = (
        f"global batch {per_device * accumulated * world} = {per_device} per rank x {accumulated} accumulated "
        f"x {world} rank(s)"
    )
    try:
        total = total_steps(recipe, folder, world)
    except (ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        return f"schedule, {batch}\nsteps and exchanges are not known without the data (or max_steps): {reason}"
    steps = recipe.method.schedule(total, adapters)
    when = f"after step {', '.join(map(str, steps))}" if steps else "none"
    rates = schedule_of(recipe, total)
    return f"schedule, {batch}\n{total} optimizer steps, {len(steps)} exchanges: {when}\nlearning rate: {rates}"


def total_steps(recipe: Recipe, folder: Path, world: int) -> int:
    """Return max_steps, or how many num_train_epochs of the data take: then the data is loaded and tokenized."""
    if recipe.max_steps > 0:
        return recipe.max_steps
    return read_data(recipe, folder, 0, world)[2].total_steps


# --- memory -----------------------------------------------------------------------------------------------------------


def sizes_of(model: nn.Module, method: Method) -> Sizes:
    """Return the sizes of a model with its adapters; it needs no values."""
    parts: dict[str, list[tuple[int, int]]] = {"frozen": [], "bank": [], "trained": []}
    for name, p in model.named_parameters():
        parts[_part(name, p)].append((p.numel(), p.nbytes))
    layers = [sum(p.nbytes for p in layer.parameters()) for layer in decoder_layers(model)]
    quantized = [m for m in model.modules() if isinstance(m, FrozenLinear) and not m.codec.writable]
    return Sizes(
        **parts,
        statistics=method.statistics([m for m in model.modules() if isinstance(m, Adapter)]),
        layer=max(layers),
        layers=sum(layers),
        decoded=max((m.shape[0] * m.shape[1] * m.codec.dtype.itemsize for m in quantized), default=0),
        persistent=persistent_size(model),
    )


def memory(recipe: Recipe, sizes: Sizes, world: int) -> str:
    """Return what every rank holds under each engine, and the formulas, as two tables; a star marks the recipe's."""
    columns: dict[str, dict[str, Amount]] = {}  # heading -> label -> bytes and formula
    legends: list[str] = []
    notes: list[str] = []
    for name, kind in ENGINES.items():
        settings = engine_settings(recipe) if name == recipe.engine else None
        for held in kind.held(sizes, world, settings, optimization(recipe)):
            chosen = name == recipe.engine and held.chosen
            columns[f"*{held.title}" if chosen else held.title] = held.rows(sizes, world)
            legends += [held.legend] if held.legend else []
            notes += held.notes if chosen else ()
    labels = list(next(iter(columns.values())))
    totals = [sum(nbytes for nbytes, _ in rows.values()) for rows in columns.values()]
    lines = [_cells(f"memory per rank, GiB, {world} rank(s)", list(columns))]
    lines += [_cells(label, [f"{rows[label][0] / GIB:.3f}" for rows in columns.values()]) for label in labels]
    lines += [_cells("total", [f"{total / GIB:.3f}" for total in totals]), ""]
    lines += [_cells("formulas", list(columns))]
    lines += [_cells(label, [rows[label][1] for rows in columns.values()]) for label in labels]
    return "\n".join([*lines, *LETTERS, *legends, NOT_COUNTED, *notes])


LETTERS = (
    "W, K, T: bytes of the frozen weights, of the bank, of what is trained (both float32). N: ranks",
    "S, E: what the method remembers of gradients, over all ranks, on each. D: the largest quantized W, decoded",
)
NOT_COUNTED = (
    "Not counted: activations and logits, communication buckets, the ledger and the waiting pairs on rank 0's host"
)


def _cells(label: str, cells: list[str]) -> str:
    return label.ljust(36) + "".join(f"{cell:>10}" for cell in cells)
