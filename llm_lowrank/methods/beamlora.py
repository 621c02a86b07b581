"""BeamLoRA: a weight for each pair, and the weakest pairs are overwritten by older copies of the strongest ones.
https://arxiv.org/abs/2502.13604

    y = W x + s B diag(p) A x,  p = r softmax(q / tau)     q (r,) = 0 at the start, so that p = 1; trained like A and B
    c(t) = 1 - (1 - kept) (1 + cos(pi t / t_end)) / 2      from `kept` up to 1 at t_end; then nothing is pruned

Every `interval` steps all p of all modules are sorted. Where the sum of the largest ones exceeds c of the total, the
rest is pruned: K pairs of a module, half of its pairs at most. An expansion writes over them:

    (b, a)_pruned  <-  (b, a)_source of half an interval ago, with their moments      source: the K largest p, shuffled
    q_pruned, q_source  <-  their mean                                                all moments of all q  <-  0

Two copies of a good direction, one of them older, can then diverge. An expansion changes the function on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, PairSettings, Whole, generator
from llm_lowrank.adapters.exchange import Exchanged, rewrite_
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine, Slot
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.functional import Product
from llm_lowrank.numerics.pairs import Pairs

FACTORS = ("A", "B")
EQUAL = 5  # decimals, to which the weights are compared; of equal ones the first is the larger


class BeamAdapter(PairAdapter):
    """A PairAdapter whose pairs share a weight of r among them, by a softmax over the trained `q` (r,)."""

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings, *, tau: float) -> None:
        super().__init__(name, linear, codec, settings)
        self.q = self.factor(self.rank)
        self.tau = tau

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: those of LoRA, and all weights are 1."""
        return super().initial(pairs) | {"q": torch.zeros(self.rank, device="cpu")}

    def weights(self, q: Tensor) -> Tensor:
        """p (r,) of q; the sum is r."""
        return self.rank * torch.softmax(q / self.tau, 0)

    def products(self, x: Tensor) -> list[Product]:
        return [Product(self.A, self.B, gate=self.weights(self.q))]

    def pairs(self, whole: Whole) -> Pairs:
        return Pairs(whole(self.B) * self.weights(whole(self.q)), whole(self.A))


@Method.register_subclass("beamlora")
@dataclass(frozen=True)
class BeamLoRA(LoRA):
    """Train pairs with weights, and overwrite the weakest ones by older copies of the strongest ones."""

    interval: int | None = None
    """Steps between expansions; the copies are taken half an interval before. By default a twelfth of the run (the
    paper: 3000 of 37,000)."""
    tau: float = 0.05
    """Temperature of the softmax (the paper: 0.05, and 0.03 for learning rates below 1e-4)."""
    kept: float = 0.95
    """Share of all weights that the pairs have which the first expansion keeps; it rises to 1."""
    end_share: float = 2 / 3
    """Share of the run after which nothing is pruned any more: t_end / T."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.interval is not None and self.interval < 2:
            complaints.append(f"method.interval must be at least 2, not {self.interval}")
        if not 0 < self.tau < math.inf:
            complaints.append(f"method.tau must be above 0, not {self.tau}")
        if not 0 < self.kept < 1:
            complaints.append(f"method.kept must be between 0 and 1, not {self.kept}")
        if not 0 < self.end_share <= 1:
            complaints.append(f"method.end_share must be above 0 and at most 1, not {self.end_share}")
        if self.directs:
            complaints.append(
                f"method.direction.type {self.direction_name} is for a product B A, and beamlora trains B diag(p) A; "
                "remove it"
            )
        return complaints

    @property
    def changes_function(self) -> bool:
        return True

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        copies = 3  # the values, and two moments of AdamW
        return sum(copies * getattr(adapter, letter).nbytes for adapter in adapters for letter in FACTORS), 0

    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return BeamAdapter(name, linear, codec, settings, tau=self.tau)

    # ---- when, and how many

    def period(self, total_steps: int) -> int:
        """The steps between expansions."""
        return self.interval or max(2, round(total_steps / 12))

    def expansions(self, total_steps: int) -> list[int]:
        """The multiples of the interval before t_end that leave a whole interval behind them."""
        period = self.period(total_steps)
        last = min(total_steps - period, math.ceil(self.end_share * total_steps) - 1)
        return list(range(period, last + 1, period))

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        steps, period = self.expansions(total_steps), self.period(total_steps)
        if not steps:
            raise ValueError(
                f"method.interval ({period}) leaves no expansion in a run of {total_steps} steps: one must come "
                f"before {self.end_share:.3g} of the run and leave an interval behind it; lower it, train longer or "
                "set method.type: lora"
            )
        return tuple(sorted([*steps, *(step - period // 2 for step in steps)]))

    def threshold(self, step: int, total_steps: int) -> float:
        """c(step)."""
        return 1 - (1 - self.kept) * (1 + math.cos(math.pi * step / (self.end_share * total_steps))) / 2

    # ---- the hooks of a run

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        for adapter in _beams(adapters):
            for letter in FACTORS:
                for kind in ("", *engine.settings.kind.moments):
                    span = engine.span(getattr(adapter, letter))
                    adapter.memory[f"past_{letter}{kind}"] = torch.zeros_like(span.value)
                    adapter.spans[f"past_{letter}{kind}"] = letter

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        layers = _beams(adapters)
        if step % self.period(total_steps):
            for adapter in layers:
                remember_(adapter, engine)
            return None
        events = []
        for adapter, sources in zip(
            layers, choose(layers, engine, self.threshold(step, total_steps), step), strict=True
        ):
            pruned = (sources >= 0).nonzero()[:, 0]
            if len(pruned):
                edit = partial(expand_, pruned, sources[pruned], past(adapter, engine))
                params = (adapter.A, adapter.B, adapter.q)
                events.append(rewrite_(engine, adapter, params, edit, pairs=len(pruned)))
            else:
                with engine.edit(adapter.q) as (q,):
                    forget_(q)
        return Exchanged.total(events) if events else None

    def metrics(self, adapters: list[Adapter], engine: Engine) -> dict[str, float]:
        """Return the smallest and the largest weight of a pair of any module."""
        p = torch.cat(weights(_beams(adapters), engine))
        return {"smallest_weight": float(p.min()), "largest_weight": float(p.max())}


def _beams(adapters: Sequence[Adapter]) -> list[BeamAdapter]:
    assert all(isinstance(adapter, BeamAdapter) for adapter in adapters)
    return list(adapters)  # type: ignore[arg-type]


def weights(adapters: Sequence[BeamAdapter], engine: Engine) -> list[Tensor]:
    """Return p of every adapter, (r,) float64 each. Collective: one sum for all of them."""
    found = engine.whole_masters([adapter.q for adapter in adapters])
    return [adapter.weights(q.double()) for adapter, q in zip(adapters, found, strict=True)]


def remember_(adapter: BeamAdapter, engine: Engine) -> None:
    """Copy this rank's spans of A and B and of their moments into the memory. Local."""
    for letter in FACTORS:
        span = engine.span(getattr(adapter, letter))
        adapter.memory[f"past_{letter}"].copy_(span.value)
        for kind, moment in span.moments.items():
            adapter.memory[f"past_{letter}{kind}"].copy_(moment)


def past(adapter: BeamAdapter, engine: Engine) -> dict[str, Tensor]:
    """Return what is remembered of an adapter, whole: A, Aexp_avg, ..., B, ... Collective: one sum for all of it."""
    keys = [key for key in adapter.memory if key.startswith("past_")]
    params = [getattr(adapter, adapter.spans[key]) for key in keys]
    wholes = engine.join_spans(params, [adapter.memory[key] for key in keys])
    return {key.removeprefix("past_"): whole for key, whole in zip(keys, wholes, strict=True)}


def choose(adapters: Sequence[BeamAdapter], engine: Engine, threshold: float, step: int) -> list[Tensor]:
    """Return for every pair of every adapter which pair's older copy takes its place, (r,); -1 if it stays.

    Rank 0 decides. Collective.
    """
    # Adam's first steps are equally long for all q: rounding, which depends on the ranks, must not order their weights
    p = [found.round(decimals=EQUAL) for found in weights(adapters, engine)]

    def decide() -> list[Tensor]:
        order = torch.cat(p).cpu()
        sizes, indices = order.sort(descending=True, stable=True)
        pruned = torch.zeros(len(order), dtype=torch.bool)
        pruned[indices[sizes.cumsum(0) > threshold * len(order)]] = True
        counts = [int(mask.sum()) for mask in pruned.split([adapter.rank for adapter in adapters])]
        return [
            torch.cat(
                [
                    sources_of(found.cpu(), count, generator(adapter.seed, adapter.name, step))
                    for adapter, found, count in zip(adapters, p, counts, strict=True)
                ]
            )
        ]

    (sources,) = engine.broadcast(decide)
    engine.same("the pruned pairs", sources)
    return list(sources.split([adapter.rank for adapter in adapters]))


def sources_of(p: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Return for each pair of a module the pair that takes its place, or -1: (r,).

    The `count` pairs with the smallest p are pruned, half of the pairs at most: with more of them a pair would be
    pruned and a source too. Those with the largest p take their places, in random order.
    """
    count = min(count, len(p) // 2)
    order = p.argsort(descending=True, stable=True)
    sources = torch.full((len(p),), -1)
    if count:
        sources[order[-count:]] = order[:count][torch.randperm(count, generator=random)]
    return sources


def expand_(pruned: Tensor, sources: Tensor, past: Mapping[str, Tensor], a: Slot, b: Slot, q: Slot) -> None:
    """Overwrite pruned pairs by the older copies of their sources, values and moments, in place. Local."""
    for letter, slot in (("A", a), ("B", b)):
        for kind, value in {"": slot.value, **slot.moments}.items():
            now, old = value, past[letter + kind]
            if letter == "B":
                now, old = now.T, old.T  # views: a pair is a row
            now[pruned] = old[sources]
    mean = (q.value[pruned] + q.value[sources]) / 2
    q.value[pruned], q.value[sources] = mean, mean
    forget_(q)


def forget_(slot: Slot) -> None:
    """Set all moments to zero. Local."""
    for moment in slot.moments.values():
        moment.zero_()
