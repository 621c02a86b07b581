"""Flora (https://arxiv.org/abs/2402.03293) as settings of ReLoRA, against its algorithm on a dense W in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from llm_lowrank.methods.relora import ReLoRA, carry_first
from llm_lowrank.models import checkpoint
from tests import ranks
from tests.tiny import DIRECTIONS, Trainee, batch, llama

RANK, S, STEPS, RATE = 4, 1.5, 7, 0.3
METHOD = ReLoRA(
    rank=RANK,
    alpha=6,
    interval=2,
    restart_warmup=0,
    trains="B",
    moments="carried",
    target_modules=["k_proj", "up_proj"],  # 14 x 42 and 43 x 42, twice each
)
MOMENTUM = {"optim": "sgd_momentum", "betas": (0.9, 0.999)}


@pytest.mark.parametrize("into", ["weight", "bank"])
def test_momentum_is_compressed_by_random_projections_that_change(into):
    """M <- 0.9 M + G P^T,  W <- W - rate M P, and M <- M P_old P_new^T where P is drawn anew."""
    method = replace(METHOD, into=into, bank_pairs=12)
    t, model = Trainee(method, "plain", total=STEPS, optimization=MOMENTUM), llama().double()
    W = {a.name: t.original[f"{a.name}.weight"].double() for a in t.adapters}
    start = dict(W)
    M = {name: torch.zeros(len(w), RANK, dtype=torch.float64) for name, w in W.items()}
    n = 42
    unit = (3 * n / RANK) ** 0.5  # P = unit A; g_B = s G A^T, and W moves by s times what B does
    for step in range(STEPS):
        P = {a.name: unit * a.A.detach().double() for a in t.adapters}
        assert P[t.adapters[0].name].square().mean() == pytest.approx(1 / RANK, rel=0.2)
        leaves = {name: w.detach().requires_grad_() for name, w in W.items()}
        logits = functional_call(
            model, {f"{name}.weight": w for name, w in leaves.items()}, kwargs={"input_ids": batch(step)}
        ).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch(step)[:, 1:].flatten())
        assert t.step(step, RATE) == pytest.approx(loss.item(), rel=1e-4)
        for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            M[name] = 0.9 * M[name] + g @ P[name].T
            W[name] = W[name] - RATE * S**2 / unit**2 * M[name] @ P[name]
        if step + 1 in method.schedule(STEPS):
            method.exchange(t.adapters, t.engine, step + 1, t.total)
            for a in t.adapters:
                M[a.name] = M[a.name] @ P[a.name] @ (unit * a.A.detach().double()).T
    for name, layer in t.probe()[1].items():
        moved = (W[name] - start[name]).norm()
        assert float((layer - W[name]).norm() / moved) <= 1e-4 and moved > 0.01 * start[name].norm()


def test_over_random_projections_the_carried_moment_is_the_one_of_the_new_a():
    random = torch.Generator().manual_seed(3)

    def draw() -> Tensor:
        return torch.empty(8, 20, dtype=torch.float64).uniform_(-(20**-0.5), 20**-0.5, generator=random)

    gradient, new = torch.randn(5, 20, generator=random, dtype=torch.float64), draw()
    olds = [draw() for _ in range(3000)]
    mean = torch.stack([carry_first(gradient @ old.T, old, new) for old in olds]).mean(0)
    wanted = gradient @ new.T
    assert float((mean - wanted).norm() / wanted.norm()) < 0.1
    one = carry_first(gradient @ olds[0].T, olds[0], new)
    assert float(one.norm() / wanted.norm()) > 1.2, "one draw is noisy"


Part = tuple[list[tuple[dict[str, Tensor], ...]], dict[str, Tensor], dict[str, Tensor]]


def part(engine: str, dtype: str, folder: str = "", first: int = 0, last: int = STEPS, save: bool = False) -> Part:
    """Some steps with AdamW: values and moments around each exchange, and at the end."""
    resumed = checkpoint.newest(Path(folder))[0] if first else None
    t, restarts = Trainee(METHOD, engine, dtype, total=STEPS, resume_from=resumed), []
    for step in range(first, last):
        t.step(step)
        if step + 1 in METHOD.schedule(STEPS):
            before, logits = (t.values(), t.moments()), t.logits()
            METHOD.exchange(t.adapters, t.engine, step + 1, t.total)
            restarts.append((*before, t.values(), t.moments()))
            assert float((t.logits() - logits).norm() / logits.norm()) <= (1e-6 if step + 1 < 6 else 1)
    if save:
        t.save(Path(folder), last)
    return restarts, t.values(), t.moments()


@pytest.mark.parametrize("engine, world", [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)])
def test_b_alone_is_trained_and_its_moments_are_carried_over(engine, world, tmp_path):
    for restarts, _, moments in ranks.run(world, part, engine, "nf4", str(tmp_path), 0, 4, True):
        assert len(restarts) == 2 and len(moments) == 2 * 4 and not any(".A." in name for name in moments)
        for values, old, fresh, new in restarts:
            for name in (key[:-2] for key in fresh if key.endswith(".B")):
                assert not fresh[f"{name}.B"].any() and not torch.equal(fresh[f"{name}.A"], values[f"{name}.A"])
                first, second = (f"{name}.B.{kind}" for kind in ("exp_avg", "exp_avg_sq"))
                a, a_new = values[f"{name}.A"], fresh[f"{name}.A"]
                wanted = old[first] @ a @ a_new.T * 3 * 42 / RANK
                torch.testing.assert_close(new[first], wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
                torch.testing.assert_close(new[second], old[second].mean(1, keepdim=True).expand_as(old[second]))
    whole, resumed = part("plain", "nf4"), part("plain", "nf4", str(tmp_path), 4)
    for name, value in whole[1].items():
        torch.testing.assert_close(resumed[1][name], value, rtol=1e-2, atol=1e-3 * float(value.abs().max()))


def test_a_stays_as_it_was_drawn_until_the_next_exchange():
    t = Trainee(METHOD, "plain", total=STEPS)
    start = t.values()
    for step in range(2):
        t.step(step)
    for name, value in t.values().items():
        assert torch.equal(value, start[name]) == name.endswith("A"), name  # bank_A too, there is none here


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resume_goes_on_bitwise(at, tmp_path):
    part("plain", "fp32", str(tmp_path), 0, at, True)
    resumed, whole = part("plain", "fp32", str(tmp_path), at), part("plain", "fp32")
    for mine, other in zip(resumed[1:], whole[1:], strict=True):
        assert all(torch.equal(value, other[name]) for name, value in mine.items())


@pytest.mark.quick
def test_settings():
    with pytest.raises(ValueError, match=r"method\.moments: carried needs method\.trains: B.*set it"):
        replace(METHOD, trains="AB")
    with pytest.raises(ValueError, match=r"method\.b_rate .* does not train both"):
        Trainee(replace(METHOD, b_rate=4.0), "plain")
    with pytest.raises(ValueError, match=r"relora trains something else"):
        Trainee(replace(METHOD, direction=DIRECTIONS["riemannian"]), "plain")
