"""Where rows come from: files, the hub, reasoning-gym's generators, the standard library's own source."""

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

from llm_lowrank.data import stdlib_code
from llm_lowrank.data.formats import FORMATS, PRESETS, Preset, Row, format_of
from llm_lowrank.data.settings import Data

FILE_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
REASONING_GYM = "reasoning-gym:"
STDLIB_CODE = "stdlib-code"


@dataclass(frozen=True)
class Part:
    """One of the datasets that a run is trained on."""

    name: str
    rows: Any  # datasets.Dataset; IterableDataset when streaming
    format: str
    columns: dict[str, str]
    style: str = "plain"  # of prompts where the tokenizer has no chat template
    content: str = ""  # digest of what the rows were read from; empty: made anew by every process
    group: str = ""  # column with what must not be on both sides of the split; empty: the prompt
    answers: tuple[tuple[str, Callable[[str], float]], ...] = ()  # of each row: the right one, and its score of another


def read(name: str, settings: Data, seed: int) -> Part:
    """The rows of one of settings.names. ValueError if they cannot be had as asked."""
    if name.startswith(REASONING_GYM):
        return _generate_part(name, settings, seed)
    if name == STDLIB_CODE:
        return _stdlib_code()
    preset = PRESETS.get(name) or PRESETS.get(settings.preset) or Preset("", settings.format, "plain")
    split = preset.split if name in PRESETS and settings.split == Data.split else settings.split
    rows = _load(PRESETS[name].hub if name in PRESETS else name, split, settings.streaming)
    there = _columns(rows)
    columns = {ours: theirs for ours, theirs in preset.columns.items() if theirs in there} | settings.columns
    wanted = preset.format if settings.format == "auto" else settings.format
    format = format_of(name, wanted, columns, there)
    for ours in FORMATS[format].texts:
        _check_text(name, rows, columns.get(ours, ours))
    return Part(name, rows, format, columns, preset.style, "" if settings.streaming else _digest(name, rows))


def check(settings: Data) -> None:
    """ValueError for a setting that no dataset of these would use."""
    generated = [name.startswith(REASONING_GYM) for name in settings.names]
    files = [not made and name != STDLIB_CODE for made, name in zip(generated, settings.names, strict=True)]
    plain = Data()
    for names, used, kind in (
        (("size", "task"), generated, f"{REASONING_GYM}<task>"),
        (("split", "format", "columns", "preset", "streaming"), files, "files and hub names"),
    ):
        for name in names:
            if not any(used) and getattr(settings, name) != getattr(plain, name):
                raise ValueError(f"data.{name} is for {kind} only and {settings.dataset} would ignore it; remove it")


def check_read(settings: Data, parts: Sequence[Part]) -> None:
    """ValueError for a setting that the formats and names, once they are known, would ignore."""
    if all(part.format == "text" for part in parts):
        for name in ("system", "prompt_style", "train_on", "chat_template"):
            if getattr(settings, name) != getattr(Data, name):
                raise ValueError(
                    f"data.{name} is for questions and answers and {settings.dataset} is plain text; remove it"
                )
    if settings.preset != "none" and all(part.name in PRESETS for part in parts):
        raise ValueError(f"data.preset is for local copies and {settings.dataset} names its own; remove it")


def hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# --- files and the hub ------------------------------------------------------------------------------------------------


def _load(name: str, split: str, streaming: bool) -> Any:
    path = Path(name).expanduser()
    if path.is_file() and path.suffix in FILE_KINDS:
        arguments: dict[str, Any] = {"path": FILE_KINDS[path.suffix], "data_files": str(path)}
    elif path.is_dir():
        kinds = {FILE_KINDS[file.suffix] for file in _files(path)}
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
    if streaming:
        arguments["streaming"] = True
    try:
        return datasets.load_dataset(**arguments, split=split)
    except StopIteration as error:  # what datasets makes of a JSON file without rows
        raise ValueError(f"{name} is empty: it has no row to train on") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = next(filter(None, map(_broken_line, _files(path))), "")
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        meant = hint(name, [*PRESETS, STDLIB_CODE]) if not path.exists() else ""
        raise ValueError(f"data.dataset: cannot read {name}, split {split!r}: {where or reason}{meant}") from error


def _check_text(name: str, rows: Any, column: str) -> None:
    """ValueError for a column of text and other things: `datasets` keeps such a column as JSON, and the text "5" would
    come back as 5.
    """
    if not isinstance((rows.features or {}).get(column), datasets.Json):
        return
    where = ""
    for path in _files(Path(name).expanduser()):
        with path.open(encoding="utf-8-sig") as file:
            found = (json.loads(line) for line in file if line.strip()) if path.suffix == ".jsonl" else json.load(file)
            other = next(
                ((n, row[column]) for n, row in enumerate(found) if not isinstance(row.get(column), str | None)), None
            )
        if other and not where:
            where = f", {path.name}, row {other[0]} (the first is 0): it is {type(other[1]).__name__} there"
    raise ValueError(
        f"{name}: the column {column} holds text and other things{where}; mend it, for texts would change on the way"
    )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in FILE_KINDS and file.is_file())
    return [path] if path.is_file() else []


def _broken_line(path: Path) -> str:
    """Which line of a .jsonl file is no JSON; empty if all are, or if it is another kind of file."""
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


def _columns(rows: Any) -> list[str]:
    """The names of the columns; of a stream that does not say, those of its first row."""
    if rows.column_names is not None:
        return list(rows.column_names)
    return list(next(iter(rows), {}))


def _digest(name: str, rows: Any) -> str:
    """Of the bytes of local files; of a hub dataset what `datasets` knows it by."""
    digest = hashlib.sha256()
    files = _files(Path(name).expanduser())
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(str(rows.split).encode() if files else rows._fingerprint.encode())
    return digest.hexdigest()


# --- made here --------------------------------------------------------------------------------------------------------


def _stdlib_code() -> Part:
    pairs = stdlib_code.pairs()
    columns = {name: [getattr(pair, name) for pair in pairs] for name in ("module", "prompt", "completion")}
    content = hashlib.sha256(json.dumps(columns).encode()).hexdigest()
    return Part(
        STDLIB_CODE, datasets.Dataset.from_dict(columns), "prompt_completion", {}, content=content, group="module"
    )


def _generate_part(name: str, settings: Data, seed: int) -> Part:
    entries, score = _generate(name, settings, seed)
    rows: list[Row] = [{"prompt": entry["question"], "completion": entry["answer"]} for entry in entries]
    answers = tuple((entry["answer"], partial(score, entry=entry)) for entry in entries)
    return Part(name, datasets.Dataset.from_list(rows), "prompt_completion", {}, answers=answers)


def _generate(dataset: str, settings: Data, seed: int) -> tuple[list[dict[str, Any]], Callable[..., float]]:
    """Entries of a reasoning-gym task (question, answer, metadata) and its score of an answer to an entry."""
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
    # Entry i is drawn with seed + i: without spreading the seeds, neighbouring ones would give nearly the same entries.
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
