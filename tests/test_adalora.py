"""AdaLoRA (https://arxiv.org/abs/2303.10512) against PEFT's layer and RankAllocator, and what differs from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairSettings
from llm_lowrank.adapters.exchange import Exchanged, measure_exchange
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.adalora import AdaLoRA, GatedAdapter, orthogonality_gradient, prune_
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models import checkpoint
from llm_lowrank.models.export import save_adapter
from tests import ranks
from tests.tiny import Trainee, batch, llama

MODULES = ["k_proj", "up_proj"]  # 14 x 42 and 43 x 42, twice each
STEPS, RATE = 10, 5e-2
# 16 pairs until step 2, 8 pairs from step 7
METHOD = AdaLoRA(rank=4, alpha=6, target_rank=2, interval=2, initial_share=0.2, final_share=0.3, target_modules=MODULES)
PRUNED = {4: 9, 6: 8, 7: 8}  # steps done -> pairs left; 8 + 8 (3 / 5)^3 = 9.7 and 8 + 8 (1 / 5)^3 = 8.1
ENGINES = [("plain", 1), ("plain", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]


def step_(t: Trainee, step: int, before: Callable[[], None] = lambda: None) -> Exchanged | None:
    t.forward_backward(step)
    before()
    t.update(step, RATE)
    if step + 1 not in t.method.schedule(STEPS):
        return None
    return measure_exchange(t.engine, lambda: t.method.exchange(t.adapters, t.engine, step + 1, t.total), True)


def gates(t: Trainee) -> Tensor:
    """(modules, r)"""
    return torch.stack([t.engine.whole(a.E).cpu() for a in t.adapters])


# --- against PEFT -----------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_the_layer_is_pefts():
    torch.manual_seed(3)
    model, x = nn.Sequential(nn.Linear(10, 7)), torch.randn(2, 5, 10)
    linear = nn.Linear(10, 7)
    linear.load_state_dict(model[0].state_dict())
    config = peft.AdaLoraConfig(init_r=3, lora_alpha=6, target_modules=["0"], total_step=9, lora_dropout=0.0)
    theirs = peft.get_peft_model(model, config)
    layer = theirs.base_model.model[0]
    layer.lora_E["default"].data = torch.randn(3, 1)
    ours = GatedAdapter("layer", linear, Dense(torch.float32), PairSettings(rank=3, scale=2.0))
    ours.A.data, ours.B.data = layer.lora_A["default"].data.clone(), layer.lora_B["default"].data.clone()
    ours.E.data = layer.lora_E["default"].data[:, 0].clone()
    y, wanted = ours(x), theirs(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)  # their scale is alpha / (r + 1e-5)
    g = torch.linspace(-1, 2, y.numel()).view(y.shape)
    y.backward(g)
    wanted.backward(g)
    for mine, other in ((ours.A, layer.lora_A), (ours.B, layer.lora_B), (ours.E, layer.lora_E)):
        torch.testing.assert_close(mine.grad, other["default"].grad.view(mine.shape), rtol=1e-4, atol=1e-5)
    start = ours.initial()
    assert not start["E"].any() and start["B"].std() == pytest.approx(0.02, rel=0.5)


class Mirror:
    """The parameters of all layers under PEFT's names, as its RankAllocator looks for them."""

    def __init__(self, t: Trainee) -> None:
        config = SimpleNamespace(beta1=0.85, beta2=0.85, target_r=2, tinit=2, tfinal=3, total_step=STEPS, deltaT=2)
        self.t, self.copies = t, {}
        self.copy()
        self.allocator = RankAllocator(self, config, "default")

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.copies.items())

    def copy(self) -> None:
        for i, a in enumerate(self.t.adapters):
            for letter in "ABE":
                p = getattr(a, letter)
                shape = (-1, 1) if letter == "E" else p.shape
                copy = nn.Parameter(p.detach().clone().view(shape))
                copy.grad = None if p.grad is None else p.grad.detach().clone().view(shape)
                self.copies[f"layer{i}.lora_{letter}.default"] = copy

    def look(self) -> None:
        self.copy()
        self.allocator.update_ipt(self)

    def mask(self, budget: int) -> Tensor:
        pattern = self.allocator.mask_to_budget(self, budget)
        return torch.tensor([pattern[f"layer{i}.lora_E.default"] for i in range(len(self.t.adapters))])


@pytest.mark.parametrize("regrow", [False, True])
def test_budget_scores_and_choice_are_pefts(regrow):
    t = Trainee(replace(METHOD, regrow=regrow, orthogonal=0.0), "plain", total=STEPS)
    mirror, seen = Mirror(t), {}
    for step in range(7):
        step_(t, step, mirror.look)
        budget, masking = mirror.allocator.budget_schedule(step + 1)
        assert step < 2 or t.method.budget(step + 1, STEPS, 16) == budget
        if step + 1 in t.method.schedule(STEPS):
            assert masking or step + 1 == 7  # which PEFT's model forces
            seen[step + 1] = budget
            live = gates(t) != 0
            assert torch.equal(live, mirror.mask(budget)) and int(live.sum()) == budget
    assert seen == PRUNED and len({int(row.sum()) for row in gates(t) != 0}) > 1, "modules differ"


def test_the_penalty_is_pefts():
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.norm(a @ a.T - torch.eye(4, dtype=torch.float64), p="fro").backward()
    torch.testing.assert_close(orthogonality_gradient(a.detach()), a.grad)
    idle = torch.cat([a.detach(), torch.zeros(1, 9, dtype=torch.float64)])
    found = orthogonality_gradient(idle)
    assert not found[4].any()
    torch.testing.assert_close(found[:4], a.grad)

    # its place in a step: while E is zero, A and B have no other gradient
    t = Trainee(METHOD, "plain", total=STEPS, optimization={"optim": "sgd"})
    start = t.values()
    t.step(0, RATE)
    for name, value in t.values().items():
        if not name.endswith(".E"):
            pull = METHOD.orthogonal / 8 * orthogonality_gradient(start[name] if name[-1] == "A" else start[name].T)
            torch.testing.assert_close(value - start[name], -RATE * (pull if name[-1] == "A" else pull.T))


# --- pruned pairs -----------------------------------------------------------------------------------------------------


def pruned(engine: str, dtype: str, regrow: bool) -> tuple[list[Tensor], list[tuple[int, Exchanged]], dict, dict]:
    optimization = dict(optim="adamw", weight_decay=0.1)
    t = Trainee(replace(METHOD, regrow=regrow), engine, dtype, total=STEPS, optimization=optimization)
    seen, events = [], []
    for step in range(STEPS):
        if (event := step_(t, step)) is not None:
            events.append((step + 1, event))
        seen.append(gates(t))
    return seen, events, t.values(), t.method.metrics(t.adapters, t.engine)


@pytest.mark.parametrize("engine, world", ENGINES)
def test_pruned_pairs_stay_pruned(engine, world):
    first = None
    for seen, events, values, metrics in ranks.run(
        world, pruned, engine, "nf4" if engine == "zero1" else "fp32", False
    ):
        live = [found != 0 for found in seen]
        assert [int(found.sum()) for found in live] == [16, 16, 16, 9, 9, 8, 8, 8, 8, 8]
        assert all((now <= before).all() for before, now in pairwise(live))
        assert [(step, event.pairs) for step, event in events] == [(4, 7), (6, 1)]
        assert all(event.meant and 0 < event.lost < 1 for _, event in events)
        names = [key[:-2] for key in values if key.endswith(".E")]
        for name, keep in zip(names, live[-1], strict=True):  # bitwise zero, under weight decay too
            assert torch.equal(values[f"{name}.A"].any(1), keep) and torch.equal(values[f"{name}.B"].any(0), keep)
        assert metrics["live_pairs"] == 8 and metrics["fewest_pairs"] <= 2 <= metrics["most_pairs"]
        first = first or (seen, values)
        assert torch.equal(seen[-1], first[0][-1]) and all(torch.equal(v, first[1][k]) for k, v in values.items())


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero2", 2)])
def test_as_published_they_come_back_at_the_next_step_until_the_last_pruning(engine, world):
    seen, *_ = ranks.run(world, pruned, engine, "fp32", True)[0]
    assert [int((found != 0).sum()) for found in seen] == [16, 16, 16, 9, 16, 8, 8, 8, 8, 8]
    back = seen[4][seen[3] == 0].abs().mean() / seen[4].abs().mean()
    assert back > 0.05, "not by rounding"


def test_the_idle_pairs_of_the_last_phase_are_a_gate_that_is_zeroed_after_each_step():
    method = replace(METHOD, regrow=True, orthogonal=0.0)
    ours, theirs = Trainee(method, "plain", total=STEPS), Trainee(method, "plain", total=STEPS)
    for step in range(STEPS):
        step_(ours, step)
        if step < 6:
            step_(theirs, step)
            continue
        theirs.step(step, RATE)
        if step == 6:
            keep = [row != 0 for row in gates(ours)]
        for a, row in zip(theirs.adapters, keep, strict=True):
            with theirs.engine.edit(a.E) as (e,):
                e.value[~row] = 0
    torch.testing.assert_close(ours.logits(), theirs.logits(), rtol=1e-6, atol=1e-6)
    assert torch.equal(gates(ours) != 0, gates(theirs) != 0)


def test_a_module_without_a_pair_trains_on_and_is_exported(tmp_path):
    t = Trainee(METHOD, "plain", total=STEPS)
    for step in range(3):
        t.step(step, RATE)
    gone, other = t.adapters[0], t.adapters[1]
    with t.engine.edit(gone.A, gone.B, gone.E) as slots:
        prune_(torch.arange(4), *slots, idle=True)
    with t.engine.edit(other.A, other.B, other.E) as slots:
        prune_(torch.tensor([1]), *slots, idle=True)
    t.step(3, RATE)
    assert not any(p.any() for p in (gone.A, gone.B, gone.E)) and other.E.count_nonzero() == 3
    save_adapter(t.engine, t.adapters, method=METHOD, path=tmp_path, base_model_name_or_path="base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert not found[f"base_model.model.{gone.name}.lora_B.weight"].any()
    with torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(llama("fp32"), tmp_path)(input_ids=batch(99)).logits
    torch.testing.assert_close(adapted, t.logits(), rtol=0, atol=1e-4)


# --- resume and settings ----------------------------------------------------------------------------------------------


def part(engine: str, folder: str, first: int, last: int, save: bool) -> dict[str, Tensor]:
    t = Trainee(METHOD, engine, "nf4", total=STEPS, resume_from=checkpoint.newest(Path(folder))[0] if first else None)
    for step in range(first, last):
        step_(t, step)
    if save:
        t.save(Path(folder), last)
    return t.values()


@pytest.mark.parametrize("at", [1, 3, 4, 5, 7, 8])  # in every phase, before, at and after a pruning
def test_a_resume_goes_on_bitwise(at, tmp_path):
    whole = part("plain", str(tmp_path), 0, STEPS, False)
    part("plain", str(tmp_path), 0, at, True)
    resumed = part("plain", str(tmp_path), at, STEPS, False)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("engine, world", ENGINES[3:])
def test_a_resume_on_other_engines_prunes_alike(engine, world, tmp_path):
    whole = part("plain", str(tmp_path), 0, STEPS, False)
    ranks.run(world, part, engine, str(tmp_path), 0, 5, True)
    resumed = part("plain", str(tmp_path), 5, STEPS, False)
    for name, value in whole.items():
        assert torch.equal(value != 0, resumed[name] != 0), name
        torch.testing.assert_close(resumed[name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.quick
def test_settings():
    assert AdaLoRA().schedule(12) == (8,) and AdaLoRA().schedule(100) == (20, 30, 40, 50, 60, 70)
    assert METHOD.schedule(STEPS) == tuple(PRUNED) and AdaLoRA(target_rank=12).schedule(12) == ()
    assert AdaLoRA(orthogonal=0.0).directs is False and AdaLoRA().directs and not LoRA().directs
    for wrong, message in (
        (dict(target_rank=13), r"method\.target_rank must be between 1 and method\.rank \(12\), not 13"),
        (dict(interval=0), r"method\.interval must be at least 1, not 0"),
        (dict(beta1=1.0), r"method\.beta1 must be in \[0, 1\), not 1\.0"),
        (dict(final_share=0.0), r"method\.final_share \(0\) above 0"),
        (dict(initial_share=0.7), r"both together below 1"),
        (dict(orthogonal=-1.0), r"method\.orthogonal must be at least 0, not -1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaLoRA(**wrong)
    with pytest.raises(ValueError, match="2 steps have no room for a pruning"):
        AdaLoRA().schedule(2)
