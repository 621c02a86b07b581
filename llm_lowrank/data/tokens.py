"""Rows that are tokens already: input_ids with labels, as another program prepared them.

They are trained as they are: nothing is rendered, and no token is added. What does not fit is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NOT_TRAINED = -100  # label of a token that is not trained
OPTIONAL = ("attention_mask", "position_ids", "token_type_ids")  # columns that may stand beside and say nothing new


@dataclass(frozen=True)
class Tokens:
    """The tokens of a row and which of them are trained."""

    ids: list[int]
    trained: list[bool]

    @property
    def prompt(self) -> str:
        """The tokens that are not trained, or all tokens where all are trained, as text: the question of the row."""
        ids = [token for token, train in zip(self.ids, self.trained, strict=True) if not train]
        return " ".join(map(str, ids or self.ids))

    def within(self, vocabulary: int) -> tuple[list[int], list[bool]]:
        """Return the tokens and which of them are trained. ValueError if a token is not in the vocabulary."""
        beyond = next((token for token in self.ids if token >= vocabulary), None)
        if beyond is not None:
            raise ValueError(
                f"input_ids, position {self.ids.index(beyond)}: the token {beyond} is beyond the {vocabulary} tokens "
                "of this tokenizer; the rows were prepared with another one"
            )
        return self.ids, self.trained


def read_tokens(row: Mapping[str, Any]) -> Tokens:
    """Return the tokens of a row with `input_ids` and `labels`, which are not shifted. ValueError if they do not fit
    each other.
    """
    ids, labels = (_integers(row.get(name), name) for name in ("input_ids", "labels"))
    if not ids:
        raise ValueError("input_ids is empty")
    if len(ids) != len(labels):
        raise ValueError(f"input_ids has {len(ids)} tokens and labels {len(labels)}; a label belongs to each token")
    negative = next((place for place, token in enumerate(ids) if token < 0), None)
    if negative is not None:
        raise ValueError(f"input_ids, position {negative}: {ids[negative]} is no token")
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (NOT_TRAINED, token):
            after = [ids[next] if label != NOT_TRAINED else label for next, label in enumerate(labels[:-1], 1)]
            why = "; the labels are one place ahead: give each token its own, for the shift is made here"
            raise ValueError(
                f"labels, position {place}: {label} is neither {NOT_TRAINED} nor the token that stands there, "
                f"{token}{why if labels[:-1] == after else ''}"
            )
    _check_beside(row, len(ids))
    return Tokens(ids, [label != NOT_TRAINED for label in labels])


def _check_beside(row: Mapping[str, Any], length: int) -> None:
    """Check that the other columns say what is the case without them. ValueError otherwise."""
    usual = {
        "attention_mask": ([1] * length, "remove the padding from the row"),
        "position_ids": (list(range(length)), "give each example of a packed row its own row; data.packing packs them"),
        "token_type_ids": ([0] * length, "remove this column"),
    }
    for name, (values, remedy) in usual.items():
        if row.get(name) is not None and _integers(row[name], name) != values:
            wanted = "0, 1, 2, ..." if name == "position_ids" else values[0]
            raise ValueError(f"{name} is not {wanted} throughout; {remedy}")


def _integers(values: Any, name: str) -> list[int]:
    if not isinstance(values, list):
        kind = "missing" if values is None else type(values).__name__
        raise ValueError(f"{name} is {kind}, not a list of whole numbers")
    for place, value in enumerate(values):
        if type(value) is not int:
            raise ValueError(f"{name}, position {place}: {value!r} is {type(value).__name__}, not a whole number")
    return values
