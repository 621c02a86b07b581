"""DoRA (https://arxiv.org/abs/2402.09353) against its equation 5 written densely, and against PEFT's."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llm_lowrank.adapters.adapter import PairSettings
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.dora import DirectionAdapter, DoRA
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from tests import ranks
from tests.tiny import Trainee, batch, llama

M, N, R, SCALE = 9, 12, 3, 0.7
TARGETS = ["k_proj", "up_proj", "down_proj"]


def layer(
    bias: bool = True, dtype: torch.dtype = torch.float64, dropout: float = 0.0
) -> tuple[DirectionAdapter, nn.Linear]:
    torch.manual_seed(0)
    linear = nn.Linear(N, M, bias=bias, dtype=dtype)
    adapter = DirectionAdapter("layer", linear, Dense(dtype), PairSettings(R, SCALE, dropout=dropout))
    for name, value in adapter.initial().items():
        setattr(adapter, name, nn.Parameter(value.to(dtype), requires_grad=name != "norms"))
    for p in (adapter.magnitude, adapter.norms):
        p.data.copy_(linear.weight.norm(dim=1))
    return adapter, linear


def fill(adapter: DirectionAdapter) -> None:
    nn.init.normal_(adapter.B)
    adapter.magnitude.data.mul_(torch.linspace(0.5, 2, M))


def naive(adapter: DirectionAdapter, linear: nn.Linear, x: Tensor) -> Tensor:
    """Equation 5, the norm a constant."""
    v = linear.weight + SCALE * adapter.B @ adapter.A
    w = (adapter.magnitude / v.norm(dim=1).detach())[:, None] * v
    return nn.functional.linear(x, w, linear.bias)


def test_at_the_start_it_is_the_frozen_layer_bitwise():
    adapter, linear = layer(bias=False)
    x = torch.randn(5, N, dtype=torch.float64)
    assert torch.equal(adapter(x), linear(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4, N), (2, 3, N)])
def test_forward_and_gradients_are_equation_5_with_a_constant_norm(shape, bias):
    adapter, linear = layer(bias)
    fill(adapter)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(*shape[:-1], M, dtype=torch.float64)
    leaves = (x, adapter.A, adapter.B, adapter.magnitude)
    torch.testing.assert_close(adapter(x), naive(adapter, linear, x), rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(y, leaves, g) for y in (adapter(x), naive(adapter, linear, x)))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_the_length_of_every_row_is_the_magnitude():
    adapter, _ = layer(bias=False)
    fill(adapter)
    w = adapter(torch.eye(N, dtype=torch.float64)).T
    torch.testing.assert_close(w.norm(dim=1), adapter.magnitude.data.abs())


def test_a_row_of_zeros_stays_one_and_breaks_nothing():
    adapter, linear = layer()
    adapter.weight.data[2] = linear.weight.data[2] = 0
    for p in (adapter.magnitude, adapter.norms):
        p.data[2] = 0
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(adapter(x)[:, 2], linear.bias[2].expand(4))
    for gradient in torch.autograd.grad(adapter(x).square().sum(), (x, adapter.A, adapter.B, adapter.magnitude)):
        assert gradient.isfinite().all()


def test_dropout_is_on_the_input_of_the_pairs_alone():
    adapter, linear = layer(dropout=0.5)
    fill(adapter)
    x = torch.randn(4, N, dtype=torch.float64, requires_grad=True)

    def equation() -> Tensor:
        v = linear.weight + SCALE * adapter.B @ adapter.A
        length = adapter.magnitude / v.norm(dim=1).detach()
        dropped = nn.functional.dropout(x, 0.5)
        return length * (x @ linear.weight.T + SCALE * dropped @ adapter.A.T @ adapter.B.T) + linear.bias

    leaves, g, values = (x, adapter.A, adapter.B, adapter.magnitude), torch.randn(4, M, dtype=torch.float64), []
    for forward in (adapter.train(), lambda x: equation()):
        torch.manual_seed(3)
        y = forward(x)
        values.append([y.detach(), *torch.autograd.grad(y, leaves, g)])
    for found, wanted in zip(*values, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_bf16_layer_is_the_float32_one_rounded():
    adapter, _linear = layer(dtype=torch.float32)
    fill(adapter)
    x = torch.randn(64, N)
    y = adapter(x)
    adapter.codec, adapter.weight.data, adapter.bias.data = (
        Dense(torch.bfloat16),
        adapter.weight.bfloat16(),
        adapter.bias.bfloat16(),
    )
    found = adapter(x.bfloat16())
    assert found.dtype == torch.bfloat16 and (found - y).norm() < 0.01 * y.norm()


# --- a run ------------------------------------------------------------------------------------------------------------


def run(engine: str, dtype: str = "fp32") -> dict:
    t = Trainee(DoRA(rank=3, alpha=6, target_modules=TARGETS), engine, dtype)
    lengths = {a.name: t.engine.whole(a.magnitude).cpu() for a in t.adapters}
    stored = {a.name: t.engine.weight(a).row_norms().cpu() for a in t.adapters}
    losses = [t.step(step) for step in range(4)]
    return {"lengths": lengths, "stored": stored, "losses": losses, "values": t.values()}


@pytest.mark.parametrize(
    "engine, world, dtype",
    [("plain", 1, "bf16"), ("plain", 1, "int8"), ("zero3", 3, "fp32"), ("zero3", 3, "nf4"), ("fsdp", 2, "nf4")],
)
def test_the_magnitude_starts_as_the_length_of_the_stored_rows(engine, world, dtype):
    told = ranks.run(world, run, engine, dtype)[0]
    for name, lengths in told["lengths"].items():
        assert torch.equal(lengths, told["stored"][name])
        assert torch.equal(told["values"][f"{name}.norms"], told["stored"][name]), "the norms are frozen"
        assert not torch.equal(told["values"][f"{name}.magnitude"], lengths), "the magnitude is trained"
    assert told["losses"][-1] < told["losses"][0]


def ours_and_theirs() -> tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]:
    t = Trainee(DoRA(rank=3, alpha=6, target_modules=TARGETS), "plain")
    start = t.values()
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, use_dora=True))
    named = dict(theirs.named_parameters())

    def keys(name: str) -> tuple[str, str, str]:
        at = f"base_model.model.{name}"
        return (
            f"{at}.lora_A.default.weight",
            f"{at}.lora_B.default.weight",
            f"{at}.lora_magnitude_vector.default.weight",
        )

    for a in t.adapters:
        for key, value in zip(keys(a.name), ("A", "B", "magnitude"), strict=True):
            named[key].data.copy_(start[f"{a.name}.{value}"])
    optimizer = torch.optim.AdamW([p for p in named.values() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses: tuple[list[float], list[float]] = ([], [])
    for step in range(5):
        losses[0].append(t.step(step))
        tokens = batch(step)
        logits = theirs(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        losses[1].append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    end = t.values()
    parts = [
        (f"{a.name}.{part}", key)
        for a in t.adapters
        for part, key in zip(("A", "B", "magnitude"), keys(a.name), strict=True)
    ]
    return *losses, {name: end[name] for name, _ in parts}, {name: named[key].detach() for name, key in parts}


def test_steps_are_those_of_peft():
    ours, theirs, values, wanted = ours_and_theirs()
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, value in values.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4)


def test_exports_as_use_dora_and_merges(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    t = Trainee(DoRA(rank=3, alpha=6, target_modules=TARGETS), "plain")
    for step in range(4):
        t.step(step)
    saved = save_adapter(
        t.engine, t.adapters, method=t.method, path=tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base")
    )
    assert saved is not None and saved.rank == 3
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        through_peft = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=batch(99)).logits
        merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=batch(99)).logits
    assert (through_peft - t.logits()).abs().max() < 1e-4 and (merged - t.logits()).abs().max() < 1e-4


def test_the_number_of_trained_parameters_is_that_of_lora_and_one_a_row():
    t = Trainee(DoRA(rank=3, target_modules=TARGETS), "plain")
    trained = sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    assert trained == sum(3 * (a.shape[0] + a.shape[1]) + a.shape[0] for a in t.adapters)
