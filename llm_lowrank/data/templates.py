"""Conversations written with a chat template, and what the template leaves out.

A chat template is a Jinja program that may ignore whatever it does not know: a system prompt, a tool, a whole turn.
What a row says and the template does not write is found by writing the conversation again with marks in it.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import date as Date
from datetime import datetime
from functools import cache
from itertools import product
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llm_lowrank.data.columns import REASONING, TEMPLATE_KEYS

Message = dict[str, Any]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # the tag by which a template marks its answers
CLOCK = "strftime_now"  # the function by which a template writes the date
CODES = "aAwdbBhmyYCHIklpPMSfjUWcxXGuVDFTReZz"  # of strftime
# A macro of the same name in front of the template hides transformers' function. A tag takes the line end after it
# away, so the template begins at the beginning of a line, as without the macro.
FROZEN_CLOCK = (
    "{% macro strftime_now(format) %}{% set made = namespace(text=format) %}{% for code in run_date %}"
    "{% set made.text = made.text.replace(code, run_date[code]) %}{% endfor %}{{ made.text }}{% endmacro %}\n"
)
REFUSES = "the chat template refuses this conversation: "
OTHER_TEMPLATE = "give one that does with data.chat_template FILE.jinja"


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, with what it writes beside the messages."""

    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Message] = ()
    options: Message = field(default_factory=dict)  # other variables of the template
    date: str = ""  # YYYY-MM-DD, the day that the template takes for today; empty: the day it is

    @property
    def source(self) -> str:
        """The text of the template; a tokenizer may have another one for tools. ValueError if it has several and none
        by default.
        """
        try:
            return str(self.tokenizer.get_chat_template(None, list(self.tools) or None))
        except ValueError as error:
            raise ValueError(
                f"the tokenizer has the chat templates {', '.join(sorted(self.tokenizer.chat_template))}, and none is "
                "called default; give the one to use with data.chat_template FILE.jinja"
            ) from error

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks its answers with {% generation %}."""
        return bool(GENERATION.search(self.source))

    def text(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """Return the text of the messages. ValueError if the template refuses them or fails."""
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def spans(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of the messages, and the first character and the end of each stretch that is marked as an
        answer.
        """
        return self._render(messages, return_assistant_tokens_mask=True)

    def _render(self, messages: Sequence[Message], **flags: bool) -> tuple[str, list[tuple[int, int]]]:
        source, variables = self.source, {**self.tokenizer.special_tokens_map, **self.options}
        if self.date and CLOCK in source:
            source, variables["run_date"] = FROZEN_CLOCK + source, _codes(self.date)
        try:
            (text,), spans = render_jinja_template(
                conversations=[list(messages)],
                tools=list(self.tools) or None,
                chat_template=source,
                **flags,
                **variables,
            )
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is no Jinja (line {error.lineno}: {error}); correct it") from error
        except TemplateError as error:
            refused = type(error) is TemplateError  # by raise_exception; another class says that an expression failed
            start = REFUSES if refused else "the chat template fails on this conversation: "
            raise ValueError(f"{start}{str(error) or 'it does not say why'}") from error
        except (TypeError, AttributeError, LookupError, ArithmeticError) as error:  # of an expression in the template
            raise ValueError(f"the chat template fails on this conversation: {error}") from error
        return text, [(int(start), int(end)) for start, end in (spans[0] if spans else ())]


def reads_clock(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether what the chat template writes depends on the day."""
    template = tokenizer.chat_template
    return CLOCK in (json.dumps(template) if isinstance(template, dict) else template or "")


def with_date(tokenizer: PreTrainedTokenizerBase, date: str) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer whose chat template takes `date` for today, whoever renders it."""
    dated = copy(tokenizer)
    if reads_clock(tokenizer):
        head = f"{{% set run_date = {json.dumps(_codes(date))} %}}{FROZEN_CLOCK}"
        template = tokenizer.chat_template
        many = isinstance(template, dict)
        dated.chat_template = {name: head + text for name, text in template.items()} if many else head + template
    return dated


def unread_keys(tokenizer: PreTrainedTokenizerBase | None, extras: Iterable[Message]) -> list[str]:
    """Return the keys of messages that the chat template does not name, so that nothing reads them. None: there is no
    template.
    """
    names = {name for keys in extras for name in keys if name != "tool_calls"}
    if not names:
        return []
    source = json.dumps(tokenizer.chat_template) if tokenizer is not None else ""
    return sorted(name for name in names if not re.search(rf"\b{re.escape(name)}\b", source))


@cache
def _codes(day: str) -> dict[str, str]:
    """Return what each code of strftime writes on the morning of a day, in the order in which codes are replaced."""
    morning = datetime.combine(Date.fromisoformat(day), datetime.min.time())
    return {f"%{dash}{code}": morning.strftime(f"%{dash}{code}") for code in CODES for dash in ("-", "")}


# --- what a template leaves out ---------------------------------------------------------------------------------------


def check_written(template: Template, messages: Sequence[Message], places: Sequence[str]) -> None:
    """Check that the template writes every message, the tools and the variables. ValueError names what it leaves out.

    places: where each message stands in the row.
    """
    text = template.text(messages)
    if template.tools and text == replace(template, tools=()).text(messages):
        raise ValueError(f"the chat template does not write the tools of the row; {_instead('tools')}")
    for name in template.options:
        if not re.search(rf"\b{re.escape(name)}\b", template.source):
            raise ValueError(
                f"chat_template_kwargs: the chat template has no variable {name}; {_instead('chat_template_kwargs')}"
            )
    for number, message in enumerate(messages):
        for name in set(TEMPLATE_KEYS) - set(REASONING):
            if name in message and text == template.text(_changed(messages, number, {name: None})):
                raise ValueError(f"{places[number]}: the chat template does not write {name}; {_instead(name)}")
    # A mark at the end of each content: the content of a turn that is left out takes its mark with it. A mark in a turn
    # of calls alone could make it another kind of turn.
    marks = {
        number: f"qzx{number}xzq"
        for number, message in enumerate(messages)
        if message.get("content") or not message.get("tool_calls")
    }
    try:
        marked = template.text(
            [
                {**message, "content": message["content"] + marks[number]} if number in marks else message
                for number, message in enumerate(messages)
            ]
        )
    except ValueError:  # a template that wants certain words
        marked, marks = text, {number: messages[number]["content"].strip() for number in marks}
    for number, mark in marks.items():
        if mark not in marked:
            role = messages[number]["role"]
            beside = " beside a call of a tool" if messages[number].get("tool_calls") else ""
            raise ValueError(
                f"{places[number]}: the chat template does not write the content of a turn of {role}{beside}; "
                f"{OTHER_TEMPLATE}, or remove such turns"
            )
    written = _squeezed(text)
    for number, message in enumerate(messages):
        said = message.get("content") if message["role"] == "user" else None
        if isinstance(said, str) and not any(_squeezed(form) in written for form in _forms(said)):
            raise ValueError(
                f"{places[number]}: the chat template changes the content of a turn of user; {OTHER_TEMPLATE}"
            )


def check_prompt(
    template: Template, messages: Sequence[Message], number: int, before: str, answer: str, place: str
) -> None:
    """Check that the text before a trained answer ends with the generation prompt, after which a model answers.

    before, answer: the text up to what is trained of the answer, and this. The generation prompt may hold the
    beginning of the answer, such as <think>. ValueError otherwise.
    """
    message, history = messages[number], template.text(messages[:number])
    prompt = template.text(messages[:number], add_generation_prompt=True)
    head = _squeezed(prompt.removeprefix(history)) if prompt.startswith(history) else ""
    start, end = _squeezed(before), _squeezed(answer)
    if head and not any(start.endswith(head[:k]) and end.startswith(head[k:]) for k in range(len(head), -1, -1)):
        raise ValueError(
            f"{place}: the chat template's generation prompt, {prompt.removeprefix(history)!r}, is not what it writes "
            f"before an answer, so that the trained model would be asked in another way; {OTHER_TEMPLATE}"
        )
    content = message.get("content") or ""
    if head or not content.strip() or message.get("tool_calls") or any(message.get(name) for name in REASONING):
        return
    mark = "qzx0xzq"  # where a content as short as "a" would be found in any header
    try:
        marked = template.text([*messages[:number], {**message, "content": mark}])
    except ValueError:  # a template that wants certain words
        return
    lead = marked.removeprefix(history).partition(mark)[0].strip() if marked.startswith(history) else ""
    if lead:
        raise ValueError(
            f"{place}: the chat template has no generation prompt (add_generation_prompt changes nothing), so that a "
            f"model would have to write {lead!r} itself before it answers; {OTHER_TEMPLATE}"
        )


def check_system(tokenizer: PreTrainedTokenizerBase, system: str) -> None:
    """Check that the chat template writes the system prompt of the settings. ValueError otherwise."""
    question: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    template = Template(tokenizer, date="2000-01-01")  # both texts of one day
    try:
        text = template.text([{"role": "system", "content": system}, *question])
    except ValueError as error:
        why = str(error).removeprefix(REFUSES)
        raise ValueError(f"data.system: the chat template refuses a system prompt: {why}; remove it") from error
    if text == template.text(question):
        raise ValueError(
            f"data.system: the chat template does not write a system prompt; remove it, or {OTHER_TEMPLATE}"
        )


def check_answer(template: Template, messages: Sequence[Message], number: int, text: str, place: str) -> None:
    """Check that everything that an answer says is in the text that is trained of it, blanks and line ends aside.

    The generation prompt may hold the beginning of the answer, such as <think>. ValueError names what is missing: the
    reasoning of an answer is what templates leave out most.
    """
    message, written = messages[number], _squeezed(text)
    for name in ("content", *REASONING):
        said = message.get(name)
        if isinstance(said, str) and _squeezed(said) not in written:
            before = template.text(messages[:number])
            prompt = template.text(messages[:number], add_generation_prompt=True).removeprefix(before)
            if _squeezed(said) in _squeezed(prompt + text):
                continue
            what = "part of the answer" if name == "content" else name
            advice = OTHER_TEMPLATE if name == "content" else _instead(name)
            raise ValueError(f"{place}: the chat template does not write {what}; {advice}")
    for call in message.get("tool_calls") or ():
        name = call["function"]["name"]
        if name not in text:
            raise ValueError(f"{place}: the call of {name} is not in the text that is trained; {OTHER_TEMPLATE}")


def _instead(name: str) -> str:
    return f"{OTHER_TEMPLATE}, or leave it aside with data.ignore: [{name}]"


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _changed(messages: Sequence[Message], number: int, change: Message) -> list[Message]:
    """Return the messages with some keys of one of them changed; None takes a key away."""
    changed = {name: value for name, value in {**messages[number], **change}.items() if value is not None}
    return [*messages[:number], changed, *messages[number + 1 :]]


# --- calls of tools ---------------------------------------------------------------------------------------------------


def with_calls(template: Template, messages: Sequence[Message], places: Sequence[str]) -> Sequence[Message]:
    """Return the messages with the calls of tools in the form that the template writes. ValueError if it writes none.

    Templates differ in two things: some take the arguments of a call as JSON and some as an object, and the content of
    a turn that only calls is an empty text, absent or None. The data's own form of the arguments goes first.
    """
    calling = [number for number, message in enumerate(messages) if message.get("tool_calls")]
    if not calling:
        return messages
    reasons: list[str] = []
    for arguments, content in product(("as given", "object", "text"), ("", ..., None)):
        form = [_in_form(message, arguments, content) for message in messages]
        try:
            text = template.text(form)
        except ValueError as error:
            reasons.append(str(error))
            continue
        without = _without_calls(template, form)
        if all(_is_call_written(call, text, without) for number in calling for call in form[number]["tool_calls"]):
            return form
        reasons.insert(0, "the chat template does not write calls of tools")
    raise ValueError(f"{places[calling[0]]}: {reasons[0]}; {OTHER_TEMPLATE}, or remove rows that call tools")


def _in_form(message: Message, arguments: str, content: Any) -> Message:
    """Return a message with its calls in one form. content: of a turn that only calls; ...: it has none."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        given = call["function"]["arguments"]
        if arguments == "object" and isinstance(given, str):
            given = json.loads(given)
        if arguments == "text" and not isinstance(given, str):
            given = json.dumps(given, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": given}})
    changed = {**message, "tool_calls": calls}
    if not message.get("content"):
        changed["content"] = content
        if content is ...:
            del changed["content"]
    return changed


def _without_calls(template: Template, messages: Sequence[Message]) -> str:
    """Return the text of the messages without their calls; empty if the template refuses them so."""
    bare = [{"content": "", **{k: v for k, v in m.items() if k != "tool_calls" and v is not None}} for m in messages]
    try:
        return template.text(bare)
    except ValueError:
        return ""


def _is_call_written(call: Message, text: str, without: str) -> bool:
    """Return whether a text has the name of a call and its arguments: as JSON, or as names with their values.

    without: the text without calls, where the name may stand, too.
    """
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if text.count(name) <= without.count(name):
        return False
    as_json = any(json.dumps(arguments, ensure_ascii=ascii_alone) in text for ascii_alone in (True, False))
    if isinstance(arguments, str):  # as it stands, and not as a text within JSON or within a dictionary of Python
        return arguments.strip() in text and not as_json and repr(arguments) not in text
    if arguments and repr(arguments) in text and not as_json:
        return False  # as Python writes a dictionary
    return all(any(form in text for form in _forms(leaf)) for leaf in _leaves(arguments))


def _leaves(value: Any) -> Iterator[str]:
    """Yield the names and texts in a JSON value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value


def _forms(text: str) -> tuple[str, ...]:
    """Return a text as it is and as JSON writes it."""
    return text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]
