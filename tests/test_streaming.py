"""Data that is read while it is trained on: the same batches on any hardware, again after a resume, and what is left
out is counted.
"""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_lowrank.data import IGNORE, Data, Stream, StreamBatches, load_corpus, training_batches
from tests.test_data import CHATML, byte_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    rows = [{"prompt": f"q{k}", "completion": f"a{k}"} for k in range(50)]
    rows[20] = {"prompt": "q2", "completion": "asked before"}  # of a question that will be held out
    rows[33] = {"prompt": "q33", "completion": ""}
    return write_jsonl(tmp_path_factory.mktemp("stream") / "a.jsonl", rows)


def stream(path: str, **changes) -> Stream:
    return Stream(
        Data(path, streaming=True, **{"held_out": 5, "bad_rows": "drop", **changes}), byte_tokenizer(CHATML), 3
    )


def asked(ids) -> str:
    return byte_tokenizer(CHATML).decode(ids).split("<|end|>")[0].removeprefix("<|start|>user\n")


def test_an_epoch_has_every_usable_example_once_and_none_that_is_held_out(path):
    data = stream(path)
    assert [asked(example.input_ids) for example in data.held_out] == [f"q{k}" for k in range(5)]
    epochs = data.examples()
    first, second = ([asked(example.input_ids) for example in islice(epochs, 43)] for _ in range(2))
    wanted = {f"q{k}" for k in range(5, 50)} - {"q20", "q33"}
    assert set(first) == set(second) == wanted and len(first) == len(wanted)
    assert first != second and first != sorted(first)  # shuffled, each epoch anew
    assert data.dropped == {"question is also held out": 2, "the answer is empty": 2}  # in two epochs


@settings(deadline=None, max_examples=6)
@given(split=st.sampled_from([(1, 1, 6), (1, 2, 3), (3, 1, 2), (2, 3, 1)]), t=st.sampled_from([0, 3, 9]))
def test_the_global_batch_does_not_depend_on_the_hardware(path, split, t):
    per_device, accumulation, world = split
    (whole,) = StreamBatches(stream(path), 6, pad_id=0).step(t)  # asked for at once: as after a resume
    micros = []
    for rank in range(world):
        batches = StreamBatches(stream(path), per_device, pad_id=0, accumulation=accumulation, rank=rank, world=world)
        for before in range(t):
            batches.step(before)
        micros += batches.step(t)
    rows = sorted(asked(row.tolist()) for micro in micros for row in micro.input_ids)
    assert rows == sorted(asked(row.tolist()) for row in whole.input_ids)
    assert sorted(sample for micro in micros for sample in micro.samples) == list(range(6 * t, 6 * t + 6))
    assert {micro.tokens for micro in micros} == {int((whole.labels != IGNORE).sum())}


def test_what_is_cut_and_what_is_left_out_before_training_begins_counts_too(tmp_path):
    rows = [{"prompt": "q0", "completion": ""}, *({"prompt": f"q{k}", "completion": "long" * k} for k in range(1, 20))]
    data = stream(write_jsonl(tmp_path / "a.jsonl", rows), max_length=60)
    assert data.dropped == {"the answer is empty": 1} and len(data.held_out) == 5
    list(islice(data.examples(), 14))
    lengths = [
        len("<s>user\nq1<e>\n<s>assistant\n<e>\n") - 4 * 2 + len(row["prompt"]) - 2 + len(row["completion"])
        for row in rows[1:]
    ]
    assert data.truncated == sum(length > 60 for length in lengths) > 5


def test_a_corpus_of_a_stream(path):
    settings = Data(path, streaming=True, held_out=5, bad_rows="drop")
    corpus = load_corpus(settings, byte_tokenizer(CHATML), 3)
    assert (len(corpus.held_out), corpus.questions, corpus.fingerprint, corpus.styles) == (5, [], "", ("chat",))
    assert corpus.some(2) == corpus.held_out[:2]
    batches = training_batches(
        corpus, settings, per_device=2, pad_id=0, accumulation=1, rank=0, world=1, seed=0, epochs=1.0
    )
    assert isinstance(batches, StreamBatches)
    with pytest.raises(ValueError, match=r"data.streaming: how long the data is cannot be known; set max_steps"):
        _ = batches.total_steps


def test_streams_that_cannot_be(path, tmp_path):
    with pytest.raises(
        ValueError, match=r"line 34 of .*a.jsonl, row 33 \(the first is 0\): the answer is empty.*data.bad_rows: drop"
    ):
        list(islice(stream(path, bad_rows="refuse").examples(), 43))
    with pytest.raises(ValueError, match=r"data.held_out=60 is more than the distinct examples"):
        stream(path, held_out=60)
    with pytest.raises(ValueError, match="nothing to train on beyond the 48 held out"):
        next(stream(path, held_out=48).examples())
    for wrong in ({"packing": True}, {"group_by_length": True}, {"dataset": "a.jsonl, b.jsonl"}):
        with pytest.raises(ValueError, match=r"data.streaming cannot be used with"):
            Data(**{"dataset": "a.jsonl", "streaming": True, **wrong})
    with pytest.raises(ValueError, match=r"data.streaming is for files and hub names only"):
        load_corpus(Data("reasoning-gym:chain_sum", streaming=True), byte_tokenizer(CHATML), 0)
    useless = write_jsonl(tmp_path / "useless.jsonl", [{"prompt": "q", "completion": ""}] * 1100)
    with pytest.raises(ValueError, match="1000 rows in a row cannot be used, the last one for: the answer is empty"):
        stream(useless, held_out=0).examples().__next__()
