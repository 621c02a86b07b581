"""A model, its optimizer and the hooks of a method for a training loop of one's own. See docs/python.md.

prepared = prepare("path/or/hub-name", SRLoRA(rank=16), codec="nf4", engine="fsdp", max_steps=1000)
for batch in batches:
    prepared.backward(prepared.model(**batch).loss)
    prepared.optimizer.step()
prepared.save_adapter("adapter")
"""

from __future__ import annotations

import atexit
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import draccus
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_lowrank.adapters.exchange import Exchanged, measure_exchange
from llm_lowrank.adapters.method import Method
from llm_lowrank.adapters.redirect import make_step
from llm_lowrank.engines import Engine
from llm_lowrank.models import checkpoint, loading
from llm_lowrank.models.backbone import BACKBONE, Backbone
from llm_lowrank.models.checkpoint import Checkpoint
from llm_lowrank.models.export import SavedAdapter, save_adapter
from llm_lowrank.models.inherited import adapter_digest
from llm_lowrank.models.merging import Merged, merge
from llm_lowrank.models.source import InModel, Source
from llm_lowrank.numerics.files import read_object
from llm_lowrank.run.build import schedule_of
from llm_lowrank.run.calibration import calibrate_on
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.load import load_model
from llm_lowrank.run.messages import HOPELESS
from llm_lowrank.run.prepare import build, make_engine
from llm_lowrank.run.recipe import Recipe
from llm_lowrank.run.resuming import check_ranks_alike, check_same_run

# Settings of a recipe that mean something without its data, its evaluation and its files.
SETTINGS = {
    *(
        "model_revision",
        "allow_partial",
        "modules_to_save",
        "dtype",
        "codec_double_quant",
        "attn_implementation",
        "gradient_checkpointing",
    ),
    *("deepspeed", "fsdp", "ddp_timeout", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm"),
    *("optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_steps", "learning_rate", "lr_scheduler_type", "min_lr_rate", "warmup_steps", "warmup_ratio"),
}
# of a model: this rank's loss of each micro-batch of one or more whole steps, each made when it is asked for
Losses = Callable[[nn.Module], Iterator[Tensor]]


def prepare(
    model: str | Path | PreTrainedModel,
    method: Method,
    codec: str = "dense",
    engine: str = "plain",
    *,
    max_steps: int,
    resume_from: str | Path | None = None,
    calibration: Losses | None = None,
    **settings: Any,
) -> Prepared:
    """Load, shard and adapt a model for a training loop of one's own; return what the loop calls.

    model: a folder, a hub name, or a model that transformers loaded from one of these and nobody changed since. codec:
    dense, nf4 or int8. engine: plain, fsdp or deepspeed. max_steps: optimizer steps of the whole run. resume_from: a
    folder that `Prepared.save` wrote. calibration: for a method that looks at gradients before its first step, a
    function of the model that yields the mean loss of each micro-batch of some whole steps. settings: of a recipe, by
    their names there (learning_rate, dtype, gradient_accumulation_steps, ...).

    RecipeError, a ValueError, names what does not fit, before a weight is read. Under a launcher every rank calls it.
    """
    prepared = Prepared(model, method, codec, engine, {**settings, "max_steps": max_steps})
    prepared.load(max_steps, resume_from, calibration)
    return prepared


def _close(engine: weakref.ref[Engine]) -> None:
    """Leave the process group at the end of a script, as far as the script's own engine is still there.

    Otherwise threads of gloo may outlive what they use, and now and then a rank that had trained to the end aborted.
    After an exception the group stays: closing it could wait for ranks that wait for this one, and the launcher ends
    them all.
    """
    found = engine()
    if found is not None and not hasattr(sys, "last_value"):
        found.close()


class Prepared:
    """What a training loop of one's own calls: a model, an optimizer, and what follows training."""

    model: nn.Module
    """The module to call, with the engine around it."""
    optimizer: torch.optim.Optimizer
    """Its step makes the optimizer's step with everything that the method does between two steps."""
    step: int
    """Steps that are done, of a resumed run those before it included."""
    micro: int
    """Micro-batches since the last step."""
    exchanges: list[tuple[int, Exchanged]]
    """The step after which each exchange came, and its report."""
    base: PreTrainedModel
    """The model without the engine around it."""
    loaded: loading.Loaded | None = None
    """What loading did; None before it."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        method: Method,
        codec: str = "dense",
        engine: str = "plain",
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Check the settings and build the model without values. `load` gives it values."""
        given = model if isinstance(model, PreTrainedModel) else None
        name = str(model if given is None else given.config._name_or_path)
        if not name:
            raise RecipeError("model: it was not loaded from a folder or the hub; save it and give its folder")
        settings = settings or {}
        if unknown := sorted(settings.keys() - SETTINGS):
            raise RecipeError(f"{unknown[0]} is no setting of prepare; there are {', '.join(sorted(SETTINGS))}")
        self.recipe = Recipe(
            **{
                "model_name_or_path": name,
                "method": method,
                "codec": codec,
                "engine": engine,
                # what a loop of one's own has no use for
                "overwrite_output_dir": True,
                "report_to": "none",
                "save_merged": False,
                **settings,
            }
        )
        validate(self.recipe)
        self.engine: Engine = make_engine(self.recipe)
        if self.engine.world > 1:
            atexit.register(_close, weakref.ref(self.engine))
        with self.engine.together():
            self.source = Source.open(name, self.recipe.model_revision)
            self.base, self.adapters, self.tensors, *_ = build(self.recipe, self.source, (), self.engine.device)
            self.base.config._name_or_path = name
            if given is not None:
                check_untouched(given, self.tensors, name)

    # ---- load

    def load(self, max_steps: int, resume_from: str | Path | None = None, calibration: Losses | None = None) -> None:
        """Give the model its values, on the ranks; see `prepare`. Collective."""
        self.recipe = replace(self.recipe, max_steps=max_steps)
        self.total_steps, self.micro, self.skipped_in_a_row = max_steps, 0, 0
        self.rate: Callable[[int], float] = schedule_of(self.recipe, max_steps).rate  # of a 0-based step
        self.exchange_steps = self.method.schedule(max_steps, self.adapters)
        self.exchanges = []
        self.calibration = calibration
        if self.method.calibration and calibration is None and (resume_from is None or self.method.recalibrates):
            raise RecipeError(
                f"method: {type(self.method).__name__} looks at gradients before its first step, and there are none: "
                "give prepare calibration, a function of the model that yields the losses of some micro-batches"
            )
        check_ranks_alike(self.engine, self.source, self._facts)
        resuming = self._open(resume_from)
        self.step, self.skipped = (0, 0) if resuming is None else (resuming.step, resuming.skipped)
        self.base.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self.model, self.loaded = load_model(self.recipe, self.engine, self.base, self.adapters, self.tensors, resuming)
        self.optimizer = Step(self)
        if resuming is None:
            self.calibrate()

    def calibrate(self) -> None:
        """Let a method that asks for it look at gradients of `calibration`, which are then forgotten. Collective."""
        if not self.method.calibration:
            return
        losses = self.calibration
        assert losses is not None
        self._announce(())

        def shares() -> Iterator[Tensor]:
            return (loss / self.parts for loss in losses(self.model))

        calibrate_on(self.engine, self.model, self.method, self.adapters, shares)

    @property
    def method(self) -> Method:
        return self.recipe.method

    # ---- step

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this rank's mean loss of a micro-batch.

        The gradient of a step is that of the mean over ranks and micro-batches, as with DistributedDataParallel and
        accelerate.
        """
        self.accumulate(loss / self.parts)

    def accumulate(self, share: Tensor) -> None:
        """Accumulate the gradient of this rank's share of a loss: shares of ranks and micro-batches are summed."""
        if self.micro == self.recipe.gradient_accumulation_steps:
            raise RuntimeError(
                f"backward was called {self.micro + 1} times before optimizer.step(); gradient_accumulation_steps is "
                f"{self.micro}"
            )
        self.engine.backward(share)
        self.micro += 1

    def make_step(self) -> float:
        """Make the optimizer's step and the exchange that follows; return the norm of the gradients before clipping.

        A step whose gradients are not finite changes no value. Its norm is not finite, and after several in a row a
        RuntimeError ends the run. Collective.
        """
        engine, method, adapters, wanted = self.engine, self.method, self.adapters, self.recipe
        if self.step == self.total_steps:
            raise RuntimeError(f"all {self.total_steps} steps are done; give a larger max_steps")
        if self.micro < wanted.gradient_accumulation_steps:
            raise RuntimeError(
                f"backward was called {self.micro} times before optimizer.step(); gradient_accumulation_steps is "
                f"{wanted.gradient_accumulation_steps}"
            )
        if finite := engine.finite():
            method.observe(adapters, engine)
        else:
            method.discard(adapters)
        rates = self._rates()
        norm = make_step(engine, method, adapters, self.step, rates, wanted.max_grad_norm)
        self.step, self.micro = self.step + 1, 0
        self._count(finite and math.isfinite(norm))
        if self.step in self.exchange_steps:
            event = measure_exchange(engine, self._exchange, method.changes_function)
            if event is not None:
                self.exchanges.append((self.step, event))
        return norm

    def _exchange(self) -> Exchanged | None:
        event = self.method.exchange(self.adapters, self.engine, self.step, self.total_steps)
        if self.method.recalibrates:
            self.calibrate()
        return event

    def _count(self, good: bool) -> None:
        self.skipped += not good
        self.skipped_in_a_row = 0 if good else self.skipped_in_a_row + 1
        if not good and self.engine.main:
            print(f"step {self.step}: a gradient is not finite; the step changed nothing", file=sys.stderr, flush=True)
        if self.skipped_in_a_row == HOPELESS:
            raise RuntimeError(
                f"the gradients of {HOPELESS} steps in a row were not finite; lower learning_rate or look at the data"
            )

    def _rates(self) -> list[float]:
        return self.method.rates(self.adapters, self.step, self.total_steps, self.rate)

    @property
    def parts(self) -> int:
        """How many micro-batches of all ranks make a step."""
        return self.engine.world * self.recipe.gradient_accumulation_steps

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the method which samples come, before a forward that gradients will follow."""
        if not (module.training and torch.is_grad_enabled()):
            return
        given = kwargs.get("input_ids", kwargs.get("inputs_embeds", args[0] if args else None))
        rows = 1 if given is None else len(given)
        # the samples of a step are numbered: those of a micro-batch lie beside each other, rank after rank
        first = (self.micro * self.engine.world + self.engine.rank) * rows
        self._announce(range(first, first + rows))

    def _announce(self, samples: Sequence[int]) -> None:
        self._rates()  # a run asks before the forwards
        self.method.batch(self.adapters, self.step, tuple(samples))

    # ---- what a run leaves

    def save_adapter(self, path: str | Path) -> SavedAdapter | None:
        """Write a folder that PEFT reads, on rank 0; return a report there, None elsewhere. Collective."""
        return save_adapter(
            self.engine,
            self.adapters,
            method=self.method,
            path=path,
            base_model_name_or_path=self.source.name,
            revision=self.source.revision,
            outer_name=self.source.outer_name,
            model=self.base,
        )

    def merge(self, path: str | Path, merge_base: str = "original") -> Merged | None:
        """Write a whole checkpoint with the trained change in it, on rank 0; return a report there. Collective.

        The result is PATH/merged, made from PATH/adapter. merge_base: as in a recipe, original or dequantized.
        """
        path, merged = Path(path), None
        self.save_adapter(path / "adapter")
        with self.engine.together():
            if self.engine.main:
                backbone = None
                if merge_base == "dequantized":
                    Backbone.save(path / BACKBONE, self.base)
                    backbone = Backbone.open(path / BACKBONE)
                merged = merge(self.source, path / "adapter", path / "merged", backbone=backbone)
        return merged

    def save(self, path: str | Path) -> Path:
        """Write what `prepare(resume_from=path)` continues from, bitwise where all else is the same. Collective."""
        writing = checkpoint.save(
            self.engine,
            self.base,
            adapters=self.adapters,
            output=Path(path),
            step=self.step,
            skipped=self.skipped,
            recipe=draccus.encode(self.recipe),
            base=self.source.fingerprint,
            data=self._facts,
            keep=1,
        )
        return writing.finish()

    @property
    def _facts(self) -> dict[str, Any]:
        """What must be the same when a run resumes, beside the settings. The data is the loop's own business."""
        adapter = self.method.inherits
        return {
            **({"adapter": adapter_digest(adapter)} if adapter else {}),
            "config": read_object(self.source.path / "config.json"),
            "tokenizer": "",
            "template": None,
            "examples": [],
            "split": "",
            "global_batch": self.parts * self.recipe.per_device_train_batch_size,
            "total_steps": self.total_steps,
        }

    def _open(self, folder: str | Path | None) -> Checkpoint | None:
        """Open the checkpoint to resume from, checked against this run."""
        if folder is None:
            return None
        with self.engine.together():
            newest, damaged = checkpoint.newest(Path(folder))
            if newest is None:
                raise ValueError("\n".join([*damaged, f"resume_from: {folder} holds no checkpoint of this library"]))
            check_same_run(self.recipe, self.source, self._facts, newest)
        return newest


class Step(torch.optim.Optimizer):
    """The engine's optimizer, as a foreign loop wants to see one: step() makes Prepared.make_step.

    Its one group has the learning rate of the next step, which belongs to the schedule. A scheduler that writes another
    one there is refused, since the method has asked for rates of other steps as well.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        super().__init__(prepared.engine.params, {"lr": prepared.rate(prepared.step)})
        self.norm = 0.0  # of the gradients of the last step, before clipping

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make a step. Collective."""
        prepared, (group,) = self.prepared, self.param_groups
        if not math.isclose(group["lr"], prepared.rate(prepared.step), rel_tol=1e-9, abs_tol=1e-30):
            raise RuntimeError(
                f"the learning rate is {group['lr']:g} before step {prepared.step + 1}, where the schedule says "
                f"{prepared.rate(prepared.step):g}: a scheduler of your own has no effect here; give prepare "
                "learning_rate, lr_scheduler_type, warmup_steps and min_lr_rate"
            )
        self.norm = prepared.make_step()
        group["lr"] = prepared.rate(min(prepared.step, prepared.total_steps - 1))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Do nothing: a step clears the gradients that it has used."""


def check_untouched(model: PreTrainedModel, tensors: InModel, name: str) -> None:
    """Raise ValueError unless a loaded model still has the weights of its checkpoint."""
    held = model.state_dict()
    for key in tensors.names():
        if key in held:
            stored = tensors.tensor(key)
            if held[key].shape != stored.shape or not torch.equal(held[key].cpu(), stored.to(held[key].dtype)):
                raise RecipeError(
                    f"model: {key} is not what {name} holds; save the changed model with save_pretrained and give its "
                    "folder"
                )
