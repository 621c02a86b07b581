"""Where rows come from: files, the hub, reasoning-gym's generators."""

import difflib
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from llm_lowrank.data.formats import FORMATS, PRESETS, Preset, Row, format_of
from llm_lowrank.data.settings import Data

FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
REASONING_GYM = "reasoning-gym:"
MOVED = {  # datasets that older versions had -> what to do instead
    "stdlib-code": "is made by a script now; run `python recipes/data/stdlib_code.py output/stdlib-code.jsonl` and "
    "name that file, with --data.held_out_by module"
}


@dataclass(frozen=True)
class OpenDataset:
    """One of the datasets that a run is trained on: its rows and how they are read."""

    name: str
    rows: Any  # datasets.Dataset; IterableDataset when streaming
    format: str
    columns: dict[str, str]
    style: str = "plain"  # of prompts where the tokenizer has no chat template
    content: str = ""  # digest of what the rows were read from; empty: every process makes the rows anew
    group: str = ""  # column whose values may not be on both sides of the split; empty: the prompt takes this part
    answers: tuple[
        tuple[str, Callable[[str], float]], ...
    ] = ()  # of each row: the right answer; the score of an answer


def open_dataset(name: str, settings: Data, seed: int) -> OpenDataset:
    """Open one of settings.names. ValueError if there is no such dataset or the settings do not fit it."""
    if name.startswith(REASONING_GYM):
        return _generate_dataset(name, settings, seed)
    if name in MOVED:
        raise ValueError(f"data.dataset: {name} {MOVED[name]}")
    preset = PRESETS.get(name) or PRESETS.get(settings.preset) or Preset("", settings.format, "plain")
    split = preset.split if name in PRESETS and settings.split == Data.split else settings.split
    rows = _load_rows(PRESETS[name].hub if name in PRESETS else name, split, settings.streaming)
    column_names = _column_names(rows)
    columns = {ours: theirs for ours, theirs in preset.columns.items() if theirs in column_names} | settings.columns
    wanted = preset.format if settings.format == "auto" else settings.format
    format = format_of(name, wanted, columns, column_names)
    for ours in FORMATS[format].texts:
        _check_text(name, rows, columns.get(ours, ours))
    if settings.held_out_by and settings.held_out_by not in column_names:
        known = ", ".join(column_names) or "none"
        raise ValueError(f"data.held_out_by: {name} has no column {settings.held_out_by!r}; it has {known}")
    content = "" if settings.streaming else _digest(name, rows)
    return OpenDataset(name, rows, format, columns, style=preset.style, content=content, group=settings.held_out_by)


def check_settings(settings: Data) -> None:
    """Check that at least one of the datasets uses each setting that was given. ValueError otherwise."""
    generated = [name.startswith(REASONING_GYM) for name in settings.names]
    files = [not made for made in generated]
    plain = Data()
    for names, used, kind in (
        (("size", "task"), generated, f"{REASONING_GYM}<task>"),
        (("split", "format", "columns", "preset", "streaming", "held_out_by"), files, "files and hub names"),
    ):
        for name in names:
            if not any(used) and getattr(settings, name) != getattr(plain, name):
                raise ValueError(f"data.{name} is for {kind} only and {settings.dataset} would ignore it; remove it")


def check_formats(settings: Data, opened: Sequence[OpenDataset]) -> None:
    """Check that the formats, which are known now, use each setting that was given. ValueError otherwise."""
    if all(dataset.format == "text" for dataset in opened):
        for name in ("system", "prompt_style", "train_on", "chat_template"):
            if getattr(settings, name) != getattr(Data, name):
                raise ValueError(
                    f"data.{name} is for questions and answers and {settings.dataset} is plain text; remove it"
                )
    if settings.preset != "none" and all(dataset.name in PRESETS for dataset in opened):
        raise ValueError(f"data.preset is for local copies and {settings.dataset} names its own; remove it")


def hint(word: str, known: Any) -> str:
    """Return a question for the known name that is spelled most like `word`; empty if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# --- files and the hub ------------------------------------------------------------------------------------------------


def _load_rows(name: str, split: str, streaming: bool) -> Any:
    """Return the rows of a file, a folder or a hub dataset. ValueError says why they cannot be read."""
    path = Path(name).expanduser()
    # A name that looks like a path is never looked for on the hub.
    if path.is_file() and path.suffix in FILE_KINDS:
        arguments: dict[str, Any] = {"path": FILE_KINDS[path.suffix], "data_files": str(path)}
    elif path.is_dir():
        kinds = {FILE_KINDS[file.suffix] for file in _files(path)}
        if len(kinds) != 1:
            content = "both JSON and Parquet files" if kinds else "no .jsonl, .json or .parquet file"
            raise ValueError(f"data.dataset: the folder {name} holds {content}; give a folder with files of one kind")
        arguments = {"path": str(path)}
    elif path.is_file():
        raise ValueError(f"data.dataset: {name} is not a {', '.join(FILE_KINDS)} file; convert it to one of them")
    elif path.suffix in FILE_KINDS or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"data.dataset: no such file or folder: {name}")
    else:
        arguments = {"path": name}
    if streaming:
        arguments["streaming"] = True
    try:
        return datasets.load_dataset(**arguments, split=split)
    except StopIteration as error:  # what datasets makes of a JSON file without rows
        raise ValueError(f"{name} is empty: it has no row to train on") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = next(filter(None, map(_broken_line, _files(path))), "")
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        meant = hint(name, PRESETS) if not path.exists() else ""
        raise ValueError(f"data.dataset: cannot read {name}, split {split!r}: {where or reason}{meant}") from error


def _check_text(name: str, rows: Any, column: str) -> None:
    """Check that a column holds text only. ValueError names the first row that holds something else.

    `datasets` keeps a column of text and other things as JSON, where the text "5" becomes the number 5.
    """
    if not isinstance((rows.features or {}).get(column), datasets.Json):
        return
    where = ""
    for path in _files(Path(name).expanduser()):
        with path.open(encoding="utf-8-sig") as file:
            content = (
                (json.loads(line) for line in file if line.strip()) if path.suffix == ".jsonl" else json.load(file)
            )
            other = next(
                ((n, row[column]) for n, row in enumerate(content) if not isinstance(row.get(column), str | None)), None
            )
        if other and not where:
            where = f", {path.name}, row {other[0]} (the first is 0): it is {type(other[1]).__name__} there"
    raise ValueError(
        f"{name}: the column {column} holds text and other things{where}; mend it, for texts would change on the way"
    )


def _files(path: Path) -> list[Path]:
    """Return the data files of a folder, or the file itself; none if `path` is neither."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in FILE_KINDS and file.is_file())
    return [path] if path.is_file() else []


def _broken_line(path: Path) -> str:
    """Return a message about the first line of a .jsonl file that is no JSON; empty if there is no such line, or if the
    file is of another kind.
    """
    if path.suffix != ".jsonl":
        return ""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                if line.strip():
                    json.dumps(json.loads(line), ensure_ascii=False).encode()  # half a surrogate pair is no text
            except ValueError as error:
                ending = "" if line.endswith(b"\n") else ", the last one, which may have been cut off"
                return f"{path.name}, row {number} (the first is 0){ending}: {error}; mend or remove it"
    return ""


def _column_names(rows: Any) -> list[str]:
    """Return the names of the columns; a stream that does not list them is asked for its first row."""
    if rows.column_names is not None:
        return list(rows.column_names)
    return list(next(iter(rows), {}))


def _digest(name: str, rows: Any) -> str:
    """Return the digest of the bytes of local files, or of the fingerprint that `datasets` gives a hub dataset."""
    digest = hashlib.sha256()
    files = _files(Path(name).expanduser())
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(str(rows.split).encode() if files else rows._fingerprint.encode())
    return digest.hexdigest()


# --- made here --------------------------------------------------------------------------------------------------------


def _generate_dataset(name: str, settings: Data, seed: int) -> OpenDataset:
    entries, score = _generate(name, settings, seed)
    rows: list[Row] = [{"prompt": entry["question"], "completion": entry["answer"]} for entry in entries]
    answers = tuple((entry["answer"], partial(score, entry=entry)) for entry in entries)
    return OpenDataset(name, datasets.Dataset.from_list(rows), "prompt_completion", {}, answers=answers)


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
