"""use_liger_kernel, with a package of this name that patches a model in torch: what is put in, proved and refused.

The real kernels need a GPU.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import MethodType, ModuleType

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from llm_lowrank.adapters.method import attach
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models import liger
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import tiny
from tests.test_launch import place, records  # noqa: F401 - place is a fixture
from tests.test_runs import settings

CPU = torch.device("cpu")
CALLS: list[str] = []  # of the patched functions


class SiLUMul(torch.autograd.Function):
    """silu(a) b, whose backward writes the gradients over a and b, as the package's does."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return nn.functional.silu(a) * b

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        sigmoid = torch.sigmoid(a)
        da, db = dc * b * sigmoid * (1 + a * (1 - sigmoid)), dc * a * sigmoid
        a.data.copy_(da)
        b.data.copy_(db)
        return a, b


def mlp(self, x):
    CALLS.append("mlp")
    return self.down_proj(SiLUMul.apply(self.gate_proj(x), self.up_proj(x)))


def norm(self, x):
    CALLS.append("norm")
    y = x.float() * (x.float().square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
    return self.weight * y.to(x.dtype)


def rotate(q, k, cos, sin, unsqueeze_dim=1):
    """Rotate and write the results over the inputs, as the package does."""
    CALLS.append("rotate")
    rotated = ROTATE(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    for x, y in zip((q, k), rotated, strict=True):
        x.data.copy_(y)
    return rotated


ROTATE, NORM = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRMSNorm


def wrong_norm(self, x):
    return norm(self, x) * 1.001


def wrong_backward(self, x):
    y = norm(self, x)
    return y.detach() + 1.001 * (y - y.detach())


class Package:
    """What the package does to an instance, and to transformers' modules on the way."""

    def __init__(self) -> None:
        self.norm = norm
        self.rope = rotate
        self.mlp = True

    def apply(self, model, cross_entropy=True, fused_linear_cross_entropy=True, rope=True, swiglu=True):
        assert not cross_entropy and not fused_linear_cross_entropy
        if rope:
            modeling_llama.apply_rotary_pos_emb = self.rope
        modeling_llama.LlamaRMSNorm = nn.Identity
        for module in model.modules():
            if isinstance(module, NORM):
                module.forward = MethodType(self.norm, module)
            elif type(module).__name__ == "LlamaMLP" and swiglu and self.mlp:
                module.forward = MethodType(mlp, module)


@pytest.fixture
def package(monkeypatch) -> Package:
    fake = Package()
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, module)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": fake.apply, "gemma": fake.apply}
    module._apply_liger_kernel_to_instance = lambda model, geglu=True, **arguments: fake.apply(model, **arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    CALLS.clear()
    return fake


def make(dtype: torch.dtype):
    model = tiny.skeleton("bf16" if dtype == torch.bfloat16 else "fp32", num_hidden_layers=4)
    attach(model, LoRA(rank=2), tiny.CODECS["bf16" if dtype == torch.bfloat16 else "fp32"], 0)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass_the_proof_which_uses_them(package, dtype):
    said = liger.prove(make, dtype, CPU)
    assert "float32 at most" in said and ("bfloat16 at most" in said) == (dtype == torch.bfloat16)
    # of two layers: norms, mlp, rotation; in float32, and in the other dtype too
    times = 1 if dtype == torch.float32 else 2
    assert [CALLS.count(kind) for kind in ("norm", "mlp", "rotate")] == [5 * times, 2 * times, 2 * times]


@pytest.mark.parametrize(
    "change, what",
    [
        ({"norm": wrong_norm}, "in float32 .* away"),
        ({"norm": wrong_backward}, "in float32 the gradient of .* away"),
        ({"rope": lambda q, k, *_, **__: (q, k)}, "in float32 .* away"),
        ({"norm": lambda self, x: norm(self, x) / 0 * 0}, "is nan away"),
        ({"norm": lambda self, x: x / "no"}, "cannot be computed with the kernels"),
    ],
)
def test_wrong_kernels_are_refused_with_the_figures(package, change, what):
    for name, function in change.items():
        setattr(package, name, function)
    with pytest.raises(ValueError, match=f"use_liger_kernel: .*{what}.*use_liger_kernel: false"):
        liger.prove(make, torch.bfloat16, CPU)


def test_a_trained_magnitude_needs_what_kernels_overwrite(package):
    def adapted(dtype):
        model = tiny.skeleton()
        for adapter in attach(model, DoRA(rank=2), tiny.CODECS["fp32"], 0):
            adapter.started()
        return model

    assert "float32 at most" in liger.prove(adapted, torch.float32, CPU, overwriting=False)
    with pytest.raises(ValueError, match=r"the gradient of model\.layers\.\d\.mlp\.\w+_proj\.magnitude"):
        liger.prove(adapted, torch.float32, CPU)
    package.mlp = False
    with pytest.raises(ValueError, match=r"the gradient of model\.layers\.\d\.self_attn\.[qk]_proj\.magnitude"):
        liger.prove(adapted, torch.float32, CPU)


def test_one_model_gets_the_kernels_and_the_process_stays_as_it_was(package):
    model, other = make(torch.float32), tiny.llama()
    assert liger.put_in(model) == "4 LlamaAttention, 4 LlamaMLP, 9 LlamaRMSNorm"
    assert modeling_llama.apply_rotary_pos_emb is ROTATE and modeling_llama.LlamaRMSNorm is NORM
    other(tiny.batch(0))
    assert not CALLS


def test_norms_alone_can_be_put_in(package):
    assert liger.put_in(make(torch.float32), overwriting=False) == "9 LlamaRMSNorm"


def test_a_model_that_the_package_does_not_know_is_refused(package):
    model = make(torch.float32)
    model.config.model_type = "gpt2"
    with pytest.raises(ValueError, match=r"no kernels for model type gpt2 \(it has them for gemma, llama\)"):
        liger.put_in(model)


def test_a_package_that_patches_more_or_nothing_or_fails_is_refused(package):
    package.apply = lambda model, **_: None
    with pytest.raises(ValueError, match="patched nothing of LlamaForCausalLM"):
        liger.put_in(make(torch.float32))

    def adapters(model, **_):
        model.model.layers[0].mlp.up_proj.forward = torch.relu

    package.apply = adapters
    with pytest.raises(ValueError, match="patched 1 PairAdapter of LlamaForCausalLM"):
        liger.put_in(make(torch.float32))
    package.apply = lambda model: None
    with pytest.raises(ValueError, match=r"cannot patch LlamaForCausalLM of this .* \(TypeError: "):
        liger.put_in(make(torch.float32))


def test_what_is_missing_and_what_does_not_go_together_is_said_before_a_run(place, tmp_path, monkeypatch):  # noqa: F811
    arguments = settings(place, "lora", tmp_path / "out", engine="plain", use_liger_kernel=True, report_to="none")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(RecipeError) as error:
        validate(parse(arguments))
    assert str(error.value) == (
        'use_liger_kernel: true needs liger-kernel and a CUDA device; pip install "llm-lowrank[liger]", or set '
        "use_liger_kernel: false"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RecipeError, match="use_liger_kernel: true needs liger-kernel; pip install"):
        validate(parse(arguments))
    with pytest.raises(RecipeError, match="use_liger_kernel: true and torch_compile: true do not go together"):
        validate(parse([*arguments, "--torch_compile=true"]))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_run_with_kernels_is_the_run_without(place, tmp_path, package, monkeypatch, capsys, method):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the run itself is on the CPU
    for kernels in (False, True):
        arguments = settings(
            place, method, tmp_path / str(kernels), engine="plain", report_to="none", use_liger_kernel=kernels
        )
        train(parse(arguments))
    one, two = (records(tmp_path / str(kernels), "train") for kernels in (False, True))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    said = capsys.readouterr().out
    kept = ", no rotations and activations, for they overwrite what a trained magnitude needs"
    assert {
        "lora": "liger-kernel: 2 LlamaAttention, 2 LlamaMLP, 5 LlamaRMSNorm; outputs",
        "dora": f"liger-kernel: 5 LlamaRMSNorm{kept}; outputs",
    }[method] in said
    assert "norm" in CALLS and ("mlp" in CALLS) == (method == "lora")


def test_a_run_whose_kernels_are_wrong_ends_before_it_loads(place, tmp_path, package, monkeypatch):  # noqa: F811
    package.norm = wrong_norm
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="use_liger_kernel: with liger-kernel's kernels in float32"):
        train(parse(settings(place, "lora", tmp_path / "out", engine="plain", report_to="none", use_liger_kernel=True)))
    assert not (tmp_path / "out").exists()
