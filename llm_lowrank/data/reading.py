"""From the bytes of a file to its rows, as plain Python values.

    JSON            .jsonl .ndjson .json   one object a line, or one list of objects
    CSV             .csv .tsv              a header, then cells that are all text
    Parquet, Arrow  .parquet .arrow        columns that have types

No type is inferred: a JSON value is the value that the file says, and a cell of a table of text is text. A row is
therefore the same whatever stands in other rows and other files. What cannot be read is a ValueError that names the
file, the row and, where there are lines, the line. JSON and CSV files may be compressed (.gz .bz2 .xz .zst).
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

Row = dict[str, Any]
Lined = tuple[int, Row]  # the line on which a row begins, the first is 1; 0 where the format has no lines
KINDS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
TYPED = ("Parquet", "Arrow")
COMPRESSED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda raw: io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")),
}
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
SIGNS = {  # how files begin that are something else than rows -> what they are, and what to do
    b"version https://git-lfs": "a pointer of Git LFS in the place of the file; fetch it: git lfs pull",
    b"\x1f\x8b": "compressed with gzip; give it a name that ends in .gz",
    b"BZh": "compressed with bzip2; give it a name that ends in .bz2",
    b"\xfd7zXZ": "compressed with xz; give it a name that ends in .xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstandard; give it a name that ends in .zst",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or export it as .csv or .jsonl",
    b"PAR1": "a Parquet file; give it a name that ends in .parquet",
    b"ARROW1": "an Arrow file; give it a name that ends in .arrow",
    b"<!DOCTYPE": "a web page in the place of the file; download the file itself",
    b"<html": "a web page in the place of the file; download the file itself",
}
OWN_SIGNS = {"Parquet": b"PAR1", "Arrow": b"ARROW1"}
MAC = "its lines end with a carriage return alone; convert it: tr '\\r' '\\n' < OLD > NEW"
CHUNK = 1 << 20  # bytes of a list of objects that are read at a time
ROWS = 1000  # rows of a typed file that are turned to Python values at a time
NO_JSON = "this is no JSON: "
MEND = "mend or remove it"


@dataclass(frozen=True)
class File:
    """A file with rows."""

    name: str  # as messages give it
    path: str  # a local path or a URL of fsspec
    separator: str = ""  # of the cells of a table of text; empty: by the name

    @property
    def kind(self) -> str:
        """A value of KINDS; empty if files of this name are not read."""
        return kind_of(self.name)

    def open(self) -> BinaryIO:
        """Open for reading, decompressed."""
        raw = fsspec.open(self.path, "rb").open() if "://" in self.path else io.BufferedReader(io.FileIO(self.path))
        decompress = COMPRESSED.get(PurePosixPath(self.name.lower()).suffix)
        return cast(BinaryIO, decompress(raw) if decompress else raw)

    def place(self, row: int, line: int = 0) -> str:
        """Return where a row stands, for a message. row: in this file, from 0. line: from 1, 0 if there are none."""
        return f"{f'line {line} of ' if line else ''}{self.name}, row {row} (the first is 0)"


def kind_of(name: str) -> str:
    """Return which of KINDS a file of this name is; empty if it is none."""
    path = PurePosixPath(name.lower())
    if path.suffix in COMPRESSED:
        inner = KINDS.get(PurePosixPath(path.stem).suffix, "")
        return "" if inner in TYPED else inner
    return KINDS.get(path.suffix, "")


def read(file: File) -> Iterator[Lined]:
    """Yield the rows of a file with their lines. ValueError if the file or one of its rows cannot be read."""
    try:
        _check_sign(file)
        yield from _READERS[file.kind](file)
    except DAMAGE as error:
        raise ValueError(f"{file.name}: {damage(error)}") from error


def _check_sign(file: File) -> None:
    """Check that a file does not begin like a file of another kind. ValueError says what it is."""
    with file.open() as stream:
        head = stream.read(32)
    for sign, what in SIGNS.items():
        if head.startswith(sign) and sign != OWN_SIGNS.get(file.kind):
            raise ValueError(f"{file.name} is {what}")


def damage(error: BaseException) -> str:
    """Return why a file cannot be read, and what to do."""
    if isinstance(error, OSError) and error.strerror:
        return f"it cannot be opened ({error.strerror}); check the path and the permissions"
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return f"it is damaged, cut off or not what its name says ({reason}); write or download it again"


def survey(file: File) -> tuple[list[str], int]:
    """Return the names of all columns of a file, in the order in which they appear, and the number of its rows."""
    if file.kind == "Parquet":
        names_of_parquet = schema(file).names
        with file.open() as stream:
            return names_of_parquet, int(pq.ParquetFile(stream).metadata.num_rows)
    names: dict[str, None] = dict.fromkeys(schema(file).names) if file.kind == "Arrow" else {}
    count = 0
    for _, row in read(file):
        names.update(dict.fromkeys(row))
        count += 1
    return list(names), count


# --- JSON -------------------------------------------------------------------------------------------------------------


def _read_json(file: File) -> Iterator[Lined]:
    head = _head(file)
    yield from _json_list(file) if head.lstrip()[:1] == b"[" else _json_lines(file)


def _json_lines(file: File) -> Iterator[Lined]:
    row = 0
    with file.open() as stream:
        for line, raw in enumerate(stream, 1):
            if not raw.removeprefix(codecs.BOM_UTF8 if line == 1 else b"").strip():
                continue
            try:
                text = decoded(raw, line)
                yield line, _object_of(_value(text), text)
            except (ValueError, RecursionError) as error:
                ending = "" if raw.endswith(b"\n") else ", the last one, which may have been cut off"
                why = _reason(error)
                if isinstance(error, json.JSONDecodeError) and not ending and error.pos >= len(error.doc.rstrip()):
                    why += "; an object stands on one line, or all objects stand in one list"
                if b"\r" in raw.rstrip():
                    why += f"; {MAC}"
                raise ValueError(f"{file.place(row, line)}{ending}: {why}; {MEND}") from error
            row += 1


def _json_list(file: File) -> Iterator[Lined]:
    row = 0
    with file.open() as stream:
        window = _Window(stream)
        try:
            window.take("[")
            more = window.next() != "]"
            while more:
                window.next()
                line = window.line
                value, text = window.value()
                yield line, _object_of(value, text)
                row += 1
                more = window.next() == ","
                if more:
                    window.take(",")
            window.take("]")
            if window.next():
                raise ValueError("something follows the list")
        except (ValueError, RecursionError) as error:
            ending = ", the last one, which may have been cut off" if window.done and not window.next() else ""
            raise ValueError(f"{file.place(row, window.line)}{ending}: {_reason(error)}; {MEND}") from error


class _Window:
    """The stretch of a long JSON text that is in memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.decoder = stream, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at = "", 0  # what lies before `at` was read
        self.line = 1  # of text[at]
        self.done = False  # nothing is left in the stream

    def more(self, size: int) -> None:
        """Let go of what was read and add `size` bytes."""
        raw = self.stream.read(size)
        self.text, self.at, self.done = self.text[self.at :] + self.decoder.decode(raw, not raw), 0, not raw

    def go_to(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def next(self) -> str:
        """Go to the next character that is no white space and return it; empty at the end."""
        while True:
            self.go_to(_next(self.text, self.at))
            if self.at < len(self.text):
                return self.text[self.at]
            if self.done:
                return ""
            self.more(CHUNK)

    def take(self, wanted: str) -> None:
        """Go behind the next character. ValueError if it is not the wanted one."""
        found = self.next()
        if found != wanted:
            raise ValueError(f"{wanted!r} is expected and {repr(found) if found else 'the end of the file'} is there")
        self.go_to(self.at + 1)

    def value(self) -> tuple[Any, str]:
        """Go behind the next value. Return it with its text."""
        size = CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self.done:
                    cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text.rstrip())
                    self.go_to(len(self.text) if cut else error.pos)
                    raise ValueError(f"{NO_JSON}{error.msg.removesuffix(' at')}") from error
            else:
                if end < len(self.text) or self.done:
                    text = self.text[self.at : end]
                    self.go_to(end)
                    return value, text
            self.more(size)  # the value may go on behind the window
            size *= 2


def parse(text: str) -> Any:
    """Return the value of a JSON text. ValueError says why there is none."""
    try:
        return _whole(_value(text), text)
    except (ValueError, RecursionError) as error:
        raise ValueError(_reason(error)) from error


def _value(text: str) -> Any:
    value, end = _DECODER.raw_decode(text, _next(text, 0))
    if _next(text, end) != len(text):
        raise json.JSONDecodeError("something follows the value", text, end)
    return value


def _object(pairs: list[tuple[str, Any]]) -> Row:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_SPACE = re.compile(r"[ \t\r\n]*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _next(text: str, at: int) -> int:
    """Return the position of the next character that is no white space of JSON."""
    return _SPACE.match(text, at).end()  # type: ignore[union-attr] # it matches nothing, too


def _object_of(value: Any, text: str) -> Row:
    """Return a row that was read from `text`. ValueError if it is no object of characters."""
    if not isinstance(value, dict):
        raise ValueError(f"it is {type(value).__name__}, and a row is an object {{column: value}}")
    return cast(Row, _whole(value, text))


def _whole(value: Any, text: str) -> Any:
    """Return a value that was read from `text`. ValueError if it holds half of a surrogate pair."""
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(f"it holds half of a surrogate pair, {half}, which is no character") from error
    return value


def _reason(error: BaseException) -> str:
    """Return why a piece of text is no JSON."""
    if isinstance(error, json.JSONDecodeError):
        return f"{NO_JSON}{error.msg.removesuffix(' at')} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(error)
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if str(error).startswith("Exceeds the limit"):  # of Python
        return "it holds a number of thousands of digits"
    return str(error)


# --- tables of text ---------------------------------------------------------------------------------------------------


def _read_csv(file: File) -> Iterator[Lined]:
    _head(file)
    csv.field_size_limit(sys.maxsize)
    separator = file.separator or ("\t" if ".tsv" in PurePosixPath(file.name.lower()).suffixes[-2:] else ",")
    row, line = 0, 1
    with file.open() as stream:
        rows = csv.reader(_decoded_lines(stream), delimiter=separator, strict=True)
        try:
            header = next(filter(None, rows), [])
            _check_header(header)
            line = rows.line_num + 1
            for cells in rows:
                if cells:
                    if len(cells) != len(header):
                        raise ValueError(f"it has {len(cells)} cells and the header {len(header)}")
                    yield line, dict(zip(header, cells, strict=True))
                    row += 1
                line = rows.line_num + 1
        except (ValueError, csv.Error) as error:
            where = file.place(row, line) if line > 1 else f"line 1 of {file.name}"
            why = _not_utf8(error) if isinstance(error, UnicodeDecodeError) else str(error)
            if isinstance(error, csv.Error):
                why = f"the cells cannot be told apart ({error}); a cell with quotation marks, separators or line ends"
                why += ' stands in quotation marks, and each of its own is written ""'
                why = MAC if str(error).startswith("new-line character") else why
            raise ValueError(f"{where}: {why}; {MEND}") from error


def _check_header(header: list[str]) -> None:
    if len(header) == 1:
        other = next((sign for sign in ";\t|," if sign in header[0]), "")
        if other:
            raise ValueError(
                f"the header is one cell, {header[0]!r}; the cells of a .csv file are separated by commas, those of a "
                ".tsv file by tabs"
            )
    for name in header:
        if not name:
            raise ValueError("the header has a cell without a name")
        if header.count(name) > 1:
            raise ValueError(f"the header has the column {name!r} twice")


def _decoded_lines(stream: Iterable[bytes]) -> Iterator[str]:
    for line, raw in enumerate(stream, 1):
        yield decoded(raw, line)


# --- encodings --------------------------------------------------------------------------------------------------------


def decoded(raw: bytes, line: int) -> str:
    """Return a line as text, without the byte order mark that the first line may have."""
    return raw.removeprefix(codecs.BOM_UTF8).decode() if line == 1 else raw.decode()


def _head(file: File) -> bytes:
    """Return the beginning of a text file without its byte order mark. ValueError if it is UTF-16 or UTF-32."""
    with file.open() as stream:
        head = stream.read(1 << 16)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
        wide = "UTF-32" if b"\0\0" in head[:6] else "UTF-16"
        raise ValueError(
            f"{file.name} is {wide}, and text is read as UTF-8; convert it: iconv -f {wide} -t UTF-8 OLD > NEW"
        )
    return head.removeprefix(codecs.BOM_UTF8)


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start] if isinstance(error.object, bytes) else 0
    return (
        f"this is not utf-8 (byte 0x{byte:02x}); convert the file from its encoding, for example iconv -f ISO-8859-1 "
        "-t UTF-8 OLD > NEW"
    )


# --- typed files ------------------------------------------------------------------------------------------------------


def schema(file: File) -> pa.Schema:
    """Return the columns of a Parquet or Arrow file with their types. ValueError if the file cannot be read."""
    try:
        _check_sign(file)
        with file.open() as stream:
            found = pq.ParquetFile(stream).schema_arrow if file.kind == "Parquet" else _arrow_batches(stream)[0]
    except DAMAGE as error:
        raise ValueError(f"{file.name}: {damage(error)}") from error
    twice = {name for name in found.names if found.names.count(name) > 1}
    if twice:
        raise ValueError(f"{file.name}: it has the column {min(twice)!r} twice; {MEND}")
    return found


def features(file: File, columns: pa.Schema) -> datasets.Features:
    """Return the columns of a file as features of `datasets`. ValueError names a column whose type has none."""
    try:
        return datasets.Features.from_arrow_schema(columns)
    except ValueError:
        for field in columns:
            try:
                datasets.Features.from_arrow_schema(pa.schema([field]))
            except ValueError as error:
                raise ValueError(
                    f"{file.name}: the column {field.name} holds {field.type}, which is not read; write it as text, as "
                    "a list or as an object"
                ) from error
        raise


def _read_typed(file: File) -> Iterator[Lined]:
    row = 0
    columns = schema(file)
    decoders = {name: decode for name, feature in features(file, columns).items() if (decode := _decoder(feature))}
    with file.open() as stream:
        parquet = file.kind == "Parquet"
        batches = pq.ParquetFile(stream).iter_batches(batch_size=ROWS) if parquet else _arrow_batches(stream)[1]
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS):
                try:
                    for value in batch.slice(start, ROWS).to_pylist():
                        for name, decode in decoders.items():
                            value[name] = decode(value[name])
                        yield 0, value
                        row += 1
                except ValueError as error:
                    raise ValueError(f"{file.place(row)}, or soon after it: {_reason(error)}; {MEND}") from error


def _arrow_batches(stream: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Return the schema and the batches of an Arrow file: a stream, as `datasets` writes it, or a Feather file."""
    magic = stream.read(6)
    stream.seek(0)
    if magic == b"ARROW1":
        file = pa.ipc.open_file(stream)
        return file.schema, (file.get_batch(k) for k in range(file.num_record_batches))
    reader = pa.ipc.open_stream(stream)
    return reader.schema, iter(reader)


def _decoder(feature: Any) -> Callable[[Any], Any] | None:
    """Return what turns a stored value to the value of a feature of `datasets`; None if they are the same.

    A feature Json, at any depth, is stored as JSON text. An object has the keys of all objects in its place, such as
    the arguments of every call of a tool; those that are null are not its own.
    """
    if isinstance(feature, datasets.Json):
        return lambda value: None if value is None else parse(value)
    if isinstance(feature, datasets.List | datasets.LargeList) and (inner := _decoder(feature.feature)):
        return lambda values: None if values is None else [inner(value) for value in values]
    if isinstance(feature, dict):
        fields = {name: decode for name, part in feature.items() if (decode := _decoder(part))}
        return lambda value: (
            None
            if value is None
            else {
                name: fields[name](part) if name in fields else part for name, part in value.items() if part is not None
            }
        )
    return None


_READERS: dict[str, Callable[[File], Iterator[Lined]]] = {
    "JSON": _read_json,
    "CSV": _read_csv,
    "Parquet": _read_typed,
    "Arrow": _read_typed,
}
