"""LoRA-RITE (https://arxiv.org/abs/2410.20625) against a dense version that keeps the old bases, found by QR."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Update
from llm_lowrank.methods.directions.lora_rite import LoRARITE
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.numerics.pairs import Pairs
from tests import ranks
from tests.tiny import Trainee

M, N, R, SCALE, RATE = 30, 24, 4, 2.0, 1e-2
RULE = LoRARITE()


def random_pairs(r: int = R, seed: int = 0) -> Pairs:
    random = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(size, generator=random, dtype=torch.float64) for size in ((M, r), (r, N)))
    return Pairs(b / M**0.5, a / N**0.5)


def target() -> Tensor:
    return random_pairs(seed=1).scaled(3.0).product()


def gradients(pairs: Pairs) -> Pairs:
    """g_A and g_B of |s B A - T|^2 / 2."""
    G = SCALE * pairs.product() - target()
    return Pairs(SCALE * G @ pairs.A.T, SCALE * pairs.B.T @ G)


def error(pairs: Pairs) -> float:
    return relative(SCALE * pairs.product(), target())


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def exact_memory(pairs: Pairs, rule: LoRARITE = RULE) -> dict[str, Tensor]:
    """The memory before the first step, in float64: what is left of a difference is the algorithm's."""
    return {name: value.double() for name, value in rule.start(pairs).items()}


def run(pairs: Pairs, steps: int, decay: float = 0.0, memory: dict[str, Tensor] | None = None) -> list[Pairs]:
    """The pairs after each step."""
    memory, seen = exact_memory(pairs) if memory is None else memory, []
    for step in range(steps):
        found = RULE.direct(pairs, gradients(pairs), memory, Update(step, SCALE, RATE, decay))
        kept = 1 - RATE * decay
        pairs = Pairs(kept * pairs.B - RATE * found.B, kept * pairs.A - RATE * found.A)
        seen.append(pairs)
    return seen


def dense_run(pairs: Pairs, steps: int, decay: float = 0.0, beta1: float = 0.9, beta2: float = 0.999) -> list[Pairs]:
    """Algorithm 1 with bases by QR, whose signs are arbitrary, kept from step to step; moments corrected as Adam's."""
    factors = [pairs.A.T, pairs.B]  # each (length, r)
    bases = [torch.zeros_like(f) for f in reversed(factors)]  # of the other factor
    first, second = [torch.zeros_like(f) for f in factors], [torch.zeros(R, R, dtype=torch.float64) for f in factors]
    seen = []
    for t in range(1, steps + 1):
        found = gradients(Pairs(factors[1], factors[0].T))
        moved = []
        for i, gradient in enumerate((found.A.T, found.B)):
            Q, triangle = torch.linalg.qr(factors[1 - i])
            inverse = torch.linalg.inv(triangle)
            rotation = Q.T @ bases[i]
            u = gradient @ inverse  # (length, r)
            second[i] = beta2 * rotation @ second[i] @ rotation.T + (1 - beta2) * u.T @ u / len(u)
            values, vectors = torch.linalg.eigh(second[i] / (1 - beta2**t))
            z = u @ vectors @ torch.diag(1 / (values.sqrt() + 1e-6)) @ vectors.T
            first[i] = beta1 * first[i] @ rotation.T + (1 - beta1) * z
            moved.append(factors[i] - RATE * (first[i] / (1 - beta1**t) @ inverse.T + decay * factors[i]))
            bases[i] = Q
        factors = moved
        seen.append(Pairs(factors[1], factors[0].T))
    return seen


@pytest.mark.quick
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_run_is_that_of_the_dense_algorithm(decay):
    for found, wanted in zip(run(random_pairs(), 30, decay), dense_run(random_pairs(), 30, decay), strict=True):
        assert relative(found.A, wanted.A) < 1e-9
        assert relative(found.B, wanted.B) < 1e-9


def transformed(pairs: Pairs) -> Pairs:
    """The same product from other pairs: the change of pairs is a rotation and has the condition number 8."""
    rotation = torch.linalg.qr(random_pairs(seed=2).B[:R])[0]
    P = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64)) @ rotation
    return Pairs(pairs.B @ torch.linalg.inv(P), P @ pairs.A)


def adamw_run(pairs: Pairs, steps: int) -> Pairs:
    factors = [torch.nn.Parameter(t.clone()) for t in (pairs.B, pairs.A)]
    optimizer = torch.optim.AdamW(factors, lr=RATE, weight_decay=0.0)
    for _ in range(steps):
        found = gradients(Pairs(*(p.detach() for p in factors)))
        for p, gradient in zip(factors, (found.B, found.A), strict=True):
            p.grad = gradient
        optimizer.step()
    return Pairs(*(p.detach() for p in factors))


@pytest.mark.quick
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_run_does_not_depend_on_the_factorization(decay):
    start = random_pairs()
    ours, others = (run(pairs, 50, decay)[-1] for pairs in (start, transformed(start)))
    assert relative(others.product(), ours.product()) < 1e-8
    assert relative(adamw_run(transformed(start), 50).product(), adamw_run(start, 50).product()) > 0.3


@pytest.mark.quick
def test_from_b_of_zero_a_stands_still_for_one_step_and_then_learns():
    start = random_pairs()
    start = Pairs(torch.zeros_like(start.B), start.A)
    first, *_, last = run(start, 400, memory={})  # as a run has it, moments in float32
    assert torch.equal(first.A, start.A) and first.B.any()
    assert error(last) < 0.02


@pytest.mark.quick
def test_directions_that_b_lacks_wait_and_nothing_breaks():
    start = random_pairs()
    start.B[:, 2:] = 0
    memory = exact_memory(start)
    found = RULE.direct(start, gradients(start), memory, Update(0, SCALE, RATE, 0.0))
    assert not found.A[2:].any() and found.A[:2].any() and found.B.any()
    assert error(run(start, 400)[-1]) < 0.02


@pytest.mark.quick
def test_rank_1_by_hand():
    """Where the official relative epsilon is a NameError and a NaN is a 0."""
    pairs = random_pairs(1)
    g = gradients(pairs)
    found = RULE.direct(pairs, g, exact_memory(pairs), Update(0, SCALE, RATE, 0.0))
    u = g.A / pairs.B.norm()
    torch.testing.assert_close(found.A, u / (u.square().mean().sqrt() + 1e-6) / pairs.B.norm())


@pytest.mark.quick
def test_large_gradients_are_neither_skipped_nor_clipped_by_the_rule():
    pairs = random_pairs()
    g = gradients(pairs)
    small, large = (
        RULE.direct(pairs, Pairs(c * g.B, c * g.A), exact_memory(pairs), Update(0, SCALE, RATE, 0.0)) for c in (1, 1e4)
    )
    assert relative(large.A, small.A) < 1e-3 and relative(large.B, small.B) < 1e-3  # eps apart


@pytest.mark.quick
def test_what_is_remembered_is_the_same_after_a_change_of_pairs_that_keeps_the_product():
    pairs = run(random_pairs(), 5)[-1]
    memory = exact_memory(pairs)
    run(pairs, 5, memory=memory)
    before = {name: value.clone() for name, value in memory.items()}
    other = transformed(pairs)
    RULE.rebase(pairs, other, memory)
    for name in ("A", "B"):
        V, was = memory[f"rite_V_{name}"], before[f"rite_V_{name}"]
        torch.testing.assert_close(torch.linalg.eigvalsh(V), torch.linalg.eigvalsh(was), rtol=1e-9, atol=1e-15)
        assert float(memory[f"rite_M_{name}"].norm()) == pytest.approx(float(before[f"rite_M_{name}"].norm()))
    steps = [
        RULE.direct(p, gradients(p), m, Update(5, SCALE, RATE, 0.0)) for p, m in ((pairs, before), (other, memory))
    ]
    changes = [
        p.product() - Pairs(p.B - RATE * d.B, p.A - RATE * d.A).product()
        for p, d in zip((pairs, other), steps, strict=True)
    ]
    assert relative(changes[1], changes[0]) < 1e-8


def longest_step(pairs: Pairs, removed: Tensor, memory: dict[str, Tensor]) -> float:
    """The largest change of s B A by one factor in 5 steps, divided by the rate. W was changed by s removed before."""
    most = 0.0
    for step in range(30, 35):
        G = SCALE * (pairs.product() + removed) - target()
        found = RULE.direct(
            pairs, Pairs(SCALE * G @ pairs.A.T, SCALE * pairs.B.T @ G), memory, Update(step, SCALE, RATE, 0.0)
        )
        most = max(most, *(float((SCALE * t).norm()) for t in (found.B @ pairs.A, pairs.B @ found.A)))
        pairs = Pairs(pairs.B - RATE * found.B, pairs.A - RATE * found.A)
    return most


def copied(memory: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in memory.items()}


@pytest.mark.quick
@pytest.mark.parametrize("zero", [True, False], ids=["new pairs of zero", "new pairs"])
def test_after_an_exchange_new_directions_do_not_step_too_far(zero):
    memory = exact_memory(random_pairs())
    pairs = run(random_pairs(), 30, memory=memory)[-1]
    usual = longest_step(pairs, torch.zeros(M, N), copied(memory))
    fresh = random_pairs(seed=5)
    fresh = Pairs(torch.zeros_like(fresh.B) if zero else fresh.B, fresh.A)
    removed = pairs.product() - fresh.product()
    forgotten = {
        name: value if name == "rite_steps" else torch.zeros_like(value) for name, value in copied(memory).items()
    }
    RULE.rebase(pairs, fresh, memory)
    assert longest_step(fresh, removed, memory) < 1.2 * usual
    assert longest_step(fresh, removed, forgotten) > 1.5 * usual
    assert not memory["rite_fresh_A"] and not memory["rite_fresh_B"]  # for the first step alone


MODULES = ["k_proj", "up_proj"]
EXCHANGING = {
    "srlora": SRLoRA(
        rank=4, alpha=6, target_rank=6, gamma=0.5, svd_cache="", target_modules=MODULES, into="bank", direction=RULE
    ),
    "relora": ReLoRA(rank=4, alpha=6, interval=2, restart_warmup=1, target_modules=MODULES, direction=RULE),
}


def walk(method: str, engine: str) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    t = Trainee(EXCHANGING[method], engine, total=5)
    losses = []
    for step in range(5):
        losses.append(t.step(step, 1e-3))
        if step + 1 in t.method.schedule(5, t.adapters):
            assert t.method.exchange(t.adapters, t.engine, step + 1, t.total).drift < 1e-5
    return (
        losses,
        t.values(),
        {f"{a.name}.{k}": v for a in t.adapters for k, v in a.memory.items() if k.startswith("rite")},
    )


@pytest.mark.parametrize(
    "method, engine, world",
    [("srlora", "zero2", 3), ("srlora", "fsdp", 2), ("relora", "plain", 2), ("relora", "zero3", 2)],
)
def test_a_run_with_exchanges_is_that_of_one_process(method, engine, world):
    losses, values, memory = walk(method, "plain")
    for found in ranks.run(world, walk, method, engine):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        for name, value in values.items():
            assert relative(found[1][name], value) < 2e-4, name
        assert found[2].keys() == memory.keys()
        for name, value in memory.items():
            torch.testing.assert_close(found[2][name], value, rtol=1e-2, atol=1e-2 * float(value.abs().max()))


def test_a_resumed_run_remembers(tmp_path: Path):
    """The official optimizer creates its state anew at the first step, whatever was loaded."""
    method = LoRA(rank=3, alpha=6, target_modules=MODULES, direction=RULE)
    whole = Trainee(method, "plain")
    for step in range(4):
        if step == 2:
            found = whole.save(tmp_path, step)
        whole.step(step)
    resumed = Trainee(method, "plain", resume_from=found)
    assert float(resumed.adapters[0].memory["rite_steps"]) == 2
    for step in (2, 3):
        resumed.step(step)
    assert all(torch.equal(resumed.values()[name], value) for name, value in whole.values().items())
    for one, other in zip(whole.adapters, resumed.adapters, strict=True):
        assert one.memory.keys() == other.memory.keys()
        assert all(torch.equal(other.memory[name], value) for name, value in one.memory.items())


@pytest.mark.quick
def test_the_bytes_that_are_remembered_are_those_that_dry_run_shows():
    memory = RULE.start(random_pairs())
    assert sum(value.nbytes for value in memory.values()) == RULE.remembered(R, M, N)


@pytest.mark.quick
@pytest.mark.parametrize("setting, value", [("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0)])
def test_settings_that_cannot_be_meant_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"method.direction.{setting} must be"):
        LoRARITE(**{setting: value})
