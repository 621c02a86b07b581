"""From turns to tokens. Trained are the answers and the end-of-turn token after each of them; an answer that calls a
tool is the call as the chat template writes it.

Where a tokenizer has a chat template, prompts are written with it. Otherwise a prompt style frames one question and its
answer, and the answer ends with the eos token. A pad token is never needed: padding is masked and its label is -100
(IGNORE), so eos may be used for padding, and an eos that ends an answer is trained all the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm_lowrank.data.columns import TEMPLATE_KEYS
from llm_lowrank.data.formats import EMPTY, NO_ANSWER, TEXT, Turn
from llm_lowrank.data.stops import end_of
from llm_lowrank.data.templates import (
    Message,
    Template,
    check_answer,
    check_prompt,
    check_system,
    check_written,
    with_calls,
)

IGNORE = -100  # label of a token that is not trained
CHAT = "chat"
NOTHING_TRAINED = "no answer of the row is trained: every one that could be is marked as not to be; remove the row"


@dataclass(frozen=True)
class Frame:
    """A prompt without a chat template: {question}, and {context} where the row has an input."""

    alone: str
    with_context: str

    def prompt(self, question: str, context: str = "", system: str = "") -> str:
        text = (self.with_context if context else self.alone).format(question=question, context=context)
        return f"{system}\n\n{text}" if system else text


_TASK = "Below is an instruction that describes a task"
_RESPOND = "Write a response that appropriately completes the request.\n\n### Instruction:\n{question}\n\n"
_CODER = (
    "You are an exceptionally intelligent coding assistant that consistently delivers accurate and reliable responses "
    "to user instructions.\n\n@@ Instruction\n{question}%s\n\n@@ Response\n"
)
FRAMES = {
    "plain": Frame("{question}", "{question}\n\n{context}"),
    # https://github.com/tatsu-lab/stanford_alpaca; the answer on a line of its own, as in LLM-Adapters (arXiv
    # 2304.01933)
    "alpaca": Frame(
        f"{_TASK}. {_RESPOND}### Response:\n",
        f"{_TASK}, paired with an input that provides further context. {_RESPOND}### Input:\n{{context}}\n\n### "
        "Response:\n",
    ),
    # MetaMath, arXiv 2309.12284
    "metamath": Frame(
        f"{_TASK}. {_RESPOND}### Response: Let's think step by step.",
        f"{_TASK}. {_RESPOND}### Input:\n{{context}}\n\n### Response: Let's think step by step.",
    ),
    # Magicoder, arXiv 2312.02120
    "magicoder": Frame(_CODER % "", _CODER % "\n\n{context}"),
}


def style_of(tokenizer: PreTrainedTokenizerBase, wanted: str = "auto", without_template: str = "plain") -> str:
    """Return the prompt style to use with this tokenizer; auto becomes chat, or `without_template` if the tokenizer has
    no chat template. ValueError if chat is wanted and there is no template.
    """
    if wanted == "auto":
        return CHAT if tokenizer.chat_template else without_template
    if wanted == CHAT and not tokenizer.chat_template:
        raise ValueError(
            "data.prompt_style: chat needs a chat template and the tokenizer has none; give one with "
            f"data.chat_template FILE.jinja, or choose from {', '.join(FRAMES)}"
        )
    return wanted


def tokenizer_of(folder: str | Path, chat_template: str = "") -> PreTrainedTokenizerBase:
    """Return a checkpoint's tokenizer, with the chat template of a file if one is given. ValueError if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the libraries of tokenizers raise what they like
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder} has no tokenizer that can be read; it needs tokenizer.json and tokenizer_config.json, as "
            f"save_pretrained of its tokenizer writes them ({type(error).__name__}: {reason[:300]})"
        ) from error
    return with_template(tokenizer, chat_template)


def with_template(tokenizer: PreTrainedTokenizerBase, path: str) -> PreTrainedTokenizerBase:
    """Set the tokenizer's chat template from a file, if `path` names one. ValueError if the file cannot be read."""
    if path:
        try:
            template = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.chat_template: cannot read {path}: {error}") from error
        if not template.strip():
            raise ValueError(f"data.chat_template: {path} is empty")
        tokenizer.chat_template = template
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> int:
    """Return the token that pads an example. Masks and labels never depend on this token, so eos will do.

    vocabulary: rows of the model's embedding, which has to have one for the token.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None and candidate < vocabulary)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    style: str,
    train_on: str = "all",
    *,
    tools: Sequence[Message] = (),
    options: Message | None = None,
    date: str = "",
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a row and, for each token, whether it is trained.

    style: chat or a key of FRAMES. train_on: all answers of a conversation or the last one. tools, options, date: as in
    Template. ValueError if there is no answer, if the turns do not fit the style, or if something in the row would be
    left out.
    """
    if turns[0].tokens:
        return turns[0].tokens.within(len(tokenizer))
    if turns[0].role == TEXT:
        return encode_text(tokenizer, turns[0].content)
    if style == CHAT:
        return encode_messages(
            tokenizer,
            [{**turn.extras, "role": turn.role, "content": _join_context(turn)} for turn in turns],
            train_on,
            trained=[turn.trained for turn in turns],
            places=[turn.place for turn in turns],
            template=Template(tokenizer, tools, options or {}, date),
        )
    roles = [turn.role for turn in turns]
    beside = {*(name for turn in turns for name in turn.extras if name in ("tool_calls", *TEMPLATE_KEYS))}
    beside |= {name for name, given in (("tools", tools), ("chat_template_kwargs", options)) if given}
    if beside or "tool" in roles:
        raise ValueError(
            f"{', '.join(sorted(beside)) or 'a turn of tool'}: a chat template writes this, and data.prompt_style: "
            f"{style} does not; use chat, with data.chat_template FILE.jinja if the tokenizer has no template"
        )
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f"a conversation of {', '.join(roles)} does not fit data.prompt_style: {style}, which is one question and "
            "one answer; use chat, with data.chat_template FILE.jinja if the tokenizer has no template"
        )
    system, user, answer = turns[0].content if len(turns) > 2 else "", turns[-2], turns[-1]
    if not answer.trained:
        raise ValueError(NOTHING_TRAINED)
    return _encode_framed(tokenizer, FRAMES[style].prompt(user.content, user.context, system), answer.content)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[bool]]:
    """Return the tokens of a text that ends with eos; all of them are trained. ValueError if the text is empty.

    A text that begins with bos or ends with eos gets no second one. What stands behind its eos is not trained.
    """
    core = _without_ends(tokenizer, text)
    if not core.strip():
        raise ValueError("the text is empty")
    ids = _tokenize(tokenizer, text)
    if core != text and _ends_with_eos(tokenizer, text):
        return ids, _through_eos(tokenizer, ids)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids, [True] * len(ids)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, style: str = "auto", system: str = "", date: str = ""
) -> list[int]:
    """Return the tokens before the answer, exactly as they are in training examples. date: as in Template."""
    style = style_of(tokenizer, style)
    if style == CHAT:
        if system:
            check_system(tokenizer, system)
        messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
        text = Template(tokenizer, date=date).text(messages, add_generation_prompt=True)
        return _tokenize_piece(tokenizer, text)
    return _tokenize(tokenizer, FRAMES[style].prompt(prompt, system=system))


def _encode_framed(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """Return the tokens of prompt + completion + eos and, for each of them, whether it is trained.

    An answer that ends with eos gets no second one.
    """
    if not _without_ends(tokenizer, completion).strip():
        raise ValueError(EMPTY)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has neither a chat template nor an eos token to end the completion with; set one of them"
        )
    _without_ends(tokenizer, prompt)  # refuses two bos
    prompt_ids, ids = _tokenize(tokenizer, prompt), _tokenize(tokenizer, prompt + completion)
    # A token that straddles the border between prompt and completion never comes up when a model answers: where there
    # would be one, the two texts are tokenized apart.
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + _tokenize_piece(tokenizer, completion)
    if _ends_with_eos(tokenizer, completion):
        trained = _through_eos(tokenizer, ids)
    else:
        ids.append(tokenizer.eos_token_id)
        trained = [True] * len(ids)
    return ids, [train and position >= len(prompt_ids) for position, train in enumerate(trained)]


def encode_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    train_on: str = "all",
    *,
    trained: Sequence[bool] = (),
    places: Sequence[str] = (),
    template: Template | None = None,
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, written with the chat template, and for each token whether it is trained.

    Every assistant turn is trained, or with train_on: last the last one, but none whose entry in `trained` is False.
    Where the template marks its answers, the marks decide. Otherwise, with ids(n) the tokens of the first n messages,
    the answer in message n is what ids(n + 1) adds to ids(n) + generation prompt.

    trained: one for each message. places: where each message stands in its row, for error messages. template: with the
    tools and the date. ValueError if there is no template or no answer, if the answers cannot be found in the tokens,
    or if the template leaves out something that the conversation says.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "messages need a chat template and the tokenizer has none; give one with data.chat_template FILE.jinja"
        )
    places = places or [f"message {number}" for number in range(len(messages))]
    template = template or Template(tokenizer)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError(NO_ANSWER)
    for number in answers:
        empty = not _without_ends(tokenizer, messages[number].get("content") or "").strip()
        if empty and not messages[number].get("tool_calls"):
            raise ValueError(f"{places[number]}: the answer is empty" if places[number] != "the answer" else EMPTY)
    wanted = [n for n in (answers[-1:] if train_on == "last" else answers) if not trained or trained[n]]
    if not wanted:
        raise ValueError(NOTHING_TRAINED)
    messages = _with_one_end(template, list(with_calls(template, messages, places)), places)
    if template.marks_answers:
        ids, mask = _by_marks(template, messages, answers, wanted=wanted, places=places)
    else:
        ids, mask = _by_prefixes(template, messages, wanted=wanted, places=places)
    check_written(template, messages, places)
    return ids, mask


def _by_marks(
    template: Template, messages: list[Message], answers: list[int], *, wanted: list[int], places: Sequence[str]
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation and which of them the template marks as one of the wanted answers."""
    tokenizer = template.tokenizer
    text, spans = template.spans(messages)
    # The marks of each answer. A template may mark an answer in several pieces, or some answers only: then the marks of
    # an answer are those that the conversation through it has, and the conversation up to it has not.
    ends = list(range(1, len(answers) + 1))
    if len(spans) != len(answers):
        ends = [_marks_in_common(template, messages[: number + 1], text, spans) for number in answers[:-1]]
        ends = [*np.maximum.accumulate(ends, dtype=int).tolist(), len(spans)]
    of_answer = {number: spans[start:end] for number, start, end in zip(answers, [0, *ends], ends, strict=False)}
    rows = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(rows["input_ids"]), rows["offset_mapping"]
    trained = [False] * len(ids)
    for number in wanted:
        marked = [text[start:end] for start, end in of_answer[number]]
        if not "".join(marked).strip():
            last = " set data.train_on: last, or" if number != answers[-1] else ""
            raise ValueError(
                f"{places[number]}: the chat template does not mark this answer with {{% generation %}};{last} correct "
                "the template"
            )
        check_answer(template, messages, number, "".join(marked), places[number])
        if number == wanted[0]:
            before = text[: of_answer[number][0][0]]
            check_prompt(template, messages, number, before, "".join(marked), places[number])
        for start, end in of_answer[number]:
            # A token without characters is a blank whose offsets the tokenizer trimmed: it lies at its end.
            inside = [k for k, (a, b) in enumerate(offsets) if (a < end and b > start) or (a == b and start < a <= end)]
            if inside:
                stretch = slice(inside[0], inside[-1] + 1)
                trained[stretch] = [True] * len(ids[stretch])
    eos = tokenizer.eos_token_id
    for position in range(1, len(ids)):
        # the template may mark the text alone
        trained[position] |= trained[position - 1] and ids[position] == eos
    return ids, trained


def _marks_in_common(template: Template, messages: list[Message], whole: str, spans: Sequence[tuple[int, int]]) -> int:
    """Return how many of the first marks of a conversation are also the first ones of its beginning, `messages`."""
    text, marked = template.spans(messages)
    pairs = zip(marked, spans, strict=False)
    return next(
        (k for k, ((a, b), (c, d)) in enumerate(pairs) if text[a:b] != whole[c:d]), min(len(marked), len(spans))
    )


def _by_prefixes(
    template: Template, messages: list[Message], *, wanted: list[int], places: Sequence[str]
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation and which of them belong to the wanted answers: render the conversation up to
    each answer and through it, and compare the tokens.
    """
    tokenizer = template.tokenizer
    whole = template.text(messages)
    if wanted[0] == 0:
        raise ValueError(f"{places[0]}: the conversation begins with an answer; remove it, or mark it with train: 0")
    history = template.text(messages[: wanted[0]])
    if whole.startswith(history):
        check_prompt(template, messages, wanted[0], history, whole[len(history) :], places[wanted[0]])
    texts = {
        number: (
            template.text(messages[:number], add_generation_prompt=True),
            template.text(messages[: number + 1]) if messages[number + 1 :] else whole,
        )
        for number in wanted
    }
    ids = _tokenize_piece(tokenizer, whole)
    borders: list[tuple[int, int]] = []  # of each answer: its first token and the token behind it
    for before_text, through_text in texts.values():
        before = _tokenize_piece(tokenizer, before_text)
        through = _tokenize_piece(tokenizer, through_text) if through_text != whole else ids
        if ids[: len(before)] != before or ids[: len(through)] != through:
            # A token straddles a border, or the template renders short conversations otherwise.
            ids, borders = _cut_at_answers(tokenizer, whole, texts, places=places, last=len(messages) - 1)
            break
        borders.append((len(before), len(through)))
    # An answer ends with its eos: what the template writes after it is never generated. An eos in the middle of an
    # answer is a part of it.
    trained, eos_id = [False] * len(ids), tokenizer.eos_token_id
    for (number, (before_text, through_text)), (start, end) in zip(texts.items(), borders, strict=True):
        check_answer(template, messages, number, through_text[len(before_text) :], places[number])
        eos = next((k for k in reversed(range(start, end)) if ids[k] == eos_id), end - 1)
        if not tokenizer.decode(ids[eos + 1 : end]).strip():
            end = eos + 1
        trained[start:end] = [True] * (end - start)
    return ids, trained


def _cut_at_answers(
    tokenizer: PreTrainedTokenizerBase,
    conversation: str,
    texts: dict[int, tuple[str, str]],
    *,
    places: Sequence[str],
    last: int,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize the conversation in pieces that end where answers begin and end. Return the tokens and, for each answer,
    its first token and the token behind it.

    texts: of each answer, the conversation up to it and through it. last: the number of the last message. Without the
    cuts a token would straddle such a border (the template's line end joined to an answer's indentation), which never
    happens when a model answers. ValueError if the pieces are not the conversation.
    """
    ids: list[int] = []
    borders: list[tuple[int, int]] = []
    done = 0  # characters of the conversation that are tokenized
    for number, (before, through) in texts.items():
        # The text up to the answer and the text through it have to be beginnings of the conversation, in this order.
        if (
            not conversation.startswith(before)
            or not conversation.startswith(through)
            or not done <= len(before) <= len(through)
        ):
            remedy = "set data.train_on: last, " if number != max(texts) else ""
            raise ValueError(
                f"{places[number]}: the chat template does not render a conversation as the beginning of a longer one, "
                f"so the tokens of this answer cannot be told; {remedy}mark the answers with {{% generation %}} in the "
                "template, or keep one answer a row"
            )
        # One piece up to the answer, one piece for the answer.
        ids += _tokenize_piece(tokenizer, conversation[done : len(before)])
        start = len(ids)
        ids += _tokenize_piece(tokenizer, conversation[len(before) : len(through)])
        borders.append((start, len(ids)))
        done = len(through)
    ids += _tokenize_piece(tokenizer, conversation[done:])
    # Some tokenizers add a space or normalize at every beginning of a text: then the pieces are another text.
    if tokenizer.decode(ids) != tokenizer.decode(_tokenize_piece(tokenizer, conversation)):
        raise ValueError(
            "the tokenizer changes a text that is cut where its answers begin; mark the answers with {% generation %} "
            "instead"
        )
    return ids, borders


# --- special tokens that stand in the data already --------------------------------------------------------------------


def _with_one_end(template: Template, messages: list[Message], places: Sequence[str]) -> list[Message]:
    """Return the messages without the end of turn that an answer ends with, where the template writes it, too.

    ValueError if a message begins with bos and the template writes bos, too, or if nothing but its end is in an answer.
    """
    bos, eos = template.tokenizer.bos_token, template.tokenizer.eos_token
    if bos and bos != eos:
        first = next((n for n, m in enumerate(messages) if (m.get("content") or "").lstrip().startswith(bos)), None)
        if first is not None:
            content = messages[first]["content"].lstrip().removeprefix(bos)
            others = [*messages[:first], {**messages[first], "content": content}, *messages[first + 1 :]]
            if bos in template.text(others):
                raise ValueError(
                    f"{places[first]}: the content begins with {bos}, which the chat template writes, too; remove it "
                    "from the data"
                )
    answers = {n: m.get("content") or "" for n, m in enumerate(messages) if m["role"] == "assistant"}
    ending = {n: end for n, said in answers.items() if (end := end_of(template.tokenizer, said))}
    if ending:
        text = template.text(messages)
        for number, end in ending.items():
            content = answers[number].rstrip()
            if re.search(rf"{re.escape(content)}\s*{re.escape(end)}", text):
                content = content.removesuffix(end)
                if content.rstrip().endswith(end):
                    raise ValueError(f"{places[number]}: the text ends with {end} twice; remove one of them")
                if not content.strip():
                    raise ValueError(f"{places[number]}: the answer is empty")
                messages[number] = {**messages[number], "content": content}
    return messages


def _ends_with_eos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    return bool(tokenizer.eos_token) and text.rstrip().endswith(tokenizer.eos_token)


def _without_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a text without a bos that it begins with and an eos that it ends with. ValueError if it has two of one."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if bos and text.lstrip().startswith(bos):
        text = text.lstrip().removeprefix(bos)
        if bos != eos and text.lstrip().startswith(bos):
            raise ValueError(f"the text begins with {bos} twice; remove one of them")
    if eos and text.rstrip().endswith(eos):
        text = text.rstrip().removesuffix(eos)
        if text.rstrip().endswith(eos):
            raise ValueError(f"the text ends with {eos} twice; remove one of them")
    return text


def _through_eos(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bool]:
    """Return True for the tokens up to the last eos and False for those behind it."""
    eos = tokenizer.eos_token_id
    end = max(k for k, token in enumerate(ids) if token == eos)
    return [k <= end for k in range(len(ids))]


def _tokenize_piece(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text alone, without the special tokens that a tokenizer puts around texts."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _join_context(turn: Turn) -> str:
    """Return a turn's content followed by its context."""
    return f"{turn.content}\n\n{turn.context}" if turn.context else turn.content


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text with the special tokens that the tokenizer puts before texts, each once: a text may
    begin with them already. Some tokenizers close every text with eos, which is left away.
    """
    ids = _tokenize_piece(tokenizer, text)
    probe, whole = _tokenize_piece(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    places = (k for k in range(len(whole) - len(probe), -1, -1) if whole[k : k + len(probe)] == probe)
    prefix = whole[: next(places, 0)]
    has_bos = bool(tokenizer.bos_token) and text.lstrip().startswith(tokenizer.bos_token)
    return ids if has_bos or ids[: len(prefix)] == prefix else prefix + ids
