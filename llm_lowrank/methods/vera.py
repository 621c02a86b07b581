"""VeRA: one frozen random pair for the whole model, two trained vectors a module.  https://arxiv.org/abs/2310.11454

    y = W x + b * (B (d * (A x)))          A (r, n) the first n columns of the pair's A (r, n_max), frozen
                                           B (m, r) the first m rows of the pair's B (m_max, r), frozen
                                           d (r,) = d_initial and b (m,) = 0 at the start, trained

n_max and m_max are the largest of the adapted modules. There is no scale. The pair is drawn as PEFT draws it from the
key `projection_prng_key`, which is the run's seed here: A before B, uniform in +- sqrt(6 / second dimension).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, Shared, Whole, fill_
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.numerics.functional import Product, adapter_linear
from llm_lowrank.numerics.pairs import Pairs


class RandomPair(Shared):
    """A (r, n_max) and B (m_max, r), frozen: one copy for all layers."""

    def __init__(self, layers: list[VeRALayer]) -> None:
        super().__init__()
        first, (m, n) = layers[0], (max(layer.shape[i] for layer in layers) for i in (0, 1))
        self.seed = first.seed
        self.A, self.B = first.factor(first.rank, n, trained=False), first.factor(m, first.rank, trained=False)
        fill_(self)

    def initial(self) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(self.seed)  # as PEFT, and not by a name
        with torch.device("cpu"):
            return {name: _drawn(p.shape, random) for name, p in (("A", self.A), ("B", self.B))}


def _drawn(shape: torch.Size, random: torch.Generator) -> Tensor:
    """Kaiming's uniform start with gain sqrt 2."""
    bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))  # in the order of PEFT's operations: bitwise
    return torch.empty(shape).uniform_(-bound, bound, generator=random)


class VeRALayer(Adapter):
    """A frozen linear with the vectors d over the pairs and b over the outputs."""

    def __init__(
        self, name: str, linear: nn.Linear, codec: Codec, *, rank: int, d_initial: float, dropout: float, seed: int
    ) -> None:
        super().__init__(name, linear, codec, seed)
        self.rank, self.d_initial, self.dropout = rank, d_initial, dropout
        self.first = False  # whether the layer is the model's first that uses the pair
        self.d, self.b = self.factor(rank), self.factor(self.shape[0])

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: b is zero, so that the function starts as it was."""
        assert pairs is None, "VeRA takes no pairs out of W"
        with torch.device("cpu"):
            return {"d": torch.full((self.rank,), self.d_initial), "b": torch.zeros(self.shape[0])}

    @property
    def pair(self) -> RandomPair:
        (pair,) = self.borrows
        assert isinstance(pair, RandomPair)
        return pair

    @torch.compiler.disable  # Shared.read asks autograd which backward is running
    def forward(self, x: Tensor) -> Tensor:
        (m, n), pair = self.shape, self.pair
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        A, B = pair.read("A", self.first)[:, :n], pair.read("B", self.first)[:m]
        return adapter_linear(
            x,
            self.parts(),
            decode=self.decode,
            products=[Product(A, B, self.d, out=self.b)],
            scale=1.0,
            bias=self.bias,
            dropped=dropped,
            multiply=self.multiply(x),
        )

    def lent(self) -> tuple[int, int]:
        m, n = self.shape
        return self.rank * n, m * self.rank  # the gradient of b takes the product that B's would take

    def change(self, whole: Whole) -> Pairs:
        """diag(b) B diag(d) and A. Collective."""
        m, n = self.shape
        return Pairs(whole(self.b)[:, None] * whole(self.pair.B)[:m] * whole(self.d), whole(self.pair.A)[:, :n])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, d_initial={self.d_initial:g}"


@Method.register_subclass("vera")
@dataclass(frozen=True)
class VeRA(Method):
    """Train two vectors per module over one frozen random pair of the whole model."""

    rank: int = 256
    """Rows of the random A and columns of the random B: the rank of a module's change."""
    d_initial: float = 0.1
    """Starting value of d, the weights of the pairs."""
    dropout: float = 0.0
    """Dropout on the input of the products."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.rank < 1:
            complaints.append(f"method.rank must be at least 1, not {self.rank}")
        if not (math.isfinite(self.d_initial) and self.d_initial):
            complaints.append(
                f"method.d_initial must be a number other than 0, not {self.d_initial}: with d = 0 and b = 0 no "
                "gradient would ever move either"
            )
        if not 0 <= self.dropout < 1:
            complaints.append(f"method.dropout must be in [0, 1), not {self.dropout}")
        return complaints

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> VeRALayer:
        return VeRALayer(name, linear, codec, rank=self.rank, d_initial=self.d_initial, dropout=self.dropout, seed=seed)

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        layers = [adapter for adapter in adapters if isinstance(adapter, VeRALayer)]
        model.vera_pair = RandomPair(layers)  # the root owns it, no layer does
        for layer in layers:
            layer.borrows, layer.first = (model.vera_pair,), layer is layers[0]
