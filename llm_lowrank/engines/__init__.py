"""How a model is spread over ranks: one process or DDP, DeepSpeed ZeRO, FSDP2. The only place that communicates.

`torch.distributed` and `deepspeed` are imported here and nowhere else. No method, no recipe and no file format is known
here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from llm_lowrank.engines import fsdp, plain, zero_config
from llm_lowrank.engines.base import TIMEOUT, Engine
from llm_lowrank.engines.memory import Held, Sizes
from llm_lowrank.numerics.optimizers import Optimization

__all__ = ["ENGINES", "Engine", "EngineKind", "EngineName", "Held", "Sizes", "make"]


@dataclass(frozen=True)
class EngineKind:
    """One engine. Its class is imported only when it is made: deepspeed need not be installed for the others."""

    module: str  # of this folder
    kind: str  # the class in there
    # held(sizes, number of ranks, settings or None for the defaults, optimization) -> a column for each way in which
    # the engine can spread a model; ValueError for settings that a run would refuse.
    held: Callable[[Sizes, int, Any, Optimization], list[Held]]


ENGINES: dict[str, EngineKind] = {
    "plain": EngineKind("plain", "Plain", plain.held),
    "deepspeed": EngineKind("zero", "Zero", zero_config.held),
    "fsdp": EngineKind("fsdp", "FSDP", fsdp.held),
}

if TYPE_CHECKING:
    EngineName = str  # a type checker knows no Literal that is computed
else:
    EngineName = Literal[tuple(ENGINES)]


def make(name: str, settings: Any = None, timeout: float = TIMEOUT) -> Engine:
    """Return the engine that a recipe names, with its settings: of deepspeed a JSON file, of fsdp a Sharding."""
    kind = ENGINES[name]
    engine = getattr(import_module(f"{__name__}.{kind.module}"), kind.kind)
    return engine(timeout=timeout) if settings is None else engine(settings, timeout=timeout)
