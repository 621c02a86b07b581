"""BeamLoRA (https://arxiv.org/abs/2502.13604) against its layer and its choice, written out again here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairSettings, generator
from llm_lowrank.adapters.exchange import Exchanged, measure_exchange
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.beamlora import BeamAdapter, BeamLoRA, sources_of
from llm_lowrank.models import checkpoint
from tests import ranks
from tests.tiny import Trainee

MODULES = ["k_proj", "up_proj"]  # 14 x 42 and 43 x 42, twice each
STEPS, TAU = 12, 0.05
# copies after steps 2 and 5, expansions after steps 3 and 6
METHOD = BeamLoRA(rank=6, alpha=9, interval=3, kept=0.6, target_modules=MODULES)
ENGINES = [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]


@pytest.mark.quick
def test_values_and_gradients_are_those_of_autograd():
    torch.manual_seed(3)
    linear, x = nn.Linear(10, 7), torch.randn(2, 5, 10)
    ours = BeamAdapter("layer", linear, Dense(torch.float32), PairSettings(rank=3, scale=2.0), tau=TAU)
    values = {"A": torch.randn(3, 10), "B": torch.randn(7, 3), "q": 0.1 * torch.randn(3)}
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    for name, value in values.items():
        getattr(ours, name).data = value
    p = 3 * (leaves["q"] / TAU).exp() / (leaves["q"] / TAU).exp().sum()
    wanted = linear(x).detach() + 2.0 * (x @ leaves["A"].T * p) @ leaves["B"].T
    y = ours(x)
    torch.testing.assert_close(y, wanted)
    g = torch.linspace(-1, 2, y.numel()).view(y.shape)
    y.backward(g)
    wanted.backward(g)
    for name, leaf in leaves.items():
        torch.testing.assert_close(getattr(ours, name).grad, leaf.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.initial()["q"], torch.zeros(3)) and float(ours.weights(torch.zeros(3)).sum()) == 3


@dataclass
class Expansion:
    older: tuple[dict[str, Tensor], dict[str, Tensor]]  # values and moments when the copies were taken
    before: tuple[dict[str, Tensor], dict[str, Tensor]]
    after: tuple[dict[str, Tensor], dict[str, Tensor]]
    event: Exchanged | None


Part = tuple[list[Expansion], dict[str, Tensor], dict[str, Tensor]]


def part(engine: str, dtype: str, folder: str = "", first: int = 0, last: int = STEPS, save: bool = False) -> Part:
    resumed = checkpoint.newest(Path(folder))[0] if first else None
    t, expansions, older = Trainee(METHOD, engine, dtype, total=STEPS, resume_from=resumed), [], ({}, {})
    for step in range(first, last):
        t.step(step)
        if step + 1 in METHOD.schedule(STEPS):
            before = t.values(), t.moments()
            event = measure_exchange(
                t.engine,
                lambda step=step: METHOD.exchange(t.adapters, t.engine, step + 1, t.total),
                changes_function=True,
            )
            if (step + 1) % METHOD.interval:
                older = before
                assert event is None and all(torch.equal(v, before[0][k]) for k, v in t.values().items())
            else:
                expansions.append(Expansion(older, before, (t.values(), t.moments()), event))
    if save:
        t.save(Path(folder), last)
    return expansions, t.values(), METHOD.metrics(t.adapters, t.engine)


def weight(q: Tensor) -> Tensor:
    e = (q.double() / TAU).exp()
    return (len(q) * e / e.sum()).round(decimals=5)


def pruned_of(values: dict[str, Tensor], names: list[str], threshold: float) -> dict[str, int]:
    """How many pairs of each module are behind the first place where the sum exceeds the threshold."""
    every = sorted(((-float(p), i, name) for i, name in enumerate(names) for p in weight(values[f"{name}.q"])))
    counts, total = dict.fromkeys(names, 0), 0.0
    for p, _, name in every:
        total -= p
        counts[name] += total > threshold * len(every)
    return counts


def c(step: int) -> float:
    return 1 - 0.4 * (1 + math.cos(math.pi * step / 8)) / 2


@pytest.mark.parametrize("engine, world", ENGINES)
def test_the_weakest_pairs_become_older_copies_of_the_strongest(engine, world):
    for expansions, _, metrics in ranks.run(world, part, engine, "nf4" if engine == "zero3" else "fp32"):
        assert len(expansions) == 2 and 0 < metrics["smallest_weight"] < 1 < metrics["largest_weight"] < 6
        for step, found in zip((3, 6), expansions, strict=True):
            (old, old_m), (was, was_m), (now, now_m) = found.older, found.before, found.after
            names = [key[:-2] for key in was if key.endswith(".q")]  # in the order of the model
            counts = {name: min(3, count) for name, count in pruned_of(was, names, c(step)).items()}
            assert found.event is not None and found.event.pairs == sum(counts.values()) > 0
            assert found.event.meant and 0 < found.event.lost and found.event.drift > 0
            for name in names:
                order = weight(was[f"{name}.q"]).argsort(descending=True, stable=True)
                count = counts[name]
                strong, weak = order[:count], order[len(order) - count :]
                stay = order[: len(order) - count]
                shuffled = strong[torch.randperm(count, generator=generator(0, name, step))]
                for key, new, past, before in [(f"{name}.{letter}", now, old, was) for letter in "AB"] + [
                    (f"{name}.{letter}.{kind}", now_m, old_m, was_m)
                    for letter in "AB"
                    for kind in ("exp_avg", "exp_avg_sq")
                ]:
                    rows = [t[key].T if f"{name}.B" in key else t[key] for t in (new, past, before)]
                    assert torch.equal(rows[0][weak], rows[1][shuffled]), (key, "bitwise, the older copy")
                    assert torch.equal(rows[0][stay], rows[2][stay]), (key, "bitwise as it was")
                q, q_was = now[f"{name}.q"], was[f"{name}.q"]
                mean = (q_was[weak] + q_was[shuffled]) / 2
                assert torch.equal(q[weak], mean) and torch.equal(q[shuffled], mean)
                others = order[count : len(order) - count]
                assert torch.equal(q[others], q_was[others])
                assert not now_m[f"{name}.q.exp_avg"].any() and not now_m[f"{name}.q.exp_avg_sq"].any()


@pytest.mark.parametrize("at", [1, 2, 3, 4])  # with copies taken, before, at and after an expansion
def test_a_resume_goes_on_bitwise(at, tmp_path):
    dtype = "fp32" if at % 2 else "nf4"
    part("plain", dtype, str(tmp_path), 0, at, True)
    resumed, whole = part("plain", dtype, str(tmp_path), at), part("plain", dtype)
    assert all(torch.equal(value, resumed[1][name]) for name, value in whole[1].items())


@pytest.mark.parametrize("engine, world", ENGINES[2:])
def test_copies_are_resumed_on_another_number_of_ranks(engine, world, tmp_path):
    whole = part("plain", "nf4")
    ranks.run(world, part, engine, "nf4", str(tmp_path), 0, 2, True)
    resumed = part("plain", "nf4", str(tmp_path), 2)
    assert [e.event.pairs for e in resumed[0]] == [e.event.pairs for e in whole[0]]
    for name, value in whole[1].items():
        torch.testing.assert_close(resumed[1][name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.quick
def test_half_of_the_pairs_are_pruned_at_most():
    p = torch.tensor([0.1, 3.0, 0.2, 1.5, 0.2])
    assert sources_of(p, 0, torch.Generator()).tolist() == [-1] * 5
    assert sources_of(p, 1, torch.Generator()).tolist() == [1, -1, -1, -1, -1]
    found = sources_of(p, 4, torch.Generator()).tolist()
    assert found[1:4] == [-1] * 3 and {found[0], found[4]} == {1, 3}  # of equal ones the last
    assert sources_of(torch.ones(1), 1, torch.Generator()).tolist() == [-1]


@pytest.mark.quick
def test_the_authors_copy_of_moments_changes_nothing():
    """Their `state["exp_avg"][mask, :].copy_(...)` writes into what indexing with a mask has made: a copy."""
    moment, mask = torch.zeros(3, 2), torch.tensor([True, False, True])
    moment[mask, :].copy_(torch.ones(2, 2))
    assert not moment.any()


@pytest.mark.quick
def test_settings():
    assert METHOD.schedule(STEPS) == (2, 3, 5, 6) and METHOD.expansions(STEPS) == [3, 6]  # 9 is behind 8
    assert BeamLoRA(interval=3000).expansions(37032) == list(range(3000, 24688, 3000))  # as published
    assert BeamLoRA(interval=4).schedule(12) == (2, 4) and BeamLoRA(interval=4, end_share=1.0).schedule(12) == (
        2,
        4,
        6,
        8,
    )
    assert BeamLoRA().threshold(0, 90) == 0.95 and BeamLoRA().threshold(60, 90) == 1.0
    assert BeamLoRA().threshold(30, 90) == pytest.approx(0.975)
    for wrong, message in (
        (dict(interval=1), r"method\.interval must be at least 2, not 1"),
        (dict(tau=0.0), r"method\.tau must be above 0, not 0"),
        (dict(kept=1.0), r"method\.kept must be between 0 and 1, not 1"),
        (dict(end_share=0.0), r"method\.end_share must be above 0 and at most 1, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            BeamLoRA(**wrong)
    assert BeamLoRA().schedule(12) == (1, 2, 3, 4, 5, 6) and BeamLoRA().expansions(3000) == list(range(250, 2000, 250))
    for method, total in ((BeamLoRA(interval=3000), 12), (BeamLoRA(), 3)):
        with pytest.raises(ValueError, match=r"method\.interval \(\d+\) leaves no expansion in a run of \d+ steps"):
            method.schedule(total)
