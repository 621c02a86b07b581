"""PeriodicLoRA (https://arxiv.org/abs/2402.16141) against its recursion, written out densely in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llm_lowrank.adapters.exchange import Exchanged
from llm_lowrank.adapters.method import Method
from llm_lowrank.methods.plora import PLoRA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.models import checkpoint
from tests import ranks
from tests.tiny import Trainee

SETTINGS = dict(rank=4, alpha=6, target_modules=["k_proj", "up_proj"])  # 14 x 42 and 43 x 42, twice each
S, SHARE, STEPS, UNLOADS = 1.5, 0.3, 7, (2, 4, 6)
METHOD = PLoRA(interval=2, share=SHARE, **SETTINGS)
ENGINES = [("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]
Part = tuple[list[tuple[dict[str, Tensor], dict[str, Tensor], Exchanged]], dict[str, Tensor], dict[str, Tensor]]


def part(
    method: Method, engine: str, dtype: str, folder: str = "", first: int = 0, last: int = STEPS, save: bool = False
) -> Part:
    """Some steps: the values before and after every unload with its report, the values at the end, and every W."""
    resumed = checkpoint.newest(Path(folder))[0] if first else None
    t, unloads = Trainee(method, engine, dtype, total=STEPS, resume_from=resumed), []
    for step in range(first, last):
        t.step(step)
        if step + 1 in method.schedule(STEPS):
            before, logits = t.values(), t.logits()
            event = method.exchange(t.adapters, t.engine, step + 1, t.total)
            assert event is not None
            unloads.append((before, t.values(), event))
            if dtype != "bf16" and event.lost <= 1e-4:  # otherwise a full bank was compressed
                assert float((t.logits() - logits).norm() / logits.norm()) <= 1e-6
    if save:
        t.save(Path(folder), last)
    return unloads, t.values(), t.weights()


def equal(one: Part, two: Part) -> bool:
    return all(
        mine.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in mine.items())
        for mine, other in zip(one[1:], two[1:], strict=True)
    )


def product(values: dict[str, Tensor], name: str, bank: str = "") -> Tensor:
    return S * values[f"{name}.{bank}B"].double() @ values[f"{name}.{bank}A"].double()


# --- an unload --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine, world, into",
    [
        ("plain", 1, "weight"),
        ("plain", 1, "bank"),
        ("plain", 2, "weight"),
        ("zero2", 2, "weight"),
        ("zero3", 3, "bank"),
        ("fsdp", 2, "weight"),
    ],
)
def test_w_receives_the_share_and_the_rest_stays_trained(engine, world, into):
    method = replace(METHOD, into=into, bank_pairs=12 if into == "bank" else None)
    original = Trainee(method, "plain").weights()
    for unloads, end, weights in ranks.run(world, part, method, engine, "fp32"):
        assert len(unloads) == len(UNLOADS)
        for name, w in original.items():
            dense = torch.zeros_like(w, dtype=torch.float64)  # the sum of the shares
            for before, after, event in unloads:
                dense = dense + SHARE * product(before, name)
                for letter in "AB":
                    shrunk = before[f"{name}.{letter}"].double() * math.sqrt(1 - SHARE)
                    torch.testing.assert_close(after[f"{name}.{letter}"].double(), shrunk, rtol=1e-6, atol=0)
                assert event.lost <= 1e-4 and event.drift <= 1e-6 and event.pairs == 16 and event.into == into
            found = product(end, name, "bank_") if into == "bank" else weights[name].double() - w.double()
            assert float((found - dense).norm() / dense.norm()) <= 1e-4 and dense.norm() > 1e-3 * w.norm()
            assert torch.equal(weights[name], w) == (into == "bank")


def test_a_bank_of_the_same_pairs_is_compressed_with_little_loss():
    """The shares of pairs that moved a little have nearly the same directions, so that few pairs hold them all."""
    unloads, *_ = part(replace(METHOD, into="bank", bank_pairs=8), "plain", "nf4")
    assert [event.lost > 0 for _, _, event in unloads] == [False, False, True] and unloads[2][2].lost < 0.05


def test_a_bf16_weight_rounds_most_of_a_small_share_away():
    method = replace(METHOD, share=0.1, into="weight")
    lost = [event.lost for _, _, event in part(method, "plain", "bf16")[0]]
    assert min(lost) > 0.1, lost
    assert all(
        event.into == "bank" and not event.lost
        for *_, event in part(replace(method, into="auto"), "plain", "bf16")[0][:2]
    )


def test_gradients_shrink_with_the_factors_and_the_moments_follow():
    t = Trainee(METHOD, "plain", total=STEPS)
    for step in range(2):
        t.step(step)

    def gradients() -> list[Tensor]:
        t.forward_backward(5)
        found = [t.engine.gradient(p).clone() for a in t.adapters for p in (a.A, a.B)]
        t.engine.forget()
        return found

    before, moments, rest = gradients(), t.moments(), math.sqrt(1 - SHARE)
    METHOD.exchange(t.adapters, t.engine, 2, t.total)
    for old, new in zip(before, gradients(), strict=True):
        torch.testing.assert_close(new, rest * old, rtol=1e-4, atol=1e-6)
    for name, moment in t.moments().items():
        torch.testing.assert_close(moment, moments[name] * (rest**2 if name.endswith("_sq") else rest))


@pytest.mark.parametrize("dtype", ["fp32", "nf4"])
def test_a_share_of_one_is_relora_bitwise(dtype):
    settings = dict(interval=2, moments="seeded", **SETTINGS)
    relora = ReLoRA(restart_warmup=0, **settings)
    assert equal(part(PLoRA(share=1.0, **settings), "plain", dtype), part(relora, "plain", dtype))


# --- resume and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 2, 3, 4])  # before, at and after an unload
def test_a_resume_goes_on_bitwise(at, tmp_path):
    dtype = "fp32" if at % 2 else "nf4"
    part(METHOD, "plain", dtype, str(tmp_path), 0, at, True)
    assert equal(part(METHOD, "plain", dtype, str(tmp_path), at), part(METHOD, "plain", dtype))


@pytest.mark.parametrize("engine, world", ENGINES)
def test_a_resume_on_other_engines_unloads_alike(engine, world, tmp_path):
    whole = part(METHOD, "plain", "nf4")
    ranks.run(world, part, METHOD, engine, "nf4", str(tmp_path), 0, 4, True)
    resumed = part(METHOD, "plain", "nf4", str(tmp_path), 4)
    for name, value in whole[1].items():
        torch.testing.assert_close(resumed[1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.quick
def test_settings():
    assert PLoRA(interval=5).schedule(12) == (5, 10) and PLoRA(interval=6).schedule(12) == (6,)
    for wrong, message in (
        (dict(interval=0), r"method\.interval must be at least 1, not 0"),
        (dict(share=0.0), r"method\.share must be above 0 and at most 1, not 0; without an unload, take type: lora"),
        (dict(share=1.5), r"method\.share must be above 0 and at most 1, not 1\.5"),
        (dict(share=1.0), r"method\.moments: kept is for pairs of which a share stays.*set method\.moments: seeded"),
    ):
        with pytest.raises(ValueError, match=message):
            PLoRA(**wrong)
    with pytest.raises(ValueError, match=r"method\.interval \(250\) leaves no unload in a run of 12 steps; lower it"):
        PLoRA().schedule(12)
