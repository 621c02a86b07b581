"""What the files in the output folder of a run say: metrics.jsonl, recipe.yaml and the adapter. See report.py."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import draccus
import yaml
from tqdm import tqdm

from llm_lowrank.adapters.method import Method
from llm_lowrank.data import Data
from llm_lowrank.models.foreign import Lora
from llm_lowrank.numerics.spectrum import effective_rank
from llm_lowrank.run.recipe import Recipe

METRICS, RECIPE = "metrics.jsonl", "recipe.yaml"


@dataclass(frozen=True)
class Learned:
    """What a module learned, from the singular values s of its change s B A."""

    effective_rank: float
    stable_rank: float  # sum s^2 / max s^2
    norm: float  # Frobenius
    pairs: int  # in the file

    @staticmethod
    def of(lora: Lora, module: str) -> Learned:
        """Read and decompose the update of a module."""
        update = lora.update(module)
        s = update.pairs.singular_values() * abs(update.scaling)
        energy = float(s.square().sum())
        largest = float(s.max()) if len(s) else 0.0
        stable = energy / largest**2 if largest else 0.0
        return Learned(effective_rank(s), stable, energy**0.5, len(update.pairs))


@dataclass(frozen=True)
class Results:
    """What the files of an output folder say."""

    folder: Path
    settings: dict[str, Any]  # dotted name -> value, of recipe.yaml
    defaults: dict[str, Any]  # the same of this method and these data, as they are today
    records: list[dict[str, Any]]
    learned: dict[str, Learned] = field(default_factory=dict)  # by module; empty without an adapter
    adapter: dict[str, Any] = field(default_factory=dict)  # adapter_config.json
    notes: list[str] = field(default_factory=list)  # what is missing or cannot be read

    def of(self, kind: str, *names: str) -> list[dict[str, Any]]:
        """The records of a kind that have these values."""
        return [r for r in self.records if r["kind"] == kind and all(name in r for name in names)]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `log_start` recorded at the last start; empty for a run of an older version."""
        found = self.of("run", "facts")
        return dict(found[-1]["facts"]) if found else {}

    @property
    def kept(self) -> dict[str, Any]:
        """What was recorded about the state that was kept, if the run chose one; empty otherwise."""
        found = self.of("kept", "why")
        return found[-1] if found else {}

    def evaluations(self, name: str) -> list[dict[str, Any]]:
        """The evaluations that have this value, at last that of what was exported."""
        found, kept = self.of("eval", name), self.of("kept", name)
        return found + kept[-1:]

    @property
    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        return {name: value for name, value in self.settings.items() if value != self.defaults.get(name)}

    @property
    def has_merged(self) -> bool:
        return (self.folder / "merged" / "config.json").is_file()


def read_results(folder: str | Path) -> Results:
    """Read an output folder. ValueError if it has no metrics; all else that is missing or damaged becomes a note."""
    folder = Path(folder).expanduser()
    if not (folder / METRICS).is_file():
        raise ValueError(f"{folder} has no {METRICS}: it is not the output folder of a run that began to train")
    notes: list[str] = []
    records = _records(folder / METRICS, notes)
    settings: dict[str, Any] = {}
    try:
        tree = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        settings = flat(tree) if isinstance(tree, dict) else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"the settings are not shown: {error}")
    learned: dict[str, Learned] = {}
    adapter: dict[str, Any] = {}
    if (folder / "adapter").is_dir():
        try:
            lora = Lora.open(folder / "adapter")
            adapter = lora.config
            order = _modules(records)
            modules = sorted(lora.modules, key=lambda module: order.get(module, len(order)))
            learned = {module: Learned.of(lora, module) for module in tqdm(modules, "report", leave=False)}
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            notes.append(f"the adapter is not shown: {error}")
    else:
        notes.append("there is no adapter: the run has not finished")
    return Results(folder, settings, defaults_of(settings), records, learned, adapter, notes)


def _records(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a killed run may have left half a line."""
    records, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            records.append({**record, "kind": str(record["kind"]), "step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            bad += 1
    if bad:
        notes.append(f"{bad} line(s) of {path.name} cannot be read and are left out")
    return records


def _modules(records: list[dict[str, Any]]) -> dict[str, int]:
    """The places of modules in the model, as far as they are recorded: the adapter has them by the alphabet."""
    found = [record["facts"].get("modules", []) for record in records if isinstance(record.get("facts"), dict)]
    return {module: at for at, module in enumerate(found[-1])} if found else {}


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names. What is free in its keys, such as data.task, is one setting."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        section = (not prefix and key in ("method", "data", "fsdp")) or f"{prefix}{key}" == "method.direction"
        found |= flat(value, f"{prefix}{key}.") if section and isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def defaults_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults beside which settings are shown: those of the recipe, of its method, and of its dataset."""
    tree = draccus.encode(Recipe())
    kind = settings.get("method.type")
    if kind in Method.get_known_choices():
        tree["method"] = {"type": kind, **draccus.encode(Method.get_choice_class(kind)())}
    dataset = settings.get("data.dataset")
    if isinstance(dataset, str) and dataset != tree["data"]["dataset"]:
        with contextlib.suppress(ValueError):
            tree["data"] = draccus.encode(Data(dataset=dataset))
            tree["data"].pop("dataset")  # is shown: nobody's default
    return flat(tree)
