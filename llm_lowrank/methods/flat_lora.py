"""Flat-LoRA: train under random noise on the whole weight, so that the loss is flat around the result.
https://arxiv.org/abs/2409.14396

    training     y = (W + s B A + E_t) x      E_ij ~ N(0, sigma_t^2 |w'_i|^2 / n)
    answering    y = (W + s B A) x            sigma_t = sigma (1 - cos(pi t / T)) / 2

w'_i is row i of W + s B A at the beginning of step t, of T steps. E_t is drawn once a step for each module: it is the
same in all forwards and backwards of the step, on every rank, and after a resume. W is never written. E_t is added to
the decoded W in forward and again in backward, from a generator that is seeded by (seed, module, step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings, as_pair_adapters, digest
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.functional import Product, row_norms

BLOCK = 2**21  # elements of W that get their noise at a time, so that beside W there is no second matrix of its size


class FlatAdapter(PairAdapter):
    """A PairAdapter whose W is noisy during training."""

    forward = torch.compiler.disable(PairAdapter.forward)  # a generator cannot be in a graph

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings, *, sigma: float) -> None:
        super().__init__(name, linear, codec, settings)
        self.sigma = sigma
        self.step, self.total = -1, 0  # t and T
        self.lengths: tuple[int, Tensor] | None = None  # a step, and |w'_i| at its beginning, (m,)

    @property
    def makes_w(self) -> bool:
        return True

    def decode(self, *parts: Tensor, after: Tensor | None = None) -> Tensor:
        w = super().decode(*parts, after=after)  # (m, n)
        if not self.training or self.sigma == 0:
            return w
        assert self.step >= 0, f"{self.name}: training, but nobody said which step this is"
        if self.lengths is None or self.lengths[0] != self.step:
            self.lengths = self.step, self.row_lengths(w)
        sigma = self.sigma_at(self.step)
        return w if sigma == 0 else self.with_noise(w, sigma)

    def sigma_at(self, step: int) -> float:
        """sigma_t: 0 at the first step, sigma behind the last one."""
        if step == 0:
            return 0.0
        assert self.total > 0, f"{self.name}: training, but nobody said how many steps there are"
        return self.sigma * (1 - math.cos(math.pi * step / self.total)) / 2

    @torch.no_grad()
    def row_lengths(self, w: Tensor) -> Tensor:
        """|rows of W + s B A|: w (m, n) -> (m,) in float32."""
        own = torch.linalg.vector_norm(w, dim=1, dtype=torch.promote_types(w.dtype, torch.float32))
        return row_norms(w, Product(self.A.detach(), self.B.detach()), self.scale, own)

    def with_noise(self, w: Tensor, sigma: float) -> Tensor:
        """W + E_t, rounded once to W's dtype. Changes w in place if it was decoded and is not the stored W."""
        assert self.lengths is not None
        m, n = self.shape
        seed = int.from_bytes(digest(self.seed, f"{self.name} noise", self.step)[:8], "little") >> 1
        # on the device: the host would take minutes for a step of a large model
        random = torch.Generator(w.device).manual_seed(seed)
        size = (sigma / n**0.5 * self.lengths[1])[:, None]  # (m, 1)
        noisy = w.clone() if self.codec.writable else w
        count = max(1, BLOCK // n)
        for first in range(0, m, count):
            rows = slice(first, min(first + count, m))
            noise = torch.randn(rows.stop - first, n, generator=random, device=w.device, dtype=size.dtype)
            noisy[rows] = (noise.mul_(size[rows]).add_(w[rows])).to(w.dtype)
        return noisy


@Method.register_subclass("flat_lora")
@dataclass(frozen=True)
class FlatLoRA(LoRA):
    """Add noise to the frozen weight in every training forward, more towards the end of the run."""

    sigma: float = 0.05
    """Standard deviation of the noise on an entry of W at the end of the run, in units of the root mean square of its
    row."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.sigma < 0:
            complaints.append(f"method.sigma must be at least 0, not {self.sigma}")
        return complaints

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        spread, each = super().statistics(adapters)
        return spread, each + sum(4 * adapter.shape[0] for adapter in adapters)  # the lengths

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return FlatAdapter(name, linear, codec, settings, sigma=self.sigma)

    def rates(
        self, adapters: Sequence[Adapter], step: int, total_steps: int, rate: Callable[[int], float]
    ) -> list[float]:
        for adapter in as_pair_adapters(adapters):
            assert isinstance(adapter, FlatAdapter)
            adapter.total = total_steps
        return super().rates(adapters, step, total_steps, rate)

    def batch(self, adapters: list[Adapter], step: int, samples: Sequence[int]) -> None:
        for adapter in adapters:
            assert isinstance(adapter, FlatAdapter)
            adapter.step = step
