"""Checkpoints of a run: it resumes as if it had never stopped, on any engine and any number of ranks.

    checkpoints/step-000100/
        state.json                  steps done, recipe, base, sha256 of the other files; written last
        trained-00000.safetensors   float32 masters, moments and bank; a parameter is in one file
        frozen.safetensors          ledger and waiting pairs of every adapter, and W applied to a probe
        memory-00000.safetensors    what the method remembers; an adapter is in one file
        random-00000.safetensors    the state of a rank's random numbers
    checkpoints/LATEST              the name of the newest checkpoint

Parameters are gathered one at a time. Each rank copies its share of them, and a thread writes the copies while training
continues. W is not stored: a resuming run reads W from the model's checkpoint again, takes out the starting pairs that
the ledger holds, and repeats the later updates one by one. W applied to the probe must then equal the saved result;
otherwise the base is another one or W lost an update, and the run is refused.

A folder is written under another name and renamed when every rank has written its files. LATEST is written after that.
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
from llm_lowrank.adapters.whole import Whole
from llm_lowrank.engines.base import Engine, Slot
from llm_lowrank.numerics.files import file_sha256, stored_names, sync, write_json, write_safetensors, write_text
from llm_lowrank.numerics.pairs import Block, Change, Pairs

# 1: without skipped steps; memory in one file. 2: spans were called runs. 3: without what tells a moved model and moved
# data from changed ones
FORMAT = 4
FOLDER, LATEST, STATE = "checkpoints", "LATEST", "state.json"
LIBRARIES = ("torch", "transformers", "deepspeed", "bitsandbytes", "safetensors")


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that the model's checkpoint does not hold, or not as they are now, each once.

    They are those of adapters, shared ones, and those of modules that are trained as wholes.
    """
    seen: set[nn.Parameter] = set()
    for at, module in model.named_modules():
        if isinstance(module, Adapter | Shared | Whole):
            for name, p in module.named_parameters(recurse=False):
                frozen = isinstance(module, Adapter) and name in (*module.part_names, "bias")
                if not frozen and p not in seen:
                    seen.add(p)
                    yield f"{at}.{name}", p


# --- saving -----------------------------------------------------------------------------------------------------------


class Writing:
    """A checkpoint that is being written: a thread writes this rank's files from copies while training continues."""

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        *,
        aside: Path,
        files: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        keep: int,
    ) -> None:
        self.engine, self.folder, self.aside = engine, folder, aside
        self.files, self.state, self.keep = files, state, keep
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
        except Exception as error:  # finish raises it
            self.error = error
        self.seconds = time.perf_counter() - began

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self.thread.is_alive()

    def finish(self) -> Path:
        """Wait for all ranks' files, give the folder its name, remove all but the newest and the best, and return it.

        Collective.
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
        except BaseException:  # perhaps a full disk, and half a checkpoint would keep it full
            if self.engine.main:
                shutil.rmtree(self.aside, ignore_errors=True)
            raise
        return self.folder

    def _complete(self, sums: dict[str, str]) -> None:
        write_json(self.aside / STATE, self.state | {"files": dict(sorted(sums.items()))})
        shutil.rmtree(self.folder, ignore_errors=True)  # an earlier attempt at this step
        os.replace(self.aside, self.folder)
        sync(self.folder.parent)
        write_text(self.folder.parent / LATEST, self.folder.name + "\n")
        best = folder_of(self.folder.parent.parent, (self.state["best"] or {"step": 0})["step"])
        # those behind this step are damaged, or this run would not have begun before them: they are not counted
        earlier = [path for path in complete_checkpoints(self.folder.parent.parent) if path.name <= self.folder.name]
        for old in earlier[self.keep :]:
            if old != best:
                shutil.rmtree(old)


def folder_of(output: Path, step: int) -> Path:
    """The checkpoint after so many steps of the run in an output folder."""
    return output / FOLDER / f"step-{step:06d}"


def save(
    engine: Engine,
    model: nn.Module,
    *,
    adapters: Sequence[Adapter],
    output: Path,
    step: int,
    skipped: int,
    recipe: dict[str, Any],
    base: str,
    data: dict[str, Any],
    keep: int,
    best: dict[str, Any] | None = None,
) -> Writing:
    """Copy the run's state and begin to write output/checkpoints/step-...; the caller calls `finish`. Collective.

    step: completed steps, `skipped` of them without an update. base, data: the fingerprint of the weights, and facts
    about model and data, which a resuming run compares. keep: the number of checkpoints that stay. best: what is to be
    known of the best state so far, with its step, whose checkpoint stays too.
    """
    folder = folder_of(output, step)
    aside = folder.with_name(f"{folder.name}.tmp")
    with engine.together():
        if engine.main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    # gathering is collective, one parameter at a time; each parameter is copied on one rank
    trained: dict[str, Tensor] = {}
    for i, (name, p) in enumerate(adapter_parameters(model)):
        slot = engine.slot(p)
        if i % engine.world == engine.rank:
            trained |= _copies({name: slot.value} | {f"{name}#{k}": v for k, v in slot.moments.items()})
    # so is what the method remembers of each adapter
    memory: dict[str, Tensor] = {}
    for i, adapter in enumerate(adapters):
        gathered = _whole_memory(adapter, engine)
        if i % engine.world == engine.rank:
            memory |= _copies({f"{adapter.name}#{key}": value for key, value in gathered.items()})
    probes = {f"{a.name}#probe": engine.weight(a).matmul(probe(engine, a)) for a in adapters}
    my_tensors = {"trained": trained, "memory": memory, "random": _random_state()}
    files = {f"{kind}-{engine.rank:05d}.safetensors": _or_filler(tensors) for kind, tensors in my_tensors.items()}
    # the ledger is only on rank 0
    if engine.main:
        frozen = {key: value for a in adapters for key, value in _ledger(a).items()}
        files["frozen.safetensors"] = _copies(frozen | probes)
    state = {
        "format": FORMAT,
        "step": step,
        "skipped": skipped,
        "best": best,
        "world": engine.world,
        "engine": type(engine).__name__,
        "base": base,
        "recipe": recipe,
        "data": data,
        "spans": {a.name: dict(a.spans) for a in adapters},
        "taken": {a.name: a.taken for a in adapters},
        "versions": {name: _version(name) for name in LIBRARIES},
    }
    return Writing(engine, folder, aside=aside, files=files, state=state, keep=keep)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, which training does not change."""
    return {k: v.to("cpu", copy=True).contiguous() for k, v in tensors.items()}


def _or_filler(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, or a filler if there are none: a safetensors file cannot be empty."""
    return tensors or {"#none": torch.zeros(1)}


def _ledger(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the ledger, on rank 0: those of entry i are named name#i.B, name#i.A, ..."""
    entries: dict[str, Change] = {f"{i:04d}": entry for i, entry in enumerate(adapter.ledger)}
    if isinstance(adapter, PairAdapter) and adapter.reserve is not None:
        entries["reserve"] = adapter.reserve
    tensors: dict[str, Tensor] = {}
    for key, entry in entries.items():
        fields = {"B": entry.B, "A": entry.A} if isinstance(entry, Pairs) else vars(entry)
        named = {f"{adapter.name}#{key}.{field}": value for field, value in fields.items()}
        tensors |= {name: value for name, value in named.items() if isinstance(value, Tensor)}
    return tensors


def _whole_memory(adapter: Adapter, engine: Engine) -> dict[str, Tensor]:
    """The adapter's memory, put together from all ranks' spans. Collective."""
    memory = {}
    for key, value in adapter.memory.items():
        along = adapter.spans.get(key)
        # the same on every rank; or my rows of W; or my span of a flattened parameter
        if along is None:
            memory[key] = value
        elif along == "W":
            part = engine.part(adapter)
            block = value.new_zeros(adapter.shape)
            block[part.rows] = value
            memory[key] = part.sum(block)
        else:
            span = engine.span(getattr(adapter, along))
            flat = value.new_zeros(whole_shape(getattr(adapter, along)).numel())
            flat[span.start : span.start + value.numel()] = value
            memory[key] = engine.sum(flat)
    return memory


def whole_shape(p: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter; under ZeRO-3 p itself is empty."""
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
    """The complete checkpoints of a run, the newest first."""
    folders = [path for path in (output / FOLDER).glob("step-*") if path.suffix != ".tmp" and (path / STATE).is_file()]
    return sorted(folders, key=lambda path: path.name, reverse=True)


def later_ones(output: Path, point: Path) -> list[Path]:
    """The complete checkpoints in an output folder that come after one which lies there too, the newest first."""
    if output.resolve() not in point.resolve().parents:
        return []
    return [path for path in complete_checkpoints(output) if path.name > point.name]


def newest(output: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest undamaged checkpoint, if there is one, and what is wrong with newer ones."""
    damaged: list[str] = []
    for folder in complete_checkpoints(output):
        try:
            return Checkpoint.open(folder), damaged
        except ValueError as error:
            damaged.append(str(error))
    return None, damaged


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been checked. Its tensors are read when they are asked for."""

    path: Path
    state: dict[str, Any]
    files: dict[str, Path]  # tensor -> file

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def skipped(self) -> int:
        """The number of skipped steps: the optimizer has made step - skipped updates."""
        return int(self.state["skipped"])

    @classmethod
    def open(cls, path: Path, checked: bool = False) -> Checkpoint:
        """Open a checkpoint and check its files. Raise ValueError that names what is wrong.

        `checked`: another rank has compared the files' checksums already.
        """
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            sums, form = state["files"], state["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no checkpoint: {STATE}: {error}") from None
        if form != FORMAT:
            raise ValueError(
                f"{path} has format {form}, this version reads {FORMAT}: resume with the version of llm-lowrank that "
                "wrote it, or start again in another output_dir"
            )
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
        """Read one entry of an adapter's ledger."""
        at = f"{adapter.name}#{key}."
        fields = {name.removeprefix(at): self.tensor(name) for name in self.names(at)}
        return Pairs(fields["B"], fields["A"]) if "B" in fields else Block(**fields, shape=adapter.shape)

    def starting_change(self, adapter: Adapter) -> Pairs | None:
        """The pairs that were added to W before it was encoded, which are the starting pairs with a minus.

        They are the first entry of the ledger; None if the method took no pairs.
        """
        entry = self.entry(adapter, "0000") if self.state["taken"].get(adapter.name) else None
        assert not isinstance(entry, Block)
        return entry

    def ledger(self, adapter: Adapter) -> list[Change]:
        """Read an adapter's ledger."""
        at = f"{adapter.name}#"
        keys = {name.removeprefix(at).partition(".")[0] for name in self.names(at) if name[len(at)].isdigit()}
        return [self.entry(adapter, key) for key in sorted(keys)]


# --- resuming ---------------------------------------------------------------------------------------------------------


def restore(engine: Engine, model: nn.Module, adapters: Sequence[Adapter], checkpoint: Checkpoint) -> None:
    """Restore what loading does not: moments, later updates of W, what the method remembers, random numbers.

    Loading has read W without its starting pairs and the trained values. Collective.
    """
    # trained values with their moments, into an optimizer that is primed to have made as many updates
    made = checkpoint.step - checkpoint.skipped
    if made:
        engine.prime(made)
    names = engine.settings.kind.moments if made else ()  # before its first update an optimizer has no moments
    for name, p in adapter_parameters(model):
        if p.requires_grad:
            moments = {k: checkpoint.tensor(f"{name}#{k}").to(engine.device) for k in names}
            engine.put(p, Slot(checkpoint.tensor(name).to(engine.device), moments))
    # W, the ledger and the memory of each adapter
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
        adapter.started()
    # random numbers, if every rank finds those of the same rank
    file = checkpoint.path / f"random-{engine.rank:05d}.safetensors"
    if engine.world == checkpoint.state["world"] and file.is_file():
        with safe_open(file, framework="pt") as handle:
            torch.set_rng_state(handle.get_tensor("cpu"))
            if torch.cuda.is_available() and "cuda" in handle.keys():  # noqa: SIM118 - a handle is not iterable
                torch.cuda.set_rng_state(handle.get_tensor("cuda"))


def _replay(engine: Engine, adapter: Adapter, ledger: list[Change]) -> None:
    """Add the entries of the ledger that came after the start to W, one by one, as they were added then."""
    weight = engine.weight(adapter)
    for entry in ledger[adapter.taken :]:
        weight.add_(entry.to(engine.device))
    engine.release(4 * adapter.shape[0] * adapter.shape[1])


def _my_memory(engine: Engine, adapter: Adapter, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """This rank's share of the adapter's memory, see Adapter.spans."""
    memory = {}
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
            span = engine.span(getattr(adapter, along))  # on the host, where the parameter is offloaded
            value = value[span.start : span.start + span.value.numel()].to(span.value.device, copy=True)
        memory[key] = value
    return memory


def _check_weight(engine: Engine, adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Raise ValueError unless W applied to the probe gives what it gave when the checkpoint was written."""
    wanted = checkpoint.tensor(f"{adapter.name}#probe").to(engine.device)
    answer = engine.weight(adapter).matmul(probe(engine, adapter))
    apart = float((answer - wanted).norm() / wanted.norm().clamp_min(1e-30))
    limit = EXACT_DRIFT if adapter.codec.holds_small_updates or not adapter.codec.writable else ROUNDED_DRIFT
    if not apart <= limit:
        raise ValueError(
            f"{checkpoint.path}: the weight of {adapter.name} is {apart:.1e} away from what it was when the checkpoint "
            "was written; is model_name_or_path the same model, and codec, dtype the same?"
        )
