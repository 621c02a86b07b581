"""The adapted layer: its start, its bank, and dropout, which touches the trainable pairs only."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llm_lowrank.adapters.adapter import PairAdapter, PairSettings, fill_
from llm_lowrank.codecs import Dense

pytestmark = pytest.mark.quick

M, N, R, K = 7, 10, 3, 2


def layer(bank: int = 0, dropout: float = 0.0, bias: bool = True) -> tuple[PairAdapter, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(N, M, bias=bias)
    adapter = PairAdapter("layer", linear, Dense(), PairSettings(R, 0.5, bank, dropout))
    fill_(adapter)
    return adapter, linear


def fill(adapter: PairAdapter) -> None:
    for p in adapter.factors():
        nn.init.normal_(p)


def test_at_the_start_it_is_the_frozen_layer_bitwise():
    adapter, linear = layer(bank=K)
    x = torch.randn(4, N)
    assert torch.equal(adapter(x), linear(x))
    assert adapter.A.abs().max() <= 1 / math.sqrt(N) and adapter.A.std() > 0.4 / math.sqrt(N) and not adapter.B.any()


@pytest.mark.parametrize("trains", ["A", "B", ""])
def test_a_factor_that_is_not_trained_keeps_its_value_and_has_no_gradient(trains):
    class Half(PairAdapter):
        pass

    Half.trains = trains
    linear = nn.Linear(N, M)
    adapter = Half("layer", linear, Dense(), PairSettings(R, 0.5))
    full, _ = layer()
    for one in (adapter, full):
        fill_(one)
        nn.init.normal_(one.B, generator=torch.Generator().manual_seed(1))
    full.weight.data, full.bias.data = adapter.weight.data, adapter.bias.data
    assert torch.equal(adapter.A, full.A), "a frozen factor starts as a trained one does"
    x = torch.randn(4, N, requires_grad=True)
    y = adapter(x)
    assert torch.equal(y, full(x))
    (y.square().sum() + full(x).square().sum()).backward()
    for name in "AB":
        frozen, trained = getattr(adapter, name), getattr(full, name)
        assert frozen.requires_grad == (name in trains)
        assert torch.equal(frozen.grad, trained.grad) if name in trains else frozen.grad is None


def test_trainable_are_a_and_b_alone():
    adapter, _ = layer(bank=K)
    assert {n for n, p in adapter.named_parameters() if p.requires_grad} == {"A", "B"}
    assert {n for n, p in adapter.named_parameters() if not p.requires_grad} == {"weight", "bias", "bank_A", "bank_B"}


def test_a_dense_w_is_read_as_it_is_stored():
    adapter, _ = layer()
    assert adapter.decode(*adapter.parts()) is adapter.weight  # no view: a small layer would wait for the operator


@pytest.mark.parametrize("bank", [0, K])
def test_forward_is_the_equation(bank):
    adapter, linear = layer(bank)
    fill(adapter)
    x = torch.randn(2, 5, N)
    w = linear.weight + 0.5 * sum(b @ a for a, b in zip(adapter.factors()[::2], adapter.factors()[1::2], strict=True))
    assert torch.allclose(adapter(x), F.linear(x, w, linear.bias), atol=1e-5)


@pytest.mark.parametrize("bank", [0, K])
def test_dropout_is_off_in_eval_and_spares_weight_and_bank(bank):
    adapter, _ = layer(bank, dropout=0.5)
    fill(adapter)
    x = torch.randn(3, N)
    plain, _ = layer(bank)
    plain.load_state_dict(adapter.state_dict())
    assert torch.equal(adapter.eval()(x), plain(x))
    adapter.train()
    frozen = plain(x) - 0.5 * x @ adapter.A.T @ adapter.B.T
    torch.manual_seed(3)
    y = adapter(x)
    torch.manual_seed(3)
    expected = frozen + 0.5 * F.dropout(x, 0.5) @ adapter.A.T @ adapter.B.T
    assert torch.allclose(y, expected, atol=1e-5)
    assert not torch.allclose(y, plain(x), atol=1e-2)


@pytest.mark.parametrize("bank", [0, K])
def test_dropout_gradients_are_those_of_the_equation(bank):
    adapter, _ = layer(bank, dropout=0.5)
    fill(adapter)
    x, g = torch.randn(3, N, requires_grad=True), torch.randn(3, M)
    torch.manual_seed(3)
    found = torch.autograd.grad(adapter.train()(x), (x, adapter.A, adapter.B), g)
    torch.manual_seed(3)
    w = adapter.weight + (0.5 * adapter.bank_B @ adapter.bank_A if bank else 0)
    y = F.linear(x, w, adapter.bias) + 0.5 * F.dropout(x, 0.5) @ adapter.A.T @ adapter.B.T
    expected = torch.autograd.grad(y, (x, adapter.A, adapter.B), g)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
