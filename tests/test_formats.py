"""Files as they are found in the wild: each row is used, refused by its number, or counted as dropped, and never
silently changed.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import datasets
import pytest
from transformers import AutoTokenizer

from llm_lowrank.data import FORMATS, IGNORE, PRESETS, Data, load_corpus
from llm_lowrank.data.encoding import FRAMES
from tests.test_data import CHATML, MARKED, byte_tokenizer, cache, hub_cache, texts, write_jsonl  # noqa: F401 - cache: of every test here

pytestmark = pytest.mark.quick

HELLO = "שלום 👩‍👩‍👧 “quoted”\r\n\ttab"


def answers(tokenizer, examples) -> list[str]:
    """What is trained of each example."""
    return [tokenizer.decode([label for label in examples[k].labels if label != IGNORE]) for k in range(len(examples))]


def chat(*turns: str) -> str:
    """The text of a conversation under CHATML: system turns begin with a '!'."""
    text, role = "", "user"
    for turn in turns:
        system = turn.startswith("!")
        text += f"<|start|>{'system' if system else role}\n{turn.removeprefix('!')}<|end|>\n"
        role = role if system else {"user": "assistant", "assistant": "user"}[role]
    return text


def loaded(path: str, template: str | None = CHATML, **settings):
    tokenizer = byte_tokenizer(template)
    return tokenizer, load_corpus(Data(path, held_out=0, **settings), tokenizer, 0)


ALPACA = [
    {"instruction": "Say hello.", "input": "", "output": HELLO},
    {"instruction": "Add.", "input": "2, 3", "output": "5"},
    {"instruction": "No input here.", "output": "fine"},
]
SHAREGPT = [
    {
        "id": "a_0",
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "hi"},
            {"from": "gpt", "value": "yes?"},
            {"from": "human", "value": HELLO},
            {"from": "gpt", "value": "ok"},
        ],
    },
    {"id": "b_0", "conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "crlf", "bom", "parquet"])
def test_alpaca_as_it_is_published(tmp_path, kind):
    path = tmp_path / f"alpaca.{kind if kind in ('json', 'parquet') else 'jsonl'}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ALPACA)
    if kind == "parquet":
        datasets.Dataset.from_list(ALPACA).to_parquet(path)
    else:
        text = json.dumps(ALPACA) if kind == "json" else lines.replace("\n", "\r\n") if kind == "crlf" else lines
        path.write_bytes((b"\xef\xbb\xbf" if kind == "bom" else b"") + text.encode())
    tokenizer, corpus = loaded(str(path))
    assert texts(tokenizer, corpus.train) == [
        chat("Say hello.", HELLO),
        chat("Add.\n\n2, 3", "5"),
        chat("No input here.", "fine"),
    ]
    assert answers(tokenizer, corpus.train) == [f"{HELLO}<|end|>", "5<|end|>", "fine<|end|>"]
    assert (corpus.dropped, corpus.truncated, corpus.styles) == ({}, 0, ("chat",))


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_sharegpt_trains_every_answer_or_the_last(tmp_path, template):
    path = write_jsonl(tmp_path / "share.jsonl", SHAREGPT)
    tokenizer, corpus = loaded(path, template)
    assert texts(tokenizer, corpus.train) == [chat("!be brief", "hi", "yes?", HELLO, "ok"), chat("a", "b")]
    assert answers(tokenizer, corpus.train) == ["yes?<|end|>ok<|end|>", "b<|end|>"]
    assert answers(tokenizer, loaded(path, template, train_on="last")[1].train) == ["ok<|end|>", "b<|end|>"]


def test_plain_text_is_trained_whole(tmp_path):
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": f"one {HELLO}"}, {"text": "two"}])
    tokenizer, corpus = loaded(path)
    assert texts(tokenizer, corpus.train) == [f"one {HELLO}<|end|>", "two<|end|>"]
    assert answers(tokenizer, corpus.train) == texts(tokenizer, corpus.train)


@pytest.mark.parametrize("setting", [{"system": "be kind"}, {"prompt_style": "alpaca"}, {"train_on": "last"}])
def test_settings_of_conversations_are_refused_beside_plain_text_not_ignored(tmp_path, setting):
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": "one"}] * 3)
    for streaming in (False, True):
        with pytest.raises(
            ValueError, match=f"data.{next(iter(setting))} is for questions and answers and .* is plain text"
        ):
            loaded(path, streaming=streaming, **setting)


def test_settings_that_another_one_would_ignore_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data.prompt_style: alpaca would ignore data.chat_template"):
        Data("a.jsonl", prompt_style="alpaca", chat_template="mine.jinja")
    hub_cache(monkeypatch, tmp_path, PRESETS["alpaca"].hub, {"train.jsonl": json.dumps(WILD["alpaca"])})
    with pytest.raises(ValueError, match=r"data.preset is for local copies and alpaca names its own"):
        loaded("alpaca", preset="metamathqa")


def test_a_system_prompt_goes_where_none_is(tmp_path):
    path = write_jsonl(tmp_path / "share.jsonl", SHAREGPT)
    tokenizer, corpus = loaded(path, system="be kind")
    assert texts(tokenizer, corpus.train) == [chat("!be brief", "hi", "yes?", HELLO, "ok"), chat("!be kind", "a", "b")]


def test_columns_of_any_name(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "1+1", "solution": "2", "source": "x"}])
    tokenizer, corpus = loaded(path, columns={"prompt": "problem", "completion": "solution"})
    assert texts(tokenizer, corpus.train) == [chat("1+1", "2")]
    with pytest.raises(ValueError, match="no column 'question' to take prompt from; it has problem, solution, source"):
        loaded(path, columns={"prompt": "question", "completion": "solution"})


# Rows that cannot be used.

BAD = {
    "missing field": (ALPACA[1], {"instruction": "x"}, "output is missing"),
    "empty answer": (ALPACA[1], {"instruction": "x", "input": "", "output": " \n"}, "the answer is empty"),
    "empty instruction": (ALPACA[1], {"instruction": "", "input": "", "output": "y"}, "the instruction is empty"),
    "content is a list": (
        SHAREGPT[1],
        {"conversations": [{"from": "human", "value": ["x"]}]},
        "message 0: value is list, not text",
    ),
    "null content": (SHAREGPT[1], {"conversations": [{"from": "human", "value": None}]}, "message 0: value is missing"),
    "unknown role": (
        SHAREGPT[1],
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "message 0: the from 'narrator' is none of system,",
    ),
    "no role": (SHAREGPT[1], {"conversations": [{"value": "x"}]}, "message 0: the from None is none of"),
    "no messages": (SHAREGPT[1], {"conversations": []}, "conversations is not a list of"),
    "no answer": (SHAREGPT[1], {"conversations": [{"from": "human", "value": "x"}]}, "the answer is empty"),
    "nothing": ({"text": "something"}, {"text": ""}, "the text is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_refused_by_its_number_or_counted(tmp_path, case):
    good, bad, why = BAD[case]
    path = write_jsonl(tmp_path / "wild.jsonl", [good, good, bad, good])
    with pytest.raises(ValueError, match=rf"wild.jsonl, row 2 \(the first is 0\): {why}.*\n.*data.bad_rows: drop"):
        loaded(path)
    _, corpus = loaded(path, bad_rows="drop")
    assert len(corpus.train) == 3
    ((reason, count),) = corpus.dropped.items()
    assert count == 1 and reason.startswith(why)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_column_of_text_and_other_things_keeps_its_texts_and_names_the_row_of_another_thing(tmp_path, kind):
    """The types that `datasets` finds in a file made "5" the number 5 here, and "yes" lost its quotation marks."""
    quoted = {"instruction": "Say yes in quotation marks.", "input": "", "output": '"yes"'}
    rows = [ALPACA[1], {"instruction": "x", "input": "", "output": ["a", "b"]}, quoted]
    path = tmp_path / f"wild.{kind}"
    write_jsonl(path, rows) if kind == "jsonl" else path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=rf"wild.{kind}, row 1 \(the first is 0\): output is list, not text"):
        loaded(str(path))
    tokenizer, corpus = loaded(str(path), bad_rows="drop")
    assert corpus.dropped == {"output is list, not text": 1}
    assert answers(tokenizer, corpus.train) == ["5<|end|>", '"yes"<|end|>']


def test_many_bad_rows_are_counted_and_the_first_are_named(tmp_path):
    path = write_jsonl(
        tmp_path / "wild.jsonl", [{"prompt": "x", "completion": "" if k % 2 else "y"} for k in range(20)]
    )
    with pytest.raises(ValueError, match=r"row 1 (?s:.*)row 9 (?s:.*)and 5 more rows") as error:
        loaded(path)
    assert "row 11" not in str(error.value)


@pytest.mark.parametrize("ending", ['{"prompt": "c", "comp', "[1, 2]x\n"])
def test_a_truncated_last_line_is_named(tmp_path, ending):
    path = write_jsonl(tmp_path / "cut.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    with open(path, "a") as file:
        file.write(ending)
    last = "" if ending.endswith("\n") else ", the last one, which may have been cut off"
    with pytest.raises(ValueError, match=rf"cut.jsonl, row 3 \(the first is 0\){last}: .*mend or remove it"):
        loaded(path)


def test_half_a_surrogate_pair_and_other_encodings_are_named(tmp_path):
    (tmp_path / "half.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"prompt": "\\ud83d", "completion": "b"}\n'
    )
    with pytest.raises(ValueError, match=r"half.jsonl, row 1 \(the first is 0\)"):
        loaded(str(tmp_path / "half.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "caf\u00e9", "completion": "b"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl, row 0 \(the first is 0\).*utf-8"):
        loaded(str(tmp_path / "latin.jsonl"))


def test_an_example_of_ten_thousand_tokens_is_cut_and_counted_or_dropped_and_counted(tmp_path):
    rows = [
        {"prompt": "p", "completion": "y" * 10_000},
        {"prompt": "p" * 10_000, "completion": "y"},
        {"prompt": "p", "completion": "y"},
    ]
    _, corpus = loaded(write_jsonl(tmp_path / "long.jsonl", rows), max_length=256)
    assert (corpus.truncated, corpus.dropped) == (1, {"no completion token left within max_length": 1})
    assert [len(corpus.train[k].input_ids) for k in range(2)] == [
        256,
        len("<s>user\np<e>\n<s>assistant\ny<e>\n") - 4 * 2,
    ]


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path):
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
    rows = [SHAREGPT[1], {"conversations": [{"from": "gpt", "value": "hello"}, {"from": "human", "value": "hi"}]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 1 .*begin with the user"):
        loaded(path, strict)
    assert loaded(path, strict, bad_rows="drop")[1].dropped == {
        "the chat template refuses this conversation: begin with the user": 1
    }


# Prompt styles and presets.


def test_prompt_styles_are_those_of_the_papers(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ALPACA[1:])
    task, respond = (
        "Below is an instruction that describes a task",
        "Write a response that appropriately completes the request.",
    )
    coder = (
        "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable "
        "responses to user "
        "instructions.\n\n@@ Instruction\n"
    )
    think = "### Response: Let's think step by step."
    wanted = {
        "plain": ("Add.\n\n2, 3", "No input here."),
        "alpaca": (
            f"{task}, paired with an input that provides further context. {respond}\n\n### Instruction:\nAdd.\n\n### "
            "Input:\n2, 3\n\n"
            "### Response:\n",
            f"{task}. {respond}\n\n### Instruction:\nNo input here.\n\n### Response:\n",
        ),
        "metamath": (
            f"{task}. {respond}\n\n### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n{think}",
            f"{task}. {respond}\n\n### Instruction:\nNo input here.\n\n{think}",
        ),
        "magicoder": (f"{coder}Add.\n\n2, 3\n\n@@ Response\n", f"{coder}No input here.\n\n@@ Response\n"),
    }
    assert wanted.keys() == FRAMES.keys()
    for style, (first, second) in wanted.items():
        for template in (None, CHATML):  # asked for by name, a style is used with a template too
            tokenizer, corpus = loaded(path, template, prompt_style=style)
            assert texts(tokenizer, corpus.train) == [f"{first}5<|end|>", f"{second}fine<|end|>"]
            assert answers(tokenizer, corpus.train) == ["5<|end|>", "fine<|end|>"]


def test_braces_in_the_data_stay(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"instruction": "{context} {question} {0}", "input": "{question}", "output": "{}"}]
    )
    tokenizer, corpus = loaded(path, None, prompt_style="plain")
    assert texts(tokenizer, corpus.train) == ["{context} {question} {0}\n\n{question}{}<|end|>"]


def test_a_style_is_one_question_and_one_answer(tmp_path):
    path = write_jsonl(tmp_path / "share.jsonl", [SHAREGPT[1], SHAREGPT[0]])
    with pytest.raises(ValueError, match=r"row 1 .*does not fit data.prompt_style: plain.*chat_template"):
        loaded(path, None)
    with pytest.raises(ValueError, match=r"prompt_style: chat needs a chat template.*data.chat_template FILE.jinja"):
        loaded(path, None, prompt_style="chat")


WILD = {  # rows with the columns that the publishers give
    "alpaca": {"instruction": "Add.", "input": "2, 3", "output": "5", "text": "Below is ... 5"},
    "commonsense-170k": {
        "instruction": "Answer true or false.",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    },
    "magicoder-evol-instruct": {"instruction": "Write f.", "response": "def f(): pass"},
    "metamathqa": {
        "type": "GSM_Rephrased",
        "query": "1+1?",
        "original_question": "one and one?",
        "response": "2\nThe answer is: 2",
    },
    "ultrachat": {
        "prompt": "hi",
        "prompt_id": "f0",
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes?"},
            {"role": "user", "content": "bye"},
            {"role": "assistant", "content": "ok"},
        ],
    },
}


def test_a_preset_that_is_misspelt_gets_a_hint():
    with pytest.raises(ValueError, match=r"cannot read metamathqq, .*did you mean 'metamathqa'"):
        loaded("metamathqq")


def test_every_preset_is_an_answer_to_settings():
    assert set(PRESETS) == set(WILD)
    assert all(preset.format in FORMATS and preset.style in FRAMES for preset in PRESETS.values())


@pytest.mark.parametrize("name", WILD)
def test_a_preset_reads_a_local_copy_and_the_hub_alike(tmp_path, monkeypatch, name):
    copy = write_jsonl(tmp_path / "copy.jsonl", [WILD[name]])
    tokenizer, corpus = loaded(copy, preset=name)
    question = WILD[name].get("query") or WILD[name].get("instruction") or "hi"
    assert question in texts(tokenizer, corpus.train)[0] and corpus.styles == ("chat",)
    file = f"data/{PRESETS[name].split}-00000-of-00001.jsonl"
    hub_cache(monkeypatch, tmp_path / "hub", PRESETS[name].hub, {file: json.dumps(WILD[name])})
    assert texts(tokenizer, loaded(name)[1].train) == texts(tokenizer, corpus.train)
    if name != "ultrachat":  # a base model gets the prompt of the paper
        _, base = loaded(name, None)
        assert base.styles == (PRESETS[name].style,)
        assert texts(tokenizer, base.train)[0].startswith(FRAMES[PRESETS[name].style].alone.partition(",")[0][:40])


# Tokenizers.


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory):
    """A LLaMA-2 tokenizer: sentencepiece BPE with bytes for what it does not know, <s> before every text, no pad token,
    no template.
    """
    import sentencepiece as spm

    folder = tmp_path_factory.mktemp("sentencepiece")
    text = folder / "corpus.txt"
    text.write_text(
        "\n".join(f"the answer to question {k} is {k * k} and then some words follow ### Response:" for k in range(300))
    )
    spm.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        pad_id=-1,
        minloglevel=2,
    )
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": False}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("style", ["plain", "alpaca", "metamath", "magicoder"])
def test_a_llama_2_tokenizer_keeps_every_character(tmp_path, llama_2, style):
    tokenizer = llama_2
    assert tokenizer.pad_token_id is None and not tokenizer.chat_template
    rows = [
        {"prompt": "question 3", "completion": completion}
        for completion in ("the answer is 9", " 9", f"{HELLO}", "\nnew line")
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = load_corpus(Data(path, held_out=0, prompt_style=style), tokenizer, 0)
    for example, row in zip((corpus.train[k] for k in range(4)), rows, strict=True):
        assert example.input_ids[0] == tokenizer.bos_token_id and example.input_ids[-1] == tokenizer.eos_token_id
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
        assert example.labels[-1] == tokenizer.eos_token_id
        trained = [label for label in example.labels[:-1] if label != IGNORE]
        whole = tokenizer.decode(example.input_ids[1:-1])
        assert whole == FRAMES[style].prompt("question 3") + row["completion"]
        assert tokenizer.decode(trained).strip() == row["completion"].strip()


@pytest.mark.parametrize(
    "setting, others, table",
    [
        ("format", {"auto"}, FORMATS),
        ("preset", {"none"}, PRESETS),
        ("prompt_style", {"auto", "chat"}, FRAMES),
    ],
)
def test_a_setting_offers_what_its_table_holds(setting, others, table):
    assert {*get_args(Data.__dataclass_fields__[setting].type)} == others | table.keys()


def test_a_llama_3_like_tokenizer_with_a_template_of_its_own(tmp_path):
    """Byte-level BPE with a template that writes the begin token itself: it must stand there once."""
    template = "{{ bos_token }}" + CHATML
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    path = write_jsonl(tmp_path / "a.jsonl", ALPACA)
    corpus = load_corpus(Data(path, held_out=0), tokenizer, 0)
    assert [corpus.train[k].input_ids.count(tokenizer.bos_token_id) for k in range(3)] == [1, 1, 1]


def test_a_chat_template_from_a_file(tmp_path):
    from llm_lowrank.data import with_template

    (tmp_path / "template.jinja").write_text(CHATML)
    tokenizer = with_template(byte_tokenizer(None), str(tmp_path / "template.jinja"))
    path = write_jsonl(tmp_path / "share.jsonl", SHAREGPT)
    assert texts(tokenizer, load_corpus(Data(path, held_out=0), tokenizer, 0).train)[1] == chat("a", "b")
    with pytest.raises(ValueError, match=r"data.chat_template: cannot read"):
        with_template(tokenizer, str(tmp_path / "none.jinja"))


# Mixtures.


def test_a_mixture_takes_each_dataset_as_often_as_its_weight_says(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"a{k}", "completion": "x"} for k in range(40)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"instruction": f"b{k}", "output": "y"} for k in range(20)])
    tokenizer = byte_tokenizer(CHATML)

    def counted(**settings) -> tuple[list[str], list[str]]:
        corpus = load_corpus(Data(f"{a}, {b}", **settings), tokenizer, 0)
        found = texts(tokenizer, corpus.train)
        return [t for t in found if "user\na" in t], [t for t in found if "user\nb" in t]

    both = counted(held_out=0)
    assert [len(part) for part in both] == [40, 20]
    half, twice = counted(held_out=0, weights=[0.5, 2])
    assert (len(half), len(set(half)), len(twice), len(set(twice))) == (20, 20, 40, 20)
    assert half == counted(held_out=0, weights=[0.5, 2])[0]
    held = load_corpus(Data(f"{a}, {b}", held_out=6, weights=[1, 3]), tokenizer, 0)
    assert not set(texts(tokenizer, held.held_out)) & set(texts(tokenizer, held.train))
    with pytest.raises(ValueError, match=r"data.weights has 1 numbers and data.dataset 2 names"):
        Data(f"{a},{b}", weights=[1.0])


def test_what_is_held_out_is_not_trained_on_under_another_answer(tmp_path):
    rows = [{"prompt": f"q{k % 10}", "completion": f"answer {k}"} for k in range(30)]
    tokenizer = byte_tokenizer(CHATML)
    corpus = load_corpus(Data(write_jsonl(tmp_path / "a.jsonl", rows), held_out=3), tokenizer, 0)
    asked = {text.split("<|end|>")[0] for text in texts(tokenizer, corpus.held_out)}
    assert len(asked) == 3 and not asked & {text.split("<|end|>")[0] for text in texts(tokenizer, corpus.train)}
    assert (len(corpus.train), corpus.dropped) == (21, {"question is also held out": 6})


def test_held_out_by_a_column_holds_out_whole_values_of_it(tmp_path):
    rows = [{"prompt": f"q{k}", "completion": f"a{k}", "module": f"m{k % 12}"} for k in range(120)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    tokenizer = byte_tokenizer()
    corpus = load_corpus(Data(path, held_out=24, held_out_by="module"), tokenizer, 0)
    module = {row["prompt"] + row["completion"]: row["module"] for row in rows}
    sides = [
        {module[text.removesuffix("<|end|>")] for text in texts(tokenizer, x)} for x in (corpus.held_out, corpus.train)
    ]
    assert (len(corpus.held_out), len(corpus.train)) == (24, 90) and not sides[0] & sides[1]
    assert corpus.dropped == {"module is also held out": 6}  # three modules are held out, one of them in part
    with pytest.raises(
        ValueError, match=r"data.held_out_by: .* has no column 'modul'; it has prompt, completion, module"
    ):
        load_corpus(Data(path, held_out_by="modul"), tokenizer, 0)
    with pytest.raises(ValueError, match=r"data.streaming cannot be used with held_out_by"):
        Data(path, held_out_by="module", streaming=True)
    with pytest.raises(ValueError, match=r"data.held_out_by is for files and hub names only"):
        load_corpus(Data("reasoning-gym:chain_sum", held_out_by="module"), tokenizer, 0)


def test_a_dataset_that_is_made_by_a_script_now_names_the_script():
    with pytest.raises(ValueError, match=r"run `python \$\(llm-lowrank recipes\)/data/stdlib_code.py output/stdlib-"):
        load_corpus(Data("stdlib-code"), byte_tokenizer(), 0)


# The cache.


def test_tokens_are_made_once_and_again_when_anything_changes(tmp_path, monkeypatch):
    from llm_lowrank.data import corpus as module

    path, made = tmp_path / "a.jsonl", []
    real = module._map_rows
    monkeypatch.setattr(
        module, "_map_rows", lambda part, *rest, **more: made.append(part.name) or real(part, *rest, **more)
    )
    rows = [{"prompt": f"p{k}", "completion": "c"} for k in range(6)]
    write_jsonl(path, rows)

    def fingerprint(template: str | None = CHATML, **settings) -> str:
        return load_corpus(Data(str(path), held_out=0, **settings), byte_tokenizer(template), 0).fingerprint

    first = fingerprint()
    assert fingerprint() == first and len(made) == 1
    assert fingerprint(max_length=30) == first and len(made) == 2  # another key, the same tokens
    assert fingerprint(MARKED) == first and len(made) == 3
    assert fingerprint(None) != first and len(made) == 4
    write_jsonl(path, [*rows[:-1], {"prompt": "p5", "completion": "d"}])  # of the same length, in the same second
    assert fingerprint() != first and len(made) == 5
    write_jsonl(path, rows)
    assert fingerprint() == first and len(made) == 5


def test_one_process_of_a_node_makes_the_tokens_while_the_others_wait(tmp_path, monkeypatch):
    from llm_lowrank.data import corpus as module

    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{k}", "completion": "c"} for k in range(6)])
    made, begun, go_on = [], threading.Event(), threading.Event()
    real = module._map_rows

    def slow(part, *rest, **more):
        made.append(part.name)
        begun.set()
        assert go_on.wait(60)
        return real(part, *rest, **more)

    monkeypatch.setattr(module, "_map_rows", slow)
    with ThreadPoolExecutor(2) as ranks:  # a lock of a file keeps two who opened it apart, in one process as in two
        first = ranks.submit(loaded, path)
        assert begun.wait(60)
        second = ranks.submit(loaded, path)
        time.sleep(0.3)
        assert not second.done() and len(made) == 1
        go_on.set()
        fingerprints = {rank.result(60)[1].fingerprint for rank in (first, second)}
    assert len(fingerprints) == len(made) == 1


def test_a_cache_that_was_cut_off_is_made_again(tmp_path, monkeypatch):
    from llm_lowrank.data import corpus as module

    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    loaded(path)
    (note,) = (module.cache_dir() / "tokens").glob("*.json")
    note.unlink()  # what is written last
    note.with_suffix(".arrow").write_bytes(b"half")
    tokenizer, corpus = loaded(path)
    assert texts(tokenizer, corpus.train) == [chat("p", "c")]


def test_real_tokenizer_through_the_formats(tmp_path):
    from llm_lowrank.models.source import DEMO, Source

    tokenizer = AutoTokenizer.from_pretrained(Source.open(DEMO).path)
    assert tokenizer.eos_token == "<|im_end|>"  # as the GGUF file says
    path = write_jsonl(tmp_path / "a.jsonl", ALPACA)
    corpus = load_corpus(Data(path, held_out=0), tokenizer, 0)
    assert answers(tokenizer, corpus.train) == [f"{HELLO}<|im_end|>", "5<|im_end|>", "fine<|im_end|>"]
