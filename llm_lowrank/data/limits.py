"""What a model can take: the tokens of its embedding, and the positions that it has learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Limits:
    """Tokens from `vocabulary` on have no row in the embedding; with learned positions no example has more tokens."""

    vocabulary: int
    positions: int | None  # None: positions are computed, for any length

    def problem(self, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """Why the model cannot read an example; an empty string if it can."""
        if ids and (largest := max(ids)) >= self.vocabulary:
            token = tokenizer.convert_ids_to_tokens(largest)
            return (
                f"the token {largest} ({token}) has no row in the model's embedding, which has {self.vocabulary}; take "
                "the tokenizer that belongs to the model, or resize the embedding and save the model before the run"
            )
        if self.positions is not None and len(ids) > self.positions:
            return (
                f"the example has more tokens than the {self.positions} positions that the model has learned; set "
                f"data.max_length {self.positions}"
            )
        return ""

    def problems(self, table: datasets.Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The problem of every row of a table of examples: its own, if it has one, else that with these limits."""
        own = list(table["problem"][:])
        lengths = table.with_format("numpy")["length"][:]
        chunks = table.with_format("arrow")[:]["input_ids"].chunks
        largest = max((int(np.max(flat)) for chunk in chunks if len(flat := chunk.flatten().to_numpy())), default=0)
        if largest < self.vocabulary and (
            self.positions is None or not len(lengths) or lengths.max() <= self.positions
        ):
            return own
        rows = table["input_ids"]
        return [text or self.problem(ids, tokenizer) for text, ids in zip(own, rows, strict=True)]
