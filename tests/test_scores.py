"""Scores of pairs against their equation, written densely, for matrices and gates, on every kind of engine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_lowrank.adapters import scores
from tests import ranks
from tests.test_penalties import GatedLoRA
from tests.tiny import Trainee

NAMES, BETA1, BETA2 = ("A", "B", "gate"), 0.8, 0.7
ENGINES = [("plain", 1), ("plain", 2), ("zero2", 3), ("zero3", 2), ("fsdp", 3)]


def observed(engine: str) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """The scores after three steps, those of the dense equation, and the scores after a new beginning."""
    method = GatedLoRA(rank=4, alpha=6, rank_pattern={"k_proj": 3}, target_modules=["k_proj", "up_proj"])
    t = Trainee(method, engine)
    scores.remember(t.adapters, t.engine, NAMES)
    dense = {(a.name, name): (0.0, 0.0) for a in t.adapters for name in NAMES}
    for step in range(3):
        t.forward_backward(step)
        for a in t.adapters:
            params = [getattr(a, name) for name in NAMES]
            pairs = zip(t.engine.whole_masters(params), t.engine.whole_gradients(params), strict=True)
            for name, (w, g) in zip(NAMES, pairs, strict=True):
                mean, spread = dense[a.name, name]
                now = (w * g).abs()
                mean = BETA1 * mean + (1 - BETA1) * now
                dense[a.name, name] = mean, BETA2 * spread + (1 - BETA2) * (now - mean).abs()
        scores.observe(t.adapters, t.engine, NAMES, beta1=BETA1, beta2=BETA2)
        t.engine.step(1e-3, 1e-3)
    wanted = []
    for a in t.adapters:
        s = {name: (dense[a.name, name][0] * dense[a.name, name][1]).double() for name in NAMES}
        wanted.append(s["A"].mean(1) + s["B"].mean(0) + s["gate"])
    found = scores.scores(t.adapters, t.engine, NAMES)
    scores.begin_anew(t.adapters[0], NAMES)
    return found, wanted, scores.scores(t.adapters, t.engine, NAMES)


@pytest.mark.parametrize("engine, world", ENGINES)
def test_scores_are_the_equation(engine, world):
    for found, wanted, anew in ranks.run(world, observed, engine):
        assert [len(score) for score in found] == [3, 4, 3, 4]
        for ours, true in zip(found, wanted, strict=True):
            assert ours.dtype == torch.float64 and ours.min() > 0
            torch.testing.assert_close(ours, true, rtol=1e-5, atol=0)
        assert not anew[0].any() and torch.equal(anew[1], found[1])
