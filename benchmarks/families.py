"""Families of string tasks for benchmarks/quality.py: what a small model is pre-trained on, and what it is adapted to.

A question is a tag and two strings x and y of four digits, its answer another string of four digits. The tags of the
family that a model is adapted to are new to it, and so are its rules, though they are put together from what the other
family teaches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DIGITS, LENGTH = 10, 4  # an example: tag, x, y, =, answer; x, y and the answer are strings of 4 digits
Rule = Callable[[Tensor, Tensor], Tensor]  # x, y (count, 4) -> answer (count, 4)


class Family(NamedTuple):
    """Rules by their tags."""

    own: dict[str, Rule]  # what the model is pre-trained on
    shifted: dict[str, Rule]  # what it is adapted to


def take(*places: int) -> Rule:
    """The digits of x and then y at these places."""
    return lambda x, y: torch.cat([x, y], 1)[:, list(places)]


FAMILIES: dict[str, Family] = {
    # single operators; then tags that the model has not seen, operators put together otherwise, another base
    "digits": Family(
        own={
            "a": lambda x, y: (x + 1) % 10,
            "s": lambda x, y: (y - 2) % 10,
            "m": torch.maximum,
            "n": torch.minimum,
            "r": lambda x, y: x.flip(1),
            "t": lambda x, y: y.roll(1, 1),
        },
        shifted={
            "A": lambda x, y: (x.flip(1) + 3) % 7,
            "B": lambda x, y: 9 - torch.minimum(x, y),
            "C": lambda x, y: torch.maximum(x, y.flip(1)),
            "D": lambda x, y: (3 * y.roll(-1, 1)) % 10,
            "E": lambda x, y: (x + 5 * (y % 2)) % 10,
        },
    ),
    # tables of two digits; then other tables, on digits at other places
    "tables": Family(
        own={
            "a": lambda x, y: (x + y) % 10,
            "s": lambda x, y: (x - y) % 10,
            "m": lambda x, y: (x - y).abs(),
            "n": torch.maximum,
            "r": lambda x, y: (2 * x) % 10,
            "t": lambda x, y: 9 - y,
        },
        shifted={
            "A": lambda x, y: (x + y.flip(1)) % 10,
            "B": lambda x, y: (x + y + 1) % 10,
            "C": lambda x, y: (2 * x + y) % 10,
            "D": lambda x, y: 9 - (x - y).abs(),
            "E": lambda x, y: torch.minimum(x.roll(1, 1), y),
        },
    ),
    # digits moved to other places; then moves that the model has not seen, and sorted strings
    "places": Family(
        own={
            "a": take(1, 2, 3, 0),
            "s": take(7, 6, 5, 4),
            "m": take(2, 3, 0, 1),
            "n": take(0, 1, 6, 7),
            "r": take(0, 4, 1, 5),
            "t": lambda x, y: x.sort(1).values,
        },
        shifted={
            "A": take(3, 7, 2, 6),
            "B": take(6, 7, 0, 1),
            "C": take(2, 1, 0, 3),
            "D": lambda x, y: y.sort(1, descending=True).values,
            "E": lambda x, y: torch.cat([x[:, :2], y[:, 2:]], 1).sort(1).values,
        },
    ),
}
SYMBOLS = "0123456789=" + "".join(FAMILIES["digits"].own) + "".join(FAMILIES["digits"].shifted)


def examples(rules: dict[str, Rule], count: int, random: torch.Generator) -> Tensor:
    """Return the tokens of examples of one length, (count, 2 + 3 * 4)."""
    x, y = torch.randint(DIGITS, (2, count, LENGTH), generator=random)
    which = torch.randint(len(rules), (count,), generator=random)
    answers = torch.stack([rule(x, y) for rule in rules.values()])[which, torch.arange(count)]  # (count, 4)
    tags = torch.tensor([SYMBOLS.index(tag) for tag in rules])[which]
    return torch.cat([tags[:, None], x, y, torch.full((count, 1), SYMBOLS.index("=")), answers], 1)
