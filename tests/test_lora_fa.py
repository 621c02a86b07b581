"""LoRA-FA (https://arxiv.org/abs/2308.03303) against PEFT's LoRA with a frozen A, and PEFT's own LoRA-FA optimizer."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn

from llm_lowrank.methods.directions.reflora import RefLoRA
from llm_lowrank.methods.lora_fa import LoRAFA
from llm_lowrank.models import checkpoint
from tests import ranks
from tests.tiny import Trainee, batch, llama

MODULES = ["k_proj", "down_proj"]
RANK, ALPHA, RATE, STEPS = 4, 6.0, 1e-2, 6


def method(a_init: str, **changes: object) -> LoRAFA:
    return LoRAFA(rank=RANK, alpha=ALPHA, target_modules=MODULES, a_init=a_init, **changes)


def trained(t: Trainee, steps: range) -> list[float]:
    return [t.step(step, RATE) for step in steps]


def in_peft(t: Trainee) -> peft.PeftModel:
    """PEFT's LoRA over the same base with the same A, frozen."""
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=MODULES)
    model = peft.get_peft_model(llama(), config)
    for adapter in t.adapters:
        layer = model.base_model.model.get_submodule(adapter.name)
        layer.lora_A["default"].weight.data.copy_(adapter.A)
        layer.lora_A["default"].weight.requires_grad_(False)
    return model


def peft_steps(model: peft.PeftModel, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in range(STEPS):
        tokens = batch(step)
        logits = model(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def factors(t: Trainee) -> dict[str, Tensor]:
    return {a.name: a.B.detach() for a in t.adapters}


def peft_factors(model: peft.PeftModel, t: Trainee) -> dict[str, Tensor]:
    return {a.name: model.base_model.model.get_submodule(a.name).lora_B["default"].weight for a in t.adapters}


def apart(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    difference = sum(float((found[k] - wanted[k]).square().sum()) for k in wanted)
    return math.sqrt(difference / sum(float(w.square().sum()) for w in wanted.values()))


@pytest.mark.parametrize("a_init", ["kaiming", "orthonormal"])
def test_it_is_pefts_lora_with_a_frozen_a_step_for_step(a_init):
    t = Trainee(method(a_init), "plain")
    model = in_peft(t)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    losses = peft_steps(model, adam)
    assert trained(t, range(STEPS)) == pytest.approx(losses, rel=1e-5)
    assert apart(factors(t), peft_factors(model, t)) <= 1e-3


def test_with_orthonormal_rows_pefts_correction_of_the_gradient_changes_nothing():
    """Its gradient is g_B (A A^T + 1e-8)^-1 / s^2, here a multiple of g_B, which Adam does not see; with LoRA's rows
    it is another one.
    """
    far = {}
    for a_init in ("kaiming", "orthonormal"):
        t = Trainee(method(a_init), "plain")
        model = in_peft(t)
        corrected = create_lorafa_optimizer(model, r=RANK, lora_alpha=ALPHA, lr=RATE)
        peft_steps(model, corrected)
        trained(t, range(STEPS))
        far[a_init] = apart(factors(t), peft_factors(model, t))
    assert far["orthonormal"] <= 0.01 and far["kaiming"] >= 10 * far["orthonormal"], far


def test_the_rows_of_a_are_orthogonal_and_as_long_as_those_of_lora():
    for adapter in Trainee(method("orthonormal"), "plain").adapters:
        torch.testing.assert_close(adapter.A @ adapter.A.T, torch.eye(RANK) / 3, rtol=0, atol=1e-6)
        assert not adapter.B.any() and not adapter.A.requires_grad and adapter.B.requires_grad
    for adapter in Trainee(method("kaiming"), "plain").adapters:
        assert float(adapter.A.norm(dim=1).mean()) == pytest.approx(3**-0.5, rel=0.2)


def frozen_a(engine: str, folder: str, resume: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """A at the start and after steps; saved after them, or resumed."""
    found = checkpoint.newest(Path(folder))[0] if resume else None
    t = Trainee(method("orthonormal"), engine, resume_from=found)
    before = {a.name: t.engine.whole(a.A) for a in t.adapters}
    trained(t, range(3, 6) if resume else range(3))
    if not resume:
        t.save(Path(folder), 3)
    return {a.name: (before[a.name], t.engine.whole(a.A)) for a in t.adapters}


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero2", 2), ("zero3", 3), ("fsdp", 2)])
def test_a_is_bitwise_what_it_was_after_steps_and_a_resume_elsewhere(engine, world, tmp_path):
    told = [*ranks.run(world, frozen_a, engine, str(tmp_path), False)]
    told += ranks.run(1, frozen_a, "plain", str(tmp_path), True)
    wanted = Trainee(method("orthonormal"), "plain").adapters
    for found in told:
        for adapter in wanted:
            assert all(torch.equal(a, adapter.A) for a in found[adapter.name])


def test_settings_that_need_both_factors_are_refused():
    with pytest.raises(ValueError, match="b_rate is the rate of B beside that of A, and lora_fa does not train both"):
        Trainee(method("kaiming", b_rate=4.0), "plain")
    with pytest.raises(ValueError, match="lora_fa trains something else"):
        Trainee(method("kaiming", direction=RefLoRA()), "plain")
