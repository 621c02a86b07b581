"""From a recipe to what a run is built of: optimizer settings, schedule, codec, model, data, the engine's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.method import ALL_LINEAR, attach
from llm_lowrank.adapters.tokens import TrainedTokens
from llm_lowrank.adapters.whole import WholeNorm
from llm_lowrank.codecs import Codec, Dense, make
from llm_lowrank.data import Batches, Corpus, StreamBatches, load_corpus, pad_id, tokenizer_of, training_batches
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models import liger
from llm_lowrank.models.architectures import limits_of, outer, read_config, skeleton, tied_modules, whole_model
from llm_lowrank.models.coverage import check_coverage, coverage
from llm_lowrank.models.inherited import inherit, open_adapter
from llm_lowrank.models.vocabulary import find_tokens, train_rows
from llm_lowrank.models.whole import train_whole
from llm_lowrank.numerics.optimizers import Optimization
from llm_lowrank.numerics.schedule import Schedule
from llm_lowrank.run import SHIPPED
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import Recipe

WARMUP = 5  # steps, where the recipe names none and the run is long enough


def optimization(recipe: Recipe) -> Optimization:
    """What the engine needs to know."""
    return Optimization(
        learning_rate=recipe.learning_rate,
        optim=recipe.optim,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        # a direction is made of clipped gradients, see adapters.redirect, and is not clipped itself
        max_grad_norm=0.0 if recipe.method.directs else recipe.max_grad_norm,
        accumulation=recipe.gradient_accumulation_steps,
        micro_batch=recipe.per_device_train_batch_size,
    )


def schedule_of(recipe: Recipe, total: int) -> Schedule:
    """Return the learning rates of a run of `total` steps. RecipeError where the recipe contradicts that length."""
    if errors := schedule_errors(recipe, total, f"the {total} steps of the run"):
        raise RecipeError("\n".join(errors))
    warmup = min(WARMUP, total // 2) if recipe.warmup_steps is None else recipe.warmup_steps
    if recipe.warmup_ratio is not None:
        warmup = round(recipe.warmup_ratio * total)
    return Schedule(recipe.learning_rate, total, warmup, recipe.lr_scheduler_type, recipe.min_lr_rate)


def schedule_errors(recipe: Recipe, total: int, length: str) -> list[str]:
    """Settings of the learning rate that contradict each other or the run's length; a total of -1 is not known yet."""
    errors = []
    if recipe.warmup_steps is not None and recipe.warmup_ratio is not None:
        errors.append(
            f"warmup_steps ({recipe.warmup_steps}) and warmup_ratio ({recipe.warmup_ratio:g}) both say how long the "
            "warm-up is; remove one"
        )
    if recipe.warmup_steps is not None and 1 <= total < recipe.warmup_steps:
        errors.append(f"warmup_steps ({recipe.warmup_steps}) is more than {length}; lower it or train longer")
    if recipe.min_lr_rate and recipe.lr_scheduler_type == "constant":
        errors.append(f"min_lr_rate ({recipe.min_lr_rate:g}) has no use with lr_scheduler_type: constant; remove one")
    return errors


def codec(recipe: Recipe) -> Codec:
    """How the frozen weights are stored."""
    return make(recipe.codec, getattr(torch, recipe.dtype), recipe.codec_double_quant)


def build_model(recipe: Recipe, folder: str | Path) -> tuple[PreTrainedModel, list[Adapter]]:
    """The model of a checkpoint's config with its adapters, without any weights.

    ValueError where the model hides most of its weights from adapters or codec, and allow_partial does not allow it.
    """
    model = skeleton(folder, getattr(torch, recipe.dtype), *attentions(recipe))
    if not recipe.allow_partial:
        check_coverage(
            model, coverage(model), all_linear=recipe.method.target_modules == [ALL_LINEAR], codec=recipe.codec
        )
    adapters = attach(model, recipe.method, codec(recipe), recipe.seed)
    _refuse_in_place(model, adapters)
    if isinstance(recipe.method, LoRA) and recipe.method.adapter:
        around = outer(model, read_config(folder))
        lora = open_adapter(recipe.method.adapter)
        inherit(lora, model, adapters, role=recipe.method.adapter_role, outer_name=around.outer)
    if recipe.new_tokens or recipe.trained_tokens:
        if whole_model(read_config(folder)) is not None:
            raise ValueError(
                f"new_tokens, trained_tokens: {folder} is a model for more than text, whose vocabulary is not changed "
                "here; give a language model"
            )
        train_rows(model, adapters, tokens_of(recipe, folder, model)[1])
    if recipe.modules_to_save:
        _train_whole(recipe, model)
    if recipe.save_merged and (shared := tied_modules(model, [adapter.name for adapter in adapters])):
        raise ValueError(
            f"method.target_modules names {shared[0]}, which shares its weight with the embedding "
            "(tie_word_embeddings). It is trained alone and exported as an adapter, but a merged checkpoint of this "
            f"config has no place for it: set save_merged: false, or leave {shared[0]} out"
        )
    return model, adapters


def _train_whole(recipe: Recipe, model: PreTrainedModel) -> None:
    """Train what modules_to_save names. ValueError where other settings contradict that."""
    trained = train_whole(model, recipe.modules_to_save)
    norms = [name for name, module in trained.items() if isinstance(module, WholeNorm)]
    if norms and recipe.weight_decay:
        raise ValueError(
            f"modules_to_save, weight_decay: {norms[0]} would be pulled towards zero, and a norm starts near one; set "
            "weight_decay: 0, or leave the norms out"
        )
    if norms and recipe.use_liger_kernel:
        raise ValueError(
            f"modules_to_save, use_liger_kernel: Liger's kernel for norms would take the place of {norms[0]}, which is "
            "trained; set use_liger_kernel: false, or leave the norms out"
        )


def tokens_of(
    recipe: Recipe, folder: str | Path, model: PreTrainedModel
) -> tuple[PreTrainedTokenizerBase, TrainedTokens]:
    """The tokenizer of a checkpoint with the recipe's new tokens, and the tokens whose rows are trained.

    model: without trained rows. ValueError if a token that is to be trained is none, or a new one is there already.
    """
    tokenizer = tokenizer_of(folder, recipe.data.chat_template)
    tokens = find_tokens(
        tokenizer,
        model.get_input_embeddings().num_embeddings,
        new=recipe.new_tokens,
        trained=recipe.trained_tokens,
        start=recipe.new_tokens_start,
    )
    return tokenizer, tokens


def use_kernels(
    recipe: Recipe, folder: str | Path, model: PreTrainedModel, adapters: list[Adapter], device: torch.device
) -> str:
    """Prove Liger's kernels on this device and put them into the model; return a sentence about it.

    ValueError where they do not support the model or compute something else.
    """
    overwriting = not any(hasattr(adapter, "magnitude") for adapter in adapters)  # its gradient needs the output
    method = LoRA(recipe.method.target_modules, recipe.method.exclude_modules, rank=1)

    def make(dtype: torch.dtype) -> PreTrainedModel:
        short = skeleton(folder, dtype, "sdpa", "eager")
        attach(short, method, Dense(dtype), recipe.seed)
        return short

    proof = liger.prove(make, model.dtype, device, overwriting)
    kept = "" if overwriting else ", no rotations and activations, for they overwrite what a trained magnitude needs"
    return f"liger-kernel: {liger.put_in(model, overwriting)}{kept}; outputs and gradients: {proof}"


def _refuse_in_place(model: PreTrainedModel, adapters: list[Adapter]) -> None:
    """Raise ValueError if the model overwrites the output of a layer whose magnitude is trained, as its gradient needs
    that output.
    """
    config = model.config
    if config.model_type != "falcon" or not (config.parallel_attn or config.new_decoder_architecture):
        return
    for adapter in adapters:
        if hasattr(adapter, "magnitude") and adapter.name.endswith("dense_4h_to_h"):
            raise ValueError(
                f"{adapter.name}: {type(model).__name__} adds to the output of this layer in place, and a trained "
                "magnitude needs the output as it was; use method.type: lora, or leave the layer out: "
                "--method.exclude_modules dense_4h_to_h"
            )


def attentions(recipe: Recipe) -> list[str]:
    """The implementations of attention to try on this machine, the first choice first."""
    if recipe.attn_implementation != "auto":
        return [recipe.attn_implementation]
    return [*([] if missing_for_flash(recipe) else ["flash_attention_2"]), "sdpa", "eager"]


def attention(recipe: Recipe, model: PreTrainedModel) -> tuple[str, str]:
    """The attention of a model, and why it is this one."""
    used, choices = model.config._attn_implementation, attentions(recipe)
    if len(choices) == 1:
        return used, "as attn_implementation says"
    if used != choices[0]:
        return used, f"for transformers has no {' or '.join(choices[: choices.index(used)])} for {type(model).__name__}"
    if lacking := missing_for_flash(recipe):
        return used, f"for flash_attention_2 needs {' and '.join(lacking)}"
    return used, "for flash-attn is installed"


def missing_for_flash(recipe: Recipe) -> list[str]:
    """What is missing for flash_attention_2 here."""
    lacking = [] if recipe.dtype == "bfloat16" else ["dtype: bfloat16"]
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        lacking.append("a CUDA device of capability 8.0 or more")
    elif not is_flash_attn_2_available():
        lacking.append("flash-attn")
    return lacking


def read_data(
    recipe: Recipe, folder: str | Path, rank: int, world: int, date: str = ""
) -> tuple[PreTrainedTokenizerBase, Corpus, Batches | StreamBatches]:
    """What a run is trained on: the tokenizer of a checkpoint, the data, and this rank's batches of it.

    date: as in load_corpus.
    """
    model = skeleton(folder, torch.float32, "eager")
    tokenizer, tokens = tokens_of(recipe, folder, model)
    limits = replace(limits_of(model), vocabulary=tokens.size)
    corpus = load_corpus(recipe.data, tokenizer, recipe.seed, date, limits)
    batches = training_batches(
        corpus,
        recipe.data,
        per_device=recipe.per_device_train_batch_size,
        accumulation=recipe.gradient_accumulation_steps,
        rank=rank,
        world=world,
        seed=recipe.seed,
        pad_id=pad_id(tokenizer, limits.vocabulary),
        epochs=recipe.num_train_epochs,
    )
    return tokenizer, corpus, batches


def deepspeed_config(recipe: Recipe) -> Path:
    """The JSON that `deepspeed:` names: relative to the working directory, else to SHIPPED."""
    given = Path(recipe.deepspeed).expanduser()
    for path in (given, SHIPPED / given):
        if path.is_file():
            return path
    there = ", ".join(sorted(str(path.relative_to(SHIPPED)) for path in SHIPPED.glob("ds_configs/*.json"))) or "none"
    raise RecipeError(f"deepspeed: {recipe.deepspeed} is not a file, neither here nor in {SHIPPED}; there are {there}")


def engine_settings(recipe: Recipe) -> Any:
    """Return what the recipe says to its engine: the setting of the engine's name, None if there is none."""
    return deepspeed_config(recipe) if recipe.engine == "deepspeed" else getattr(recipe, recipe.engine, None)
