"""The DeepSpeed configuration of a run, and what ZeRO holds in memory under it. deepspeed itself is not needed here."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch

from llm_lowrank.engines.memory import NOTHING, Amount, Held, Sizes
from llm_lowrank.numerics.optimizers import Optimization

Config = dict[str, Any]

# Top-level keys that say how to shard and communicate. DeepSpeed ignores a key that it does not know; we do not.
KNOBS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "comms_logger",
    "memory_breakdown",
)

# (path in the JSON, what makes it unusable, why and what to do)
REFUSALS: tuple[tuple[str, Any, str], ...] = (
    (
        "zero_optimization.zero_quantized_nontrainable_weights",
        bool,
        "it re-encodes frozen weights: use the recipe's `codec`",
    ),
    ("zero_optimization.zero_quantized_weights", bool, "exchanges would be rounded to int8 on the way: remove it"),
    (
        "zero_optimization.zero_quantized_gradients",
        bool,
        "importance would be measured on rounded gradients: remove it",
    ),
    (
        "zero_optimization.zero_hpz_partition_size",
        lambda v: v != 1,
        "its secondary shards do not see an exchange: set it to 1",
    ),
    ("zero_optimization.mics_shard_size", lambda v: v not in (0, -1), "MiCS shards are not supported: remove it"),
    (
        "zero_optimization.offload_param.device",
        lambda v: v == "nvme",
        "a parameter swapped to NVMe cannot be edited: use cpu or none",
    ),
    (
        "zero_optimization.offload_optimizer.device",
        lambda v: v == "nvme",
        "moments swapped to NVMe cannot be edited: use cpu or none",
    ),
    (
        "bf16.enabled",
        lambda v: v is True,
        'it would cast the frozen pairs and the fp32 masters: write "auto" and set `dtype: bfloat16`',
    ),
    (
        "fp16.enabled",
        lambda v: v not in (False, "auto"),
        "fp16 training with loss scaling is not supported: set `dtype: bfloat16`",
    ),
)


def read_config(source: Config | str | Path) -> Config:
    """Return a DeepSpeed configuration, as it is or from a JSON file; ValueError if that cannot be read."""
    if isinstance(source, dict):
        return source
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"DeepSpeed config {source}: {error}") from error


def resolve(config: Config, settings: Optimization, world: int, persistent: int) -> Config:
    """Return the configuration with every "auto" replaced; ValueError names the key that cannot be right.

    "auto" is a feature of transformers, not of DeepSpeed. Parameters of up to `persistent` elements stay gathered under
    ZeRO-3 (see frozen.persistent_size), so that adapters are gathered once per step and not once per use.
    """
    _refuse(config)
    section = dict(config["zero_optimization"])

    # what the recipe says already: the JSON may repeat it, and may not contradict it
    from_recipe = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "train_batch_size": settings.micro_batch * settings.accumulation * world,
        "gradient_clipping": settings.max_grad_norm,  # DeepSpeed clips at 1.0 if nothing is set
    }
    for key, value in from_recipe.items():
        if config.get(key, "auto") not in ("auto", value):
            raise ValueError(
                f'DeepSpeed config: {key} is {config[key]} but the recipe asks for {value}; write "auto" in the JSON'
            )

    # numbers that DeepSpeed wants and a user rarely has an opinion about
    automatic = {
        "reduce_bucket_size": 50_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_param_persistence_threshold": persistent,
    }
    for key, value in automatic.items():
        if section.get(key, "auto") == "auto":
            section[key] = value
    for key in ("offload_param", "offload_optimizer"):
        if isinstance(section.get(key), dict) and section[key].get("pin_memory") == "auto":
            section[key] = {**section[key], "pin_memory": torch.cuda.is_available()}
    left = [key for key, value in section.items() if value == "auto"]
    if left:
        raise ValueError(f"DeepSpeed config: no automatic value for zero_optimization.{left[0]}; write a number")

    # precision sections are left out: DeepSpeed stays in its fp32 mode, see zero.py
    kept = {key: value for key, value in config.items() if key not in ("bf16", "fp16", "zero_optimization")}
    return {
        "steps_per_print": 2**62,  # the run prints, not DeepSpeed
        **kept,
        **from_recipe,
        "zero_optimization": section,
        # with these two flags DeepSpeed takes torch's AdamW; its own would be compiled in C++ first
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _refuse(config: Config) -> None:
    """Raise ValueError for an unknown key, a setting of REFUSALS, or a stage that shards nothing."""
    for key in config:
        if key not in KNOBS:
            near = difflib.get_close_matches(key, KNOBS, 1)
            raise ValueError(
                f"DeepSpeed config: key {key!r} is not an engine knob"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + " (optimizer, scheduler and precision are set in the recipe)"
            )
    for path, is_bad, why in REFUSALS:
        value: Any = config
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and is_bad(value):
            raise ValueError(f"DeepSpeed config: {path} = {value!r} cannot be used: {why}")
    stage = config.get("zero_optimization", {}).get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed config: zero_optimization.stage must be 1, 2 or 3, not {stage!r}; use `engine: plain` without "
            "ZeRO"
        )


# --- memory -----------------------------------------------------------------------------------------------------------


def held(sizes: Sizes, world: int, source: Config | str | Path | None, optimization: Optimization) -> list[Held]:
    """Return what a rank holds under ZeRO-1, 2 and 3. source: the configuration; None stands for its defaults."""
    section: Config = {}
    if source is not None:
        section = resolve(read_config(source), optimization, world, sizes.persistent)["zero_optimization"]
    return [_held_under(stage, sizes, world, section, optimization) for stage in (1, 2, 3)]


def _held_under(stage: int, sizes: Sizes, world: int, section: Config, optimization: Optimization) -> Held:
    w, k, t = sizes.parts
    moments = len(optimization.kind.moments)

    def cut(nbytes: int, formula: str, *, sharded: bool) -> Amount:
        return (nbytes / world, f"{formula} / N") if sharded else (nbytes, formula)

    persistent = gathered = NOTHING
    if stage == 3 and world > 1:  # on one rank the slice of a parameter is the whole
        small = section.get("stage3_param_persistence_threshold", sizes.persistent)
        parameters = sizes.frozen + sizes.bank + sizes.trained
        whole = sum(nbytes for elements, nbytes in parameters if elements <= small)
        # DeepSpeed counts elements; the widest ones bound the bytes
        live = section.get("stage3_max_live_parameters", 10**9)
        live *= max(nbytes / elements for elements, nbytes in sizes.frozen)
        persistent, gathered = (whole, "P"), (min(w + k + t - whole, live), "G")
    return Held(
        title=f"ZeRO-{stage}",
        chosen=section.get("stage") == stage,
        legend="P, G: parameters up to stage3_param_persistence_threshold; stage3_max_live_parameters"
        if stage == 3
        else "",
        notes=tuple(
            f"{key}: part of this lies in {section[key]['device']} memory, as the DeepSpeed configuration says."
            for key in ("offload_param", "offload_optimizer")
            if (section.get(key) or {}).get("device", "none") != "none"
        ),
        frozen=cut(w, "W", sharded=stage == 3),
        bank=cut(k, "K", sharded=stage == 3),
        adapters=cut(t, "T", sharded=stage == 3),
        master=cut(t, "T", sharded=True),
        gradients=cut(t, "T", sharded=stage > 1),
        moments=cut(moments * t, f"{moments} T", sharded=True),
        persistent=persistent,
        gathered=gathered,
    )
