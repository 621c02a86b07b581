"""LoRA-XS (https://arxiv.org/abs/2405.17604) against its equation and PEFT's TinyLoRA with unit matrices."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairSettings
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.lora_xs import CoreAdapter, LoRAXS
from llm_lowrank.models.export import save_adapter
from tests import ranks
from tests.tiny import Trainee, llama, resumed_in_nf4

MODULES = ["k_proj", "down_proj"]  # 14 x 42 and 42 x 43
METHOD = LoRAXS(rank=4, alpha=6, target_modules=MODULES, svd_cache="", svd_exact=True)
ENGINES = [("plain", 1), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]


def started(engine: str, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int], list[int]]:
    t = Trainee(METHOD, engine, dtype)
    numbers = [sum(p.numel() for p in a.parameters() if p.requires_grad) for a in t.model.modules() if a in t.adapters]
    return t.values(), t.weights(), numbers, [len(a.ledger) for a in t.adapters]


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
@pytest.mark.parametrize("engine, world", ENGINES)
def test_a_and_b_are_directions_of_w_which_stays_whole(engine, world, dtype):
    base, plain = llama(dtype), Trainee(LoRAXS(rank=4, target_modules=MODULES, svd_cache=""), "plain", dtype).weights()
    for values, weights, _, entries in ranks.run(world, started, engine, dtype):
        assert not any(entries)
        for name, w in weights.items():
            W = base.get_submodule(name).weight.double()
            u, s, vt = torch.linalg.svd(W, full_matrices=False)
            A, B, R = (values[f"{name}.{letter}"].double() for letter in "ABR")
            torch.testing.assert_close(B @ A, (u[:, :4] * s[:4]) @ vt[:4], rtol=0, atol=1e-4)
            torch.testing.assert_close(A.norm(dim=1), s[:4], rtol=1e-4, atol=0)  # the singular values are A's
            torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
            assert not R.any() and torch.equal(w, plain[name])
            assert dtype != "fp32" or torch.allclose(w, W.float(), atol=1e-6)


def test_r_squared_parameters_a_module_are_trained():
    t = Trainee(METHOD, "plain")
    trained = {name: tuple(p.shape) for name, p in t.model.named_parameters() if p.requires_grad}
    assert trained == {f"{a.name}.R": (4, 4) for a in t.adapters}


@pytest.mark.quick
def test_it_is_pefts_tinylora_with_unit_matrices():
    """TinyLoRA's R = sum_i v_i P_i is any R if P are the r^2 unit matrices; its factors are balanced."""
    torch.manual_seed(3)
    model, r = nn.Sequential(nn.Linear(10, 7)), 3
    W, bias, x = model[0].weight.detach().clone(), model[0].bias.detach().clone(), torch.randn(2, 5, 10)
    tiny = peft.get_peft_model(model, peft.TinyLoraConfig(r=r, u=r * r, target_modules=["0"], save_projection=True))
    layer = tiny.base_model.model[0]
    layer.tinylora_P["default"] = torch.eye(r * r).view(r * r, r, r)
    v = layer.tinylora_v["default"][layer._tinylora_v_key["default"]]
    v.data = torch.randn(r * r)
    linear = nn.Linear(10, 7)
    linear.weight.data, linear.bias.data = W, bias
    ours = CoreAdapter("layer", linear, Dense(torch.float32), PairSettings(rank=r, scale=1.0))
    ours.A.data, ours.B.data = layer.tinylora_A["default"].clone(), layer.tinylora_B["default"].clone()
    ours.R.data = v.detach().view(r, r).clone()
    y, wanted = ours(x), tiny(x)
    torch.testing.assert_close(y, wanted)
    g = torch.linspace(-1, 2, y.numel()).view(y.shape)
    y.backward(g)
    wanted.backward(g)
    torch.testing.assert_close(ours.R.grad.flatten(), v.grad)
    assert ours.A.grad is None and ours.B.grad is None


@pytest.mark.parametrize("engine, world", ENGINES[1:])
def test_frozen_factors_are_bitwise_what_they_were_after_a_resume_elsewhere(engine, world, tmp_path):
    first = ranks.run(world, resumed_in_nf4, METHOD, engine, str(tmp_path), False)[0]
    second = ranks.run(1, resumed_in_nf4, METHOD, "plain", str(tmp_path), True)[0]
    for name, value in first[0].items():
        found = [first[1][name], second[0][name], second[1][name]]
        if name.endswith(".R"):
            assert found[0].any() and torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
        else:
            assert all(torch.equal(value, other) for other in found), name


def test_the_exported_adapter_holds_b_r_and_a(tmp_path):
    t = Trainee(METHOD, "plain")
    t.step(0)
    save_adapter(t.engine, t.adapters, method=METHOD, path=tmp_path, base_model_name_or_path="base")
    found = load_file(tmp_path / "adapter_model.safetensors")
    for a in t.adapters:
        assert torch.equal(found[f"base_model.model.{a.name}.lora_B.weight"], a.B @ a.R)
        assert torch.equal(found[f"base_model.model.{a.name}.lora_A.weight"], a.A)


def test_settings_of_other_methods_are_refused():
    with pytest.raises(ValueError, match=r"method\.subspace is a start of pissa's B and A"):
        LoRAXS(subspace=True)
    with pytest.raises(ValueError, match="lora_xs does not train both"):
        Trainee(LoRAXS(rank=4, b_rate=2.0, target_modules=MODULES, svd_cache=""), "plain")
