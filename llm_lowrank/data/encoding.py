"""From turns to tokens, and which of them are trained: the answers and the end-of-turn token after them.

Where a tokenizer has a chat template, prompts are written with it. Otherwise a prompt style frames one question and its
answer, and the answer ends with the eos token. A pad token is never needed: what fills a batch up is masked and its
label is -100 (IGNORE), so that eos may stand for it without being trained or left untrained by it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm_lowrank.data.formats import TEXT, Turn

IGNORE = -100
CHAT = "chat"


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
    "to user "
    "instructions.\n\n@@ Instruction\n{question}%s\n\n@@ Response\n"
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
    """The prompt style that a wish comes to with this tokenizer."""
    if wanted == "auto":
        return CHAT if tokenizer.chat_template else without_template
    if wanted == CHAT and not tokenizer.chat_template:
        raise ValueError(
            "data.prompt_style: chat needs a chat template and the tokenizer has none; give one with "
            "data.chat_template FILE.jinja, "
            f"or choose from {', '.join(FRAMES)}"
        )
    return wanted


def tokenizer_of(folder: str | Path, chat_template: str = "") -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer, with the chat template of a file if one is given."""
    return with_template(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), chat_template)


def with_template(tokenizer: PreTrainedTokenizerBase, path: str) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template of a file, or as it is."""
    if path:
        try:
            tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.chat_template: cannot read {path}: {error}") from error
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills the space beside an example. Masks and labels never depend on it, so eos will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)


def encode(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str, train_on: str = "all"
) -> tuple[list[int], list[bool]]:
    """(tokens, whether each is trained)."""
    if turns[0].role == TEXT:
        return encode_text(tokenizer, turns[0].content)
    if style == CHAT:
        return encode_messages(
            tokenizer, [{**turn.beside, "role": turn.role, "content": _whole(turn)} for turn in turns], train_on
        )
    roles = [turn.role for turn in turns]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f"a conversation of {', '.join(roles)} does not fit data.prompt_style: {style}, which is one question and "
            "one answer; "
            "use chat, with data.chat_template FILE.jinja if the tokenizer has no template"
        )
    system, user, answer = turns[0].content if len(turns) > 2 else "", turns[-2], turns[-1]
    return _frame(tokenizer, FRAMES[style].prompt(user.content, user.context, system), answer.content)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[bool]]:
    """A text and eos, all trained."""
    if not text.strip():
        raise ValueError("the text is empty")
    ids = _plain(tokenizer, text)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids, [True] * len(ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, style: str = "auto", system: str = "") -> list[int]:
    """The tokens before the answer, exactly as in the training examples."""
    style = style_of(tokenizer, style)
    if style == CHAT:
        messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
        return _render(tokenizer, messages, add_generation_prompt=True)
    return _plain(tokenizer, FRAMES[style].prompt(prompt, system=system))


def _frame(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """prompt + completion + eos."""
    if not completion.strip():
        raise ValueError("the answer is empty")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has neither a chat template nor an eos token to end the completion with; set one of them"
        )
    start, whole = _plain(tokenizer, prompt), _plain(tokenizer, prompt + completion)
    if whole[: len(start)] != start:  # a token would straddle the border, which never happens when answering: cut there
        whole = start + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    whole.append(tokenizer.eos_token_id)
    return whole, [position >= len(start) for position in range(len(whole))]


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], train_on: str = "all"
) -> tuple[list[int], list[bool]]:
    """Every assistant turn is trained, or the last one.

    A template that marks its answers is believed; otherwise, with ids(n) the
    tokens of the first n messages, the answer that is message n is what ids(n + 1) adds to ids(n) + generation prompt.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "messages need a chat template and the tokenizer has none; give one with data.chat_template FILE.jinja"
        )
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last":
        answers = answers[-1:]
    if not any(messages[number]["content"].strip() for number in answers):
        raise ValueError("the answer is empty")
    eos = tokenizer.eos_token_id
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, trained = list(rendered["input_ids"]), [bool(mark) for mark in rendered["assistant_masks"]]
        for position in range(1, len(ids)):
            trained[position] |= trained[position - 1] and ids[position] == eos  # the template may mark the text alone
        return ids, _last_run(trained) if train_on == "last" else trained

    whole = _render(tokenizer, messages)
    borders: list[tuple[int, int]] = []  # first token of an answer, and the one behind it
    for number in answers:
        before = _render(tokenizer, messages[:number], add_generation_prompt=True)
        through = _render(tokenizer, messages[: number + 1]) if messages[number + 1 :] else whole
        if whole[: len(before)] != before or whole[: len(through)] != through:
            whole, borders = _cut_at_answers(tokenizer, messages, answers)
            break
        borders.append((len(before), len(through)))
    trained = [False] * len(whole)
    for start, end in borders:
        # what the template writes after the end of turn is never generated
        while eos in whole[start:end] and whole[end - 1] != eos:
            end -= 1
        trained[start:end] = [True] * (end - start)
    return whole, trained


def _cut_at_answers(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answers: list[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """The conversation in pieces that end where answers begin and end, for a token would straddle such a border (the
    line end of the template with the indentation of an answer), which never happens when answering.
    """

    def text(count: int, **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, **options))

    conversation, ids, borders, done = text(len(messages)), [], [], 0
    for number in answers:
        before, through = text(number, add_generation_prompt=True), text(number + 1)
        if (
            not conversation.startswith(before)
            or not conversation.startswith(through)
            or not done <= len(before) <= len(through)
        ):
            raise ValueError(
                f"message {number}: the chat template does not render a conversation as the beginning of a longer one, "
                "so the tokens of "
                "this answer cannot be told; mark the answers with {% generation %} in the template, or keep one "
                "answer a row"
            )
        ids += _piece(tokenizer, conversation[done : len(before)])
        start = len(ids)
        ids += _piece(tokenizer, conversation[len(before) : len(through)])
        borders.append((start, len(ids)))
        done = len(through)
    ids += _piece(tokenizer, conversation[done:])
    if tokenizer.decode(ids) != tokenizer.decode(_piece(tokenizer, conversation)):
        raise ValueError(
            "the tokenizer changes a text that is cut where its answers begin; mark the answers with {% generation %} "
            "instead"
        )
    return ids, borders


def _piece(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _whole(turn: Turn) -> str:
    return f"{turn.content}\n\n{turn.context}" if turn.context else turn.content


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text with eos


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


def _last_run(trained: list[bool]) -> list[bool]:
    """The last unbroken run of a mask alone."""
    end = max(position for position, train in enumerate(trained) if train) + 1
    start = end
    while start and trained[start - 1]:
        start -= 1
    return [start <= position < end for position in range(len(trained))]
