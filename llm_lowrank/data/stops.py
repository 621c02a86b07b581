"""What ends an answer in training, so that the same ends it in generation.

The end of an answer is the last trained token that is not blank, and it has to be a special token: only there can
generation stop. The run, its exported adapter and its merged model stop at these tokens beside those of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache

from transformers import PreTrainedTokenizerBase


def answer_ends(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool], answers: int
) -> list[int]:
    """Return the tokens that end the answers of a row, each once. ValueError if an answer has no end.

    ids: of the whole row, before it is cut. answers: how many of them are trained. With more stretches of trained
    tokens than answers, the template marks an answer in several pieces, of which only the last one has to have an end.
    """
    stretches = list(_stretches(trained))
    checked = stretches if len(stretches) <= answers else stretches[-1:]
    ends: dict[int, None] = {}
    for start, stop in checked:
        end = _end(tokenizer, ids[start:stop])
        if end is None:
            raise ValueError(
                f"an answer is trained without an end: behind {_last_words(tokenizer, ids[start:stop])!r} stands no "
                "special token that is trained, so that the model would never stop. Let the chat template write "
                f"{tokenizer.eos_token or 'an end of turn'} behind every answer, inside of {{% generation %}} where it "
                "has such marks (data.chat_template FILE.jinja); a text such as <|im_end|> has to be one special token "
                "of the tokenizer"
            )
        ends[end] = None
    return list(ends)


def known_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], trained: Sequence[bool]) -> list[int]:
    """Return the token that ends the last answer of a row, if one does: for rows that were prepared elsewhere."""
    last = list(_stretches(trained))[-1:]
    return [end for start, stop in last if (end := _end(tokenizer, ids[start:stop])) is not None]


def describe_ends(tokenizer: PreTrainedTokenizerBase, ends: Collection[int], others: Iterable[int | None] = ()) -> str:
    """Return the line about the tokens that end the answers. others: at which generation stops, too."""
    more = [token for token in dict.fromkeys(others) if token is not None and token not in ends]
    also = _names(tokenizer, more)
    if not ends:
        return f"no answer with an end of its own is trained; generation stops at {also or 'its limit alone'}"
    return f"answers end with {_names(tokenizer, ends)}, where generation stops" + (f", as at {also}" if also else "")


def end_of(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the special token that a text ends with, blanks behind it aside; empty if there is none."""
    text = text.rstrip()
    return next((end for end in _texts(tokenizer) if text.endswith(end)), "")


def _names(tokenizer: PreTrainedTokenizerBase, tokens: Collection[int]) -> str:
    known = len(tokenizer)
    return ", ".join(
        f"{tokenizer.convert_ids_to_tokens(token) if token < known else 'no token of the tokenizer'} ({token})"
        for token in tokens
    )


def _stretches(trained: Sequence[bool]) -> Iterable[tuple[int, int]]:
    """Yield the first position of every unbroken stretch of trained tokens, and the position behind it."""
    start = None
    for position, train in enumerate([*trained, False]):
        if train and start is None:
            start = position
        elif not train and start is not None:
            yield start, position
            start = None


def _end(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> int | None:
    """Return the special token that ends an answer; the blanks that a template writes behind it do not count."""
    special = _special(tokenizer)
    for token in reversed(answer):
        if token in special:
            return token
        if tokenizer.decode([token]).strip():
            return None
    return None


def _last_words(tokenizer: PreTrainedTokenizerBase, answer: Sequence[int]) -> str:
    return str(tokenizer.decode(answer[-16:])).strip()[-40:]


@lru_cache(maxsize=8)
def _special(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens of a tokenizer that can end an answer.

    Added tokens that are not called special may be parts of an answer, such as </think> and </tool_call>; others are
    ends of turns that somebody added, such as <|im_end|>.
    """
    added = tokenizer.added_tokens_decoder.items()
    ends = {number for number, token in added if token.special or not token.content.strip().startswith("</")}
    return frozenset({*ends, *tokenizer.all_special_ids})


@lru_cache(maxsize=8)
def _texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The texts of these tokens, the longest first."""
    texts = (str(tokenizer.convert_ids_to_tokens(token)) for token in _special(tokenizer))
    return tuple(sorted(filter(str.strip, texts), key=len, reverse=True))
