"""The model of a run: loaded, sharded and, from a checkpoint, restored."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.engines import Engine
from llm_lowrank.models import checkpoint, loading
from llm_lowrank.models.checkpoint import Checkpoint
from llm_lowrank.models.source import InModel
from llm_lowrank.run.build import optimization
from llm_lowrank.run.prepare import Run, build
from llm_lowrank.run.proofs import look_at
from llm_lowrank.run.recipe import Recipe
from llm_lowrank.run.saving import prepare_output
from llm_lowrank.run.signals import Signals


def load(run: Run, signals: Signals) -> tuple[nn.Module, loading.Loaded]:
    """Load, shard and, if the run resumes, restore the model; prepare output_dir. Collective.

    Returns the wrapped model, which is the one to call, and what loading did.
    """
    model, loaded = _load(run, run.resume_from)
    signals.check(run.engine)
    look_at(run, model)
    if run.engine.main:
        prepare_output(run)
    return model, loaded


def _load(run: Run, point: Checkpoint | None) -> tuple[nn.Module, loading.Loaded]:
    model, loaded = load_model(run.recipe, run.engine, run.model, run.adapters, run.tensors, point)
    run.say(str(loaded))
    if point is not None:
        run.skipped = point.skipped
    return model, loaded


def load_model(
    recipe: Recipe,
    engine: Engine,
    model: PreTrainedModel,
    adapters: list[Adapter],
    tensors: InModel,
    point: Checkpoint | None,
) -> tuple[nn.Module, loading.Loaded]:
    """Load and shard a model that was built without values, and restore it if there is a checkpoint. Collective."""
    engine.at("loading the model")
    wrapped, loaded = loading.load(
        engine,
        model,
        adapters=adapters,
        method=recipe.method,
        tensors=tensors,
        settings=optimization(recipe),
        resume_from=point,
    )
    torch.manual_seed(recipe.seed * 1000 + engine.rank)  # dropout differs between ranks
    if point is not None:
        engine.at(f"restoring {point.path}")
        checkpoint.restore(engine, model, adapters, point)
    return wrapped, loaded


def load_best(run: Run) -> nn.Module:
    """Load the best state of a run that has ended, exactly as a resume from its checkpoint does. Collective.

    W may have changed in place, so that it is read again. Let go of the wrapped model before: there is one at a time.
    Returns the new one.
    """
    engine, point = run.engine, None
    with engine.together():  # rank 0 compares the checksums
        if engine.main:
            point = Checkpoint.open(run.best.folder)
    with engine.together():
        point = point or Checkpoint.open(run.best.folder, checked=True)
        run.loss_layer = None  # a layer of the old model, which is to be freed as a whole
        run.model, run.adapters, run.tensors, *_ = build(run.recipe, run.source, run.corpus.ends, engine.device)
        engine.unload()
    model, _ = _load(run, point)
    look_at(run, model)
    return model
