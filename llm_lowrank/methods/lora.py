"""LoRA: y = W x + s B A x, W frozen, B zero at the start.  https://arxiv.org/abs/2106.09685

With use_rslora s = alpha / sqrt(rank), so that learning does not slow down as the rank grows.
https://arxiv.org/abs/2312.03732

With b_rate B learns so many times faster than A (LoRA+).  https://arxiv.org/abs/2402.12354
With a direction the optimizer steps along something else than the gradients of A and B, see methods/directions/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings
from llm_lowrank.adapters.direction import GRADIENT, Direction
from llm_lowrank.adapters.method import Method, match_pattern
from llm_lowrank.codecs import Codec


@Method.register_subclass("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """Train rank pairs per module; nothing is ever exchanged."""

    rank: int = 16
    """Trainable pairs per module."""
    alpha: float | None = None
    """Adapter scale s = alpha / rank; by default alpha = rank, s = 1."""
    dropout: float = 0.0
    """Dropout on the input of the trainable pairs."""
    use_rslora: bool = False
    """Scale s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some modules, {name or regular expression of the end of the name: rank}, as in PEFT."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other alphas for some modules, as in PEFT."""
    b_rate: float = 1.0
    """LoRA+ (arXiv 2402.12354): B learns at so many times the learning rate, A at the rate itself. The authors take 16
    in most runs, with about half of LoRA's rate."""
    direction: Direction = GRADIENT
    """What the optimizer steps along in the place of the gradients of A and B."""
    adapter: str = ""
    """A trained LoRA that the run starts from: a folder of PEFT's, the output_dir of a run, or a hub name."""
    adapter_role: Literal["trained", "frozen"] = "trained"
    """What becomes of that adapter. trained: its pairs are trained on. frozen: they stay as they are, in W if it is
    float32, else in a bank beside it, and fresh pairs are trained."""

    # Each method names its own roles, and a subclass does not inherit them: its layers may start in another way.
    adapter_roles: ClassVar[tuple[str, ...]] = ("trained", "frozen")

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        complaints += [f"{key} must be at least 1, not {rank}" for key, rank in self.all_ranks().items() if rank < 1]
        alphas = {} if self.alpha is None else {"method.alpha": self.alpha}
        alphas |= {f"method.alpha_pattern[{key}]": alpha for key, alpha in self.alpha_pattern.items()}
        complaints += [f"{key} must be positive, not {alpha}" for key, alpha in alphas.items() if alpha <= 0]
        for setting in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, setting):
                try:
                    re.compile(pattern)
                except re.error as error:
                    complaints.append(
                        f"method.{setting}: {pattern!r} is not a regular expression ({error}); write .* for any "
                        "characters"
                    )
        if not 0 <= self.dropout < 1:
            complaints.append(f"method.dropout must be in [0, 1), not {self.dropout}")
        if not 0 < self.b_rate < math.inf:
            complaints.append(f"method.b_rate must be above 0, not {self.b_rate}")
        if self.b_rate != 1 and self.direction.own_step:
            complaints.append(
                f"method.b_rate {self.b_rate:g} and method.direction.type {self.direction_name} do not go together: "
                "this direction sets the lengths of both steps itself; remove b_rate"
            )
        complaints += self._adapter_complaints()
        if not self.direction.survives_exchange and type(self).schedule is not Method.schedule:
            complaints.append(
                f"method.direction.type {self.direction_name} remembers the pairs that it steps, and "
                f"{Method.get_choice_name(type(self))} exchanges them; choose another direction or another method"
            )
        return complaints

    def _adapter_complaints(self) -> list[str]:
        if not self.adapter:
            given = self.adapter_role != "trained"
            return ["method.adapter_role is for method.adapter, which names no adapter; give both"] if given else []
        if self.adapter_role in vars(type(self)).get("adapter_roles", ()):
            return []
        takers = [
            name
            for name, kind in sorted(Method.get_known_choices().items())
            if self.adapter_role in vars(kind).get("adapter_roles", ())
        ]
        return [
            f"method.adapter with adapter_role: {self.adapter_role} is for method.type {', '.join(takers)}, not "
            f"{Method.get_choice_name(type(self))}; take one of these, or merge the adapter (launch/merge.py) and "
            "start from the merged model"
        ]

    @property
    def inherits(self) -> str:
        return self.adapter

    @property
    def direction_name(self) -> str:
        """The name of the direction in a recipe."""
        return Direction.get_choice_name(type(self.direction))

    @property
    def directs(self) -> bool:
        return type(self.direction) is not type(GRADIENT)

    @property
    def own_step(self) -> str:
        return f"method.direction.type: {self.direction_name}" if self.direction.own_step else ""

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        return 0, sum(self.direction.remembered(a.rank, *a.shape) for a in adapters if isinstance(a, PairAdapter))

    def all_ranks(self) -> dict[str, int]:
        """Setting -> the rank that it gives."""
        return {
            "method.rank": self.rank,
            **{f"method.rank_pattern[{key}]": rank for key, rank in self.rank_pattern.items()},
        }

    @property
    def scale(self) -> float:
        """The scale s of modules that no pattern names."""
        return self._scale(self.rank, self.alpha)

    def _scale(self, rank: int, alpha: float | None) -> float:
        return (rank if alpha is None else alpha) / (rank**0.5 if self.use_rslora else rank)

    def rank_of(self, name: str) -> int:
        """The rank of a module."""
        return match_pattern(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """The scale s of a module. Its alpha is that of the pattern, else `alpha`, else the module's rank."""
        return self._scale(self.rank_of(name), match_pattern(self.alpha_pattern, name, self.alpha))

    def bank(self, codec: Codec) -> int:
        """The number of frozen pairs that a module's bank has room for; 0: no bank."""
        return 0

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        rank = self.rank_of(name)
        self.check_fits("rank", rank, name, linear)
        return self.layer(name, linear, codec, self.pair_settings(name, self.bank(codec), seed))

    def pair_settings(self, name: str, bank: int, seed: int) -> PairSettings:
        """What a module's layer gets, with room for `bank` pairs in its bank."""
        return PairSettings(self.rank_of(name), self.scale_of(name), bank, self.dropout, seed, self.direction)

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        """Return the layer that `build` puts in the place of a linear module."""
        return PairAdapter(name, linear, codec, settings)

    @staticmethod
    def check_fits(setting: str, rank: int, name: str, linear: nn.Linear) -> None:
        """Raise ValueError if the weight of a module has fewer than `rank` directions."""
        m, n = linear.weight.shape
        if rank > min(m, n):
            raise ValueError(
                f"{name}: {setting} {rank} is more than min(m, n) = {min(m, n)} of its {m} x {n} weight; "
                f"lower it, or leave the module out: --method.exclude_modules {name.rpartition('.')[2]}"
            )

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        for setting in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, setting):
                if not any(match_pattern({pattern: True}, adapter.name, False) for adapter in adapters):
                    raise ValueError(
                        f"method.{setting}: {pattern!r} matches none of the {len(adapters)} adapted modules"
                    )
        if self.directs:
            self._check_directed(adapters)
        if self.b_rate != 1:
            for adapter in adapters:
                if isinstance(adapter, PairAdapter) and adapter.trains != "AB":
                    raise ValueError(
                        f"method.b_rate is the rate of B beside that of A, and {Method.get_choice_name(type(self))} "
                        "does not train both; remove it, and set learning_rate"
                    )
                adapter.groups = second_group(adapter)

    def _check_directed(self, adapters: list[Adapter]) -> None:
        """Raise ValueError if the direction leaves a trained parameter without a step of its own."""
        for adapter in adapters:
            trained = {name for name, p in adapter.named_parameters(recurse=False) if p.requires_grad}
            others = sorted(trained - {"A", "B"})
            both = trained >= {"A", "B"}
            if not isinstance(adapter, PairAdapter) or not both or (others and self.direction.own_step):
                what = f"trains {', '.join(others)} too" if others and both else "trains something else"
                what += ", and optim: sgd would step these along their gradients" if self.direction.own_step else ""
                raise ValueError(
                    f"method.direction.type {self.direction_name} is for layers whose trained parameters are A and B; "
                    f"{Method.get_choice_name(type(self))} {what}; choose another direction or another method"
                )

    def rates(
        self, adapters: Sequence[Adapter], step: int, total_steps: int, rate: Callable[[int], float]
    ) -> list[float]:
        return [rate(step)] if self.b_rate == 1 else [rate(step), self.b_rate * rate(step)]

    def logged_rate(self, rates: Sequence[float]) -> float:
        return rates[0]  # A's

    def peft(self) -> dict[str, Any]:
        alpha = self.rank if self.alpha is None else self.alpha
        return {
            "r": self.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": self.dropout,
        }

    @property
    def one_scale(self) -> bool:
        return not (self.use_rslora or self.rank_pattern or self.alpha_pattern)


def second_group(module: nn.Module) -> dict[str, int]:
    """The optimizer's groups of LoRA+: A is in group 0, B and vectors such as DoRA's lengths are in group 1."""
    return {name: 1 for name, p in module.named_parameters(recurse=False) if p.requires_grad and name != "A"}
