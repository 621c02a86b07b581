"""Columns and keys of messages that change what is learned: each is used, refused by name, or left aside by name."""

from __future__ import annotations

import json
import re

import datasets
import pytest

from llm_lowrank.data import Data, load_corpus
from llm_lowrank.data.columns import REFUSED
from tests.test_data import CHATML, MARKED, byte_tokenizer, cache, texts, write_jsonl  # noqa: F401 - cache: of every test here
from tests.test_formats import answers, chat

TURN = {"role": "user", "content": "q"}
PAIR = {"prompt": "q", "completion": "a"}
ROWS = {  # of each format, one row that is trained
    "messages": {"messages": [TURN, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": PAIR,
    "alpaca": {"instruction": "q", "output": "a"},
    "text": {"text": "a"},
}


def loaded(tmp_path, rows, template: str | None = CHATML, **settings):
    tokenizer = byte_tokenizer(template)
    return tokenizer, load_corpus(Data(write_jsonl(tmp_path / "a.jsonl", rows), held_out=0, **settings), tokenizer, 0)


def trained(tmp_path, row, template: str | None = CHATML, **settings) -> tuple[str, str]:
    """The text of a row and what is trained of it."""
    tokenizer, corpus = loaded(tmp_path, [row], template, **settings)
    return texts(tokenizer, corpus.train)[0], answers(tokenizer, corpus.train)[0]


def flagged(*flags: dict, users: dict | None = None) -> dict:
    """A conversation whose answers are a0, a1, ... with these flags."""
    turns = []
    for number, flag in enumerate(flags):
        turns += [
            {"role": "user", "content": f"q{number}", **(users or {})},
            {"role": "assistant", "content": f"a{number}", **flag},
        ]
    return {"messages": turns}


# Flags of turns.


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize(
    "off, on",
    [
        ({"weight": 0}, {"weight": 1}),
        ({"weight": 0.0}, {"weight": 1.0}),
        ({"weight": 0}, {}),
        ({"train": False}, {"train": True}),
        ({"training": False}, {}),
        ({"loss": 0}, {"loss": True}),
        ({"loss_mask": 0}, {"loss_mask": 1}),
        ({"masked": True}, {"masked": False}),
    ],
)
def test_a_flag_makes_an_answer_a_part_of_the_prompt(tmp_path, template, off, on):
    row = flagged(off, on, off, on)
    assert trained(tmp_path, row, template) == (
        chat("q0", "a0", "q1", "a1", "q2", "a2", "q3", "a3"),
        "a1<|end|>a3<|end|>",
    )


def test_flags_of_sharegpt_and_of_turns_that_are_no_answers(tmp_path):
    turns = [
        {"from": "human", "value": "q", "weight": 0},
        {"from": "gpt", "value": "BAD", "weight": 0},
        {"from": "human", "value": "again"},
        {"from": "gpt", "value": "GOOD", "weight": 1},
    ]
    assert trained(tmp_path, {"conversations": turns}) == (chat("q", "BAD", "again", "GOOD"), "GOOD<|end|>")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_last_answer_is_trained_only_if_its_flag_says_so(tmp_path, template):
    assert trained(tmp_path, flagged({}, {"weight": 1}), template, train_on="last")[1] == "a1<|end|>"
    with pytest.raises(ValueError, match=r"row 0 .*no answer of the row is trained"):
        trained(tmp_path, flagged({"weight": 1}, {"weight": 0}), template, train_on="last")


@pytest.mark.parametrize(
    "row, message",
    [
        (flagged({"weight": 0}, {"train": False}), "no answer of the row is trained"),
        (flagged({}, {"weight": 0.5}), r"message 3: weight is 0.5, .*write 1 or 0.*data.ignore: \[weight\]"),
        (flagged({"weight": "0"}), "message 1: weight is '0'"),
        (flagged({"weight": 2}), "message 1: weight is 2"),
        (flagged({"weight": 0, "train": True}), "message 1: weight and train contradict each other"),
        (flagged({}, users={"train": True}), "message 0: train asks to train a turn that is no answer"),
        (flagged({}, users={"masked": False}), "message 0: masked asks to train a turn that is no answer"),
        (flagged({"mask": 1}), r"message 1: the key mask does not say which side it marks.*rename it to train"),
        (flagged({"train_detail": [{"begin_offset": 0}]}), "message 1: the key train_detail marks parts of a text"),
    ],
)
def test_flags_that_cannot_be_followed_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=rf"row 1 \(the first is 0\): .*{message}"):
        loaded(tmp_path, [ROWS["messages"], row])


def test_a_flag_that_is_left_aside_trains_the_turn(tmp_path):
    assert trained(tmp_path, flagged({"weight": 0.5}, {}), ignore=["weight"])[1] == "a0<|end|>a1<|end|>"


def test_a_flag_without_a_template(tmp_path):
    row = flagged({"weight": 1})
    assert trained(tmp_path, row, None) == ("q0a0<|end|>", "a0<|end|>")
    with pytest.raises(ValueError, match="no answer of the row is trained"):
        trained(tmp_path, flagged({"weight": 0}), None)


# Columns that are refused.

CELLS = {"chosen": "good", "label": False, "labels": 0, "images": ["0.jpg"], "weight": 0.5, "mask": [0, 1]}


@pytest.mark.parametrize("format", ROWS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_column_that_changes_what_is_learned_is_used_or_refused_or_left_aside_by_name(tmp_path, format, name):
    from llm_lowrank.data.formats import FORMATS

    row = {**ROWS[format], name: CELLS.get(name, "x")}
    if name in FORMATS[format].columns:
        return  # used: the tests below
    with pytest.raises(ValueError, match=rf"row 0 .*: the column {name} .*; .*data.ignore: \[{name}\]"):
        loaded(tmp_path, [row])
    tokenizer, corpus = loaded(tmp_path, [row], ignore=[name])
    assert answers(tokenizer, corpus.train) == ["a<|end|>"] and corpus.unused == {name: 1}


@pytest.mark.parametrize("value", [None, "", []])
def test_a_column_that_holds_nothing_in_a_row_does_not_matter_there(tmp_path, value):
    rows = [{**PAIR, "images": value}, {**PAIR, "images": ["0.jpg"]}]
    with pytest.raises(ValueError, match=r"row 1 .*the column images belongs to a model that sees") as error:
        loaded(tmp_path, rows)
    assert "row 0" not in str(error.value)
    _, corpus = loaded(tmp_path, rows, bad_rows="drop")
    assert len(corpus.train) == 1 and next(iter(corpus.dropped)).startswith("the column images")


def test_a_weight_of_one_does_not_matter(tmp_path):
    assert loaded(tmp_path, [{**PAIR, "weight": 1.0}])[1].unused == {"weight": 1}


@pytest.mark.parametrize("name", ["image", "images", "videos", "rejected", "label"])
def test_a_key_of_a_message_is_refused_too(tmp_path, name):
    row = {"messages": [{**TURN, name: ["x"]}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(ValueError, match=rf"row 0 .*message 0: the key {name} .*data.ignore: \[{name}\]"):
        trained(tmp_path, row)
    assert trained(tmp_path, row, ignore=[name]) == (chat("q", "a"), "a<|end|>")


def test_parts_of_a_content(tmp_path):
    def row(*parts: dict) -> dict:
        return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "a"}]}

    text = {"type": "text", "text": "q"}
    assert trained(tmp_path, row(text)) == (chat("q", "a"), "a<|end|>")
    for parts, message in (
        ([{"type": "image"}, text], "message 0: the content has a part of type image"),
        ([{"type": "image_url", "image_url": "x"}], "message 0: the content has a part of type image_url"),
        ([text, text], "message 0: the content is 2 texts; join them"),
        ([{"type": "text"}], "message 0: content is missing"),
    ):
        with pytest.raises(ValueError, match=f"row 0 .*{message}"):
            trained(tmp_path, row(*parts))


def test_all_other_columns_are_listed_with_the_number_of_their_rows(tmp_path):
    rows = [{**PAIR, "id": 1, "source": "x"}, {**PAIR, "id": 2, "source": None}, {**PAIR, "module": "m"}]
    assert loaded(tmp_path, rows)[1].unused == {"id": 2, "source": 1, "module": 1}
    assert loaded(tmp_path, rows[2:], held_out_by="module")[1].unused == {}
    messages = [{**TURN, "id": 7, "name": "ann"}, {"role": "assistant", "content": "a", "id": 8}]
    assert loaded(tmp_path, [{"messages": messages}])[1].unused == {"id": 1, "name": 1}
    named = CHATML.replace("}}\n{{", "}}{{ message.name }}\n{{", 1)
    assert loaded(tmp_path, [{"messages": messages}], named)[1].unused == {"id": 1}


def test_a_stream_lists_what_it_read(tmp_path):
    corpus = loaded(tmp_path, [{**PAIR, "id": k} for k in range(3)], streaming=True)[1]
    next(corpus.train.examples())
    assert corpus.unused["id"] >= 1
    with pytest.raises(ValueError, match="the column label"):
        next(loaded(tmp_path, [{**PAIR, "label": 1}], streaming=True)[1].train.examples())


def test_left_aside_columns_do_not_decide_the_format(tmp_path):
    row = {**ROWS["messages"], **ROWS["prompt_completion"], "completion": "b"}
    with pytest.raises(ValueError, match="formats messages and prompt_completion"):
        loaded(tmp_path, [row])
    assert trained(tmp_path, row, ignore=["messages"])[1] == "b<|end|>"
    with pytest.raises(ValueError, match="has the columns"):
        loaded(tmp_path, [ROWS["messages"]], ignore=["messages"])


def test_a_name_in_data_columns_that_the_format_has_not_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"data.columns: the format prompt_completion has no column sytem; it has prompt,"
    ):
        loaded(tmp_path, [{**PAIR, "system_prompt": "s"}], columns={"sytem": "system_prompt"})


def test_settings_of_files_are_refused_beside_generated_data():
    with pytest.raises(ValueError, match=r"data.ignore is for files and hub names only"):
        load_corpus(Data("reasoning-gym:chain_sum", ignore=["images"]), byte_tokenizer(CHATML), 0)


# Columns that are used.


@pytest.mark.parametrize("format", [name for name in ROWS if name != "text"])
def test_a_system_column_is_the_system_prompt(tmp_path, format):
    row = {**ROWS[format], "system": "be brief"}
    assert trained(tmp_path, row) == (chat("!be brief", "q", "a"), "a<|end|>")
    assert trained(tmp_path, row, system="be kind")[0] == chat("!be brief", "q", "a")
    assert trained(tmp_path, {**row, "system": ""}, system="be kind")[0] == chat("!be kind", "q", "a")
    named = {**ROWS[format], "system_prompt": "be brief"}
    assert trained(tmp_path, named, columns={"system": "system_prompt"})[0] == chat("!be brief", "q", "a")
    assert trained(tmp_path, row, ignore=["system"])[0] == chat("q", "a")


def test_two_system_prompts_are_refused(tmp_path):
    turns = [{"role": "system", "content": "be brief"}, *ROWS["messages"]["messages"]]
    assert trained(tmp_path, {"messages": turns, "system": "be brief"})[0] == chat("!be brief", "q", "a")
    with pytest.raises(ValueError, match=r"row 0 .*different system prompts; keep one"):
        trained(tmp_path, {"messages": turns, "system": "be kind"})


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_history_is_earlier_turns(tmp_path, template):
    row = {"instruction": "q2", "input": "x", "output": "a2", "history": [["q0", "a0"], ["q1", "a1"]], "system": "s"}
    whole = chat("!s", "q0", "a0", "q1", "a1", "q2\n\nx", "a2")
    assert trained(tmp_path, row, template) == (whole, "a0<|end|>a1<|end|>a2<|end|>")
    assert trained(tmp_path, row, template, train_on="last") == (whole, "a2<|end|>")
    assert trained(tmp_path, {**row, "history": json.dumps(row["history"])}, template)[0] == whole
    assert trained(tmp_path, {**row, "history": []}, template)[0] == chat("!s", "q2\n\nx", "a2")
    pair = {"prompt": "q2", "completion": "a2", "history": [["q0", "a0"]]}
    assert trained(tmp_path, pair, template) == (chat("q0", "a0", "q2", "a2"), "a0<|end|>a2<|end|>")


@pytest.mark.parametrize(
    "history, message",
    [
        ("hi", "history is not JSON"),
        ({"q": "a"}, r"history is not a list of \[question, answer\]"),
        ([["q"]], "history, entry 0: it is not"),
        ([["q", "a"], ["q", None]], "history, entry 1: it is not"),
        ([["q", " \n"]], "history, entry 0: the answer is empty"),
    ],
)
def test_a_history_that_is_none_is_refused(tmp_path, history, message):
    with pytest.raises(ValueError, match=f"row 0 .*{message}"):
        trained(tmp_path, {**ROWS["alpaca"], "history": history})


def test_a_history_needs_a_template(tmp_path):
    with pytest.raises(ValueError, match=r"does not fit data.prompt_style: plain"):
        trained(tmp_path, {**ROWS["alpaca"], "history": [["q0", "a0"]]}, None)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_prompt_and_completion_as_messages(tmp_path, template):
    prompt = [TURN, {"role": "assistant", "content": "old"}, {"role": "user", "content": "more"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "new"}]}
    assert trained(tmp_path, row, template) == (chat("q", "old", "more", "new"), "new<|end|>")
    later = [*row["completion"], {"role": "user", "content": "and?"}, {"role": "assistant", "content": "newer"}]
    assert trained(tmp_path, {**row, "completion": later}, template)[1] == "new<|end|>newer<|end|>"
    flag = [{"role": "assistant", "content": "new", "weight": 0}, *later[1:]]
    assert trained(tmp_path, {**row, "completion": flag, "system": "s"}, template) == (
        chat("!s", "q", "old", "more", "new", "and?", "newer"),
        "newer<|end|>",
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt": "q"}, "only one of prompt and completion is a list"),
        ({"completion": "a"}, "only one of prompt and completion is a list"),
        ({"completion": [TURN]}, "the completion has no answer"),
        ({"completion": [{"role": "assistant", "content": ""}]}, "message 1: the answer is empty"),
        ({"completion": []}, "completion is not a list of {role, content}"),
        ({"history": [["q", "a"]]}, "write the earlier turns into the prompt"),
    ],
)
def test_prompts_and_completions_that_are_not_both_messages_are_refused(tmp_path, change, message):
    row = {"prompt": [TURN], "completion": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(ValueError, match=f"row 0 .*{message}"):
        trained(tmp_path, {**row, **change})


def test_either_pair_of_keys_in_either_column(tmp_path):
    for row in (
        {"conversations": ROWS["messages"]["messages"]},
        {"messages": ROWS["sharegpt"]["conversations"]},
        {"messages": json.dumps(ROWS["messages"]["messages"])},
    ):
        assert trained(tmp_path, row) == (chat("q", "a"), "a<|end|>")


# Empty answers.


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("empty", ["", " \n\t", "<|end|>"])
def test_an_empty_answer_anywhere_is_refused(tmp_path, template, empty):
    for number in (0, 1):
        row = flagged({}, {})
        row["messages"][2 * number + 1]["content"] = empty
        with pytest.raises(ValueError, match=rf"row 1 .*message {2 * number + 1}: the answer is empty"):
            loaded(tmp_path, [flagged({}), row], template)
        for settings in ({"train_on": "last"}, {"bad_rows": "drop"}):
            if "bad_rows" in settings:
                assert loaded(tmp_path, [flagged({}), row], template, **settings)[1].dropped
                continue
            with pytest.raises(ValueError, match="the answer is empty"):
                loaded(tmp_path, [row], template, **settings)


def test_columns_of_a_parquet_file(tmp_path):
    """The table fills the flags and the columns that a row lacks with null."""
    path = tmp_path / "a.parquet"
    rows = [{**flagged({"weight": 0}, {}), "images": None}, {**flagged({}), "images": ["0.jpg"]}]
    datasets.Dataset.from_list(rows).to_parquet(path)
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(ValueError, match=r"row 1 .*the column images"):
        load_corpus(Data(str(path), held_out=0), tokenizer, 0)
    corpus = load_corpus(Data(str(path), held_out=0, ignore=["images"]), tokenizer, 0)
    assert answers(tokenizer, corpus.train) == ["a1<|end|>", "a0<|end|>"]


# Names written otherwise, and flags under names of other programs.


@pytest.mark.parametrize("name", ["Images", "images ", "Loss Mask", "lossMask", "reasoning-content", "System", "LABEL"])
def test_a_name_counts_however_it_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=rf"the column ({name}|'{name}') .*data.ignore: \[({name}|'{name}')\]"):
        loaded(tmp_path, [{**PAIR, name: "x"}])
    loaded(tmp_path, [{**PAIR, name: "x"}], ignore=[name])


@pytest.mark.parametrize(
    "key, value",
    [
        ("ignore_loss", True),
        ("learn", False),
        ("is_train", 0),
        ("isMasked", True),
        ("calculate_loss", "false"),
        ("Weight", 0),
        ("weight ", 0),
        ("token_mask", [0, 1, 1]),
        ("skip", True),
    ],
)
def test_a_flag_of_a_turn_that_nothing_reads_is_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"message 1: the key ({key}|'{key}') looks like a flag .*rename it to train"):
        loaded(tmp_path, [flagged({key: value}, {})])
    assert trained(tmp_path, flagged({key: value}, {}), ignore=[key])[1] == "a0<|end|>a1<|end|>"


@pytest.mark.parametrize("key, value", [("name", "train"), ("trainer", 5), ("loss_note", "see below"), ("skip", None)])
def test_other_keys_of_a_turn_are_no_flags(tmp_path, key, value):
    assert trained(tmp_path, flagged({key: value}))[1] == "a0<|end|>"


@pytest.mark.parametrize("name, off, on", [("train", False, True), ("Trainable", 0, 1), ("masked", "true", "0")])
def test_a_row_that_is_marked_as_not_trained_is_refused(tmp_path, name, off, on):
    with pytest.raises(ValueError, match=rf"the column {name} says that the row is not trained.*remove such rows"):
        loaded(tmp_path, [{**PAIR, name: off}])
    assert trained(tmp_path, {**PAIR, name: on})[1] == "a<|end|>"
    assert trained(tmp_path, {**PAIR, "loss": 1.7})[1] == "a<|end|>", "a number about the row"


def test_a_weight_in_a_table_of_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,weight\nq,a,1\nr,b,1.0\n")
    assert len(load_corpus(Data(str(path), held_out=0), byte_tokenizer(CHATML), 0).train) == 2
    path.write_text("prompt,completion,weight\nq,a,1\nr,b,0\n")
    with pytest.raises(ValueError, match=r"line 3 of .*: the column weight weighs rows or tokens"):
        load_corpus(Data(str(path), held_out=0), byte_tokenizer(CHATML), 0)


@pytest.mark.parametrize("empty", ["\u200b", "\ufeff", "\0", "\u00a0\u200d\n"])
def test_an_answer_that_nobody_sees_is_empty(tmp_path, empty):
    for row in ({**PAIR, "completion": empty}, {"instruction": "q", "output": empty}, flagged({"content": empty}, {})):
        with pytest.raises(ValueError, match="the answer is empty"):
            loaded(tmp_path, [row])
    assert trained(tmp_path, {**PAIR, "completion": f"{empty}x"})[1].strip().endswith("x<|end|>")


@pytest.mark.parametrize(
    "row, proposal",
    [
        ({"question": "q", "answer": "a"}, "data.columns {prompt: question, completion: answer}"),
        ({"Prompt": "q", "Completion": "a"}, "data.columns {prompt: Prompt, completion: Completion}"),
        ({"prompt": "q", " completion": "a"}, "data.columns {completion: ' completion'}"),
        ({"input": "q", "output": "a"}, "data.columns {prompt: input, completion: output}"),
        ({"instruction": "q", "response": "a"}, "data.columns {prompt: instruction, completion: response}"),
        ({"conversation": [TURN]}, "data.columns {messages: conversation}"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "data.columns {completion: chosen} and data.ignore: [rejected]",
        ),
        ({"chosen": [TURN], "rejected": [TURN]}, "data.columns {messages: chosen} and data.ignore: [rejected]"),
        ({"version": "1", "data": [PAIR]}, "If the rows are in a list under data, write this list alone into the file"),
        ({"a": "q", "b": "a"}, "data.columns {prompt: question}"),
    ],
)
def test_columns_that_fit_no_format_are_answered_with_what_fits(tmp_path, row, proposal):
    with pytest.raises(ValueError, match=rf"\. (Say which is which: )?{re.escape(proposal)}$"):
        loaded(tmp_path, [row])
