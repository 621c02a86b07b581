"""Files that are complete or absent: written under another name, flushed to disk, then renamed to the final name.

A run may be killed at any moment (time limit, preemption, full disk). A file with the final name is complete.
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
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def cache_dir() -> Path:
    """The folder that keeps reproducible files between runs: $LLM_LOWRANK_CACHE, or ~/.cache/llm_lowrank."""
    return Path(os.environ.get("LLM_LOWRANK_CACHE") or "~/.cache/llm_lowrank").expanduser()


def writable_folder(folder: Path) -> Path:
    """Return a folder of the cache, which is made if it is absent. OSError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
        reason = "no permission"
    except OSError as error:
        reason = error.strerror or str(error)
    raise OSError(
        f"the cache {folder} cannot be written ({reason}); set the environment variable LLM_LOWRANK_CACHE to a folder "
        "that can (and HF_HOME, where the hub's files go)"
    )


def check_writable(output: Path) -> None:
    """Raise OSError if nothing can be written to output_dir. Leave nothing behind, as the run may still be refused."""
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        raise OSError(f"output_dir: {output} cannot be written to: {error.strerror}") from error


@contextmanager
def write_aside(path: str | Path) -> Iterator[Path]:
    """Yield another name in the folder of `path`, to write to.

    At the end of the block the file is flushed to disk and renamed to `path`; after an exception it is removed.
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
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_object(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds, which has to be an object. ValueError names the file if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no JSON ({error}); download or write it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__} and no object; download or write it again")
    return content


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, complete or not at all."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, obj: Any) -> None:
    """Write a JSON file, complete or not at all."""
    write_text(path, json.dumps(obj, indent=2) + "\n")


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, complete or not at all."""
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    stream_safetensors(path, layout, tensors.__getitem__, metadata)


def stream_safetensors(
    path: str | Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor: Callable[[str], Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write one safetensors file, one tensor in memory at a time, so that a file may be larger than the memory.

    `layout` has the dtype and the shape of every tensor; tensor(name) returns the tensor when its turn has come.

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
    """The bytes of a tensor in row-major order, without a copy if it is on the CPU and contiguous."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def sha256(tensor: Tensor) -> str:
    """The SHA-256 of the tensor's bytes, a key under which results for this tensor may be cached."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def stored_names(path: str | Path) -> list[str]:
    """The names of the tensors in a safetensors file. Raise ValueError if the file is damaged or incomplete."""
    try:
        with safe_open(path, framework="pt") as handle:
            return list(handle.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); download or write it again") from error
