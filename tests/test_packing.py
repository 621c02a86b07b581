"""Packing: nothing is lost, nothing is seen twice, no example sees another, and the loss and its gradient stay what
they were.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaForCausalLM

from llm_lowrank.adapters.adapter import PairAdapter
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.data import IGNORE, Batches, Example, best_fit, collate
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models.packing import check_apart
from llm_lowrank.run.held_out import batch_loss
from llm_lowrank.run.meter import Meter
from tests import tiny

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


def examples(count: int, longest: int = 12, words: int = tiny.VOCABULARY) -> list[Example]:
    """Some train all their tokens, also the first one: in a row it must not be predicted from the example before."""
    drawn = random.Random(count)
    found = []
    for number in range(count):
        ids = [drawn.randrange(words) for _ in range(drawn.randint(2, longest))]
        prompt = drawn.randint(0, len(ids) - 1) if number % 3 else 0
        found.append(Example(ids, [IGNORE] * prompt + ids[prompt:]))
    return found


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_best_fit_puts_everything_into_rows_once(lengths):
    rows = best_fit(lengths, 50)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert max(filled) <= 50
    assert sum(a <= 25 for a in filled) <= 1  # of two rows that are half empty one would not have been begun
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 50) * 1.5 + 1


def test_best_fit_prefers_the_fullest_row_that_has_room():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([7, 8, 2, 3], 10) == [[1, 2], [0, 3]]


# transformers' eager attention takes its softmax in float32, whatever the model is in
@pytest.mark.parametrize("attention, rounding", [("sdpa", 1e-12), ("eager", 1e-6)])
def test_packed_losses_and_gradients_are_those_of_the_same_examples_unpacked(attention, rounding):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny.config(attn_implementation=attention))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    adapters = attach(model, LoRA(rank=3), Dense(torch.float32))
    for adapter in adapters:
        assert isinstance(adapter, PairAdapter)
        nn.init.normal_(adapter.A)
        nn.init.normal_(adapter.B)
    model.double()
    data = examples(20)

    def gradients(pack: int) -> tuple[float, torch.Tensor]:
        batches = Batches(data, 50, pad_id=0, pack=pack)
        (micro,) = batches.step(0)
        model.zero_grad()
        loss = batch_loss(model, micro, CPU) / micro.tokens
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (apart, wanted), (packed, found) = gradients(0), gradients(24)
    assert packed == pytest.approx(apart, rel=rounding)
    assert wanted.norm() > 0
    torch.testing.assert_close(found, wanted, rtol=1e3 * rounding, atol=rounding)


def test_packed_rows_hold_the_tokens_of_their_examples():
    data = examples(30)
    batches = Batches(data, 2, pad_id=0, accumulation=2, seed=3, pack=20)
    seen: list[tuple[int, ...]] = []
    real = trained = 0
    for t in range(batches.total_steps):
        micros = batches.step(t)
        assert len({micro.tokens for micro in micros}) == 1
        assert micros[0].tokens == sum(int((micro.labels[:, :] != IGNORE).sum()) for micro in micros)
        for micro in micros:
            assert micro.attention_mask is None and micro.position_ids is not None
            real, trained = real + micro.real, trained + int((micro.labels != IGNORE).sum())
            for row, positions in zip(micro.input_ids.tolist(), micro.position_ids.tolist(), strict=True):
                starts = [at for at, position in enumerate(positions) if position == 0]
                seen += [tuple(row[a:b]) for a, b in zip(starts, [*starts[1:], len(row)], strict=True)]
    left = [tuple(example.input_ids) for example in data]
    for example in left:
        assert example in seen
    assert real == sum(map(len, left))
    assert trained == sum(example.trained for example in data)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_filled_token_by_token(packed):
    """The rows written out the slow way, the padding, an empty row and every type included."""
    rows = [examples(5), examples(2), [Example([7], [7])]]
    micro = collate([[e.arrays for e in row] for row in rows], 4, pad_id=9, tokens=1, samples=(0, 5, 7), packed=packed)
    rows.append([Example([9], [IGNORE])])
    longest = max(sum(len(example.input_ids) for example in row) for row in rows)
    for number, row in enumerate(rows):
        gap = longest - sum(len(example.input_ids) for example in row)
        ids = [token for example in row for token in example.input_ids]
        labels = [label for e in row for label in ([IGNORE, *e.labels[1:]] if packed else e.labels)]
        positions = [*(k for example in row for k in range(len(example.input_ids))), *range(gap)]
        assert micro.input_ids[number].tolist() == ids + [9] * gap
        assert micro.labels[number].tolist() == labels + [IGNORE] * gap
        if packed:
            assert micro.position_ids[number].tolist() == positions and micro.attention_mask is None
        else:
            assert micro.attention_mask[number].tolist() == [1] * len(ids) + [0] * gap and micro.position_ids is None
    tensors = micro._replace(starts=None)  # these are int32, as attention wants them
    assert {tensor.dtype for tensor in tensors if isinstance(tensor, torch.Tensor)} == {torch.int64}
    assert micro.real == sum(len(example.input_ids) for row in rows[:3] for example in row)


@pytest.mark.parametrize("split", [(4, 1, 1), (2, 2, 1), (1, 2, 2), (1, 1, 4)])
def test_the_packed_global_batch_does_not_depend_on_the_hardware(split):
    data = examples(60)

    def rows(t: int, split: tuple[int, int, int]) -> list[list[int]]:
        ranks = [
            Batches(data, split[0], pad_id=0, accumulation=split[1], rank=rank, world=split[2], seed=5, pack=20).step(t)
            for rank in range(split[2])
        ]
        found = [row.tolist() for micros in ranks for micro in micros for row in micro.input_ids]
        return sorted(list(row) for row in (_trim(row) for row in found))

    for t in range(3):
        assert rows(t, split) == rows(t, (4, 1, 1))


def _trim(row: list[int]) -> list[int]:
    while row and row[-1] == 0:  # padding depends on the longest row beside it
        row = row[:-1]
    return row


def test_a_model_that_lets_packed_examples_see_each_other_is_refused():
    model = tiny.llama()
    engine = Plain()
    check_apart(engine, model, model)
    assert model.training
    forward = model.model.forward

    def blind(input_ids, **options):
        """Takes positions for the rotary embedding only, as a model with a mask of its own would."""
        return forward(input_ids, **{**options, "attention_mask": torch.ones_like(input_ids)})

    model.model.forward = blind
    with pytest.raises(ValueError, match=r"data.packing: LlamaForCausalLM with sdpa .*see each other"):
        check_apart(engine, model, model)
    engine.close()


def test_flat_rows_are_the_same_examples_in_one_row():
    (micro, *_) = Batches(examples(12), 3, pad_id=0, pack=20).step(0)
    inputs, labels = micro.inputs(CPU, flat=True), micro.targets(flat=True)
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == labels.shape == (1, micro.input_ids.numel())
    at = inputs["position_ids"][0] == 0
    assert (labels[0][at] == IGNORE).all()  # nothing is predicted from the example, or the row, before
    starts = [*at.nonzero()[:, 0].tolist(), at.numel()]
    assert (
        inputs["cu_seq_lens_q"] is inputs["cu_seq_lens_k"] is micro.starts
    )  # made with the batch, not when it is sent
    assert micro.starts.dtype == torch.int32 and micro.starts.tolist() == starts
    assert inputs["max_length_q"] == inputs["max_length_k"] == max(b - a for a, b in itertools.pairwise(starts))


def test_tokens_per_second_count_no_padding():
    data = examples(9)
    for pack in (0, 20):
        seen, batches = Meter(), Batches(data, 4, pad_id=0, pack=pack)  # the last batch is filled up
        for t in range(batches.total_steps):
            for micro in batches.step(t):
                seen.add(torch.tensor(1.0), micro)
        assert seen.tokens == sum(len(example.input_ids) for example in data)


# Batches of about one length.


def test_grouping_by_length_pads_less_and_loses_nothing():
    data = examples(200, longest=40)
    plain, grouped = (Batches(data, 4, pad_id=0, accumulation=2, seed=7, grouped=grouped) for grouped in (False, True))

    def padding(batches: Batches) -> float:
        micros = [micro for t in range(batches.total_steps) for micro in batches.step(t)]
        return 1 - sum(micro.real for micro in micros) / sum(micro.input_ids.numel() for micro in micros)

    assert padding(grouped) < padding(plain) / 2
    seen = sorted(sample for t in range(grouped.total_steps) for micro in grouped.step(t) for sample in micro.samples)
    assert seen == list(range(200))
    again = Batches(data, 4, pad_id=0, accumulation=2, seed=7, grouped=True)
    assert [m.samples for m in again.step(3)] == [m.samples for m in grouped.step(3)]
    assert [m.samples for m in grouped.step(0)] != [m.samples for m in grouped.step(grouped.steps_per_epoch)]


@pytest.mark.parametrize("split", [(8, 1, 1), (2, 2, 2), (1, 2, 4)])
def test_the_grouped_global_batch_does_not_depend_on_the_hardware(split):
    per_device, accumulation, world = split
    data = examples(50, longest=40)
    whole = Batches(data, 8, pad_id=0, seed=7, grouped=True)
    for t in (0, 4, 9):
        ranks = [
            Batches(
                data, per_device, pad_id=0, accumulation=accumulation, rank=rank, world=world, seed=7, grouped=True
            ).step(t)
            for rank in range(world)
        ]
        found = sorted(sample for micros in ranks for micro in micros for sample in micro.samples)
        assert found == sorted(sample for micro in whole.step(t) for sample in micro.samples)


def test_packing_fills_rows():
    lengths = np.random.default_rng(0).integers(20, 400, 500).tolist()
    rows = best_fit(lengths, 1024)
    assert sum(lengths) / (len(rows) * 1024) > 0.97
