"""What a method owes, the registry of methods, and attaching one to a model.

A method is a frozen dataclass: its fields are its settings, the strings under them the help text. It is told when
things happen; what it remembers lives on the adapters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import draccus
from torch import nn
from transformers import PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter, fill_
from llm_lowrank.codecs import Codec, Dense
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.numerics.pairs import Pairs

if TYPE_CHECKING:
    from llm_lowrank.adapters.exchange import Exchanged
    from llm_lowrank.engines.base import Engine

ALL_LINEAR = "all-linear"
T = TypeVar("T")


@dataclass(frozen=True)
class Method(draccus.ChoiceRegistry):
    """The settings that every method has, and its hooks."""

    target_modules: list[str] = field(default_factory=lambda: [ALL_LINEAR])
    """names of linear modules to adapt, matched as in PEFT, or [all-linear]: all but the output layer"""

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ValueError("method.target_modules is empty; name modules or write [all-linear]")

    @property
    def export_rank(self) -> int | None:
        """The largest rank of the exported LoRA; the error of cutting a change down to it is printed.

        None: what the change needs.
        """
        return None

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        """The most bytes that the method remembers at a time: spread over the ranks, and on every rank."""
        return 0, 0

    # ---- the hooks, in the order in which a run calls them

    def targets(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The linear modules to adapt, in the model's order."""
        return targets(model, self.target_modules)

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        """What takes the place of a linear module, perhaps without values.

        ValueError if the method cannot work on such a weight.
        """
        raise NotImplementedError

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        """Once, when all adapters are in their places, before there are values: what they share, what they must agree
        on.
        """

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        """Completed steps after which `exchange` is called.

        ValueError if the method, or these adapters, cannot do with so many steps.
        """
        return ()

    def starting_pairs(self, adapters: list[Adapter], engine: Engine) -> Iterator[Pairs | None]:
        """For each adapter in turn the pairs that leave W at the start: the first `rank` become trainable, the others
        the bank.

        None: W stays whole. Asked for while the model is being loaded, before W is encoded or sharded: `adapter.source`
        reads the untouched W. Collective; the pairs are the same on every rank.
        """
        for _ in adapters:
            yield None

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        """Once, when everything is loaded and sharded, before the first step. Collective."""

    def rates(
        self, adapters: Sequence[Adapter], step: int, total_steps: int, rate: Callable[[int], float]
    ) -> list[float]:
        """The learning rate of 0-based `step` for every group of the optimizer. rate(step) is the recipe's."""
        return [rate(step)]

    @property
    def tells_samples_apart(self) -> str:
        """The setting that would have to tell samples of one row apart in the forward: with it they cannot be packed.
        Empty: none.
        """
        return ""

    def batch(self, adapters: list[Adapter], step: int, samples: Sequence[int]) -> None:
        """Before the forward of every micro-batch: the 0-based step and the number of each sample in it. Local.

        A sample has the same number on whichever rank and in whichever micro-batch it is. Packed ones: the first of
        each row.
        """

    def observe(self, adapters: list[Adapter], engine: Engine) -> None:
        """After the last backward of every step, before the step itself. Collective."""

    def discard(self, adapters: list[Adapter]) -> None:
        """Instead of observe, when a gradient is not finite and the step is left out: forgets what its backward told.
        Local.
        """

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int) -> Exchanged | None:
        """After a step of the schedule; `step` steps are done. Collective."""
        return None

    def metrics(self, adapters: list[Adapter], engine: Engine) -> dict[str, float]:
        """Return numbers for the log by their names, whichever there are at this step.

        Called at every multiple of `logging_steps` and after the last step, after an exchange of the same step. The run
        writes the numbers to metrics.jsonl and to the tracker, as method/name. Collective: all ranks call it at the same
        steps, and it may sum over them. What rank 0 returns is written.
        """
        return {}

    def peft(self) -> dict[str, Any]:
        """What the PEFT configuration says of adapters that are exported as they were trained."""
        return {}


def output_layer(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def targets(model: nn.Module, wanted: list[str]) -> dict[str, nn.Linear]:
    """The linear modules that `wanted` names, in the model's order.

    Each wanted name must match one: ValueError with what there is otherwise.
    """
    output = output_layer(model)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if wanted == [ALL_LINEAR]:
        found = {name: m for name, m in linears.items() if m is not output}
        if not found:
            raise ValueError(
                "method.target_modules = [all-linear], but the model has no linear module besides its output layer"
            )
        return found
    found = {}
    for target in wanted:
        hits = {name: m for name, m in linears.items() if name == target or name.endswith("." + target)}
        if not hits:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            near = difflib.get_close_matches(target, kinds, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"method.target_modules: {target!r} matches no linear module{hint} (there are {', '.join(kinds)})"
            )
        found.update(hits)
    return {name: m for name, m in linears.items() if name in found}


def attach(model: nn.Module, method: Method, codec: Codec, seed: int = 0) -> list[Adapter]:
    """Freezes the model and puts an Adapter in the place of every targeted linear module. Works on the meta device too.

    With a codec that is not dense the linear modules that are not targeted are coded as well; the output layer,
    embeddings and norms stay as they are.
    """
    model.requires_grad_(False)
    wanted = method.targets(model)
    output = output_layer(model)
    others = (
        {} if codec.writable else {name: m for name, m in targets(model, [ALL_LINEAR]).items() if name not in wanted}
    )
    adapters = []
    for name, linear in (wanted | others).items():
        stored = Dense(linear.weight.dtype) if linear is output else codec
        layer = method.build(name, linear, stored, seed) if name in wanted else FrozenLinear(linear, stored)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        if isinstance(layer, Adapter):
            fill_(layer)
            adapters.append(layer)
    method.link(model, adapters)
    return adapters


def matching(patterns: Mapping[str, T], name: str, default: T) -> T:
    """PEFT's rule: the first pattern that matches the end of the name, as a regular expression from a dot on."""
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)
