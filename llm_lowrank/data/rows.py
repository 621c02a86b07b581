"""From one row of a dataset to an example, or to the reason why there is none."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from llm_lowrank.data.encoding import CHAT, IGNORE, encode_turns
from llm_lowrank.data.formats import TEXT, Turn, read_conversation
from llm_lowrank.data.settings import Data
from llm_lowrank.data.sources import OpenDataset
from llm_lowrank.data.stops import answer_ends, known_ends
from llm_lowrank.data.templates import check_system, reads_clock, unread_keys

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "trained": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "problem": datasets.Value("string"),  # why the row cannot be used; empty: it can
        "key": datasets.Value("string"),  # of the question or group: rows of one key stay on one side of the split
        "unused": datasets.List(datasets.Value("string")),  # columns and message keys that nothing reads
        "ends": datasets.List(datasets.Value("int32")),  # tokens that end the answers
    }
)
Arrays = tuple[np.ndarray, np.ndarray]  # tokens and labels of an example, int32 (tokens,) each


@dataclass(frozen=True)
class Example:
    """The tokens of one row with their labels."""

    input_ids: list[int]
    labels: list[int]  # as long as input_ids, not shifted

    @property
    def arrays(self) -> Arrays:
        """Tokens and labels as arrays, of which batches are made."""
        return np.array(self.input_ids, dtype=np.int32), np.array(self.labels, dtype=np.int32)

    @property
    def trained(self) -> int:
        """Number of trained tokens. Nothing stands before token 0 to predict it, so token 0 never counts."""
        return sum(label != IGNORE for label in self.labels[1:])


def encode_rows(rows: Iterable[dict[str, Any]], options: dict[str, Any]) -> pa.RecordBatch:
    """Return rows as a batch of FEATURES. options: the arguments of encode_row beside the row."""
    encoded = [encode_row(row, **options) for row in rows]
    return pa.RecordBatch.from_pylist(encoded, schema=FEATURES.arrow_schema)


def encode_row(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str,
    columns: dict[str, str],
    ignore: Sequence[str],
    group: str,
    style: str,
    train_on: str,
    system: str,
    max_length: int,
    date: str,
) -> dict[str, Any]:
    """Return the row as FEATURES. `problem` says why the row cannot be used; it is empty otherwise.

    format, columns, group, style: as in OpenDataset. ignore, train_on, system, max_length: as in Data. date: as in
    Template.
    """
    # a row that cannot be used keeps its place, so that row numbers in messages are those of the data
    unused: list[str] = []
    try:
        said = read_conversation(row, format, columns, ignore)
        turns = said.turns
        unused += [name for name in said.unused if name != group]
        unused += unread_keys(tokenizer if style == CHAT else None, [turn.extras for turn in turns])
        if system and turns[0].role not in ("system", TEXT):
            turns = [Turn("system", system), *turns]
        ids, trained = encode_turns(
            tokenizer, turns, style, train_on, tools=said.tools, options=said.options, date=date
        )
        if not any(trained[1:]):
            raise ValueError(
                "the example has no completion token to train on; check the chat template or remove the row"
            )
        ends = _ends(tokenizer, turns, ids, trained, train_on)
    except ValueError as error:
        why = " ".join(str(error).split())
        empty = {"input_ids": [], "labels": [], "length": 0, "trained": 0, "truncated": False, "key": "", "ends": []}
        return {**empty, "problem": why, "unused": unused}
    ids, trained, truncated = ids[:max_length], trained[:max_length], len(ids) > max_length
    labels = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
    # rows with the same key ask the same question, or come from the same group: they stay on one side of the split
    question = (
        str(row.get(group)) if group else "\0".join(f"{turn.content}\0{turn.context}" for turn in turns[:-1] or turns)
    )
    key = hashlib.blake2b(question.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    tokens = {"input_ids": ids, "labels": labels, "length": len(ids), "trained": sum(trained[1:])}
    return {**tokens, "truncated": truncated, "problem": "", "key": key, "unused": unused, "ends": ends}


def _ends(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], ids: list[int], trained: list[bool], train_on: str
) -> list[int]:
    """Return the tokens that end the answers of a row; a text has none. ValueError if an answer has no end."""
    if turns[0].tokens:
        return known_ends(tokenizer, ids, trained)
    if turns[0].role == TEXT:
        return []
    answers = [turn for turn in turns if turn.role == "assistant" and turn.trained]
    return answer_ends(tokenizer, ids, trained, 1 if train_on == "last" else len(answers))


def row_options(
    dataset: OpenDataset, settings: Data, tokenizer: PreTrainedTokenizerBase, style: str, date: str
) -> dict[str, Any]:
    """Return the arguments of encode_row beside the row. ValueError if the chat template does not write data.system."""
    if settings.system and style == CHAT and dataset.format != TEXT:
        check_system(tokenizer, settings.system)
    return {
        "tokenizer": tokenizer,
        "format": dataset.format,
        "columns": dataset.columns,
        "ignore": settings.ignore,
        "group": dataset.group,
        "style": style,
        "train_on": settings.train_on,
        "system": settings.system,
        "max_length": settings.max_length,
        "date": date_of(tokenizer, style, date),
    }


def date_of(tokenizer: PreTrainedTokenizerBase, style: str, date: str) -> str:
    """Return the day that prompts are written on, or an empty text where they do not depend on it."""
    return date if style == CHAT and reads_clock(tokenizer) else ""
