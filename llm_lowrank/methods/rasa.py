"""RaSA: y_i = W_i x + B_i (d_i * A_i x) + B_S (e_i * A_S x).  https://arxiv.org/abs/2503.12576

Each of the L layers of a module type gives k of its r ranks to a pool. Every layer uses the whole pool, with its own
weights.

    A_i (r - k, n), B_i (m, r - k)    of layer i alone             d_i (r - k)    the weights of these, trained
    A_S (L k, n),   B_S (m, L k)      the pool, one for the type   e_i (L k)      layer i's weights of the pool, trained

There are as many trained parameters as in LoRA, and the weights; a layer's change has rank r - k + L k. There is no
other scale: alpha is part of the starting values of d and e. The two products are computed separately, since joining
them would copy the pool in every forward.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, Shared, Whole, fill_, generator, uniform_rows
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.methods.lora import LoRA, second_group
from llm_lowrank.numerics.functional import Product, adapter_linear
from llm_lowrank.numerics.pairs import Pairs

Kind = tuple[str, int, int]  # name without the layer's number, m, n


@Method.register_subclass("rasa")
@dataclass(frozen=True)
class RaSA(LoRA):
    """Train rank pairs per module, k of them in a pool that all layers use."""

    k: int | None = None
    """Pairs of a module that go to the pool; by default rank / 8, at least 1."""
    d_init: Literal["paper", "lora"] = "paper"
    """Starting values of the weights; paper: half of alpha spread over the layer's own pairs, half over the pool; lora:
    alpha / rank each."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.use_rslora:
            complaints.append(
                "method.use_rslora cannot be used with rasa: it has no scale, alpha is in the start of d and e; remove "
                "it"
            )
        if self.k is not None:
            complaints += [
                f"method.k must be from 0 (no pool) to {setting} = {rank} (nothing but the pool), not {self.k}"
                for setting, rank in self.all_ranks().items()
                if not 0 <= self.k <= rank
            ]
        return complaints

    def pooled_pairs(self, rank: int) -> int:
        """k of a module with `rank` pairs."""
        return max(rank // 8, 1) if self.k is None else self.k

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        rank = self.rank_of(name)
        self.check_fits("rank", rank, name, linear)
        return RaSALayer(
            name,
            linear,
            codec=codec,
            rank=rank,
            pooled=self.pooled_pairs(rank),
            alpha=self.scale_of(name) * rank,
            d_init=self.d_init,
            dropout=self.dropout,
            seed=seed,
        )

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        # layers of one kind and shape share a pool
        kinds: dict[Kind, list[RaSALayer]] = defaultdict(list)
        for adapter in adapters:
            assert isinstance(adapter, RaSALayer)
            kinds[(kind(adapter.name), *adapter.shape)].append(adapter)
        pools: dict[str, Pool] = {}
        for (name, m, n), layers in kinds.items():
            _check_agree(layers)
            if layers[0].pooled:
                pool = pools[_free(f"{name.rpartition('.')[2]}_pool", pools)] = Pool(f"{name} {m} x {n}", layers)
                for layer in layers:
                    layer.join(pool, first=layer is layers[0])
        if self.b_rate != 1:
            for pool in pools.values():
                pool.groups = second_group(pool)
        model.rasa_pools = nn.ModuleDict(pools)  # the root owns the pools, no layer does
        super().link(model, adapters)  # last: the layers have all of their parameters now


def kind(name: str) -> str:
    """A module's name without its first number, the layer's: modules of one kind and shape share a pool."""
    return re.sub(r"(^|\.)\d+(\.|$)", r"\1", name, count=1)


def _check_agree(layers: list[RaSALayer]) -> None:
    first = layers[0]
    other = next((layer for layer in layers if layer.rank != first.rank), None)
    if other is not None:
        raise ValueError(
            f"method.rank_pattern: {first.name} has rank {first.rank} and {other.name} rank {other.rank}, but they "
            "share a pool; give all layers of a module type the same rank"
        )


def _free(name: str, taken: Mapping[str, object]) -> str:
    """`name`, or if that is taken `name` with the first free number.

    Two pools may have one name: layers of a type may differ in shape, and two types may end in the same name.
    """
    return next(new for i in count(1) if (new := name if i == 1 else f"{name}{i}") not in taken)


class Pool(Shared):
    """The pool of L layers: A_S (L k, n) and B_S (m, L k)."""

    def __init__(self, name: str, layers: list[RaSALayer]) -> None:
        super().__init__()
        first = layers[0]
        (m, n), size = first.shape, len(layers) * first.pooled
        self.name, self.seed = name, first.seed
        self.A, self.B = first.factor(size, n), first.factor(m, size)
        fill_(self)

    def initial(self) -> dict[str, Tensor]:
        (size, n), m = self.A.shape, len(self.B)
        with torch.device("cpu"):
            return {"A": uniform_rows(size, n, generator(self.seed, self.name)), "B": torch.zeros(m, size)}


class RaSALayer(Adapter):
    """One of the L layers.

    With k = 0 a layer has no e and no pool, with k = r no A, B and d, because a parameter without elements is not made.
    """

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        *,
        codec: Codec,
        rank: int,
        pooled: int,
        alpha: float,
        d_init: str,
        dropout: float,
        seed: int,
    ) -> None:
        super().__init__(name, linear, codec, seed)
        (m, n), unpooled = self.shape, rank - pooled
        self.rank, self.pooled, self.alpha, self.d_init, self.dropout = rank, pooled, alpha, d_init, dropout
        if unpooled:
            self.A, self.B = self.factor(unpooled, n), self.factor(m, unpooled)
            self.d = self.factor(unpooled)

    def join(self, pool: Pool, first: bool) -> None:
        """Use this pool from now on. `first`: the layer is the first of the model that uses it."""
        self.borrows, self.first = (pool,), first
        self.e = self.factor(len(pool.A))
        fill_(self)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: A is uniform and B zero, so that the function starts as it was."""
        assert pairs is None, "RaSA takes no pairs out of W"
        (m, n), unpooled, size = self.shape, self.rank - self.pooled, 0 if self.pool is None else len(self.e)
        sides = 2 if unpooled and self.pooled else 1  # the own pairs and the pool share alpha
        values = {}
        with torch.device("cpu"):
            if unpooled:
                values["A"] = uniform_rows(unpooled, n, generator(self.seed, self.name))
                values["B"] = torch.zeros(m, unpooled)
                total = self.rank if self.d_init == "lora" else sides * unpooled
                values["d"] = torch.full((unpooled,), self.alpha / total)
            if size:
                total = self.rank if self.d_init == "lora" else sides * size
                values["e"] = torch.full((size,), self.alpha / total)
        return values

    @property
    def pool(self) -> Pool | None:
        return next((lender for lender in self.borrows if isinstance(lender, Pool)), None)

    def products(self) -> list[Product]:
        """The products of the layer's own pairs and of the pool; either may be absent."""
        products = [Product(self.A, self.B, self.d)] if self.rank > self.pooled else []
        if (pool := self.pool) is not None:
            products.append(Product(pool.read("A", self.first), pool.read("B", self.first), self.e))
        return products

    @torch.compiler.disable  # the pool asks autograd which backward is running
    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        return adapter_linear(
            x,
            self.parts(),
            decode=self.decode,
            products=self.products(),
            scale=1.0,
            bias=self.bias,
            dropped=dropped,
            multiply=self.multiply(x),
        )

    def change(self, whole: Whole) -> Pairs:
        """[B_i diag(d_i), B_S diag(e_i)] [A_i; A_S], of rank r - k + L k. Collective."""
        factors = [(self.A, self.B, self.d)] if self.rank > self.pooled else []
        factors += [] if self.pool is None else [(self.pool.A, self.pool.B, self.e)]
        return Pairs.cat([Pairs(whole(b) * whole(d), whole(a)) for a, b, d in factors])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, k={self.pooled}, alpha={self.alpha:g}, d_init={self.d_init}"
