"""The learning rate at its corners and the switches of SRLoRA against their closed form."""

import math
from fractions import Fraction

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llm_lowrank.methods.srlora import SRLoRA, exchange_schedule
from llm_lowrank.numerics.schedule import Schedule

pytestmark = pytest.mark.quick

SHAPES = ("cosine", "linear", "constant", "warmup_stable_decay")
FALLING = ("cosine", "linear", "warmup_stable_decay")


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_starts_at_peak_over_warmup_and_reaches_the_peak_with_its_last_step(shape):
    schedule = Schedule(0.5, 20, warmup=4, shape=shape)
    rates = [schedule.rate(step) for step in range(20)]
    assert rates[:4] == [0.125, 0.25, 0.375, 0.5]
    assert rates[4] == 0.5  # the shape starts where warm-up ended
    assert max(rates) == 0.5 and min(rates) > 0  # no step is wasted at rate 0


@pytest.mark.parametrize("shape", SHAPES)
def test_without_warm_up_the_first_step_has_the_peak(shape):
    assert Schedule(3e-4, 10, shape=shape).rate(0) == 3e-4


def test_cosine_linear_and_constant_are_their_equations_after_warm_up():
    peak, warmup, total = 0.4, 3, 13
    rates = {shape: Schedule(peak, total, warmup, shape).rate for shape in ("cosine", "linear", "constant")}
    for step in range(warmup, total):
        done = (step - warmup) / 10
        assert rates["cosine"](step) == pytest.approx(peak * math.cos(math.pi * done / 2) ** 2, abs=1e-15)
        assert rates["linear"](step) == pytest.approx(peak * (total - step) / 10, abs=1e-15)
        assert rates["constant"](step) == peak
    assert rates["cosine"](8) == pytest.approx(peak / 2)  # half way
    assert rates["linear"](12) == pytest.approx(peak / 10)  # the last step still moves


def test_warmup_stable_decay_holds_the_peak_and_falls_in_the_last_tenth():
    schedule = Schedule(0.4, 40, warmup=3, shape="warmup_stable_decay")
    assert [schedule.rate(step) for step in range(3, 37)] == [0.4] * 34  # step 36 is the first of the last four
    half, root = 0.5, math.sqrt(0.5)
    expected = [0.4 * (1 + root) / 2, 0.4 * half, 0.4 * (1 - root) / 2]  # (1 + cos(pi t)) / 2, t = 1/4, 1/2, 3/4
    assert [schedule.rate(step) for step in (37, 38, 39)] == pytest.approx(expected)
    late = Schedule(0.4, 40, warmup=39, shape="warmup_stable_decay")  # the decay waits for the warm-up
    assert late.rate(39) == 0.4


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_schedules_are_those_of_transformers_a_step_of_warm_up_later(shape):
    """Ours warms up from peak / warmup, theirs from 0: step t of theirs is step t - 1 of ours, after it they agree."""
    make = {
        "cosine": transformers.get_cosine_schedule_with_warmup,
        "linear": transformers.get_linear_schedule_with_warmup,
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.4)
    theirs = make[shape](optimizer, num_warmup_steps=4, num_training_steps=30).lr_lambdas[0]
    ours = Schedule(0.4, 30, warmup=4, shape=shape)
    assert [ours.rate(step - 1) for step in range(1, 5)] == pytest.approx([0.4 * theirs(step) for step in range(1, 5)])
    assert [ours.rate(step) for step in range(4, 30)] == pytest.approx([0.4 * theirs(step) for step in range(4, 30)])


def test_warmup_stable_decay_is_that_of_transformers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.4)
    theirs = transformers.get_wsd_schedule(
        optimizer, num_warmup_steps=4, num_decay_steps=3, num_training_steps=30, min_lr_ratio=0.2
    ).lr_lambdas[0]
    ours = Schedule(0.4, 30, warmup=4, shape="warmup_stable_decay", min_rate=0.2)
    assert [ours.rate(step) for step in range(4, 30)] == pytest.approx([0.4 * theirs(step) for step in range(4, 30)])


@pytest.mark.parametrize("shape", FALLING)
def test_min_rate_is_the_rate_to_which_it_falls(shape):
    peak, total, lowest = 0.4, 50, 0.1
    to_zero, to_lowest = (Schedule(peak, total, 5, shape, share) for share in (0.0, lowest))
    for step in range(5, total):
        assert to_lowest.rate(step) == pytest.approx(lowest * peak + (1 - lowest) * to_zero.rate(step))
    assert to_lowest.rate(total) == pytest.approx(lowest * peak)  # none of the run's steps
    assert [to_lowest.rate(step) for step in range(5)] == [to_zero.rate(step) for step in range(5)]
    assert {Schedule(peak, total, 5, shape, min_rate=1.0).rate(step) for step in range(5, total)} == {peak}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("total,warmup", [(1, 0), (1, 1), (4, 4), (4, 9), (2, 1)])
def test_short_runs_and_long_warm_ups_give_a_rate_for_every_step(shape, total, warmup):
    schedule = Schedule(1.0, total, warmup, shape)
    for step in range(total):
        assert 0 < schedule.rate(step) <= 1.0
    assert schedule.rate(0) == (1 / warmup if warmup else 1.0)


@given(st.sampled_from(SHAPES), st.integers(1, 200), st.integers(0, 200), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_rate_rises_through_warm_up_and_never_rises_after(shape, total, warmup, lowest):
    schedule = Schedule(1.0, total, warmup, shape, lowest)
    rates = [schedule.rate(step) for step in range(total)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_a_schedule_says_what_it_is():
    assert str(Schedule(5e-4, 80, 5)) == "warm-up of 5 steps to 0.0005, then cosine down to 0"
    assert str(Schedule(5e-4, 3, 1, "linear", 0.1)) == "warm-up of 1 step to 0.0005, then linear down to 5e-05"
    assert str(Schedule(5e-4, 80, 0, "constant")) == "from the start 0.0005, then constant"


# ---- switches


@pytest.mark.parametrize(
    "total,rank,target,swap,paper,expected",
    [
        (30, 8, 16, 4, False, ((10, 4), (20, 4))),
        (30, 8, 16, 4, True, ((15, 4), (30, 4))),
        (100, 8, 18, 4, False, ((25, 4), (50, 4), (75, 2))),  # the last switch takes what is left
        (99, 8, 18, 4, True, ((33, 4), (66, 4), (99, 2))),
        (10, 8, 9, 4, False, ((5, 1),)),
        (100, 8, 32, 8, False, ((25, 8), (50, 8), (75, 8))),
        (7, 2, 5, 1, False, ((2, 1), (4, 1), (5, 1))),  # 1.75, 3.5, 5.25: halves go to the even neighbour
        (3, 8, 12, 2, False, ((1, 2), (2, 2))),
        (2, 8, 12, 2, True, ((1, 2), (2, 2))),
    ],
)
def test_switches_at_hand(total, rank, target, swap, paper, expected):
    assert exchange_schedule(total, rank=rank, target_rank=target, swap=swap, at_the_end=paper) == expected


@given(st.integers(1, 2000), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_switches_are_the_closed_form(total, rank, spare, swap, paper):
    count = -(-spare // swap)
    parts = count if paper else count + 1
    if total < parts:  # one step or more between switches: rounding cannot bring two together; less: it must
        with pytest.raises(ValueError, match=f"{count} exchanges do not fit into {total} steps"):
            exchange_schedule(total, rank=rank, target_rank=rank + spare, swap=swap, at_the_end=paper)
        return
    found = exchange_schedule(total, rank=rank, target_rank=rank + spare, swap=swap, at_the_end=paper)
    nearest = [Fraction(k * total, parts) for k in range(1, count + 1)]
    steps, taken = [step for step, _ in found], [pairs for _, pairs in found]
    assert len(found) == count
    assert all(abs(step - exact) <= Fraction(1, 2) for step, exact in zip(steps, nearest, strict=True))
    assert steps == sorted(set(steps)) and steps[0] >= 1  # apart, and never before the first step
    assert steps[-1] == total if paper else steps[-1] < total  # ours leaves steps for the last fresh pairs
    assert sum(taken) == spare and set(taken[:-1]) <= {swap} and 1 <= taken[-1] <= swap


@pytest.mark.parametrize(
    "total,paper", [(1, False), (2, False), (3, False), (4, False), (3, True), (1, True)], ids=lambda value: str(value)
)
def test_switches_are_refused_when_steps_do_not_suffice(total, paper):
    with pytest.raises(
        ValueError, match=f"4 exchanges do not fit into {total} steps; lower target_rank, raise gamma or train longer"
    ):
        exchange_schedule(total, rank=4, target_rank=12, swap=2, at_the_end=paper)


@pytest.mark.parametrize("total,paper", [(5, False), (4, True)])
def test_switches_fit_as_soon_as_every_step_can_hold_one(total, paper):
    exchanges = exchange_schedule(total, rank=4, target_rank=12, swap=2, at_the_end=paper)
    assert [step for step, _ in exchanges] == [1, 2, 3, 4]


def test_srlora_without_spare_directions_has_no_switch():
    assert SRLoRA(rank=8, target_rank=8).schedule(100) == ()
    assert SRLoRA(rank=8, target_rank=8).schedule(1) == ()


@pytest.mark.parametrize("gamma,swap", [(0.5, 4), (1.0, 8), (0.01, 1), (0.3, 2), (0.125, 1)])
def test_srlora_swaps_gamma_times_rank_pairs_but_at_least_one(gamma, swap):
    method = SRLoRA(rank=8, target_rank=16, gamma=gamma)
    assert method.swap == swap
    exchanges = exchange_schedule(400, rank=8, target_rank=16, swap=swap)
    assert method.schedule(400) == tuple(step for step, _ in exchanges)


def test_srlora_paper_schedule_switches_last_at_the_end():
    assert SRLoRA(rank=8, target_rank=16, paper_schedule=True).schedule(40) == (20, 40)
    assert SRLoRA(rank=8, target_rank=16).schedule(40) == (13, 27)
