"""SoRA (https://arxiv.org/abs/2311.11696) against its algorithm, written out densely in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from llm_lowrank.methods.sora import SoRA
from llm_lowrank.models import checkpoint
from llm_lowrank.models.export import save_adapter
from tests import ranks
from tests.tiny import Trainee, batch, llama

MODULES = ["k_proj", "up_proj"]  # 14 x 42 and 43 x 42, twice each
S, RATE, STEPS = 1.5, 1e-2, 8
METHOD = SoRA(rank=4, alpha=6, penalty=12.0, target_modules=MODULES)  # a gate loses 0.12 in each step
ENGINES = [("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]


def part(
    engine: str, folder: str = "", first: int = 0, last: int = STEPS, save: bool = False
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Some steps over nf4: the values at the end, and the log of every step."""
    resumed = checkpoint.newest(Path(folder))[0] if first else None
    t, log = Trainee(METHOD, engine, "nf4", total=STEPS, resume_from=resumed), []
    for step in range(first, last):
        t.step(step, RATE)
        log.append(t.method.metrics(t.adapters, t.engine))
    if save:
        t.save(Path(folder), last)
    return t.values(), log


def test_a_dense_sora_with_adam_and_the_soft_threshold_written_out_trains_alike():
    t, model = Trainee(METHOD, "plain", total=STEPS), llama().double()
    names = [a.name for a in t.adapters]
    W = {name: t.original[f"{name}.weight"].double() for name in names}
    p = {key: value.double() for key, value in t.values().items()}
    moments = dict.fromkeys(p, (0.0, 0.0))
    for step in range(STEPS):
        leaves = {key: value.detach().requires_grad_() for key, value in p.items()}
        layers = {
            f"{name}.weight": W[name]
            + S * leaves[f"{name}.B"] @ (leaves[f"{name}.gate"][:, None] * leaves[f"{name}.A"])
            for name in names
        }
        tokens = batch(step)
        logits = functional_call(model, layers, kwargs={"input_ids": tokens}).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert loss.item() == pytest.approx(t.step(step, RATE), rel=1e-5)
        for key, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            m, v = moments[key]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[key] = m, v
            update = m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p[key] = leaves[key].detach() - RATE * update
            if key.endswith(".gate"):
                p[key] = torch.nn.functional.softshrink(p[key], RATE * METHOD.penalty)
    dead = 0
    for key, value in t.values().items():
        torch.testing.assert_close(value.double(), p[key], rtol=1e-3, atol=1e-4)
        if key.endswith(".gate"):
            assert torch.equal(value == 0, p[key] == 0), key
            dead += int((value == 0).sum())
    assert 0 < dead < 16


def test_gates_start_normal_and_differ_and_the_function_stays():
    t = Trainee(replace(METHOD, rank=14), "plain")
    gates = torch.stack([a.gate.detach() for a in t.adapters])
    assert gates.std() == pytest.approx(1.0, abs=0.3) and abs(float(gates.mean())) < 0.3
    assert len({tuple(row.tolist()) for row in gates}) == 4
    assert torch.equal(t.logits(), llama()(input_ids=batch(99)).logits)


def test_every_engine_has_the_same_zeros_and_resumes_elsewhere(tmp_path):
    wanted, log = part("plain")
    assert log[0]["live_pairs"] > log[-1]["live_pairs"] > 0 and log[-1]["fewest_pairs"] < log[-1]["most_pairs"]
    for engine, world in ENGINES:
        folder = str(tmp_path / engine / str(world))
        for _, seen in ranks.run(world, part, engine, folder, 0, 4, True):
            assert seen == log[:4]
        values, seen = part("plain", folder, 4)
        assert seen == log[4:]
        for name, value in wanted.items():
            torch.testing.assert_close(values[name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("at", [1, 5])
def test_a_resume_goes_on_bitwise(at, tmp_path):
    part("plain", str(tmp_path), 0, at, True)
    resumed, whole = part("plain", str(tmp_path), at), part("plain")
    assert resumed[1] == whole[1][at:] and all(torch.equal(v, resumed[0][k]) for k, v in whole[0].items())


def test_without_a_penalty_no_gate_is_zero_and_with_a_larger_one_fewer_live():
    live = []
    for penalty in (0.0, 6.0, 12.0):
        t = Trainee(replace(METHOD, penalty=penalty), "plain", total=STEPS)
        for step in range(STEPS):
            t.step(step, RATE)
        live.append(t.method.metrics(t.adapters, t.engine)["live_pairs"])
    assert live[0] == 16 > live[1] > live[2]


def test_a_pair_with_a_gate_of_zero_is_not_exported(tmp_path):
    t = Trainee(METHOD, "plain", total=STEPS)
    for step in range(STEPS):
        t.step(step, RATE)
    live = [int(a.gate.count_nonzero()) for a in t.adapters]
    save_adapter(t.engine, t.adapters, method=METHOD, path=tmp_path, base_model_name_or_path="base")
    found = load_file(tmp_path / "adapter_model.safetensors")
    for a, count in zip(t.adapters, live, strict=True):
        b = found[f"base_model.model.{a.name}.lora_B.weight"]
        assert b.shape[1] == max(live) < 4 and int(b.any(0).sum()) == count
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(llama("fp32"), tmp_path)(input_ids=batch(99)).logits
    torch.testing.assert_close(adapted, t.logits(), rtol=0, atol=1e-4)


@pytest.mark.quick
def test_the_operator_of_the_authors_code_kills_twice_as_much():
    """Its three lines in place: shrink what is above, shrink what is below, zero what is small by now."""

    def theirs(g: Tensor, xi: float) -> Tensor:
        g = g.clone()
        g[g > xi] -= xi
        g[g < -xi] += xi
        g[g.abs() < xi] = 0
        return g

    g = torch.tensor([-0.25, -0.15, -0.05, 0.0, 0.05, 0.15, 0.19, 0.21])
    torch.testing.assert_close(theirs(g, 0.1), torch.tensor([-0.15, 0, 0, 0, 0, 0, 0, 0.11]))
    torch.testing.assert_close(
        torch.nn.functional.softshrink(g, 0.1), torch.tensor([-0.15, -0.05, 0, 0, 0, 0.05, 0.09, 0.11])
    )


@pytest.mark.quick
def test_settings():
    assert SoRA().rates((), 3, 12, float) == [3, 3] and SoRA(b_rate=4.0).rates((), 3, 12, float) == [3, 12, 3]
    assert SoRA(b_rate=4.0).logged_rate([3, 12, 3]) == 3 and SoRA().schedule(12) == ()
    for b_rate, groups in ((1.0, {"gate": 1}), (4.0, {"B": 1, "gate": 2})):
        t = Trainee(replace(METHOD, b_rate=b_rate), "plain")
        assert all(dict(a.groups) == groups for a in t.adapters)
        assert [group["penalty"] for group in t.engine.optimizer.param_groups] == [0.0] * (len(groups)) + [12.0]
    with pytest.raises(ValueError, match=r"method\.penalty must be at least 0, not -1"):
        SoRA(penalty=-1.0)
