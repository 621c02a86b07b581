"""RefLoRA-S (https://arxiv.org/abs/2505.18877) against AdamW on pairs that are really rescaled, with their moments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm_lowrank.adapters.direction import Update
from llm_lowrank.methods.directions.reflora_s import RefLoRAS
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.numerics.pairs import Pairs
from tests.tiny import Trainee

M, N, R, SCALE, RATE = 20, 16, 3, 2.0, 1e-2
MODULES = ["k_proj", "up_proj"]


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


START, TARGET = Pairs(0.05 * random(M, R, seed=0), random(R, N, seed=1)), random(M, N, seed=2)


def gradients(pairs: Pairs) -> Pairs:
    """g_A and g_B of |s B A - T|^2 / 2."""
    G = SCALE * pairs.product() - TARGET
    return Pairs(SCALE * G @ pairs.A.T, SCALE * pairs.B.T @ G)


def run(pairs: Pairs, rule: RefLoRAS, steps: int, decay: float = 0.0) -> list[Pairs]:
    """The pairs after each step."""
    memory, seen = {name: value.double() for name, value in rule.start(pairs).items()}, []
    for step in range(steps):
        found = rule.direct(pairs, gradients(pairs), memory, Update(step, SCALE, RATE, decay))
        kept = 1 - RATE * decay
        pairs = Pairs(kept * pairs.B - RATE * found.B, kept * pairs.A - RATE * found.A)
        seen.append(pairs)
    return seen


def rescaling_run(pairs: Pairs, warmup: int, steps: int, decay: float = 0.0, eps: float = 1e-8) -> list[Tensor]:
    """B A after each step of torch's AdamW, before which A, B and all moments are rescaled in place."""
    A, B = nn.Parameter(pairs.A.clone()), nn.Parameter(pairs.B.clone())
    optimizer = torch.optim.AdamW([A, B], lr=RATE, weight_decay=decay, eps=eps)
    products = []
    for step in range(steps):
        if step >= warmup:
            with torch.no_grad():
                p = (B.norm() / A.norm()).sqrt()
                for parameter, c in ((A, p), (B, 1 / p)):
                    parameter.mul_(c)
                    if state := optimizer.state[parameter]:
                        state["exp_avg"].div_(c)
                        state["exp_avg_sq"].div_(c**2)
                torch.testing.assert_close(A.norm(), B.norm())
        g = gradients(Pairs(B.detach(), A.detach()))
        A.grad, B.grad = g.A, g.B
        optimizer.step()
        products.append(B.detach() @ A.detach())
    return products


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.quick
@pytest.mark.parametrize("warmup, decay, eps", [(0, 0.0, 1e-8), (5, 0.0, 1e-8), (5, 0.5, 0.1)])
def test_a_run_is_that_of_adamw_on_rescaled_pairs(warmup, decay, eps):
    found = run(START, RefLoRAS(warmup=warmup, eps=eps), 30, decay)
    for pairs, wanted in zip(found, rescaling_run(START, warmup, 30, decay, eps), strict=True):
        assert relative(pairs.product(), wanted) < 1e-12


@pytest.mark.quick
def test_it_is_adamw_with_two_rates():
    rule = RefLoRAS(warmup=0)
    found = rule.direct(START, gradients(START), {}, Update(0, SCALE, RATE, 0.0))
    p = float(START.B.norm() / START.A.norm()) ** 0.5
    torch.testing.assert_close(found.A.abs(), torch.full_like(found.A, 1 / p), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found.B.abs(), torch.full_like(found.B, p), rtol=1e-5, atol=0.0)
    assert p < 0.5  # while B is small, B is slowed down and A sped up: the opposite of LoRA+


@pytest.mark.quick
def test_during_the_warm_up_it_is_adamw():
    A, B = nn.Parameter(START.A.clone()), nn.Parameter(torch.zeros_like(START.B))
    optimizer = torch.optim.AdamW([A, B], lr=RATE, weight_decay=0.1)
    for pairs in run(Pairs(B.detach().clone(), START.A), RefLoRAS(), 20, decay=0.1):
        g = gradients(Pairs(B.detach(), A.detach()))
        A.grad, B.grad = g.A, g.B
        optimizer.step()
        assert relative(pairs.B, B.detach()) < 1e-12 and relative(pairs.A, A.detach()) < 1e-12


@pytest.mark.quick
@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_factor_of_zero_is_not_dead_even_without_a_warm_up(zero):
    """Rescaling for real would multiply A by 0 and divide B by 0."""
    factors = {"A": START.A, "B": START.B, zero: torch.zeros_like(getattr(START, zero))}
    first, *_, last = run(Pairs(**factors), RefLoRAS(warmup=0), 100)
    assert getattr(first, zero).abs().min() > 0.9 * RATE  # the first step of AdamW
    assert torch.equal(first.A, START.A) if zero == "B" else torch.equal(first.B, START.B)  # whose gradient is zero
    assert relative(SCALE * last.product(), TARGET) < 0.9


@pytest.mark.quick
def test_the_bytes_that_are_remembered_are_those_that_dry_run_shows():
    memory = RefLoRAS().start(START)
    assert sum(value.nbytes for value in memory.values()) == RefLoRAS().remembered(R, M, N)


@pytest.mark.quick
@pytest.mark.parametrize("setting, value", [("warmup", -1), ("beta1", 1.0), ("beta2", -0.1), ("eps", 0.0)])
def test_settings_that_cannot_be_meant_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"method.direction.{setting} must be"):
        RefLoRAS(**{setting: value})


@pytest.mark.quick
def test_a_method_that_exchanges_pairs_is_refused():
    with pytest.raises(ValueError, match="reflora_s remembers the pairs that it steps, and srlora exchanges them"):
        SRLoRA(rank=4, target_rank=8, direction=RefLoRAS())


def test_a_resumed_run_remembers(tmp_path: Path):
    method = LoRA(rank=3, alpha=6, target_modules=MODULES, direction=RefLoRAS(warmup=1))
    whole = Trainee(method, "plain")
    for step in range(4):
        if step == 2:
            found = whole.save(tmp_path, step)
        whole.step(step)
    resumed = Trainee(method, "plain", resume_from=found)
    for step in (2, 3):
        resumed.step(step)
    assert all(torch.equal(resumed.values()[name], value) for name, value in whole.values().items())
    for one, other in zip(whole.adapters, resumed.adapters, strict=True):
        assert one.memory.keys() == other.memory.keys()
        assert all(torch.equal(other.memory[name], value) for name, value in one.memory.items())
