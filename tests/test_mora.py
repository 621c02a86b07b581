"""MoRA with sharing (https://arxiv.org/abs/2405.12130 eq. 6) against its equation, written again with loops."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.mora import MoRA, SquareAdapter, copies, sums, sums_matrix
from llm_lowrank.models.export import save_adapter
from tests.tiny import Trainee, batch, llama, trains_as_peft

MODULES = ["k_proj", "o_proj", "down_proj"]  # 14 x 42, 42 x 42 and 42 x 43, with M of 14, 18 and 18 rows
METHOD = MoRA(rank=4, target_modules=MODULES)


def update(M: Tensor, m: int, n: int) -> Tensor:
    """dW, entry by entry: x goes on with its first entries up to a multiple of q."""
    q, dW = len(M), torch.zeros(m, n, dtype=M.dtype)
    for i in range(m):
        for j in range(-(-n // q) * q):
            dW[i, j % n] += M[i % q, j % q]
    return dW


@pytest.mark.quick
@pytest.mark.parametrize("q", [1, 3, 4, 5, 7])  # of 12 inputs and 7 outputs: divisors of both, of one, of neither
def test_the_equation_and_its_gradients(q):
    m, n = 7, 12
    torch.manual_seed(q)
    linear = nn.Linear(n, m).double()
    layer = SquareAdapter("layer", linear, Dense(torch.float64), side=q, dropout=0.0, seed=0).double()
    layer.M.data.normal_()
    M, x = layer.M.detach().clone().requires_grad_(), torch.randn(2, 5, n, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(dense(M, m, n), update(M, m, n))
    wanted = x @ (linear.weight.detach() + update(M, m, n)).T + linear.bias.detach()
    found = layer(x)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, layer.M), g), torch.autograd.grad(wanted, (x, M), g), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    change = layer.change(lambda p: p.detach())
    torch.testing.assert_close(change.product(), update(M.detach(), m, n), rtol=1e-12, atol=1e-12)
    assert len(change) == q >= torch.linalg.matrix_rank(change.product())
    assert torch.equal(sums(torch.eye(n), q), sums_matrix(n, q).T)
    assert torch.equal(copies(torch.arange(q), m), torch.arange(m) % q)


class Sharing(nn.Module):
    """W + dW, as a parametrization of a plain linear."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.M = nn.Parameter(torch.zeros(side, side))

    def forward(self, W: Tensor) -> Tensor:
        return W + dense(self.M, *W.shape)


def dense(M: Tensor, m: int, n: int) -> Tensor:
    """The same dW without loops, for autograd: M is laid side by side, and what sticks out goes to the front."""
    q = len(M)
    tiles = M.repeat(-(-m // q), -(-n // q))[:m]
    return tiles[:, :n] + nn.functional.pad(tiles[:, n:], (0, 2 * n - tiles.shape[1]))


def test_it_trains_as_a_dense_update_does_and_is_exported_as_one(tmp_path):
    t, theirs = Trainee(METHOD, "plain"), llama().requires_grad_(False)
    for adapter in t.adapters:
        module = theirs.get_submodule(adapter.name)
        parametrize.register_parametrization(module, "weight", Sharing(adapter.side))
    trains_as_peft(t, theirs, 3, 1e-2)
    save_adapter(t.engine, t.adapters, method=METHOD, path=tmp_path, base_model_name_or_path="base")
    found = load_file(tmp_path / "adapter_model.safetensors")
    for adapter in t.adapters:
        M = theirs.get_submodule(adapter.name).parametrizations.weight[0].M
        torch.testing.assert_close(adapter.M, M, rtol=1e-3, atol=1e-5)
        a, b = (found[f"base_model.model.{adapter.name}.lora_{letter}.weight"] for letter in "AB")
        assert adapter.M.any() and len(a) == max(each.side for each in t.adapters)
        torch.testing.assert_close(b @ a, update(adapter.M.detach(), *adapter.shape), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(input_ids=batch(99)).logits, t.logits(), rtol=0, atol=1e-4)


def test_about_as_many_numbers_are_trained_as_by_lora():
    t = Trainee(MoRA(rank=4, rank_pattern={"down_proj": 2}, target_modules=MODULES), "plain")
    trained = {name: tuple(p.shape) for name, p in t.model.named_parameters() if p.requires_grad}
    assert set(trained) == {f"{a.name}.M" for a in t.adapters}
    # sqrt(4 (14 + 42)) = 15 rows and columns of M have no room beside a 14 x 42 weight
    sides = {"k_proj": 14, "o_proj": 18, "down_proj": 13}
    assert all(
        a.side == sides[a.name.rpartition(".")[2]] and trained[f"{a.name}.M"] == 2 * (a.side,) for a in t.adapters
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_the_input_nor_a_cast_copy_of_a_parameter_is_kept(dtype):
    parent = nn.Module()
    parent.layer = nn.Linear(60, 50).to(dtype)
    (adapter,) = attach(parent, MoRA(rank=1, target_modules=["layer"]), Dense(dtype))
    own = {p.untyped_storage().data_ptr() for p in parent.parameters()}
    kept: list[Tensor] = []
    x = torch.randn(9, 60, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(x)
    assert {tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own} == {(9, adapter.side)}


def test_dropout_is_for_what_m_reads():
    torch.manual_seed(0)
    linear = nn.Linear(12, 7)
    layer = SquareAdapter("layer", linear, Dense(torch.float32), side=3, dropout=0.5, seed=0)
    layer.M.data.normal_()
    x = torch.randn(4, 12)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), linear(x) + dropped @ update(layer.M.detach(), 7, 12).T)
    torch.testing.assert_close(layer.eval()(x), linear(x) + x @ update(layer.M.detach(), 7, 12).T)


def test_settings_of_lora_that_it_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"method\.alpha cannot be used with mora.*\nmethod\.b_rate is the rate"):
        MoRA(alpha=16.0, b_rate=2.0)
    with pytest.raises(ValueError, match=r"method\.use_rslora cannot be used with mora"):
        MoRA(use_rslora=True)
    with pytest.raises(ValueError, match=r"rank 15 is more than min\(m, n\) = 14"):
        attach(llama(), MoRA(rank=15), Dense(torch.float32))
