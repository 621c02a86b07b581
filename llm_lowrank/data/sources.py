"""Datasets with their rows and how these are read: from files, the hub, and reasoning-gym's generators."""

import difflib
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa

from llm_lowrank.data import reading
from llm_lowrank.data.finding import Found, find
from llm_lowrank.data.formats import FORMATS, PRESETS, Preset, Row, format_of
from llm_lowrank.data.reading import TYPED, File, damage, features, read, schema, survey
from llm_lowrank.data.settings import Data
from llm_lowrank.numerics.files import cache_dir, writable_folder, write_json

REASONING_GYM = "reasoning-gym:"
MOVED = {  # datasets that older versions had -> what to do instead
    "stdlib-code": "is made by a script now; run `python $(llm-lowrank recipes)/data/stdlib_code.py "
    "output/stdlib-code.jsonl` and name that file, with --data.held_out_by module"
}
PEEK = 1000  # rows of a stream whose columns are looked at before it is read


class Rows(Protocol):
    """The rows of a dataset, which can be read again and again."""

    @property
    def column_names(self) -> list[str]:
        """The names of all columns, in the order in which they appear."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    def places(self, numbers: Iterable[int]) -> list[str]:
        """Return where rows stand, for a message."""

    def digest(self) -> str:
        """Return a digest of what the rows are read from; empty: every process makes the rows anew."""


@dataclass(frozen=True)
class OpenDataset:
    """One of the datasets that a run is trained on: its rows and how they are read."""

    name: str
    rows: Rows
    format: str
    columns: dict[str, str]
    style: str = "plain"  # of prompts where the tokenizer has no chat template
    content: str = ""  # digest of what the rows are read from; empty: every process makes the rows anew
    group: str = ""  # column whose values may not be on both sides of the split; empty: the prompt takes this part
    answers: tuple[
        tuple[str, Callable[[str], float]], ...
    ] = ()  # of each row: the right answer; the score of an answer


def open_dataset(name: str, settings: Data, seed: int, part: int = 0) -> OpenDataset:
    """Open one of settings.names, which is number `part` of them. ValueError if there is no such dataset or the
    settings do not fit it.
    """
    if name.startswith(REASONING_GYM):
        return _generate_dataset(name, settings, seed)
    if name in MOVED:
        raise ValueError(f"data.dataset: {name} {MOVED[name]}")
    preset = PRESETS.get(name) or PRESETS.get(settings.preset) or Preset("", settings.format, "plain")
    split = preset.split if name in PRESETS and settings.split == Data.split else settings.split
    rows = _open_rows(name, split, settings, part)
    columns = {ours: theirs for ours, theirs in preset.columns.items() if theirs in rows.column_names}
    columns |= settings.columns
    wanted = preset.format if settings.format == "auto" else settings.format
    format = format_of(name, wanted, columns, [name for name in rows.column_names if name not in settings.ignore])
    for file in rows.files:
        if file.kind in TYPED:
            _check_types(file, format, columns)
    if settings.held_out_by and settings.held_out_by not in rows.column_names:
        known = ", ".join(rows.column_names) or "none"
        raise ValueError(f"data.held_out_by: {name} has no column {settings.held_out_by!r}; it has {known}")
    content = "" if settings.streaming else rows.digest()
    return OpenDataset(name, rows, format, columns, style=preset.style, content=content, group=settings.held_out_by)


def check_settings(settings: Data) -> None:
    """Check that at least one of the datasets uses each setting that was given. ValueError otherwise."""
    generated = [name.startswith(REASONING_GYM) for name in settings.names]
    files = [not made for made in generated]
    plain = Data()
    of_files = ["split", "subset", "revision", "format", "columns", "ignore", "preset", "streaming", "held_out_by"]
    of_files += ["workers"]
    for names, used, kind in (
        (("size", "task"), generated, f"{REASONING_GYM}<task>"),
        (of_files, files, "files and hub names"),
    ):
        for name in names:
            if not any(used) and getattr(settings, name) != getattr(plain, name):
                raise ValueError(f"data.{name} is for {kind} only and {settings.dataset} would ignore it; remove it")


def check_formats(settings: Data, opened: Sequence[OpenDataset]) -> None:
    """Check that the formats, which are known now, use each setting that was given, and that no two datasets are the
    same. ValueError otherwise.
    """
    seen: dict[tuple[str, ...], OpenDataset] = {}
    for dataset in opened:
        first = seen.setdefault((dataset.content, dataset.format, str(dataset.columns)), dataset)
        if dataset.content and first is not dataset:
            raise ValueError(
                f"data.dataset: {first.name} and {dataset.name} hold the same rows, which would be trained twice; give "
                "one of them, with data.weights for more"
            )
    for format, kind in (("text", "plain text"), ("tokens", "tokens already")):
        if all(dataset.format == format for dataset in opened):
            for name in ("system", "prompt_style", "train_on", "chat_template"):
                if getattr(settings, name) != getattr(Data, name):
                    raise ValueError(
                        f"data.{name} is for questions and answers and {settings.dataset} is {kind}; remove it"
                    )
    if settings.preset != "none" and all(dataset.name in PRESETS for dataset in opened):
        raise ValueError(f"data.preset is for local copies and {settings.dataset} names its own; remove it")


def hint(word: str, known: Any) -> str:
    """Return a question for the known name that is spelled most like `word`; empty if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# --- files and the hub ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Files one after another, and which of their rows are read: start <= row < stop."""

    files: tuple[File, ...]
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class FileRows:
    """The rows of files, in their order. Nothing of them is kept in memory."""

    pieces: tuple[Piece, ...]
    column_names: list[str]
    count: int = -1  # -1: not counted, as they are read while a run trains

    @property
    def files(self) -> list[File]:
        """Every file once."""
        return list(dict.fromkeys(file for piece in self.pieces for file in piece.files))

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.located())

    def located(self) -> Iterator[tuple[Callable[[], str], Row]]:
        """Yield each row with a function that says where it stands."""
        for piece in self.pieces:
            rows = (
                (partial(file.place, number, line), row)
                for file in piece.files
                for number, (line, row) in enumerate(read(file))
            )
            yield from islice(rows, piece.start, piece.stop)

    def places(self, numbers: Iterable[int]) -> list[str]:
        wanted = set(numbers)
        return [place() for number, (place, _) in enumerate(self.located()) if number in wanted] if wanted else []

    def digest(self) -> str:
        """Return the digest of the bytes of the files and of which rows are read."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            for file in piece.files:
                digest.update(f"{file.kind} {file.separator} {_file_digest(file)}".encode())
            digest.update(f"{piece.start} {piece.stop};".encode())
        return digest.hexdigest()


def _open_rows(name: str, split: str, settings: Data, part: int) -> FileRows:
    """Return the rows of a split of a file, a folder, a URL or a hub dataset. ValueError if they cannot be read."""
    hub = PRESETS[name].hub if name in PRESETS else ""
    try:
        found = find(
            hub or name,
            hub=bool(hub),
            subset=settings.subsets[part],
            revision=settings.revisions[part],
            streaming=settings.streaming,
        )
        if settings.streaming:
            return _stream(found, split)
        return _counted(found, split)
    except ValueError as error:
        if str(error).startswith("data."):
            raise
        meant = hint(name, PRESETS) if not Path(name).expanduser().exists() else ""
        raise ValueError(f"data.dataset: cannot read {name}, split {split!r}: {error}{meant}") from error


def _stream(found: Found, split: str) -> FileRows:
    if "[" in split:
        raise ValueError(f"data.split: {split} is a part of a split, and data.streaming reads a split whole")
    pieces = tuple(Piece(tuple(found.files(part))) for part in _names_of(found, split))
    columns = dict.fromkeys(name for row in islice(FileRows(pieces, []), PEEK) for name in row)
    if not columns:
        raise ValueError(f"{found.folder.name} is empty: it has no row to train on")
    return FileRows(pieces, list(columns))


def _counted(found: Found, split: str) -> FileRows:
    """Return the rows of a split, after every file of it was read once to the end."""
    files = {name: tuple(found.files(name)) for name in _names_of(found, split)}
    surveys = {file.path: _survey(file) for part in files.values() for file in part}
    columns = dict.fromkeys(name for names, _ in surveys.values() for name in names)
    lengths = {name: sum(surveys[file.path][1] for file in part) for name, part in files.items()}
    if "[" in split:
        try:
            chosen = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"data.split: {split} cannot be read: {error}; write for example train[:90%]") from error
        ranges = [(part.splitname, *slice(part.from_, part.to).indices(lengths[part.splitname])[:2]) for part in chosen]
    else:
        ranges = [(name, 0, length) for name, length in lengths.items()]
    _check_copies(found.folder.name, list(dict.fromkeys(file for name, _, _ in ranges for file in files[name])))
    count = sum(stop - start for _, start, stop in ranges)
    if not count:
        raise ValueError(f"{found.folder.name} is empty: it has no row to train on")
    return FileRows(tuple(Piece(files[name], start, stop) for name, start, stop in ranges), list(columns), count)


def _check_copies(place: str, files: Sequence[File]) -> None:
    """Check that no two files hold the same bytes. ValueError names two: a copy or a link of a file would be trained
    beside it.
    """
    by_size: dict[int, list[File]] = {}
    for file in files:
        by_size.setdefault(Path(file.path).stat().st_size, []).append(file)
    for size, alike in by_size.items():
        seen: dict[str, File] = {}
        for file in alike if size and len(alike) > 1 else ():
            first = seen.setdefault(_file_digest(file), file)
            if first is not file:
                raise ValueError(
                    f"data.dataset: in the folder {place}, {first.name} and {file.name} are the same, and their rows "
                    "would be trained twice; remove one of them, or name the files themselves"
                )


def _names_of(found: Found, split: str) -> list[str]:
    """Return the splits that a description such as train[:10%]+test names; `all` is all of them."""
    if split == "all" and "all" not in found.splits:
        return list(found.splits)
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))


def _file_digest(file: File) -> str:
    try:
        with open(file.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{file.name}: {damage(error)}") from error


def _survey(file: File) -> tuple[list[str], int]:
    """Return the columns and the number of rows of a file, which are kept in the cache under the file's content."""
    if file.kind in TYPED:
        return survey(file)
    depends = (_file_digest(file), Path(file.name).suffixes[-2:], file.separator, _rules())
    key = hashlib.sha256(str(depends).encode()).hexdigest()[:32]
    note = writable_folder(cache_dir() / "columns") / f"{key}.json"
    if note.is_file():
        content = json.loads(note.read_text(encoding="utf-8"))
        return content["columns"], content["rows"]
    columns, rows = survey(file)
    if rows:
        write_json(note, {"columns": columns, "rows": rows})
    return columns, rows


@cache
def _rules() -> str:
    return hashlib.sha256(Path(reading.__file__).read_bytes()).hexdigest()


def _check_types(file: File, format: str, columns: dict[str, str]) -> None:
    """Check that the columns of a typed file that hold texts can hold nothing else.

    ValueError names the column. A feature Json is stored as JSON, in which `datasets` writes the text "5" like the
    number 5.
    """
    types = schema(file)
    kinds = features(file, types)
    for ours in FORMATS[format].texts:
        name = columns.get(ours, ours)
        if name not in types.names:
            continue
        kind = types.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if isinstance(kinds[name], datasets.Json):
            raise ValueError(_mixed(file.name, name))
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        if not (text or pa.types.is_nested(kind) or pa.types.is_null(kind)):
            raise ValueError(
                f"{file.name}: the column {name} holds {kind}, not text; write it as text, or choose another column "
                "with data.columns"
            )
    for ours in FORMATS[format].required:
        name = columns.get(ours, ours)
        if name in kinds and (key := _json_text(kinds[name])):
            raise ValueError(_mixed(file.name, f"{name}, key {key},"))


def _mixed(file: str, column: str) -> str:
    return (
        f'{file}: the column {column} is of the type Json, in which the text "5" and the number 5 are written alike; '
        "write it as text, for example in a .jsonl file"
    )


def _json_text(feature: Any) -> str:
    """Return the key under which messages have their text, if the type of the text is Json; empty otherwise."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        return _json_text(feature.feature)
    if isinstance(feature, dict):
        return next((key for key in ("content", "value") if isinstance(feature.get(key), datasets.Json)), "")
    return ""


# --- made here --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeRows:
    """Rows that were generated."""

    name: str
    rows: list[Row]

    @property
    def column_names(self) -> list[str]:
        return list(self.rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]

    def places(self, numbers: Iterable[int]) -> list[str]:
        return [f"{self.name}, row {number} (the first is 0)" for number in numbers]

    def digest(self) -> str:
        return ""


def _generate_dataset(name: str, settings: Data, seed: int) -> OpenDataset:
    entries, score = _generate(name, settings, seed)
    rows: list[Row] = [{"prompt": entry["question"], "completion": entry["answer"]} for entry in entries]
    answers = tuple((entry["answer"], partial(score, entry=entry)) for entry in entries)
    return OpenDataset(name, MadeRows(name, rows), "prompt_completion", {}, answers=answers)


def _generate(dataset: str, settings: Data, seed: int) -> tuple[list[dict[str, Any]], Callable[..., float]]:
    """Return the entries of a reasoning-gym task (question, answer, metadata) and a function score(answer, entry).

    ValueError if the package is missing, or if the task or one of its settings does not exist.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ValueError(f"{dataset} needs the reasoning-gym package: pip install 'llm-lowrank[demo]'") from error
    if settings.held_out >= settings.size:
        raise ValueError(
            f"data.held_out={settings.held_out} must be smaller than data.size={settings.size}, for both come from it"
        )
    name = dataset.removeprefix(REASONING_GYM)
    if name not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {name!r}{hint(name, DATASETS)}")
    known = {setting.name for setting in fields(DATASETS[name][1])} - {"seed", "size"}
    for key in settings.task.keys() - known:
        raise ValueError(
            f"{dataset} has no setting {key!r}{hint(key, known)}; it has {', '.join(sorted(known)) or 'none'}"
        )
    # Entry i is drawn with seed + i: without the spreading, neighbouring seeds would give nearly the same.
    spread = random.Random(f"{REASONING_GYM}{seed}").getrandbits(31)
    try:
        task = reasoning_gym.create_dataset(name, size=settings.size, seed=spread, **settings.task)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{dataset} refuses the settings {settings.task}: {error}") from error
    entries = [task[index] for index in datasets.utils.tqdm(range(settings.size), desc=f"generate {name}")]
    if any(not isinstance(entry["answer"], str) for entry in entries):
        raise ValueError(f"{dataset} has no reference answers; choose another task")

    def score(answer: str, entry: dict[str, Any]) -> float:
        try:
            return float(task.score_answer(answer, entry))
        except Exception:  # some tasks raise whatever comes on an answer that they cannot parse
            return 0.0

    return entries, score
