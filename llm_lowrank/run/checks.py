"""What is wrong with a recipe, found before a model is loaded: all complaints at once, each with what to do."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_lowrank.codecs import CODECS
from llm_lowrank.data import Corpus
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.models import liger
from llm_lowrank.models.checkpoint import later_ones
from llm_lowrank.models.hub import name_errors
from llm_lowrank.numerics.optimizers import OPTIMIZERS
from llm_lowrank.run.build import deepspeed_config, missing_for_flash, schedule_errors
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.metrics import NAMED_BY, TRACKERS, chosen
from llm_lowrank.run.recipe import Recipe

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
    **dict.fromkeys(("logging_steps", "save_total_limit", "nodes"), POSITIVE),
    **dict.fromkeys(("warmup_steps", "eval_steps", "save_steps", "seed", "early_stopping_patience"), NATURAL),
    **dict.fromkeys(("learning_rate", "adam_epsilon", "num_train_epochs", "ddp_timeout"), ABOVE_ZERO),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "neftune_noise_alpha"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "warmup_ratio", "label_smoothing"), DECAY),
    "min_lr_rate": ("must be at least 0 and at most 1", lambda x: 0 <= x <= 1),
    "max_steps": ("must be at least 1, or -1 for as many as num_train_epochs take", lambda x: x >= 1 or x == -1),
    "model_name_or_path": ("must name a model", bool),
    "output_dir": ("must name a folder", bool),
}


def validate(recipe: Recipe) -> None:
    """Check what can be known before a model is loaded; raise one RecipeError with all complaints."""
    errors = [
        f"{key} {text}, not {getattr(recipe, key)}"
        for key, (text, good) in RANGES.items()
        if getattr(recipe, key) is not None and not good(getattr(recipe, key))
    ]
    errors += _optimizer_errors(recipe)
    errors += _token_errors(recipe)
    errors += _beside_errors(recipe)
    errors += schedule_errors(recipe, recipe.max_steps, f"max_steps ({recipe.max_steps})")
    errors += profile_errors(recipe, recipe.max_steps)
    if recipe.push_to_hub:
        named = name_errors(recipe.hub_model_id, recipe.save_merged)
        errors += named if recipe.hub_model_id else ["push_to_hub: true needs hub_model_id, such as OWNER/NAME"]
    elif recipe.hub_model_id or recipe.hub_private_repo is not None:
        errors.append("hub_model_id and hub_private_repo are for push_to_hub: true; set it, or remove them")
    errors += best_errors(recipe, recipe.max_steps)
    for key, given in (("gpu", recipe.gpu != "none"), ("nodes", recipe.nodes is not None)):
        if given and not recipe.dry_run:
            errors.append(f"{key} is for a dry run, which predicts with it; add --dry_run or remove {key}")
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
    if recipe.attn_implementation == "flash_attention_2" and (lacking := missing_for_flash(recipe)):
        install = '; pip install --no-build-isolation "llm-lowrank[cuda]"' if "flash-attn" in lacking else ""
        errors.append(
            f"attn_implementation: flash_attention_2 needs {' and '.join(lacking)}{install}, or take auto or sdpa"
        )
    if recipe.use_liger_kernel and (lacking := liger.missing()):
        install = '; pip install "llm-lowrank[liger]"' if "liger-kernel" in lacking else ""
        errors.append(f"use_liger_kernel: true needs {' and '.join(lacking)}{install}, {liger.OFF}")
    if recipe.use_liger_kernel and recipe.torch_compile:
        errors.append(
            "use_liger_kernel: true and torch_compile: true do not go together: both fuse norms, rotations and "
            "activations, and kernels inside of a compiled layer would not be those that the run has compared; set one "
            "of them to false"
        )
    if recipe.loss_type == "dft" and recipe.label_smoothing:
        errors.append(
            "loss_type: dft weighs a token by the probability of its label, and label_smoothing gives it several "
            "labels; set label_smoothing: 0 or loss_type: nll"
        )
    if recipe.data.packing and (setting := recipe.method.tells_samples_apart):
        errors.append(
            f"data.packing: true puts several samples into a row, where {setting} cannot tell them apart; change one "
            "of them"
        )
    if recipe.data.packing and recipe.neftune_noise_alpha:
        errors.append(
            "data.packing: true puts several samples into a row, and the noise of neftune_noise_alpha depends on the "
            "length of each; change one of them"
        )
    if recipe.data.streaming and recipe.max_steps < 1:
        errors.append("data.streaming: how long the data is cannot be known; set max_steps")
    if recipe.engine != "fsdp" and recipe.fsdp != Sharding():
        errors.append(f"the settings under fsdp are for engine: fsdp, not {recipe.engine}")
    if recipe.engine == "deepspeed":
        errors += _deepspeed_errors(recipe)
    errors += _tracker_errors(recipe)
    errors += _path_errors(recipe)
    if errors:
        raise RecipeError("\n".join(errors))


def profile_errors(recipe: Recipe, total: int) -> list[str]:
    """What is wrong with profile_steps in a run of `total` steps; a total of -1 is not known yet."""
    asked = recipe.profile_steps
    if not asked:
        return []
    if len(asked) != 2 or not 1 <= asked[0] <= asked[1]:
        return [f"profile_steps: {asked} is not a first and a last step, counted from 1; write 10,12"]
    if 1 <= total < asked[1]:
        return [f"profile_steps: {asked} ends behind the run, which has {total} steps; name earlier steps"]
    return []


def best_errors(recipe: Recipe, total: int, corpus: Corpus | None = None) -> list[str]:
    """What is wrong with the choice of the best state in a run of `total` steps; -1 and None are not known yet."""
    chosen = "load_best_model_at_end: true"
    if not recipe.load_best_model_at_end:
        keys = ("metric_for_best_model", "early_stopping_patience")
        set_ = [key for key in keys if getattr(recipe, key) != getattr(Recipe, key)]
        return [f"{key} is for {chosen}; add that, or remove {key}" for key in set_]
    errors, every = [], recipe.eval_steps
    if not every or 1 <= total <= every:
        run = f"the run, which has {total} steps" if total > 0 else "the run"
        errors.append(
            f"{chosen} compares evaluations, of which eval_steps: {every} makes none within {run}; set eval_steps"
        )
    if not (recipe.data.held_out if corpus is None else len(corpus.held_out)):
        errors.append(f"{chosen} compares evaluations on held-out examples, and there are none; set data.held_out")
    elif recipe.metric_for_best_model == "exact_match" and corpus is not None and not corpus.questions:
        errors.append("metric_for_best_model: exact_match is of data with questions, and these have none; take loss")
    return errors


def _tracker_errors(recipe: Recipe) -> list[str]:
    errors = []
    for name in chosen(recipe.report_to):
        if name not in TRACKERS:
            lone = f"; {name} stands alone" if name in ("all", "none") else ""
            errors.append(f"report_to: {name} is no tracker; take some of {', '.join(TRACKERS)}, or all, or none{lone}")
        elif importlib.util.find_spec(name) is None:
            extra = {"tensorboard": "track"}.get(name, name)
            package = name.replace("_", "-") if name in NAMED_BY else f'"llm-lowrank[{extra}]"'
            errors.append(f"report_to: {name} is not installed; pip install {package} or --report_to none")
    return errors


def _optimizer_errors(recipe: Recipe) -> list[str]:
    """Settings that this optimizer does not take, where they are not at their defaults."""
    known = OPTIMIZERS[recipe.optim].settings
    errors = []
    for key in sorted({key for kind in OPTIMIZERS.values() for key in kind.settings if key not in known}):
        if getattr(recipe, key) != getattr(Recipe, key):
            takers = " and ".join(kind.title for kind in OPTIMIZERS.values() if key in kind.settings)
            errors.append(f"{key} is of {takers}, optim: {recipe.optim} has none; remove it")
    if recipe.weight_decay and not OPTIMIZERS[recipe.optim].decays:
        errors.append(
            f"weight_decay ({recipe.weight_decay:g}): with optim: {recipe.optim} it would become a part of the "
            "momentum, and decays no value by itself; set it to 0 or take another optimizer"
        )
    if recipe.method.own_step and recipe.optim != "sgd":
        errors.append(
            f"{recipe.method.own_step} is an optimizer of its own, and optim: {recipe.optim} would change its steps; "
            "set optim: sgd, which makes them as they are"
        )
    return errors


def _token_errors(recipe: Recipe) -> list[str]:
    named = [*recipe.new_tokens, *recipe.trained_tokens]
    errors = []
    if twice := sorted({token for token in named if named.count(token) > 1}):
        errors.append(f"new_tokens, trained_tokens: {twice[0]!r} is named twice; name each token once")
    if any(not token.strip() for token in named):
        errors.append("new_tokens, trained_tokens: a token is empty or blank; remove it")
    if recipe.new_tokens_start != "mean" and not recipe.new_tokens:
        errors.append("new_tokens_start says how new_tokens begin, and there are none; remove it")
    return errors


def _beside_errors(recipe: Recipe) -> list[str]:
    """What is trained beside the adapters, and contradicts other settings."""
    errors, own = [], recipe.method.own_step
    settings = {
        "new_tokens, trained_tokens": (recipe.new_tokens or recipe.trained_tokens, "rows of an embedding"),
        "modules_to_save": (recipe.modules_to_save, "a whole module"),
    }
    for name, (given, what) in settings.items():
        if given and own:
            errors.append(
                f"{name}: {own} needs optim: sgd, whose rate for pairs is none for {what}; use another method or "
                "direction"
            )
    if any(not name.strip() for name in recipe.modules_to_save):
        errors.append("modules_to_save: a name is empty or blank; remove it")
    return errors


def _deepspeed_errors(recipe: Recipe) -> list[str]:
    if importlib.util.find_spec("deepspeed") is None:
        return ["engine: deepspeed is not installed; pip install deepspeed or --engine plain"]
    try:
        config = json.loads(deepspeed_config(recipe).read_text(encoding="utf-8"))
    except RecipeError as error:
        return [str(error)]
    except ValueError as error:
        return [f"deepspeed: {recipe.deepspeed} is not JSON: {error}"]
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if recipe.torch_compile and isinstance(zero, dict) and zero.get("stage") == 3:
        return [
            "torch_compile: true and ZeRO stage 3 do not go together: stage 3 gathers parameters between modules of "
            "a layer, and each time the compiled graph would end; use engine: fsdp, ds_configs/zero2.json or "
            "torch_compile: false"
        ]
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
    """The reason why output_dir cannot be written to, or None."""
    output = recipe.output
    if output.exists() and not output.is_dir():
        return f"output_dir: {output} is a file"
    if not output.is_dir() or not any(output.iterdir()) or recipe.overwrite_output_dir:
        return None
    if recipe.resume_from_checkpoint == "auto":
        if (output / "adapter").exists() and not any(output.glob("checkpoints/step-*[0-9]")):
            return (
                f"output_dir: {output} holds a finished run and no checkpoint to resume from; write over it with "
                "--overwrite_output_dir"
            )
        return None
    asked = Path(recipe.resume_from_checkpoint).expanduser().resolve()
    if output.resolve() in asked.parents:
        later = [path.name for path in later_ones(output, asked)]
        if not later:
            return None
        return (
            f"output_dir: {output} holds {', '.join(reversed(later))}, behind the {asked.name} to resume from: two "
            "runs would be mixed; remove them with --overwrite_output_dir, choose another --output_dir, or resume with "
            "--resume_from_checkpoint auto"
        )
    return (
        f"output_dir: {output} is not empty; choose another --output_dir, write into it with --overwrite_output_dir, "
        "or resume with --resume_from_checkpoint auto"
    )
