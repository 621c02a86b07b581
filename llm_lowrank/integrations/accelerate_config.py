"""What a Trainer would hand to accelerate, turned into an engine of this library and its settings.

    args.deepspeed, accelerate's DeepSpeed plugin     engine: deepspeed, with the same configuration
    args.fsdp, accelerate's FSDP plugin (version 2)   engine: fsdp, with its resharding and offloading

Nothing of both may stay behind: accelerate would shard a second time what the engine has sharded, and transformers
would build models under deepspeed.zero.Init.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, str_to_bool
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.numerics.files import write_json
from llm_lowrank.run.command_line import RecipeError

USE_DEEPSPEED, USE_FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"


@contextmanager
def take_engine(args: TrainingArguments, engine: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield an engine's name and its settings of a recipe; take them out of `args` and of accelerate's state.

    engine: the one that the caller asks for, or None. RecipeError if args say another one, or FSDP's version 1. A
    configuration of DeepSpeed is a file that lives as long as the block; the engine fills in what is "auto" there.
    """
    config = None if args.deepspeed_plugin is None else args.deepspeed_plugin.deepspeed_config
    sharded = args.fsdp_plugin_args is not None or os.environ.get(USE_FSDP, "").lower() == "true"
    said = "deepspeed" if config is not None else "fsdp" if sharded else None
    if engine is not None and said is not None and engine != said:
        raise RecipeError(f"engine: {engine} is asked for, and args or accelerate's configuration say {said}; drop one")
    found: dict[str, Any] = {"fsdp": _sharding(args.fsdp_plugin_args)} if said == "fsdp" else {}
    if said is not None:
        _forget(args)
    with tempfile.TemporaryDirectory() as folder:
        if config is not None:
            write_json(Path(folder) / "deepspeed.json", config)
            found = {"deepspeed": str(Path(folder) / "deepspeed.json")}
        yield engine or said or "plain", found


def _sharding(plugin: dict[str, Any] | None) -> Sharding:
    """The sharding of accelerate's FSDP plugin, from args or from the environment that `accelerate launch` sets."""
    plugin = plugin or {
        "fsdp_version": os.environ.get("FSDP_VERSION", "1"),
        "reshard_after_forward": os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true"),
        "cpu_offload": os.environ.get("FSDP_OFFLOAD_PARAMS", "false"),
        "activation_checkpointing": os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false"),
    }
    if int(plugin.get("fsdp_version", 1)) != 2:
        raise RecipeError("fsdp_version: 1 cannot hold quantized weights beside trained ones; set fsdp_version: 2")
    if _truth(plugin.get("activation_checkpointing", False)):
        raise RecipeError(
            "fsdp_config: activation_checkpointing is accelerate's, which does not wrap the model here; set "
            "gradient_checkpointing: true in the arguments instead"
        )
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
