"""SRLoRA against its equations (https://arxiv.org/abs/2505.12433), each derived again here, densely and in float64.

A story (start, steps, two switches) is told once per engine and destination, on all its ranks; the tests look at what
it saw.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import as_pair_adapters
from llm_lowrank.adapters.exchange import Exchanged, measure_exchange
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense, Int8, Nf4
from llm_lowrank.engines.base import Engine, Optimization
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.loading import Loaded
from llm_lowrank.numerics.pairs import Pairs
from llm_lowrank.run.dry_run import describe
from llm_lowrank.run.recipe import parse
from tests import ranks
from tests.test_runs import place, settings  # noqa: F401 - place is a fixture
from tests.tiny import Trainee

MODULES = ["k_proj", "up_proj"]  # 14 x 42 and 43 x 42, twice each
# s = 1.5, r' = 2
METHOD = SRLoRA(rank=4, alpha=6, target_rank=8, gamma=0.5, target_modules=MODULES, svd_cache="", svd_exact=True)
STEPS, SWITCHES = 5, (2, 4)  # two windows of scores, of two steps each, and a step after the last switch
ENGINES = [
    ("plain", 1),
    ("plain", 2),
    ("zero2", 2),
    ("zero2", 3),
    ("zero3", 2),
    ("zero3", 3),
    ("fsdp", 2),
    ("fsdp", 3),
    ("fsdp-hybrid", 2),
]
ZERO = {"fsdp-hybrid": {"shard_size": 1}}  # two replicas
STORIES = [(engine, world, into) for engine, world in ENGINES for into in ("weight", "bank")]
A_FEW = [  # an engine of each kind
    ("plain", 1, "weight"),
    ("plain", 1, "bank"),
    ("zero2", 3, "weight"),
    ("zero3", 2, "bank"),
    ("fsdp", 3, "weight"),
    ("fsdp", 2, "bank"),
]


def over(stories: list[tuple[str, int, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("story", stories, ids=["-".join(map(str, story)) for story in stories])


every_story, one_of_a_kind = over(STORIES), over(A_FEW)


def started(method: PiSSA, engine: str, dtype: str = "fp32", **settings: object) -> Trainee:
    return Trainee(method, engine.partition("-")[0], dtype, zero=ZERO.get(engine), **settings)


# --- a story ----------------------------------------------------------------------------------------------------------


@dataclass
class Moment:
    values: dict[str, Tensor]  # module.A, .B, .bank_A, .bank_B, as the forward sees them
    masters: dict[str, Tensor]  # module.A, .B: what the optimizer steps
    moments: dict[str, Tensor]  # module.A.exp_avg, ...
    weights: dict[str, Tensor]
    logits: Tensor
    memory: dict[str, dict[str, Tensor]]

    @classmethod
    def now(cls, t: Trainee) -> Moment:
        masters = {}
        for a in t.adapters:
            for name in ("A", "B"):
                p = getattr(a, name)
                run, whole = t.engine.span(p), torch.zeros(a.rank * a.shape[name == "A"])
                whole[run.start : run.start + run.value.numel()] = run.value
                masters[f"{a.name}.{name}"] = t.engine.sum(whole).view(t.engine.whole(p).shape)
        weights = {a.name: t.engine.whole(a.weight).clone() for a in t.adapters}
        memory = {a.name: {k: v.clone() for k, v in a.memory.items()} for a in t.adapters}
        return cls(t.values(), masters, t.moments(), weights, t.logits(), memory)

    def layer(self, name: str, scale: float) -> Tensor:
        total = self.weights[name].double()
        for b, a in (("B", "A"), ("bank_B", "bank_A")):
            if f"{name}.{a}" in self.values:
                total = total + scale * self.values[f"{name}.{b}"].double() @ self.values[f"{name}.{a}"].double()
        return total


@dataclass
class Story:
    original: dict[str, Tensor]  # W_0 by module
    loaded: Loaded
    start: Moment
    switches: list[tuple[Moment, Moment]]  # before and after
    events: list[Exchanged]
    end: Moment
    losses: list[float]
    runs: list[dict[str, tuple[int, Tensor, Tensor]]]  # per step, module.A -> this rank's (start, w, g)


def tell(method: SRLoRA, engine: str, dtype: str = "fp32", **settings: object) -> Story:
    t = started(method, engine, dtype, **settings)
    story = Story(
        {a.name: t.original[f"{a.name}.weight"] for a in t.adapters},
        t.loaded,
        Moment.now(t),
        [],
        [],
        Moment.now(t),
        [],
        [],
    )
    for step in range(STEPS):
        loss = t.forward_backward(step)
        story.losses.append(float(t.engine.sum(torch.tensor(loss))))
        seen = {}
        for a in t.adapters:
            for name in ("A", "B"):
                p = getattr(a, name)
                seen[f"{a.name}.{name}"] = (
                    t.engine.span(p).start,
                    t.engine.span(p).value.clone(),
                    t.engine.gradient(p).clone(),
                )
        story.runs.append(seen)
        method.observe(t.adapters, t.engine)
        t.engine.step(1e-2)
        if step + 1 in SWITCHES:
            before = Moment.now(t)
            story.events.append(
                measure_exchange(t.engine, functools.partial(method.exchange, t.adapters, t.engine, step + 1, t.total))
            )
            story.switches.append((before, Moment.now(t)))
    story.end = Moment.now(t)
    return story


@functools.cache
def stories(engine: str, world: int, into: str, dtype: str = "fp32", moments: str = "seeded") -> list[Story]:
    return ranks.run(world, tell, replace(METHOD, into=into, moments=moments), engine, dtype)


def chosen(before: Moment, after: Moment, name: str) -> list[int]:
    """K: the rows of A that a switch changed."""
    return (before.values[f"{name}.A"] != after.values[f"{name}.A"]).any(1).nonzero().flatten().tolist()


@functools.cache
def spectrum(engine: str, world: int, into: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """U (m, q), S (q,), V (n, q) of every W_0, in float64."""
    found = {}
    for name, w in stories(engine, world, into)[0].original.items():
        u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
        found[name] = (u, s, vt.T)
    return found


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


# --- 1, 2: the function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["weight", "bank"])
@pytest.mark.parametrize("dtype, bound", [("fp32", 1e-6), ("bf16", 5e-3)])
def test_a_switch_leaves_w_plus_s_b_a_unchanged(into, dtype, bound):
    story = stories("plain", 1, into, dtype)[0]
    for before, after in story.switches:
        for name in story.original:
            difference = relative(after.layer(name, METHOD.scale), before.layer(name, METHOD.scale))
            # the bank: float64 sums of the same numbers
            assert difference <= (1e-12 if into == "bank" else bound), name
            assert (difference > 1e-4) == (into == "weight" and dtype == "bf16")  # a bf16 W rounds
        if dtype == "fp32" or into == "bank":
            assert relative(after.logits, before.logits) <= (1e-6 if dtype == "fp32" else 2**-9)


@every_story
def test_after_the_start_w_plus_s_b_a_is_w0_and_s_b_a_its_best_approximation(story):
    (told, *_), svd, s = stories(*story), spectrum(*story), METHOD.scale
    for name, w in told.original.items():
        u, sigma, v = svd[name]
        assert relative(told.start.layer(name, s), w) <= 1e-6, name
        trained = s * told.start.values[f"{name}.B"].double() @ told.start.values[f"{name}.A"].double()
        assert relative(trained, u[:, :4] * sigma[:4] @ v[:, :4].T) <= 1e-5, name  # Eckart-Young; float32 SVD
        rest = w.double() - (u[:, :4] * sigma[:4]) @ v[:, :4].T
        if story[2] == "bank":  # all target_rank pairs have left W
            rest -= (u[:, 4:8] * sigma[4:8]) @ v[:, 4:8].T
        assert relative(told.start.weights[name], rest) <= 1e-5, name
        assert 0 < told.loaded.errors[name] <= 1e-7, name
    assert (told.loaded.modules, told.loaded.pairs) == (4, 4 * (8 if story[2] == "bank" else 4))


# --- 3, 7: what a switch changes --------------------------------------------------------------------------------------


@every_story
def test_exactly_r_prime_pairs_change_and_all_else_stays_bitwise(story):
    for told in stories(*story):
        for before, after in told.switches:
            for name in told.original:
                index = chosen(before, after, name)
                assert len(index) == 2
                stay = [k for k in range(4) if k not in index]
                for then, now in ((before.values, after.values), (before.masters, after.masters)):
                    a, b = f"{name}.A", f"{name}.B"
                    assert (then[a] != now[a]).any(1).nonzero().flatten().tolist() == index
                    assert (then[b] != now[b]).any(0).nonzero().flatten().tolist() == index
                    assert torch.equal(then[a][stay], now[a][stay]) and torch.equal(then[b][:, stay], now[b][:, stay])
                for k in ("exp_avg", "exp_avg_sq"):
                    a, b = f"{name}.A.{k}", f"{name}.B.{k}"
                    assert torch.equal(before.moments[a][stay], after.moments[a][stay])
                    assert torch.equal(before.moments[b][:, stay], after.moments[b][:, stay])
                    assert before.moments[a].all() and before.moments[b].all()
            for name in told.original:
                for letter in "AB":
                    assert torch.equal(after.masters[f"{name}.{letter}"], after.values[f"{name}.{letter}"])


def test_every_parameter_stays_the_object_that_the_optimizer_steps():
    t = started(METHOD, "plain")

    def identities() -> list[tuple[int, int, torch.Size]]:
        assert {id(p) for group in t.engine.optimizer.param_groups for p in group["params"]} == {
            id(p) for p in t.model.parameters() if p.requires_grad
        }
        return [(id(p), p.data_ptr(), p.shape) for p in t.model.parameters()]

    first = identities()
    assert sum(p.requires_grad for p in t.model.parameters()) == 2 * len(t.adapters)
    for step in range(4):
        t.step(step)
        if step % 2:
            t.method.exchange(t.adapters, t.engine, 1, t.total)
        assert identities() == first


@pytest.mark.parametrize("moments", ["seeded", "zeroed"])
@one_of_a_kind
def test_fresh_pairs_have_m_zero_and_v_the_mean_of_those_that_stay(story, moments):
    told = stories(*story, "fp32", moments)[0]
    for before, after in told.switches:
        for name in told.original:
            index = chosen(before, after, name)
            stay = [k for k in range(4) if k not in index]
            for letter, rows in (("A", lambda t: t), ("B", lambda t: t.T)):
                assert not rows(after.moments[f"{name}.{letter}.exp_avg"])[index].any()
                v = rows(after.moments[f"{name}.{letter}.exp_avg_sq"])[index]
                mean = rows(before.moments[f"{name}.{letter}.exp_avg_sq"])[stay].double().mean()
                assert float(mean) > 0
                wanted = torch.full_like(v, float(mean) if moments == "seeded" else 0.0)
                assert torch.allclose(v, wanted, rtol=1e-5, atol=0)


FLAT, RATE, BEFORE, AFTER = 1e-2, 1e-3, 200, 25


def constant_gradient(moments: str, engine: str) -> dict[str, list[float]]:
    """|dL/dw| = FLAT for every entry, at all times.

    Largest update of a replaced entry over the rate, step by step after a switch.
    """
    method = replace(METHOD, target_modules=["k_proj"], moments=moments)
    t = started(method, engine)
    noise = torch.Generator().manual_seed(0)
    signs = {a.name: [torch.randn(p.shape, generator=noise).sign() * FLAT for p in (a.A, a.B)] for a in t.adapters}

    def step() -> None:
        loss = sum((p * g).sum() for a in t.adapters for p, g in zip((a.A, a.B), signs[a.name], strict=True))
        t.engine.backward(loss / t.engine.world)
        t.engine.step(RATE)

    for _ in range(BEFORE):
        step()
    was = t.values()
    method.exchange(t.adapters, t.engine, 1, t.total)
    now = t.values()
    replaced = {k: now[k] != was[k] for k in now if k[-2:] in (".A", ".B")}
    ratios: list[float] = []
    for _ in range(AFTER):
        was = now
        step()
        now = t.values()
        ratios.append(max(float((now[k] - was[k])[mask].abs().max()) for k, mask in replaced.items()) / RATE)
    return {"ratios": ratios, "replaced": [float(mask.float().mean()) for mask in replaced.values()]}


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero2", 2)])
def test_no_update_of_a_replaced_entry_exceeds_the_rate_with_seeded_moments(engine, world):
    """Take Adam at step T + t with |g| = c, m = 0 and v = (1 - b2^T) c^2 after T steps. v becomes
    (1 - b2^(T + t)) c^2, and therefore

        |update| / lr = (1 - b1^t) / (1 - b1^(T + t)) <= 1.

    With v = 0 instead the ratio is larger by the factor sqrt((1 - b2^(T + t)) / (1 - b2^t)).
    """
    t = np.arange(1, AFTER + 1)
    grown = (1 - 0.9**t) / (1 - 0.9 ** (BEFORE + t))
    seeded = ranks.run(world, constant_gradient, "seeded", engine)[0]
    assert seeded["replaced"] == pytest.approx([0.5] * len(seeded["replaced"]), abs=0.02)
    assert max(seeded["ratios"]) <= 1 + 1e-3  # 1e-3: an update of lr on an entry of size 1 is itself rounded by 6e-5
    assert seeded["ratios"] == pytest.approx(grown, abs=1e-3)
    zeroed = ranks.run(world, constant_gradient, "zeroed", engine)[0]
    assert max(zeroed["ratios"]) > 2.5  # why moments are seeded
    assert zeroed["ratios"] == pytest.approx(grown * np.sqrt((1 - 0.999 ** (BEFORE + t)) / (1 - 0.999**t)), abs=5e-3)


# --- 4, 5, 6: which pairs, which directions ---------------------------------------------------------------------------


@every_story
def test_chosen_are_the_r_prime_smallest_of_a_score_derived_from_recorded_w_and_g(story):
    everyone = stories(*story)
    told = everyone[0]
    windows = [range(0, SWITCHES[0]), range(SWITCHES[0], SWITCHES[1])]
    for window, (before, after) in zip(windows, told.switches, strict=True):
        for name in told.original:
            pair_scores = np.zeros(4)
            for letter in "AB":
                shape = tuple(told.start.values[f"{name}.{letter}"].shape)
                mean, spread = np.zeros(shape), np.zeros(shape)  # zero at the start and after every switch
                for step in window:
                    w, g = whole_runs([rank.runs[step][f"{name}.{letter}"] for rank in everyone], shape)
                    now = np.abs(w * g)
                    mean = 0.85 * mean + 0.15 * now
                    spread = 0.85 * spread + 0.15 * np.abs(now - mean)
                for key, derived in (("mean", mean), ("spread", spread)):
                    moment = [
                        rank.switches[windows.index(window)][0].memory[name][f"{key}_{letter}"] for rank in everyone
                    ]
                    starts = [rank.runs[0][f"{name}.{letter}"][0] for rank in everyone]
                    kept = whole_runs(list(zip(starts, moment, moment, strict=True)), shape)[0]
                    assert np.allclose(kept, derived, rtol=1e-4, atol=1e-6 * derived.max()), (name, letter, key)
                score = mean * spread
                # 1/n sum_j s(A[k, j]), 1/m sum_i s(B[i, k])
                pair_scores += score.mean(1) if letter == "A" else score.mean(0)
            smallest = sorted(np.argsort(pair_scores)[:2].tolist())
            assert chosen(before, after, name) == smallest, (name, pair_scores)


def whole_runs(runs: list[tuple[int, Tensor, Tensor]], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Whole w and g from the runs of all ranks, which cover them exactly once."""
    w, g, covered = (np.zeros(shape).reshape(-1) for _ in range(3))
    for start, value, gradient in runs:
        where = slice(start, start + len(value))
        w[where], g[where] = value.numpy(), gradient.numpy()
        covered[where] += 1
    assert (covered == 1).all() and g.any()
    return w.reshape(shape), g.reshape(shape)


def test_the_choices_differ_between_modules_and_windows():
    told = stories("plain", 1, "weight")[0]
    choices = {tuple(chosen(before, after, name)) for before, after in told.switches for name in told.original}
    assert len(choices) > 1, "a fixed choice would have passed the tests above"


@every_story
def test_no_direction_is_used_twice_and_fresh_ones_are_orthogonal_to_the_earlier_with_norm_sqrt_sigma_over_s(story):
    (told, *_), svd = stories(*story), spectrum(*story)
    for name in told.original:
        u, sigma, v = svd[name]
        # rounding turns a singular vector by about eps s_1 / gap, under any LAPACK; 20 as in test_spectrum
        count = METHOD.target_rank
        turn = 20 * torch.finfo(torch.float32).eps * float(sigma[0] / (sigma[:count] - sigma[1 : count + 1]).min())
        used = directions(told.start, name, range(4), u)
        assert used == [0, 1, 2, 3]
        for number, (before, after) in enumerate(told.switches):
            assert int(before.memory[name]["visited"]) == 4 + 2 * number
            assert int(after.memory[name]["visited"]) == 6 + 2 * number
            index, p = chosen(before, after, name), len(used)
            fresh = directions(after, name, index, u)
            assert fresh == list(range(p, p + 2)) and not set(fresh) & set(used)
            b, a = after.values[f"{name}.B"].double()[:, index], after.values[f"{name}.A"].double()[index]
            size = (sigma[fresh] / METHOD.scale).sqrt()
            assert torch.allclose(b.norm(dim=0), size, rtol=1e-5) and torch.allclose(a.norm(dim=1), size, rtol=1e-5)
            assert (b.T @ u[:, :p]).abs().max() <= turn * size.max() and (a @ v[:, :p]).abs().max() <= turn * size.max()
            assert torch.allclose(
                (b * a.T.new_tensor(METHOD.scale)) @ a, (u[:, fresh] * sigma[fresh]) @ v[:, fresh].T, atol=1e-5
            )
            used += fresh
        assert used == list(range(METHOD.target_rank))


def directions(moment: Moment, name: str, index: range | list[int], u: Tensor) -> list[int]:
    """The singular directions of W_0 along which these columns of B lie."""
    b = moment.values[f"{name}.B"].double()[:, list(index)]
    along = (u.T @ (b / b.norm(dim=0))).abs()  # (q, k)
    assert (along.max(0).values > 1 - 1e-6).all()
    return along.argmax(0).tolist()


@one_of_a_kind
def test_scores_start_anew_after_a_switch(story):
    everyone, keys = stories(*story), ("mean_A", "spread_A", "mean_B", "spread_B")
    for number in range(len(SWITCHES)):
        for name in everyone[0].original:
            before, after = ([told.switches[number][when].memory[name] for told in everyone] for when in (0, 1))
            for key in keys:
                assert (
                    sum(len(memory[key]) for memory in before)
                    == 4 * everyone[0].original[name].shape[key.endswith("A")]
                )
                assert any(memory[key].any() for memory in before) and not any(memory[key].any() for memory in after)


@every_story
def test_scores_hold_no_history_of_the_steps(story):
    """A run of a master that asks for gradients would chain every step's tensors to the next, until memory is full."""
    for told in stories(*story):
        for _, w, g in (run for runs in told.runs for run in runs.values()):
            assert not w.requires_grad and not g.requires_grad
        for memory in told.end.memory.values():
            assert not any(statistic.requires_grad for statistic in memory.values())


def exhausted(method: SRLoRA, engine: str) -> dict[str, bool]:
    t = started(method, engine)
    for step in range(3):
        t.step(step)
        if step < 2:
            t.method.exchange(t.adapters, t.engine, 1, t.total)
    before = Moment.now(t)
    t.method.exchange(t.adapters, t.engine, 1, t.total)
    after = Moment.now(t)
    same = {}
    for part in ("values", "masters", "moments", "weights"):
        then, now = getattr(before, part), getattr(after, part)
        same[part] = then.keys() == now.keys() and all(torch.equal(then[k], now[k]) for k in then)
    visited = {int(moment.memory[a.name]["visited"]) for a in t.adapters for moment in (before, after)}
    return same | {"logits": torch.equal(before.logits, after.logits), "visited": visited == {method.target_rank}}


@pytest.mark.parametrize("into", ["weight", "bank"])
@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero3", 2), ("fsdp", 2)])
def test_after_exhaustion_nothing_changes(engine, world, into):
    for same in ranks.run(world, exhausted, replace(METHOD, into=into), engine):
        assert all(same.values()), same


# --- numbers for the log ----------------------------------------------------------------------------------------------


def set_scores(t: Trainee, scores: list[list[float]]) -> None:
    """Give every module these S_k: each entry of row k of A the importance S_k, with an uncertainty of 1."""
    for a, wanted in zip(t.adapters, scores, strict=True):
        span = t.engine.span(a.A)
        whole = torch.tensor(wanted).repeat_interleave(a.shape[1])
        a.memory["mean_A"].copy_(whole[span.start : span.start + span.value.numel()])
        a.memory["spread_A"].fill_(1.0)
        a.memory["mean_B"].zero_()


def reported(engine: str) -> list[dict[str, float]]:
    """What is reported before an exchange, after one, before the second one, after it."""
    t, told = started(METHOD, engine), []

    def report() -> None:
        told.append(t.method.metrics(t.adapters, t.engine))

    t.step(0)
    set_scores(t, [[1, 2, 3, 6], [0, 0, 0, 1], [5, 5, 5, 5], [0, 0, 0, 0]])
    report()
    t.method.exchange(t.adapters, t.engine, 1, t.total)  # pairs 0 and 1 of every module
    report()
    set_scores(t, [[9, 1, 2, 8], [1, 2, 8, 9], [8, 9, 1, 2], [8, 1, 9, 2]])
    report()
    t.method.exchange(t.adapters, t.engine, 2, t.total)  # of the fresh pairs 1, 2, 0, 1
    report()
    return told


@pytest.mark.parametrize("engine, world", [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2)])
def test_metrics_tell_how_scores_differ_and_how_many_fresh_pairs_were_replaced_again(engine, world):
    for before, after, second, last in ranks.run(world, reported, engine):
        # S = 1, 2, 3, 6: mean 3, squares of the differences 4 + 1 + 0 + 9, over 4. One of four: sqrt(3). All alike: 0.
        # A module without scores does not count.
        assert before["score_variation"] == pytest.approx((np.sqrt(14 / 4) / 3 + np.sqrt(3) + 0) / 3, rel=1e-6)
        assert (before["replaced_fresh"], before["replaced_fresh_share"], before["never_replaced_share"]) == (0, 0, 1)
        # the first exchange; no scores yet
        assert after == {"replaced_fresh": 0, "replaced_fresh_share": 0, "never_replaced_share": 0.5}
        # 9, 1, 2, 8 in any order and 1, 2, 8, 9: mean 5, squares 16 + 16 + 9 + 9, over 4
        assert second["score_variation"] == pytest.approx(np.sqrt(50 / 4) / 5, rel=1e-6)
        assert (second["replaced_fresh"], second["replaced_fresh_share"]) == (0, 0)
        # of the pairs of the start, 2 a module, those that were not replaced before: 2 - 2 + 1
        assert last == {"replaced_fresh": 4, "replaced_fresh_share": 4 / 8, "never_replaced_share": 4 / 16}


# --- churn, and scores without the size of a pair ---------------------------------------------------------------------


class Linears(nn.Module):
    """`count` linear modules (20 x 24), whose singular values fall by a third from one to the next."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 20, bias=False) for _ in range(count))


def isotropic(method: SRLoRA, count: int, exchanges: int, window: int = 40) -> list[dict[str, float]]:
    """The metrics after every exchange of a method, if all directions matter alike.

    dL/dW is normal noise in every step: no direction of it is larger than another, and nothing is learned.
    """
    torch.manual_seed(0)
    model, engine = Linears(count), Plain()
    weights = {}
    for number, linear in enumerate(model.layers):
        u, s, vt = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        weights[f"layers.{number}"] = u * (2 / 3) ** torch.arange(len(s)) @ vt
    adapters = as_pair_adapters(attach(model, method, Dense(torch.float32)))
    for a in adapters:
        a.source = functools.partial(weights.__getitem__, a.name)
        a.weight.data.copy_(weights[a.name])
    for a, pairs in zip(adapters, method.starting_pairs(adapters, engine), strict=True):
        a.weight.data.sub_(pairs.product())
        for name, value in a.initial(pairs).items():
            getattr(a, name).data.copy_(value)
    engine.settings = Optimization(1e-3, optim="sgd")
    engine._optimize(model, engine.settings)
    method.start(adapters, engine)
    seen = []
    for step in range(exchanges * window):
        for a in adapters:
            a.started()
            g = torch.randn(a.shape)
            a.A.grad, a.B.grad = (a.B.T @ g).detach(), (g @ a.A.T).detach()  # of A and B, if dL/dW = g
        method.observe(adapters, engine)
        engine.optimizer.step()
        if (step + 1) % window == 0:
            method.exchange(adapters, engine, step + 1, exchanges * window + 1)
            seen.append(method.metrics(adapters, engine))
    return seen


CHURNING = dict(rank=8, target_rank=20, gamma=0.5, target_modules=["all-linear"], svd_cache="", svd_exact=True)


def test_the_published_score_replaces_what_came_last_even_if_all_directions_matter_alike():
    _, *later = isotropic(SRLoRA(**CHURNING), count=24, exchanges=3)
    assert [m["replaced_fresh_share"] > 0.95 for m in later] == [True, True]
    assert later[-1]["never_replaced_share"] > 0.45  # half of the pairs of the start stay for good


@pytest.mark.parametrize("score", ["unit", "change"])
def test_without_the_size_of_a_pair_the_choice_is_chance_if_all_directions_matter_alike(score):
    _, *later = isotropic(SRLoRA(**CHURNING, score=score), count=24, exchanges=3)
    # 96 pairs of 24 modules: 48 by chance, with a standard deviation of 24^.5 x (4 / 8 x 4 / 8 x 4 x 4 / 7)^.5 = 3.7
    for m in later:
        assert abs(m["replaced_fresh"] - 48) < 4 * 3.7, m
    assert abs(later[-1]["never_replaced_share"] - 1 / 8) < 0.08  # (1 - r' / r)^3


def rescaled(engine: str, score: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of two steps on the same gradients of W: as they are, and with pairs c times as long on both sides.

    W takes what the longer pairs have more, so that the model, and dL/dW, stay what they were.
    """
    found = []
    c = torch.tensor([1.0, 3.0, 0.25, 10.0])
    for factor in (torch.ones(4), c):
        t = started(replace(METHOD, into="weight", score=score, svd_exact=True), engine)
        for a in t.adapters:
            whole_A, whole_B = t.engine.whole(a.A), t.engine.whole(a.B)
            more = Pairs(torch.cat([whole_B * factor, -whole_B], 1), torch.cat([whole_A * factor[:, None], whole_A]))
            t.engine.weight(a).add_(more.scaled(-a.scale))
            with t.engine.edit(a.A, a.B) as (sa, sb):
                sa.value.mul_(factor[:, None])
                sb.value.mul_(factor)
        t.method.start(t.adapters, t.engine)
        for step in range(2):  # the values stay: dL/dW of both models is the same
            t.forward_backward(step)
            t.method.observe(t.adapters, t.engine)
            t.engine.forget()
        found.append(t.method.scores(t.adapters, t.engine))
    return (*found, c)


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero3", 2)])
def test_the_published_score_grows_with_the_fourth_power_of_a_pairs_length_and_unit_does_not(engine, world):
    for plain, longer, c in ranks.run(world, rescaled, engine, "paper"):
        torch.testing.assert_close(longer, plain * c.double() ** 4, rtol=1e-2, atol=0)
    for plain, longer, _ in ranks.run(world, rescaled, engine, "unit"):
        torch.testing.assert_close(longer, plain, rtol=1e-2, atol=0)
        assert plain.min() > 0


def changes(engine: str) -> tuple[Tensor, Tensor, Tensor, dict[str, float], bool]:
    """The scores of `change` after two steps, those of the dense equation, those after an exchange, and one step on."""
    t = started(replace(METHOD, score="change", into="weight"), engine)
    past = [Pairs(t.engine.whole(a.B).double(), t.engine.whole(a.A).double()) for a in t.adapters]
    for step in range(2):
        t.step(step)
    dense = torch.zeros(len(t.adapters), 4, dtype=torch.float64)
    for row, (a, old) in enumerate(zip(t.adapters, past, strict=True)):
        B, A = t.engine.whole(a.B).double(), t.engine.whole(a.A).double()
        for k in range(4):
            was = torch.outer(old.B[:, k], old.A[k])
            dense[row, k] = (torch.outer(B[:, k], A[k]) - was).norm() / was.norm()
    found = t.method.scores(t.adapters, t.engine)
    t.method.exchange(t.adapters, t.engine, 2, t.total)
    anew = t.method.scores(t.adapters, t.engine)
    numbers = t.method.metrics(t.adapters, t.engine)
    t.step(2)
    return found, dense, anew, numbers, bool((t.method.scores(t.adapters, t.engine) > 0).all())


@pytest.mark.parametrize("engine, world", [("plain", 1), ("plain", 2), ("zero2", 3), ("zero3", 2), ("fsdp", 3)])
def test_change_is_the_share_of_itself_by_which_a_pair_changed_since_the_last_exchange(engine, world):
    for found, dense, anew, numbers, moves in ranks.run(world, changes, engine):
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=0)
        assert not anew.any() and moves and "score_variation" not in numbers


def test_change_does_not_depend_on_the_lengths_of_pairs():
    t = started(replace(METHOD, score="change"), "plain")
    t.step(0)
    before = t.method.scores(t.adapters, t.engine)
    for a in t.adapters:  # then and now, each side by another factor
        for name, factor in (("A", 5.0), ("B", 0.3)):
            getattr(a, name).data.mul_(factor)
            a.memory[f"past_{name}"].mul_(factor)
    torch.testing.assert_close(t.method.scores(t.adapters, t.engine), before, rtol=1e-4, atol=0)


def test_short_intervals_are_said_before_the_first_step(place, tmp_path):  # noqa: F811
    method = replace(METHOD, rank=4, target_rank=8)
    assert method.advice(()) == method.advice((10, 20, 45)) == replace(method, score="change").advice((3,)) == []
    (line,) = method.advice((10, 19, 45))
    assert line.startswith("the shortest interval between exchanges has 9 steps: scores of fewer than 10 rank pairs")
    words = settings(place, "srlora", tmp_path, max_steps=6)  # one exchange, after step 3
    assert "the shortest interval between exchanges has 3 steps" in describe(parse(words), 1)


@pytest.mark.parametrize("score", ["unit", "change"])
def test_a_pair_of_length_zero_scores_zero(score):
    t = started(replace(METHOD, score=score), "plain")
    for a in t.adapters:
        a.A.data[1], a.B.data[:, 1] = 0, 0
    t.method.start(t.adapters, t.engine)
    t.step(0)
    found = t.method.scores(t.adapters, t.engine)
    assert not found[:, 1].any() and found[:, [0, 2, 3]].min() > 0


@pytest.mark.parametrize("score, spread", [("paper", 4), ("unit", 4), ("change", 2)])
def test_statistics_are_what_is_remembered(score, spread):
    t = started(replace(METHOD, score=score), "plain")
    entries = sum(a.A.numel() + a.B.numel() for a in t.adapters)
    remembered = sum(v.nbytes for a in t.adapters for k, v in a.memory.items() if k in a.spans)
    assert t.method.statistics(t.adapters) == (remembered, 0) and remembered == spread * 2 * entries


# --- 8: PiSSA ---------------------------------------------------------------------------------------------------------


def trained(
    method: PiSSA, engine: str, dtype: str
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    t = started(method, engine, dtype)
    losses = []
    for step in range(4):
        losses.append(t.step(step))
        if step + 1 in method.schedule(4):
            method.exchange(t.adapters, t.engine, 1, t.total)
    return losses, t.values(), t.moments(), t.weights()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("engine, world", [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)])
def test_with_target_rank_equal_to_rank_it_trains_exactly_like_pissa(engine, world, dtype):
    common = dict(rank=4, alpha=6, target_modules=MODULES, svd_cache="")
    losses, *tensors = ranks.run(world, trained, PiSSA(**common), engine, dtype)[0]
    found_losses, *found = ranks.run(world, trained, SRLoRA(**common, target_rank=4), engine, dtype)[0]
    assert found_losses == losses and losses[-1] < losses[0]
    for theirs, ours in zip(tensors, found, strict=True):
        assert theirs and theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[k], ours[k]) for k in theirs)


# --- 9: the rank of the change ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["weight", "bank"])
def test_the_whole_change_has_at_most_rank_two_r_target_and_the_export_reproduces_it(into, tmp_path):
    method = replace(METHOD, rank=2, alpha=3, target_rank=4, into=into)
    t = started(method, "plain")
    for step in range(6):
        t.step(step)
        if step in (1, 3):
            method.exchange(t.adapters, t.engine, 1, t.total)
    saved = save_adapter(t.engine, t.adapters, method=method, path=tmp_path, base_model_name_or_path="base")
    assert saved is not None and saved.rank <= 8
    exported = load_file(tmp_path / "adapter_model.safetensors")
    layers = t.probe()[1]
    for a in t.adapters:
        change = layers[a.name] - t.original[f"{a.name}.weight"].double()
        values = torch.linalg.svdvals(change)  # up to 14 of them
        # rounding of a float32 W: entries of 0.15 x 2^-25, spread over all directions
        assert values[8:].max() <= 1e-5 * values[0], a.name
        assert values[7] > 1e-3 * values[0], "rank r_target would have been enough"
        b, a_ = (exported[f"base_model.model.{a.name}.lora_{letter}.weight"].double() for letter in "BA")
        assert relative(b @ a_, change) <= 1e-5, a.name


# --- 10, 11: ranks, schedule, accumulation ----------------------------------------------------------------------------


@every_story
def test_ranks_hold_identical_k_w_a_and_b(story):
    first, *others = stories(*story)
    assert len(others) == story[1] - 1
    for other in others:
        seen = [[story.start, story.end, *sum(story.switches, ())] for story in (first, other)]
        for mine, theirs in zip(*seen, strict=True):
            for part in ("values", "masters", "moments", "weights"):
                one, two = getattr(mine, part), getattr(theirs, part)
                assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), part
        assert all(int(a["visited"]) == METHOD.target_rank for a in other.end.memory.values())


def assert_same_run(found: Story, wanted: Story) -> None:
    """The same choices, and values equal to float32 sums in another order (measured 1e-6)."""
    assert found.losses == pytest.approx(wanted.losses, rel=2e-6)
    for (before, after), (before_wanted, after_wanted) in zip(found.switches, wanted.switches, strict=True):
        for name in wanted.original:
            assert chosen(before, after, name) == chosen(before_wanted, after_wanted, name), name
    for k, v in wanted.end.values.items():
        assert relative(found.end.values[k], v) <= 1e-5, k
    for k, v in wanted.end.moments.items():
        assert relative(found.end.moments[k], v) <= 1e-4, k
    for k, v in wanted.end.weights.items():
        assert relative(found.end.weights[k], v) <= 1e-5, k


@over([story for story in STORIES if story[1] > 1])
def test_ranks_train_as_one_process_does(story):
    assert_same_run(stories(*story)[0], stories("plain", 1, story[2])[0])


@pytest.mark.parametrize(
    "engine, world", [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 2), ("fsdp", 2), ("fsdp-hybrid", 2)]
)
def test_gradient_accumulation_4_makes_the_same_choices_as_a_batch_4_times_as_large(engine, world):
    wanted = ranks.run(1, tell, METHOD, "plain", samples=8)[0]
    assert_same_run(ranks.run(world, tell, METHOD, engine, accumulation=4, samples=8)[0], wanted)


@pytest.mark.parametrize(
    "rank, target, gamma, swap",
    [(5, 9, 0.5, 3), (7, 9, 0.5, 4), (4, 8, 0.5, 2), (4, 9, 0.5, 2), (2, 5, 1.0, 2), (4, 7, 0.1, 1), (3, 3, 0.5, 2)],
)
def test_number_and_steps_of_the_switches_are_those_of_the_formula(rank, target, gamma, swap):
    method = replace(METHOD, rank=rank, target_rank=target, gamma=gamma)
    count = -(-(target - rank) // swap)
    for total in (12, 100, 1001):
        assert method.schedule(total) == tuple(round(k * total / (count + 1)) for k in range(1, count + 1))
        paper = replace(method, paper_schedule=True)
        assert paper.schedule(total) == tuple(round(k * total / count) for k in range(1, count + 1))
    t = started(method, "plain")
    t.step(0)
    exchanged = [
        method.exchange(t.adapters, t.engine, 1, t.total).pairs // len(t.adapters) for _ in method.schedule(100)
    ]
    assert exchanged == [min(swap, target - rank - swap * k) for k in range(count)]
    assert sum(exchanged) == target - rank


@every_story
def test_a_switch_reports_its_modules_pairs_and_destination(story):
    _engine, world, into = story
    for event in stories(*story)[0].events:
        assert (event.modules, event.pairs, event.into) == (4, 8, into)
        assert 0 < event.drift <= 1e-6 and (event.lost == 0 if into == "bank" else 0 < event.lost < 1e-6)
        assert event.seconds > 0 and (event.traffic > 0) == (world > 1)


# --- where the SVD runs -----------------------------------------------------------------------------------------------


def placed(placement: str, engine: str) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    method, done = replace(METHOD, svd_exact=False, svd_placement=placement), []
    decompose = PiSSA._decompose
    PiSSA._decompose = lambda *args: done.append(1) or decompose(*args)
    try:
        t = started(method, engine)
    finally:
        PiSSA._decompose = decompose
    reserve = {
        f"{a.name}.reserve": torch.cat([a.reserve.B.T, a.reserve.A], 1) for a in t.adapters if a.reserve is not None
    }
    return t.values() | reserve, t.weights(), len(done)


@pytest.mark.parametrize("engine, world", [("plain", 2), ("zero2", 3), ("zero3", 2), ("fsdp", 3)])
def test_spread_svd_gives_bitwise_the_start_of_rank0(engine, world):
    alone = ranks.run(world, placed, "rank0", engine)
    spread = ranks.run(world, placed, "spread", engine)
    assert [done for *_, done in alone] == [4] + [0] * (world - 1)
    assert [done for *_, done in spread] == {2: [2, 2], 3: [2, 1, 1]}[world]
    for (values, weights, _), (values_spread, weights_spread, _) in zip(alone, spread, strict=True):
        assert values and values.keys() == values_spread.keys() and weights.keys() == weights_spread.keys()
        assert all(torch.equal(v, values_spread[k]) for k, v in values.items())
        assert all(torch.equal(v, weights_spread[k]) for k, v in weights.items())
    assert any(k.endswith("reserve") for k in alone[0][0])


# --- what is refused --------------------------------------------------------------------------------------------------


def caught(function: Callable[[], object]) -> str:
    try:
        function()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def not_finite(engine: str, number: float) -> tuple[str, list[str]]:
    t = started(METHOD, engine)
    t.step(0)
    t.forward_backward(1)
    real, broken = t.engine.gradient, t.adapters[2].B
    t.engine.gradient = lambda p: (
        torch.full_like(real(p), number) if p is broken and t.engine.rank == t.engine.world - 1 else real(p)
    )
    t.method.observe(t.adapters, t.engine)
    t.engine.step(1e-2)
    return caught(lambda: t.method.exchange(t.adapters, t.engine, 1, t.total)), [a.name for a in t.adapters]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("engine, world", [("plain", 1), ("plain", 2), ("zero3", 2), ("fsdp", 2)])
def test_a_gradient_that_is_not_finite_is_refused_at_the_switch_with_the_modules_name(engine, world, number):
    for message, names in ranks.run(world, not_finite, engine, number):  # on every rank, though one saw it
        assert message.startswith(f"{names[2]}: importance is not finite"), message


def tampered(method: SRLoRA, engine: str) -> str:
    """The last rank receives something else than was sent."""
    t = started(method, engine)
    t.step(0)
    real = t.engine.broadcast

    def broadcast(*args: object) -> list[Tensor]:
        found = real(*args)
        if t.engine.rank == t.engine.world - 1:
            found[-1].view(-1)[-1] += 1e-6 if found[-1].is_floating_point() else -1
        return found

    t.engine.broadcast = broadcast
    return caught(lambda: t.method.exchange(t.adapters, t.engine, 1, t.total))


@pytest.mark.parametrize("into", ["weight", "bank"])
# where factors are sharded, reading them back notices it first
@pytest.mark.parametrize("engine, world", [("plain", 2), ("zero2", 3)])
def test_a_rank_that_received_other_pairs_ends_the_run_on_all_ranks(engine, world, into):
    for message in ranks.run(world, tampered, replace(METHOD, into=into), engine):
        assert message.startswith("the exchanged pairs differ between ranks"), message


def test_settings_that_cannot_be_are_refused():
    for change, message in (
        ({"target_rank": 3}, r"target_rank \(3\) must be at least method.rank \(4\)"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.5}, "gamma"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(METHOD, **change)
    with pytest.raises(
        ValueError, match=r"k_proj: method.target_rank 15 is more than min\(m, n\) = 14 of its 14 x 42 weight"
    ):
        Trainee(replace(METHOD, target_rank=15), "plain")


@pytest.mark.parametrize(
    "name, codec", [("nf4", Nf4()), ("nf4", Nf4(torch.bfloat16, double_quant=True)), ("int8", Int8())]
)
def test_a_coded_weight_is_refused_as_a_destination_with_what_to_do(name, codec):
    with pytest.raises(
        ValueError,
        match=rf"^method.into: weight cannot be used with codec: {name}: .*set method.into: bank \(or auto\)",
    ):
        Trainee(replace(METHOD, into="weight"), "plain", codec=codec)
    for into in ("bank", "auto"):
        assert replace(METHOD, into=into).bank(codec) == METHOD.target_rank - METHOD.rank


def test_auto_goes_into_a_float32_weight_and_beside_any_other():
    for dtype, banked in (("fp32", False), ("bf16", True), ("nf4", True), ("int8", True)):
        t = Trainee(METHOD, "plain", dtype)
        assert isinstance(t.engine, Engine) and all((a.bank_A is not None) == banked for a in t.adapters)
