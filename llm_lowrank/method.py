"""What a method owes, the registry of methods, and attaching one to a model.

A method is a frozen dataclass: its fields are its settings, the strings under them the help text. It is told when things
happen; what it remembers lives on the adapters.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import draccus
from torch import nn
from transformers import PreTrainedModel

from llm_lowrank.adapter import Adapter
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.pairs import Pairs

if TYPE_CHECKING:
    from llm_lowrank.engines.base import Engine
    from llm_lowrank.exchange import Exchanged

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Method(draccus.ChoiceRegistry):
    """Settings that every method has. s = alpha / rank, or alpha / sqrt(rank) with use_rslora."""

    rank: int = 16
    """trainable pairs per module"""
    alpha: float | None = None
    """adapter scale s = alpha / rank; by default alpha = rank, s = 1"""
    dropout: float = 0.0
    """dropout on the input of the trainable pairs"""
    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """names of linear modules to adapt, matched as in PEFT, or [all-linear]: all but the output layer"""
    use_rslora: bool = False
    """scale s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"method.rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout must be in [0, 1), not {self.dropout}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"method.alpha must be positive, not {self.alpha}")
        if not self.target_modules:
            raise ValueError("method.target_modules is empty; name modules or write [all-linear]")

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    # ---- the hooks, in the order in which a run calls them

    def bank(self, codec: Codec) -> int:
        """Frozen pairs to keep room for beside the trainable ones. ValueError if the method cannot work on such a weight."""
        return 0

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        self.check_fits("rank", self.rank, name, linear)
        return Adapter(name, linear, codec, self.rank, self.scale, self.bank(codec), self.dropout, seed)

    @staticmethod
    def check_fits(setting: str, rank: int, name: str, linear: nn.Linear) -> None:
        m, n = linear.weight.shape
        if rank > min(m, n):
            raise ValueError(
                f"{name}: {setting} {rank} is more than min(m, n) = {min(m, n)} of its {m} x {n} weight; "
                "lower it or leave the module out of target_modules"
            )

    def schedule(self, total_steps: int) -> tuple[int, ...]:
        """Completed steps after which `recompose` is called."""
        return ()

    def starting_pairs(self, adapters: list[Adapter], engine: Engine) -> Iterator[Pairs | None]:
        """For each adapter in turn the pairs that leave W at the start: the first `rank` become trainable, the others the bank.

        None: W stays whole. Asked for while the model is being loaded, before W is encoded or sharded: `adapter.source` reads the
        untouched W. Collective; the pairs are the same on every rank.
        """
        for _ in adapters:
            yield None

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        """Once, when everything is loaded and sharded, before the first step. Collective."""

    def observe(self, adapters: list[Adapter], engine: Engine) -> None:
        """After the last backward of every step, before the step itself. Local."""

    def recompose(self, adapters: list[Adapter], engine: Engine) -> Exchanged | None:
        """After a step of the schedule. Collective."""
        return None


def targets(model: nn.Module, wanted: list[str]) -> dict[str, nn.Linear]:
    """The linear modules that `wanted` names, in the model's order.

    Each wanted name must match one: ValueError with what there is otherwise.
    """
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if wanted == [ALL_LINEAR]:
        found = {name: m for name, m in linears.items() if m is not output}
        if not found:
            raise ValueError("method.target_modules = [all-linear], but the model has no linear module besides its output layer")
        return found
    found = {}
    for target in wanted:
        hits = {name: m for name, m in linears.items() if name == target or name.endswith("." + target)}
        if not hits:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            near = difflib.get_close_matches(target, kinds, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"method.target_modules: {target!r} matches no linear module{hint} (there are {', '.join(kinds)})")
        found.update(hits)
    return {name: m for name, m in linears.items() if name in found}


def attach(model: nn.Module, method: Method, codec: Codec, seed: int = 0) -> list[Adapter]:
    """Freezes the model and puts an Adapter in the place of every targeted linear module. Works on the meta device too.

    With a codec that is not dense the linear modules that are not targeted are coded as well; the output layer, embeddings and
    norms stay as they are.
    """
    model.requires_grad_(False)
    wanted = targets(model, method.target_modules)
    others = {} if codec.writable else {name: m for name, m in targets(model, [ALL_LINEAR]).items() if name not in wanted}
    adapters = []
    for name, linear in (wanted | others).items():
        layer = method.build(name, linear, codec, seed) if name in wanted else FrozenLinear(linear, codec)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        if isinstance(layer, Adapter):
            adapters.append(layer)
    return adapters
