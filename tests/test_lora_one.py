"""LoRA-One (https://arxiv.org/abs/2502.01235): its start against the SVD of the dense gradient.

What it shares with LoRA-GA is in test_lora_ga.py.
"""

from __future__ import annotations

import pytest
import torch

from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.lora_one import LoRAOne
from tests.test_lora_ga import METHODS, SAMPLES, R, cosines, started, svd
from tests.tiny import CALIBRATION, Trainee


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
def test_the_start_is_the_papers_by_the_svd_of_the_dense_gradient(dtype):
    """s B A = -s / gamma U_r diag(S_r / S_1) V_r^T, and the factors have equal lengths."""
    t = started(METHODS["lora_one"], dtype)
    for adapter, (u, s, v) in zip(t.adapters, svd(t).values(), strict=True):
        a, b = adapter.A.detach().double(), adapter.B.detach().double()
        wanted = -(u[:, :R] * (s[:R] / s[0]) @ v[:, :R].T) / 128
        assert (b @ a - wanted).norm() <= 1e-3 * wanted.norm(), adapter.name
        assert torch.allclose(a @ a.T, b.T @ b, atol=1e-7), "balanced"
        assert cosines(a.T, v[:, :R]).min() > 0.9999 and cosines(b, u[:, :R]).min() > 0.9999


def test_the_start_is_a_step_down_the_loss_of_the_samples():
    t = started(METHODS["lora_one"])
    before = Trainee(LoRA(rank=R), "plain", samples=SAMPLES, num_hidden_layers=1).forward_backward(CALIBRATION)
    assert 0.8 * before < t.forward_backward(CALIBRATION) < before


def test_a_smaller_step_is_to_first_order_what_the_gradient_says():
    """The loss falls by <G, s B A> = -s / gamma sum_k S_k^2 / S_1."""
    t = started(LoRAOne(rank=R, samples=SAMPLES, svd_niter=6, gamma=1e5))
    lora = Trainee(LoRA(rank=R), "plain", samples=SAMPLES, num_hidden_layers=1)
    fall = sum(float((s[:R] ** 2).sum() / s[0]) for _, s, _ in svd(lora).values()) * t.method.scale / 1e5
    t.model.double(), lora.model.double()
    assert lora.forward_backward(CALIBRATION) - t.forward_backward(CALIBRATION) == pytest.approx(fall, rel=0.02)
