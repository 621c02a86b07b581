"""ReLoRA against its algorithm (https://arxiv.org/abs/2307.05695), written out again here, densely and in float64.

A story (steps, three restarts, of which the last finds a full bank) is told once per engine and destination, on all its
ranks; the tests look at what it saw.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from llm_lowrank.adapters.adapter import generator
from llm_lowrank.adapters.exchange import Exchanged
from llm_lowrank.codecs import Dense, Int8, Nf4
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.pairs import Change, Pairs
from llm_lowrank.numerics.schedule import Schedule
from llm_lowrank.run.messages import log_exchange
from llm_lowrank.run.metrics import Metrics
from tests import ranks
from tests.tiny import Trainee, batch, llama

MODULES = ["k_proj", "up_proj"]  # 14 x 42 and 43 x 42, twice each
RANK, S, PRUNE = 4, 1.5, 0.9
METHOD = ReLoRA(rank=RANK, alpha=6, target_modules=MODULES, interval=2, restart_warmup=1, prune_ratio=PRUNE)
STEPS, RESTARTS = 8, (2, 4, 6)
ENGINES = [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]
STORIES = [(engine, world, into) for engine, world in ENGINES for into in ("weight", "bank")]


def over(stories: list[tuple[str, int, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("story", stories, ids=["-".join(map(str, story)) for story in stories])


every_story = over(STORIES)
into_the_weight = over([story for story in STORIES if story[2] == "weight"])
into_the_bank = over([story for story in STORIES if story[2] == "bank"])


# --- a story ----------------------------------------------------------------------------------------------------------


@dataclass
class Moment:
    values: dict[str, Tensor]  # module.A, .B, .bank_A, .bank_B
    moments: dict[str, Tensor]  # module.A.exp_avg, ...
    weights: dict[str, Tensor]
    logits: Tensor

    @classmethod
    def now(cls, t: Trainee) -> Moment:
        weights = {a.name: t.engine.whole(a.weight).clone() for a in t.adapters}
        return cls(t.values(), t.moments(), weights, t.logits())

    def trained(self, name: str) -> Pairs:
        return Pairs(self.values[f"{name}.B"], self.values[f"{name}.A"])

    def bank(self, name: str) -> Pairs:
        return Pairs(self.values[f"{name}.bank_B"], self.values[f"{name}.bank_A"])

    def layer(self, name: str) -> Tensor:
        total = self.weights[name].double() + S * exact(self.trained(name))
        return total + S * exact(self.bank(name)) if f"{name}.bank_A" in self.values else total


@dataclass
class Story:
    original: dict[str, Tensor]  # W_0 by module
    start: Moment
    restarts: list[tuple[Moment, Moment]]  # before and after
    events: list[Exchanged]
    used: list[int]  # slots of the bank after every restart
    end: Moment
    losses: list[float]
    ledger: dict[str, list[Change]]


def tell(method: ReLoRA, engine: str, dtype: str = "fp32") -> Story:
    t = Trainee(method, engine, dtype, total=STEPS)
    start, restarts, events, used, losses = Moment.now(t), [], [], [], []
    for step in range(STEPS):
        losses.append(t.step(step))
        if step + 1 in method.schedule(STEPS):
            before = Moment.now(t)
            events.append(method.exchange(t.adapters, t.engine, step + 1, t.total))
            restarts.append((before, Moment.now(t)))
            used.append(int(t.adapters[0].memory.get("used", 0)))
    original = {a.name: t.original[f"{a.name}.weight"] for a in t.adapters}
    return Story(original, start, restarts, events, used, Moment.now(t), losses, {a.name: a.ledger for a in t.adapters})


@functools.cache
def stories(engine: str, world: int, into: str, dtype: str = "fp32", moments: str = "pruned") -> list[Story]:
    return ranks.run(world, tell, replace(METHOD, into=into, moments=moments), engine, dtype)


def exact(pairs: Change) -> Tensor:
    return pairs.pairs().to(dtype=torch.float64).product()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


def best(w: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank (Eckart-Young)."""
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


# --- a restart --------------------------------------------------------------------------------------------------------


@every_story
def test_a_restart_keeps_the_function(story):
    (told, *_), into = stories(*story), story[2]
    assert len(told.restarts) == len(told.events) == 3
    for number, ((before, after), event) in enumerate(zip(told.restarts, told.events, strict=True)):
        for name in told.original:
            if into == "bank" and number == 2:  # the bank was full: what compressing it took is all that changed
                taken = S * (exact(before.bank(name)) - best(exact(before.bank(name)), RANK))
                assert float((after.layer(name) - before.layer(name) + taken).norm()) <= 1e-5 * float(taken.norm()) > 0
            else:
                assert relative(after.layer(name), before.layer(name)) <= (1e-12 if into == "bank" else 1e-7), name
        if into == "weight" or number < 2:
            assert relative(after.logits, before.logits) <= 1e-6
            assert event.lost <= 1e-5  # the rounding of a float32 W, over an update of a hundredth of it
        assert event.drift <= 1e-6  # of the move itself
        assert (event.modules, event.pairs, event.into) == (4, 4 * RANK, into)


@pytest.mark.parametrize("into, bound", [("weight", 5e-3), ("bank", 1e-12)])
def test_into_a_bf16_weight_a_restart_rounds_and_into_the_bank_it_does_not(into, bound):
    told = stories("plain", 1, into, "bf16")[0]
    for (before, after), event in zip(told.restarts[:2], told.events, strict=False):
        for name in told.original:
            difference = relative(after.layer(name), before.layer(name))
            assert difference <= bound and (difference > 1e-5) == (into == "weight"), name
        assert (event.lost > 1e-3) == (into == "weight")


@every_story
def test_a_is_fresh_and_different_at_each_restart_and_in_each_module_and_b_is_zero(story):
    for told in stories(*story):
        seen = [told.start, *(after for _, after in told.restarts)]
        every = torch.stack([moment.values[f"{name}.A"] for moment in seen for name in told.original])  # (4 x 4, r, n)
        for one in range(len(every)):
            for other in range(one):
                assert (every[one] != every[other]).float().mean() > 0.99
        n = every.shape[2]
        assert every.abs().max() <= 1 / math.sqrt(n) and every.std() == pytest.approx(1 / math.sqrt(3 * n), rel=0.05)
        for moment in seen:
            assert not any(value.any() for key, value in moment.values.items() if key.endswith(".B"))
        for step, (_, after) in zip(RESTARTS, told.restarts, strict=True):
            for name in told.original:
                random = torch.empty(RANK, n).uniform_(
                    -1 / math.sqrt(n), 1 / math.sqrt(n), generator=generator(0, name, step)
                )
                assert torch.equal(after.values[f"{name}.A"], random)  # of (seed, name, step): the same after a resume


@into_the_weight
def test_w_and_its_ledger_equal_the_naive_merge(story):
    told, *others = stories(*story)
    for name, w in told.original.items():
        merged = w.double()
        for number, (before, after) in enumerate(told.restarts):
            merged = merged + S * exact(before.trained(name))
            assert relative(after.weights[name], merged) <= 1e-7, name
            assert relative(exact(told.ledger[name][number]), S * exact(before.trained(name))) <= 1e-6
        # nothing of the fresh pairs
        assert len(told.ledger[name]) == 3 and all(len(entry) == RANK for entry in told.ledger[name])
        assert relative(merged, w.double()) > 0.01
    assert not any(entries for other in others for entries in other.ledger.values())


@pytest.mark.parametrize("moments", ["pruned", "seeded", "zeroed"])
@over([("plain", 1, "weight"), ("plain", 1, "bank"), ("zero2", 2, "weight"), ("zero3", 3, "bank"), ("fsdp", 2, "bank")])
def test_moments_are_pruned_exactly_as_an_independent_oracle_says(story, moments):
    for told in stories(*story, "fp32", moments):
        for before, after in told.restarts:
            assert len(before.moments) == 2 * 2 * len(told.original) and before.moments.keys() == after.moments.keys()
            for name in told.original:
                for letter in "AB":
                    m, v = (before.moments[f"{name}.{letter}.{k}"] for k in ("exp_avg", "exp_avg_sq"))
                    assert m.any() and v.any()
                    for found, wanted in zip(
                        (after.moments[f"{name}.{letter}.{k}"] for k in ("exp_avg", "exp_avg_sq")),
                        renewed(m, v, moments),
                        strict=True,
                    ):
                        assert (
                            torch.equal(found, wanted)
                            if moments != "seeded"
                            else torch.allclose(found, wanted, rtol=1e-5, atol=0)
                        )


def renewed(m: Tensor, v: Tensor, moments: str = "pruned") -> tuple[Tensor, Tensor]:
    """The largest 1 - PRUNE of either moment; a first moment only where the second is left."""
    if moments != "pruned":
        return torch.zeros_like(m), torch.full_like(v, float(v.double().mean()) if moments == "seeded" else 0.0)

    def large(t: Tensor) -> Tensor:
        count = round((1 - PRUNE) * t.numel())
        return t.abs() >= t.abs().flatten().sort(descending=True).values[count - 1]

    return m * (large(m) & large(v)), v * large(v)


@every_story
def test_every_rank_holds_the_same(story):
    first, *others = stories(*story)
    assert len(others) == story[1] - 1
    for other in others:
        for mine, theirs in zip(
            [*sum(first.restarts, ()), first.end], [*sum(other.restarts, ()), other.end], strict=True
        ):
            for part in ("values", "moments", "weights"):
                one, two = getattr(mine, part), getattr(theirs, part)
                assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), part
        assert other.used == first.used and other.losses == first.losses


# --- the bank ---------------------------------------------------------------------------------------------------------


@into_the_bank
def test_the_bank_grows_slot_by_slot_and_is_compressed_when_it_is_full(story):
    for told in stories(*story):
        assert told.used == [4, 8, 8]
        for name, w in told.original.items():
            old = [before.trained(name) for before, _ in told.restarts]
            one, two, three = (after.bank(name) for _, after in told.restarts)
            assert len(one) == 2 * RANK and not one.B[:, 4:].any() and old[0].B.any(0).all()
            assert same(one.take(slice(0, 4)), old[0])
            assert same(two.take(slice(0, 4)), old[0]) and same(two.take(slice(4, 8)), old[1])
            assert same(three.take(slice(4, 8)), old[2])
            assert relative(exact(three.take(slice(0, 4))), best(exact(two), 4)) <= 1e-5
            for before, after in told.restarts:
                assert torch.equal(before.weights[name], after.weights[name]) and torch.equal(after.weights[name], w)
            assert not told.ledger[name]


def same(one: Pairs, two: Pairs) -> bool:
    return torch.equal(one.B, two.B) and torch.equal(one.A, two.A)


@into_the_bank
def test_the_error_of_compressing_equals_that_of_an_independent_svd_and_is_printed(story, tmp_path):
    for told in stories(*story):
        full = [exact(told.restarts[2][0].bank(name)) for name in told.original]
        error = max(float((bank - best(bank, RANK)).norm() / bank.norm()) for bank in full)
        assert [event.lost for event in told.events] == pytest.approx([0.0, 0.0, error], rel=1e-5) and error > 0.01
    with Metrics(tmp_path, "none", main=True) as metrics:
        lines = [log_exchange(metrics, step, event) for step, event in zip(RESTARTS, told.events, strict=True)]
    assert [f"compressing the bank took {error:.1e} of it" in line for line in lines] == [False, False, True]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["lost"] for record in records] == [event.lost for event in told.events]


def test_a_bank_has_room_in_proportion_to_the_rank_of_its_module():
    pattern = {"layers.1.self_attn.k_proj": 6, "up_proj": 2}
    t = Trainee(replace(METHOD, into="bank", rank_pattern=pattern), "plain", total=STEPS)
    assert [a.name for a in t.adapters] == [
        f"model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.k_proj", "mlp.up_proj")
    ]
    assert [(a.rank, len(a.bank_A)) for a in t.adapters] == [(4, 8), (2, 4), (6, 12), (2, 4)]
    for step in range(STEPS):
        t.step(step)
        if step + 1 in RESTARTS:
            assert t.method.exchange(t.adapters, t.engine, step + 1, t.total).pairs == 4 + 2 + 6 + 2
    assert [int(a.memory["used"]) for a in t.adapters] == [8, 4, 12, 4]
    method = replace(METHOD, bank_pairs=5)
    assert [method.bank_of(rank) for rank in (4, 2, 6, 1)] == [5, 3, 8, 2]  # one more than the rank, at least


def test_a_larger_bank_is_compressed_later():
    told = ranks.run(1, tell, replace(METHOD, into="bank", bank_pairs=12), "plain")[0]
    assert told.used == [4, 8, 12] and not any(event.lost for event in told.events)


# --- the run ----------------------------------------------------------------------------------------------------------


@over([story for story in STORIES if story[1] > 1])
def test_sharded_equals_one_process(story):
    found, wanted = stories(*story)[0], stories("plain", 1, story[2])[0]
    assert found.losses == pytest.approx(wanted.losses, rel=5e-6)
    for name in wanted.original:
        assert relative(found.end.layer(name), wanted.end.layer(name)) <= 1e-5, name
    for k, v in wanted.end.moments.items():
        assert relative(found.end.moments[k], v) <= 1e-3, k


def test_a_dense_relora_with_adamw_written_out_trains_alike():
    """W, A, B and Adam's moments of every module in float64, on the whole batch."""
    told, model = stories("plain", 1, "weight")[0], llama().double()
    W = {name: w.double() for name, w in told.original.items()}
    A = {name: told.start.values[f"{name}.A"].double() for name in W}
    B = {name: torch.zeros(len(w), RANK, dtype=torch.float64) for name, w in W.items()}
    moments = {(letter, name): (0.0, 0.0) for letter in "AB" for name in W}
    rate, b1, b2, eps, last = 1e-2, 0.9, 0.999, 1e-8, None
    for step in range(STEPS):
        leaves = {(letter, name): p[name].requires_grad_() for letter, p in (("A", A), ("B", B)) for name in W}
        tokens = batch(step)
        layers = {f"{name}.weight": W[name] + S * B[name] @ A[name] for name in W}
        logits = functional_call(model, layers, kwargs={"input_ids": tokens}).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert loss.item() == pytest.approx(told.losses[step], rel=1e-5)
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        warm = 1.0 if last is None else min(1.0, (step - last + 1) / METHOD.restart_warmup)
        for (letter, name), g in gradients.items():
            m, v = moments[letter, name]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            moments[letter, name] = m, v
            update = m / (1 - b1 ** (step + 1)) / ((v / (1 - b2 ** (step + 1))).sqrt() + eps)
            (A if letter == "A" else B)[name] = leaves[letter, name].detach() - rate * warm * update
        if step + 1 in RESTARTS:
            last, after = step + 1, told.restarts[RESTARTS.index(step + 1)][1]
            for name in W:
                W[name] = W[name] + S * B[name] @ A[name]
                A[name], B[name] = after.values[f"{name}.A"].double(), torch.zeros_like(B[name])
            moments = {key: renewed(m, v) for key, (m, v) in moments.items()}
    apart = sum(float((told.end.layer(name) - W[name] - S * B[name] @ A[name]).norm() ** 2) for name in W)
    moved = sum(float((told.end.layer(name) - w).norm() ** 2) for name, w in told.original.items())
    assert apart**0.5 <= 1e-3 * moved**0.5


def test_a_rank_that_made_other_pairs_ends_the_run():
    for message in ranks.run(2, other_pairs):
        assert message.startswith("RuntimeError: the fresh pairs differ between ranks"), message


def other_pairs() -> str:
    t = Trainee(METHOD, "plain", total=STEPS)
    t.step(0)
    t.adapters[0].seed += t.engine.rank
    return ranks.caught(lambda: t.method.exchange(t.adapters, t.engine, 2, t.total), RuntimeError)


@pytest.mark.parametrize("into, dtype", [("weight", "fp32"), ("bank", "fp32"), ("bank", "nf4")])
def test_the_export_is_over_the_untouched_base(into, dtype, tmp_path):
    t = Trainee(replace(METHOD, into=into), "plain", dtype, total=STEPS)
    for step in range(STEPS):
        t.step(step)
        if step + 1 in RESTARTS:
            t.method.exchange(t.adapters, t.engine, step + 1, t.total)
    saved = save_adapter(
        t.engine, t.adapters, method=t.method, path=tmp_path / "adapter", base_model_name_or_path="base"
    )
    # three restarts; a bank of 2 RANK
    assert saved is not None and saved.rank == (4 * RANK if into == "weight" else 3 * RANK)
    exported = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    logits, layers = t.probe()
    for a in t.adapters:
        b, a_ = (exported[f"base_model.model.{a.name}.lora_{letter}.weight"].double() for letter in "BA")
        stored = t.weights()[a.name].double() - sum(exact(entry) for entry in a.ledger)  # what encoding left of W_0
        assert relative(b @ a_, layers[a.name] - stored) <= 1e-5, a.name
    if dtype == "fp32":
        llama().save_pretrained(tmp_path / "base")
        merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
        through_peft = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        for model in (through_peft, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
            with torch.no_grad():
                assert (model.eval()(input_ids=batch(99)).logits - logits).abs().max() <= 1e-4


# --- when, and how fast -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "interval, warmup, total, restarts",
    [
        (2, 1, 8, (2, 4, 6)),
        (2, 0, 8, (2, 4, 6)),
        (2, 1, 7, (2, 4)),
        (2, 1, 4, (2,)),
        (10, 5, 36, (10, 20, 30)),
        (10, 5, 35, (10, 20)),
        (10, 9, 30, (10, 20)),
        (10, 0, 31, (10, 20, 30)),
    ],
)
def test_restarts_are_multiples_of_interval_that_leave_a_step_at_the_full_rate(interval, warmup, total, restarts):
    method = ReLoRA(interval=interval, restart_warmup=warmup)
    assert method.schedule(total) == restarts
    for restart in restarts:
        assert any(
            method.rates([], step, total, lambda step: 1.0) == [1.0]
            for step in range(restart + max(0, warmup - 1), total)
        )
    assert restarts[-1] + warmup < total <= restarts[-1] + interval + warmup


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_rates_equal_the_closed_form(warmup, shape):
    """rate(t) of the recipe, times (t - last restart + 1) / warmup where that is less than 1."""
    method, total = ReLoRA(interval=10, restart_warmup=warmup), 36
    schedule = Schedule(1e-3, total, warmup=3, shape=shape)
    curve = [schedule.rate(step) for step in range(total)]
    factor = [1.0] * 10 + ([min(1.0, (k + 1) / warmup) if warmup else 1.0 for k in range(10)] * 3)[: total - 10]
    found = [method.rates([], step, total, lambda step: curve[step]) for step in range(total)]
    assert found == [[pytest.approx(rate * f)] for rate, f in zip(curve, factor, strict=True)]
    if warmup == 4:
        assert [rate for (rate,) in found][10:14] == pytest.approx(
            [curve[10] / 4, curve[11] / 2, curve[12] * 3 / 4, curve[13]]
        )


def test_before_the_first_restart_it_trains_exactly_like_lora():
    common = dict(rank=RANK, alpha=6, target_modules=MODULES)
    runs = [Trainee(method, "plain", total=STEPS) for method in (LoRA(**common), METHOD)]
    losses = [[t.step(step) for step in range(2)] for t in runs]
    assert losses[0] == losses[1]
    one, two = (t.values() for t in runs)
    assert all(torch.equal(one[k], two[k]) for k in one)


# --- where to ---------------------------------------------------------------------------------------------------------


def test_auto_goes_into_a_float32_weight_and_beside_any_other():
    for dtype, banked in (("fp32", False), ("bf16", True), ("nf4", True), ("int8", True)):
        t = Trainee(METHOD, "plain", dtype, total=STEPS)
        assert isinstance(t.engine, Engine) and all((a.bank_A is not None) == banked for a in t.adapters)
        assert not any(p.any() for key, p in t.values().items() if "bank" in key)


@pytest.mark.parametrize("name, codec", [("nf4", Nf4()), ("int8", Int8())])
def test_a_coded_weight_is_refused_as_a_destination_with_what_to_do(name, codec):
    with pytest.raises(
        ValueError,
        match=rf"^method.into: weight cannot be used with codec: {name}: .*set method.into: bank \(or auto\)",
    ):
        Trainee(replace(METHOD, into="weight"), "plain", codec=codec)
    assert Trainee(replace(METHOD, into="weight"), "plain", codec=Dense(torch.bfloat16)).adapters[0].bank_A is None


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(interval=1), r"method.interval \(1\) must be more than method.restart_warmup \(1\)"),
        (dict(interval=0, restart_warmup=0), r"method.interval \(0\) must be more than"),
        (dict(restart_warmup=-1), "method.restart_warmup must be at least 0, not -1"),
        (dict(bank_pairs=4), r"method.bank_pairs \(4\) must be more than method.rank \(4\)"),
        (dict(prune_ratio=1.1), r"method.prune_ratio must be in \[0, 1\], not 1.1"),
        (dict(prune_ratio=-0.1), r"method.prune_ratio must be in \[0, 1\], not -0.1"),
        (dict(rank=0), "method.rank must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(METHOD, **change)


@pytest.mark.parametrize("total", [1, 1000, 1050])
def test_a_run_without_a_restart_is_refused_with_what_to_do(total):
    with pytest.raises(
        ValueError,
        match=f"leaves no restart in a run of {total} steps; lower them, train longer or set method.type: lora",
    ):
        ReLoRA().schedule(total)
    assert ReLoRA().schedule(1051) == (1000,)
