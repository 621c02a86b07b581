"""DropLoRA: drop random pairs in every training forward, and answer with all of them.
https://arxiv.org/abs/2508.17337

    training    y = W x + s B ((A x) * M / (1 - p))          M = 0 with probability p, else 1
    answering   y = W x + s B A x                             which is LoRA

The setting `mask` says for what M is drawn:

    token     each token and pair (the published code)            step    each pair of a module, once a step (the paper)
    sample    each sample and pair                                model   each pair number, once a step for all modules

With `step` and `model` the dropped pairs are left out of the products: a larger p makes a step faster. M of an entry is
a hash of (seed, module, step, sample, token, pair) and nothing else. It is therefore the same in a recomputed forward,
after a resume and on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings, digest, generator
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine, send
from llm_lowrank.methods.dora import DirectionAdapter, measure
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.functional import Product

Mask = Literal["token", "sample", "step", "model"]


class Coming:
    """The forward to come, as all modules see it. What they need of it is sent to the device once, for all of them."""

    def __init__(self, step: int, samples: list[int], adapters: Sequence[Adapter]) -> None:
        self.step, self.samples, self.adapters = step, samples, adapters
        self.sent: dict[torch.device, Tensor] = {}
        self.kept: dict[torch.device, dict[str, Tensor]] = {}

    def numbers(self, device: torch.device) -> Tensor:
        """The numbers of the samples."""
        if device not in self.sent:
            self.sent[device] = send(torch.tensor(self.samples), device)
        return self.sent[device]

    def kept_pairs(self, adapter: DropAdapter, device: torch.device) -> Tensor:
        """The numbers of the pairs that an adapter keeps."""
        if device not in self.kept:
            drawn = {a.name: a.kept_pairs(self.step) for a in self.adapters if isinstance(a, DropAdapter)}
            parts = send(torch.cat(list(drawn.values())), device).split([len(pairs) for pairs in drawn.values()])
            self.kept[device] = dict(zip(drawn, parts, strict=True))
        return self.kept[device][adapter.name]


class DropAdapter(PairAdapter):
    """A PairAdapter that leaves pairs out of its products during training."""

    forward = torch.compiler.disable(PairAdapter.forward)  # what is dropped is drawn on the host, outside of a graph

    def __init__(
        self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings, *, p: float, mask: Mask
    ) -> None:
        super().__init__(name, linear, codec, settings)
        self.p, self.mask = p, mask
        self.rowwise = mask not in ("token", "sample")
        self.coming = Coming(-1, [0], [])

    def products(self, x: Tensor) -> list[Product]:
        if not self.training or self.p == 0:
            return super().products(x)
        assert self.coming.step >= 0, f"{self.name}: training, but nobody said which step this is"
        # a gate for every token: all pairs are multiplied
        if self.mask in ("token", "sample"):
            return [Product(self.A, self.B, self.kept_entries(x) / (1 - self.p))]
        pairs = self.coming.kept_pairs(self, x.device)
        # with a direction all pairs are needed for the length of W + s B A, so that a gate drops them
        if self.direction() is not None:
            gate = torch.zeros(self.rank, device=x.device).index_fill_(0, pairs, 1 / (1 - self.p))  # (r,)
            return [Product(self.A, self.B, gate)]
        # otherwise the dropped pairs are not multiplied at all
        return [Product(self.A[pairs], self.B[:, pairs] / (1 - self.p))]

    def kept_pairs(self, step: int) -> Tensor:
        """The numbers of the kept pairs. A draw that drops all is repeated: without pairs a step trains nothing."""
        name = "" if self.mask == "model" else self.name
        random = generator(self.seed, f"{name} dropped pairs", step)
        while True:
            with torch.device("cpu"):
                pairs = (torch.rand(self.rank, generator=random) >= self.p).nonzero()[:, 0]
            if len(pairs):
                return pairs

    def kept_entries(self, x: Tensor) -> Tensor:
        """1 for every entry of A x that is kept, otherwise 0: x (samples, tokens, n) or (tokens, n) -> (t, r)."""
        tokens = x.shape[-2] if x.ndim > 2 and self.mask == "token" else 1
        samples = self.coming.numbers(x.device) if x.ndim > 2 else torch.arange(x.shape[0], device=x.device)
        count = x.shape[0]
        # the last batch of an epoch is padded with rows that are no samples
        samples = torch.nn.functional.pad(samples, (0, count - len(samples)), value=-1)
        # the hash: the position of an entry is mixed into the key of (seed, module, step), then the pair's number
        key = int.from_bytes(digest(self.seed, self.name, self.coming.step)[:7], "little")
        where = samples[:, None, None] * 2**20 + torch.arange(tokens, device=x.device)[:, None]  # (samples, tokens, 1)
        entry = mix_bits(mix_bits(where + key) + torch.arange(self.rank, device=x.device))  # (samples, tokens, r)
        keep = (entry >> 8 & 0xFFFFFF) >= self.p * 2**24  # 24 of the hash's bits are a number in [0, 2^24)
        return keep.to(x.dtype).expand(count, x.shape[1:-1].numel(), self.rank).reshape(-1, self.rank)


def mix_bits(x: Tensor) -> Tensor:
    """Hash int64 numbers with the finalizer of MurmurHash3: every bit of the result depends on every bit of x.

    Integer arithmetic is exact, so that the result is the same on every device.
    """
    for shift, factor in ((33, -49064778989728563), (33, -4265267296055464877), (33, 1)):
        x = (x ^ (x >> shift & 2 ** (64 - shift) - 1)) * factor
    return x


class DropDirectionAdapter(DropAdapter, DirectionAdapter):
    """A DropAdapter with DoRA's trained row lengths, which are those of W + s B A with all pairs."""


@Method.register_subclass("droplora")
@dataclass(frozen=True)
class DropLoRA(LoRA):
    """Drop pairs at random while training, so that they do not depend on each other."""

    p: float = 0.5
    """Probability that a pair is dropped."""
    mask: Mask = "token"
    """What the drop is drawn for: token or sample (and pair), step (each pair of a module, once a step) or model (the
    same for all modules)."""
    use_dora: bool = False
    """Train the lengths of W's rows too, as with method.type: dora."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if not 0 <= self.p < 1:
            complaints.append(f"method.p must be in [0, 1), not {self.p}: it is the share of pairs that is left out")
        return complaints

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        kind = DropDirectionAdapter if self.use_dora else DropAdapter
        return kind(name, linear, codec, settings, p=self.p, mask=self.mask)

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        if self.use_dora:
            measure(adapters, engine)

    @property
    def tells_samples_apart(self) -> str:
        return "method.mask: sample" if self.mask == "sample" else ""

    def batch(self, adapters: list[Adapter], step: int, samples: Sequence[int]) -> None:
        coming = Coming(step, list(samples), adapters)
        for adapter in adapters:
            assert isinstance(adapter, DropAdapter)
            adapter.coming = coming

    def peft(self) -> dict[str, Any]:
        return super().peft() | {"use_dora": self.use_dora}
