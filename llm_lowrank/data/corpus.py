"""From datasets to examples: encoded once a node, split, mixed. The same on every rank, and nothing here communicates.

    row --formats.read--> turns --encoding.encode--> example --split--> Corpus(train, held_out, questions)

The tokens of files and hub datasets are kept in the cache under a key made of everything they depend on; a lock lets
one process of a node write them while the others wait. Their own digest goes into the run's checkpoints: going on with
other data is refused.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from llm_lowrank.data import encoding, formats, rows
from llm_lowrank.data.encoding import encode_prompt, style_of
from llm_lowrank.data.rows import Example, encode_row, row_options
from llm_lowrank.data.settings import Data
from llm_lowrank.data.sources import Part, check, check_read, read
from llm_lowrank.data.streaming import Stream
from llm_lowrank.files import cache_dir, sync, write_json

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "trained": datasets.Value("int32"),
        "truncated": datasets.Value("bool"),
        "problem": datasets.Value("string"),  # why it cannot be used; empty: it can
        "key": datasets.Value("string"),  # of what must not be on both sides of the split
    }
)
NAMED = 5  # bad rows that an error names


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

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return self.rows.with_format("numpy")["length"][:]


@dataclass(frozen=True)
class Question:
    prompt_ids: list[int]
    text: str
    score: Callable[[str], float]  # 1 for a right answer
    answer: str


@dataclass(frozen=True)
class Corpus:
    train: Encoded | Stream
    held_out: Sequence[Example]
    questions: list[Question]  # the held-out examples as questions (reasoning-gym only)
    dropped: dict[str, int]  # reason -> examples left out
    truncated: int  # examples cut to max_length that still train something
    fingerprint: str  # of all tokens; empty when streaming
    styles: tuple[str, ...]  # prompt styles, as they came to be

    def some(self, count: int) -> list[Example]:
        """A few examples, held-out ones if there are any; the same on every rank."""
        from_ = (
            self.held_out
            if len(self.held_out)
            else self.train.examples()
            if isinstance(self.train, Stream)
            else self.train
        )
        return list(islice(from_, count))


def load(settings: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Corpus:
    """Read, encode and split the datasets. The same on every rank; datasets.disable_progress_bars() silences it."""
    check(settings)
    if settings.streaming:
        stream = Stream(settings, tokenizer, seed)
        return Corpus(stream, stream.held_out, [], stream.dropped, 0, "", (stream.style,))
    parts = [read(name, settings, seed) for name in settings.names]
    for part in parts:
        if not len(part.rows):
            raise ValueError(f"{part.name} is empty: it has no row to train on")
    check_read(settings, parts)
    styles = [style_of(tokenizer, settings.prompt_style, part.style) for part in parts]
    tables = [encode_part(part, settings, tokenizer, style) for part, style in zip(parts, styles, strict=True)]
    problems = [table["problem"][:] for table, _ in tables]
    dropped = _unusable(settings, parts, problems)

    everything = datasets.concatenate_datasets([table for table, _ in tables]) if len(tables) > 1 else tables[0][0]
    numbers = everything.select_columns(["trained", "truncated"]).with_format("numpy")
    good = np.array([not text for texts in problems for text in texts])
    usable, cut = good & (numbers["trained"][:] > 0), numbers["truncated"][:]
    keys = everything["key"][:]
    train, held_out = _split(keys, usable, settings.held_out, seed, grouped=any(part.group for part in parts))
    if len(held_out) < settings.held_out or not train:
        raise ValueError(
            f"{settings.dataset}: data.held_out={settings.held_out} leaves nothing to train on, for {len(set(keys))} "
            "distinct examples "
            f"are there and {int((good & ~usable).sum())} lost their completion to "
            f"data.max_length={settings.max_length}; "
            "lower data.held_out, raise data.max_length or get more data"
        )
    dropped["no completion token left within max_length"] = int((good & ~usable).sum())
    asked = "module" if any(part.group for part in parts) else "question"
    dropped[f"{asked} is also held out"] = int(usable.sum()) - len(train) - len(held_out)
    return Corpus(
        train=Encoded(everything.select(_weigh(train, [len(part.rows) for part in parts], settings.weights, seed))),
        held_out=Encoded(everything.select(held_out)),
        questions=_questions(parts, styles, held_out, settings, tokenizer),
        dropped={reason: count for reason, count in dropped.items() if count},
        truncated=int((usable & cut).sum()),
        fingerprint=hashlib.sha256("".join(digest for _, digest in tables).encode()).hexdigest(),
        styles=tuple(dict.fromkeys(styles)),
    )


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode_part(
    part: Part, settings: Data, tokenizer: PreTrainedTokenizerBase, style: str
) -> tuple[datasets.Dataset, str]:
    """The part's rows as FEATURES, and the digest of their tokens."""
    options = row_options(part, settings, tokenizer, style)
    if not part.content:
        table = _map_rows(part, options, None)
        return table, _digest(table)
    depends = {name: value for name, value in options.items() if name != "tokenizer"}
    depends |= {"content": part.content, "tokenizer": _tokenizer_digest(tokenizer), "rules": _rules()}
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    # the note is written last: with it the table is whole
    arrow, note = folder / f"{key}.arrow", folder / f"{key}.json"
    with FileLock(folder / f"{key}.lock"):
        if not note.is_file():
            table = _map_rows(part, options, arrow)
            sync(arrow)
            write_json(note, {"digest": _digest(table), "rows": len(table), "dataset": part.name})
        table, digest = datasets.Dataset.from_file(str(arrow)), json.loads(note.read_text())["digest"]
    if len(table) != len(part.rows):
        raise ValueError(f"{arrow} holds {len(table)} rows and {part.name} {len(part.rows)}: it was damaged, remove it")
    return table, digest


def _map_rows(part: Part, options: dict[str, Any], path: Path | None) -> datasets.Dataset:
    return part.rows.map(
        encode_row,
        fn_kwargs=options,
        remove_columns=part.rows.column_names,
        features=FEATURES,
        load_from_cache_file=False,
        cache_file_name=str(path) if path else None,
        keep_in_memory=path is None,
        new_fingerprint="tokens",
        desc=f"tokenize {part.name}",
    )


def _digest(table: datasets.Dataset) -> str:
    digest = hashlib.sha256(table.with_format("numpy")["length"][:].tobytes())
    for name in ("input_ids", "labels"):
        for chunk in table.with_format("arrow")[:][name].chunks:
            digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


@cache
def _rules() -> list[str]:
    """What else decides the tokens: the code that makes them."""
    files = (Path(module.__file__ or "") for module in (encoding, formats, rows))
    return [transformers.__version__, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    kind = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map, rules]
    return hashlib.sha256(json.dumps(kind, sort_keys=True, default=str).encode()).hexdigest()


def _unusable(settings: Data, parts: Sequence[Part], problems: Sequence[Sequence[str]]) -> dict[str, int]:
    """How many rows cannot be used for which reason; ValueError with their numbers unless they may be dropped."""
    found = [
        (part.name, number, text)
        for part, texts in zip(parts, problems, strict=True)
        for number, text in enumerate(texts)
        if text
    ]
    if found and settings.bad_rows == "refuse":
        lines = [f"{name}, row {number} (the first is 0): {text}" for name, number, text in found[:NAMED]]
        more = f"\nand {len(found) - NAMED} more rows" if len(found) > NAMED else ""
        raise ValueError(
            "\n".join(lines) + f"{more}\nmend or remove them, or leave them out and count them: data.bad_rows: drop"
        )
    return dict(Counter(text for _, _, text in found).most_common())


# --- splitting and mixing ---------------------------------------------------------------------------------------------


def _split(
    keys: Sequence[str], usable: np.ndarray, held_out: int, seed: int, grouped: bool = False
) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out; nothing whose key is held out is trained on.

    Of every key that is held out one example is taken, so that the questions differ; `grouped`: all of them, as long as
    there is room.
    """
    held: dict[str, list[int]] = {}
    order = np.random.default_rng(seed).permutation(len(keys)).tolist()
    members: dict[str, list[int]] = {}
    for index in order:
        if usable[index]:
            members.setdefault(keys[index], []).append(index)
    room = held_out
    for whole in (True, False) if grouped else (False,):  # groups that fit first, so that no rest of one is lost
        for key, indices in members.items():
            if key in held or (whole and len(indices) > room) or not room:
                continue
            held[key] = indices[: room if grouped else 1]
            room -= len(held[key])
    train = [index for index in range(len(keys)) if usable[index] and keys[index] not in held]
    return train, sorted(index for indices in held.values() for index in indices)


def _weigh(train: list[int], sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Each part's indices as often as its weight says; a fraction takes that share of them, drawn by the seed."""
    if not weights:
        return train
    ends = np.cumsum(sizes)
    taken: list[int] = []
    for number, weight in enumerate(weights):
        mine = [index for index in train if ends[number] - sizes[number] <= index < ends[number]]
        count = round((weight % 1) * len(mine))
        some = np.random.default_rng([seed, number]).permutation(len(mine))[:count]
        taken += mine * int(weight) + [mine[index] for index in sorted(some.tolist())]
    return taken


def questions_of(
    part: Part, rows: Iterable[int], tokenizer: PreTrainedTokenizerBase, style: str, system: str
) -> list[Question]:
    """Rows whose answers can be scored, as questions."""
    asked = [(part.rows[row]["prompt"], *part.answers[row]) for row in rows]
    return [
        Question(encode_prompt(tokenizer, text, style, system), text, score, answer) for text, answer, score in asked
    ]


def _questions(
    parts: Sequence[Part],
    styles: Sequence[str],
    held_out: Sequence[int],
    settings: Data,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Question]:
    """The held-out examples whose answers can be scored."""
    found: list[Question] = []
    start = 0
    for part, style in zip(parts, styles, strict=True):
        mine = [index - start for index in held_out if part.answers and start <= index < start + len(part.rows)]
        found += questions_of(part, mine, tokenizer, style, settings.system)
        start += len(part.rows)
    return found
