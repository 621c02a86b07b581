"""From a row of a dataset to the turns of a conversation.

A row that does not fit its format in full is a ValueError: nothing is guessed.

    alpaca              instruction, input (may be missing), output, system (may be missing)
    sharegpt            conversations: a list of {from, value}
    messages            messages: a list of {role, content}
    prompt_completion   prompt, completion
    text                text; all of it is trained
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
TEXT = "text"  # the role of a row that is no conversation


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, or a whole text."""

    role: str  # system, user, assistant; text
    content: str
    context: str = ""  # alpaca's input: prompt styles have a place of its own for it
    extras: Row = field(default_factory=dict)  # other fields of a message (name, ...): a chat template may read them


@dataclass(frozen=True)
class Format:
    """The columns of a format and the way from one of its rows to turns."""

    required: tuple[str, ...]
    texts: tuple[str, ...]  # columns that hold text, those that may be missing included
    turns: Callable[[Row], list[Turn]]  # ValueError if the row does not fit


@dataclass(frozen=True)
class Preset:
    """Where a published dataset lies and how its rows are read."""

    hub: str
    format: str
    style: str  # the prompt of its paper, for tokenizers without a chat template
    columns: dict[str, str] = field(default_factory=dict)
    split: str = "train"


PRESETS = {
    "alpaca": Preset("tatsu-lab/alpaca", "alpaca", "alpaca"),
    "commonsense-170k": Preset("zwhe99/commonsense_170k", "alpaca", "alpaca"),
    "magicoder-evol-instruct": Preset(
        "ise-uiuc/Magicoder-Evol-Instruct-110K",
        "prompt_completion",
        "magicoder",
        {"prompt": "instruction", "completion": "response"},
    ),
    "metamathqa": Preset(
        "meta-math/MetaMathQA", "prompt_completion", "metamath", {"prompt": "query", "completion": "response"}
    ),
    "ultrachat": Preset("HuggingFaceH4/ultrachat_200k", "messages", "plain", split="train_sft"),
}


def read_turns(row: Row, format: str, columns: dict[str, str]) -> list[Turn]:
    """Return the turns of a row. `columns`: name in the format -> name in the row. ValueError if the row does not fit
    the format.
    """
    return FORMATS[format].turns({**row, **{ours: row.get(theirs) for ours, theirs in columns.items()}})


def _alpaca(row: Row) -> list[Turn]:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context, system = _text(row, "input", ""), _text(row, "system", "")
    if not instruction.strip():
        raise ValueError("the instruction is empty")
    return [
        *([Turn("system", system)] if system else []),
        Turn("user", instruction, context),
        Turn("assistant", output),
    ]


def _prompt_completion(row: Row) -> list[Turn]:
    return [Turn("user", _text(row, "prompt")), Turn("assistant", _text(row, "completion"))]


def _plain_text(row: Row) -> list[Turn]:
    return [Turn(TEXT, _text(row, "text"))]


def _messages(row: Row) -> list[Turn]:
    return _conversation(row.get("messages"), "messages", "role", "content")


def _sharegpt(row: Row) -> list[Turn]:
    return _conversation(row.get("conversations"), "conversations", "from", "value")


def _conversation(messages: Any, column: str, role: str, content: str) -> list[Turn]:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{column} is not a list of {{{role}, {content}}}")
    turns = []
    for number, message in enumerate(messages):
        who, text = (message.get(name) for name in (role, content))
        if not isinstance(who, str) or who not in ROLES:
            raise ValueError(f"message {number}: the {role} {who!r} is none of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise ValueError(
                f"message {number}: {content} is {'missing' if text is None else type(text).__name__ + ', not text'}"
            )
        extras = {name: value for name, value in message.items() if name not in (role, content) and value is not None}
        turns.append(Turn(ROLES[who], text, extras=extras))
    return turns


def _text(row: Row, name: str, default: str | None = None) -> str:
    """Return the text in a column, or `default` where the row has none. ValueError if there is neither.

    A table fills a column that a row lacks with None.
    """
    text = row.get(name)
    if text is None and default is not None:
        return default
    if not isinstance(text, str):
        raise ValueError(f"{name} is {'missing' if text is None else type(text).__name__ + ', not text'}")
    return text


FORMATS = {
    "messages": Format(("messages",), (), _messages),
    "sharegpt": Format(("conversations",), (), _sharegpt),
    "prompt_completion": Format(("prompt", "completion"), ("prompt", "completion"), _prompt_completion),
    "alpaca": Format(("instruction", "output"), ("instruction", "input", "output", "system"), _alpaca),
    "text": Format(("text",), ("text",), _plain_text),
}


def format_of(name: str, wanted: str, columns: dict[str, str], column_names: list[str]) -> str:
    """Return the format of the dataset `name`. ValueError if none or more than one format fits.

    wanted: a format or auto. columns: name in the format -> name in the data. column_names: the names in the data.
    """
    for ours, theirs in columns.items():
        if theirs not in column_names:
            raise ValueError(
                f"data.columns: {name} has no column {theirs!r} to take {ours} from; it has "
                f"{', '.join(column_names) or 'none'}"
            )
    available = {*column_names, *columns}
    formats = FORMATS if wanted == "auto" else {wanted: FORMATS[wanted]}
    fitting = [kind for kind, format in formats.items() if {*format.required} <= available]
    if len(fitting) > 1 and "text" in fitting:
        fitting.remove("text")  # some publish the whole prompt beside its parts
    if not fitting:
        choices = "; ".join(f"{' and '.join(format.required)} ({kind})" for kind, format in formats.items())
        raise ValueError(
            f"{name} has the columns {', '.join(column_names) or 'none'}; wanted: {choices}. Say which is which: "
            "data.columns {prompt: question}"
        )
    if len(fitting) > 1:
        raise ValueError(
            f"{name} has the columns of the formats {' and '.join(fitting)}; set data.format to one of them"
        )
    return fitting[0]
