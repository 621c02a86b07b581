"""PiSSA: train the principal pairs of W, freeze the rest.  https://arxiv.org/abs/2404.02948 eqs. 2-4

W = U diag(S) V^T      B = U[:, :r] sqrt(S[:r] / s)      A = sqrt(S[:r] / s) V[:, :r]^T      W <- W - s B A
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, as_pair_adapters
from llm_lowrank.adapters.method import Method
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.files import cache_dir
from llm_lowrank.numerics.pairs import Pairs
from llm_lowrank.numerics.spectrum import Triplets, cached_triplets

ROW_LENGTH = 3**-0.5  # of LoRA's A, uniform in +-1/sqrt(n): sqrt(n / (3 n))


@Method.register_subclass("pissa")
@dataclass(frozen=True)
class PiSSA(LoRA):
    """Start from the principal singular directions of every weight."""

    svd_niter: int = 4
    """Subspace iterations of the randomized SVD."""
    svd_exact: bool = False
    """Use a full SVD instead of the randomized one (slow for large weights)."""
    svd_placement: Literal["rank0", "spread"] = "rank0"
    """Which rank decomposes: rank 0 all modules, or every rank a share of them; the result is the same."""
    svd_cache: str = "auto"
    """Folder that caches singular directions; auto: svd in $LLM_LOWRANK_CACHE or ~/.cache/llm_lowrank; empty: none."""
    svd_seed: int = 0
    """Seed of the randomized SVD."""
    subspace: bool = False
    """Take the directions alone: W stays whole, A is its leading right singular vectors at the length of LoRA's rows,
    and B is zero. Ours, not the paper's."""

    adapter_roles = ("frozen",)

    def starting_pairs(self, adapters: list[Adapter], engine: Engine) -> Iterator[Pairs | None]:
        layers = as_pair_adapters(adapters)
        if self.subspace:
            return iter([None] * len(layers))
        return self.principal_pairs(layers, engine, [layer.rank for layer in layers])

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        layers = as_pair_adapters(adapters)
        if not self.subspace:
            return
        principal = self.principal_pairs(layers, engine, [layer.rank for layer in layers])
        for adapter, pairs in zip(layers, principal, strict=True):
            if not pairs.A.any(dim=1).all():  # such a row would stay zero, and B's column beside it too
                raise ValueError(
                    f"{adapter.name}: W has fewer than {adapter.rank} directions, which method.subspace takes; lower "
                    f"method.rank, or leave the module out: --method.exclude_modules {adapter.name.rpartition('.')[2]}"
                )
            with engine.edit(adapter.A) as (a,):
                a.value.copy_(F.normalize(pairs.A, dim=1) * ROW_LENGTH)

    def principal_pairs(self, adapters: list[PairAdapter], engine: Engine, counts: list[int]) -> Iterator[Pairs]:
        """Yield counts[i] principal pairs of the untouched W of adapter i, on the host, the same on every rank.

        Collective.
        """
        triplets = self.principal_triplets(adapters, engine, counts)
        for adapter, (u, s, v) in zip(adapters, triplets, strict=True):
            root = (s / adapter.scale).sqrt()
            yield Pairs(u * root, (v * root).T.contiguous())

    def principal_triplets(self, adapters: list[PairAdapter], engine: Engine, counts: list[int]) -> Iterator[Triplets]:
        """Yield the counts[i] largest singular triplets of the untouched W of adapter i, as `principal_pairs` does.

        The rank that decomposes a W reads it from the checkpoint, so that nothing is gathered. Collective.
        """
        spread = engine.world if self.svd_placement == "spread" else 1
        for first in range(0, len(adapters), spread):
            batch = list(zip(adapters, counts, strict=True))[first : first + spread]
            # each rank decomposes one W of the batch, before the broadcasts, so that the ranks work side by side
            outcome: Triplets | Exception | None = None
            if engine.rank < len(batch):
                try:
                    outcome = self._decompose(*batch[engine.rank], engine.device)
                except Exception as error:  # raised on every rank by the broadcast below
                    outcome = error
            for owner in range(len(batch)):
                yield Triplets(*(t.cpu() for t in engine.broadcast(partial(_or_raise, outcome), source=owner)))

    def _decompose(self, adapter: Adapter, k: int, device: torch.device) -> Triplets:
        assert adapter.source is not None
        w = adapter.source()
        if tuple(w.shape) != adapter.shape:
            raise ValueError(f"{adapter.name}: the checkpoint holds {tuple(w.shape)}, the model {adapter.shape}")
        return cached_triplets(
            w, k, niter=self.svd_niter, exact=self.svd_exact, seed=self.svd_seed, cache=self._cache(), device=device
        )

    def _cache(self) -> Path | None:
        """The folder that `svd_cache` names."""
        if self.svd_cache == "auto":
            return cache_dir() / "svd"
        return Path(self.svd_cache).expanduser() if self.svd_cache else None


def _or_raise(outcome: Triplets | Exception | None) -> list[Tensor]:
    if isinstance(outcome, Exception):
        raise outcome
    assert outcome is not None
    return list(outcome)
