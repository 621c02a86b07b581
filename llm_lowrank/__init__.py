"""Dynamic low-rank adaptation of sharded language models.

    from llm_lowrank import Recipe, SRLoRA, train
    train(Recipe(method=SRLoRA(rank=16, target_rank=32)))

The names below are imported when they are first used, so that `import llm_lowrank` costs nothing.
"""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # homes() for checkers of types; python benchmarks/pages.py writes it
    from llm_lowrank.data.settings import Data as Data
    from llm_lowrank.integrations.own_loop import Prepared as Prepared
    from llm_lowrank.integrations.own_loop import prepare as prepare
    from llm_lowrank.methods.adalora import AdaLoRA as AdaLoRA
    from llm_lowrank.methods.beamlora import BeamLoRA as BeamLoRA
    from llm_lowrank.methods.cola import COLA as COLA
    from llm_lowrank.methods.core import Core as Core
    from llm_lowrank.methods.dora import DoRA as DoRA
    from llm_lowrank.methods.droplora import DropLoRA as DropLoRA
    from llm_lowrank.methods.edora import EDoRA as EDoRA
    from llm_lowrank.methods.flat_lora import FlatLoRA as FlatLoRA
    from llm_lowrank.methods.lora import LoRA as LoRA
    from llm_lowrank.methods.lora_fa import LoRAFA as LoRAFA
    from llm_lowrank.methods.lora_ga import LoRAGA as LoRAGA
    from llm_lowrank.methods.lora_one import LoRAOne as LoRAOne
    from llm_lowrank.methods.lora_xs import LoRAXS as LoRAXS
    from llm_lowrank.methods.losia import LoSiA as LoSiA
    from llm_lowrank.methods.miss import MiSS as MiSS
    from llm_lowrank.methods.mora import MoRA as MoRA
    from llm_lowrank.methods.osora import OSoRA as OSoRA
    from llm_lowrank.methods.pissa import PiSSA as PiSSA
    from llm_lowrank.methods.plora import PLoRA as PLoRA
    from llm_lowrank.methods.rasa import RaSA as RaSA
    from llm_lowrank.methods.relora import ReLoRA as ReLoRA
    from llm_lowrank.methods.reslora import ResLoRA as ResLoRA
    from llm_lowrank.methods.sbora import SBoRA as SBoRA
    from llm_lowrank.methods.sora import SoRA as SoRA
    from llm_lowrank.methods.squeeze import Squeeze as Squeeze
    from llm_lowrank.methods.srlora import SRLoRA as SRLoRA
    from llm_lowrank.methods.vera import VeRA as VeRA
    from llm_lowrank.run.python import train as train
    from llm_lowrank.run.recipe import Recipe as Recipe

__version__ = "0.2.0"


@cache
def homes() -> dict[str, str]:
    """Return the module of every public name. A method is found by its registration, before its file is imported."""
    found = {"Data": "data.settings", "Recipe": "run.recipe", "train": "run.python"}
    found |= dict.fromkeys(("Prepared", "prepare"), "integrations.own_loop")
    registered = re.compile(r"^@Method\.register_subclass\(.*\)\n(?:@.*\n)*class (\w+)", re.MULTILINE)
    for path in sorted(Path(__file__).parent.glob("methods/*.py")):
        for name in registered.findall(path.read_text(encoding="utf-8")):
            found[name] = f"methods.{path.stem}"
    return found


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(homes())
    if name.startswith("_") or name not in homes():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{homes()[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *homes()})
