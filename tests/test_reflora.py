"""RefLoRA against theorem 3 written naively, and the faults of its official code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_lowrank.adapters.direction import Update
from llm_lowrank.methods.directions.reflora import RefLoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.numerics.pairs import Pairs
from tests.tiny import Trainee

pytestmark = pytest.mark.quick

M, N, R = 30, 20, 4
LATE = Update(step=100, scale=2.0, rate=1e-2, weight_decay=0.0)
RULE = RefLoRA()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer() -> tuple[Tensor, Tensor, Tensor]:
    """A, B, and G = dL/dW with s = 1."""
    return random(R, N), random(M, R, seed=1), random(M, N, seed=2)


def root(matrix: Tensor) -> Tensor:
    """The positive square root, from a general eigenvector basis."""
    values, vectors = torch.linalg.eig(matrix)
    return ((vectors * values.sqrt()) @ torch.linalg.inv(vectors)).real


def balanced_step(A: Tensor, B: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the balanced factors P^T A and B P^-T, brought back to A and B; S = P P^T by Cholesky."""
    inverse = torch.linalg.inv(A @ A.T)
    S = inverse @ root((A @ A.T) @ (B.T @ B))  # the geometric mean of (A A^T)^-1 and B^T B
    P = torch.linalg.cholesky((S + S.T) / 2)
    A2, B2 = P.T @ A, B @ torch.linalg.inv(P).T
    torch.testing.assert_close(A2 @ A2.T, B2.T @ B2)  # this is what balanced means
    return torch.linalg.inv(P).T @ (B2.T @ G), (G @ A2.T) @ P.T


def test_the_step_is_the_one_of_the_balanced_factors(layer):
    A, B, G = layer
    found = RULE.direct(Pairs(B, A), Pairs(G @ A.T, B.T @ G), {}, LATE)
    g_A, g_B = balanced_step(A, B, G)
    torch.testing.assert_close(found.A, g_A)
    torch.testing.assert_close(found.B, g_B)


def test_the_change_of_the_product_does_not_depend_on_the_factors(layer):
    A, B, G = layer
    P = torch.linalg.qr(random(R, R, seed=5))[0] * torch.logspace(0, 2, R, dtype=torch.float64)
    changes = []
    for a, b in ((A, B), (P @ A, B @ torch.linalg.inv(P))):
        found = RULE.direct(Pairs(b, a), Pairs(G @ a.T, b.T @ G), {}, LATE)
        changes.append(b @ found.A + found.B @ a)
    assert float((changes[0] - changes[1]).norm() / changes[0].norm()) <= 1e-8


def test_with_one_pair_the_step_is_scaled_by_the_ratio_of_the_lengths():
    A, B, G = random(1, N), random(M, 1, seed=1), random(M, N, seed=2)
    found = RULE.direct(Pairs(B, A), Pairs(G @ A.T, B.T @ G), {}, LATE)
    ratio = B.norm() / A.norm()
    torch.testing.assert_close(found.A, (B.T @ G) / ratio)
    torch.testing.assert_close(found.B, (G @ A.T) * ratio)


# --- where the official code goes wrong -------------------------------------------------------------------------------


def test_the_warm_up_takes_the_gradients_themselves(layer):
    A, B, G = layer
    gradients = Pairs(G @ A.T, B.T @ G)
    early = Update(step=99, scale=2.0, rate=1e-2, weight_decay=0.0)
    assert RULE.direct(Pairs(B, A), gradients, {}, early) is gradients
    assert RULE.direct(Pairs(B, A), gradients, {}, LATE) is not gradients


@pytest.mark.parametrize("lacking", ["B is zero", "B has rank 1", "A has rank 1"])
def test_factors_without_a_balance_are_stepped_along_their_gradients(layer, lacking):
    """From B = 0 g_B S is zero forever, and eigenvalues below zero, by rounding, have no root."""
    A, B, G = layer
    if lacking == "A has rank 1":
        A = A[:1].repeat(R, 1)
    else:
        B = B[:, :1].repeat(1, R) if lacking == "B has rank 1" else 0 * B
    gradients = Pairs(G @ A.T, B.T @ G)
    found = RULE.direct(Pairs(B, A), gradients, {}, LATE)
    assert torch.equal(found.A, gradients.A) and torch.equal(found.B, gradients.B)


def test_b_leaves_zero_without_a_warm_up_too():
    t = Trainee(LoRA(rank=3, direction=RefLoRA(warmup=0)), "plain")
    for step in range(3):
        t.step(step)
    lengths = {name: float(value.norm()) for name, value in t.values().items() if name.endswith(".B")}
    assert all(length > 0 for length in lengths.values()), lengths


def test_pissa_starts_balanced_so_that_the_first_step_is_that_of_its_gradients():
    found = []
    for rule in (RefLoRA(warmup=0), None):
        settings = {} if rule is None else {"direction": rule}
        t = Trainee(PiSSA(rank=3, svd_cache="", **settings), "plain", optimization={"optim": "sgd"})
        t.step(0)
        found.append(t.values())
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-6)


def test_a_warm_up_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"method\.direction\.warmup must be at least 0, not -1"):
        RefLoRA(warmup=-1)
