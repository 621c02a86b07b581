"""Examples of a dataset that is read while it is trained on: nothing is stored, and its length is not known.

Every rank reads and encodes the whole stream, which costs a processor little beside a training step, and takes its
share of each global batch: so the batch of a step is the same on any hardware here too. Going on at a later step reads
the stream up to it again.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_lowrank.data.encoding import style_of
from llm_lowrank.data.rows import Example, encode_row, row_options
from llm_lowrank.data.settings import Data
from llm_lowrank.data.sources import check_read, read

BUFFER = 10_000  # rows that are shuffled at a time
ENOUGH = 1000  # rows in a row that cannot be used: then it is not this one row


class Stream:
    """Opens a streaming dataset and takes the held-out examples from its beginning."""

    def __init__(self, settings: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.part = read(settings.names[0], settings, seed)
        check_read(settings, [self.part])
        self.style = style_of(tokenizer, settings.prompt_style, self.part.style)
        self.options = row_options(self.part, settings, tokenizer, self.style)
        self.dropped: Counter[str] = Counter()  # of what was read so far
        self.truncated = 0  # examples cut to max_length, of what was read so far
        self.held_out: list[Example] = []
        self.held_keys: set[str] = set()
        self.skipped = 0  # rows at the beginning that training never sees
        for encoded in self._usable(self.part.rows, 0):
            if len(self.held_out) == settings.held_out:
                break
            self.skipped = encoded["number"] + 1
            if encoded["key"] not in self.held_keys:
                self.held_keys.add(encoded["key"])
                self.held_out.append(_example(encoded))
        if len(self.held_out) < settings.held_out:
            raise ValueError(
                f"{self.part.name}: data.held_out={settings.held_out} is more than the distinct examples in the stream"
            )

    def examples(self) -> Iterator[Example]:
        """For ever, in another order each epoch."""
        rows = self.part.rows.skip(self.skipped).shuffle(seed=self.seed, buffer_size=BUFFER)
        for epoch in count():
            rows.set_epoch(epoch)
            any_left = False
            for encoded in self._usable(rows, self.skipped):
                if encoded["key"] in self.held_keys:
                    self.dropped["question is also held out"] += 1
                    continue
                any_left = True
                yield _example(encoded)
            if not any_left:
                raise ValueError(
                    f"{self.part.name}: the stream holds nothing to train on beyond the {len(self.held_out)} held out"
                )

    def _usable(self, rows: Any, first: int) -> Iterator[dict[str, Any]]:
        in_a_row = 0
        for number, row in enumerate(rows, first):
            encoded = encode_row(row, **self.options)
            reason = encoded["problem"] or ("" if encoded["trained"] else "no completion token left within max_length")
            if encoded["problem"] and self.settings.bad_rows == "refuse":
                raise ValueError(
                    f"{self.part.name}, row {number} of the stream as it is read: {encoded['problem']}; mend or remove "
                    "it, or leave such "
                    "rows out and count them: data.bad_rows: drop"
                )
            if not reason:
                in_a_row = 0
                self.truncated += encoded["truncated"]
                yield {**encoded, "number": number}
                continue
            self.dropped[reason] += 1
            in_a_row += 1
            if in_a_row == ENOUGH:
                raise ValueError(f"{self.part.name}: {ENOUGH} rows in a row cannot be used, the last one for: {reason}")


def _example(encoded: dict[str, Any]) -> Example:
    return Example(encoded["input_ids"], encoded["labels"])
