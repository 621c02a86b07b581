"""The adapter of a run as a plain PEFT LoRA over the untouched base.

    trained layer = W0 + sum(ledger) + s B A + s bank_B bank_A          (other adapters: W0 + sum(ledger) + `change`)

Whatever a method did to W, to the pairs or to the bank, the sum of all changes of W0 is one low-rank matrix.
`save_adapter` writes this matrix as LoRA factors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter
from llm_lowrank.adapters.method import Method
from llm_lowrank.adapters.tokens import TokenRows
from llm_lowrank.adapters.whole import Whole
from llm_lowrank.engines.base import Engine
from llm_lowrank.models.foreign import ALL, CONFIG, PREFIX, TOKENS, WEIGHTS
from llm_lowrank.models.vocabulary import token_rows
from llm_lowrank.models.whole import whole_modules
from llm_lowrank.numerics.files import file_sha256, write_json, write_safetensors
from llm_lowrank.numerics.pairs import Pairs

PEFT_VERSION = "0.21.2"  # whose format is written
# the values that vLLM's --max-lora-rank may have, as vllm/config/lora.py says
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class SavedAdapter:
    """The report of an exported adapter."""

    path: Path
    rank: int  # of every factor in the file
    ranks: dict[str, int]  # module -> pairs that its change needs
    error: float  # the largest |dropped| / |change| of a module, from compression
    in_vllm: str  # the option with which vLLM takes it, or why it does not
    tokens: int = 0  # whose rows are in the file too
    whole: int = 0  # modules whose weights are in the file too

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        needs = f"{high}" if low == high else f"{low} to {high}"
        cut = f"; CUT DOWN: {ALL} beside it has all, and merging uses that" if high > self.rank else ""
        lora = f"PEFT LoRA of rank {self.rank} over {len(self.ranks)} modules"
        rows = f", rows of {self.tokens} tokens" if self.tokens else ""
        rows += f", {self.whole} whole modules" if self.whole else ""
        return f"{self.path}: {lora} (exact rank {needs}, dropped {self.error:.1e}{cut}){rows}; {self.in_vllm}"


def in_vllm(config: Mapping[str, Any]) -> str:
    """The option with which vLLM takes an adapter, or why it does not. config: PEFT's, of the adapter."""
    reasons = {
        "use_dora": "vLLM does not serve DoRA adapters: serve the merged model",
        "trainable_token_indices": "vLLM serves no adapter with rows of tokens: serve the merged model",
        "modules_to_save": "vLLM serves no adapter with whole modules: serve the merged model",
    }
    if reason := next((reason for key, reason in reasons.items() if config.get(key)), None):
        return reason
    option = next((most for most in VLLM_RANKS if most >= config["r"]), None)
    if option is None:
        return f"vLLM serves no rank above {VLLM_RANKS[-1]}: serve the merged model"
    return f"for vLLM: --max-lora-rank {option}"


def delta(engine: Engine, adapter: Adapter) -> Pairs | None:
    """Return sum(ledger) + the adapter's change with as few pairs as possible on rank 0, None elsewhere.

    Collective.
    """
    change = _change(engine, adapter)
    return change.compress()[0] if change is not None else None


def save_adapter(
    engine: Engine,
    adapters: Sequence[Adapter],
    *,
    method: Method,
    path: str | Path,
    base_model_name_or_path: str,
    revision: str = "",
    outer_name: Callable[[str], str] = str,
    model: nn.Module | None = None,
) -> SavedAdapter | None:
    """Write a PEFT LoRA folder on rank 0 and return a report there; return None elsewhere. Collective.

    revision: of a base model of the hub. outer_name: the name of a module in the model that plain transformers loads,
    where that is not the trained one. model: the one that the engine was given. Its trained rows of tokens are written
    as PEFT's trainable tokens, and the modules that are trained as wholes under its modules_to_save.

    Every module has the same rank and the same scaling, lora_alpha / r. PEFT could read others, but vLLM applies one
    scaling to all modules, and llama.cpp lora_alpha over the rank of each module: neither reads patterns or use_rslora.

    Adapters that never froze a pair are written as they were trained if the method has one scale for all of them and no
    `export_rank`. With other scales s is folded into B and the scaling is 1. Otherwise the change of every module is
    written as balanced factors, scaling 1, of the largest rank that a module needs, at most `method.export_rank`.
    Modules that need less are padded with pairs of zeros, where another module needs it even beyond min(m, n). If ranks
    were truncated, ALL holds the untruncated pairs.
    """
    rows, whole = (None, {}) if model is None else (token_rows(model), whole_modules(model))
    # all ranks must agree, but only rank 0 has the ledgers
    only_pairs = all(engine.gather(all(adapter.only_pairs and not adapter.ledger for adapter in adapters)))
    as_trained = only_pairs and method.one_scale and not method.export_rank
    # gathering is collective, one adapter at a time; the factors are on rank 0
    factors: dict[str, Pairs] = {}
    extras: dict[str, Tensor] = {}
    error = 0.0
    for adapter in adapters:
        name = outer_name(adapter.name)
        found = _trained_pairs(engine, adapter) if only_pairs else _change(engine, adapter)
        tensors = adapter.extras(engine.whole) if only_pairs else {}
        if found is None:
            continue
        extras |= {f"{PREFIX}{name}.{k}": v.cpu() for k, v in tensors.items()}
        if only_pairs and not method.export_rank:
            factors[name] = found if as_trained else found.scaled(adapter.scale)
            continue
        change = found.scaled(adapter.scale) if only_pairs else found
        small, dropped = change.to(engine.device).compress()  # QR of as many columns as there are frozen pairs
        factors[name] = small.to("cpu")
        cut = factors[name].take(slice(method.export_rank, None)).norm() if method.export_rank else 0.0
        error = max(error, math.hypot(dropped, cut) / max(change.norm(), torch.finfo(torch.float64).tiny))
    extras |= _token_tensors(engine, rows)
    extras |= {f"{PREFIX}{outer_name(name)}.{k}": v for name, m in whole.items() for k, v in _whole(engine, m).items()}
    if not engine.main:
        return None

    # one rank for all modules
    ranks = {name: len(pairs) for name, pairs in factors.items()}
    rank = max(1, *ranks.values())
    written: dict[str, dict[str, Tensor]] = {WEIGHTS: extras}
    if method.export_rank and rank > method.export_rank:
        rank = method.export_rank
        written[ALL] = _peft_names(factors)
    factors = {name: _of_rank(pairs, rank) for name, pairs in factors.items()}
    written[WEIGHTS] |= _peft_names(factors)
    # ALL names the WEIGHTS that it belongs to, so that WEIGHTS are written first
    (Path(path) / ALL).unlink(missing_ok=True)
    _write(Path(path), written, method)
    # in an outer model a short name would match other modules too
    short = set(ranks) == {adapter.name for adapter in adapters}
    config = {
        **_peft_config({a.target for a in adapters} if short else set(ranks)),
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision or None,
        **(method.peft() if only_pairs else {}),
        **({} if as_trained else {"r": rank, "lora_alpha": rank}),
        **({} if rows is None else {"trainable_token_indices": _token_indices(rows)}),
        **({"modules_to_save": sorted(map(outer_name, whole))} if whole else {}),
    }
    write_json(Path(path) / CONFIG, config)  # last: a folder with a config is complete
    count = 0 if rows is None else len(rows.tokens.names)
    return SavedAdapter(Path(path), rank, ranks, error, in_vllm({"r": rank, **config}), count, len(whole))


def _peft_config(targets: set[str]) -> dict[str, Any]:
    """The entries of PEFT's configuration that every exported adapter has."""
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _token_tensors(engine: Engine, rows: TokenRows | None) -> dict[str, Tensor]:
    """The trained rows under PEFT's names, on the host. Collective."""
    trained = [] if rows is None else [(at, getattr(rows, k)) for k, at in rows.modules_of.items()]
    return {f"{PREFIX}{at}{TOKENS}": engine.whole(p).cpu() for at, p in trained}


def _whole(engine: Engine, module: Whole) -> dict[str, Tensor]:
    """The parameters of a module that is trained as a whole, on the host. Collective."""
    return {k: engine.whole(p).cpu() for k, p in module.named_parameters(recurse=False)}


def _token_indices(rows: TokenRows) -> dict[str, list[int]]:
    """The tokens by the last name of their layer, as PEFT's configuration has them."""
    return {name.rpartition(".")[2]: list(rows.tokens.names) for name in rows.modules_of.values()}


def _write(folder: Path, files: dict[str, dict[str, Tensor]], method: Method) -> None:
    """Write the tensors of each file, with the settings of the method."""
    settings = json.dumps({"type": method.get_choice_name(type(method)), **asdict(method)})
    notes = {"format": "pt", "written_by": "llm_lowrank", "method": settings}
    for file, tensors in files.items():
        write_safetensors(folder / file, tensors, notes)
        notes = notes | {"of": file_sha256(folder / WEIGHTS)}


def _peft_names(factors: dict[str, Pairs]) -> dict[str, Tensor]:
    """A (rank, n) and B (m, rank) of every module under PEFT's names."""
    letters = {f"{PREFIX}{name}.lora_A.weight": pairs.A.contiguous() for name, pairs in factors.items()}
    return letters | {f"{PREFIX}{name}.lora_B.weight": pairs.B.contiguous() for name, pairs in factors.items()}


def _of_rank(pairs: Pairs, rank: int) -> Pairs:
    """The first `rank` pairs, or all pairs with pairs of zeros behind them."""
    if len(pairs) == rank:
        return pairs
    (m, n), more = pairs.shape, max(0, rank - len(pairs))
    return Pairs.cat([pairs.take(slice(rank)), Pairs(torch.zeros(m, more), torch.zeros(more, n))])


def _trained_pairs(engine: Engine, adapter: Adapter) -> Pairs | None:
    """Return the pairs of an adapter that never froze one, on the host of rank 0; None elsewhere. Collective."""
    assert isinstance(adapter, PairAdapter)
    pairs = adapter.pairs(engine.whole)
    return pairs.to("cpu") if engine.main else None


def _change(engine: Engine, adapter: Adapter) -> Pairs | None:
    """Return all changes of W0, uncompressed, on the host of rank 0; None elsewhere. Collective."""
    trained = adapter.change(engine.whole)
    if not engine.main:
        return None
    return Pairs.cat([*(entry.pairs() for entry in adapter.ledger), trained.to("cpu", torch.float32)])
