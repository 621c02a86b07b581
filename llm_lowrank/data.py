"""From rows of text to batches of tokens. One law: the global batch of a step does not depend on the hardware.

    row --encode--> Example --load--> Corpus(train, held_out, questions) --Batches--> MicroBatch

Only answers are trained: their tokens and the end-of-turn token after them. Every other label is -100 (IGNORE).
Nothing here communicates: each rank reads the same files and computes its own share of every batch.
"""

import difflib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache, partial
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORE = -100
FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
REASONING_GYM = "reasoning-gym:"


@dataclass(frozen=True)
class Data:
    dataset: str = "reasoning-gym:chain_sum"
    """A .jsonl, .json or .parquet file, a folder of them, a hub name, or reasoning-gym:<task>."""
    split: str = "train"
    """Split of a hub name, a folder or a file."""
    format: Literal["auto", "prompt_completion", "messages"] = "auto"
    """Columns prompt and completion (text), or messages (list of role and content)."""
    max_length: int = 1024
    """Longer examples are cut to this many tokens."""
    held_out: int = 64
    """Examples kept out of training for evaluation, chosen by the seed."""
    size: int = 1000
    """Number of examples that reasoning-gym generates, held-out ones included."""
    task: dict[str, Any] = field(default_factory=dict)
    """Settings of the reasoning-gym task."""

    def __post_init__(self) -> None:
        for name, least in {"max_length": 2, "held_out": 0, "size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name}={getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True)
class Example:
    input_ids: list[int]
    labels: list[int]  # as long as input_ids, not shifted

    @property
    def trained(self) -> int:
        """Trained tokens. Token 0 has nothing before it that could predict it, so it never counts."""
        return sum(label != IGNORE for label in self.labels[1:])


class Encoded(Sequence[Example]):
    """Examples that stay in the dataset's (memory-mapped) table until they are asked for."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        row = self.rows[index]
        return Example(row["input_ids"], row["labels"])

    @cached_property
    def trained(self) -> np.ndarray:
        return self.rows.with_format("numpy")["trained"][:]


@dataclass(frozen=True)
class Question:
    prompt_ids: list[int]
    text: str
    score: Callable[[str], float]  # 1 for a right answer
    answer: str


@dataclass(frozen=True)
class Corpus:
    train: Encoded
    held_out: Encoded
    questions: list[Question]  # the held-out examples as questions (reasoning-gym only)
    dropped: dict[str, int]  # reason -> examples left out
    truncated: int  # examples cut to max_length that still train something


def load(settings: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Corpus:
    """Read, encode and split a dataset. The same on every rank; datasets.disable_progress_bars() silences it."""
    generated, plain = settings.dataset.startswith(REASONING_GYM), Data()
    for name in ("split", "format") if generated else ("size", "task"):
        if getattr(settings, name) != getattr(plain, name):
            kind = "files and hub names" if generated else f"{REASONING_GYM}<task>"
            raise ValueError(f"data.{name} is for {kind} only and {settings.dataset} would ignore it; remove it")
    if settings.dataset.startswith(REASONING_GYM):
        entries, score = _generate(settings, seed)
        rows = datasets.Dataset.from_dict({"prompt": [e["question"] for e in entries], "completion": [e["answer"] for e in entries]})
        format, keys = "prompt_completion", rows["prompt"][:]
    else:
        rows = _read(settings)
        format, keys = _format(settings, rows.column_names), range(len(rows))
    if not len(rows):
        raise ValueError(f"{settings.dataset} is empty: it has no row to train on")

    options = {"tokenizer": tokenizer, "format": format, "max_length": settings.max_length, "source": settings.dataset}
    encoded = rows.map(_encode_row, with_indices=True, fn_kwargs=options, remove_columns=rows.column_names, desc="tokenize")
    flags = encoded.with_format("numpy")
    usable, cut = flags["trained"][:] > 0, flags["truncated"][:]
    train, held_out, repeated = _split(keys, usable, settings.held_out, seed)
    if len(held_out) < settings.held_out or not train:
        raise ValueError(
            f"{settings.dataset}: data.held_out={settings.held_out} leaves nothing to train on, for {len(set(keys))} distinct examples "
            f"are there and {int((~usable).sum())} lost their completion to data.max_length={settings.max_length}; "
            "lower data.held_out, raise data.max_length or get more data"
        )
    questions = []
    if settings.dataset.startswith(REASONING_GYM):
        for index in held_out:
            text, answer = entries[index]["question"], entries[index]["answer"]
            questions.append(Question(encode_prompt(tokenizer, text), text, partial(score, entry=entries[index]), answer))
    dropped = {"no completion token left within max_length": int((~usable).sum()), "question is also held out": repeated}
    return Corpus(
        train=Encoded(encoded.select(train)),
        held_out=Encoded(encoded.select(held_out)),
        questions=questions,
        dropped={reason: count for reason, count in dropped.items() if count},
        truncated=int((usable & cut).sum()),
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills the space beside an example. Masks and labels never depend on it, so eos will do."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(candidate for candidate in candidates if candidate is not None)


# Encoding: text to (input_ids, trained), where trained says for each token whether it is part of an answer.


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens before the answer, exactly as in the training examples."""
    if tokenizer.chat_template:
        return _render(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text with eos


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """A user turn and an assistant turn; without a chat template prompt + completion + eos."""
    if tokenizer.chat_template:
        return encode_messages(tokenizer, [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}])
    if not completion.strip():
        raise ValueError("the completion is empty; give it text or remove the row")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has neither a chat template nor an eos token to end the completion with; set one of them")
    start = encode_prompt(tokenizer, prompt)
    whole = encode_prompt(tokenizer, prompt + completion)
    if whole[: len(start)] != start:  # a token would straddle the border, which never happens when answering: cut there
        whole = start + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    whole.append(tokenizer.eos_token_id)
    return whole, [position >= len(start) for position in range(len(whole))]


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Every assistant turn is trained. A template that marks its answers is believed; otherwise, with ids(n) the tokens of
    the first n messages, the answer that is message n is what ids(n + 1) adds to ids(n) + generation prompt.
    """
    if not tokenizer.chat_template:
        raise ValueError("messages need a chat template and the tokenizer has none; use columns prompt and completion, or set the template")
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        raise ValueError("no assistant message has any text; give it an answer or remove the row")
    eos = tokenizer.eos_token_id
    if re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()):
        rendered = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, trained = list(rendered["input_ids"]), [bool(mark) for mark in rendered["assistant_masks"]]
        for position in range(1, len(ids)):
            trained[position] |= trained[position - 1] and ids[position] == eos  # the template may mark the text alone
        return ids, trained

    ids = _render(tokenizer, messages)
    trained = [False] * len(ids)
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:number], add_generation_prompt=True)
        through = _render(tokenizer, messages[: number + 1]) if messages[number + 1 :] else ids
        if ids[: len(before)] != before or ids[: len(through)] != through:
            raise ValueError(
                f"message {number}: the chat template does not render a conversation as the beginning of a longer one, so the tokens of "
                "this answer cannot be told; mark the answers with {% generation %} in the template, or keep one answer a row"
            )
        start, end = len(before), len(through)
        while eos in ids[start:end] and ids[end - 1] != eos:  # what the template writes after the end of turn is never generated
            end -= 1
        trained[start:end] = [True] * (end - start)
    return ids, trained


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


def _encode_row(
    row: dict[str, Any], number: int, tokenizer: PreTrainedTokenizerBase, format: str, max_length: int, source: str
) -> dict[str, Any]:
    try:
        if format == "messages":
            _check(row["messages"])
            ids, trained = encode_messages(tokenizer, row["messages"])
        else:
            for name in ("prompt", "completion"):
                if not isinstance(row[name], str):
                    raise ValueError(f"{name} is {type(row[name]).__name__}, not text; use the messages format for conversations")
            ids, trained = encode_pair(tokenizer, row["prompt"], row["completion"])
        if not any(trained[1:]):
            raise ValueError("the example has no completion token to train on; check the chat template or remove the row")
    except (ValueError, TemplateError) as error:
        raise ValueError(f"{source}, row {number} (the first is 0): {error}") from error
    ids, trained, truncated = ids[:max_length], trained[:max_length], len(ids) > max_length
    labels = [token if train else IGNORE for token, train in zip(ids, trained, strict=True)]
    return {"input_ids": ids, "labels": labels, "trained": sum(trained[1:]), "truncated": truncated}


def _check(messages: Any) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages is not a list of {role, content}")
    for number, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ValueError(f"message {number}: {name} is {type(message.get(name)).__name__}, not text")


# Sources.


def _read(settings: Data) -> datasets.Dataset:
    name, path = settings.dataset, Path(settings.dataset).expanduser()
    if path.is_file() and path.suffix in FILE_KINDS:
        arguments: dict[str, Any] = {"path": FILE_KINDS[path.suffix], "data_files": str(path)}
    elif path.is_dir():
        kinds = {FILE_KINDS[file.suffix] for file in path.rglob("*") if file.suffix in FILE_KINDS}
        if len(kinds) != 1:
            found = "both JSON and Parquet files" if kinds else "no .jsonl, .json or .parquet file"
            raise ValueError(f"data.dataset: the folder {name} holds {found}; give a folder with files of one kind")
        arguments = {"path": str(path)}
    elif path.is_file():
        raise ValueError(f"data.dataset: {name} is not a {', '.join(FILE_KINDS)} file; convert it to one of them")
    elif path.suffix in FILE_KINDS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"data.dataset: no such file or folder: {name}")
    else:
        arguments = {"path": name}
    try:
        return datasets.load_dataset(**arguments, split=settings.split)
    except StopIteration as error:  # what datasets makes of a JSON file without rows
        raise ValueError(f"{name} is empty: it has no row to train on") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"data.dataset: cannot read {name}, split {settings.split!r}: {error.__cause__ or error}") from error


def _format(settings: Data, columns: list[str]) -> str:
    wanted = {"messages": {"messages"}, "prompt_completion": {"prompt", "completion"}}
    if settings.format != "auto":
        wanted = {settings.format: wanted[settings.format]}
    fitting = [format for format, names in wanted.items() if names <= set(columns)]
    if not fitting:
        choices = " or ".join(" and ".join(sorted(names, reverse=True)) for names in wanted.values())
        raise ValueError(f"{settings.dataset} has the columns {', '.join(columns) or 'none'}; wanted: {choices}. Rename its columns")
    if len(fitting) > 1:
        raise ValueError(f"{settings.dataset} has the columns of both formats; set data.format to prompt_completion or messages")
    return fitting[0]


def _generate(settings: Data, seed: int) -> tuple[list[dict[str, Any]], Callable[..., float]]:
    """Entries of a reasoning-gym task (question, answer, metadata) and its score of an answer to an entry."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"{settings.dataset} needs the reasoning-gym package: pip install 'llm-lowrank[demo]'") from error
    if settings.held_out >= settings.size:
        raise ValueError(f"data.held_out={settings.held_out} must be smaller than data.size={settings.size}, for both come from it")
    name = settings.dataset.removeprefix(REASONING_GYM)
    if name not in DATASETS:
        raise ValueError(f"data.dataset: reasoning-gym has no task {name!r}{_hint(name, DATASETS)}")
    known = {setting.name for setting in fields(DATASETS[name][1])} - {"seed", "size"}
    for key in settings.task.keys() - known:
        raise ValueError(f"data.task: {name} has no setting {key!r}{_hint(key, known)}; it has {', '.join(sorted(known)) or 'none'}")
    # Entry i is drawn with seed + i: without spreading the seeds, neighbouring ones would give nearly the same entries.
    spread = random.Random(f"{REASONING_GYM}{seed}").getrandbits(31)
    try:
        task = reasoning_gym.create_dataset(name, size=settings.size, seed=spread, **settings.task)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"data.task: {name} refuses {settings.task}: {error}") from error
    entries = [task[index] for index in datasets.utils.tqdm(range(settings.size), desc=f"generate {name}")]
    if any(not isinstance(entry["answer"], str) for entry in entries):
        raise ValueError(f"data.dataset: the reasoning-gym task {name} has no reference answers to train on; choose another task")

    def score(answer: str, entry: dict[str, Any]) -> float:
        try:
            return float(task.score_answer(answer, entry))
        except Exception:  # some tasks raise whatever comes on an answer that they cannot parse
            return 0.0

    return entries, score


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _split(keys: Sequence[Any], usable: np.ndarray, held_out: int, seed: int) -> tuple[list[int], list[int], int]:
    """Indices to train on, indices held out, and how many were left out of training because their key is held out."""
    held: dict[Any, int] = {}
    for index in np.random.default_rng(seed).permutation(len(keys)).tolist():
        if len(held) < held_out and usable[index]:
            held.setdefault(keys[index], index)
    train = [index for index in range(len(keys)) if usable[index] and keys[index] not in held]
    return train, sorted(held.values()), int(usable.sum()) - len(train) - len(held)


# Batches.


class MicroBatch(NamedTuple):
    input_ids: Tensor  # (per_device, longest), padded on the right
    attention_mask: Tensor  # (per_device, longest)
    labels: Tensor  # (per_device, longest)
    tokens: int  # trained tokens of the whole global batch: all ranks, all micro-batches
    samples: tuple[int, ...]  # the examples in it; fewer than per_device when the epoch ran out


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class Batches:
    """This rank's micro-batches of any optimizer step, computed from the step's number alone.

        global batch of step t = permutation(seed, t div S)[(t mod S) G : (t mod S + 1) G],
        G = per_device * accumulation * world,  S = ceil(len(examples) / G) steps in an epoch

    dealt out to the ranks in turn. The last batch of an epoch is filled up with empty examples (one token, no label), so all
    ranks run the same number of forwards and no sample comes twice in an epoch. Divide the summed loss by `tokens`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        per_device: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        pad_id: int,
        epochs: float,  # only total_steps depends on it: step() goes on for ever
    ) -> None:
        if not len(examples):
            raise ValueError("there are no examples to make batches of")
        assert 0 <= rank < world
        self.examples, self.per_device, self.accumulation, self.rank, self.world = examples, per_device, accumulation, rank, world
        self.seed, self.pad_id = seed, pad_id
        self.global_batch = per_device * accumulation * world
        self.steps_per_epoch = ceil(len(examples) / self.global_batch)
        self.total_steps = ceil(epochs * self.steps_per_epoch)
        self.trained = examples.trained if isinstance(examples, Encoded) else np.array([example.trained for example in examples])

    def step(self, t: int) -> list[MicroBatch]:
        epoch, position = divmod(t, self.steps_per_epoch)
        order = _permutation(len(self.examples), self.seed, epoch)
        batch = order[position * self.global_batch : (position + 1) * self.global_batch]
        tokens = int(self.trained[batch].sum())
        share = batch[self.rank :: self.world].tolist()
        parts = [share[k * self.per_device : (k + 1) * self.per_device] for k in range(self.accumulation)]
        return [self._collate(part, tokens) for part in parts]

    def _collate(self, part: list[int], tokens: int) -> MicroBatch:
        # The one token of an empty example is attended to: a row that attends to nothing would be NaN.
        empty = Example([self.pad_id], [IGNORE])
        rows = [self.examples[index] for index in part] + [empty] * (self.per_device - len(part))
        longest = max(len(row.input_ids) for row in rows)
        input_ids = torch.full((self.per_device, longest), self.pad_id)
        labels = torch.full((self.per_device, longest), IGNORE)
        attention_mask = torch.zeros(self.per_device, longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            length = len(row.input_ids)
            input_ids[number, :length] = torch.tensor(row.input_ids)
            labels[number, :length] = torch.tensor(row.labels)
            attention_mask[number, :length] = 1
        return MicroBatch(input_ids, attention_mask, labels, tokens, tuple(part))
