"""transformers' Trainer, and what is made from it such as TRL's SFTTrainer, with a method of this library.

    trainer = lowrank(SFTTrainer)(model="path/or/hub-name", method=SRLoRA(rank=16), args=args, train_dataset=data)
    trainer.train()

The Trainer keeps the data, the loss, the schedule, the log, the evaluation and the callbacks. The model, its gradients,
its optimizer and its checkpoints belong to an engine of this library, by `own_loop.Prepared`: so a step here is a step
of the library's own loop on the same batches, on one process, with DDP, FSDP2 and ZeRO. Settings that the Trainer would
hand to accelerate (`deepspeed`, `fsdp`, accelerate's own configuration) choose the engine, see accelerate_config.py.

The Trainer hands its loss to accelerator.backward, for gradients that are averaged over ranks. Here the same loss,
divided by the number of ranks, is the rank's share.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import has_length

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.method import Method, output_layer
from llm_lowrank.integrations.accelerate_config import take_engine
from llm_lowrank.integrations.own_loop import Prepared
from llm_lowrank.models.export import SavedAdapter
from llm_lowrank.run.calibration import same_random_numbers
from llm_lowrank.run.command_line import RecipeError

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "lion_32bit": "lion",
    "sgd": "sgd",
}
# What an argument of the Trainer must be, and what to do where it is something else.
REFUSED = {
    "fp16": (False, "the backbone and its products are float32 or bfloat16; set bf16: true"),
    "load_best_model_at_end": (
        False,
        "exchanges cannot be taken back in a model that is loaded; set it to false: every checkpoint folder holds the "
        "adapter of its step, and trainer.state.best_model_checkpoint names the best one",
    ),
    "auto_find_batch_size": (False, "the engine is made for one batch size; set it to false"),
    "torch_compile": (False, "compile with llm-lowrank train --torch_compile, which compiles layer by layer"),
    "use_liger_kernel": (False, "use llm-lowrank train --use_liger_kernel, which proves the kernels first"),
    "average_tokens_across_devices": (
        True,
        "each rank would weigh its tokens by its own count; leave it at true, where a token counts the same anywhere",
    ),
}


def lowrank(kind: type[Trainer]) -> type[Trainer]:
    """Return a subclass of a Trainer whose models are adapted and trained by this library.

    Its __init__ takes the arguments of `kind`, and

        model    a folder, a hub name, or a model loaded from one of these that nobody changed since
        method   the method, for example SRLoRA(rank=16, target_rank=32)
        codec    dense, nf4 or int8: how the frozen weights are stored
        engine   plain, fsdp or deepspeed; by default what `args` and accelerate's configuration say, else plain
        dtype    of the backbone and its products: float32 or bfloat16, by default bfloat16 if args.bf16
        fsdp, deepspeed, modules_to_save    as in a recipe

    RecipeError, a ValueError, names the argument that the engines cannot honor, and what to do.
    """
    return type(f"Lowrank{kind.__name__}", (_Lowrank, kind), {"__doc__": lowrank.__doc__, "kind": kind})


class _Lowrank(Trainer):
    """The part of a Trainer that lowrank() replaces."""

    kind: type[Trainer]  # the class that lowrank() was given

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        method: Method,
        codec: str = "dense",
        engine: str | None = None,
        dtype: str | None = None,
        **others: Any,
    ) -> None:
        args = args or default_arguments(self.kind, model)
        for name in ("model_init", "peft_config", "quantization_config", "optimizer_cls_and_kwargs"):
            if others.get(name) is not None:
                raise RecipeError(f"{name}: the model is made by lowrank(), from method and codec; leave it out")
        if any(others.get("optimizers", (None, None))):
            raise RecipeError("optimizers: the optimizer belongs to the engine; choose it and its schedule in args")
        packed = any(getattr(args, name, False) for name in ("packing", "padding_free"))
        if packed and (joined := method.tells_samples_apart):
            raise RecipeError(
                f"packing, padding_free: they put several samples into a row, where {joined} cannot tell them apart; "
                "change one of them"
            )
        settings = settings_of(args) | {"dtype": dtype or ("bfloat16" if args.bf16 else "float32")}
        settings |= {key: others.pop(key) for key in ("fsdp", "deepspeed", "modules_to_save") if key in others}
        with take_engine(args, engine) as (engine, found):
            self.prepared = Prepared(model, method, codec, engine, settings | found)
        self.logged = 0  # exchanges that the log has
        args._n_gpu = min(1, args.n_gpu)  # one process drives one device
        super().__init__(self.prepared.base, args, **others)
        if "forward" in vars(self.prepared.base):
            self._refuse_output_layer()
        # what accelerate would wrap, average or hold back is the engine's business
        self.accelerator.prepare_model = lambda model, *args, **kwargs: model
        self.accelerator.backward = self._backward
        self.accelerator.no_sync = lambda model: contextlib.nullcontext()

    def _refuse_output_layer(self) -> None:
        """Raise RecipeError if a trainer that computes its loss past the output layer is to train that layer."""
        layer = output_layer(self.prepared.base)
        if not isinstance(layer, Adapter) and (layer is None or not any(p.requires_grad for p in layer.parameters())):
            return
        name = next(name for name, module in self.prepared.base.named_modules() if module is layer)
        raise RecipeError(
            f"method, modules_to_save: {self.kind.__name__} computes its loss from the weight of {name} and never "
            f"calls the layer, so that it would not be trained; leave {name} out of target_modules (LoSiA: "
            "output_factor=0) and modules_to_save, or use llm-lowrank train"
        )

    # ---- the model

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Do nothing: the engine places the model."""

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if self.prepared.loaded is None:  # an evaluation before the training
            self._load(max(1, self.args.max_steps), None)
        return self.prepared.model

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        if self.prepared.loaded is not None:
            raise RuntimeError(
                "the model is loaded already, by an earlier train() or evaluate(): make a new trainer, which begins "
                "with the weights of the checkpoint"
            )
        self._load(max_steps, resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load(self, max_steps: int, resume_from: str | None) -> None:
        self.prepared.load(max_steps, resume_from, self._calibration)
        self.model_wrapped = self.prepared.model

    def _calibration(self, model: nn.Module) -> Iterator[Tensor]:
        """This rank's losses of the samples that come next, as many steps as the method's samples take."""
        prepared, accumulation = self.prepared, self.args.gradient_accumulation_steps
        samples = self.args.per_device_train_batch_size * prepared.parts
        count = -(-prepared.method.calibration // samples) * accumulation
        with same_random_numbers(prepared.engine.device):
            loader = self.get_train_dataloader()
            done = prepared.step * accumulation
            if has_length(loader):  # of an epoch that ends too soon the last ones are taken
                done = max(0, min(done % len(loader), len(loader) - count))
            batches = [batch for batch, _ in zip(skip_first_batches(loader, done), range(count), strict=False)]
        if len(batches) < count:
            raise RecipeError(
                f"method: {type(prepared.method).__name__} looks at {prepared.method.calibration} samples, and the "
                "data has fewer; lower its number of samples"
            )
        for batch in batches:
            with self.compute_loss_context_manager():
                outputs = model(**self._prepare_inputs(batch))
            yield outputs.loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Do nothing: `_load` reads the checkpoint when it shards the model."""

    # ---- the step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = self.prepared.optimizer
        self.optimizer.param_groups[0]["lr"] = self.args.learning_rate  # the schedule multiplies it
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, self.prepared.optimizer)
        if not isinstance(scheduler, LambdaLR):
            raise RecipeError(
                f"lr_scheduler_type: {self.args.lr_scheduler_type} has no rate for a step that has not come yet, which "
                "methods ask for; take cosine, linear or another function of the step"
            )
        (peak,), (shape,) = scheduler.base_lrs, scheduler.lr_lambdas
        self.prepared.rate = lambda step: float(peak * shape(step))
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Set the schedule to the step of the checkpoint. The engine has restored the moments."""
        if checkpoint is not None:
            scheduler: Any = self.lr_scheduler
            scheduler.last_epoch = self.prepared.step
            scheduler._last_lr = [self.prepared.rate(self.prepared.step)]
            for group in self.prepared.optimizer.param_groups:
                group["lr"] = self.prepared.rate(self.prepared.step)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        missing = self.args.gradient_accumulation_steps - self.current_gradient_accumulation_steps
        if missing and self.prepared.micro == 0:
            # The last step of an epoch has fewer micro-batches than the engine reduces after. The others count nothing.
            given = {key: value for key, value in self._prepare_inputs(inputs).items() if key != "labels"}
            for _ in range(missing):
                self.prepared.accumulate(0.0 * model(**given).logits.float().sum())
        return super().training_step(model, inputs, num_items_in_batch)

    def _backward(self, loss: Tensor, **kwargs: Any) -> None:
        self.prepared.accumulate(loss / self.prepared.engine.world)

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """Do nothing: the optimizer's step clips, after the method has looked at the gradients."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        return self.prepared.engine.gradient_norm()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        prepared = self.prepared
        if "loss" in logs and prepared.loaded is not None:
            found = prepared.method.metrics(prepared.adapters, prepared.engine)
            logs |= {f"method/{name}": value for name, value in found.items()}
            news, self.logged = prepared.exchanges[self.logged :], len(prepared.exchanges)
            if news:
                logs["exchange/pairs"] = sum(event.pairs for _, event in news)
                logs["exchange/drift"] = max(event.drift for _, event in news)
        super().log(logs, *args, **kwargs)

    # ---- files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter as PEFT reads it, with the tokenizer. Collective: every rank calls it."""
        folder = Path(output_dir or self.args.output_dir)
        self.save_adapter(folder)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_adapter(self, path: str | Path) -> SavedAdapter | None:
        """Write the adapter as PEFT reads it, on rank 0; return a report there. Collective."""
        return self.prepared.save_adapter(path)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write what a resume needs beside the Trainer's own files. Collective."""
        self.prepared.save(output_dir)


def default_arguments(kind: type[Trainer], model: str | Path | PreTrainedModel) -> TrainingArguments:
    """Return the arguments that a Trainer makes for itself where it is given none: of TRL's SFTTrainer an SFTConfig."""
    module = sys.modules[kind.__module__]
    config = getattr(module, kind.__name__.replace("Trainer", "Config"), TrainingArguments)
    name = model.config._name_or_path if isinstance(model, PreTrainedModel) else str(model)
    return config(output_dir=f"{Path(name).name}-{kind.__name__.removesuffix('Trainer') or 'Trainer'}")


def settings_of(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings of a recipe that the arguments of a Trainer stand for; RecipeError for what has none."""
    for name, (wanted, remedy) in REFUSED.items():
        if bool(getattr(args, name)) is not wanted:
            raise RecipeError(f"{name}: {remedy}")
    if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        raise RecipeError(
            "gradient_checkpointing_kwargs: use_reentrant: true loses the gradients of frozen layers' inputs; set it "
            "to false"
        )
    optim = getattr(args.optim, "value", args.optim)
    if optim not in OPTIMIZERS:
        raise RecipeError(f"optim: {optim} is not one of {', '.join(OPTIMIZERS)}, which the engines can shard")
    adam = {"adam_beta1": args.adam_beta1, "adam_beta2": args.adam_beta2, "adam_epsilon": args.adam_epsilon}
    taken = {"adamw": adam, "lion": {key: adam[key] for key in ("adam_beta1", "adam_beta2")}}
    return {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "seed": args.seed,
        "optim": OPTIMIZERS[optim],
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        **taken.get(OPTIMIZERS[optim], {}),
    }
