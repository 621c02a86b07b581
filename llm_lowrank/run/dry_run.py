"""What a run would do, before anything is loaded: settings, parameter counts, schedule, memory and, for a named GPU,
time, from the model's config alone.

The model is built on torch's meta device: names, shapes and dtypes, no bytes.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.models.coverage import coverage
from llm_lowrank.models.source import config_folder
from llm_lowrank.run import memory
from llm_lowrank.run.build import attention, build_model, read_data, schedule_of
from llm_lowrank.run.checks import output_dir_conflict
from llm_lowrank.run.flops import work_of
from llm_lowrank.run.forecast import forecast, ranks
from llm_lowrank.run.recipe import Recipe, dump


def describe(recipe: Recipe, world: int) -> str:
    """Return the resolved recipe, the parameters, the exchanges and the memory per rank of a run on `world` ranks.

    With `gpu` the time of a step and its traffic too; `nodes` may say how many ranks there are.
    """
    world, nodes = ranks(recipe, world)
    folder = config_folder(recipe.model_name_or_path, recipe.model_revision)
    model, adapters = build_model(recipe, folder)
    sizes = memory.sizes_of(model, recipe.method)
    notes = [message] if (message := output_dir_conflict(recipe)) else []
    kernel = "attention on this machine: " + ", ".join(attention(recipe, model))
    plan = [
        kernel,
        f"{parameters(model)}\n{coverage(model).describe(recipe.codec)}",
        schedule(recipe, folder, world, adapters),
        memory.table(recipe, sizes, world),
    ]
    if recipe.gpu != "none":
        work = work_of(model, recipe.gradient_checkpointing)
        plan.append(forecast(recipe, work, memory.columns(recipe, sizes, world), sizes, world, nodes))
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
                part = memory.part_of(module, name, p)
                setattr(self, part, getattr(self, part) + p.numel())
                seen.add(id(p))

    def numbers(self) -> list[str]:
        frozen = f"{self.frozen:,}" if self.frozen else "-" if self.trained else "shared"
        return [frozen, *(f"{elements:,}" if elements else "-" for elements in (self.bank, self.trained))]


def _columns(kind: str, modules: str, shape: str, frozen: str, bank: str, trained: str) -> str:
    return f"{kind:<24}{modules:>8}{shape:>16}{frozen:>18}{bank:>14}{trained:>14}"


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
    lines = [
        f"schedule, {batch}",
        f"{total} optimizer steps, {len(steps)} exchanges: {when}",
        f"learning rate: {rates}",
    ]
    return "\n".join([*lines, *recipe.method.advice(steps)])


def total_steps(recipe: Recipe, folder: Path, world: int) -> int:
    """Return max_steps, or how many num_train_epochs of the data take: then the data is loaded and tokenized."""
    if recipe.max_steps > 0:
        return recipe.max_steps
    return read_data(recipe, folder, 0, world)[2].total_steps
