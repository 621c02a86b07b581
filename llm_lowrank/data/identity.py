"""What a run is trained on, told by its content: the same after files were moved or copied, another after a change."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from transformers import PreTrainedTokenizerBase

from llm_lowrank.data.corpus import Corpus, ExampleTable
from llm_lowrank.data.finding import VERSIONS
from llm_lowrank.data.sources import FileRows
from llm_lowrank.data.streaming import Stream

WHOLE = 2**24  # bytes; a larger file of a stream is known by its size and by as many bytes, in STRETCHES
STRETCHES = 256
OF_CONTENT = ("etag", "md5hash", "blob_id")  # marks that a remote file keeps when it is copied
# Two tokenizers with the same vocabulary may still cut this text in different ways.
PROBE = (
    "Ünïcode and  ASCII,\n\tnumb3rs 1234567 + 89.01 = ?\r\nif x_1 >= 2:\n    return 'naïve' 東京 🙂 </s> <|end|> don't"
)


def identity_of(corpus: Corpus) -> dict[str, Any]:
    """Return digests of the examples of each dataset, and of the split into what is trained and what is held out.

    OSError or ValueError if a file of a stream cannot be read.
    """
    if isinstance(corpus.train, Stream):
        return {"examples": [stream_digest(corpus.train)], "split": ""}  # the seed alone decides the split of a stream
    # Keys may come from a column that is not in the tokens.
    split = hashlib.sha256()
    for part in (corpus.train, corpus.held_out):
        assert isinstance(part, ExampleTable)
        split.update("\n".join([*part.keys, "", ""]).encode())
    return {"examples": list(corpus.digests), "split": split.hexdigest()}


def stream_digest(stream: Stream) -> str:
    """Return a digest of the files of a stream and of how its rows are read. The rows themselves are not read.

    Local files are told by bytes. Remote files are told by the mark of their version that the place gives them.
    """
    rows = stream.rows
    assert isinstance(rows, FileRows)
    said = {name: stream.options[name] for name in ("format", "columns", "style")}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for piece in rows.pieces:
        for file in piece.files:
            digest.update(f"{file.kind} {file.separator} {_file_digest(file.path)}".encode())
        digest.update(f"{piece.start} {piece.stop};".encode())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the vocabulary, of the tokens that begin and end a text, and of how a text is cut.

    The chat template is not in it. Files that were saved again by another version give the same digest.
    """
    said = [
        sorted(tokenizer.get_vocab().items()),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer(PROBE)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _file_digest(path: str) -> str:
    if "://" in path:
        return _remote_digest(path)
    with Path(path).open("rb") as file:
        digest = hashlib.sha256(str(size := file.seek(0, 2)).encode())
        for stretch in stretches(size, WHOLE, STRETCHES):
            digest.update(_bytes(file, *stretch))
    return digest.hexdigest()


def stretches(size: int, budget: int, count: int) -> list[tuple[int, int]]:
    """Return (start, length) of stretches of `size` bytes: all of them if they are at most `budget`, otherwise `count`
    of them at equal distances, the first and the last bytes among them.
    """
    if size <= budget:
        return [(0, size)]
    length = max(1, budget // count)
    return [(number * (size - length) // (count - 1), length) for number in range(count)]


def _bytes(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _remote_digest(path: str) -> str:
    if path.startswith("hf://") and "@" in path:
        return path  # names the commit
    system, inner = fsspec.core.url_to_fs(path)
    info = {str(name).lower(): value for name, value in system.info(inner).items() if value}
    marks = {name: str(info[name]) for name in OF_CONTENT if name in info}
    if not marks:
        marks = {"path": path, **{name: str(info[name]) for name in VERSIONS if name in info}}
    return json.dumps({"size": info.get("size"), **marks}, sort_keys=True)
