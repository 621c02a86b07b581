"""From a row of a dataset to a conversation.

A row that does not fit its format in full is a ValueError: nothing is guessed.

    alpaca              instruction, output; input, system, history, tools may be missing
    sharegpt            conversations: a list of {from, value}; system, tools may be missing
    messages            messages: a list of {role, content}; system, tools may be missing
    prompt_completion   prompt, completion: texts or lists of messages; system, history, tools may be missing
    text                text; all of it is trained
    tokens              input_ids, labels: tokens that another program prepared
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from llm_lowrank.data.columns import (
    FLAGS,
    TEMPLATE_KEYS,
    check_message,
    check_row,
    is_blank,
    is_given,
    is_trained,
    names_left,
    shown_name,
)
from llm_lowrank.data.reading import NO_JSON, parse
from llm_lowrank.data.tokens import OPTIONAL, Tokens, read_tokens

Row = dict[str, Any]
CALL = "a call"  # what stands for the role assistant where the content of a message is the calls of tools
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": CALL,
    "tool_call": CALL,
}
EMPTY, NO_ANSWER = "the answer is empty", "the answer is empty: the conversation has none"
TEXT = "text"  # the role of a row that is no conversation
KEYS = (("role", "content"), ("from", "value"))  # under which a message has its role and its content
CALLS = ("tool_calls", "function_call")  # keys under which an answer has the calls of tools


@dataclass(frozen=True)
class Turn:
    """One message of a conversation, or a whole text."""

    role: str  # system, user, assistant, tool; text
    content: str
    context: str = ""  # alpaca's input: prompt styles have a place of its own for it
    extras: Row = field(default_factory=dict)  # other fields of a message (name, ...): a chat template may read them
    trained: bool = True  # False makes an answer part of the prompt; of other turns it says nothing
    number: int | None = None  # of the message in the data, from 0; None: it comes from a column of its own
    tokens: Tokens | None = None  # of a row that is tokens already; the content is then its question

    @property
    def place(self) -> str:
        """Where the turn stands in its row, as error messages name it."""
        if self.number is not None:
            return f"message {self.number}"
        return {"system": "the system prompt", "user": "the question"}.get(self.role, "the answer")


@dataclass(frozen=True)
class Conversation:
    """What a row says."""

    turns: list[Turn]
    tools: list[Row] = field(default_factory=list)  # definitions of the tools that the model may call
    options: Row = field(default_factory=dict)  # other variables of the chat template
    unused: tuple[str, ...] = ()  # columns that hold something and that nothing reads


@dataclass(frozen=True)
class Format:
    """The columns of a format and the way from one of its rows to turns."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    texts: tuple[str, ...]  # columns that hold text, those that may be missing included
    turns: Callable[[Row], list[Turn]]  # ValueError if the row does not fit

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that the format reads."""
        return self.required + self.optional


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


def read_conversation(row: Row, format: str, columns: dict[str, str], ignore: Collection[str] = ()) -> Conversation:
    """Return what a row says. ValueError if the row does not fit the format, or if a column or a key of a message that
    changes what is learned would be left aside.

    columns: name in the format -> name in the row. ignore: as in Data.
    """
    kind = FORMATS[format]
    used = {columns.get(name, name) for name in kind.columns}
    unused = tuple(names_left(row, used - {*ignore}))
    check_row({name: value for name, value in row.items() if name not in ignore}, used)
    # the row under the names of the format, and nothing else of it
    cells = {ours: row.get(columns.get(ours, ours)) for ours in kind.columns if columns.get(ours, ours) not in ignore}
    for name, cell in cells.items():
        if name in JSON_COLUMNS and isinstance(cell, str) and cell:
            cell = cells[name] = _json(cell, name)  # a cell of a CSV file holds text only
        if name in MESSAGES and isinstance(cell, list):
            cells[name] = [_without(message, ignore) for message in cell]
    turns = kind.turns(cells)
    if not any(turn.role in ("assistant", TEXT) for turn in turns):
        raise ValueError(NO_ANSWER)
    options = cells.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise ValueError("chat_template_kwargs is not an object of names with their values")
    return Conversation(turns, _tools(cells), {k: v for k, v in options.items() if v is not None}, unused)


def _without(message: Any, ignore: Collection[str]) -> Any:
    return {k: v for k, v in message.items() if k not in ignore} if isinstance(message, dict) else message


# --- columns of texts -------------------------------------------------------------------------------------------------


def _alpaca(row: Row) -> list[Turn]:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    if is_blank(instruction):
        raise ValueError("the instruction is empty")
    question = Turn("user", instruction, _text(row, "input", ""))
    return _with_system(row, [*_history(row), question, _answer(output)])


def _prompt_completion(row: Row) -> list[Turn]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
        return _with_system(row, [*_history(row), Turn("user", prompt), _answer(completion)])
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise ValueError(
            "only one of prompt and completion is a list of messages; write both as lists or both as texts"
        )
    if is_given(row.get("history")):
        raise ValueError("history stands beside a prompt of messages; write the earlier turns into the prompt")
    before = _conversation(prompt, "prompt", KEYS[0])
    after = _conversation(completion, "completion", KEYS[0], first=len(before))
    if not any(turn.role == "assistant" for turn in after):
        raise ValueError("the completion has no answer")
    # the answers of the prompt are a part of it
    return _with_system(row, [*(replace(turn, trained=False) for turn in before), *after])


def _plain_text(row: Row) -> list[Turn]:
    return [Turn(TEXT, _text(row, "text"))]


def _tokens(row: Row) -> list[Turn]:
    tokens = read_tokens(row)
    return [Turn(TEXT, tokens.prompt, tokens=tokens)]


def _answer(text: str) -> Turn:
    if is_blank(text):
        raise ValueError(EMPTY)
    return Turn("assistant", text)


def _history(row: Row) -> list[Turn]:
    """Return the earlier questions and answers of a row, which are trained as turns of their own."""
    history = row.get("history")
    if not is_given(history):
        return []
    if not isinstance(history, list):
        raise ValueError("history is not a list of [question, answer]")
    turns = []
    for number, pair in enumerate(history):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"history, entry {number}: it is not [question, answer]")
        if is_blank(pair[1]):
            raise ValueError(f"history, entry {number}: the answer is empty")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _with_system(row: Row, turns: list[Turn]) -> list[Turn]:
    """Return the turns with the system prompt of the column before them."""
    system = _text(row, "system", "")
    if not system:
        return turns
    if turns[0].role != "system":
        return [Turn("system", system), *turns]
    if turns[0].content != system:
        raise ValueError("the column system and the first message are different system prompts; keep one of them")
    return turns


def _text(row: Row, name: str, default: str | None = None) -> str:
    """Return the text in a column, or `default` where the row has none. ValueError if there is neither.

    A table fills a column that a row lacks with None.
    """
    text = row.get(name)
    if text is None and default is not None:
        return default
    if not isinstance(text, str):
        raise ValueError(f"{name} is {_kind(text)}")
    return text


def _kind(value: Any) -> str:
    """Return what a value is that should have been a text or a list."""
    return "missing" if value is None else f"{type(value).__name__}, not text"


# --- lists of messages ------------------------------------------------------------------------------------------------


def _messages(row: Row) -> list[Turn]:
    return _with_system(row, _conversation(row.get("messages"), "messages", KEYS[0]))


def _sharegpt(row: Row) -> list[Turn]:
    return _with_system(row, _conversation(row.get("conversations"), "conversations", KEYS[1]))


def _conversation(messages: Any, column: str, keys: tuple[str, str], first: int = 0) -> list[Turn]:
    """Return the messages of a column as turns. keys: of the role and of the content, where the messages do not say
    which they have. first: the number of the first message.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{column} is not a list of {{{', '.join(keys)}}}")
    # a table fills the keys that a message lacks with None
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    role, content = next((pair for pair in KEYS if all(pair[0] in message for message in messages)), keys)
    turns: list[Turn] = []
    for number, message in enumerate(messages, first):
        who = message.get(role)
        if not isinstance(who, str) or who not in ROLES:
            raise ValueError(f"message {number}: the {role} {who!r} is none of {', '.join(ROLES)}")
        rest = {name: value for name, value in message.items() if name not in (role, content)}
        turn = _turn(number, ROLES[who], message.get(content), rest, content)
        earlier = turns[-1] if turns else None
        if ROLES[who] == CALL and earlier and earlier.extras.get("tool_calls") and not earlier.content:
            # calls at the same time are one turn
            calls = earlier.extras["tool_calls"] + turn.extras["tool_calls"]
            turns[-1] = replace(earlier, extras={**earlier.extras, **turn.extras, "tool_calls": calls})
            continue
        turns.append(turn)
    return turns


def _turn(number: int, role: str, content: Any, rest: Row, key: str) -> Turn:
    """Return a message as a turn. rest: what it has beside its role and its content, whose key is `key`."""
    answers = role in ("assistant", CALL)
    check_message(number, rest, {*FLAGS, *CALLS, *TEMPLATE_KEYS})
    trained = is_trained(number, rest, answers)
    calls = content if role == CALL else rest.get("tool_calls") or rest.get("function_call")
    if calls and not answers:
        raise ValueError(f"message {number}: a turn of {role} calls a tool; only answers can")
    extras = {name: value for name, value in rest.items() if name not in FLAGS and name not in CALLS}
    if calls or role == CALL:
        extras["tool_calls"] = _calls(number, calls)
    if role == CALL or (calls and content is None):
        content = ""
    text = _content(number, content, key)
    if answers and not calls and is_blank(text):
        raise ValueError(f"message {number}: the answer is empty")
    return Turn("assistant" if answers else role, text, extras=extras, trained=trained, number=number)


def _content(number: int, content: Any, key: str) -> str:
    """Return the text of a message. A list of parts is taken if it has one part, and that one is a text."""
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        kinds = [str(part.get("type")) for part in content]
        other = next((kind for kind in kinds if kind != "text"), None)
        if other is not None:
            raise ValueError(f"message {number}: the {key} has a part of type {other}, and a run trains on text")
        if len(content) > 1:
            raise ValueError(
                f"message {number}: the {key} is {len(content)} texts; join them, with what you want between"
            )
        content = content[0].get("text")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: {key} is {_kind(content)}")
    return content


# --- tools ------------------------------------------------------------------------------------------------------------


def _calls(number: int, calls: Any) -> list[Row]:
    """Return the calls of a message as {type: function, function: {name, arguments}}, with what else they say.

    Calls may be given as JSON, one alone, or without the key function. Arguments stay as they are.
    """
    if isinstance(calls, str):
        calls = _json(calls, f"message {number}: the call of a tool")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, dict) and "function" not in call and "name" in call:
            call = {"type": "function", "function": call}
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"message {number}: a call of a tool is not {{name, arguments}}")
        arguments = function.get("arguments")
        if arguments is None:
            arguments = {}
        meaning = arguments
        if isinstance(arguments, str):
            meaning = _json(arguments, f"message {number}: the arguments for {function['name']}")
        if not isinstance(meaning, dict):
            raise ValueError(f"message {number}: the arguments for {function['name']} are not names with their values")
        found.append({**call, "function": {**function, "arguments": arguments}})
    if not found:
        raise ValueError(f"message {number}: the list of calls is empty")
    return found


def _tools(cells: Row) -> list[Row]:
    """Return the tools of a row as {type: function, function: {name, description, parameters}}.

    They may be given as JSON, and without the key function.
    """
    given = [name for name in ("tools", "functions") if is_given(cells.get(name))]
    if len(given) > 1:
        raise ValueError("tools and functions both define tools; keep one of them")
    if not given:
        return []
    tools = cells[given[0]]
    found = []
    for tool in tools if isinstance(tools, list) else [tools]:
        if isinstance(tool, str):
            tool = _json(tool, given[0])
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        if not isinstance(tool, dict):
            raise ValueError(f"{given[0]}: a tool is {type(tool).__name__}, not {{name, description, parameters}}")
        found.append(tool)
    return found


def _json(text: str, what: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON: {str(error).removeprefix(NO_JSON)}") from error


_CHAT = ("system", "tools", "functions", "chat_template_kwargs")  # columns that any conversation may have
FORMATS = {
    "messages": Format(("messages",), _CHAT, (), _messages),
    "sharegpt": Format(("conversations",), _CHAT, (), _sharegpt),
    "prompt_completion": Format(
        ("prompt", "completion"), (*_CHAT, "history"), ("prompt", "completion"), _prompt_completion
    ),
    "alpaca": Format(
        ("instruction", "output"),
        (*_CHAT, "input", "history"),
        ("instruction", "input", "output", "system"),
        _alpaca,
    ),
    "text": Format(("text",), (), ("text",), _plain_text),
    "tokens": Format(("input_ids", "labels"), OPTIONAL, (), _tokens),
}
MESSAGES = ("messages", "conversations", "prompt", "completion")  # columns that may hold lists of messages
JSON_COLUMNS = ("messages", "conversations", "history", "tools", "functions", "chat_template_kwargs")


ALIASES = {  # a column of a format -> names that others give it
    "prompt": "question query problem input instruction user human source",
    "completion": "answer response output solution reply target assistant",
    "messages": "conversation dialog dialogue chat turns",
}
WRAPPERS = {"data", "rows", "examples", "instances", "train"}  # keys of an object that holds the list of rows


def _proposal(column_names: list[str]) -> str:
    """Return what to do with columns that fit no format."""
    plain = {column.strip().lower(): column for column in reversed(column_names)}
    chosen = plain.pop("chosen", None)
    if chosen is not None:  # the better one of two answers, or the conversation with it
        plain.setdefault("completion" if "prompt" in plain else "messages", chosen)
    for format in FORMATS.values():
        found = {
            wanted: next((plain[name] for name in (wanted, *ALIASES.get(wanted, "").split()) if name in plain), None)
            for wanted in format.required
        }
        if None in found.values():
            continue
        renamed = {ours: theirs for ours, theirs in found.items() if ours != theirs}
        pairs = ", ".join(f"{ours}: {shown_name(str(theirs))}" for ours, theirs in renamed.items())
        aside = " and data.ignore: [rejected]" if "rejected" in column_names and "chosen" in found.values() else ""
        return f"Say which is which: data.columns {{{pairs}}}{aside}"
    if wrapper := next((column for column in column_names if column in WRAPPERS), ""):
        return f"If the rows are in a list under {wrapper}, write this list alone into the file"
    return "Say which is which: data.columns {prompt: question}"


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
        shown = ", ".join(map(shown_name, column_names))
        raise ValueError(f"{name} has the columns {shown or 'none'}; wanted: {choices}. {_proposal(column_names)}")
    if len(fitting) > 1:
        raise ValueError(
            f"{name} has the columns of the formats {' and '.join(fitting)}; set data.format to one of them"
        )
    known = FORMATS[fitting[0]].columns
    for ours in columns:
        if ours not in known:
            raise ValueError(f"data.columns: the format {fitting[0]} has no column {ours}; it has {', '.join(known)}")
    return fitting[0]
