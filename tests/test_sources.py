"""Where rows come from: each kind of file is read as it stands, or refused with file, row and what to do; and which
files a name stands for.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_lowrank.data import IGNORE, Data, Stream, finding, load_corpus
from tests.test_data import CHATML, byte_tokenizer, cache, hub_cache, jsonl, pairs, texts, write_jsonl  # noqa: F401 - cache: of every test here


def loaded(path: object, **settings):
    return load_corpus(Data(str(path), held_out=0, **settings), byte_tokenizer(CHATML), 0)


def trained(path: object, **settings) -> list[str]:
    """What is trained of each example, without its end-of-turn token."""
    corpus, tokenizer = loaded(path, **settings), byte_tokenizer(CHATML)
    examples = [corpus.train[k] for k in range(len(corpus.train))]
    return [
        tokenizer.decode([label for label in example.labels if label != IGNORE]).removesuffix("<|end|>")
        for example in examples
    ]


def streamed(path: object, count: int, **settings) -> list[str]:
    tokenizer = byte_tokenizer(CHATML)
    stream = Stream(Data(str(path), held_out=0, streaming=True, **settings), tokenizer, 0)
    return [
        tokenizer.decode([label for label in example.labels if label != IGNORE]).removesuffix("<|end|>")
        for example in islice(stream.examples(), count)
    ]


def row(completion: object, prompt: str = "q", **more) -> dict:
    return {"prompt": prompt, "completion": completion, **more}


# What a value of another type does to the texts beside it: nothing.


@pytest.mark.parametrize("streaming", [False, True])
def test_a_number_in_the_second_file_is_refused_and_changes_no_text(tmp_path, streaming):
    (tmp_path / "train-0.jsonl").write_text(jsonl([row("yes\nsir", f"q{k}") for k in range(6)]))
    (tmp_path / "train-1.jsonl").write_text(jsonl([row("no\nsir" if k else 7, f"r{k}") for k in range(6)]))
    with pytest.raises(
        ValueError,
        match=r"line 1 of .*train-1.jsonl, row 0 \(the first is 0\): completion is int, not text.*(?s:.*)bad_rows",
    ):
        streamed(tmp_path, 12) if streaming else loaded(tmp_path)
    if streaming:
        assert sorted(streamed(tmp_path, 11, bad_rows="drop")) == ["no\nsir"] * 5 + ["yes\nsir"] * 6
    else:
        assert trained(tmp_path, bad_rows="drop") == ["yes\nsir"] * 6 + ["no\nsir"] * 5
        assert loaded(tmp_path, bad_rows="drop").dropped == {"completion is int, not text": 1}


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_number_behind_many_megabytes_changes_no_text(tmp_path, kind):
    rows = [row('"yes\\n"', pad="p" * 30_000) for _ in range(400)] + [row(7), row('"yes\\n"')]
    path = tmp_path / f"long.{kind}"
    path.write_text(jsonl(rows) if kind == "jsonl" else json.dumps(rows))
    assert path.stat().st_size > 11 << 20  # one piece of `datasets` has 10 MB
    with pytest.raises(ValueError, match=r"row 400 \(the first is 0\): completion is int, not text"):
        loaded(path)
    assert streamed(path, 1, bad_rows="drop") == ['"yes\\n"']


@pytest.mark.parametrize("first", [True, False])
def test_other_things_beside_texts_leave_the_texts_alone(tmp_path, first):
    """Whatever types a file mixes, a text stays what it is: with quotation marks, digits, true, null, braces."""
    wanted = ['"Bonjour"', "5", "true", "null", '{"a": 1}', "[1]", "1e5", "007", '\\"', "\\u0041", "None", "NaN"]
    strange = [{"a": 1}, [1], 5, True, 1.5]
    rows = [row(text) for text in wanted]
    others = [row(value) for value in strange]
    path = write_jsonl(tmp_path / "a.jsonl", others + rows if first else rows + others)
    assert trained(path, bad_rows="drop") == wanted
    messages = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": item["completion"]}]}
        for item in (others + rows if first else rows + others)
    ]
    assert trained(write_jsonl(tmp_path / "b.jsonl", messages), bad_rows="drop") == wanted


def test_columns_and_keys_may_appear_late(tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl", [{"instruction": "a", "output": "b"}] * 3)
    write_jsonl(tmp_path / "train-1.jsonl", [{"system": "be brief", "instruction": "c", "output": "d"}])
    corpus = loaded(tmp_path)
    assert texts(byte_tokenizer(CHATML), corpus.train)[3].startswith("<|start|>system\nbe brief<|end|>")
    assert "system" not in texts(byte_tokenizer(CHATML), corpus.train)[0]
    write_jsonl(tmp_path / "train-2.jsonl", [{"prompt": "c", "completion": "d"}])
    with pytest.raises(ValueError, match="has the columns of the formats"):  # late columns decide with the others
        loaded(tmp_path)


# JSON.

BROKEN = {  # a line -> what is said about it
    '{"prompt": "a", "prompt": "b", "completion": "c"}': "the key 'prompt' stands twice in one object",
    '{"prompt": "a", "completion": "b", "x": {"k": 1, "k": 2}}': "the key 'k' stands twice in one object",
    '{"prompt": "\\ud83d", "completion": "b"}': r"half of a surrogate pair, '\\ud83d', which is no character",
    '{"prompt": "a", "completion": "\\udc00 b"}': r"half of a surrogate pair, '\\udc00'",
    '{"prompt": "a\tb", "completion": "c"}': r"no JSON: Invalid control character \(column 14\)",
    '{"prompt": "a", "completion": "b"} x': "no JSON: something follows the value",
    '{"prompt": "a", "completion": "b"}{"prompt": "a", "completion": "b"}': "something follows the value",
    '["a", "b"]': "it is list, and a row is an object",
    "5": "it is int, and a row is an object",
    "{'prompt': 'a'}": "no JSON: Expecting property name",
    "{": "an object stands on one line, or all objects stand in one list",
    '{"prompt": "a", "completion": ' + "[" * 100_000 + "]" * 100_000 + "}": "it is nested too deeply",
    '{"prompt": "a", "completion": ' + "9" * 5000 + "}": "thousands of digits",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{jsonl([row('fine')])}\n{line}\n{jsonl([row('fine')])}")
    with pytest.raises(
        ValueError, match=rf"line 3 of .*a.jsonl, row 1 \(the first is 0\): .*{BROKEN[line]}.*; mend or remove it"
    ):
        loaded(path, bad_rows="drop")
    if not line.startswith(("[", "5")) and "follows" not in BROKEN[line]:
        (tmp_path / "b.json").write_text(f"[{json.dumps(row('fine'))},\n{line},\n{json.dumps(row('fine'))}]")
        with pytest.raises(ValueError, match=r"line 2 of .*b.json, row 1 \(the first is 0\)"):
            loaded(tmp_path / "b.json", bad_rows="drop")


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            '[{"prompt": "a", "completion": "b"}',
            r"row 1 .*the last one, which may have been cut off: '\]' is expected and the end",
        ),
        ('[{"prompt": "a", "completion": "b"},', r"row 1 .*cut off: .*no JSON"),
        ('[{"prompt": "a", "completion": "b"}, {"prompt": "a", "comp', r"row 1 .*cut off: .*Unterminated string"),
        ('[{"prompt": "a", "completion": "b"},]', r"row 1 .*no JSON"),
        ('[{"prompt": "a", "completion": "b"} {"prompt": "a"}]', r"row 1 .*'\]' is expected and '\{' is there"),
        ('[{"prompt": "a", "completion": "b"}]]', "something follows the list"),
        ('{"data": [{"prompt": "a", "completion": "b"}]}', "has the columns data; wanted"),
        ("[]", "is empty: it has no row"),
        ("[ ", r"row 0 .*cut off"),
    ],
)
def test_a_list_that_is_not_whole_is_named(tmp_path, text, reason):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=reason):
        loaded(tmp_path / "a.json")


def test_a_list_is_read_across_the_pieces_in_which_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_lowrank.data.reading.CHUNK", 7)
    rows = [row(f'é {"😀" * k} "{k}"\n\\', prompt=f"q{k}", n=[k, {"a": None}]) for k in range(30)]
    (tmp_path / "a.json").write_text(f"\ufeff \n{json.dumps(rows, indent=1, ensure_ascii=False)}\n", encoding="utf-8")
    assert trained(tmp_path / "a.json") == [item["completion"] for item in rows]
    (tmp_path / "b.json").write_text(json.dumps([*rows[:3], {"prompt": "q"}], indent=1))
    with pytest.raises(ValueError, match=r"line \d+ of .*row 3 .*completion is missing"):
        loaded(tmp_path / "b.json")


def test_empty_lines_line_ends_and_marks_change_nothing(tmp_path):
    lines = [json.dumps(row(f"a\r\n{k}\u2028\x85")) for k in range(3)]
    path = tmp_path / "a.JSONL"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + "\r\n\n \r\n".join(lines).encode())
    assert trained(path) == [f"a\r\n{k}\u2028\x85" for k in range(3)]


def test_numbers_that_are_no_json_are_numbers_all_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b", "score": NaN}\n')
    assert trained(tmp_path / "a.jsonl") == ["b"]
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": NaN}\n')
    with pytest.raises(ValueError, match="completion is float, not text"):
        loaded(tmp_path / "a.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_wide_encodings_are_refused_as_such(tmp_path, encoding, kind):
    text = {"jsonl": jsonl(pairs(2)), "json": json.dumps(pairs(2)), "csv": "prompt,completion\na,b\n"}[kind]
    (tmp_path / f"a.{kind}").write_bytes(text.encode(encoding))
    wide = encoding[:6].upper()
    with pytest.raises(
        ValueError, match=rf"a.{kind} is {wide}, and text is read as UTF-8; convert it: iconv -f {wide}"
    ):
        loaded(tmp_path / f"a.{kind}")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_bytes_that_are_no_utf_8_are_named(tmp_path, kind):
    rows = [row("fine"), row("caf\u00e9")]
    text = {
        "jsonl": "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows),
        "json": json.dumps(rows, ensure_ascii=False, indent=1),
        "csv": "prompt,completion\nq,fine\nq,caf\u00e9\n",
    }[kind]
    (tmp_path / f"a.{kind}").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"line \d of .*a.{kind}, row \d.*not utf-8 \(byte 0xe9\).*iconv"):
        loaded(tmp_path / f"a.{kind}")


# Tables of text.


def write_csv(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind, delimiter", [("csv", ","), ("tsv", "\t"), ("CSV", ",")])
def test_every_cell_of_a_table_is_text_as_it_stands(tmp_path, kind, delimiter):
    wanted = [
        "007",
        "1.0",
        "NA",
        "null",
        "true",
        '"',
        "a,b\tc",
        "two\r\nlines\n",
        " blank ",
        "x" * 200_000,
        "=1+1",
        "é😀",
    ]
    path = write_csv(tmp_path / f"a.{kind}", [row(text, prompt="1e5") for text in wanted], delimiter)
    assert trained(path, max_length=300_000) == wanted
    assert "user\n1e5<" in texts(byte_tokenizer(CHATML), loaded(path).train)[0]
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Excel writes it
    assert trained(path, max_length=300_000) == wanted
    # an empty cell is an empty text: no system prompt, no input, and an empty answer is refused
    write_csv(tmp_path / "b.csv", [{"instruction": "i", "input": "", "output": "o", "system": ""}])
    assert texts(byte_tokenizer(CHATML), loaded(tmp_path / "b.csv").train)[0].startswith("<|start|>user\ni<|end|>")
    write_csv(tmp_path / "c.csv", [row("fine"), row("")])
    with pytest.raises(ValueError, match=r"line 3 of .*c.csv, row 1 \(the first is 0\): the answer is empty"):
        loaded(tmp_path / "c.csv")


@pytest.mark.parametrize(
    "said, reason",
    [
        ('[{"role": "user", "content": "q", "content": "r"}]', "the key 'content' stands twice in one object"),
        ('[{"role": "user", "content": "\\ud800"}]', "half of a surrogate pair"),
        ('[{"role": "user"', r"messages is not JSON: Expecting ',' delimiter"),
    ],
)
def test_conversations_in_a_cell_are_read_like_those_of_a_json_file(tmp_path, said, reason):
    whole = '[{"role": "user", "content": "5"}, {"role": "assistant", "content": "\\"5\\""}]'
    write_csv(tmp_path / "a.csv", [{"messages": whole}])
    assert trained(tmp_path / "a.csv") == ['"5"']
    write_csv(tmp_path / "a.csv", [{"messages": whole}, {"messages": said}])
    with pytest.raises(ValueError, match=rf"line 3 of .*a.csv, row 1 \(the first is 0\): .*{reason}"):
        loaded(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("prompt,completion\na,b\nc\n", r"line 3 of .*row 1 .*it has 1 cells and the header 2"),
        ("prompt,completion\na,b,c\n", r"line 2 of .*row 0 .*it has 3 cells and the header 2"),
        ('prompt,completion\na,"b"x\n', r"line 2 of .*row 0 .*the cells cannot be told apart"),
        ('prompt,completion\na,"b\n\nc', r"line 2 of .*row 0 .*the cells cannot be told apart"),
        ("prompt;completion\na;b\n", r"line 1 of .*the header is one cell, 'prompt;completion'.*commas"),
        ("prompt,prompt\na,b\n", r"line 1 of .*the column 'prompt' twice"),
        ("prompt,,completion\na,b,c\n", r"line 1 of .*a cell without a name"),
        ("prompt,completion\n", "is empty: it has no row"),
        ("", "is empty: it has no row"),
        ("a,b\nc,d\n", "has the columns a, b; wanted"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, text, reason):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=reason):
        loaded(tmp_path / "a.csv")


# Typed files.


def write_arrow(path: Path, table: pa.Table, feather: bool = False) -> Path:
    kind = pa.ipc.new_file if feather else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_typed_files(tmp_path, kind):
    wanted = ['"Bonjour"', "5", "null", "a\r\nb", "é"]
    for text in (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        completions = pa.array(wanted).cast(text) if not pa.types.is_string_view(text) else pa.array(wanted, text)
        table = pa.table({"prompt": pa.array(["q"] * 5), "completion": completions, "id": pa.array(range(5))})
        path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
        pq.write_table(table, path) if kind == "parquet" else write_arrow(path, table, kind == "feather")
        assert trained(path) == wanted
    for other in (pa.array(range(5)), pa.array([1.5] * 5), pa.array([b"x"] * 5), pa.array([True] * 5)):
        table = pa.table({"prompt": pa.array(["q"] * 5), "completion": other})
        pq.write_table(table, path) if kind == "parquet" else write_arrow(path, table, kind == "feather")
        with pytest.raises(
            ValueError, match=rf"a.*: the column completion holds {other.type}, not text; write it as text"
        ):
            loaded(path, bad_rows="drop")


def test_a_column_that_only_one_typed_file_has(tmp_path):
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"instruction": ["c"], "output": ["d"], "system": ["s"]}), tmp_path / "1.parquet")
    assert texts(byte_tokenizer(CHATML), loaded(tmp_path).train)[1].startswith("<|start|>system\ns<|end|>")


def test_columns_of_json_are_decoded_where_they_are_exact_and_refused_where_they_are_not(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "5"}}}
    messages = [{"role": "user", "content": "q", "n": ["5"]}, {"role": "assistant", "content": "5"}]
    rows = [{"messages": messages, "more": call}]
    features = datasets.Features(
        {
            "messages": datasets.List(
                {"role": datasets.Value("string"), "content": datasets.Value("string"), "n": datasets.Json()}
            ),
            "more": datasets.Json(),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert trained(tmp_path / "a.parquet") == ["5"]
    from llm_lowrank.data.reading import File, read

    assert next(read(File("a.parquet", str(tmp_path / "a.parquet"))))[1] == rows[0]
    features["messages"] = datasets.List(
        {"role": datasets.Value("string"), "content": datasets.Json(), "n": datasets.Json()}
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: the column messages, key content, is of the type Json.*\.jsonl"):
        loaded(tmp_path / "b.parquet")
    features = datasets.Features({"prompt": datasets.Value("string"), "completion": datasets.Json()})
    datasets.Dataset.from_list([row("5")], features=features).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(ValueError, match=r"c.parquet: the column completion is of the type Json"):
        loaded(tmp_path / "c.parquet")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / name
    if name.endswith((".parquet", ".arrow")):
        table = pa.Table.from_pylist([row(os.urandom(50).hex()) for _ in range(100)])
        pq.write_table(table, path) if name.endswith(".parquet") else write_arrow(path, table)
    else:
        path.write_bytes(compressed(name, jsonl([row(os.urandom(50).hex()) for _ in range(100)])))
    whole = path.read_bytes()
    assert len(trained(path)) == 100
    for damaged in (whole[: len(whole) // 2], b"\x00\x01\x02" * 20, b"PK" + whole):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}.*(damaged|not utf-8|UTF-16|no JSON)"):
            loaded(path)


def compressed(name: str, text: str) -> bytes:
    kind = name.rpartition(".")[2]
    if kind == "zst":
        return pa.Codec("zstd").compress(text.encode(), asbytes=True)
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[kind](text.encode())


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.csv.xz", "a.tsv.gz", "a.JSONL.GZ"])
def test_compressed_files(tmp_path, name):
    text = jsonl(pairs(4))
    if "sv" in name:
        cells = io.StringIO()
        csv.writer(cells, delimiter="\t" if "tsv" in name else ",").writerows(
            [["prompt", "completion"], *([p["prompt"], p["completion"]] for p in pairs(4))]
        )
        text = cells.getvalue()
    (tmp_path / name).write_bytes(compressed(name.lower(), text))
    assert trained(tmp_path / name) == streamed_in_order(tmp_path / name) == [p["completion"] for p in pairs(4)]
    (tmp_path / "b.parquet.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b.parquet.gz is not a .*file"):
        loaded(tmp_path / "b.parquet.gz")


def streamed_in_order(path: object, count: int = 4, **settings) -> list[str]:
    return sorted(streamed(path, count, **settings))


# Folders.


def test_what_save_to_disk_wrote(tmp_path):
    made = datasets.Dataset.from_list(pairs(30)).shuffle(seed=1).select(range(20))  # a selection of rows
    made.save_to_disk(tmp_path / "one", num_shards=2)
    assert trained(tmp_path / "one") == list(made["completion"])
    datasets.DatasetDict({"train": made.select(range(12)), "extra": made.select(range(12, 20))}).save_to_disk(
        tmp_path / "many"
    )
    assert trained(tmp_path / "many", split="extra") == list(made["completion"])[12:]
    with pytest.raises(ValueError, match=r"has no split 'test'; it has extra, train"):
        loaded(tmp_path / "many", split="test")
    next((tmp_path / "one").glob("*-00001-*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"one cannot be read: data-00001-of-00002.arrow is absent; save it again"):
        loaded(tmp_path / "one")


def test_which_files_of_a_folder_are_read(tmp_path):
    for name in (
        "a.jsonl",
        "deep/er/b.jsonl",
        ".hidden.jsonl",
        ".ipynb_checkpoints/a-checkpoint.jsonl",
        "__pycache__/c.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(tmp_path / name, [row(name)])
    (tmp_path / "dataset_info.json").write_text('{"other": {"file_name": "a.jsonl"}}')
    (tmp_path / "README.md").write_text("# Data\n")
    assert trained(tmp_path) == ["a.jsonl", "deep/er/b.jsonl"]
    write_jsonl(tmp_path / "test.jsonl", [row("t")])
    with pytest.raises(ValueError, match=r"say the split of some files and not that of a.jsonl, deep/er/b.jsonl; move"):
        loaded(tmp_path)
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"gone.jsonl is a link to a file that is gone"):
        loaded(tmp_path)


def test_a_file_and_its_compressed_copy_are_not_both_read(tmp_path):
    write_jsonl(tmp_path / "train-a.jsonl", [row("x")])
    write_jsonl(tmp_path / "train-b.jsonl", [row("y")])
    (tmp_path / "train-b.jsonl.gz").write_bytes(gzip.compress(jsonl([row("y")]).encode()))
    with pytest.raises(ValueError, match=r"train-b.jsonl and train-b.jsonl.gz look like one file in two forms"):
        loaded(tmp_path)


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b/x.jsonl", "b-c/x.jsonl", "a.jsonl", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [row(name)])
    assert trained(tmp_path) == ["a.jsonl", "b-c/x.jsonl", "b/x.jsonl", "c.jsonl"]


@pytest.mark.parametrize(
    "names, split, wanted",
    [
        (["train/x.jsonl", "test/train.jsonl"], "train", ["train/x.jsonl"]),
        (["my-train_1.jsonl", "my-dev.jsonl", "my.eval.jsonl"], "validation", ["my-dev.jsonl"]),
        (["my-train_1.jsonl", "my-dev.jsonl", "my.eval.jsonl"], "test", ["my.eval.jsonl"]),
        (["training.jsonl", "trainer.jsonl"], "train", None),  # trainer says nothing
        (
            ["data/a_b-00000-of-00002.jsonl", "data/a_b-00001-of-00002-x.jsonl"],
            "a_b",
            ["data/a_b-00000-of-00002.jsonl", "data/a_b-00001-of-00002-x.jsonl"],
        ),
        (["contest.jsonl", "evaluate.jsonl"], "train", ["contest.jsonl", "evaluate.jsonl"]),
        (["train.jsonl", "test.jsonl"], "all", ["train.jsonl", "test.jsonl"]),
        (["train.jsonl", "test.jsonl"], "test+train", ["test.jsonl", "train.jsonl"]),
    ],
)
def test_the_names_of_files_say_the_split(tmp_path, names, split, wanted):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [row(name)])
    if wanted is None:
        with pytest.raises(ValueError, match="say the split of some files"):
            loaded(tmp_path, split=split)
    else:
        assert trained(tmp_path, split=split) == wanted


def test_a_part_of_a_split(tmp_path):
    write_jsonl(tmp_path / "train-0.jsonl", [row(str(k)) for k in range(6)])
    write_jsonl(tmp_path / "train-1.jsonl", [row(str(k)) for k in range(6, 10)])
    assert trained(tmp_path, split="train[4:7]") == ["4", "5", "6"]
    assert trained(tmp_path, split="train[:20%]+train[-1:]") == ["0", "1", "9"]
    with pytest.raises(ValueError, match=r"data.split: train\[a\] cannot be read"):
        loaded(tmp_path, split="train[a]")
    with pytest.raises(ValueError, match=r"data.split: train\[:4\] is a part of a split, and data.streaming"):
        streamed(tmp_path, 1, split="train[:4]")


@pytest.mark.parametrize("name", ["data [v2]", "a, b", "with blanks", "größe 名前", "a*b?", "100%", "a;b&c"])
def test_signs_in_paths(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    file = write_jsonl(folder / f"{name}.jsonl", [row("x")])
    other = write_jsonl(tmp_path / "other.jsonl", [row("y")])
    assert trained(file) == trained(folder) == ["x"]
    assert trained(f"{file}, {other}") == trained(f"{folder},{other}") == ["x", "y"]
    assert trained(f"{other}, {file}") == ["y", "x"]


# Subsets, revisions, the hub, URLs.

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: [main/test.jsonl]
- config_name: socratic
  data_files: "socratic/*.jsonl"
---
# A dataset
"""
REPOSITORY = {
    "README.md": CARD,
    "main/train-00000-of-00001.jsonl": jsonl([row("main")]),
    "main/test.jsonl": jsonl([row("main test")]),
    "socratic/x.jsonl": jsonl([row("socratic")]),
}


def test_subsets_and_revisions_of_the_hub(tmp_path, monkeypatch):
    hub_cache(monkeypatch, tmp_path, "some/body", REPOSITORY)
    hub_cache(monkeypatch, tmp_path, "some/body", {"train.jsonl": jsonl([row("old")])}, revision="v1")
    name = "some/body"
    assert trained(name, subset="main") == ["main"] and trained(name, subset="main", split="test") == ["main test"]
    assert trained(name, subset="socratic") == ["socratic"] and trained(name, revision="v1") == ["old"]
    assert streamed(name, 1, subset="socratic") == ["socratic"]
    file = write_jsonl(tmp_path / "a.jsonl", [row("file")])
    assert trained(f"{name}, {file}, {name}, {name}", subset="main,,socratic,", revision=",,,v1") == [
        "main",
        "file",
        "socratic",
        "old",
    ]
    for settings, message in (
        ({}, r"some/body has the subsets main, socratic; choose one with data.subset"),
        ({"subset": "x"}, r"data.subset: some/body has no subset 'x'; it has main, socratic"),
        ({"subset": "main", "revision": "v1"}, r"data.subset: some/body has no subsets"),
        ({"subset": "main", "split": "dev"}, r"has no split 'dev'; it has test, train"),
        ({"subset": "main", "revision": "v9"}, r"some/body, revision v9 is no file .*hf download"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(name, **settings)
    with pytest.raises(ValueError, match=r"data.subset has 1 parts and data.dataset 2 names; give one for each"):
        Data(f"{name}, {file}", subset="main")
    with pytest.raises(ValueError, match=r"data.subset is for datasets of the hub and .*a.jsonl would ignore it"):
        loaded(file, subset="main")
    with pytest.raises(ValueError, match=r"data.revision is for datasets of the hub and .*a.jsonl would ignore it"):
        loaded(file, revision="main")
    with pytest.raises(ValueError, match=r"data.subset is for files and hub names only"):
        loaded("reasoning-gym:chain_sum", subset="main")


def test_a_card_that_lists_what_is_not_there_or_asks_for_more(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    write_jsonl(tmp_path / "a.jsonl", [row("x")])
    with pytest.raises(ValueError, match=r"README.md lists main/train-\* for the split train, which is absent"):
        loaded(tmp_path, subset="main")
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n  field: data\n---\n")
    with pytest.raises(ValueError, match=r"README.md: field of a subset is not read"):
        loaded(tmp_path)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: a.csv\n  sep: ';'\n---\n")
    (tmp_path / "a.csv").write_text("prompt;completion\nq;a,b\n")
    assert trained(tmp_path) == ["a,b"]
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"README.md: its YAML head cannot be read"):
        loaded(tmp_path)


@pytest.mark.parametrize("path", ["../a.jsonl", "x/../../a.jsonl", "/etc/hostname", "*"])
def test_a_folder_does_not_lead_elsewhere(tmp_path, path):
    write_jsonl(tmp_path / "a.jsonl", [row("outside")])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: '{path}'\n---\n")
    with pytest.raises(ValueError, match=r"which is absent|holds no .jsonl"):
        loaded(folder)
    (folder / "README.md").unlink()
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": path}]}))
    with pytest.raises(ValueError, match=r"folder cannot be read: .* is absent"):
        loaded(folder)


def test_a_download_that_was_cut_off_is_not_half_a_dataset(tmp_path, monkeypatch):
    hub_cache(
        monkeypatch, tmp_path, "some/body", {f"data/train-0000{k}-of-00003.jsonl": jsonl([row("x")]) for k in (0, 2)}
    )
    with pytest.raises(ValueError, match=r"only 2 of the 3 files data/train-\*; .*hf download"):
        loaded("some/body")


class Hub:
    """What the client of the hub does with a network, over a folder."""

    def __init__(self, folder: Path, commit: str = "c0ffee") -> None:
        self.folder, self.commit, self.downloaded = folder, commit, []

    def dataset_info(self, name, revision=None):
        assert (name, revision) == ("some/body", "v2")
        files = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        return type("Info", (), {"sha": self.commit, "siblings": [type("File", (), {"rfilename": f}) for f in files]})

    def snapshot_download(self, name, repo_type, revision, allow_patterns):
        assert (repo_type, revision, allow_patterns) == ("dataset", "v2", [])

    def hf_hub_download(self, name, file, repo_type, revision):
        assert (repo_type, revision) == ("dataset", self.commit)
        self.downloaded.append(file)
        return str(self.folder / file)


def test_of_the_hub_only_the_files_of_the_subset_and_the_split_are_downloaded(tmp_path, monkeypatch):
    for name, text in REPOSITORY.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    hub = Hub(tmp_path)
    monkeypatch.setattr(finding, "HfApi", lambda: hub)
    monkeypatch.setattr(finding, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(finding, "hf_hub_download", hub.hf_hub_download)
    assert trained("some/body", subset="main", revision="v2") == ["main"]
    assert set(hub.downloaded) == {"README.md", "main/train-00000-of-00001.jsonl"}
    monkeypatch.setattr(hub, "hf_hub_download", None)
    monkeypatch.setattr(finding, "hf_hub_download", lambda *a, **k: Path("/proc/nowhere").mkdir())
    with pytest.raises(ValueError, match=r"README.md cannot be downloaded to .*HF_HOME"):
        loaded("some/body", subset="main", revision="v2")


@pytest.mark.parametrize(
    "error, message",
    [
        ("GatedRepoError", "accept its conditions on the hub and log in: hf auth login"),
        ("RevisionNotFoundError", "some/body has no data.revision 'v2'"),
        ("RepositoryNotFoundError", "is no file or folder here and no dataset of the hub that can be seen"),
    ],
)
def test_what_the_hub_answers(monkeypatch, error, message):
    import huggingface_hub.errors

    kind = getattr(huggingface_hub.errors, error)

    def fails(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(finding, "HfApi", lambda: type("Api", (), {"dataset_info": fails}))
    with pytest.raises(ValueError, match=message):
        loaded("some/body", revision="v2")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is no file or folder here and no dataset of the hub"):
        loaded("my data")


def test_urls(tmp_path, monkeypatch):
    monkeypatch.setattr(finding, "cache_dir", lambda: tmp_path / "cache")
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/d [1]/train.jsonl", jsonl([row("x")]).encode())
    memory.pipe("/bucket/d [1]/test.jsonl.gz", gzip.compress(jsonl([row("t")]).encode()))
    name = "memory://bucket/d [1]"
    try:
        assert trained(name) == trained(f"{name}/train.jsonl") == streamed(name, 1) == ["x"]
        assert trained(name, split="test") == streamed(f"{name}/test.jsonl.gz", 1) == ["t"]
        memory.pipe("/bucket/d [1]/train.jsonl", jsonl([row("changed")]).encode())
        assert trained(name) == ["changed"]
        write_jsonl(tmp_path / "a.jsonl", [row("local")])
        assert trained(f"file://{tmp_path}/a.jsonl") == ["local"]
        datasets.Dataset.from_list([row("saved")]).save_to_disk("memory://saved")
        assert trained("memory://saved") == ["saved"]
        for name, message in (
            ("memory://bucket/none", "data.dataset: no such file or folder: memory://bucket/none"),
            ("nonsense://x/a.jsonl", "cannot read nonsense://x/a.jsonl .*check the address and the credentials"),
            ("memory://bucket/d [1]/train.txt", "no such file or folder"),
        ):
            with pytest.raises(ValueError, match=message.replace("[1]", r"\[1\]")):
                loaded(name)
    finally:
        memory.store.clear()


# Tokens.


def tokens(ids, labels, **more) -> dict:
    return {"input_ids": ids, "labels": labels, **more}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_that_are_tokens_are_trained_as_they_are(tmp_path, kind):
    rows = [tokens([5, 6, 7], [-100, 6, 7], attention_mask=[1, 1, 1]), tokens([8, 9, 10, 11], [8, 9, 10, 11])]
    path = tmp_path / f"a.{kind}"
    write_jsonl(path, rows) if kind == "jsonl" else datasets.Dataset.from_list(rows).to_parquet(path)
    corpus = loaded(path)
    assert [(corpus.train[k].input_ids, corpus.train[k].labels) for k in range(2)] == [
        (r["input_ids"], r["labels"]) for r in rows
    ]
    assert loaded(path, max_length=3).truncated == 1
    write_jsonl(
        tmp_path / "b.jsonl",
        [tokens([5, 6, k], [-100, -100, k]) for k in (7, 8)] + [tokens([5, 7, 8], [-100, -100, 8])],
    )
    held = load_corpus(Data(str(tmp_path / "b.jsonl"), held_out=1), byte_tokenizer(CHATML), 1)
    assert len(held.train) + sum(held.dropped.values()) == 2  # rows with one question stay on one side
    for setting in ({"system": "s"}, {"prompt_style": "plain"}, {"train_on": "last"}):
        with pytest.raises(
            ValueError, match=rf"data.{next(iter(setting))} is for questions and answers and .*tokens already"
        ):
            loaded(path, **setting)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (tokens([1, 2], [1]), "input_ids has 2 tokens and labels 1"),
        (tokens([1, 2], [1, 3]), "labels, position 1: 3 is neither -100 nor the token that stands there, 2"),
        (tokens([1, 2, 3], [2, 3, -100]), "labels, position 0: 2 is .*one place ahead"),
        (tokens([1, 999], [1, 999]), "input_ids, position 1: the token 999 is beyond the 258 tokens"),
        (tokens([1, -1], [1, -1]), "input_ids, position 1: -1 is no token"),
        (tokens([], []), "input_ids is empty"),
        (tokens([1, 2.0], [1, 2]), "input_ids, position 1: 2.0 is float, not a whole number"),
        (tokens([1, True], [1, 1]), "input_ids, position 1: True is bool"),
        (tokens("12", [1, 2]), "input_ids is str, not a list of whole numbers"),
        (tokens([1, 2], None), "labels is missing, not a list"),
        (tokens([1, 2], [-100, -100]), "no completion token to train on"),
        (tokens([1, 2], [1, 2], attention_mask=[0, 1]), "attention_mask is not 1 throughout; remove the padding"),
        (tokens([1, 2], [1, 2], position_ids=[0, 0]), "position_ids is not 0, 1, 2, ... throughout"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tmp_path, bad, reason):
    path = write_jsonl(tmp_path / "a.jsonl", [tokens([1, 2], [-100, 2]), bad])
    with pytest.raises(ValueError, match=rf"row 1 \(the first is 0\): .*{reason}"):
        loaded(path)


# The cache.


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    from llm_lowrank.data import rows

    path = Path(write_jsonl(tmp_path / "a.jsonl", pairs(4)))
    real = rows.encode_row

    def changes(row, **options):
        path.write_text(jsonl(pairs(5)))
        return real(row, **options)

    monkeypatch.setattr(rows, "encode_row", changes)
    with pytest.raises(ValueError, match=r"a\.jsonl was changed while it was read"):
        loaded(path)
    monkeypatch.undo()


@pytest.mark.parametrize("there", [True, False])
def test_a_home_that_cannot_be_written(tmp_path, there):
    path = write_jsonl(tmp_path / "a.jsonl", pairs(4))
    script = (
        "from tests.test_data import byte_tokenizer, CHATML\nfrom llm_lowrank.data import Data, load_corpus\n"
        f"print(len(load_corpus(Data({path!r}, held_out=0), byte_tokenizer(CHATML), 0).train))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LLM_", "XDG"))}
    environment |= {"HOME": "/dev/null", "PYTHONPATH": os.pathsep.join(sys.path), "TQDM_DISABLE": "1"}
    if there:
        environment["LLM_LOWRANK_CACHE"] = str(tmp_path / "cache")
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if there:
        assert run.stdout.strip() == "4", run.stderr
    else:
        assert "LLM_LOWRANK_CACHE" in run.stderr and "HF_HOME" in run.stderr and "cannot be written" in run.stderr


# What a file is in the place of what its name says, and what would be read twice or not at all.

SIGNED = {
    "compressed with gzip; give it a name that ends in .gz": gzip.compress(b'{"prompt": "a", "completion": "b"}\n'),
    "compressed with bzip2": bz2.compress(b'{"prompt": "a", "completion": "b"}\n'),
    "compressed with xz": lzma.compress(b'{"prompt": "a", "completion": "b"}\n'),
    "a pointer of Git LFS in the place of the file; fetch it: git lfs pull": b"version https://git-lfs.github.com/s\n",
    "a web page in the place of the file": b"<!DOCTYPE html><html></html>",
    "a zip archive or a spreadsheet": b"PK\x03\x04abc",
    "a Parquet file; give it a name that ends in .parquet": b"PAR1abcPAR1",
    "an Arrow file; give it a name that ends in .arrow": b"ARROW1abc",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
@pytest.mark.parametrize("what", SIGNED)
def test_a_file_that_is_something_else_is_called_so(tmp_path, what, name):
    if (what.startswith("a Parquet") and "parquet" in name) or (what.startswith("an Arrow") and "arrow" in name):
        return
    (tmp_path / name).write_bytes(SIGNED[what])
    with pytest.raises(ValueError, match=rf"{name} is {what}"):
        loaded(tmp_path / name)


@pytest.mark.parametrize("name, text", [("a.jsonl", jsonl([row("b")] * 2)), ("a.csv", "prompt,completion\na,b\nc,d\n")])
def test_line_ends_of_an_old_mac_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text.replace("\n", "\r"))
    with pytest.raises(ValueError, match=r"lines end with a carriage return alone; convert it: tr "):
        loaded(tmp_path / name)


def test_columns_of_a_table_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["a"])] * 3, names=["prompt", "prompt", "completion"]), path)
    with pytest.raises(ValueError, match=r"a.parquet: it has the column 'prompt' twice"):
        loaded(path)
    pairs_of = pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"], "extra": pairs_of}), path)
    with pytest.raises(ValueError, match=r"a.parquet: the column extra holds map<.*>, which is not read"):
        loaded(path)


def test_copies_and_links_of_a_file_are_not_trained_twice(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [row("x")])
    write_jsonl(tmp_path / "b.jsonl", [row("y")])  # of the same size
    (tmp_path / "c.jsonl").touch()
    (tmp_path / "d.jsonl").touch()  # empty files say nothing twice
    assert trained(tmp_path) == ["x", "y"]
    for make in (lambda at: at.symlink_to(tmp_path / "a.jsonl"), lambda at: at.write_bytes(b"")):
        at = tmp_path / "a (1).jsonl"
        make(at)
        if not at.is_symlink():
            at.write_bytes((tmp_path / "a.jsonl").read_bytes())
        with pytest.raises(ValueError, match=r"a \(1\).jsonl and .*/a.jsonl are the same, and their rows would be"):
            loaded(tmp_path)
        at.unlink()
    again = f"{tmp_path / 'a.jsonl'},{tmp_path}/./a.jsonl"
    with pytest.raises(ValueError, match=r"hold the same rows, which would be trained twice; .*data.weights"):
        loaded(again)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "part").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"linked/part is a link to a folder, and such links are not followed"):
        loaded(tmp_path / "linked")


def test_a_column_of_categories_is_text(tmp_path):
    column = pa.array(["q", "q", "r"]).dictionary_encode()
    pq.write_table(pa.table({"prompt": column, "completion": ["a", "b", "c"]}), tmp_path / "a.parquet")
    assert trained(tmp_path / "a.parquet") == ["a", "b", "c"]
    numbers = pa.array([1, 1, 2]).dictionary_encode()
    pq.write_table(pa.table({"prompt": ["q"] * 3, "completion": numbers}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"the column completion holds int64, not text"):
        loaded(tmp_path / "a.parquet")
