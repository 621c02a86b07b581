"""A run on disk, so that it can go on as if it had never stopped, on any engine and any number of ranks.

    checkpoints/step-000100/   state.json                  steps done, recipe, base, sha256 of the other files; written last
                               trained-00000.safetensors   float32 masters, moments, bank; one parameter's are all in one file
                               frozen.safetensors          ledger and waiting pairs of every adapter, and W applied to a probe
                               memory-00000.safetensors    what the method remembers; one adapter's is all in one file
                               random-00000.safetensors    a rank's random numbers
    checkpoints/LATEST         its name

Parameters are gathered one at a time; each rank copies its share of them, and a thread writes it beside the training. W
is not stored: it is read from the model's checkpoint again, the pairs with which the run started are taken out of it as
the ledger has them, and what came later is added as it was then. W applied to the probe must come out as it was saved:
another base, or a W that lost an update, is refused.

A folder is written aside and renamed when every rank has written its part, then LATEST is.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, Shared
from llm_lowrank.adapters.exchange import EXACT_DRIFT, ROUNDED_DRIFT, probe
from llm_lowrank.engines.base import Engine, Slot
from llm_lowrank.files import file_sha256, stored_names, sync, write_json, write_safetensors, write_text
from llm_lowrank.numerics.pairs import Block, Change, Pairs

FORMAT = 3  # 1: without skipped steps; memory in one file. 2: spans were called runs
FOLDER, LATEST, STATE = "checkpoints", "LATEST", "state.json"
LIBRARIES = ("torch", "transformers", "deepspeed", "bitsandbytes", "safetensors")


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What does not come from the model's checkpoint: everything beside W, and what layers share; each once."""
    for at, module in model.named_modules():
        if isinstance(module, Adapter | Shared):
            for name, p in module.named_parameters(recurse=False):
                if isinstance(module, Shared) or name not in (*module.part_names, "bias"):
                    yield f"{at}.{name}", p


# --- saving -----------------------------------------------------------------------------------------------------------


class Writing:
    """A checkpoint on its way: a thread writes this rank's files, out of copies, while the training goes on."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        aside: Path,
        files: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        keep: int,
    ) -> None:
        self.engine, self.folder, self.aside, self.files, self.state, self.keep = (
            engine,
            folder,
            aside,
            files,
            state,
            keep,
        )
        self.sums: dict[str, str] = {}
        self.error: Exception | None = None
        self.seconds = 0.0
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        began = time.perf_counter()
        try:
            for name, tensors in self.files.items():
                write_safetensors(self.aside / name, tensors)
                self.sums[name] = file_sha256(self.aside / name)
        except Exception as error:  # noqa: BLE001 - raised by finish
            self.error = error
        self.seconds = time.perf_counter() - began

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self.thread.is_alive()

    def finish(self) -> Path:
        """Waits for all ranks' files, then gives the folder its name and removes all but the newest.

        Collective; returns the folder.
        """
        try:
            with self.engine.together():
                self.thread.join()
                if self.error is not None:
                    raise self.error
            sums = self.engine.gather(self.sums)
            with self.engine.together():
                if self.engine.main:
                    self._complete({name: digest for part in sums for name, digest in part.items()})  # type: ignore[attr-defined]
        except BaseException:  # a full disk: what is half written would keep it full
            if self.engine.main:
                shutil.rmtree(self.aside, ignore_errors=True)
            raise
        return self.folder

    def _complete(self, sums: dict[str, str]) -> None:
        write_json(self.aside / STATE, self.state | {"files": dict(sorted(sums.items()))})
        shutil.rmtree(self.folder, ignore_errors=True)  # of an earlier attempt
        os.replace(self.aside, self.folder)
        sync(self.folder.parent)
        write_text(self.folder.parent / LATEST, self.folder.name + "\n")
        for old in complete_checkpoints(self.folder.parent.parent)[self.keep :]:
            shutil.rmtree(old)


def save(
    engine: Engine,
    model: nn.Module,
    adapters: Sequence[Adapter],
    output: Path,
    step: int,
    skipped: int,
    recipe: dict[str, Any],
    base: str,
    data: dict[str, int | str],
    keep: int,
) -> Writing:
    """Begins checkpoints/step-...: what comes back has copies of everything, and is to be finished. Collective."""
    folder = output / FOLDER / f"step-{step:06d}"
    aside = folder.with_name(f"{folder.name}.tmp")
    with engine.together():
        if engine.main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    trained: dict[str, Tensor] = {}
    memory: dict[str, Tensor] = {}
    for i, (name, p) in enumerate(adapter_parameters(model)):
        slot = engine.slot(p)
        if i % engine.world == engine.rank:
            trained |= _copies({name: slot.value} | {f"{name}#{k}": v for k, v in slot.moments.items()})
    for i, adapter in enumerate(adapters):
        whole = _whole_memory(adapter, engine)
        if i % engine.world == engine.rank:
            memory |= _copies({f"{adapter.name}#{key}": value for key, value in whole.items()})
    probes = {f"{a.name}#probe": engine.weight(a).matmul(probe(engine, a)) for a in adapters}
    mine = {"trained": trained, "memory": memory, "random": _random_state()}
    files = {f"{kind}-{engine.rank:05d}.safetensors": _some(tensors) for kind, tensors in mine.items()}
    if engine.main:
        frozen = {key: value for a in adapters for key, value in _ledger(a).items()}
        files["frozen.safetensors"] = _copies(frozen | probes)
    state = {
        "format": FORMAT,
        "step": step,
        "skipped": skipped,
        "world": engine.world,
        "engine": type(engine).__name__,
        "base": base,
        "recipe": recipe,
        "data": data,
        "spans": {a.name: dict(a.spans) for a in adapters},
        "taken": {a.name: a.taken for a in adapters},
        "versions": {name: _version(name) for name in LIBRARIES},
    }
    return Writing(engine, folder, aside, files, state, keep)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In host memory, where the training does not change them."""
    return {k: v.to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def _some(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A safetensors file holds something."""
    return tensors or {"#none": torch.zeros(1)}


def _ledger(adapter: Adapter) -> dict[str, Tensor]:
    """Entry i of the ledger as name#i.part, on rank 0."""
    entries: dict[str, Change] = {f"{i:04d}": entry for i, entry in enumerate(adapter.ledger)}
    if isinstance(adapter, PairAdapter) and adapter.reserve is not None:
        entries["reserve"] = adapter.reserve
    found: dict[str, Tensor] = {}
    for key, entry in entries.items():
        parts = {"B": entry.B, "A": entry.A} if isinstance(entry, Pairs) else vars(entry)
        found |= {f"{adapter.name}#{key}.{part}": value for part, value in parts.items() if isinstance(value, Tensor)}
    return found


def _whole_memory(adapter: Adapter, engine: Engine) -> dict[str, Tensor]:
    """What the method remembers, put together from all ranks' spans. Collective."""
    whole = {}
    for key, value in adapter.memory.items():
        along = adapter.spans.get(key)
        if along is None:
            whole[key] = value
        elif along == "W":
            part = engine.part(adapter)
            block = value.new_zeros(adapter.shape)
            block[part.rows] = value
            whole[key] = part.sum(block)
        else:
            span = engine.span(getattr(adapter, along))
            flat = value.new_zeros(whole_shape(getattr(adapter, along)).numel())
            flat[span.start : span.start + value.numel()] = value
            whole[key] = engine.sum(flat)
    return whole


def whole_shape(p: nn.Parameter) -> torch.Size:
    """Of the whole parameter: ZeRO-3 leaves an empty one."""
    return torch.Size(getattr(p, "ds_shape", p.shape))


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "none"


# --- finding ----------------------------------------------------------------------------------------------------------


def complete_checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, the newest first."""
    folders = [path for path in (output / FOLDER).glob("step-*") if path.suffix != ".tmp" and (path / STATE).is_file()]
    return sorted(folders, key=lambda path: path.name, reverse=True)


def newest(output: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and what was wrong with newer ones."""
    damaged: list[str] = []
    for folder in complete_checkpoints(output):
        try:
            return Checkpoint.open(folder), damaged
        except ValueError as error:
            damaged.append(str(error))
    return None, damaged


@dataclass(frozen=True)
class Checkpoint:
    """One that has been checked; nothing of it is in memory."""

    path: Path
    state: dict[str, Any]
    files: dict[str, Path]  # tensor -> file

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def skipped(self) -> int:
        """Steps among them that were left out: the optimizer has made so many fewer."""
        return int(self.state["skipped"])

    @classmethod
    def open(cls, path: Path, checked: bool = False) -> Checkpoint:
        """ValueError that names what is wrong with it.

        `checked`: another rank has read the files and compared their checksums.
        """
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            sums, form = state["files"], state["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no checkpoint: {STATE}: {error}") from None
        if form != FORMAT:
            raise ValueError(f"{path} has format {form}, this version reads {FORMAT}")
        files: dict[str, Path] = {}
        for name, expected in sums.items():
            file = path / name
            if Path(name).name != name:
                raise ValueError(f"{path / STATE} names {name}, which is not a file of this folder")
            if not file.is_file() or not (checked or file_sha256(file) == expected):
                raise ValueError(
                    f"{file} is missing or damaged (its sha256 is not that of {STATE}); use an earlier checkpoint"
                )
            if not name.startswith("random-"):
                files |= dict.fromkeys(stored_names(file), file)
        return cls(path, state, files)

    def tensor(self, name: str) -> Tensor:
        if name not in self.files:
            raise ValueError(f"{self.path} holds no {name}: it was written by another version, or for another model")
        with safe_open(self.files[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.files if name.startswith(prefix))

    def entry(self, adapter: Adapter, key: str) -> Change:
        """An entry of the ledger."""
        at = f"{adapter.name}#{key}."
        parts = {name.removeprefix(at): self.tensor(name) for name in self.names(at)}
        return Pairs(parts["B"], parts["A"]) if "B" in parts else Block(**parts, shape=adapter.shape)

    def starting_change(self, adapter: Adapter) -> Pairs | None:
        """What left W before it was encoded, with the sign that it left it: the first entry of the ledger, if the
        method took pairs.
        """
        entry = self.entry(adapter, "0000") if self.state["taken"].get(adapter.name) else None
        assert not isinstance(entry, Block)
        return entry

    def ledger(self, adapter: Adapter) -> list[Change]:
        at = f"{adapter.name}#"
        keys = {name.removeprefix(at).partition(".")[0] for name in self.names(at) if name[len(at)].isdigit()}
        return [self.entry(adapter, key) for key in sorted(keys)]


# --- going on ---------------------------------------------------------------------------------------------------------


def restore(engine: Engine, model: nn.Module, adapters: Sequence[Adapter], checkpoint: Checkpoint) -> None:
    """Everything but what loading gave already (W without its starting pairs, and the values beside it). Collective."""
    made = checkpoint.step - checkpoint.skipped
    if made:
        engine.prime(made)
    kept = engine.settings.kind.moments if made else ()  # an optimizer that has made no step has none
    for name, p in adapter_parameters(model):
        if p.requires_grad:
            moments = {k: checkpoint.tensor(f"{name}#{k}").to(engine.device) for k in kept}
            engine.put(p, Slot(checkpoint.tensor(name).to(engine.device), moments))
    for adapter in adapters:
        with engine.together():
            ledger = checkpoint.ledger(adapter)
            adapter.spans = dict(checkpoint.state["spans"][adapter.name])
            adapter.taken = int(checkpoint.state["taken"][adapter.name])
        _replay(engine, adapter, ledger)
        if engine.main:
            adapter.ledger = ledger
            if checkpoint.names(f"{adapter.name}#reserve."):
                assert isinstance(adapter, PairAdapter)
                reserve = checkpoint.entry(adapter, "reserve")
                assert isinstance(reserve, Pairs)
                adapter.reserve = reserve
        adapter.memory = _my_memory(engine, adapter, checkpoint)
        _check_weight(engine, adapter, checkpoint)
    file = checkpoint.path / f"random-{engine.rank:05d}.safetensors"
    if engine.world == checkpoint.state["world"] and file.is_file():
        with safe_open(file, framework="pt") as handle:
            torch.set_rng_state(handle.get_tensor("cpu"))
            if torch.cuda.is_available() and "cuda" in handle.keys():  # noqa: SIM118 - a handle is not iterable
                torch.cuda.set_rng_state(handle.get_tensor("cuda"))


def _replay(engine: Engine, adapter: Adapter, ledger: list[Change]) -> None:
    """W += what came after the start, one entry after the other, as it was added then. Local but for the end."""
    weight = engine.weight(adapter)
    for entry in ledger[adapter.taken :]:
        weight.add_(entry.to(engine.device))
    engine.release(4 * adapter.shape[0] * adapter.shape[1])


def _my_memory(engine: Engine, adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Tensor]:
    mine = {}
    at = f"{adapter.name}#"
    for name in checkpoint.names(at):
        key = name.removeprefix(at)
        if not checkpoint.files[name].name.startswith("memory-"):
            continue
        value, along = checkpoint.tensor(name).to(engine.device), adapter.spans.get(key)
        if along == "W":
            part = engine.part(adapter)
            value = part.mine_(value[part.rows].clone())
        elif along is not None:
            span = engine.span(getattr(adapter, along))
            value = value[span.start : span.start + span.value.numel()].clone()
        mine[key] = value
    return mine


def _check_weight(engine: Engine, adapter: Adapter, checkpoint: Checkpoint) -> None:
    """W applied to the probe is what it was."""
    wanted = checkpoint.tensor(f"{adapter.name}#probe").to(engine.device)
    apart = float(
        (engine.weight(adapter).matmul(probe(engine, adapter)) - wanted).norm() / wanted.norm().clamp_min(1e-30)
    )
    limit = EXACT_DRIFT if adapter.codec.holds_small_updates or not adapter.codec.writable else ROUNDED_DRIFT
    if not apart <= limit:
        raise ValueError(
            f"{checkpoint.path}: the weight of {adapter.name} is {apart:.1e} away from what it was when the checkpoint "
            "was written; is "
            "model_name_or_path the same model, and codec, dtype the same?"
        )
