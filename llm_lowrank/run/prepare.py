"""Everything that a run checks before it reads a weight: model, data, schedule, and the checkpoint it resumes from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date as Date
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import nn
from tqdm import tqdm

from llm_lowrank import engines
from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.data import Batches, Corpus, StreamBatches
from llm_lowrank.engines import Engine
from llm_lowrank.models import checkpoint, loading
from llm_lowrank.models.best import Best
from llm_lowrank.models.checkpoint import Checkpoint
from llm_lowrank.models.compiling import compile_layers
from llm_lowrank.models.hub import open_repositories, repositories
from llm_lowrank.models.inherited import check_base, open_adapter
from llm_lowrank.models.source import InModel, Source
from llm_lowrank.models.stopping import stop_at
from llm_lowrank.numerics.files import check_writable
from llm_lowrank.numerics.schedule import Schedule
from llm_lowrank.run.build import build_model, engine_settings, read_data, schedule_of, use_kernels
from llm_lowrank.run.checks import best_errors, profile_errors
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.flops import Work, work_of
from llm_lowrank.run.recipe import Recipe
from llm_lowrank.run.resuming import check_ranks_alike, check_same_run, facts_of


@dataclass
class Run:
    """A training run: what is known before any weight is read, and what changes while it trains."""

    recipe: Recipe
    engine: Engine
    source: Source
    tokenizer: transformers.PreTrainedTokenizerBase
    corpus: Corpus
    model: transformers.PreTrainedModel
    adapters: list[Adapter]
    batches: Batches | StreamBatches
    total_steps: int
    schedule: Schedule  # of the learning rate
    exchange_steps: tuple[int, ...]  # completed steps after which pairs are exchanged
    tensors: InModel  # the checkpoint under the model's names
    unused: list[str]  # tensors of the checkpoint that the model has no place for
    work: Work  # what the model multiplies a token by
    facts: dict[str, Any]  # about the model and the data; a run that resumes must find the same ones
    best: Best  # evaluation so far
    kernels: str = ""  # a sentence about Liger's kernels, if they are used
    resume_from: Checkpoint | None = None
    loss_layer: nn.Module | None = None  # the layer inside of which the loss can be made; None: from whole logits
    notes: list[str] = field(default_factory=list)  # what a user should know before the run starts
    made: int = 0  # steps made so far
    skipped: int = 0  # steps without an update so far, as their gradients were not finite

    @property
    def resume_step(self) -> int | None:
        """Completed steps of the checkpoint that the run resumes from; None at a first start."""
        return None if self.resume_from is None else self.resume_from.step

    def say(self, line: str) -> None:
        """Print a line beside the progress bar, on rank 0."""
        if self.engine.main:
            tqdm.write(line)


def make_engine(recipe: Recipe) -> Engine:
    """Return the engine that the recipe names."""
    return engines.make(recipe.engine, engine_settings(recipe), recipe.ddp_timeout)


def agree_on_date(recipe: Recipe, engine: Engine) -> str:
    """Return the day that chat templates write: today on rank 0, or that of the checkpoint that the run resumes from.

    Collective.
    """
    with engine.together():
        date = _date(recipe) if engine.main else ""
    return str(engine.gather(date)[0])


def _date(recipe: Recipe) -> str:
    wanted, folders = recipe.resume_from_checkpoint, []
    if wanted == "auto":
        folders = checkpoint.complete_checkpoints(recipe.output)
    elif wanted != "none":
        folders = [Path(wanted).expanduser()]
    for folder in folders:
        try:
            state = json.loads((folder / checkpoint.STATE).read_text(encoding="utf-8"))
            return str(state["data"]["date"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged checkpoint is reported when it is opened; without a date, nothing depends on it
    return Date.today().isoformat()


def prepare(recipe: Recipe, engine: Engine, date: str = "") -> Run:
    """Read the data and check everything that a mistake in the recipe could break; no weights yet. No communication.

    date: as in load_corpus.
    """
    if not engine.main:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    source = Source.open(recipe.model_name_or_path, recipe.model_revision)
    tokenizer, corpus, batches = read_data(recipe, source.path, engine.rank, engine.world, date)
    total = recipe.max_steps if recipe.max_steps > 0 else batches.total_steps
    schedule = schedule_of(recipe, total)
    if errors := [*profile_errors(recipe, total), *best_errors(recipe, total, corpus)]:
        raise RecipeError("\n".join(errors))
    model, adapters, tensors, unused, kernels = build(recipe, source, corpus.ends, engine.device)
    if engine.main:
        check_writable(recipe.output)
        if recipe.push_to_hub:
            open_repositories(repositories(recipe.hub_model_id, recipe.save_merged), recipe.hub_private_repo)
    metric = recipe.metric_for_best_model if recipe.load_best_model_at_end else ""
    return Run(
        recipe=recipe,
        engine=engine,
        source=source,
        tokenizer=tokenizer,
        corpus=corpus,
        model=model,
        adapters=adapters,
        batches=batches,
        total_steps=total,
        schedule=schedule,
        exchange_steps=recipe.method.schedule(total, adapters),
        tensors=tensors,
        unused=unused,
        work=work_of(model, recipe.gradient_checkpointing),
        kernels=kernels,
        best=Best(recipe.output, metric, recipe.early_stopping_patience),
        facts={
            "global_batch": batches.global_batch,
            "total_steps": total,
            **facts_of(source, tokenizer, corpus, recipe.method.inherits),
        },
    )


Built = tuple[transformers.PreTrainedModel, list[Adapter], InModel, list[str], str]


def build(recipe: Recipe, source: Source, ends: Iterable[int], device: torch.device) -> Built:
    """Return a model without values: model, adapters, tensors, unused and kernels of a Run. No communication.

    ends: the tokens that end the answers of the data.
    """
    model, adapters = build_model(recipe, source.path)
    if recipe.method.inherits:
        check_base(open_adapter(recipe.method.inherits), source)
    tensors = source.in_model(model)
    unused = loading.bind(model, adapters, tensors)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    kernels = use_kernels(recipe, source.path, model, adapters, device) if recipe.use_liger_kernel else ""
    if recipe.torch_compile:
        compile_layers(model)
    model.train()
    stop_at(model, ends)
    return model, adapters, tensors, unused, kernels


def find_checkpoint(run: Run) -> None:
    """Set run.resume_from. Rank 0 reads all of it once, to compare checksums, and decides; the others open what it
    found.

    Collective. ValueError on every rank if the run may not resume, or if ranks read different models or data.
    """
    engine = run.engine
    check_ranks_alike(engine, run.source, run.facts)
    with engine.together():
        if engine.main:
            run.resume_from, run.notes = check_resumable(run.recipe, run.source, run.facts)
    path = engine.gather(None if run.resume_from is None else str(run.resume_from.path))[0]
    with engine.together():
        if isinstance(path, str) and not engine.main:
            run.resume_from = Checkpoint.open(Path(path), checked=True)
    if run.resume_from is not None:
        run.notes += run.best.resume(engine, run.resume_from)


def check_resumable(recipe: Recipe, source: Source, facts: dict[str, Any]) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint that resume_from_checkpoint names, checked against this run, and what to print about it.

    Raises ValueError when the checkpoint is damaged or belongs to another run, model or data.
    """
    wanted = recipe.resume_from_checkpoint
    if wanted == "none":
        return None, []
    if wanted == "auto":
        newest, damaged = checkpoint.newest(recipe.output)
        notes = [f"NOT used: {line}" for line in damaged]
        if newest is None and damaged:
            damaged.append("resume_from_checkpoint: no checkpoint is whole; move them away to start from the beginning")
            raise ValueError("\n".join(damaged))
        if newest is None:
            return None, [f"no checkpoint in {recipe.output}: starting from the beginning"]
    else:
        newest, notes = Checkpoint.open(Path(wanted).expanduser()), []
    notes += check_same_run(recipe, source, facts, newest)
    return newest, [*notes, f"resuming from {newest.path}: {newest.step} of {facts['total_steps']} steps are done"]
