"""Files that are either whole or not there: written aside, flushed to disk, then renamed over the final name.

A run may be killed at any moment (time limit, preemption, full disk). What carries the final name was complete when it
got it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {  # dtype names in a safetensors header
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def cache_dir() -> Path:
    """Where what can be made again is kept between runs."""
    return Path(os.environ.get("LLM_LOWRANK_CACHE", "~/.cache/llm_lowrank")).expanduser()


def check_writable(output: Path) -> None:
    """Raise OSError if nothing can be written to output_dir. Leaves nothing behind: the run may still be refused."""
    there = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        raise OSError(f"output_dir: {output} cannot be written to: {error.strerror}") from error


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to.

    Leaving the block syncs it and renames it to `path`; an exception removes it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Ask the system to put a file, or the entries of a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, obj: Any) -> None:
    write_text(path, json.dumps(obj, indent=2) + "\n")


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    stream_safetensors(path, layout, tensors.__getitem__, metadata)


def stream_safetensors(
    path: str | Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write one safetensors file asking for one tensor at a time, so that a file may be larger than the memory.

    The format: 8 bytes with the length of the header (little endian), the header (JSON, padded with blanks), then the
    tensors' bytes without gaps, wide dtypes first so that each tensor is aligned.
    https://github.com/huggingface/safetensors#format
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    for name in order:
        dtype, shape = layout[name]
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with write_aside(path) as aside, aside.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = tensor(name)
            assert (value.dtype, value.shape) == (layout[name][0], torch.Size(layout[name][1])), (
                name,
                value.dtype,
                value.shape,
            )
            out.write(raw_bytes(value))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; no copy if it lies so on the CPU already."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def sha256(tensor: Tensor) -> str:
    """Of the tensor's bytes: the key under which work on this tensor may be cached."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def stored_names(path: str | Path) -> list[str]:
    """The tensors of a safetensors file; a file that was cut short is noticed here."""
    try:
        with safe_open(path, framework="pt") as handle:
            return list(handle.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); download or write it again") from error
