"""What a Trainer would hand to accelerate, turned into an engine of this library and its settings.

    args.deepspeed, accelerate's DeepSpeed plugin     engine: deepspeed, with the same configuration
    args.fsdp, accelerate's FSDP plugin (version 2)   engine: fsdp, with its resharding and offloading

Nothing of both may stay behind: accelerate would shard a second time what the engine has sharded, and transformers
would build models under deepspeed.zero.Init.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, str_to_bool
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.run.command_line import RecipeError

USE_DEEPSPEED, USE_FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"


def take_engine(args: TrainingArguments, engine: str | None) -> tuple[str, dict[str, Any]]:
    """Return an engine's name and settings of a recipe, and take them out of `args` and of accelerate's state.

    engine: the one that the caller asks for, or None. RecipeError if args say another one, or FSDP's version 1.
    """
    found: dict[str, Any] = {}
    said = None
    if args.deepspeed_plugin is not None:
        said, found = "deepspeed", {"deepspeed": _config_file(args.deepspeed_plugin.deepspeed_config)}
    elif args.fsdp_plugin_args is not None or os.environ.get(USE_FSDP, "").lower() == "true":
        said, found = "fsdp", {"fsdp": _sharding(args.fsdp_plugin_args)}
    if engine is not None and said is not None and engine != said:
        raise RecipeError(f"engine: {engine} is asked for, and args or accelerate's configuration say {said}; drop one")
    if said is not None:
        _forget(args)
    return engine or said or "plain", found


def _config_file(config: dict[str, Any]) -> str:
    """Write DeepSpeed's configuration where an engine reads it; the engine fills in what is "auto"."""
    handle, name = tempfile.mkstemp(suffix=".json", prefix="deepspeed-")
    with os.fdopen(handle, "w") as file:
        json.dump(config, file)
    return str(Path(name))


def _sharding(plugin: dict[str, Any] | None) -> Sharding:
    """The sharding of accelerate's FSDP plugin, from args or from the environment that `accelerate launch` sets."""
    plugin = plugin or {
        "fsdp_version": os.environ.get("FSDP_VERSION", "1"),
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true"),
        "cpu_offload": os.environ.get("FSDP_OFFLOAD_PARAMS", "false"),
    }
    if int(plugin.get("fsdp_version", 1)) != 2:
        raise RecipeError("fsdp_version: 1 cannot hold quantized weights beside trained ones; set fsdp_version: 2")
    return Sharding(
        reshard_after_forward=_truth(plugin.get("reshard_after_forward", True)),
        cpu_offload=_truth(plugin.get("cpu_offload", False)),
    )


def _truth(value: Any) -> bool:
    return bool(str_to_bool(value.lower())) if isinstance(value, str) else bool(value)


def _forget(args: TrainingArguments) -> None:
    """Leave args and accelerate as they are where neither DeepSpeed nor FSDP is asked for."""
    args.deepspeed = args.deepspeed_plugin = args.hf_deepspeed_config = None
    args.fsdp, args.fsdp_plugin_args = [], None
    unset_hf_deepspeed_config()
    for name in (USE_DEEPSPEED, USE_FSDP):
        os.environ.pop(name, None)
    state = PartialState()
    if state.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP):
        on_host = state.device.type == "cpu"
        many = DistributedType.MULTI_CPU if on_host else DistributedType.MULTI_GPU
        state.distributed_type = many if state.num_processes > 1 else DistributedType.NO
    AcceleratorState._reset_state()
