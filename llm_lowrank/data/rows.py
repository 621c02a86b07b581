"""One row of a dataset as an example, or why it cannot be one."""

import hashlib
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from llm_lowrank.data.encoding import IGNORE, encode
from llm_lowrank.data.formats import Turn, read
from llm_lowrank.data.settings import Data
from llm_lowrank.data.sources import Part


@dataclass(frozen=True)
class Example:
    input_ids: list[int]
    labels: list[int]  # as long as input_ids, not shifted

    @property
    def trained(self) -> int:
        """Trained tokens. Token 0 has nothing before it that could predict it, so it never counts."""
        return sum(label != IGNORE for label in self.labels[1:])


def encode_row(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    format: str,
    columns: dict[str, str],
    group: str,
    style: str,
    train_on: str,
    system: str,
    max_length: int,
) -> dict[str, Any]:
    """The row as corpus.FEATURES: what is wrong with it, if it cannot be used, stands in `problem`."""
    try:
        turns = read(row, format, columns)
        if system and turns[0].role == "user":
            turns = [Turn("system", system), *turns]
        ids, trained = encode(tokenizer, turns, style, train_on)
        if not any(trained[1:]):
            raise ValueError(
                "the example has no completion token to train on; check the chat template or remove the row"
            )
    except (ValueError, TemplateError) as error:
        why = " ".join(str(error).split())
        return {"input_ids": [], "labels": [], "length": 0, "trained": 0, "truncated": False, "problem": why, "key": ""}
    asked = str(row[group]) if group else "\0".join(f"{turn.content}\0{turn.context}" for turn in turns[:-1] or turns)
    ids, trained, truncated = ids[:max_length], trained[:max_length], len(ids) > max_length
    labels = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
    key = hashlib.blake2b(asked.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
    found = {"input_ids": ids, "labels": labels, "length": len(ids), "trained": sum(trained[1:])}
    return {**found, "truncated": truncated, "problem": "", "key": key}


def row_options(part: Part, settings: Data, tokenizer: PreTrainedTokenizerBase, style: str) -> dict[str, Any]:
    """What encode_row needs beside the row."""
    return {
        "tokenizer": tokenizer,
        "format": part.format,
        "columns": part.columns,
        "group": part.group,
        "style": style,
        "train_on": settings.train_on,
        "system": settings.system,
        "max_length": settings.max_length,
    }
