"""VeRA (https://arxiv.org/abs/2310.11454) against PEFT's VeraModel and its conversion to a LoRA."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.vera import VeRA, VeRALayer
from llm_lowrank.models.export import save_adapter
from tests import ranks
from tests.tiny import Trainee, batch, llama, resumed_in_nf4, trains_as_peft

MODULES = ["k_proj", "o_proj", "down_proj"]  # 14 x 42, 42 x 42 and 42 x 43: the pair has 43 columns and 42 rows
RANK, RATE, STEPS = 8, 3e-2, 4
METHOD = VeRA(rank=RANK, d_initial=0.4, target_modules=MODULES)
ENGINES = [("plain", 1), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]


def in_peft(seed: int = 0) -> peft.PeftModel:
    config = peft.VeraConfig(r=RANK, d_initial=0.4, projection_prng_key=seed, target_modules=MODULES)
    return peft.get_peft_model(llama(), config)


def layer_in_peft(model: peft.PeftModel, adapter: VeRALayer) -> nn.Module:
    return model.base_model.model.get_submodule(adapter.name)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_pair_is_bitwise_that_of_peft(seed):
    model = llama()
    attach(model, METHOD, Dense(torch.float32), seed)
    theirs = in_peft(seed).base_model
    for name, wanted in (("A", theirs.vera_A["default"]), ("B", theirs.vera_B["default"])):
        found = getattr(model.vera_pair, name)
        assert torch.equal(found, wanted) and not found.requires_grad, name


def test_it_trains_as_peft_does_step_for_step():
    t, theirs = Trainee(METHOD, "plain"), in_peft()
    trains_as_peft(t, theirs, STEPS, RATE)
    for adapter in t.adapters:
        layer = layer_in_peft(theirs, adapter)
        torch.testing.assert_close(adapter.b, layer.vera_lambda_b["default"], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(adapter.d, layer.vera_lambda_d["default"], rtol=1e-3, atol=1e-5)
        assert adapter.b.any() and not torch.allclose(adapter.d, torch.tensor(0.4))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_equation_and_its_gradients(dropout):
    method = VeRA(rank=RANK, dropout=dropout, target_modules=MODULES)
    model = llama()
    base = {name: p.detach().double() for name, p in model.named_parameters()}
    adapters = attach(model, method, Dense(torch.float32))
    for adapter in adapters:
        (m, n), pair = adapter.shape, model.vera_pair
        adapter.b.data.normal_(), adapter.d.data.normal_()
        A, B = pair.A[:, :n].double(), pair.B[:m].double()
        x = torch.randn(3, n, dtype=torch.float64, requires_grad=True)
        b, d = (p.detach().double().requires_grad_() for p in (adapter.b, adapter.d))
        torch.manual_seed(1)
        dropped = nn.functional.dropout(x, dropout)
        wanted = x @ base[f"{adapter.name}.weight"].T + b * ((d * (dropped @ A.T)) @ B.T)
        torch.manual_seed(1)
        found = adapter.train()(x)
        torch.testing.assert_close(found, wanted)
        g = torch.linspace(-1, 2, found.numel(), dtype=torch.float64).view(found.shape)
        dx, db, dd = torch.autograd.grad(wanted, (x, b, d), g)
        mine = torch.autograd.grad(found, (x, adapter.b, adapter.d), g)
        for ours, theirs in zip(mine, (dx, db.float(), dd.float()), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_r_and_m_numbers_a_module_are_trained():
    t = Trainee(METHOD, "plain")
    trained = {name: tuple(p.shape) for name, p in t.model.named_parameters() if p.requires_grad}
    assert trained == {f"{a.name}.{k}": size for a in t.adapters for k, size in (("d", (RANK,)), ("b", a.shape[:1]))}
    assert {tuple(p.shape) for p in t.model.vera_pair.parameters()} == {(RANK, 43), (42, RANK)}


def test_neither_the_input_nor_anything_of_its_size_is_kept():
    linear = nn.Linear(60, 50)
    parent = nn.Module()
    parent.layer = linear
    (adapter,) = attach(parent, VeRA(rank=RANK, target_modules=["layer"]), Dense(torch.float32))
    own = {p.untyped_storage().data_ptr() for p in parent.parameters()}
    kept: list[Tensor] = []
    x = torch.randn(9, 60, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(x)
    assert {tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in own} == {(9, RANK)}


@pytest.mark.parametrize("engine, world", ENGINES[1:])
def test_the_pair_is_bitwise_what_it_was_after_a_resume_elsewhere(engine, world, tmp_path):
    first = ranks.run(world, resumed_in_nf4, METHOD, engine, str(tmp_path), False)[0]
    second = ranks.run(1, resumed_in_nf4, METHOD, "plain", str(tmp_path), True)[0]
    assert {"vera_pair.A", "vera_pair.B"} <= first[0].keys()
    for name, value in first[0].items():
        found = [first[1][name], second[0][name], second[1][name]]
        if name.startswith("vera_pair"):
            assert all(torch.equal(value, other) for other in found), name
        else:
            assert torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2]), name


def test_the_exported_lora_is_what_peft_converts_its_vera_to(tmp_path):
    t, theirs = Trainee(METHOD, "plain"), in_peft()
    for step in range(2):
        t.step(step, RATE)
    for adapter in t.adapters:
        layer = layer_in_peft(theirs, adapter)
        layer.vera_lambda_b["default"].data.copy_(adapter.b)
        layer.vera_lambda_d["default"].data.copy_(adapter.d)
    save_adapter(t.engine, t.adapters, method=METHOD, path=tmp_path, base_model_name_or_path="base")
    found = load_file(tmp_path / "adapter_model.safetensors")
    _, converted = peft.convert_to_lora(theirs, rank=RANK)
    for adapter in t.adapters:
        name = f"base_model.model.{adapter.name}"
        ours, wanted = (s[f"{name}.lora_B.weight"] @ s[f"{name}.lora_A.weight"] for s in (found, converted))
        assert len(found[f"{name}.lora_A.weight"]) == RANK
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(input_ids=batch(99)).logits, t.logits(), rtol=0, atol=1e-4)
        through = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
        torch.testing.assert_close(through(input_ids=batch(99)).logits, t.logits(), rtol=0, atol=1e-4)


def test_settings_that_train_nothing_are_refused():
    with pytest.raises(ValueError, match=r"method\.d_initial must be a number other than 0, not 0"):
        VeRA(d_initial=0.0)
    with pytest.raises(
        ValueError, match=r"method\.rank must be at least 1, not 0\nmethod\.dropout must be in \[0, 1\)"
    ):
        VeRA(rank=0, dropout=1.0)
