"""OSoRA (https://arxiv.org/abs/2505.14350) against its equation, and against PEFT's LoRA with the exported pairs."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairSettings
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.osora import OSoRA, SpectrumAdapter
from llm_lowrank.models.export import save_adapter
from tests import ranks
from tests.tiny import Trainee, batch, check_resume_elsewhere, llama

MODULES = ["k_proj", "down_proj"]  # 14 x 42 and 42 x 43
RANK, RATE = 5, 3e-2
METHOD = OSoRA(rank=RANK, target_modules=MODULES, svd_cache="", svd_exact=True)


def triplets(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    return u[:, :RANK], s[:RANK], vt[:RANK]


@pytest.mark.quick
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_equation_and_its_gradients(dropout):
    torch.manual_seed(0)
    linear = nn.Linear(12, 9, dtype=torch.float64)
    settings = PairSettings(RANK, 1.0, dropout=dropout)
    adapter = SpectrumAdapter("layer", linear, Dense(torch.float64), settings)
    for name in ("A", "B", "S", "O"):
        value = torch.randn(getattr(adapter, name).shape, dtype=torch.float64)
        setattr(adapter, name, nn.Parameter(value, requires_grad=name in "SO"))
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 9, dtype=torch.float64)

    def equation(x: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, dropout)
        return linear(x) + adapter.O * ((adapter.S * (dropped @ adapter.A.T)) @ adapter.B.T)

    values = []
    for forward in (adapter.train(), equation):
        torch.manual_seed(1)
        y = forward(x)
        values.append([y.detach(), *torch.autograd.grad(y, (x, adapter.S, adapter.O), g)])
    for found, wanted in zip(*values, strict=True):
        torch.testing.assert_close(found, wanted)


def started(engine: str, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    t = Trainee(METHOD, engine, dtype)
    return t.values(), t.weights(), [len(a.ledger) for a in t.adapters]


@pytest.mark.parametrize("engine, world, dtype", [("plain", 1, "fp32"), ("plain", 1, "nf4"), ("zero3", 3, "nf4")])
def test_the_largest_triplets_leave_w_and_the_layer_starts_as_it_was(engine, world, dtype):
    base = llama(dtype)
    for rank, (values, weights, entries) in enumerate(ranks.run(world, started, engine, dtype)):
        assert entries == [int(rank == 0)] * len(entries)
        for name, stored in weights.items():
            W = base.get_submodule(name).weight.double()
            u, s, vt = triplets(W)
            A, B, S, O = (values[f"{name}.{letter}"].double() for letter in ("A", "B", "S", "O"))  # noqa: E741
            torch.testing.assert_close(S, s, rtol=1e-5, atol=0)
            assert torch.equal(O, torch.ones(len(W), dtype=torch.float64))
            torch.testing.assert_close((B * S) @ A, (u * s) @ vt, rtol=0, atol=1e-5)
            for unit in (A @ A.T, B.T @ B):
                torch.testing.assert_close(unit, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-5)
            layer = stored.double() + (B * S) @ A
            if dtype == "fp32":
                assert (layer - W).norm() < 1e-6 * W.norm(), name
            else:  # the residual is what was quantized
                assert (layer - W).norm() < 0.15 * (W - (u * s) @ vt).norm(), name


def test_r_and_m_numbers_a_module_are_trained():
    t = Trainee(METHOD, "plain")
    trained = {name: tuple(p.shape) for name, p in t.model.named_parameters() if p.requires_grad}
    assert trained == {f"{a.name}.{k}": size for a in t.adapters for k, size in (("S", (RANK,)), ("O", a.shape[:1]))}


def test_steps_are_those_of_the_equation_written_naively():
    """The same AdamW steps on S and O of a plain model with the residual in its weights."""
    t, model = Trainee(METHOD, "plain"), llama()
    spectra, parameters = {}, []
    for adapter in t.adapters:
        linear = model.get_submodule(adapter.name)
        u, s, vt = (part.float() for part in triplets(linear.weight.detach()))
        S, O = nn.Parameter(s.clone()), nn.Parameter(torch.ones(len(u)))  # noqa: E741
        linear.weight.data -= (u * s) @ vt
        spectra[adapter.name] = S, O
        parameters += [S, O]

        def beside(linear, args, y, u=u, vt=vt, S=S, O=O):  # noqa: E741
            return y + O * ((S * (args[0] @ vt.T)) @ u.T)

        linear.register_forward_hook(beside)
    adam = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    for step in range(4):
        tokens = batch(step)
        logits = model(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        adam.step()
        adam.zero_grad()
        assert t.step(step, RATE) == pytest.approx(loss.item(), rel=1e-5)
    for adapter in t.adapters:
        for found, wanted in zip((adapter.S, adapter.O), spectra[adapter.name], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_resume_elsewhere_goes_on_as_without_a_stop(tmp_path):
    check_resume_elsewhere(METHOD, tmp_path, trained=(".S", ".O"))


def test_the_exported_lora_has_rank_r_over_the_untouched_base(tmp_path):
    t = Trainee(METHOD, "plain")
    for step in range(3):
        t.step(step, RATE)
    saved = save_adapter(t.engine, t.adapters, method=METHOD, path=tmp_path, base_model_name_or_path="base")
    assert saved is not None and saved.rank == RANK and saved.error < 1e-6, "what left W has the same rows of A"
    found, base = load_file(tmp_path / "adapter_model.safetensors"), llama()
    for a in t.adapters:
        at = f"base_model.model.{a.name}"
        change = found[f"{at}.lora_B.weight"] @ found[f"{at}.lora_A.weight"]
        u, s, vt = triplets(base.get_submodule(a.name).weight.detach())
        wanted = (a.O[:, None].double() * u * a.S.double() - u * s) @ vt
        torch.testing.assert_close(change.double(), wanted, rtol=0, atol=1e-5)
    with torch.no_grad():
        through = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(through(input_ids=batch(99)).logits, t.logits(), rtol=0, atol=1e-4)


def test_a_rank_that_would_empty_w_is_refused():
    with pytest.raises(ValueError, match=r"rank 14 would take all of its 14 x 42 weight.*exclude_modules k_proj"):
        Trainee(OSoRA(rank=14, target_modules=MODULES, svd_cache=""), "plain")
    with pytest.raises(ValueError, match=r"rank 15 is more than min\(m, n\) = 14"):
        Trainee(OSoRA(rank=15, target_modules=MODULES, svd_cache=""), "plain")


@pytest.mark.parametrize("setting", [{"alpha": 8.0}, {"alpha_pattern": {"k_proj": 2.0}}, {"use_rslora": True}])
def test_a_scale_is_refused(setting):
    with pytest.raises(ValueError, match=rf"method\.{next(iter(setting))} cannot be used with osora"):
        OSoRA(**setting)


def test_settings_of_other_methods_are_refused():
    with pytest.raises(ValueError, match=r"method\.subspace leaves W whole"):
        OSoRA(subspace=True)
    with pytest.raises(ValueError, match="osora does not train both"):
        Trainee(OSoRA(rank=4, b_rate=2.0, target_modules=MODULES, svd_cache=""), "plain")
