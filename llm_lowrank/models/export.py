"""The adapter of a run as a plain PEFT LoRA over the untouched base.

    trained layer = W0 + sum(ledger) + s B A + s bank_B bank_A          (other adapters: W0 + sum(ledger) + `change`)

Whatever a method did to W, to the pairs or to the bank, the sum of all changes of W0 is one low-rank matrix.
`save_adapter` writes this matrix as LoRA factors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm_lowrank.adapters.adapter import Adapter, PairAdapter
from llm_lowrank.adapters.method import Method
from llm_lowrank.engines.base import Engine
from llm_lowrank.files import file_sha256, write_json, write_safetensors
from llm_lowrank.models.foreign import ALL, CONFIG, PREFIX, WEIGHTS
from llm_lowrank.numerics.pairs import Pairs


@dataclass(frozen=True)
class SavedAdapter:
    """The report of an exported adapter."""

    path: Path
    rank: int  # of every factor in the file
    ranks: dict[str, int]  # module -> pairs that its change needs
    error: float  # the largest |dropped| / |change| of a module, from compression

    def __str__(self) -> str:
        low, high = min(self.ranks.values()), max(self.ranks.values())
        needs = f"{high}" if low == high else f"{low} to {high}"
        cut = f"; CUT DOWN: {ALL} beside it has all, and merging uses that" if high > self.rank else ""
        lora = f"PEFT LoRA of rank {self.rank} over {len(self.ranks)} modules"
        return f"{self.path}: {lora} (exact rank {needs}, dropped {self.error:.1e}{cut})"


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
) -> SavedAdapter | None:
    """Write a PEFT LoRA folder on rank 0 and return a report there; return None elsewhere. Collective.

    revision: of a base model of the hub. outer_name: the name of a module in the model that plain transformers loads,
    where that is not the trained one.

    Adapters that never froze a pair are written as they were trained. Otherwise every module gets balanced factors,
    scaling 1 and the largest rank that a module needs, at most `method.export_rank`. Modules that need less are padded
    with pairs of zeros, as vLLM wants one rank. If ranks were truncated, ALL holds the untruncated pairs.
    """
    factors: dict[str, Pairs] = {}
    extras: dict[str, Tensor] = {}
    # all ranks must agree, but only rank 0 has the ledgers
    as_trained = all(engine.gather(all(adapter.only_pairs and not adapter.ledger for adapter in adapters)))
    # gathering is collective, one adapter at a time; the factors are on rank 0
    error = 0.0
    for adapter in adapters:
        if as_trained:
            assert isinstance(adapter, PairAdapter)
            a, b = engine.whole(adapter.A), engine.whole(adapter.B)
            tensors = adapter.extras(engine.whole)
            if engine.main:
                name = outer_name(adapter.name)
                factors[name] = Pairs(b, a).to("cpu")
                extras |= {f"{PREFIX}{name}.{k}": v.cpu() for k, v in tensors.items()}
        elif (change := _change(engine, adapter)) is not None:
            name = outer_name(adapter.name)
            factors[name], dropped = change.compress()
            cut = _norm(factors[name].take(slice(method.export_rank, None))) if method.export_rank else 0.0
            error = max(error, math.hypot(dropped, cut) / max(_norm(change), torch.finfo(torch.float64).tiny))
    if not engine.main:
        return None

    # one rank for all modules
    ranks = {name: len(pairs) for name, pairs in factors.items()}
    rank = max(1, *ranks.values())
    written: dict[str, dict[str, Tensor]] = {WEIGHTS: extras}
    if not as_trained and method.export_rank and rank > method.export_rank:
        rank = method.export_rank
        written[ALL] = _peft_names(factors)
    if not as_trained:
        factors = {name: _of_rank(pairs, rank) for name, pairs in factors.items()}
    written[WEIGHTS] |= _peft_names(factors)
    # ALL names the WEIGHTS that it belongs to, so that WEIGHTS are written first
    (Path(path) / ALL).unlink(missing_ok=True)
    settings = json.dumps({"type": method.get_choice_name(type(method)), **asdict(method)})
    notes = {"format": "pt", "written_by": "llm_lowrank", "method": settings}
    for file, tensors in written.items():
        write_safetensors(Path(path) / file, tensors, notes)
        notes = notes | {"of": file_sha256(Path(path) / WEIGHTS)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "lora_dropout": 0.0,
        # a short name would match modules of the outer model too
        "target_modules": _target_modules(list(ranks), method.target_modules if outer_name is str else []),
        "exclude_modules": sorted(method.exclude_modules) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **(method.peft() if as_trained else {}),
    }
    write_json(Path(path) / CONFIG, config)  # last: a folder with a config is complete
    return SavedAdapter(Path(path), rank, ranks, error)


def _peft_names(factors: dict[str, Pairs]) -> dict[str, Tensor]:
    """A (rank, n) and B (m, rank) of every module under PEFT's names."""
    letters = {f"{PREFIX}{name}.lora_A.weight": pairs.A.contiguous() for name, pairs in factors.items()}
    return letters | {f"{PREFIX}{name}.lora_B.weight": pairs.B.contiguous() for name, pairs in factors.items()}


def _of_rank(pairs: Pairs, rank: int) -> Pairs:
    """The first `rank` pairs, or all pairs with pairs of zeros behind them."""
    (m, n), more = pairs.shape, max(0, rank - len(pairs))
    return Pairs.cat([pairs.take(slice(rank)), Pairs(torch.zeros(m, more), torch.zeros(more, n))])


def _change(engine: Engine, adapter: Adapter) -> Pairs | None:
    """Return all changes of W0, uncompressed, on the host of rank 0; None elsewhere. Collective."""
    trained = adapter.change(engine.whole)
    if not engine.main:
        return None
    return Pairs.cat([*(entry.pairs() for entry in adapter.ledger), trained.to("cpu", torch.float32)])


def _norm(pairs: Pairs) -> float:
    """|B A| without forming it: |B A|^2 = <B^T B, A A^T>."""
    b, a = pairs.B.double(), pairs.A.double()
    return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))


def _target_modules(adapted: list[str], targets: Sequence[str]) -> list[str]:
    """The user's names of the target modules, if PEFT matches them as we do, otherwise the full names.

    PEFT reads all-linear differently.
    """
    by_name = all(any(name == target or name.endswith(f".{target}") for target in targets) for name in adapted)
    return sorted(targets if by_name else adapted)
