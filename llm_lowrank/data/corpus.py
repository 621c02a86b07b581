"""From datasets to examples, which are encoded once a node, split and mixed. The result is the same on every rank, and
nothing here communicates.

    row --read_conversation--> turns --encode_turns--> example --split--> Corpus(train, held_out, questions)

The tokens of files and hub datasets are kept in the cache under a key made of everything they depend on; a lock lets
one process of a node write them while the others wait. The digest of the tokens goes into the run's checkpoints: a run
does not resume with other data.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date as Date
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from llm_lowrank.data import columns, encoding, formats, reading, rows, stops, templates
from llm_lowrank.data.encoding import encode_prompt, style_of
from llm_lowrank.data.limits import Limits
from llm_lowrank.data.rows import FEATURES, Arrays, Example, date_of, row_options
from llm_lowrank.data.settings import Data
from llm_lowrank.data.sources import MadeRows, OpenDataset, check_formats, check_settings, open_dataset
from llm_lowrank.data.streaming import Stream
from llm_lowrank.data.workers import encode_all
from llm_lowrank.numerics.files import cache_dir, sync, writable_folder, write_json

NAMED = 5  # bad rows that an error names


class ExampleTable(Sequence[Example]):
    """The examples with the given numbers in a (memory-mapped) table of FEATURES; none of them is copied.

    numbers (examples,): rows of the table, in any order, some perhaps more than once.
    """

    def __init__(self, table: datasets.Dataset, numbers: Sequence[int]) -> None:
        self.table, self.numbers = table, np.asarray(numbers, dtype=np.int64)
        chunks = table.with_format("arrow")[:].select(["input_ids", "labels"])
        self.columns = [_Lists(chunks[name]) for name in chunks.column_names]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        ids, labels = self.arrays(index)
        return Example(ids.tolist(), labels.tolist())

    def arrays(self, index: int) -> Arrays:
        """Return the tokens and the labels of an example, views of the table."""
        ids, labels = (column[self.numbers[index]] for column in self.columns)
        return ids, labels

    def held(self, tokens: Sequence[int]) -> set[int]:
        """Return those of these tokens that stand in the table, whichever of its rows are examples here."""
        found = [values[np.isin(values, tokens)] for _, values in self.columns[0].parts]
        return set(np.unique(np.concatenate(found)).tolist()) if found else set()

    @cached_property
    def trained(self) -> np.ndarray:
        """Trained tokens of each example, (examples,)."""
        return self.table.with_format("numpy")["trained"][:][self.numbers]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, (examples,)."""
        return self.table.with_format("numpy")["length"][:][self.numbers]

    @property
    def keys(self) -> list[str]:
        """Key of the question or group of each example."""
        return np.asarray(self.table["key"][:])[self.numbers].tolist()


class _Lists:
    """The lists of numbers in a column, each as an array that shares the column's memory."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        # list k of a chunk: values[offsets[k] : offsets[k + 1]]
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self.parts = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        self.ends = np.cumsum([len(chunk) for chunk in chunks])  # (chunks,) lists in a chunk and in those before it

    def __getitem__(self, number: int) -> np.ndarray:
        part = int(np.searchsorted(self.ends, number, side="right"))
        offsets, values = self.parts[part]
        place = number - (self.ends[part - 1] if part else 0)
        return values[offsets[place] : offsets[place + 1]]


@dataclass(frozen=True)
class Question:
    """A prompt whose answer can be scored."""

    prompt_ids: list[int]  # with the generation prompt of the chat template, or in its frame
    text: str
    score: Callable[[str], float]  # 1 for a right answer
    answer: str


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and what it holds out."""

    train: ExampleTable | Stream
    held_out: Sequence[Example]
    questions: list[Question]  # the held-out examples as questions (reasoning-gym only)
    dropped: dict[str, int]  # reason -> examples left out
    truncated: int  # examples cut to max_length that still train something
    fingerprint: str  # digest of all tokens; empty when streaming
    styles: tuple[str, ...]  # prompt styles that the datasets were written with
    unused: dict[str, int] = field(
        default_factory=dict
    )  # column or message key that nothing reads -> rows that have it
    date: str = ""  # the day that the prompts say; empty: they say none
    # token that ends an answer -> rows where it does, the most frequent first; of a stream: of what was read so far
    ends: dict[int, int] = field(default_factory=dict)
    digests: tuple[str, ...] = ()  # of the tokens of each dataset, in their order

    def some(self, count: int) -> list[Example]:
        """Return at most `count` examples, held-out ones if there are any; the same on every rank."""
        if len(self.held_out):
            return list(islice(self.held_out, count))
        return list(islice(self.train.examples() if isinstance(self.train, Stream) else self.train, count))


def load_corpus(
    settings: Data, tokenizer: PreTrainedTokenizerBase, seed: int, date: str = "", limits: Limits | None = None
) -> Corpus:
    """Read, encode and split the datasets; the result is the same on every rank.

    date: YYYY-MM-DD, what a chat template that writes the date takes for today; empty: the day it is.
    limits: of the model that reads the examples; rows that do not fit them cannot be used.
    ValueError for data that cannot be read, that the settings do not fit, or that leaves nothing to train on.
    datasets.disable_progress_bars() hides the progress.
    """
    check_settings(settings)
    date = date or Date.today().isoformat()
    if settings.streaming:
        stream = Stream(settings, tokenizer, seed, date, limits)
        date = stream.options["date"]
        return Corpus(
            stream, stream.held_out, [], stream.dropped, 0, "", (stream.style,), stream.unused, date, stream.ends
        )
    opened = [open_dataset(name, settings, seed, part) for part, name in enumerate(settings.names)]
    check_formats(settings, opened)
    styles = [style_of(tokenizer, settings.prompt_style, dataset.style) for dataset in opened]
    encoded = [
        encode_dataset(dataset, settings, tokenizer, style, date) for dataset, style in zip(opened, styles, strict=True)
    ]
    problems = [limits.problems(table, tokenizer) if limits else table["problem"][:] for table, _ in encoded]
    dropped = _count_unusable(settings, opened, problems)

    # one table of all datasets; usable are rows that read without a problem and train something within max_length
    table = datasets.concatenate_datasets([table for table, _ in encoded]) if len(encoded) > 1 else encoded[0][0]
    numbers = table.select_columns(["trained", "truncated"]).with_format("numpy")
    good = np.array([not text for texts in problems for text in texts])
    usable, cut = good & (numbers["trained"][:] > 0), numbers["truncated"][:]
    keys = table["key"][:]
    grouped = any(dataset.group for dataset in opened)
    train, held_out = _split(keys, usable, held_out=settings.held_out, seed=seed, grouped=grouped)
    if len(held_out) < settings.held_out or not train:
        raise ValueError(
            f"{settings.dataset}: data.held_out={settings.held_out} leaves nothing to train on, for {len(set(keys))} "
            f"distinct examples are there and {int((good & ~usable).sum())} lost their completion to "
            f"data.max_length={settings.max_length}; lower data.held_out, raise data.max_length or get more data"
        )
    dropped["no completion token left within max_length"] = int((good & ~usable).sum())
    dropped[f"{settings.held_out_by or 'question'} is also held out"] = int(usable.sum()) - len(train) - len(held_out)
    weighted = _weigh(train, [len(dataset.rows) for dataset in opened], settings.weights, seed)
    return Corpus(
        train=ExampleTable(table, weighted),
        held_out=ExampleTable(table, held_out),
        questions=_held_out_questions(
            opened, held_out, tokenizer=tokenizer, styles=styles, system=settings.system, date=date
        ),
        dropped={reason: count for reason, count in dropped.items() if count},
        truncated=int((usable & cut).sum()),
        fingerprint=hashlib.sha256("".join(digest for _, digest in encoded).encode()).hexdigest(),
        styles=tuple(dict.fromkeys(styles)),
        unused=_count(table, "unused"),
        ends=_count(table, "ends"),
        digests=tuple(digest for _, digest in encoded),
        date=next(filter(None, (date_of(tokenizer, style, date) for style in styles)), ""),
    )


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode_dataset(
    dataset: OpenDataset, settings: Data, tokenizer: PreTrainedTokenizerBase, style: str, date: str
) -> tuple[datasets.Dataset, str]:
    """Return the rows of a dataset as a table of FEATURES, and the digest of their tokens. The table comes from the
    cache if the same rows were encoded before in the same way.
    """
    options = row_options(dataset, settings, tokenizer, style, date)
    if not dataset.content:
        table = _map_rows(dataset, options, None)
        return table, _digest(table)
    # the key of the cache is made of everything that decides the tokens
    depends = {name: value for name, value in options.items() if name != "tokenizer"}
    depends |= {"content": dataset.content, "tokenizer": _tokenizer_digest(tokenizer), "rules": _rules()}
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:32]
    folder = writable_folder(cache_dir() / "tokens")
    # the note is written last: where there is a note, the table is complete
    arrow, note = folder / f"{key}.arrow", folder / f"{key}.json"
    with FileLock(folder / f"{key}.lock"):
        if not note.is_file():
            table = _map_rows(dataset, options, arrow, workers=settings.workers)
            if dataset.rows.digest() != dataset.content:
                raise ValueError(f"{dataset.name} was changed while it was read; start again when it is whole")
            sync(arrow)
            write_json(note, {"digest": _digest(table), "rows": len(table), "dataset": dataset.name})
        table, digest = datasets.Dataset.from_file(str(arrow)), json.loads(note.read_text())["digest"]
    if len(table) != len(dataset.rows):
        raise ValueError(
            f"{arrow} holds {len(table)} rows and {dataset.name} {len(dataset.rows)}: it was damaged, remove it"
        )
    return table, digest


def _map_rows(dataset: OpenDataset, options: dict[str, Any], path: Path | None, workers: int = 1) -> datasets.Dataset:
    """Encode every row, into a file or, without a path, in memory."""
    schema = FEATURES.arrow_schema
    memory = pa.BufferOutputStream()
    with (
        datasets.utils.tqdm(total=len(dataset.rows), desc=f"tokenize {dataset.name}") as bar,
        pa.OSFile(str(path), "wb") if path else memory as sink,
        pa.ipc.new_stream(sink, schema) as writer,
    ):
        for batch in encode_all(iter(dataset.rows), len(dataset.rows), options, workers):
            writer.write_batch(batch)
            bar.update(len(batch))
    if path:
        return datasets.Dataset.from_file(str(path))
    return datasets.Dataset.from_buffer(memory.getvalue())


def _digest(table: datasets.Dataset) -> str:
    """Return the digest of the tokens and labels of a table."""
    digest = hashlib.sha256(table.with_format("numpy")["length"][:].tobytes())
    for name in ("input_ids", "labels"):
        for chunk in table.with_format("arrow")[:][name].chunks:
            digest.update(chunk.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


@cache
def _rules() -> list[str]:
    """Return the version of transformers and the digests of the modules that make the tokens."""
    files = (Path(module.__file__ or "") for module in (columns, encoding, formats, reading, rows, stops, templates))
    return [transformers.__version__, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest of everything in a tokenizer that decides the tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    kind = [type(tokenizer).__name__, tokenizer.chat_template, tokenizer.special_tokens_map, rules]
    return hashlib.sha256(json.dumps(kind, sort_keys=True, default=str).encode()).hexdigest()


def _count_unusable(settings: Data, opened: Sequence[OpenDataset], problems: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return reason -> number of unusable rows. ValueError with the first of them unless data.bad_rows is drop."""
    bad_rows = [
        (dataset, number, text)
        for dataset, texts in zip(opened, problems, strict=True)
        for number, text in enumerate(texts)
        if text
    ]
    if bad_rows and settings.bad_rows == "refuse":
        lines = []
        for dataset in opened:
            named = [(number, text) for of, number, text in bad_rows[:NAMED] if of is dataset]
            places = dataset.rows.places(number for number, _ in named)
            lines += [f"{place}: {text}" for place, (_, text) in zip(places, named, strict=True)]
        more = f"\nand {len(bad_rows) - NAMED} more rows" if len(bad_rows) > NAMED else ""
        raise ValueError(
            "\n".join(lines) + f"{more}\nmend or remove them, or leave them out and count them: data.bad_rows: drop"
        )
    return dict(Counter(text for _, _, text in bad_rows).most_common())


def _count(table: datasets.Dataset, column: str) -> dict[Any, int]:
    """Return what the lists of a column hold, with the number of rows that have it, the most frequent first."""
    chunks = table.with_format("arrow")[:][column].chunks
    return dict(Counter(name for chunk in chunks for name in chunk.flatten().to_pylist()).most_common())


# --- splitting and mixing ---------------------------------------------------------------------------------------------


def _split(
    keys: Sequence[str], usable: np.ndarray, *, held_out: int, seed: int, grouped: bool = False
) -> tuple[list[int], list[int]]:
    """Return the indices to train on and the indices held out. No example whose key is held out is trained on.

    keys: one for each row. usable (rows,), bool. Of every key that is held out one example is taken, so that the
    questions differ; with `grouped` all of them are taken, as long as there is room.
    """
    # the usable rows of each key, keys and rows in an order that the seed draws
    indices_of: dict[str, list[int]] = {}
    for index in np.random.default_rng(seed).permutation(len(keys)).tolist():
        if usable[index]:
            indices_of.setdefault(keys[index], []).append(index)

    # Hold keys out until there is no room. With groups, a first pass takes those that fit as they are; the second pass
    # fills what is left with a part of one more group, whose other rows are then neither held out nor trained on.
    held: dict[str, list[int]] = {}
    room = held_out
    for must_fit in (True, False) if grouped else (False,):
        for key, indices in indices_of.items():
            if key in held or (must_fit and len(indices) > room) or not room:
                continue
            held[key] = indices[: room if grouped else 1]
            room -= len(held[key])

    train = [index for index in range(len(keys)) if usable[index] and keys[index] not in held]
    return train, sorted(index for indices in held.values() for index in indices)


def _weigh(train: list[int], sizes: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Return each dataset's indices as often as its weight says; a fraction takes that share of them, drawn by the
    seed. sizes: rows of each dataset, which lie one after another.
    """
    if not weights:
        return train
    ends = np.cumsum(sizes)
    weighted: list[int] = []
    for number, weight in enumerate(weights):
        indices = [index for index in train if ends[number] - sizes[number] <= index < ends[number]]
        count = round((weight % 1) * len(indices))
        drawn = np.random.default_rng([seed, number]).permutation(len(indices))[:count]
        weighted += indices * int(weight) + [indices[position] for position in sorted(drawn.tolist())]
    return weighted


def questions_of(
    dataset: OpenDataset,
    rows: Iterable[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    style: str,
    system: str,
    date: str = "",
) -> list[Question]:
    """Return the rows with these numbers as questions. `dataset.answers` must be known. date: as in load_corpus."""
    assert isinstance(dataset.rows, MadeRows)
    questions = []
    for row in rows:
        text, (answer, score) = dataset.rows[row]["prompt"], dataset.answers[row]
        questions.append(Question(encode_prompt(tokenizer, text, style, system, date), text, score, answer))
    return questions


def _held_out_questions(
    opened: Sequence[OpenDataset],
    held_out: Sequence[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    styles: Sequence[str],
    system: str,
    date: str,
) -> list[Question]:
    """Return the held-out examples whose answers can be scored as questions. held_out: indices into all datasets, which
    lie one after another.
    """
    questions: list[Question] = []
    start = 0
    for dataset, style in zip(opened, styles, strict=True):
        end = start + len(dataset.rows)
        numbers = [index - start for index in held_out if dataset.answers and start <= index < end]
        if numbers:
            questions += questions_of(dataset, numbers, tokenizer=tokenizer, style=style, system=system, date=date)
        start = end
    return questions
