"""The point of the bank, on the real model: a bfloat16 weight rounds away what the bank keeps."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.data import Batches, Data, load_corpus, pad_id
from llm_lowrank.engines.base import Optimization
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models.architectures import skeleton
from llm_lowrank.models.loading import bind
from llm_lowrank.models.loading import load as load_model
from llm_lowrank.models.source import DEMO, Source
from llm_lowrank.run.held_out import batch_loss
from tests import ranks

# Shallow, middle and deep, attention and MLP; a part of the model, so that the test is short.
MODULES = [
    "layers.0.self_attn.q_proj",
    "layers.8.mlp.up_proj",
    "layers.15.self_attn.o_proj",
    "layers.22.mlp.gate_proj",
    "layers.29.mlp.down_proj",
]
STEPS = 8


def one_exchange(into: str) -> dict:
    """A few steps on real data and one exchange: the layers' maps at the start, before and after it, and its report."""
    source = Source.open(DEMO)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    model = skeleton(source.path, torch.bfloat16, "sdpa")
    method = SRLoRA(rank=8, target_rank=12, target_modules=MODULES, into=into, svd_cache="")
    engine = Plain()
    adapters = attach(model, method, Dense(torch.bfloat16))
    assert bind(model, adapters, source) == []
    corpus = load_corpus(
        Data("reasoning-gym:chain_sum", size=80, held_out=4, task={"max_terms": 2, "max_digits": 2}), tokenizer, seed=0
    )
    batches = Batches(corpus.train, 4, pad_id=pad_id(tokenizer, 10**6))
    load_model(engine, model, adapters=adapters, method=method, tensors=source, settings=Optimization(1e-3))

    def maps() -> list[torch.Tensor]:
        """W + s B A + s bank_B bank_A, in float64."""
        found = []
        for a in adapters:
            factors = [engine.whole(p).double() for p in a.factors()]
            parts = [b @ a_ for a_, b in zip(factors[::2], factors[1::2], strict=True)]
            found.append(engine.weight(a).read().double() + method.scale * sum(parts))
        return found

    start = maps()
    for step in range(STEPS):
        for micro in batches.step(step):
            engine.backward(batch_loss(model, micro, engine.device) / micro.tokens)
        method.observe(adapters, engine)
        engine.step(1e-3)
    learned, stored = maps(), [engine.weight(a).read().clone() for a in adapters]
    event = method.exchange(adapters, engine, 1, 2)
    after = maps()
    return {
        "event": event,
        "lost": [float((x - y).norm() / (y - z).norm()) for x, y, z in zip(after, learned, start, strict=True)],
        "weight unchanged": all(torch.equal(engine.weight(a).read(), w) for a, w in zip(adapters, stored, strict=True)),
    }


@pytest.fixture(scope="module")
def exchanges() -> dict[str, dict]:
    return {into: ranks.run(1, one_exchange, into, timeout=240)[0] for into in ("weight", "bank")}


def test_a_bf16_weight_rounds_away_part_of_what_was_learned(exchanges):
    event, lost = exchanges["weight"]["event"], exchanges["weight"]["lost"]
    print(
        f"bf16, into weight: lost of what was learned {[f'{x:.0%}' for x in lost]}, of the update of W {event.lost:.1%}"
    )
    assert event.into == "weight" and event.lost > 0  # reported, and logged with every switch
    assert min(lost) > 0.01


def test_the_bank_loses_nothing(exchanges):
    event, lost = exchanges["bank"]["event"], exchanges["bank"]["lost"]
    assert event.into == "bank" and event.lost == 0
    assert exchanges["bank"]["weight unchanged"]
    assert max(lost) < 1e-12  # float64 sums of the same numbers in another order
