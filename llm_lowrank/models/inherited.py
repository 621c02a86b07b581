"""Starting from an adapter: find a PEFT LoRA, check that it fits the run, and give its pairs to the run's layers.

    trained    A = A', B = B'                      the layers have the adapter's ranks and scales, W stays
    frozen     W <- W + s' B' A'                   if W holds small updates, that is, in float32
               the bank's last slots <- (s' / s) B', A'        otherwise; nothing is rounded

A', B' and s' are the adapter's, and s is the layer's. Either way the function at the start is that of the model with
the adapter, as PEFT loads it.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from llm_lowrank.adapters.adapter import Adapter, Inherited, PairAdapter, Place
from llm_lowrank.models.foreign import ALL, CONFIG, WEIGHTS, Lora
from llm_lowrank.models.source import Source, download_adapter
from llm_lowrank.numerics.files import file_sha256
from llm_lowrank.numerics.pairs import Pairs

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what float32 holds exactly


def open_adapter(name: str) -> Lora:
    """Open a PEFT LoRA: a folder, the output_dir of a run or a hub name. ValueError if it is none that can be read."""
    return Lora.open(_folder(name))


def adapter_digest(name: str) -> str:
    """Return a digest of an adapter's weights: the same after the adapter was moved or copied."""
    return file_sha256(_folder(name) / WEIGHTS)


def _folder(name: str) -> Path:
    """Return the folder of an adapter, downloaded if the name is one of the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        for folder in (path, path / "adapter"):
            if (folder / CONFIG).is_file():
                return folder.resolve()
        raise ValueError(f"{path} has no {CONFIG}, nor has {path / 'adapter'}: neither a PEFT adapter nor a run's")
    if path.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ValueError(f"{path} is no folder; give that of a PEFT adapter, the output_dir of a run or a hub name")
    folder = download_adapter(name, (CONFIG, WEIGHTS, ALL))
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{name} has no {WEIGHTS}; pickled weights are not read, save it again with PEFT")
    return folder


def check_base(lora: Lora, source: Source) -> None:
    """Raise ValueError if the adapter was trained on another model than this one.

    A folder that is still there is compared by its weights. Of other names the last part counts, as the same model may
    be on the hub and in a folder; a revision counts where both are on the hub.
    """
    named, revision = lora.config.get("base_model_name_or_path"), lora.config.get("revision") or ""
    if not isinstance(named, str) or not named:
        return  # names, shapes and ranks of the modules have been compared
    fits = Path(named).name.casefold() == Path(source.name).name.casefold()
    if (Path(named).expanduser() / "config.json").is_file():
        fits = Source.open(named).fingerprint == source.fingerprint
    elif named == source.name and revision != source.revision:
        raise ValueError(
            f"{lora.path} was trained on revision {revision or 'main'} of {named}, and this run trains "
            f"{source.revision or 'main'}; set --model_revision {revision or 'main'}"
        )
    if not fits:
        raise ValueError(
            f"{lora.path} was trained on {named}, and this run trains {source.name}; give the adapter's own model as "
            f"model_name_or_path. If both are the same weights, write {source.name} into {lora.path / CONFIG}, as "
            "base_model_name_or_path"
        )


def inherit(
    lora: Lora,
    model: nn.Module,
    adapters: Sequence[Adapter],
    *,
    role: Literal["trained", "frozen"],
    outer_name: Callable[[str], str] = str,
) -> None:
    """Give the adapter's pairs to the layers of its modules. Call before the layers have values.

    outer_name: the name of a module in the model that plain transformers loads. A layer that the adapter does not have
    starts as without it. ValueError names everything that does not fit, and what to set.
    """
    layers = {outer_name(adapter.name): adapter for adapter in adapters}
    errors = _refused(lora) or _misfits(lora, model, layers, role, outer_name)
    if errors:
        raise ValueError("\n".join(f"method.adapter: {error}" for error in errors))
    for module in lora.modules:
        layer = layers[module]
        assert isinstance(layer, PairAdapter)
        place: Place = "trained" if role == "trained" else "weight" if layer.codec.holds_small_updates else "bank"
        scale = None if role == "trained" else layer.scale
        layer.inherit(Inherited(partial(_read, lora, module, scale), len(lora.update(module).pairs), place))


def _read(lora: Lora, module: str, scale: float | None) -> Pairs:
    """Read the pairs of a module in float32, as they are, or with B such that `scale` B A is the update."""
    update = lora.update(module)
    pairs = update.pairs.to("cpu", torch.float32)
    return pairs if scale is None else pairs.scaled(update.scaling / scale)


def _refused(lora: Lora) -> list[str]:
    """What the adapter has beside plain pairs."""
    if lora.config.get("use_dora"):
        return [
            f"{lora.path} is a DoRA adapter, whose row lengths a run cannot start from; merge it (launch/merge.py) and "
            "start from the merged model"
        ]
    if lora.bases:
        return [
            f"{lora.path} brings weights of its own, {', '.join(sorted(lora.bases))}; merge it (launch/merge.py) and "
            "start from the merged model"
        ]
    if lora.tokens:
        return [
            f"{lora.path} brings rows of tokens, of {', '.join(sorted(lora.tokens))}, which a run cannot start from; "
            "merge it (launch/merge.py) and start from the merged model"
        ]
    if (lora.path / ALL).is_file():
        return [
            f"{lora.path / WEIGHTS} was cut down, and PEFT would load what is left; remove {ALL} beside it to start "
            "from that too, or merge it (launch/merge.py), which takes all, and start from the merged model"
        ]
    return []


def _misfits(
    lora: Lora, model: nn.Module, layers: Mapping[str, Adapter], role: str, outer_name: Callable[[str], str]
) -> list[str]:
    """What does not fit between the adapter and the layers, a sentence each."""
    if missing := [module for module in lora.modules if module not in layers]:
        known = {outer_name(name) for name, _ in model.named_modules()}
        if strange := [module for module in missing if module not in known]:
            return [f"{lora.path} adapts {_some(strange)}, which the model has not; is it the right base model?"]
        targets = sorted({module.rpartition(".")[2] for module in lora.modules})
        return [
            f"{lora.path} adapts {_some(missing)}, which this run does not adapt, so that a part of the adapter would "
            f"be lost; set --method.target_modules {','.join(targets)}"
        ]
    wrong: dict[str, list[str]] = defaultdict(list)  # what is wrong -> modules
    for module in lora.modules:
        layer, update = layers[module], lora.update(module)
        assert isinstance(layer, PairAdapter)
        pairs = update.pairs
        if pairs.shape != layer.shape:
            wrong[f"updates a {pairs.shape} weight, and the model's is {layer.shape}; is it the right base"].append(
                module
            )
            continue
        kinds = sorted({str(t.dtype).removeprefix("torch.") for t in (pairs.A, pairs.B) if t.dtype not in FLOATS})
        if kinds:
            wrong[f"is stored in {' and '.join(kinds)}, and float32, bfloat16 or float16 is read"].append(module)
        elif not (pairs.A.isfinite().all() and pairs.B.isfinite().all()):
            wrong["holds NaN or infinity"].append(module)
        if role == "trained" and len(pairs) != layer.rank:
            wrong[f"has rank {len(pairs)}, and here {layer.rank}; {_settings(lora)}"].append(module)
        elif role == "trained" and not math.isclose(update.scaling, layer.scale, rel_tol=1e-6):
            wrong[f"has the scale {update.scaling:g}, and here {layer.scale:g}; {_settings(lora)}"].append(module)
    return [f"{lora.path}: in {_some(modules)} it {what}" for what, modules in wrong.items()]


def _settings(lora: Lora) -> str:
    """The settings with which layers have the ranks and scales of an adapter."""
    config = lora.config
    given: dict[str, Any] = {"rank": config["r"], "alpha": config["lora_alpha"]}
    given["use_rslora"] = str(bool(config.get("use_rslora"))).lower()
    given |= {name: config[name] for name in ("rank_pattern", "alpha_pattern") if config.get(name)}
    said = (f"--method.{name} {_typed(value)}" for name, value in given.items())
    return f"set {' '.join(said)}, or adapter_role: frozen, which takes any rank and scale"


def _typed(value: Any) -> str:
    return f"'{json.dumps(value)}'" if isinstance(value, dict) else str(value)


def _some(names: Iterable[str]) -> str:
    """The first name, and how many more there are."""
    first, *others = names
    return first + (f" and {len(others)} more" if others else "")
