"""MiSS (https://arxiv.org/abs/2409.15371) against its equation, PEFT's MissModel and its conversion to a LoRA."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llm_lowrank.adapters.adapter import PairSettings
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.miss import MiSS, ShardAdapter
from llm_lowrank.models.export import save_adapter
from tests.tiny import Trainee, batch, llama, trains_as_peft

MODULES = ["k_proj", "o_proj", "down_proj"]  # 14 x 42, 42 x 42 and 42 x 43
RATE, STEPS = 1e-2, 4


def in_peft(rank: int) -> peft.PeftModel:
    return peft.get_peft_model(llama(), peft.MissConfig(r=rank, target_modules=MODULES))


@pytest.mark.quick
@pytest.mark.parametrize("rank", [1, 3, 4, 5, 7])  # 12 entries: in whole blocks, and with a rest
def test_it_is_pefts_miss_in_value_and_gradients(rank):
    m, n = 7, 12
    torch.manual_seed(rank)
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(n, m).double()), peft.MissConfig(r=rank, target_modules=["0"])
    ).base_model.model[0]
    linear = nn.Linear(n, m).double()
    linear.load_state_dict(theirs.base_layer.state_dict())
    ours = ShardAdapter("layer", linear, Dense(torch.float64), PairSettings(rank=rank, scale=1.0)).double()
    for name, value in ours.initial().items():
        getattr(ours, name).data = value.double()
    D = torch.randn(m, rank, dtype=torch.float64)
    ours.B.data, theirs.miss_block["default"].data = D.clone(), D.T.clone()
    x = torch.randn(2, 5, n, dtype=torch.float64)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = ours(mine), theirs(other)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    y.backward(g)
    wanted.backward(g)
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.B.grad, theirs.miss_block["default"].grad.T, rtol=1e-12, atol=1e-12)
    assert ours.A.grad is None
    change = ours.change(lambda p: p.detach())
    assert torch.equal(change.B @ change.A, torch.stack([D[:, j % rank] for j in range(n)], dim=1))


@pytest.mark.parametrize("rank", [4, 6])  # of 42 columns: with a rest, and in whole blocks
def test_it_trains_as_peft_does_and_is_exported_as_peft_converts_it(rank, tmp_path):
    method = MiSS(rank=rank, target_modules=MODULES)
    t, theirs = Trainee(method, "plain"), in_peft(rank)
    trains_as_peft(t, theirs, STEPS, RATE)
    for adapter in t.adapters:  # from here on the same D, not one that is near
        shard = theirs.base_model.model.get_submodule(adapter.name).miss_block["default"]
        torch.testing.assert_close(adapter.B, shard.T, rtol=1e-3, atol=1e-4)
        shard.data.copy_(adapter.B.T)

    save_adapter(t.engine, t.adapters, method=method, path=tmp_path, base_model_name_or_path="base")
    found = load_file(tmp_path / "adapter_model.safetensors")
    _, converted = peft.convert_to_lora(theirs, rank=rank)
    for adapter in t.adapters:
        name = f"base_model.model.{adapter.name}"
        assert torch.equal(found[f"{name}.lora_A.weight"], adapter.A)
        assert torch.equal(found[f"{name}.lora_B.weight"], adapter.B)
        ours, wanted = (s[f"{name}.lora_B.weight"] @ s[f"{name}.lora_A.weight"] for s in (found, converted))
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5)
    through = peft.PeftModel.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        answers = [model.eval()(input_ids=batch(99)).logits for model in (theirs, through)]
    for logits in answers:
        torch.testing.assert_close(logits, t.logits(), rtol=0, atol=1e-4)


def test_the_shards_alone_are_trained_and_start_at_zero():
    t = Trainee(MiSS(rank=4, target_modules=MODULES), "plain")
    trained = {name: p for name, p in t.model.named_parameters() if p.requires_grad}
    assert {name: tuple(p.shape) for name, p in trained.items()} == {f"{a.name}.B": (a.shape[0], 4) for a in t.adapters}
    assert not any(p.any() for p in trained.values())


@pytest.mark.quick
def test_a_scale_is_refused():
    for changes in (dict(alpha=16.0), dict(use_rslora=True), dict(alpha_pattern={"k_proj": 4.0})):
        (setting,) = changes
        with pytest.raises(ValueError, match=rf"method\.{setting} cannot be used with miss"):
            MiSS(**changes)
    with pytest.raises(ValueError, match="miss does not train both"):
        Trainee(MiSS(rank=4, b_rate=2.0, target_modules=MODULES), "plain")
