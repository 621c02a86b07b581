"""EDoRA (https://arxiv.org/abs/2501.12067) against its equation written densely and against PEFT's DoRA with B R."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairSettings
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.dora import DirectionAdapter
from llm_lowrank.methods.edora import CoreDirectionAdapter, EDoRA
from llm_lowrank.models.export import save_adapter
from tests import ranks
from tests.tiny import Trainee, batch, check_resume_elsewhere, llama

MODULES = ["k_proj", "down_proj"]  # 14 x 42 and 42 x 43
METHOD = EDoRA(rank=4, alpha=6, target_modules=MODULES, svd_cache="", svd_exact=True)
M, N, R, SCALE = 9, 12, 3, 0.7


def layer(rank: int = R, bias: bool = True) -> tuple[CoreDirectionAdapter, nn.Linear]:
    """In float64, with random factors, R and lengths."""
    torch.manual_seed(0)
    linear = nn.Linear(N, M, bias=bias, dtype=torch.float64)
    adapter = CoreDirectionAdapter("layer", linear, Dense(torch.float64), PairSettings(rank, SCALE))
    for name in ("A", "B", "R", "magnitude", "norms"):
        p = getattr(adapter, name)
        value = torch.randn(p.shape, dtype=torch.float64)
        setattr(adapter, name, nn.Parameter(value, requires_grad=name in ("R", "magnitude")))
    adapter.norms.data.copy_(linear.weight.norm(dim=1))
    adapter.magnitude.data.copy_(adapter.norms * torch.linspace(0.5, 2, M))
    return adapter, linear


def naive(adapter: CoreDirectionAdapter, linear: nn.Linear, x: Tensor) -> Tensor:
    """The paper's equation, the norm a constant."""
    v = linear.weight + SCALE * adapter.B @ adapter.R @ adapter.A
    w = (adapter.magnitude / v.norm(dim=1).detach())[:, None] * v
    return nn.functional.linear(x, w, linear.bias)


@pytest.mark.quick
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients_are_the_equation_with_a_constant_norm(bias):
    adapter, linear = layer(bias=bias)
    x = torch.randn(2, 3, N, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, M, dtype=torch.float64)
    leaves = (x, adapter.R, adapter.magnitude)
    torch.testing.assert_close(adapter(x), naive(adapter, linear, x), rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(y, leaves, g) for y in (adapter(x), naive(adapter, linear, x)))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    assert not adapter.A.requires_grad and not adapter.B.requires_grad


def test_with_a_free_core_it_is_dora_with_any_b():
    """r = m and an orthogonal B: R = B^T B' makes B R any B' of DoRA."""
    adapter, linear = layer(rank=M)
    dora = DirectionAdapter("layer", linear, Dense(torch.float64), PairSettings(M, SCALE))
    for name in ("A", "magnitude", "norms"):
        setattr(dora, name, nn.Parameter(getattr(adapter, name).detach(), requires_grad=name != "norms"))
    dora.B = nn.Parameter(torch.randn(M, M, dtype=torch.float64))
    adapter.B.data.copy_(torch.linalg.qr(torch.randn(M, M, dtype=torch.float64))[0])
    adapter.R.data.copy_(adapter.B.T @ dora.B)
    x = torch.randn(5, N, dtype=torch.float64)
    torch.testing.assert_close(adapter(x), dora(x), rtol=1e-11, atol=1e-11)


def dora_in_peft(adapters: list) -> tuple[peft.PeftModel, dict[str, Tensor]]:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=MODULES, use_dora=True)
    theirs = peft.get_peft_model(llama(), config)
    named = dict(theirs.named_parameters())
    for adapter in adapters:
        at = f"base_model.model.{adapter.name}"
        named[f"{at}.lora_A.default.weight"].data.copy_(adapter.A)
        named[f"{at}.lora_B.default.weight"].data.copy_(adapter.B @ adapter.R)
        named[f"{at}.lora_magnitude_vector.default.weight"].data.copy_(adapter.magnitude)
    return theirs, named


def test_it_is_pefts_dora_with_b_r():
    """Loss, the gradient of the lengths, and the gradient of R by the chain rule: B^T dL/d(B R)."""
    t = Trainee(METHOD, "plain")
    for step in range(2):
        t.step(step)
    theirs, named = dora_in_peft(t.adapters)
    tokens = batch(7)
    logits = theirs(input_ids=tokens).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert t.forward_backward(7) == pytest.approx(loss.item(), rel=1e-6)
    for adapter in t.adapters:
        at = f"base_model.model.{adapter.name}"
        dm = named[f"{at}.lora_magnitude_vector.default.weight"].grad
        db = named[f"{at}.lora_B.default.weight"].grad
        torch.testing.assert_close(adapter.magnitude.grad, dm, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapter.R.grad, adapter.B.T @ db, rtol=1e-4, atol=1e-6)
        assert adapter.R.any() and not torch.equal(adapter.magnitude, adapter.norms)


def started(engine: str, dtype: str, factors: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    t = Trainee(EDoRA(rank=4, factors=factors, target_modules=MODULES, svd_cache="", svd_exact=True), engine, dtype)
    assert not any(a.ledger for a in t.adapters), "W stays whole"
    stored = {a.name: t.engine.weight(a).row_norms().cpu() for a in t.adapters}
    return t.values(), t.weights(), stored


@pytest.mark.parametrize("factors", ["svd", "random"])
def test_it_starts_with_lengths_of_w_and_with_r_zero_between_frozen_factors(factors):
    base = llama()
    values, weights, stored = started("plain", "fp32", factors)
    for name, w in weights.items():
        W = base.get_submodule(name).weight.double()
        A, B = (values[f"{name}.{letter}"].double() for letter in "AB")
        assert torch.equal(values[f"{name}.magnitude"], stored[name]) and not values[f"{name}.R"].any()
        assert torch.allclose(w, W.float(), atol=1e-6)
        if factors == "svd":
            u, s, vt = torch.linalg.svd(W, full_matrices=False)
            torch.testing.assert_close(B @ A, (u[:, :4] * s[:4]) @ vt[:4], rtol=0, atol=1e-4)
            torch.testing.assert_close(A.norm(dim=1), s[:4], rtol=1e-4, atol=0)
        else:
            for factor, bound in ((A, 4**-0.5), (B, len(W) ** -0.5)):
                assert 0.8 * bound < factor.abs().max() <= bound
    names = list(weights)
    assert not torch.equal(values[f"{names[0]}.A"], values[f"{names[2]}.A"]), "every module has its own"


def test_random_factors_are_the_same_on_every_engine():
    one, two = started("plain", "nf4", "random"), ranks.run(3, started, "zero3", "nf4", "random")[0]
    for name, value in one[0].items():
        assert torch.equal(value, two[0][name]) or name.endswith(("magnitude", "norms")), name


def test_r_squared_and_m_numbers_a_module_are_trained():
    t = Trainee(METHOD, "plain")
    trained = {name: tuple(p.shape) for name, p in t.model.named_parameters() if p.requires_grad}
    sizes = {"R": lambda a: (4, 4), "magnitude": lambda a: a.shape[:1]}
    assert trained == {f"{a.name}.{k}": size(a) for a in t.adapters for k, size in sizes.items()}


def test_a_resume_elsewhere_goes_on_as_without_a_stop(tmp_path):
    check_resume_elsewhere(METHOD, tmp_path, trained=(".R", ".magnitude"))


def test_the_exported_adapter_is_a_dora_of_b_r_and_answers_in_peft(tmp_path):
    t = Trainee(METHOD, "plain")
    for step in range(2):
        t.step(step)
    save_adapter(t.engine, t.adapters, method=METHOD, path=tmp_path, base_model_name_or_path="base")
    found = load_file(tmp_path / "adapter_model.safetensors")
    for a in t.adapters:
        at = f"base_model.model.{a.name}"
        assert torch.equal(found[f"{at}.lora_B.weight"], a.B @ a.R) and torch.equal(found[f"{at}.lora_A.weight"], a.A)
        assert torch.equal(found[f"{at}.lora_magnitude_vector"], a.magnitude)
    with torch.no_grad():
        through = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
        torch.testing.assert_close(through(input_ids=batch(99)).logits, t.logits(), rtol=0, atol=1e-4)


def test_settings_of_other_methods_are_refused():
    with pytest.raises(ValueError, match=r"method\.subspace is a start of pissa's B and A, which edora does not train"):
        EDoRA(subspace=True)
    with pytest.raises(ValueError, match="edora does not train both"):
        Trainee(EDoRA(rank=4, b_rate=2.0, target_modules=MODULES, svd_cache=""), "plain")
