"""The hooks of a method, the registry of methods, and `attach`, which puts a method's layers into a model.

A method is a frozen dataclass: its fields are its settings, the strings under them the help text. A run calls the hooks
when the events happen. What a method remembers is stored on the adapters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import draccus
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_lowrank.adapters.adapter import Adapter, fill_
from llm_lowrank.adapters.direction import wrong_decays
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
    """Names of linear modules to adapt, matched as in PEFT, or [all-linear]: all but the output layer."""
    exclude_modules: list[str] = field(default_factory=list)
    """Names of linear modules to leave out of target_modules, matched in the same way."""
    export_rank: int | None = None
    """Largest rank of the exported LoRA: larger changes are cut by SVD, the error is printed, and the merged model has
    the whole change; by default the rank that the changes need."""

    def __post_init__(self) -> None:
        complaints = self.complaints()
        if complaints:
            raise ValueError("\n".join(complaints))

    def complaints(self) -> list[str]:
        """What is wrong with the settings, a sentence each. A method adds its own to those of `super()`."""
        complaints = (
            [] if self.target_modules else ["method.target_modules is empty; name modules or write [all-linear]"]
        )
        if self.export_rank is not None and self.export_rank < 1:
            complaints.append(f"method.export_rank must be at least 1, not {self.export_rank}")
        return complaints

    def wrong_decays(self, *names: str) -> list[str]:
        """A sentence for each of these settings that is no weight of the past in a mean."""
        return wrong_decays(self, "method", *names)

    @property
    def needs_start(self) -> bool:
        """Whether the method does something before its first step or between steps, and not in the forward alone.

        Adapters of such a method refuse a forward before they are started, see Adapter.await_start.
        """
        hooks = ("starting_pairs", "start", "calibrate", "schedule")
        return any(getattr(type(self), hook) is not getattr(Method, hook) for hook in hooks)

    @property
    def changes_function(self) -> bool:
        """Whether `exchange` is meant to change the function, see adapters.exchange.rewrite_."""
        return False

    @property
    def directs(self) -> bool:
        """Whether the optimizer steps along something else than the gradients, see adapters.redirect."""
        return False

    @property
    def own_step(self) -> str:
        """The setting that makes the method an optimizer of its own, which needs `optim: sgd`, or an empty string."""
        return ""

    @property
    def inherits(self) -> str:
        """The adapter that the run starts from, as the setting names it, or an empty string."""
        return ""

    @property
    def calibration(self) -> int:
        """The number of samples for `calibrate`; 0: it is not called."""
        return 0

    @property
    def recalibrates(self) -> bool:
        """Whether `calibrate` is called again after each exchange."""
        return False

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        """The most bytes that the method remembers at a time: (spread over the ranks, on every rank)."""
        return 0, 0

    # ---- the hooks, in the order in which a run calls them

    def targets(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The linear modules to adapt, in the model's order."""
        return find_targets(model, self.target_modules, self.exclude_modules)

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        """Return the adapter that takes the place of a linear module, on the meta device without values.

        Raise ValueError if the method cannot work on such a weight.
        """
        raise NotImplementedError

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        """Connect adapters that share parameters, and check what they must have in common.

        Called once, when all adapters are in their places and have no values yet.
        """

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        """The exchange steps: `exchange` is called when so many steps are done.

        Raise ValueError if the method or these adapters cannot work with so many steps in total.
        """
        return ()

    def advice(self, exchange_steps: Sequence[int]) -> list[str]:
        """What a user should know about a run with these exchange steps, a sentence each. Nothing is refused for it."""
        return []

    def starting_pairs(self, adapters: list[Adapter], engine: Engine) -> Iterator[Pairs | None]:
        """Yield for each adapter in turn the pairs that it starts from, or None if it starts without.

        The pairs leave W, unless the adapter `takes` none and only looks at them. Adapter.initial says what becomes of
        them: of a PairAdapter the first `rank` pairs become trainable, the others fill the bank. Called while the model
        is being loaded, before W is encoded or sharded: `adapter.source` reads the untouched W. The pairs are the same
        on every rank. Collective.
        """
        for _ in adapters:
            yield None

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        """Prepare for the first step. Called once, when everything is loaded and sharded. Collective."""

    def calibrate(self, adapters: list[Adapter], engine: Engine, backward: Callable[[], None]) -> None:
        """Look at gradients before the first step. Called after `start`, if `calibration` asks for samples.

        backward() goes forward and backward through the first `calibration` samples of the run, whose loss is the mean
        over their trained tokens, without a step. It may be called several times and repeats itself: random numbers
        start where they were. The gradients of parameters are forgotten at its end; those of probes stay, see
        adapters/probes.py. If the method `recalibrates`, this hook is called after each exchange too, with samples of
        the steps that come next. A run that resumes is not calibrated for its start again. Collective.
        """

    def rates(
        self, adapters: Sequence[Adapter], step: int, total_steps: int, rate: Callable[[int], float]
    ) -> list[float]:
        """The learning rates of 0-based `step`, one for each group of the optimizer; rate(step) is the recipe's."""
        return [rate(step)]

    def logged_rate(self, rates: Sequence[float]) -> float:
        """Return the one of these `rates` that the log shows."""
        return max(rates)

    @property
    def tells_samples_apart(self) -> str:
        """The setting with which the forward would have to tell the samples of one row apart, or an empty string.

        With such a setting samples cannot be packed.
        """
        return ""

    def batch(self, adapters: list[Adapter], step: int, samples: Sequence[int]) -> None:
        """Take note of the micro-batch whose forward comes next: the 0-based step and the number of each sample. Local.

        A sample has the same number on every rank and in every micro-batch. For packed samples `samples` holds the
        first number of each row.
        """

    def observe(self, adapters: list[Adapter], engine: Engine) -> None:
        """Look at the gradients, after the last backward of every step and before the step itself. Collective."""

    def discard(self, adapters: list[Adapter]) -> None:
        """Delete what this step's backward recorded. Local.

        Called instead of `observe` when a gradient is not finite and the step is skipped.
        """

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        """Exchange pairs and return a report, or None. Called after the step of a schedule: `step` steps are done of
        `total_steps`.

        Collective.
        """
        return None

    def metrics(self, adapters: list[Adapter], engine: Engine) -> dict[str, float]:
        """Return numbers for the log by their names, whichever there are at this step.

        Called at every multiple of `logging_steps` and after the last step, after an exchange of the same step. The run
        writes the numbers of rank 0 to metrics.jsonl and to the tracker, as method/name. Collective: all ranks call the
        hook at the same steps, and it may sum over them.
        """
        return {}

    def peft(self) -> dict[str, Any]:
        """The entries of the PEFT configuration for adapters that never froze a pair.

        `r` and `lora_alpha` are exported if the method has `one_scale`.
        """
        return {}

    @property
    def one_scale(self) -> bool:
        """Whether all modules have one rank, and one scale that is lora_alpha / r of `peft`."""
        return False


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, if the model is transformers' and has such a layer."""
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def find_targets(model: nn.Module, wanted: list[str], excluded: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """Return the linear modules that `wanted` names and `excluded` does not, in the model's order.

    Raise ValueError, with the names that exist, if a name matches none.
    """
    output = output_layer(model)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if wanted == [ALL_LINEAR]:
        matched = {name for name, m in linears.items() if m is not output}
        if not matched:
            raise ValueError(
                "method.target_modules = [all-linear], but the model has no linear module besides its output layer"
                + (": its weights are in transformers' Conv1D, which is not supported" if _has_conv1d(model) else "")
            )
    else:
        matched = _matching(model, linears, wanted, "target_modules")
    matched -= _matching(model, linears, excluded, "exclude_modules")
    if not matched:
        raise ValueError("method.exclude_modules leaves no module of target_modules to adapt; name fewer")
    return {name: m for name, m in linears.items() if name in matched}


def _matching(model: nn.Module, linears: Mapping[str, nn.Linear], names: Sequence[str], setting: str) -> set[str]:
    """The linear modules whose names are these or end with them. ValueError if one of the names matches none."""
    matched: set[str] = set()
    for target in names:
        hits = {name for name in linears if name == target or name.endswith("." + target)}
        if not hits:
            others = {type(m).__name__ for name, m in model.named_modules() if f".{name}".endswith("." + target)}
            kinds = sorted({name.rsplit(".", 1)[-1] for name in linears})
            near = difflib.get_close_matches(target, kinds, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            hint = f": it is a {' and a '.join(sorted(others))}, which is not supported" if others else hint
            raise ValueError(
                f"method.{setting}: {target!r} matches no linear module{hint} (there are {', '.join(kinds)})"
            )
        matched |= hits
    return matched


def _has_conv1d(model: nn.Module) -> bool:
    return any(isinstance(m, Conv1D) for m in model.modules())


def attach(model: nn.Module, method: Method, codec: Codec, seed: int = 0) -> list[Adapter]:
    """Freeze the model, put an Adapter in the place of every targeted linear module, and return the adapters.

    The model may be on the meta device. With nf4 or int8 the linear modules that are not targeted are quantized too;
    the output layer, embeddings and norms stay as they are. The adapters of a method that `needs_start` refuse a
    forward until models.loading.load has started the method.
    """
    model.requires_grad_(False)
    wanted = method.targets(model)
    output = output_layer(model)
    others = {} if codec.writable else find_targets(model, [ALL_LINEAR])
    adapters, targets = [], short_names(wanted, [name for name, _ in model.named_modules()])
    for name, linear in (wanted | {name: m for name, m in others.items() if name not in wanted}).items():
        stored = Dense(linear.weight.dtype) if linear is output else codec
        layer = method.build(name, linear, stored, seed) if name in wanted else FrozenLinear(linear, stored)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        if isinstance(layer, Adapter):
            fill_(layer)
            layer.target = targets[name]
            if method.needs_start:
                layer.await_start(type(method).__name__)
            adapters.append(layer)
    method.link(model, adapters)
    return adapters


def short_names(chosen: Collection[str], names: Sequence[str]) -> dict[str, str]:
    """Return name -> the part of it that PEFT's target_modules needs to select the chosen modules and no other.

    `names` are those of all modules. A name becomes its last word if all modules with that last word are chosen.
    """
    last = {name: name.rpartition(".")[2] for name in names}
    others = {word for name, word in last.items() if name not in chosen}
    return {name: name if last[name] in others else last[name] for name in chosen}


def match_pattern(patterns: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first pattern that matches the end of the name, else `default`.

    As in PEFT a pattern is a regular expression, matched against the whole name or its part behind a dot.
    """
    return next((value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)), default)
