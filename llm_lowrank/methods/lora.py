"""LoRA: y = W x + s B A x, W frozen, B zero at the start.  https://arxiv.org/abs/2106.09685

With use_rslora s = alpha / sqrt(rank), so that learning does not slow down as the rank grows.
https://arxiv.org/abs/2312.03732
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings
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
        return complaints

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
        settings = PairSettings(rank, self.scale_of(name), self.bank(codec), self.dropout, seed)
        return self.layer(name, linear, codec, settings)

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
