"""SRLoRA repaired in its own terms, for the comparisons `remedies` and `scores` of benchmarks/quality.py.

SRLoRA (https://arxiv.org/abs/2505.12433) exchanges the pairs that matter least. Two remedies, one by one and together,
for a LoRA whose A is random and whose B is 0 at the start. They need the statistics of r x r, n and m numbers:

    C_A = sum g_A g_A^T      C_B = sum g_B^T g_B
    right_A = sums of the squares of each column of g_A      right_B = those of each row of g_B
    over the clipped gradients of the steps since the last exchange or turn

    exchange   energy of pair i = C_B[i, i] |A_i|^2 + |B_i|^2 C_A[i, i]. With plain gradient descent pair i changes W
               by g_B,i A_i + B_i g_A,i, and this is the sum of the squares of both terms. The half of the pairs with
               the least energy goes into W. Fresh pairs: the leading right singular directions of dL/dW on the next
               samples, outside of the span of the rows of A that stay, at the length of LoRA's rows; B = 0
    turn       A <- Q A, B <- B Q^T, Q (r, r) the eigenvectors of C_A / tr C_A + C_B / tr C_B. W + B A does not
               change, and nothing goes into W. The moments go along as in CORE:
               m <- Q m,   v^_ij <- (Q C_A Q^T)_ii right_A,j / (K sum right_A), for B likewise, K the steps summed up;
               Adam's bias is corrected as after K steps

No methods of the library: they run on one process, with AdamW and float32 weights.

`scores` compares what SRLoRA itself may rank pairs by (`method.score`), through 3 r directions in four exchanges,
beside a choice by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, as_pair_adapters, generator
from llm_lowrank.adapters.exchange import Exchanged, Moments, exchange_
from llm_lowrank.adapters.method import Method
from llm_lowrank.adapters.probes import top_directions
from llm_lowrank.engines.base import Engine, Slot
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.core import FLOOR
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.pissa import ROW_LENGTH
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.numerics.gram import Spectrum
from llm_lowrank.numerics.pairs import Pairs

REMEDIES = {
    "lora": "LoRA, rank r",
    "exchange_zeroed": "two exchanges, fresh moments 0",
    "exchange": "two exchanges, fresh second moments seeded",
    "exchange_early": "one exchange after step 30, seeded",
    "exchange_soap": "two exchanges, with SOAP on both sides carried through",
    "turn": "a turn every 15 steps, no exchange",
    "turn_exchange": "a turn every 15 steps and two exchanges, seeded",
}

SCORES = {
    "lora": "LoRA, rank r",
    "paper": "SRLoRA, score: paper",
    "unit": "SRLoRA, score: unit",
    "change": "SRLoRA, score: change",
    "chance": "SRLoRA, pairs chosen by chance",
}


@dataclass(frozen=True)
class Remedy(LoRA):
    """LoRA with exchanges of the pairs with the least gradient energy, with turns, or with both."""

    exchanges: list[int] = field(default_factory=list)
    """Steps after which half of the pairs are exchanged."""
    interval: int = 0
    """Steps between two turns; 0: none. Where a turn meets an exchange it comes first."""
    moments: Moments = "seeded"
    """How the moments of fresh pairs start, see adapters/exchange.py."""
    looks: int = 4
    """Steps ahead whose samples give the fresh directions."""
    svd_niter: int = 1
    """Iterations of the randomized SVD: 2 svd_niter + 2 passes over these samples."""

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        turns = range(self.interval, total_steps, self.interval) if self.interval else ()
        return tuple(sorted({*self.exchanges, *turns}))

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        for adapter in as_pair_adapters(adapters):
            (m, n), r = adapter.shape, adapter.rank
            sizes = {"C_A": (r, r), "C_B": (r, r), "right_A": (n,), "right_B": (m,), "taken": ()}
            adapter.memory |= {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}

    def observe(self, adapters: list[Adapter], engine: Engine) -> None:
        limit = engine.settings.max_grad_norm or float("inf")  # beside a direction nothing is clipped yet
        clip = min(1.0, limit / (engine.gradient_norm() + 1e-6))
        for adapter in as_pair_adapters(adapters):
            g_A, g_B = (clip * g.double() for g in engine.whole_gradients([adapter.A, adapter.B]))
            adapter.memory["C_A"] += g_A @ g_A.T
            adapter.memory["C_B"] += g_B.T @ g_B
            adapter.memory["right_A"] += g_A.square().sum(0)
            adapter.memory["right_B"] += g_B.square().sum(1)
            adapter.memory["taken"] += 1

    def calibrate(self, adapters: list[Adapter], engine: Engine, backward: Callable[[], None]) -> None:
        """Look at the gradient of W before an exchange."""
        layers = as_pair_adapters(adapters)
        counts, columns = [2 * layer.rank for layer in layers], [4 * layer.rank for layer in layers]
        found = top_directions(layers, engine, backward, counts, columns=columns, niter=self.svd_niter)
        for layer, triplets in zip(layers, found, strict=True):
            layer.memory["ahead"] = triplets.S[:, None].double() * triplets.V.T.double()

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        layers, events = as_pair_adapters(adapters), []
        for adapter in layers:
            if self.interval and step % self.interval == 0:
                turn_(engine, adapter)
            if step in self.exchanges:
                events.append(self.renew(engine, adapter))
            for name in ("C_A", "C_B", "right_A", "right_B", "taken"):
                adapter.memory[name].zero_()
        return Exchanged.total(events) if events else None

    def renew(self, engine: Engine, adapter: PairAdapter) -> Exchanged:
        """Exchange half of the pairs of one layer."""
        r = adapter.rank
        index = energies(adapter).argsort()[: r // 2].sort().values
        stays = torch.ones(r, dtype=torch.bool)
        stays[index] = False
        a = fresh_rows(adapter.memory.pop("ahead"), adapter.A.detach()[stays].double(), len(index))
        fresh = Pairs(torch.zeros(adapter.shape[0], len(index)), a.float())
        return exchange_(engine, adapter, index, fresh=fresh, moments=self.moments)


def energies(adapter: PairAdapter) -> Tensor:
    """The gradient energy of each pair since the last exchange or turn, (r,)."""
    A, B, memory = adapter.A.detach().double(), adapter.B.detach().double(), adapter.memory
    return memory["C_B"].diagonal() * A.square().sum(1) + B.square().sum(0) * memory["C_A"].diagonal()


def fresh_rows(ahead: Tensor, kept: Tensor, count: int) -> Tensor:
    """The leading right singular directions of `ahead` (k, n) outside of the span of `kept` (l, n): (count, n)."""
    basis = torch.linalg.qr(kept.T)[0]
    return ROW_LENGTH * torch.linalg.svd(ahead - ahead @ basis @ basis.T, full_matrices=False)[2][:count]


def turn_(engine: Engine, adapter: PairAdapter) -> None:
    """Turn the pairs of a layer to the eigenbasis of their gradients, and carry the moments over."""
    assert isinstance(engine, Plain), "the step count of the optimizer is written"
    memory, tiny = adapter.memory, torch.finfo(torch.float64).tiny
    C = sum(memory[name] / memory[name].trace().clamp_min(tiny) for name in ("C_A", "C_B"))
    assert isinstance(C, Tensor)
    Q, K = Spectrum.of(C).V.T, int(memory["taken"])
    beta1, beta2 = engine.settings.betas
    with engine.edit(adapter.A, adapter.B) as (a, b):
        rows = {
            "A": a,
            "B": Slot(b.value.T, {name: moment.T for name, moment in b.moments.items()}),
        }  # views, a row a pair
        for name, slot in rows.items():
            count = engine.optimizer.state[getattr(adapter, name)]["step"]
            left, right = (Q @ memory[f"C_{name}"] @ Q.T).diagonal(), memory[f"right_{name}"]
            second = torch.outer(left, right) / (K * right.sum()).clamp_min(tiny)
            second += FLOOR * second.mean()
            mean = Q @ slot.moments["exp_avg"].double() * ((1 - beta1**K) / (1 - beta1 ** float(count)))
            slot.value.copy_(Q @ slot.value.double())
            slot.moments["exp_avg"].copy_(mean)
            slot.moments["exp_avg_sq"].copy_(second * (1 - beta2**K))
            count.fill_(K)
    # the statistics of the same gradients in the new basis
    for name in ("C_A", "C_B"):
        memory[name].copy_(Q @ memory[name] @ Q.T)


def remedies(model: PreTrainedModel, rank: int, steps: int, svd_cache: str) -> dict[str, Method]:
    """Return the settings of every remedy, as `methods` of benchmarks/quality.py does."""
    from benchmarks.soap import Soap  # registers a direction, which no other comparison should know

    thirds = [steps // 3, 2 * steps // 3]
    turned = [round(step / 15) * 15 for step in thirds]
    return {
        "lora": LoRA(rank=rank),
        "exchange_zeroed": Remedy(rank=rank, exchanges=thirds, moments="zeroed"),
        "exchange": Remedy(rank=rank, exchanges=thirds),
        "exchange_early": Remedy(rank=rank, exchanges=[steps // 10]),
        "exchange_soap": Remedy(rank=rank, exchanges=thirds, direction=Soap()),
        "turn": Remedy(rank=rank, interval=15),
        "turn_exchange": Remedy(rank=rank, interval=15, exchanges=turned),
    }


@dataclass(frozen=True)
class Chance(SRLoRA):
    """SRLoRA that replaces pairs by chance."""

    def scores(self, adapters: list[PairAdapter], engine: Engine) -> Tensor:
        random = (generator(a.seed, a.name, int(a.memory["visited"])) for a in adapters)
        return torch.stack([torch.rand(self.rank, generator=one, dtype=torch.float64) for one in random])


def scores(model: PreTrainedModel, rank: int, steps: int, svd_cache: str) -> dict[str, Method]:
    """Return the settings of every score, as `methods` of benchmarks/quality.py does."""
    common: dict[str, Any] = dict(rank=rank, target_rank=3 * rank, svd_cache=svd_cache)
    return {
        "lora": LoRA(rank=rank),
        "paper": SRLoRA(**common),
        "unit": SRLoRA(**common, score="unit"),
        "change": SRLoRA(**common, score="change"),
        "chance": Chance(**common),
    }
