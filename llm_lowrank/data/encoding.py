"""From turns to tokens. Trained are the answers and the end-of-turn token after each of them.

Where a tokenizer has a chat template, prompts are written with it. Otherwise a prompt style frames one question and its
answer, and the answer ends with the eos token. A pad token is never needed: padding is masked and its label is -100
(IGNORE), so eos may be used for padding, and an eos that ends an answer is trained all the same.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llm_lowrank.data.formats import TEXT, Turn

IGNORE = -100  # label of a token that is not trained
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
    """Return a checkpoint's tokenizer, with the chat template of a file if one is given."""
    return with_template(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), chat_template)


def with_template(tokenizer: PreTrainedTokenizerBase, path: str) -> PreTrainedTokenizerBase:
    """Set the tokenizer's chat template from a file, if `path` names one. ValueError if the file cannot be read."""
    if path:
        try:
            tokenizer.chat_template = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"data.chat_template: cannot read {path}: {error}") from error
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that pads an example. Masks and labels never depend on this token, so eos will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], style: str, train_on: str = "all"
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a row and, for each token, whether it is trained.

    style: chat or a key of FRAMES. train_on: all answers of a conversation or the last one. ValueError if there is no
    answer, or if the turns do not fit the style.
    """
    if turns[0].role == TEXT:
        return encode_text(tokenizer, turns[0].content)
    if style == CHAT:
        return encode_messages(
            tokenizer,
            [{**turn.extras, "role": turn.role, "content": _join_context(turn)} for turn in turns],
            train_on,
        )
    roles = [turn.role for turn in turns]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(
            f"a conversation of {', '.join(roles)} does not fit data.prompt_style: {style}, which is one question and "
            "one answer; use chat, with data.chat_template FILE.jinja if the tokenizer has no template"
        )
    system, user, answer = turns[0].content if len(turns) > 2 else "", turns[-2], turns[-1]
    return _encode_framed(tokenizer, FRAMES[style].prompt(user.content, user.context, system), answer.content)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[bool]]:
    """Return the tokens of a text followed by eos; all of them are trained. ValueError if the text is empty."""
    if not text.strip():
        raise ValueError("the text is empty")
    ids = _tokenize(tokenizer, text)
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids, [True] * len(ids)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, style: str = "auto", system: str = "") -> list[int]:
    """Return the tokens before the answer, exactly as they are in training examples."""
    style = style_of(tokenizer, style)
    if style == CHAT:
        messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
        return _render(tokenizer, messages, add_generation_prompt=True)
    return _tokenize(tokenizer, FRAMES[style].prompt(prompt, system=system))


def _encode_framed(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """Return the tokens of prompt + completion + eos and, for each of them, whether it is trained."""
    if not completion.strip():
        raise ValueError("the answer is empty")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has neither a chat template nor an eos token to end the completion with; set one of them"
        )
    prompt_ids, ids = _tokenize(tokenizer, prompt), _tokenize(tokenizer, prompt + completion)
    # A token that straddles the border between prompt and completion never comes up when a model answers: where there
    # would be one, the two texts are tokenized apart.
    if ids[: len(prompt_ids)] != prompt_ids:
        ids = prompt_ids + _tokenize_piece(tokenizer, completion)
    ids.append(tokenizer.eos_token_id)
    return ids, [position >= len(prompt_ids) for position in range(len(ids))]


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], train_on: str = "all"
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, written with the chat template, and for each token whether it is trained.

    Every assistant turn is trained, or with train_on: last the last one. Where the template marks its answers, the
    marks decide. Otherwise, with ids(n) the tokens of the first n messages, the answer in message n is what ids(n + 1)
    adds to ids(n) + generation prompt. ValueError if there is no template or no answer, or if the answers cannot be
    found in the tokens.
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
    # The template marks its answers with {% generation %}.
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, trained = list(rendered["input_ids"]), [bool(mark) for mark in rendered["assistant_masks"]]
        for position in range(1, len(ids)):
            trained[position] |= trained[position - 1] and ids[position] == eos  # the template may mark the text alone
        return ids, _keep_last_answer(trained) if train_on == "last" else trained

    # There are no marks: render the conversation up to each answer and through it, and compare the tokens.
    ids = _render(tokenizer, messages)
    borders: list[tuple[int, int]] = []  # of each answer: its first token and the token behind it
    for number in answers:
        before = _render(tokenizer, messages[:number], add_generation_prompt=True)
        through = _render(tokenizer, messages[: number + 1]) if messages[number + 1 :] else ids
        if ids[: len(before)] != before or ids[: len(through)] != through:
            # A token straddles a border, or the template renders short conversations otherwise.
            ids, borders = _cut_at_answers(tokenizer, messages, answers)
            break
        borders.append((len(before), len(through)))
    # An answer ends with its eos: what the template writes after it is never generated.
    trained = [False] * len(ids)
    for start, end in borders:
        while eos in ids[start:end] and ids[end - 1] != eos:
            end -= 1
        trained[start:end] = [True] * (end - start)
    return ids, trained


def _cut_at_answers(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answers: list[int]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenize the conversation in pieces that end where answers begin and end. Return the tokens and, for each answer,
    its first token and the token behind it.

    Without the cuts a token would straddle such a border (the template's line end joined to an answer's indentation),
    which never happens when a model answers. ValueError if the pieces are not the conversation.
    """

    def text(count: int, **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, **options))

    conversation, ids, borders = text(len(messages)), [], []
    done = 0  # characters of the conversation that are tokenized
    for number in answers:
        # The text up to the answer and the text through it have to be beginnings of the conversation, in this order.
        before, through = text(number, add_generation_prompt=True), text(number + 1)
        if (
            not conversation.startswith(before)
            or not conversation.startswith(through)
            or not done <= len(before) <= len(through)
        ):
            raise ValueError(
                f"message {number}: the chat template does not render a conversation as the beginning of a longer one, "
                "so the tokens of this answer cannot be told; mark the answers with {% generation %} in the template, "
                "or keep one answer a row"
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


def _tokenize_piece(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text alone, without the special tokens that a tokenizer puts around texts."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _join_context(turn: Turn) -> str:
    """Return a turn's content followed by its context."""
    return f"{turn.content}\n\n{turn.context}" if turn.context else turn.content


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of a text with the special tokens before it; some tokenizers close every text with eos, which
    is removed.
    """
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    """Return the tokens of messages, written with the chat template."""
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


def _keep_last_answer(trained: list[bool]) -> list[bool]:
    """Return the mask with its last unbroken stretch of True alone."""
    end = max(position for position, train in enumerate(trained) if train) + 1
    start = end
    while start and trained[start - 1]:
        start -= 1
    return [start <= position < end for position in range(len(trained))]
