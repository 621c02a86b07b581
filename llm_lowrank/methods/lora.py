"""LoRA: y = W x + s B A x, W frozen, B zero at the start.  https://arxiv.org/abs/2106.09685

With use_rslora s = alpha / sqrt(rank), so that the learning does not slow down as the rank grows.
https://arxiv.org/abs/2312.03732
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter
from llm_lowrank.adapters.method import Method, matching
from llm_lowrank.codecs import Codec


@Method.register_subclass("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """Train rank pairs per module; nothing is ever exchanged."""

    rank: int = 16
    """trainable pairs per module"""
    alpha: float | None = None
    """adapter scale s = alpha / rank; by default alpha = rank, s = 1"""
    dropout: float = 0.0
    """dropout on the input of the trainable pairs"""
    use_rslora: bool = False
    """scale s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)"""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """other ranks for some modules, {name or regular expression of the end of the name: rank}, as in PEFT"""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """other alphas for some modules, as in PEFT"""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = {
            "method.rank": self.rank,
            **{f"method.rank_pattern[{key}]": rank for key, rank in self.rank_pattern.items()},
        }
        for setting, rank in ranks.items():
            if rank < 1:
                raise ValueError(f"{setting} must be at least 1, not {rank}")
        alphas = {
            "method.alpha": self.alpha,
            **{f"method.alpha_pattern[{key}]": alpha for key, alpha in self.alpha_pattern.items()},
        }
        for setting, alpha in alphas.items():
            if alpha is not None and alpha <= 0:
                raise ValueError(f"{setting} must be positive, not {alpha}")
        for setting in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, setting):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(
                        f"method.{setting}: {pattern!r} is not a regular expression ({error}); write .* for any "
                        "characters"
                    ) from None
        if not 0 <= self.dropout < 1:
            raise ValueError(f"method.dropout must be in [0, 1), not {self.dropout}")

    @property
    def scale(self) -> float:
        """Of modules that no pattern names."""
        return self._scale(self.rank, self.alpha)

    def _scale(self, rank: int, alpha: float | None) -> float:
        return (rank if alpha is None else alpha) / (rank**0.5 if self.use_rslora else rank)

    def rank_of(self, name: str) -> int:
        return matching(self.rank_pattern, name, self.rank)

    def scale_of(self, name: str) -> float:
        """alpha is that of the pattern, else `alpha`, else the module's rank."""
        return self._scale(self.rank_of(name), matching(self.alpha_pattern, name, self.alpha))

    def bank(self, codec: Codec) -> int:
        """Frozen pairs to keep room for beside the trainable ones."""
        return 0

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        rank = self.rank_of(name)
        self.check_fits("rank", rank, name, linear)
        return self.layer(name, linear, codec, rank, self.scale_of(name), self.bank(codec), self.dropout, seed)

    def layer(self, *settings: Any) -> PairAdapter:
        """What build makes, of PairAdapter's arguments."""
        return PairAdapter(*settings)

    @staticmethod
    def check_fits(setting: str, rank: int, name: str, linear: nn.Linear) -> None:
        m, n = linear.weight.shape
        if rank > min(m, n):
            raise ValueError(
                f"{name}: {setting} {rank} is more than min(m, n) = {min(m, n)} of its {m} x {n} weight; "
                "lower it or leave the module out of target_modules"
            )

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        for setting in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, setting):
                if not any(matching({pattern: True}, adapter.name, False) for adapter in adapters):
                    raise ValueError(
                        f"method.{setting}: {pattern!r} matches none of the {len(adapters)} adapted modules"
                    )

    def peft(self) -> dict[str, Any]:
        alpha = self.rank if self.alpha is None else self.alpha
        alphas = self.alpha_pattern
        if self.alpha is None:  # where no alpha is given it is the module's rank
            alphas = alphas | {key: rank for key, rank in self.rank_pattern.items() if key not in alphas}
        return {
            "r": self.rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "use_rslora": self.use_rslora,
            "lora_dropout": self.dropout,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": alphas,
        }
