"""Examples of a dataset that is read while a run trains on it: nothing is stored, and the length is not known.

Every rank reads and encodes the whole stream, which costs a processor little beside a training step, and takes its
share of each global batch. The batch of a step is therefore the same on any hardware, as without streaming. A resumed
run reads the stream again up to the step at which it resumes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from itertools import count, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_lowrank.data.encoding import style_of
from llm_lowrank.data.limits import Limits
from llm_lowrank.data.rows import Example, encode_row, row_options
from llm_lowrank.data.settings import Data
from llm_lowrank.data.sources import FileRows, check_formats, open_dataset

BUFFER = 10_000  # rows that are shuffled at a time
Located = tuple[Callable[[], str], dict[str, Any]]  # where a row stands, and the row
ENOUGH = 1000  # unusable rows one after another, at which the data and not a single row is at fault


class Stream:
    """A streaming dataset; its held-out examples are taken from the beginning of the stream.

    ValueError if the stream has fewer distinct examples than data.held_out, or if a row cannot be used and
    data.bad_rows is refuse.
    """

    def __init__(
        self,
        settings: Data,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        date: str = "",
        limits: Limits | None = None,
    ) -> None:
        self.settings, self.seed, self.tokenizer, self.limits = settings, seed, tokenizer, limits
        self.dataset = open_dataset(settings.names[0], settings, seed)
        assert isinstance(self.dataset.rows, FileRows)  # load_corpus lets files and the hub alone through
        self.rows = self.dataset.rows
        check_formats(settings, [self.dataset])
        self.style = style_of(tokenizer, settings.prompt_style, self.dataset.style)
        self.options = row_options(self.dataset, settings, tokenizer, self.style, date)
        self.unused: Counter[str] = Counter()  # column or message key that nothing reads -> rows read so far
        self.dropped: Counter[str] = Counter()  # reason -> rows, of what was read so far
        self.ends: Counter[int] = Counter()  # token that ends an answer -> rows read so far
        self.truncated = 0  # examples cut to max_length, of what was read so far
        # Rows with a key that is held out already are skipped, so that the held-out questions differ.
        self.held_out: list[Example] = []
        self.held_keys: set[str] = set()
        self.skipped = 0  # rows at the beginning that training never sees
        for encoded in self._usable(self.rows.located(), 0):
            if len(self.held_out) == settings.held_out:
                break
            self.skipped = encoded["number"] + 1
            if encoded["key"] not in self.held_keys:
                self.held_keys.add(encoded["key"])
                self.held_out.append(_example(encoded))
        if len(self.held_out) < settings.held_out:
            raise ValueError(
                f"{self.dataset.name}: data.held_out={settings.held_out} is more than the distinct examples in the "
                "stream"
            )

    def again(self) -> "Stream":
        """Return the same stream with counts of its own, for a second reading of its beginning."""
        other = copy(self)
        other.unused, other.dropped, other.ends = Counter(), Counter(), Counter()
        return other

    def examples(self) -> Iterator[Example]:
        """Yield the examples for ever, in another order each epoch."""
        for epoch in count():
            rows = _shuffled(islice(self.rows.located(), self.skipped, None), self.seed, epoch)
            any_left = False
            for encoded in self._usable(rows, self.skipped):
                if encoded["key"] in self.held_keys:
                    self.dropped["question is also held out"] += 1
                    continue
                any_left = True
                yield _example(encoded)
            if not any_left:
                raise ValueError(
                    f"{self.dataset.name}: the stream holds nothing to train on beyond the {len(self.held_out)} held "
                    "out"
                )

    def _usable(self, rows: Iterable[Located], first: int) -> Iterator[dict[str, Any]]:
        """Yield the rows that can be used as FEATURES with their `number`, from `first` on; count the others."""
        unusable_in_a_row = 0
        for number, (place, row) in enumerate(rows, first):
            encoded = encode_row(row, **self.options)
            self.unused.update(encoded["unused"])
            if self.limits is not None and not encoded["problem"]:
                encoded["problem"] = self.limits.problem(encoded["input_ids"], self.tokenizer)
            reason = encoded["problem"] or ("" if encoded["trained"] else "no completion token left within max_length")
            if encoded["problem"] and self.settings.bad_rows == "refuse":
                raise ValueError(
                    f"{place()}: {encoded['problem']}; mend or remove it, or leave such rows out and count them: "
                    "data.bad_rows: drop"
                )
            if not reason:
                unusable_in_a_row = 0
                self.truncated += encoded["truncated"]
                self.ends.update(encoded["ends"])
                yield {**encoded, "number": number}
                continue
            self.dropped[reason] += 1
            unusable_in_a_row += 1
            if unusable_in_a_row == ENOUGH:
                raise ValueError(
                    f"{self.dataset.name}: {ENOUGH} rows in a row cannot be used, the last one for: {reason}"
                )


def _example(encoded: dict[str, Any]) -> Example:
    return Example(encoded["input_ids"], encoded["labels"])


def _shuffled(rows: Iterable[Located], seed: int, epoch: int) -> Iterator[Located]:
    """Yield the rows in an order that seed and epoch draw; no row comes more than BUFFER places too early."""
    rng = np.random.default_rng([seed, epoch])
    buffer: list[Located] = []
    for row in rows:
        if len(buffer) < BUFFER:
            buffer.append(row)
            continue
        place = int(rng.integers(BUFFER))
        yield buffer[place]
        buffer[place] = row
    rng.shuffle(buffer)
    yield from buffer
