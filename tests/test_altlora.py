"""AltLoRA (https://arxiv.org/abs/2505.12455) against projections of dense matrices, (m, n) each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Update
from llm_lowrank.methods.directions.altlora import AltLoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.numerics.pairs import Pairs
from tests import ranks
from tests.tiny import Trainee

M, N, R, SCALE, RATE = 20, 16, 3, 2.0, 0.1
RULE = AltLoRA(beta1=0.9, damping=0.0)
MODULES = ["k_proj", "up_proj"]


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


START, TARGET = Pairs(random(M, R, seed=0) / M**0.5, random(R, N, seed=1) / N**0.5), random(M, N, seed=2)
ZERO = Pairs(torch.zeros_like(START.B), START.A)


def full_gradient(pairs: Pairs) -> Tensor:
    """G of |s B A - T|^2 / 2."""
    return SCALE * pairs.product() - TARGET


def gradients(pairs: Pairs, scale: float = SCALE) -> Pairs:
    G = full_gradient(pairs)
    return Pairs(scale * G @ pairs.A.T, scale * pairs.B.T @ G)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def exact_memory(pairs: Pairs) -> dict[str, Tensor]:
    """The memory before the first step, in float64."""
    return {k: v if k == "alt_steps" else v.double() for k, v in RULE.start(pairs).items()}


def run(
    pairs: Pairs, steps: int, decay: float = 0.0, rule: AltLoRA = RULE, memory: dict[str, Tensor] | None = None
) -> list[Pairs]:
    """The pairs after each step."""
    memory, seen = exact_memory(pairs) if memory is None else memory, []
    for step in range(steps):
        found = rule.direct(pairs, gradients(pairs), memory, Update(step, SCALE, RATE, decay))
        kept = 1 - RATE * decay
        pairs = Pairs(kept * pairs.B - RATE * found.B, kept * pairs.A - RATE * found.A)
        seen.append(pairs)
    return seen


def dense_run(pairs: Pairs, steps: int, decay: float, beta: float = 0.9) -> list[Pairs]:
    """The momentum of each factor is a change of W, which the other factor projects: (m, n)."""
    A, B, seen = pairs.A, pairs.B, []
    of_A, of_B = torch.zeros(M, N, dtype=torch.float64), torch.zeros(M, N, dtype=torch.float64)
    for step in range(steps):
        G, bias = full_gradient(Pairs(B, A)), 1 - beta ** (step // 2 + 1)
        if step % 2 == 0:
            P = B @ torch.linalg.pinv(B)
            of_A = beta * P @ of_A + (1 - beta) * P @ G
            A = A - RATE * (torch.linalg.pinv(SCALE * B) @ of_A / bias + decay * A)
        else:
            P = torch.linalg.pinv(A) @ A
            of_B = beta * of_B @ P + (1 - beta) * G @ P
            B = B - RATE * (of_B @ torch.linalg.pinv(SCALE * A) / bias + decay * B)
        seen.append(Pairs(B, A))
    return seen


@pytest.mark.quick
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("start", [START, ZERO], ids=["pairs", "B = 0"])
def test_a_run_is_that_of_dense_projections(start, decay):
    for found, wanted in zip(run(start, 30, decay), dense_run(start, 30, decay), strict=True):
        assert relative(found.A, wanted.A) < 1e-8
        assert float((found.B - wanted.B).norm()) <= 1e-8 * float(wanted.B.norm())


@pytest.mark.quick
def test_a_run_does_not_depend_on_the_factorization():
    P = torch.diag(torch.logspace(-1, 1, R, dtype=torch.float64)) @ torch.linalg.qr(random(R, R, seed=3))[0]
    other = Pairs(START.B @ torch.linalg.inv(P), P @ START.A)  # the condition number is 100
    assert relative(run(other, 50)[-1].product(), run(START, 50)[-1].product()) < 1e-8
    damped = AltLoRA(beta1=0.9)  # d = 1e-3 is absolute
    assert relative(run(other, 50, rule=damped)[-1].product(), run(START, 50, rule=damped)[-1].product()) > 1e-3


@pytest.mark.quick
def test_each_step_is_a_projection_of_the_full_gradient_whatever_the_scale():
    G = full_gradient(START)
    for scale in (0.25, 5.66):
        memory = exact_memory(START)
        of_A, of_B = (
            RULE.direct(START, gradients(START, scale), memory, Update(step, scale, 0.0, 0.0)) for step in (0, 1)
        )
        assert not of_A.B.any() and not of_B.A.any()
        assert relative(scale * START.B @ of_A.A, START.B @ torch.linalg.pinv(START.B) @ G) < 1e-10
        assert relative(scale * of_B.B @ START.A, G @ torch.linalg.pinv(START.A) @ START.A) < 1e-10


@pytest.mark.quick
def test_the_damping_is_that_of_the_equations():
    rule, memory = AltLoRA(beta1=0.9, damping=0.05), exact_memory(START)
    first = rule.direct(START, gradients(START), memory, Update(0, SCALE, RATE, 0.0))
    g, damping = gradients(START), 0.05 * torch.eye(R, dtype=torch.float64)
    torch.testing.assert_close(first.A, torch.linalg.inv(START.B.T @ START.B + damping) @ g.A / SCALE**2)
    pairs = Pairs(START.B, START.A - RATE * first.A)
    second = rule.direct(pairs, gradients(pairs), memory, Update(1, SCALE, RATE, 0.0))
    moved = pairs.B - RATE * second.B
    aligned = torch.linalg.inv(moved.T @ moved + damping) @ moved.T @ pairs.B @ (0.1 * first.A)
    torch.testing.assert_close(memory["alt_M_A"].T, aligned)


@pytest.mark.quick
def test_a_step_that_was_left_out_does_not_change_whose_turn_it_is():
    memory = exact_memory(START)
    turns = [
        "A" if RULE.direct(START, gradients(START), memory, Update(step, SCALE, RATE, 0.0)).A.any() else "B"
        for step in (0, 2, 3, 5, 6)  # 1 and 4 were left out
    ]
    assert "".join(turns) == "ABABA"


@pytest.mark.quick
@pytest.mark.parametrize("rule", [RULE, AltLoRA()], ids=["undamped", "defaults"])
def test_from_b_of_zero_the_first_step_does_nothing_and_then_it_learns(rule):
    first, second, *_, last = run(ZERO, 200, rule=rule)
    assert torch.equal(first.A, ZERO.A) and torch.equal(first.B, ZERO.B)
    assert second.B.any()
    best = torch.linalg.svd(TARGET)[1][R:].norm() / TARGET.norm()  # what no product of rank r can learn
    assert relative(SCALE * last.product(), TARGET) < 1.05 * float(best)


@pytest.mark.quick
@pytest.mark.parametrize("rule", [RULE, AltLoRA()], ids=["undamped", "defaults"])
def test_factors_of_a_lower_rank_break_nothing(rule):
    pairs = Pairs(START.B.clone(), START.A.clone())
    pairs.B[:, 2] = pairs.B[:, 1]
    seen = run(pairs, 50, rule=rule)
    assert all(p.A.isfinite().all() and p.B.isfinite().all() for p in seen)
    errors = [relative(SCALE * p.product(), TARGET) for p in seen]
    assert errors[-1] < errors[0]


def noisy_error(beta1: float, rate: float, steps: int = 300) -> float:
    """The error of s B A after a run from B = 0 with noisy gradients and a rate that falls to zero."""
    rule, memory, pairs, best = AltLoRA(beta1=beta1), {}, ZERO, START.scaled(4.0).product()
    for step in range(steps):
        now = rate * (1 - step / steps)
        G = SCALE * pairs.product() - best + 0.05 * random(M, N, seed=100 + step)
        g = Pairs(SCALE * G @ pairs.A.T, SCALE * pairs.B.T @ G)
        found = rule.direct(pairs, g, memory, Update(step, SCALE, now, 0.0))
        pairs = Pairs(pairs.B - now * found.B, pairs.A - now * found.A)
    return relative(SCALE * pairs.product(), best)


@pytest.mark.quick
def test_a_short_run_wants_a_shorter_momentum_than_the_authors():
    """The card tells of it: 0.999 weighs all gradients of such a run alike, the first ones too."""
    rates = (0.01, 0.03, 0.1, 0.3, 1.0)
    theirs, usual = (min(noisy_error(beta1, rate) for rate in rates) for beta1 in (0.999, 0.9))
    assert usual < 0.5 * theirs


@pytest.mark.quick
def test_the_momentum_follows_a_change_of_pairs_that_keeps_the_product():
    memory = exact_memory(START)
    pairs = run(START, 6, memory=memory)[-1]
    before = {name: value.clone() for name, value in memory.items()}
    P = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    other = Pairs(pairs.B @ torch.linalg.inv(P), P @ pairs.A)
    RULE.rebase(pairs, other, memory)
    assert relative(other.B @ memory["alt_M_A"].T, pairs.B @ before["alt_M_A"].T) < 1e-9
    assert relative(memory["alt_M_B"] @ other.A, before["alt_M_B"] @ pairs.A) < 1e-9
    RULE.rebase(other, Pairs(torch.zeros_like(pairs.B), random(R, N, seed=7)), memory)
    assert not memory["alt_M_A"].any()  # new pairs with B = 0


@pytest.mark.quick
def test_the_bytes_that_are_remembered_are_those_that_dry_run_shows():
    assert sum(value.nbytes for value in RULE.start(START).values()) == RULE.remembered(R, M, N)


@pytest.mark.quick
@pytest.mark.parametrize("setting, value", [("beta1", 1.0), ("damping", -1.0)])
def test_settings_that_cannot_be_meant_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"method.direction.{setting} must be"):
        AltLoRA(**{setting: value})


def turns(engine: str) -> list[set[str]]:
    """Which factors move in each step, under weight decay."""
    method = LoRA(rank=3, alpha=6, target_modules=MODULES, direction=RULE)
    t = Trainee(method, engine, optimization={"optim": "sgd", "weight_decay": 0.1})
    moved, before = [], t.values()
    for step in range(5):
        t.step(step)
        after = t.values()
        moved.append({name[-1] for name, value in after.items() if not torch.equal(value, before[name])})
        before = after
    return moved


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero3", 2)])
def test_the_factor_that_rests_keeps_its_bits(engine, world):
    for moved in ranks.run(world, turns, engine):
        assert moved == [{"A"}, {"B"}, {"A"}, {"B"}, {"A"}]


def walk(engine: str) -> tuple[list[float], dict[str, Tensor]]:
    settings = dict(rank=4, alpha=6, target_rank=6, gamma=0.5, svd_cache="", target_modules=MODULES, into="bank")
    t = Trainee(SRLoRA(**settings, direction=AltLoRA()), engine, total=5)
    losses = []
    for step in range(5):
        losses.append(t.step(step))
        if step + 1 in t.method.schedule(5, t.adapters):
            t.method.exchange(t.adapters, t.engine, step + 1, t.total)
    return losses, t.values()


@pytest.mark.parametrize("engine, world", [("zero2", 3), ("fsdp", 2)])
def test_a_run_with_exchanges_is_that_of_one_process(engine, world):
    losses, values = walk("plain")
    for found in ranks.run(world, walk, engine):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        for name, value in values.items():
            assert relative(found[1][name], value) < 1e-4, name


def test_a_resumed_run_remembers_its_momentum_and_whose_turn_it_is(tmp_path: Path):
    method = LoRA(rank=3, alpha=6, target_modules=MODULES, direction=AltLoRA())
    whole = Trainee(method, "plain")
    for step in range(5):
        if step == 3:
            found = whole.save(tmp_path, step)
        whole.step(step)
    resumed = Trainee(method, "plain", resume_from=found)
    for step in (3, 4):
        resumed.step(step)
    assert all(torch.equal(resumed.values()[name], value) for name, value in whole.values().items())
    for one, other in zip(whole.adapters, resumed.adapters, strict=True):
        assert one.memory.keys() == other.memory.keys()
        assert all(torch.equal(other.memory[name], value) for name, value in one.memory.items())
