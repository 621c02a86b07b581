"""Law: the texts that are trained are the texts in the file, character by character, whatever stands beside them."""

from __future__ import annotations

import csv
import json
import tempfile
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_lowrank.data import IGNORE, Data, Stream, load_corpus, reading
from tests.test_data import byte_tokenizer, cache  # noqa: F401 - cache: of every test here

TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message.get('tool_calls') or [] %}{{ call['function']['name'] }}"
    "({{ call['function']['arguments'] }}){% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
TOKENIZER = byte_tokenizer(TEMPLATE)
TRICKY = [
    *('"Bonjour"', "'", "5", "-0", "1e5", "007", "1.10", "true", "null", "NaN", "None", "", " ", "\n"),
    *("a\r\nb", "\r", "\t", "{}", '{"a": 1}', "[1, 2]", "\\n", "\\", '\\"', "\\u0041", "\\ud83d", "a,b;c\td"),
    *(
        '""',
        '"a","b"',
        "\u2028\u2029\x85",
        "\ufeff",
        "👩‍👩‍👧",
        "é",
        "e\u0301",
        "שלום",
        "\x00\x1f\x7f",
        "{{ x }}",
        "{% raw %}",
    ),
]
TEXT = st.sampled_from(TRICKY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SAID = st.tuples(TEXT, st.sampled_from(["x", "ß", "0", '"', ")"]), TEXT).map("".join)  # a text that is not blank
ANY = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | TEXT | st.lists(TEXT, max_size=2)
CALL = st.tuples(st.sampled_from(["f", "g"]), st.uuids(), TEXT).map(  # no call is written inside another one
    lambda call: {"type": "function", "function": {"name": call[0], "arguments": json.dumps({str(call[1]): call[2]})}}
)


@st.composite
def conversations(draw) -> list[dict]:
    messages = [{"role": "system", "content": draw(SAID)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        messages.append({"role": "user", "content": draw(SAID)})
        if draw(st.booleans()):
            messages.append(
                {"role": "assistant", "content": None, "tool_calls": draw(st.lists(CALL, min_size=1, max_size=2))}
            )
            messages.append({"role": "tool", "content": draw(SAID)})
        messages.append({"role": "assistant", "content": draw(SAID)})
    return messages


def answer(message: dict) -> str:
    calls = (call["function"] for call in message.get("tool_calls") or [])
    return f"{message['content'] or ''}{''.join(call['name'] + '(' + call['arguments'] + ')' for call in calls)}<|end|>"


CHATS = st.lists(
    conversations().map(
        lambda messages: (
            {"messages": messages},
            "".join(f"<|start|>{message['role']}\n{answer(message)}\n" for message in messages),
            "".join(answer(message) for message in messages if message["role"] == "assistant"),
        )
    ),
    min_size=3,
    max_size=5,
)
PAIRS = st.lists(
    st.tuples(SAID, SAID).map(
        lambda pair: (
            {"prompt": pair[0], "completion": pair[1]},
            f"<|start|>user\n{pair[0]}<|end|>\n<|start|>assistant\n{pair[1]}<|end|>\n",
            f"{pair[1]}<|end|>",
        )
    ),
    min_size=3,
    max_size=5,
)


def write(path: Path, rows: list[dict], spaced: bool) -> None:
    if path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=spaced) for row in rows]
        path.write_text(("\r\n\n" if spaced else "\n").join(lines), encoding="utf-8", newline="")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=not spaced, indent=1 if spaced else None), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(
                file, list(dict.fromkeys(name for row in rows for name in row)), quoting=csv.QUOTE_ALL
            )
            writer.writeheader()
            writer.writerows(rows)
    else:
        table = pa.Table.from_pylist(rows)
        if path.suffix == ".parquet":
            pq.write_table(table, path)
        else:
            datasets.Dataset(table).save_to_disk(path.with_suffix(""))


def read(path: Path, rows: list[tuple[dict, str, str]], streaming: bool) -> None:
    """Compare what a run trains on with what was written."""
    if streaming:
        stream = Stream(Data(str(path), held_out=0, streaming=True, max_length=9999), TOKENIZER, 0)
        examples = list(islice(stream.examples(), len(rows)))
    else:
        corpus = load_corpus(Data(str(path), held_out=0, max_length=9999), TOKENIZER, 0)
        assert corpus.dropped == {} and corpus.truncated == 0
        examples = [corpus.train[k] for k in range(len(corpus.train))]
    found = [
        (TOKENIZER.decode(example.input_ids), TOKENIZER.decode([label for label in example.labels if label != IGNORE]))
        for example in examples
    ]
    wanted = [(whole, trained) for _, whole, trained in rows]
    assert (sorted(found) == sorted(wanted)) if streaming else (found == wanted)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 11)
    monkeypatch.setattr(reading, "ROWS", 2)
    datasets.disable_progress_bars()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_trained_text_is_the_text_in_the_file(kind, data):
    rows = data.draw(PAIRS if kind == "csv" else PAIRS | CHATS)
    spaced = data.draw(st.booleans())
    typed = kind in ("parquet", "saved")
    beside = st.integers() if typed else TEXT if kind == "csv" else ANY  # a column of the file holds one type there
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / f"whole.{kind}"
        write(whole, [row for row, _, _ in rows], spaced)
        read(whole.with_suffix("") if kind == "saved" else whole, rows, streaming=spaced)
        if kind == "saved":
            return
        parts = Path(folder) / "parts"
        parts.mkdir()
        cut = data.draw(st.integers(1, len(rows) - 1))
        later = [
            {**row, "note": data.draw(beside.filter(lambda value: not typed or abs(value) < 1 << 60))}
            for row, _, _ in rows[cut:]
        ]
        write(parts / f"train-0.{kind}", [row for row, _, _ in rows[:cut]], spaced)
        write(parts / f"train-1.{kind}", later, not spaced)
        read(parts, rows, streaming=not spaced)
