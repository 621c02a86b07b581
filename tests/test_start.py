"""A method that was attached and not started refuses its first forward: it would train something else."""

from __future__ import annotations

import pytest
import torch

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.models import checkpoint
from tests.test_laws import METHODS
from tests.tiny import Trainee, batch, llama

# B = 0, and no start; Flat-LoRA's first step has no noise
BY_ATTACH_ALONE = [label for label in METHODS if not METHODS[label].needs_start]


@pytest.mark.parametrize("label", METHODS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "answering"])
def test_the_first_forward_raises_where_a_start_or_a_schedule_is_missing(label, training):
    model = llama().train(training)
    adapters = attach(model, METHODS[label], Dense(torch.float32))
    if label in BY_ATTACH_ALONE:
        METHODS[label].batch(adapters, 0, range(6))
        assert torch.equal(model(input_ids=batch(0)).logits, llama()(input_ids=batch(0)).logits)
        return
    name = type(METHODS[label]).__name__
    with pytest.raises(RuntimeError, match=rf"k_proj: {name} was attached and not started.*models.loading.load"):
        model(input_ids=batch(0))
    for adapter in adapters:
        adapter.started()
        adapter.started()  # twice is once
    METHODS[label].batch(adapters, 0, range(6))
    model(input_ids=batch(0))


@pytest.mark.parametrize("label", METHODS)
def test_a_loaded_model_answers_and_nothing_is_left_that_costs_time(label):
    trainee = Trainee(METHODS[label], "plain")
    assert not any(adapter._forward_pre_hooks for adapter in trainee.adapters)
    trainee.step(0)


@pytest.mark.parametrize("label", ["dora", "losia-bank", "srlora-weight"])
def test_a_resumed_model_answers_when_its_checkpoint_is_restored_and_not_before(label, tmp_path, monkeypatch):
    first = Trainee(METHODS[label], "plain")
    first.step(0)
    saved = first.save(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "restore", lambda *_: None)
        half = Trainee(METHODS[label], "plain", resume_from=saved)
        with pytest.raises(RuntimeError, match=r"not started.*checkpoint\.restore"):
            half.logits()
    torch.testing.assert_close(Trainee(METHODS[label], "plain", resume_from=saved).logits(), first.logits())


def test_a_start_is_needed_where_something_is_taken_out_of_w_or_remembered():
    assert {"lora", "flat_lora", "vera"} <= set(BY_ATTACH_ALONE)
    assert not {"pissa", "dora", "lora_xs", "srlora-weight", "losia-bank"} & set(BY_ATTACH_ALONE)
