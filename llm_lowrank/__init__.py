"""Dynamic low-rank adaptation of sharded language models.

    from llm_lowrank import Recipe, SRLoRA, train
    train(Recipe(method=SRLoRA(rank=16, target_rank=32)))

The names below are imported when they are first used, so that `import llm_lowrank` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_lowrank.data.settings import Data
    from llm_lowrank.integrations.own_loop import Prepared, prepare
    from llm_lowrank.methods.adalora import AdaLoRA
    from llm_lowrank.methods.beamlora import BeamLoRA
    from llm_lowrank.methods.cola import COLA
    from llm_lowrank.methods.core import Core
    from llm_lowrank.methods.dora import DoRA
    from llm_lowrank.methods.droplora import DropLoRA
    from llm_lowrank.methods.edora import EDoRA
    from llm_lowrank.methods.flat_lora import FlatLoRA
    from llm_lowrank.methods.lora import LoRA
    from llm_lowrank.methods.lora_fa import LoRAFA
    from llm_lowrank.methods.lora_ga import LoRAGA
    from llm_lowrank.methods.lora_one import LoRAOne
    from llm_lowrank.methods.lora_xs import LoRAXS
    from llm_lowrank.methods.losia import LoSiA
    from llm_lowrank.methods.miss import MiSS
    from llm_lowrank.methods.mora import MoRA
    from llm_lowrank.methods.osora import OSoRA
    from llm_lowrank.methods.pissa import PiSSA
    from llm_lowrank.methods.plora import PLoRA
    from llm_lowrank.methods.rasa import RaSA
    from llm_lowrank.methods.relora import ReLoRA
    from llm_lowrank.methods.reslora import ResLoRA
    from llm_lowrank.methods.sbora import SBoRA
    from llm_lowrank.methods.sora import SoRA
    from llm_lowrank.methods.squeeze import Squeeze
    from llm_lowrank.methods.srlora import SRLoRA
    from llm_lowrank.methods.vera import VeRA
    from llm_lowrank.run.python import train
    from llm_lowrank.run.recipe import Recipe

__version__ = "0.2.0"
__all__ = [
    "COLA",
    "AdaLoRA",
    "BeamLoRA",
    "Core",
    "Data",
    "DoRA",
    "DropLoRA",
    "EDoRA",
    "FlatLoRA",
    "LoRA",
    "LoRAFA",
    "LoRAGA",
    "LoRAOne",
    "LoRAXS",
    "LoSiA",
    "MiSS",
    "MoRA",
    "OSoRA",
    "PLoRA",
    "PiSSA",
    "Prepared",
    "RaSA",
    "ReLoRA",
    "Recipe",
    "ResLoRA",
    "SBoRA",
    "SRLoRA",
    "SoRA",
    "Squeeze",
    "VeRA",
    "prepare",
    "train",
]

_HOMES = {name: f"llm_lowrank.methods.{name.lower()}" for name in __all__} | {
    "Data": "llm_lowrank.data.settings",
    "FlatLoRA": "llm_lowrank.methods.flat_lora",
    "LoRAFA": "llm_lowrank.methods.lora_fa",
    "LoRAGA": "llm_lowrank.methods.lora_ga",
    "LoRAOne": "llm_lowrank.methods.lora_one",
    "LoRAXS": "llm_lowrank.methods.lora_xs",
    "Prepared": "llm_lowrank.integrations.own_loop",
    "Recipe": "llm_lowrank.run.recipe",
    "prepare": "llm_lowrank.integrations.own_loop",
    "train": "llm_lowrank.run.python",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
