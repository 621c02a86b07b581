"""SBoRA (https://arxiv.org/abs/2407.05413) against sums into chosen columns and rows; W outside of these stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairAdapter
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.sbora import SBoRA
from llm_lowrank.models import checkpoint
from llm_lowrank.models.export import save_adapter
from tests import ranks
from tests.tiny import Trainee

MODULES = ["k_proj", "down_proj"]  # 14 x 42 and 42 x 43
RANK, ALPHA, STEPS = 4, 6.0, 2
VARIANTS = ["fa", "fb"]


def method(variant: str, **changes: object) -> SBoRA:
    return SBoRA(rank=RANK, alpha=ALPHA, variant=variant, target_modules=MODULES, **changes)


def chosen(values: dict[str, Tensor], name: str, variant: str) -> Tensor:
    """J, from the frozen factor, which is checked to be rows or columns of the identity."""
    basis = values[f"{name}.A"] if variant == "fa" else values[f"{name}.B"].T
    found = basis.argmax(1)
    assert torch.equal(basis, torch.eye(basis.shape[1])[found]) and len(found.unique()) == RANK
    return found


@pytest.mark.quick
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_are_those_of_sums_at_chosen_places(variant, dropout):
    torch.manual_seed(2)
    linear, s = nn.Linear(10, 7).double(), ALPHA / RANK
    W, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = method(variant, dropout=dropout).build("layer", linear, Dense(torch.float64), 0)
    assert isinstance(layer, PairAdapter)
    for name, value in layer.initial().items():
        getattr(layer, name).data = value.double()
    J = (layer.A if variant == "fa" else layer.B.T).argmax(1)
    factor = layer.B if variant == "fa" else layer.A
    assert not factor.any()
    factor.data = torch.randn(factor.shape, dtype=torch.float64)
    mine = torch.randn(5, 10, dtype=torch.float64, requires_grad=True)
    x, trained = mine.detach().clone().requires_grad_(), factor.detach().clone().requires_grad_()
    torch.manual_seed(3)
    read = nn.functional.dropout(x, dropout)
    base = x @ W.T + bias
    wanted = base + s * read[:, J] @ trained.T if variant == "fa" else base.index_add(1, J, s * read @ trained.T)
    torch.manual_seed(3)
    y = layer.train()(mine)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    wanted.backward(g)
    torch.testing.assert_close(mine.grad, x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factor.grad, trained.grad, rtol=1e-12, atol=1e-12)
    assert sum(p.grad is not None for p in layer.parameters()) == 1


Seen = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def run(variant: str, engine: str, folder: str, resume: bool) -> Seen:
    """The parameters at the start and after steps, and what is added to W; saved, or resumed."""
    t = Trainee(method(variant), engine, resume_from=checkpoint.newest(Path(folder))[0] if resume else None)
    before = t.values()
    for step in range(STEPS):
        t.step(step + STEPS * resume)
    if not resume:
        t.save(Path(folder), STEPS)
    changes = {a.name: a.change(t.engine.whole) for a in t.adapters}
    return before, t.values(), {name: (pairs.B @ pairs.A).cpu() for name, pairs in changes.items()}


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero2", 2), ("zero3", 3), ("fsdp", 2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_changes_outside_of_what_was_chosen_which_every_rank_and_a_resume_agree_on(
    variant, engine, world, tmp_path
):
    wanted = Trainee(method(variant), "plain").values()
    seen = [*ranks.run(world, run, variant, engine, str(tmp_path), False)]
    seen += ranks.run(1, run, variant, "plain", str(tmp_path), True)
    for before, after, changes in seen:
        for name, change in changes.items():
            J = chosen(wanted, name, variant)
            assert all(torch.equal(chosen(values, name, variant), J) for values in (before, after))
            outside = torch.ones(change.shape[1 if variant == "fa" else 0], dtype=torch.bool)
            outside[J] = False
            here, there = (change[:, at] if variant == "fa" else change[at] for at in (J, outside))
            assert not there.any() and here.all(), name


def test_modules_choose_differently_and_by_the_seed():
    linear, places = nn.Linear(40, 40), []
    for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1)):
        layer = SBoRA(rank=8).build(name, linear, Dense(torch.float32), seed)
        places.append(layer.initial()["A"].argmax(1).tolist())
    assert places[0] == places[1] and places[0] != places[2] and places[0] != places[3]


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_factor_is_trained_and_the_export_is_as_trained(variant, tmp_path):
    t = Trainee(method(variant), "plain")
    names = {f"{a.name}.{'B' if variant == 'fa' else 'A'}" for a in t.adapters}
    assert {name for name, p in t.model.named_parameters() if p.requires_grad} == names
    t.step(0)
    save_adapter(t.engine, t.adapters, method=t.method, path=tmp_path, base_model_name_or_path="base")
    found = load_file(tmp_path / "adapter_model.safetensors")
    for a in t.adapters:
        assert torch.equal(found[f"base_model.model.{a.name}.lora_A.weight"], a.A)
        assert torch.equal(found[f"base_model.model.{a.name}.lora_B.weight"], a.B)


@pytest.mark.quick
@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_that_need_both_factors_are_refused(variant):
    with pytest.raises(ValueError, match="b_rate is the rate of B beside that of A, and sbora does not train both"):
        Trainee(method(variant, b_rate=4.0), "plain")
