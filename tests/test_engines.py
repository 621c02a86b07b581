"""Every engine against one plain process: runs, gradients, steps, edits, clipping, and failures that all ranks hear of.

A story is told once per engine and world size (steps, edits of everything, more steps) and many tests look at it.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from llm_lowrank import engines
from llm_lowrank.adapters.adapter import Adapter, generator
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine, RankError, Slot
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.pairs import Pairs
from tests import ranks, tiny
from tests.tiny import Trainee, engine

RANK, BANK, SAMPLES = 3, 2, 12  # samples: over 3 ranks and 2 micro-batches there are 2 each
SHIPPED = Path(__file__).parents[1] / "ds_configs"

# name -> (engine, what its DeepSpeed section says beside the stage, or FSDP2's Sharding; a file of ds_configs/ stands
# for its section)
ENGINES: dict[str, tuple[str, Any]] = {
    **{name: (name, {}) for name in tiny.ENGINES},  # zero3: threshold 0, every parameter is sharded between uses
    "zero3-persisted": ("zero3", {"stage3_param_persistence_threshold": 10**6}),  # every parameter stays gathered
    "zero1-shipped": ("zero1", "zero1.json"),
    "zero2-shipped": ("zero2", "zero2.json"),
    "zero3-shipped": ("zero3", "zero3.json"),  # "auto": the adapters stay gathered, W does not
    "zero3-offload": ("zero3", "zero3_offload.json"),
    "zero2-offload": ("zero2", {"offload_optimizer": {"device": "cpu"}}),
    "fsdp-gathered": ("fsdp", {"reshard_after_forward": False}),
    "fsdp-offload": ("fsdp", {"cpu_offload": True}),
    "fsdp-hybrid": ("fsdp", {"shard_size": 1}),  # as many replicas as ranks
    "fsdp-one-shard": ("fsdp", {"shard_size": 3}),  # of 3 ranks: all share one copy
}
CORE = [
    ("plain", 2),
    ("zero1", 2),
    ("zero2", 2),
    ("zero2", 3),
    ("zero3", 2),
    ("zero3", 3),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp-hybrid", 2),
]
CORE += [(name, 2) for name in tiny.ENGINES if name not in dict(CORE)]
CASES = [
    ("plain", 1),
    *CORE,
    ("zero3", 1),
    ("zero3-persisted", 2),
    ("zero1-shipped", 2),
    ("zero2-shipped", 2),
    ("zero3-shipped", 2),
    ("zero3-offload", 2),
    ("zero2-offload", 2),
    ("fsdp", 1),
    ("fsdp-gathered", 2),
    ("fsdp-offload", 2),
    ("fsdp-hybrid", 3),
    ("fsdp-one-shard", 3),
]
every_engine = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
core_engines = pytest.mark.parametrize("case", CORE, ids=lambda case: f"{case[0]}-{case[1]}")


@dataclass(frozen=True)
class Banked(LoRA):
    """LoRA with room in the bank, so that frozen pairs can be edited too."""

    def bank(self, codec: Codec) -> int:
        return BANK


def trainee(name: str, **settings: Any) -> Trainee:
    engine_name, zero = ENGINES[name]
    if isinstance(zero, str):
        zero = {
            key: value
            for key, value in json.loads((SHIPPED / zero).read_text())["zero_optimization"].items()
            if key != "stage"
        }
    method = settings.pop("method", Banked(rank=RANK))
    return Trainee(method, engine_name, samples=SAMPLES, zero=zero, num_hidden_layers=1, **settings)


def divided(name: str) -> bool:
    """Whether W is cut into pieces that ranks hold alone."""
    return name.startswith(("zero3", "fsdp")) and name != "fsdp-hybrid"


def dyadic(*shape: int, seed: int) -> Tensor:
    """Sixteenths: their products and sums are exact, so that they do not depend on who multiplies how many rows."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float() / 16


def factors(adapters: list[Adapter]) -> dict[str, torch.nn.Parameter]:
    return {f"{a.name}.{n}": getattr(a, n) for a in adapters for n in ("A", "B")}


def edit_pairs(t: Trainee, adapter: Adapter) -> dict[str, Tensor]:
    """New values and both new moments for A (written into the slots) and B (new tensors in the slots); what was
    written.
    """
    written = {}
    with t.engine.edit(adapter.A, adapter.B) as slots:
        for name, slot in zip(("A", "B"), slots, strict=True):
            rng = generator(7, f"{adapter.name}.{name}")
            new = {"value": torch.randn(slot.value.shape, generator=rng) * 0.2}
            new["exp_avg"] = torch.randn(slot.value.shape, generator=rng) * 1e-3
            new["exp_avg_sq"] = torch.rand(slot.value.shape, generator=rng) * 1e-4 + 1e-6
            if name == "A":
                slot.value.copy_(new["value"])
                slot.moments["exp_avg"].copy_(new["exp_avg"]), slot.moments["exp_avg_sq"].copy_(new["exp_avg_sq"])
            else:
                slot.value, slot.moments = new["value"].clone(), {k: new[k].clone() for k in ("exp_avg", "exp_avg_sq")}
            written |= {f"{adapter.name}.{name}" + ("" if k == "value" else f".{k}"): v for k, v in new.items()}
    return written


def edit_bank(t: Trainee, adapter: Adapter) -> dict[str, Tensor]:
    written = {}
    with t.engine.edit(adapter.bank_A, adapter.bank_B) as slots:
        for name, slot in zip(("bank_A", "bank_B"), slots, strict=True):
            assert slot.moments == {} and not slot.value.any()
            slot.value.copy_(dyadic(*slot.value.shape, seed=len(name) + slot.value.shape[0]))
            written[f"{adapter.name}.{name}"] = slot.value.clone()
    return written


def tell(name: str, accumulation: int) -> dict[str, Any]:
    """The story, on one rank."""
    t = trainee(name, accumulation=accumulation)
    told: dict[str, Any] = {"original": t.original, "names": [a.name for a in t.adapters]}
    told["identity"] = [
        [(id(p), p.requires_grad, tuple(getattr(p, "ds_shape", p.shape))) for p in t.model.parameters()]
    ]
    told["whole"] = {n: t.engine.whole(p) for n, p in t.model.named_parameters()}
    told["fresh"] = {
        n: (t.engine.span(p).value.clone(), list(t.engine.span(p).moments)) for n, p in factors(t.adapters).items()
    }

    def snapshot(when: str) -> None:
        told[when] = {"values": t.values(), "moments": t.moments(), "weights": t.weights(), "logits": t.logits()}

    def move(step: int, learning_rate: float = 1e-2) -> float:
        t.forward_backward(step)
        return t.engine.step(learning_rate)

    told["norms"] = [move(0)]
    t.forward_backward(1)
    told["runs"] = {}
    for n, p in factors(t.adapters).items():
        mine = t.engine.span(p)
        moments = {k: v.clone() for k, v in mine.moments.items()}
        told["runs"][n] = (mine.start, mine.value.clone(), moments, t.engine.gradient(p).clone())
    told["norms"].append(t.engine.step(1e-2))
    snapshot("stepped")
    told["written"] = edit_pairs(t, t.adapters[0])
    snapshot("pairs edited")
    told["written"] |= edit_bank(t, t.adapters[1])
    snapshot("bank edited")
    left, right = dyadic(t.adapters[2].shape[0], 2, seed=1), dyadic(2, t.adapters[2].shape[1], seed=2)
    told["update"] = left @ right
    told["counts"] = t.engine.weight(t.adapters[2]).add_(Pairs(left, right))
    snapshot("weight edited")
    told["norms"] += [move(2), move(3)]
    snapshot("stepped on")
    move(4, learning_rate=0.0)
    snapshot("rate 0")
    told["identity"].append(
        [(id(p), p.requires_grad, tuple(getattr(p, "ds_shape", p.shape))) for p in t.model.parameters()]
    )
    return told


@functools.cache
def alone() -> dict[str, Any]:
    """The story of one plain process with all samples in one micro-batch: what every other one must equal."""
    return tell("plain", 1)


@functools.cache
def story(case: tuple[str, int], accumulation: int = 1) -> list[dict[str, Any]]:
    name, world = case
    return ranks.run(world, tell, name, accumulation)


def assembled(parts: list[tuple[int, Tensor]], like: Tensor) -> Tensor:
    """The whole from runs; asserts that they cover it once."""
    whole, covered = torch.zeros(like.numel()), torch.zeros(like.numel(), dtype=torch.long)
    for start, run in parts:
        assert run.ndim == 1
        whole[start : start + run.numel()] = run
        covered[start : start + run.numel()] += 1
    assert bool((covered == 1).all())
    return whole.view(like.shape)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Every tensor to `tolerance` of its largest entry."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        bound = tolerance * float(value.abs().max()) + 1e-12
        torch.testing.assert_close(found[name], value, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


# Ranks and micro-batches add the same float32 numbers in another order. Gradients differ by about sqrt(12 * 7 * 67) eps
# of their largest entry, 1e-5; Adam divides them by their own size, so entries of a small gradient pass on more of it.
GRADIENT, STEPPED = 3e-5, 2e-4


# ---- runs and gradients


@every_engine
def test_whole_is_every_parameter_as_it_was_handed_over(case):
    for rank in story(case):
        for name, value in rank["original"].items():
            if name in rank["whole"]:  # lm_head is tied
                assert torch.equal(rank["whole"][name], value), name
        assert len(rank["whole"].keys() - rank["original"].keys()) == 4 * len(rank["names"])  # A, B and the bank
        for name, value in alone()["whole"].items():
            assert torch.equal(rank["whole"][name], value), name


@every_engine
def test_before_the_first_step_there_are_values_and_no_moments(case):
    for rank in story(case):
        assert all(moments == [] for _, moments in rank["fresh"].values())
    assert sum(len(rank["fresh"]["model.layers.0.mlp.up_proj.A"][0]) for rank in story(case)) == RANK * 42


@every_engine
def test_runs_of_local_cover_every_trainable_exactly_once(case):
    for name, value in alone()["whole"].items():
        if name.endswith((".A", ".B")) and "bank" not in name:
            parts = [rank["runs"][name] for rank in story(case)]
            assembled([(start, run) for start, run, _, _ in parts], value)
            for _, run, moments, gradient in parts:
                assert [m.shape for m in moments.values()] == [run.shape] * 2 and gradient.shape == run.shape
                assert moments.keys() == {"exp_avg", "exp_avg_sq"}


def test_the_tiny_model_has_parameters_that_do_not_divide_by_the_number_of_ranks():
    frozen = [value.numel() for value in alone()["whole"].values()]
    trained = [value.numel() for _, value, _, _ in alone()["runs"].values()]
    for sizes, world in ((frozen, 3), (trained, 2)):  # a frozen one over 3, a trained one over 2; 43 x 3 = 129
        assert any(size % world for size in sizes)


@pytest.mark.parametrize("accumulation", [1, 2])
@core_engines
def test_gradient_assembled_over_ranks_is_that_of_a_single_process(case, accumulation):
    found = {}
    for name, (_, value, _, gradient) in alone()["runs"].items():
        parts = [(rank["runs"][name][0], rank["runs"][name][3]) for rank in story(case, accumulation)]
        found[name] = assembled(parts, value)
        assert float(gradient.abs().max()) > 1e-4
    close(found, {name: run[3] for name, run in alone()["runs"].items()}, GRADIENT)


@pytest.mark.parametrize("case", [case for case in CASES if case not in CORE], ids=lambda case: f"{case[0]}-{case[1]}")
def test_gradient_is_that_of_a_single_process_in_every_other_setting(case):
    found = {
        n: assembled([(rank["runs"][n][0], rank["runs"][n][3]) for rank in story(case)], run[1])
        for n, run in alone()["runs"].items()
    }
    close(found, {name: run[3] for name, run in alone()["runs"].items()}, GRADIENT)


@every_engine
def test_local_values_and_moments_are_the_runs_of_the_whole_ones(case):
    for name, (_, value, moments, _) in alone()["runs"].items():
        runs = [rank["runs"][name] for rank in story(case)]
        close({name: assembled([(run[0], run[1]) for run in runs], value)}, {name: value}, STEPPED)
        for key, moment in moments.items():
            close({name: assembled([(run[0], run[2][key]) for run in runs], value)}, {name: moment}, STEPPED)


@pytest.mark.parametrize("accumulation", [1, 2])
@core_engines
def test_steps_values_moments_norms_and_logits_are_those_of_a_single_process(case, accumulation):
    for rank in story(case, accumulation):
        close(rank["stepped"]["values"], alone()["stepped"]["values"], STEPPED)
        close(rank["stepped"]["moments"], alone()["stepped"]["moments"], STEPPED)
        close({"": rank["stepped"]["logits"]}, {"": alone()["stepped"]["logits"]}, STEPPED)
        assert rank["norms"] == pytest.approx(alone()["norms"], rel=STEPPED)


@every_engine
def test_a_step_with_rate_zero_moves_moments_only(case):
    for rank in story(case):
        before, after = rank["stepped on"], rank["rate 0"]
        assert all(torch.equal(after["values"][name], value) for name, value in before["values"].items())
        assert not any(torch.equal(after["moments"][name], value) for name, value in before["moments"].items())


# ---- edits


@every_engine
def test_an_edit_of_values_and_moments_is_read_back_and_nothing_else_changes(case):
    for rank in story(case):
        before, after, bank = rank["stepped"], rank["pairs edited"], rank["bank edited"]
        written = rank["written"]
        assert len(written) == 8  # A, B with two moments each, bank_A, bank_B
        for kind in ("values", "moments"):
            for name, value in after[kind].items():
                wanted = written[name] if name in written and "bank" not in name else before[kind][name]
                assert torch.equal(value, wanted), name
            for name, value in bank[kind].items():
                assert torch.equal(value, written.get(name, before[kind][name])), name
        assert all(torch.equal(bank["weights"][name], w) for name, w in before["weights"].items())


@every_engine
def test_the_forward_sees_an_edit_of_pairs_of_the_bank_and_of_the_weight(case):
    for rank in story(case):
        last = rank["stepped"]["logits"]
        for when in ("pairs edited", "bank edited", "weight edited"):
            logits, wanted = rank[when]["logits"], alone()[when]["logits"]
            close({when: logits}, {when: wanted}, STEPPED)
            # or the line above sees nothing
            assert float((logits - last).abs().max()) > 100 * STEPPED * float(wanted.abs().max()), when
            last = logits


@every_engine
def test_weight_add_changes_one_weight_by_exactly_what_was_asked(case):
    name = story(case)[0]["names"][2]
    for rank in story(case):
        for other, w in rank["bank edited"]["weights"].items():
            wanted = w + rank["update"] if other == name else w
            assert torch.equal(rank["weight edited"]["weights"][other], wanted), other
    # ranks that hold all of W count all of it each; those that share it count their own elements
    counts = [rank["counts"] for rank in story(case)]
    counts = sum(counts) if divided(case[0]) else counts[0]
    torch.testing.assert_close(counts, alone()["counts"], rtol=1e-6, atol=0)


@every_engine
def test_edits_survive_the_next_steps(case):
    for rank in story(case):
        for kind in ("values", "moments", "weights"):
            close(rank["stepped on"][kind], alone()["stepped on"][kind], STEPPED)
        close({"": rank["stepped on"]["logits"]}, {"": alone()["stepped on"]["logits"]}, STEPPED)
        assert rank["norms"] == pytest.approx(alone()["norms"], rel=STEPPED)
        for name in ("bank_A", "bank_B"):
            name = f"{rank['names'][1]}.{name}"
            assert torch.equal(rank["stepped on"]["values"][name], rank["written"][name])
        moved = rank["stepped on"]["values"][f"{rank['names'][0]}.A"] - rank["written"][f"{rank['names'][0]}.A"]
        assert 1e-3 < float(moved.abs().max()) < 0.1  # on from the edited value, two steps of about 1e-2


@every_engine
def test_identity_requires_grad_and_shape_of_every_parameter_survive(case):
    for rank in story(case):
        before, after = rank["identity"]
        assert before == after
        assert sum(grad for _, grad, _ in before) == 2 * len(rank["names"])


PUT = [
    ("plain", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3-persisted", 2),
    ("fsdp", 2),
    ("fsdp-gathered", 2),
    ("fsdp-offload", 2),
    ("fsdp-hybrid", 2),
]


def put_late(name: str) -> list[Tensor]:
    t = trainee(name)
    t.forward_backward(0)
    t.engine.step(1e-2)
    params = list(t.adapters[0].factors())
    slots = [t.engine.slot(p) for p in params]
    logits = [t.logits()]  # a persisted parameter is gathered again by this, and stays so
    for seed, (p, slot) in enumerate(zip(params, slots, strict=True)):
        slot.value = dyadic(*slot.value.shape, seed=seed)
        t.engine.put(p, slot)
    return [*logits, t.logits(), *(t.engine.whole(p) for p in params)]


@pytest.mark.parametrize("case", PUT, ids=lambda c: f"{c[0]}-{c[1]}")
def test_put_reaches_the_forward_whatever_ran_since_the_slot_was_read(case):
    before, after, *values = put_late("plain")
    assert float((after - before).abs().max()) > 0.1 * float(before.abs().max())
    for rank in ranks.run(case[1], put_late, case[0]):
        close({"": rank[0]}, {"": before}, STEPPED)
        close({"": rank[1]}, {"": after}, STEPPED)
        assert all(torch.equal(found, value) for found, value in zip(rank[2:], values, strict=True))


# ---- edits that must not pass silently


def forgetful(name: str, what: str) -> str:
    t = trainee(name)
    t.forward_backward(0)
    t.engine.step(1e-2)
    put, stale = t.engine.put, {p: t.engine.slot(p) for p in factors(t.adapters).values()}
    if what == "value":
        t.engine.put = lambda p, slot: None  # as GatheredParameters(modifier_rank=None) does
    else:
        t.engine.put = lambda p, slot: put(p, Slot(slot.value, stale[p].moments))
    try:
        # all, so that every rank holds some of it under ZeRO-1 and 2
        with t.engine.edit(*factors(t.adapters).values()) as slots:
            for slot in slots:
                slot.value.add_(1.0)
                slot.moments["exp_avg_sq"].add_(1.0)
    except AssertionError as error:
        return str(error)
    return "nothing was noticed"


@pytest.mark.parametrize(
    "what,message", [("value", "an edited master did not persist"), ("moments", "edited moments did not persist")]
)
@pytest.mark.parametrize(
    "case",
    [("plain", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2), ("fsdp-hybrid", 2)],
    ids=lambda case: f"{case[0]}-{case[1]}",
)
def test_an_edit_that_does_not_persist_is_noticed_on_every_rank(case, what, message):
    for found in ranks.run(case[1], forgetful, case[0], what):
        assert message in found


def misshapen(name: str) -> list[str]:
    t = trainee(name)
    t.forward_backward(0)
    t.engine.step(1e-2)
    found = []
    for what in ("value", "moments"):
        before = t.engine.whole(t.adapters[0].B)
        with pytest.raises(AssertionError), t.engine.edit(t.adapters[0].B) as (slot,):  # noqa: PT012 - it ends in it
            if what == "value":
                slot.value = slot.value[:, :1]  # would broadcast
            else:
                slot.moments["exp_avg"] = slot.moments["exp_avg"][:, :1]
        found.append(torch.equal(t.engine.whole(t.adapters[0].B), before))
    return found


@pytest.mark.parametrize(
    "case", [("plain", 1), ("zero2", 2), ("zero3", 2), ("fsdp", 2)], ids=lambda case: f"{case[0]}-{case[1]}"
)
def test_an_edit_may_not_change_a_shape(case):
    assert ranks.run(case[1], misshapen, case[0]) == [[True, True]] * case[1]


def coded(name: str) -> dict[str, Any]:
    t = trainee(name, dtype="bf16")
    dtypes = {n: p.dtype for n, p in t.model.named_parameters()}
    whole = {n: t.engine.whole(p) for n, p in t.model.named_parameters()}
    untouched = all(torch.equal(whole[n], v) for n, v in t.original.items() if n in whole)
    logits = [t.logits()]
    left, right = dyadic(t.adapters[2].shape[0], 2, seed=1), dyadic(2, t.adapters[2].shape[1], seed=2)
    counts = t.engine.weight(t.adapters[2]).add_(Pairs(left, right))
    logits.append(t.logits())
    return {"dtypes": dtypes, "untouched": untouched, "logits": logits, "counts": counts, "weights": t.weights()}


CODED = [
    ("zero1", 2),
    ("zero2", 3),
    ("zero3", 2),
    ("zero3-persisted", 2),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp-hybrid", 2),
    ("fsdp-offload", 2),
]


@pytest.mark.parametrize("case", CODED, ids=lambda c: f"{c[0]}-{c[1]}")
def test_a_bf16_backbone_is_not_cast_and_receives_the_same_rounded_update(case):
    single, found = coded("plain"), ranks.run(case[1], coded, case[0])
    for rank in found:
        assert rank["untouched"] and rank["dtypes"] == single["dtypes"]
        assert {dtype for n, dtype in rank["dtypes"].items() if n.endswith((".A", ".B", "_A", "_B"))} == {torch.float32}
        assert rank["dtypes"]["model.layers.0.mlp.up_proj.weight"] == torch.bfloat16
        # what is asked is exact and rounding is elementwise: bitwise the same whoever holds which elements
        assert all(torch.equal(rank["weights"][n], w) for n, w in single["weights"].items())
        for logits, wanted in zip(rank["logits"], single["logits"], strict=True):
            # a bf16 ulp of the largest
            torch.testing.assert_close(logits, wanted, rtol=0, atol=2**-7 * float(wanted.abs().max()))
    assert float((single["logits"][1] - single["logits"][0]).abs().max()) > 0.1 * float(single["logits"][0].abs().max())
    counts = sum(rank["counts"] for rank in found) if divided(case[0]) else found[0]["counts"]
    torch.testing.assert_close(counts, single["counts"], rtol=1e-6, atol=0)
    assert 0 < float(counts[1] / counts[0]) < 1e-2  # rounded, and measured


# ---- clipping and the optimizer's settings


def optimized(name: str, alpha: float, max_grad_norm: float, optimization: dict[str, Any]) -> dict[str, Any]:
    t = trainee(name, method=LoRA(rank=RANK, alpha=alpha), max_grad_norm=max_grad_norm, optimization=optimization)
    norms, gradients = [], []
    for step in range(2):
        t.forward_backward(step)
        gradients.append(
            {n: (t.engine.span(p).start, t.engine.gradient(p).clone()) for n, p in factors(t.adapters).items()}
        )
        norms.append(t.engine.step(1e-3))
    return {"norms": norms, "gradients": gradients, "values": t.values(), "moments": t.moments()}


def compare(
    case: tuple[str, int], alpha: float, max_grad_norm: float, optimization: dict[str, Any], tolerance: float
) -> dict[str, Any]:
    single = optimized("plain", alpha, max_grad_norm, optimization)
    found = ranks.run(case[1], optimized, case[0], alpha, max_grad_norm, optimization)
    for rank in found:
        assert rank["norms"] == pytest.approx(single["norms"], rel=tolerance)
        close(rank["values"], single["values"], tolerance)
        close(rank["moments"], single["moments"], tolerance)
    for step, wanted in enumerate(single["gradients"]):
        for name, (_, gradient) in wanted.items():
            whole = assembled([rank["gradients"][step][name] for rank in found], gradient)
            close({name: whole}, {name: gradient}, tolerance)
    return single


@core_engines
def test_nothing_is_clipped_unless_asked(case):
    # DeepSpeed clips at 1.0 by default: moments of gradients this large would be 20 times smaller
    single = compare(case, alpha=300.0, max_grad_norm=0.0, optimization={}, tolerance=1e-3)
    assert single["norms"][0] > 20


@core_engines
def test_clipping_is_by_the_norm_over_all_ranks_and_comes_after_the_gradient_is_observed(case):
    free = optimized("plain", RANK, 0.0, {})
    single = compare(case, alpha=RANK, max_grad_norm=0.05, optimization={}, tolerance=1e-3)
    assert single["norms"][0] == free["norms"][0] > 0.2  # told before clipping
    # and so is `gradient`
    assert all(torch.equal(g[1], free["gradients"][0][n][1]) for n, g in single["gradients"][0].items())
    # both steps have norm 0.05 afterwards: |exp_avg| is at most 0.05 (0.9 * 0.1 + 0.1)
    total = sum(float(v.double().square().sum()) for n, v in single["moments"].items() if n.endswith("exp_avg")) ** 0.5
    assert 0.02 * 0.19 < total <= 0.05 * 0.19 * (1 + 1e-4)


@core_engines
def test_a_bound_above_the_norm_changes_nothing(case):
    single = compare(case, alpha=RANK, max_grad_norm=1e3, optimization={}, tolerance=1e-3)
    assert single["norms"] == optimized("plain", RANK, 0.0, {})["norms"]


@core_engines
def test_betas_eps_and_weight_decay_reach_the_optimizer(case):
    settings = dict(betas=(0.7, 0.9), eps=1e-3, weight_decay=5.0)
    single = compare(case, alpha=RANK, max_grad_norm=0.0, optimization=settings, tolerance=1e-3)
    usual = optimized("plain", RANK, 0.0, {})
    for kind in ("values", "moments"):
        assert all(not torch.allclose(v, usual[kind][n], rtol=5e-3, atol=0) for n, v in single[kind].items())


def hasty(name: str) -> str:
    t = trainee(name, accumulation=2)
    t.engine.backward(t.wrapped(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.sum())
    try:
        t.engine.step(1e-2)
    except AssertionError:
        return "refused"
    return "stepped"


@core_engines
def test_a_step_before_the_last_micro_batch_is_refused(case):
    assert ranks.run(case[1], hasty, case[0]) == ["refused"] * case[1]


# ---- FSDP2: what a rank holds; its other hazards are in test_fsdp.py


def shares(name: str) -> dict[str, tuple[int, int, Tensor]]:
    t = trainee(name, method=LoRA(rank=RANK))
    t.step(0)
    t.logits()
    found = {}
    for n, p in t.model.named_parameters():
        local = p.detach().to_local()
        moments = [
            v.to_local().numel() for k, v in t.engine.optimizer.state.get(p, {}).items() if k.startswith("exp_avg")
        ]
        assert all(size == local.numel() for size in moments) and len(moments) == 2 * p.requires_grad
        found[n] = (len(p), local.untyped_storage().nbytes() // p.element_size(), local)
    return found


@pytest.mark.parametrize(
    "case", [("fsdp", 1), ("fsdp", 2), ("fsdp", 3), ("fsdp-gathered", 2)], ids=lambda c: f"{c[0]}-{c[1]}"
)
def test_fsdp_holds_its_rows_of_every_parameter_and_of_its_moments_and_nothing_else(case):
    name, world = case
    everyone = ranks.run(world, shares, name)
    for n, (rows, _, first) in everyone[0].items():
        each = -(-rows // world)  # of dim 0; the last ranks may hold fewer
        assert [len(rank[n][2]) for rank in everyone] == [max(0, min(each, rows - k * each)) for k in range(world)], n
        for _, stored, local in (rank[n] for rank in everyone):
            assert stored <= each * (first.numel() // max(1, len(first))), n
            assert stored >= local.numel()


@pytest.mark.parametrize("world", [2, 3])
def test_replicas_of_a_hybrid_run_stay_bitwise_the_same(world):
    first, *others = ranks.run(world, shares, "fsdp-hybrid")
    for other in others:
        assert first.keys() == other.keys() and all(
            torch.equal(local, other[n][2]) for n, (_, _, local) in first.items()
        )
    assert all(len(local) == rows for rows, _, local in first.values())


def while_gathered() -> list[str]:
    """A forward that a backward will follow leaves the root gathered: nothing may be read or written then."""
    t = trainee("fsdp", method=LoRA(rank=RANK))
    t.wrapped(input_ids=torch.ones(1, 4, dtype=torch.long))
    norm = t.model.model.norm.weight
    return [caught(functools.partial(call, norm))[1] for call in (t.engine.whole, t.engine.span, t.engine.slot)]


def test_fsdp_refuses_to_look_at_parameters_that_are_still_gathered():
    for messages in ranks.run(2, while_gathered):
        assert messages == ["the parameters of this layer are still gathered"] * 3


# ---- what all ranks do together


def caught(call) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def still_together(e: Engine) -> bool:
    return e.sum(torch.ones(2)).tolist() == [e.world] * 2


def broadcasting(source: int) -> Any:
    e, calls = engine("plain"), []

    def compute() -> list[Tensor]:
        calls.append(e.rank)
        who = torch.full((2,), e.rank, dtype=torch.bfloat16)
        return [torch.arange(6.0).view(2, 3).T, torch.tensor(3, dtype=torch.int64), torch.zeros(0, 4), who]

    traffic = e.traffic
    return e.broadcast(compute, source), calls, e.traffic - traffic


@pytest.mark.parametrize("world,source", [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_broadcast_computes_on_one_rank_and_gives_bitwise_the_same_to_all(world, source):
    for rank, (tensors, calls, traffic) in enumerate(ranks.run(world, broadcasting, source)):
        assert calls == ([source] if rank == source else [])
        assert torch.equal(tensors[0], torch.arange(6.0).view(2, 3).T)
        assert tensors[1].shape == () and tensors[1].dtype == torch.int64 and tensors[1] == 3
        assert tensors[2].shape == (0, 4)
        assert tensors[3].dtype == torch.bfloat16 and tensors[3].tolist() == [source] * 2
        assert traffic == (0 if world == 1 else 24 + 8 + 0 + 4)


def failing_broadcast(source: int) -> Any:
    e = engine("plain")

    def compute() -> list[Tensor]:
        raise ValueError("no such directions")

    return caught(lambda: e.broadcast(compute, source)), still_together(e)


@pytest.mark.parametrize("world,source", [(1, 0), (2, 0), (3, 1)])
def test_broadcast_raises_everywhere_when_computing_fails(world, source):
    for rank, (error, together) in enumerate(ranks.run(world, failing_broadcast, source)):
        theirs = ("RankError", f"rank {source}: ValueError: no such directions")
        assert error == (("ValueError", "no such directions") if rank == source else theirs)
        assert together


def comparing(kind: str) -> Any:
    e = engine("plain")
    a, b = torch.arange(6.0).view(2, 3).T, torch.tensor([1, 2])  # not contiguous
    if kind == "last bit" and e.rank == e.world - 1:
        a = torch.nextafter(a, torch.tensor(9.0))
    if kind == "sign of zero" and e.rank == 0:
        a[0, 0] = -0.0
    if kind == "second" and e.rank == 0:
        b = b + 1
    return caught(lambda: e.same("the exchanged pairs", a, b)), still_together(e)


@pytest.mark.parametrize(
    "world,kind",
    [(1, "equal"), (2, "equal"), (3, "equal"), (2, "last bit"), (3, "last bit"), (2, "second"), (2, "sign of zero")],
)
def test_same_raises_on_every_rank_when_one_bit_differs(world, kind):
    for (error, message), together in ranks.run(world, comparing, kind):
        if kind == "equal":
            assert error == ""
        else:
            assert error == "RuntimeError" and message.startswith("the exchanged pairs differ between ranks")
        assert together


def working(failures: dict[int, str]) -> Any:
    e, reached = engine("plain"), []
    kinds = {
        "value": ValueError("no column 'prompt'"),
        "key": KeyError("lost"),
        "file": FileNotFoundError(2, "No such file", "x.json"),
    }

    def work() -> None:
        with e.together():
            if e.rank in failures:
                raise kinds[failures[e.rank]]
            reached.append(e.rank)

    return caught(work), reached, still_together(e)


@pytest.mark.parametrize(
    "world,failures,first",
    [
        (3, {}, None),
        (1, {0: "value"}, "no column 'prompt'"),
        (2, {0: "value"}, "no column 'prompt'"),
        (3, {1: "value"}, "no column 'prompt'"),
        (3, {2: "key"}, "KeyError: 'lost'"),  # an error that is not the user's keeps its name
        (2, {1: "file"}, "[Errno 2] No such file: 'x.json'"),
        (3, {1: "value", 2: "key"}, "no column 'prompt'"),
    ],
    ids=str,
)
def test_together_raises_on_all_ranks_with_the_message_of_the_first_that_failed(world, failures, first):
    own = {
        "value": ("ValueError", "no column 'prompt'"),
        "key": ("KeyError", "'lost'"),
        "file": ("FileNotFoundError", first),
    }
    for rank, (error, reached, together) in enumerate(ranks.run(world, working, failures)):
        assert reached == ([] if rank in failures else [rank])
        if not failures:
            assert error == ("", "")
        elif rank == min(failures):
            assert error == own[failures[rank]]
        else:
            assert error == ("RankError", f"rank {min(failures)}: {first}")
        assert together


def summing() -> Any:
    e = engine("plain")
    mine, before = torch.tensor([1.0, 10.0]) * (e.rank + 1), e.traffic
    total = e.sum(mine)
    return total is mine, total, e.traffic - before, e.gather((e.rank, "x")), (e.rank, e.world, e.main)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_sum_is_over_ranks_and_in_place_and_gather_keeps_the_order(world):
    for rank, (in_place, total, traffic, everyone, who) in enumerate(ranks.run(world, summing)):
        n = world * (world + 1) / 2
        assert in_place and total.tolist() == [n, 10 * n]
        assert traffic == (8 if world > 1 else 0)
        assert everyone == [(r, "x") for r in range(world)] and who == (rank, world, rank == 0)


def test_every_engine_of_the_table_is_a_choice_of_the_recipe_and_is_tested():
    assert tuple(engines.ENGINES) == get_args(engines.EngineName)
    assert {kind for kind, _ in tiny.ENGINES.values()} == set(engines.ENGINES)
    assert {ENGINES[name][0] for name, _ in CASES} == set(tiny.ENGINES)


def test_rank_error_is_a_runtime_error():
    assert issubclass(RankError, RuntimeError)  # caught where other failures of a run are
