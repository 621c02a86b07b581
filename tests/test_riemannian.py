"""Riemannian preconditioning against PEFT's optimizer step by step, and against equation 3 written naively."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.optimizers import create_riemannian_optimizer
from torch import Tensor

from llm_lowrank.adapters.direction import Update
from llm_lowrank.methods.directions.riemannian import Riemannian
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.pairs import Pairs
from tests.tiny import Trainee, batch, llama

MODULES = ["k_proj", "up_proj"]
RANK, ALPHA, RATE = 3, 6, 5e-3
NOW = Update(step=0, scale=2.0, rate=1e-2, weight_decay=0.0)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_each_gradient_is_divided_by_the_gram_matrix_of_the_other_factor():
    A, B, g_A, g_B = random(3, 20), random(30, 3, seed=1), random(3, 20, seed=2), random(30, 3, seed=3)
    found = Riemannian(damping=0.1).direct(Pairs(B, A), Pairs(g_B, g_A), {}, NOW)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found.A, torch.linalg.solve(B.T @ B + 0.1 * eye, g_A))
    torch.testing.assert_close(found.B, torch.linalg.solve(A @ A.T + 0.1 * eye, g_B.T).T)


def test_at_the_start_where_b_is_zero_the_damping_alone_divides():
    A, g_B = random(3, 20), random(30, 3, seed=3)
    found = Riemannian(damping=0.1).direct(Pairs(g_B * 0, A), Pairs(g_B, A * 0), {}, NOW)
    assert not found.A.any() and found.B.isfinite().all() and found.B.any()


def change(A: Tensor, B: Tensor, G: Tensor, damping: float) -> Tensor:
    """The change of B A in the first order of the rate."""
    found = Riemannian(damping=damping).direct(Pairs(B, A), Pairs(G @ A.T, B.T @ G), {}, NOW)
    return B @ found.A + found.B @ A


def test_without_damping_the_change_does_not_depend_on_the_factors_and_with_it_it_does():
    A, B, G = random(3, 20), random(30, 3, seed=1), random(30, 20, seed=2)
    P = torch.linalg.qr(random(3, 3, seed=5))[0] * torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    gaps = []
    for damping in (1e-13, 1e-2):
        one, other = change(A, B, G, damping), change(P @ A, B @ torch.linalg.inv(P), G, damping)
        gaps.append(float((one - other).norm() / one.norm()))
    assert gaps[0] <= 1e-6
    assert gaps[1] >= 1e-2, "the card says that the default depends on the factors"


def test_no_damping_is_refused():
    with pytest.raises(ValueError, match=r"method\.direction\.damping must be above 0, not 0"):
        Riemannian(damping=0.0)


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_a_few_steps_are_those_of_peft(optim):
    method = LoRA(rank=RANK, alpha=ALPHA, target_modules=MODULES, direction=Riemannian())
    t = Trainee(method, "plain", optimization={"optim": optim, "weight_decay": 0.1})
    model = peft.get_peft_model(
        llama("fp32"), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES, lora_dropout=0.0)
    )
    theirs = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in t.values().items():
            module, _, letter = name.rpartition(".")
            theirs[f"base_model.model.{module}.lora_{letter}.default.weight"].copy_(value)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optim]
    optimizer = create_riemannian_optimizer(model, kind, lr=RATE, weight_decay=0.1)
    model.train()
    for step in range(5):
        t.step(step, RATE)
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in t.values().items():
        module, _, letter = name.rpartition(".")
        wanted = theirs[f"base_model.model.{module}.lora_{letter}.default.weight"].detach()
        assert float((value - wanted).norm() / wanted.norm()) <= 1e-4, name
