"""Names of columns and of message keys that change what is learned: which are used, and why the others are refused.

A name that is in none of these tables is passed on (a chat template may read a message's `name`) or left aside, and the
run lists it once.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """Why a name is refused where nothing uses it, and what to do instead of ignoring it."""

    effect: str  # completes the sentence "the column label ..."
    remedy: str


_JUDGED = Refusal(
    "judges answers, and a run trains every answer that it reads",
    "keep the answers to train on, and remove this column",
)
_CLASS = Refusal(
    "marks a row with a class or a judgement, and a run trains every row that it reads",
    "keep the rows to train on, and remove this column",
)
_MEDIA = Refusal("belongs to a model that sees or hears, and a run trains on text", "remove such rows")
_WEIGHT = Refusal(
    "weighs rows or tokens, and every trained token of a run counts the same",
    "mark the messages that are not trained with weight: 0, or give whole datasets data.weights",
)
_SYSTEM = Refusal(
    "looks like a system prompt, and nothing reads it",
    "map it with data.columns: {{system: {name}}} in a format with a prompt",
)
_HISTORY = Refusal("looks like earlier turns, and nothing reads it", "write the row in the format messages")
_CONTEXT = Refusal(
    "looks like a text that the question is about, and nothing reads it",
    "put it into the question, or map it with data.columns: {{input: {name}}} in the format alpaca",
)
_DOCUMENTS = Refusal("is for a retrieval template, and nothing reads it", "put the documents into a message")
_TOOLS = Refusal("defines tools or calls them, and nothing reads it", "write the row in the format messages")
_THOUGHT = Refusal(
    "looks like the reasoning before an answer, and nothing reads it",
    "put it into the answer, or give it as reasoning_content of a message to a chat template that writes it",
)
_ROW = Refusal(
    "says that the row is not trained, and a run trains every row that it reads",
    "remove such rows, and this column",
)
_FLAG = Refusal(
    "looks like a flag that says whether a turn is trained, and is none that is read",
    "rename it to train (1: trained) or masked (1: not trained)",
)
_PART = Refusal("marks parts of a text, and an answer is trained as a whole", "split the answer into messages")
_SIDE = Refusal(
    "does not say which side it marks: some tools train what has mask 1, others hide it",
    "rename it to train (1: trained) or masked (1: not trained)",
)
_OPTIONS = Refusal("sets variables of a chat template, and nothing reads it", "write the row in a format with a prompt")


def _by_name(table: dict[Refusal, str]) -> dict[str, Refusal]:
    return {name: refusal for refusal, names in table.items() for name in names.split()}


REFUSED = _by_name(
    {
        _JUDGED: "chosen rejected preferred dispreferred chosen_response rejected_response response_chosen "
        "response_rejected chosen_messages rejected_messages",
        _CLASS: "label labels kto_tag",
        _MEDIA: "image images image_url image_path audio audios input_audio video videos pixel_values",
        _WEIGHT: "weight weights sample_weight loss_weight loss_scale loss_mask completion_mask assistant_mask "
        "assistant_masks",
        _SYSTEM: "system system_prompt system_message",
        _HISTORY: "history",
        _CONTEXT: "context input inputs passage passages document background knowledge evidence",
        _DOCUMENTS: "documents",
        _TOOLS: "tools functions tool_calls function_call",
        _THOUGHT: "reasoning_content thinking reasoning",
        _PART: "train_detail training_detail",
        _SIDE: "mask",
        _OPTIONS: "chat_template_kwargs",
    }
)

# Keys of a message that say whether it is trained: names -> the truth value of a trained turn.
FLAGS = {
    **dict.fromkeys(
        ["weight", "train", "training", "trainable", "trained", "loss", "loss_weight", "loss_scale", "loss_mask"], True
    ),
    "masked": False,
}
LIKE_A_FLAG = re.compile(  # in the names of keys that other programs read as flags
    "(^|_)(train|trained|training|trainable|learn|learned|loss|mask|masked|unmasked|weight|supervised|skip|ignored?|"
    "excluded?)(_|$)"
)
REASONING = ("reasoning_content", "thinking", "reasoning")  # a chat template may write them before the answer
TEMPLATE_KEYS = (*REASONING, "tools", "functions", "documents")  # of a message; used if the chat template writes them


def is_given(value: Any) -> bool:
    """Return whether a cell holds something. A table fills what a row lacks with None, and some files with an empty
    text or list.
    """
    return value is not None and not (isinstance(value, str | list | tuple | dict) and not value)


def check_row(row: Mapping[str, Any], used: Collection[str]) -> None:
    """Check that no column that changes what is learned is left aside. ValueError names it and says what to do.

    used: the columns that the format reads.
    """
    for name, value in row.items():
        if name in used or not is_given(value):
            continue
        plain = _plain(name)
        refusal = REFUSED.get(plain)
        if refusal is None and plain in FLAGS and _truth(value) is not None and _truth(value) is not FLAGS[plain]:
            refusal = _ROW
        if refusal is not None and not (refusal is _WEIGHT and _truth(value)):
            raise ValueError(f"the column {shown_name(name)} {_advice(refusal, name)}")


def check_message(number: int, message: Mapping[str, Any], used: Collection[str]) -> None:
    """Check that no key of a message that changes what is learned is left aside. ValueError names it."""
    for name, value in message.items():
        if name in used or not is_given(value):
            continue
        refusal = REFUSED.get(_plain(name))
        marks = isinstance(value, bool | int | float | list) or _truth(value) is not None
        if marks and (refusal is _WEIGHT or (refusal is None and LIKE_A_FLAG.search(_plain(name)))):
            refusal = _FLAG
        if refusal is not None:
            raise ValueError(f"message {number}: the key {shown_name(name)} {_advice(refusal, name)}")


def is_blank(text: str) -> bool:
    """Return whether nothing in a text can be seen: blanks, control characters, characters of no width."""
    return all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") for letter in text)


def _plain(name: str) -> str:
    """Return a name in small letters, its words parted by _: of is_masked, isMasked and "Is masked" the same."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())
    return parted.lower().replace("-", "_").replace(" ", "_")


def _truth(value: Any) -> bool | None:
    """Return what a value of a flag says; None if it is no flag. A cell of a table of text is a text."""
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, str | bool | int | float):
        return {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}.get(str(word).lower())
    return None


def shown_name(name: str) -> str:
    """Return a name for a message, with quotation marks where blanks stand around it."""
    return name if name == name.strip() else repr(name)


def _advice(refusal: Refusal, name: str) -> str:
    remedy = refusal.remedy.format(name=shown_name(name))
    return f"{refusal.effect}; {remedy}, or leave it aside with data.ignore: [{shown_name(name)}]"


def is_trained(number: int, message: Mapping[str, Any], is_answer: bool) -> bool:
    """Return whether the flags of a message let it be trained; without a flag an answer is.

    ValueError if a flag is neither true nor false, if two flags differ, or if a turn that is no answer is to be
    trained.
    """
    said: dict[str, bool] = {}
    for name, meaning in FLAGS.items():
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(
                f"message {number}: {name} is {value!r}, and a turn is trained or not: write 1 or 0, for every trained "
                f"token counts the same; or leave the flag aside with data.ignore: [{name}]"
            )
        said[name] = bool(value) is meaning
    if len(set(said.values())) > 1:
        raise ValueError(f"message {number}: {' and '.join(said)} contradict each other; keep one of them")
    trained = all(said.values())
    if said and trained and not is_answer:
        name = next(iter(said))
        raise ValueError(
            f"message {number}: {name} asks to train a turn that is no answer, and only answers are trained; remove "
            f"the flag from this turn, or leave it aside with data.ignore: [{name}]"
        )
    return trained


def describe_unused(counts: Mapping[str, int]) -> str:
    """Return the line that lists columns and message keys that nothing reads. counts: name -> number of rows."""
    names = ", ".join(f"{name} ({count:,} row{'s' * (count != 1)})" for name, count in sorted(counts.items()))
    return f"columns not used: {names}"


def names_left(row: Mapping[str, Any], used: Collection[str]) -> Iterable[str]:
    """Yield the columns of a row that hold something and that nothing reads."""
    return (name for name, value in row.items() if name not in used and is_given(value))
