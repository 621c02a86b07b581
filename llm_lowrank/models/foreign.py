"""A PEFT LoRA folder: the names of its files, and reading it one module at a time.

Read is any LoRA folder whose settings are all understood; everything else is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llm_lowrank.adapters.method import match_pattern
from llm_lowrank.numerics.files import file_sha256, read_object, stored_names
from llm_lowrank.numerics.pairs import Pairs

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ALL = "untruncated.safetensors"  # beside truncated WEIGHTS: all pairs of every module, scaling 1
TEMPLATE = "chat_template.jinja"  # beside CONFIG if the run had a template; transformers' name for it
DATE = "prompt_date.txt"  # beside CONFIG if the run's template writes the date: the day of its prompts, YYYY-MM-DD
PREFIX = "base_model.model."
TOKENS = ".token_adapter.trainable_tokens_delta"  # ends the key of the rows of some tokens
BASE = ".base_layer."  # in the key of a tensor that belongs to the layer under an adapter


@dataclass(frozen=True)
class Update:
    """An adapter's update of a weight, W + s B A; with a `magnitude` the rows get these lengths.

    DoRA: https://arxiv.org/abs/2402.09353 eq. 5
    """

    pairs: Pairs
    scaling: float
    magnitude: Tensor | None = None  # (m,)

    def change(self, w: Tensor) -> Tensor:
        """The matrix that is added to a float32 W, on its device: (m, n) -> (m, n)."""
        added = self.scaling * self.pairs.to(w.device, torch.float32).product()
        if self.magnitude is None:
            return added
        updated = w + added
        lengths = updated.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)  # (m,)
        return updated * (self.magnitude.to(w.device, torch.float32) / lengths)[:, None] - w


@dataclass(frozen=True)
class Lora:
    """A PEFT LoRA folder, read one module at a time."""

    path: Path
    modules: list[str]
    config: dict[str, Any]
    # tensor of the base -> its key in the file: those of modules that were trained as wholes, and the weight of an
    # adapted output layer, which PEFT saves and loads too
    bases: dict[str, str] = field(default_factory=dict)
    # embedding or output layer -> the tokens whose rows the file holds
    tokens: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> Lora:
        """Open a PEFT LoRA folder. Raise ValueError if something in it is missing, damaged or not understood."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise ValueError(f"{path} has no {CONFIG}: not a PEFT adapter folder")
        config = read_object(path / CONFIG)
        _refuse_unknown(path, config)
        if not (path / WEIGHTS).is_file():
            pickled = (
                " (adapter_model.bin is pickled: save it again with PEFT)"
                if (path / "adapter_model.bin").is_file()
                else ""
            )
            raise ValueError(f"{path} has no {WEIGHTS}{pickled}")
        stored = stored_names(path / WEIGHTS)
        bases = {key.removeprefix(PREFIX).replace(BASE, "."): key for key in stored if BASE in key}
        bases |= _whole(path, config, stored)
        tokens = _tokens(path, config, [key for key in stored if key.endswith(TOKENS)])
        keys = set(stored) - set(bases.values()) - {f"{PREFIX}{module}{TOKENS}" for module in tokens}
        parts = ["lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if config.get("use_dora") else [])]
        modules = sorted({key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in keys if ".lora_A." in key})
        strange = sorted(keys ^ {f"{PREFIX}{module}.{part}" for module in modules for part in parts})
        if strange or not modules:
            raise ValueError(
                f"{path / WEIGHTS} is not made of {' and '.join(parts)} of every module: see "
                f"{strange[:3] or 'no tensors'}; use PEFT's merge_and_unload instead"
            )
        if (path / ALL).is_file():
            with safe_open(path / ALL, framework="pt") as handle:
                if (handle.metadata() or {}).get("of") != file_sha256(path / WEIGHTS):
                    raise ValueError(
                        f"{path / ALL} belongs to another {WEIGHTS} than the one beside it; remove it to merge what is "
                        "there"
                    )
        return cls(path, modules, config, bases, tokens)

    def base(self, name: str) -> Tensor:
        """Read a tensor of `bases`, which takes the place of the base model's."""
        with safe_open(self.path / WEIGHTS, framework="pt") as handle:
            return handle.get_tensor(self.bases[name])

    def token_rows(self, module: str) -> Tensor:
        """Read the rows of `tokens` of an embedding or output layer: (t, n)."""
        with safe_open(self.path / WEIGHTS, framework="pt") as handle:
            rows = handle.get_tensor(f"{PREFIX}{module}{TOKENS}")
        if len(rows) != len(self.tokens[module]):
            raise ValueError(
                f"{self.path}: {module} has {len(rows)} rows of tokens, but {CONFIG} names {len(self.tokens[module])}"
            )
        return rows

    def update(self, module: str) -> Update:
        """Read the update of a module: the untruncated one, if there is one."""
        with safe_open(self.path / WEIGHTS, framework="pt") as handle:
            a, b = (handle.get_tensor(f"{PREFIX}{module}.lora_{letter}.weight") for letter in "AB")
            magnitude = (
                handle.get_tensor(f"{PREFIX}{module}.lora_magnitude_vector") if self.config.get("use_dora") else None
            )
        if (self.path / ALL).is_file():
            with safe_open(self.path / ALL, framework="pt") as handle:
                a, b = (handle.get_tensor(f"{PREFIX}{module}.lora_{letter}.weight") for letter in "AB")
            return Update(Pairs(b, a), 1.0, magnitude)
        pairs = Pairs(b, a)
        rank = match_pattern(self.config.get("rank_pattern") or {}, module, self.config["r"])
        alpha = match_pattern(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        if len(pairs) != rank:
            raise ValueError(f"{self.path}: {module} has {len(pairs)} pairs, but {CONFIG} says rank {rank}")
        return Update(pairs, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank), magnitude)


def _whole(path: Path, config: dict[str, Any], stored: Iterable[str]) -> dict[str, str]:
    """Return tensor -> its key, for the modules that modules_to_save names: PEFT takes all whose names end so."""
    named, found = config.get("modules_to_save") or [], dict[str, str]()
    plain = [key for key in stored if ".lora_" not in key and BASE not in key and not key.endswith(TOKENS)]
    for end in named:
        hits = {key.removeprefix(PREFIX): key for key in plain if f"{end}." in key}
        if not hits:
            raise ValueError(f"{path / WEIGHTS} holds no tensor of {end}, which modules_to_save of {CONFIG} names")
        found |= hits
    # with ensure_weight_tying the other end of the model is saved too, without being named
    return {key.removeprefix(PREFIX): key for key in plain} if named and config.get("ensure_weight_tying") else found


def _tokens(path: Path, config: dict[str, Any], keys: list[str]) -> dict[str, list[int]]:
    """Return module -> its tokens, for the keys that hold rows of tokens."""
    named = config.get("trainable_token_indices") or {}
    found: dict[str, list[int]] = {}
    for key in keys:
        module = key.removeprefix(PREFIX).removesuffix(TOKENS)
        by_name = named if isinstance(named, dict) else {module: named}
        tokens = next((ids for name, ids in by_name.items() if f".{module}".endswith(f".{name}")), None)
        if tokens is None:
            raise ValueError(f"{path}: trainable_token_indices of {CONFIG} does not say which tokens {key} belongs to")
        found[module] = [int(token) for token in tokens]
    if named and not found:
        raise ValueError(f"{path / WEIGHTS} holds no rows for trainable_token_indices of {CONFIG}")
    return found


# Settings of a LoRA config that are applied here; all others must be off.
UNDERSTOOD = {
    "peft_type",
    "init_lora_weights",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "modules_to_save",
}
NO_MATTER = {  # settings that do not change W + scaling B A
    *(
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "lora_dropout",
    ),
    # the tensors say which modules there are
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_config", "megatron_core", "runtime_config", "eva_config", "qalora_group_size", "ensure_weight_tying"),
}
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")  # other starting values are subtracted from the base


def _refuse_unknown(path: Path, config: dict[str, Any]) -> None:
    for name in ("r", "lora_alpha"):
        if config.get("peft_type") == "LORA" and not isinstance(config.get(name), int | float):
            raise ValueError(f"{path / CONFIG}: {name} is {config.get(name)!r}, not a number")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} is a PEFT adapter of type {config.get('peft_type')}; only LORA is read here")
    off: tuple[Any, ...] = (None, False, {}, [], "", "none")
    unknown = {key: value for key, value in config.items() if key not in UNDERSTOOD | NO_MATTER and value not in off}
    if unknown:
        what = ", ".join(f"{key}={json.dumps(value)}" for key, value in unknown.items())
        raise ValueError(f"{path}: it is not known here how to apply {what}; use PEFT's merge_and_unload instead")
    if (start := config.get("init_lora_weights", True)) not in KEEP_THE_BASE:
        raise ValueError(
            f"{path}: init_lora_weights={start!r} means that the base weights were changed too; convert it to a plain "
            "LoRA first (PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
