"""LoRA-Pro (https://arxiv.org/abs/2407.18242) against the least squares problem that it solves, written densely."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Direction, Update
from llm_lowrank.methods.directions.lora_pro import LoRAPro
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.pairs import Pairs
from tests.tiny import Trainee

M, N, R, SCALE = 9, 7, 3, 1.5
RULE = LoRAPro(warmup=0, damping=1e-15)  # without warm-up and nearly without damping, as the equations are


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS, G = Pairs(random(M, R, seed=0), random(R, N, seed=1)), random(M, N, seed=2)


def gradients(pairs: Pairs, scale: float = SCALE, of: Tensor = G) -> Pairs:
    return Pairs(scale * of @ pairs.A.T, scale * pairs.B.T @ of)


def directed(pairs: Pairs, scale: float = SCALE, rule: LoRAPro = RULE, step: int = 0) -> Pairs:
    return rule.direct(pairs, gradients(pairs, scale), {}, Update(step, scale, 1e-3, 0.0))


def equivalent(pairs: Pairs, found: Pairs, scale: float = SCALE) -> Tensor:
    """The change of W per rate, to first order: (m, n)."""
    return scale * (pairs.B @ found.A + found.B @ pairs.A)


def projected(pairs: Pairs) -> Tensor:
    """P_B G + (I - P_B) G P_A."""
    of_B, of_A = pairs.B @ torch.linalg.pinv(pairs.B), torch.linalg.pinv(pairs.A) @ pairs.A
    return of_B @ G + (G - of_B @ G) @ of_A


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.quick
def test_the_change_of_w_is_the_projection_of_the_full_gradient():
    found = equivalent(PAIRS, directed(PAIRS))
    assert relative(found, projected(PAIRS)) < 1e-10
    assert float((found * G).sum()) == pytest.approx(float(found.square().sum()))  # it lowers the loss


@pytest.mark.quick
def test_no_other_directions_change_w_more_like_the_full_gradient():
    columns = []
    for a_or_b in torch.eye(R * N + M * R, dtype=torch.float64):
        step = Pairs(a_or_b[R * N :].view(M, R), a_or_b[: R * N].view(R, N))
        columns.append(equivalent(PAIRS, step).flatten())
    map_of_both = torch.stack(columns, 1)  # (m n, r n + m r), of rank r (m + n - r)
    best = map_of_both @ torch.linalg.lstsq(map_of_both, G.flatten()[:, None], driver="gelsd").solution
    assert relative(equivalent(PAIRS, directed(PAIRS)).flatten(), best[:, 0]) < 1e-10


@pytest.mark.quick
def test_of_all_such_directions_it_is_nearest_to_the_gradients():
    """The free (r, r) matrix by dense least squares over |a - g_A|^2 + |b - g_B|^2, and the Sylvester equation."""
    g, found = gradients(PAIRS), directed(PAIRS)
    B, A = PAIRS.B, PAIRS.A
    a = torch.linalg.inv(B.T @ B) @ g.A / SCALE**2
    b = (g.B - B @ torch.linalg.pinv(B) @ g.B) @ torch.linalg.inv(A @ A.T) / SCALE**2
    units = torch.eye(R * R, dtype=torch.float64).view(-1, R, R)
    columns = torch.stack([torch.cat([(X @ A).flatten(), (-B @ X).flatten()]) for X in units], 1)
    missing = torch.cat([(g.A - a).flatten(), (g.B - b).flatten()])
    X = torch.linalg.lstsq(columns, missing[:, None]).solution.view(R, R)
    assert relative(found.A, a + X @ A) < 1e-9
    assert relative(found.B, b - B @ X) < 1e-9
    X = (found.A - a) @ torch.linalg.pinv(A)
    assert relative(B.T @ B @ X + X @ A @ A.T, -torch.linalg.inv(B.T @ B) @ g.A @ A.T / SCALE**2) < 1e-9


@pytest.mark.quick
def test_the_change_of_w_does_not_depend_on_the_factorization_nor_on_the_scale():
    P = torch.diag(torch.logspace(-1, 1, R, dtype=torch.float64)) @ torch.linalg.qr(random(R, R, seed=3))[0]
    other = Pairs(PAIRS.B @ torch.linalg.inv(P), P @ PAIRS.A)  # the condition number is 100
    wanted = equivalent(PAIRS, directed(PAIRS))
    assert relative(equivalent(other, directed(other)), wanted) < 1e-6
    # the official code has s = 2 built in: with rsLoRA at rank 8 its step would be (5.66 / 2)^2 times too long
    for scale in (0.25, 16 / 8**0.5):
        assert relative(equivalent(PAIRS, directed(PAIRS, scale), scale), wanted) < 1e-9


@pytest.mark.quick
def test_rank_1_by_hand():
    pairs = PAIRS.take(slice(1))
    b, a = pairs.B, pairs.A
    bb, aa = float(b.square().sum()), float(a.square().sum())
    g = gradients(pairs)
    x = -float(g.A @ a.T) / (SCALE**2 * bb * (bb + aa))
    along = b @ (b.T @ g.B) / bb
    found = directed(pairs)
    torch.testing.assert_close(found.A, g.A / (SCALE**2 * bb) + x * a)
    torch.testing.assert_close(found.B, (g.B - along) / (SCALE**2 * aa) - x * b)


@pytest.mark.quick
def test_at_b_of_zero_b_takes_the_projection_and_a_stands_still():
    pairs = Pairs(torch.zeros_like(PAIRS.B), PAIRS.A)
    found = directed(pairs)
    assert not found.A.any()
    assert relative(found.B, G @ torch.linalg.pinv(PAIRS.A) / SCALE) < 1e-9
    assert relative(equivalent(pairs, found), projected(pairs)) < 1e-9


@pytest.mark.quick
@pytest.mark.parametrize("rule", [RULE, LoRAPro(warmup=0)], ids=["undamped", "damped"])
def test_factors_of_a_lower_rank_break_nothing(rule):
    pairs = Pairs(PAIRS.B.clone(), PAIRS.A.clone())
    pairs.B[:, 2] = pairs.B[:, 1]
    pairs.A[0] = 0
    found = directed(pairs, rule=rule)
    assert relative(equivalent(pairs, found), projected(pairs)) < 1e-5
    assert max(float(found.A.abs().max()), float(found.B.abs().max())) < 100


@pytest.mark.quick
def test_damping_is_relative():
    """Whatever the sizes of A and B are, the change of W is the same."""
    damped = LoRAPro(warmup=0, damping=0.1)
    wanted = equivalent(PAIRS, directed(PAIRS, rule=damped))
    small = Pairs(1e-6 * PAIRS.B, 1e6 * PAIRS.A)
    assert relative(wanted, projected(PAIRS)) > 1e-2
    assert relative(equivalent(small, directed(small, rule=damped)), wanted) < 1e-9


def follow(rule: Direction | None, steps: int = 120) -> tuple[list[float], list[float]]:
    """How much longer than the gradient A's direction is, and by which share of the rate AdamW moves A, at each step.

    From B = 0, for |s B A - T + noise|^2 / 2.
    """
    rate, length = 1e-3, 40
    T = random(length, R, seed=4) @ random(R, length, seed=5) / 8
    A = torch.nn.Parameter(random(R, length, seed=6) / length**0.5)
    B = torch.nn.Parameter(torch.zeros(length, R, dtype=torch.float64))
    optimizer = torch.optim.AdamW([A, B], lr=rate, weight_decay=0.0)
    ratios, moves = [], []
    for step in range(steps):
        pairs = Pairs(B.detach(), A.detach())
        g = gradients(pairs, of=SCALE * pairs.product() - T + 0.5 * random(length, length, seed=100 + step))
        found = g if rule is None else rule.direct(pairs, g, {}, Update(step, SCALE, rate, 0.0))
        A.grad, B.grad = found.A.clone(), found.B.clone()
        before = A.detach().clone()
        optimizer.step()
        ratios.append(float(found.A.norm() / g.A.norm()) if g.A.any() else 0.0)
        moves.append(float((A.detach() - before).abs().mean()) / rate)
    return ratios, moves


@pytest.mark.quick
def test_the_warm_up_keeps_spikes_out_of_the_optimizer():
    """Without it the first directions after B = 0 are so long that AdamW hardly moves A for the rest of the run."""
    at_once, waited, lora = follow(LoRAPro(warmup=0)), follow(LoRAPro()), follow(None)
    assert max(at_once[0]) > 1000  # measured 11,000
    assert max(waited[0]) < 20  # measured 15
    assert waited[0][:100] == lora[0][:100]
    assert sum(at_once[1][100:]) < 0.3 * sum(lora[1][100:])  # measured 0.20
    assert sum(waited[1][100:]) > 0.7 * sum(lora[1][100:])  # measured 0.96


@pytest.mark.quick
@pytest.mark.parametrize("setting, value", [("warmup", -1), ("damping", 0.0)])
def test_settings_that_cannot_be_meant_are_refused(setting, value):
    with pytest.raises(ValueError, match=f"method.direction.{setting} must be"):
        LoRAPro(**{setting: value})


def test_a_resumed_run_is_past_its_warm_up(tmp_path: Path):
    method = LoRA(rank=3, alpha=6, target_modules=["k_proj"], direction=LoRAPro(warmup=2))
    whole = Trainee(method, "plain")
    for step in range(4):
        if step == 3:
            found = whole.save(tmp_path, step)
        whole.step(step)
    resumed = Trainee(method, "plain", resume_from=found)
    resumed.step(3)
    assert all(torch.equal(resumed.values()[name], value) for name, value in whole.values().items())
    assert all(torch.equal(resumed.moments()[name], value) for name, value in whole.moments().items())
