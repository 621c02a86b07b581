"""DropLoRA: train with some of the pairs left out, others every time; answer with all.
https://arxiv.org/abs/2508.17337

    training    y = W x + s B ((A x) * M / (1 - p))          M = 0 with probability p, else 1
    answering   y = W x + s B A x                             which is LoRA

What M is drawn for, `mask`:  token  each token and pair (the published code)     sample  each sample and pair
                              step   each pair of a module, once a step (the paper's text)    model  each pair number, once a step

In `step` and `model` the dropped pairs are left out of the products: a larger p is a faster step. M of an entry is a
hash of (seed, module, step, sample, token, pair) and nothing else: the same in a recomputed forward, after a resume and
on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, digest, generator
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.dora import DirectionAdapter, measure
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.functional import Product

Mask = Literal["token", "sample", "step", "model"]


class DropAdapter(PairAdapter):
    """Leaves pairs out of its products while it trains."""

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, *settings: Any, p: float, mask: Mask) -> None:
        super().__init__(name, linear, codec, *settings)
        self.p, self.mask = p, mask
        self.rowwise = mask not in ("token", "sample")
        self.step, self.samples = -1, [0]  # of the forward to come

    def products(self, x: Tensor) -> list[Product]:
        if not self.training or self.p == 0:
            return super().products(x)
        assert self.step >= 0, f"{self.name}: training, but nobody said which step this is"
        if self.mask in ("token", "sample"):
            return [Product(self.A, self.B, self.kept_entries(x) / (1 - self.p))]
        kept = self.kept_pairs()
        if self.direction() is not None:  # the length of W + s B A is that of all pairs
            return [Product(self.A, self.B, torch.zeros(self.rank).index_fill_(0, kept, 1 / (1 - self.p)).to(x.device))]
        kept = kept.to(x.device)
        return [Product(self.A[kept], self.B[:, kept] / (1 - self.p))]

    def kept_pairs(self) -> Tensor:
        """Their numbers. If all were dropped it is drawn again: a step without any pair would train nothing."""
        name = "" if self.mask == "model" else self.name
        random = generator(self.seed, f"{name} dropped pairs", self.step)
        while True:
            with torch.device("cpu"):
                kept = (torch.rand(self.rank, generator=random) >= self.p).nonzero()[:, 0]
            if len(kept):
                return kept

    def kept_entries(self, x: Tensor) -> Tensor:
        """x (samples, tokens, n) or (tokens, n) -> 1 where an entry of A x is kept, 0 where not: (t, r)."""
        tokens = x.shape[-2] if x.ndim > 2 and self.mask == "token" else 1
        samples = (
            torch.tensor(self.samples, device=x.device) if x.ndim > 2 else torch.arange(x.shape[0], device=x.device)
        )
        count = x.shape[0]
        # the last batch of an epoch is filled up
        samples = torch.nn.functional.pad(samples, (0, count - len(samples)), value=-1)
        key = int.from_bytes(digest(self.seed, self.name, self.step)[:7], "little")
        where = samples[:, None, None] * 2**20 + torch.arange(tokens, device=x.device)[:, None]  # (samples, tokens, 1)
        entry = mix_bits(mix_bits(where + key) + torch.arange(self.rank, device=x.device))  # (samples, tokens, r)
        kept = (entry >> 8 & 0xFFFFFF) >= self.p * 2**24
        return kept.to(x.dtype).expand(count, x.shape[1:-1].numel(), self.rank).reshape(-1, self.rank)


def mix_bits(x: Tensor) -> Tensor:
    """Another int64 in which every bit depends on every bit: the finalizer of MurmurHash3.

    Integers are exact on every device.
    """
    for shift, factor in ((33, -49064778989728563), (33, -4265267296055464877), (33, 1)):
        x = (x ^ (x >> shift & 2 ** (64 - shift) - 1)) * factor
    return x


class DropDirectionAdapter(DropAdapter, DirectionAdapter):
    """The same beside DoRA's trained lengths, which are those of W + s B A with all pairs."""


@Method.register_subclass("droplora")
@dataclass(frozen=True)
class DropLoRA(LoRA):
    """Leave pairs out at random while training, so that they do not lean on each other."""

    p: float = 0.5
    """probability that a pair is left out"""
    mask: Mask = "token"
    """what it is drawn for: token or sample (and pair), step (each pair of a module, once a step) or model (the same
    for all modules)"""
    use_dora: bool = False
    """train the lengths of W's rows too, as method.type: dora"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.p < 1:
            raise ValueError(f"method.p must be in [0, 1), not {self.p}: it is the share of pairs that is left out")

    def layer(self, *settings: Any) -> PairAdapter:
        return (DropDirectionAdapter if self.use_dora else DropAdapter)(*settings, p=self.p, mask=self.mask)

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        if self.use_dora:
            measure(adapters, engine)

    @property
    def tells_samples_apart(self) -> str:
        return "method.mask: sample" if self.mask == "sample" else ""

    def batch(self, adapters: list[Adapter], step: int, samples: Sequence[int]) -> None:
        for adapter in adapters:
            assert isinstance(adapter, DropAdapter)
            adapter.step, adapter.samples = step, list(samples)

    def peft(self) -> dict[str, Any]:
        return super().peft() | {"use_dora": self.use_dora}
