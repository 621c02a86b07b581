"""LoRA-GA: start where the first step of LoRA is the best step of its rank towards full fine-tuning.
https://arxiv.org/abs/2407.05000

    G = U diag(S) V^T      A = c V[:, :r]^T      B = c U[:, r:2r]      c = m^(1/4) / sqrt(gamma)      W <- W - s B A

G (m, n) is the gradient of W. A reads the r largest input directions of G, and B writes to the r output directions that
come next, so that the first step moves 2 r directions of W. W is not written: the pairs (-B, A) in the bank stand
beside it, and W - s B A is exact over any stored W.

G is the gradient of the mean loss of the run's first samples. It is never formed: its products with a few columns are
read beside the frozen weight, see adapters/probes.py. So the weight may be sharded and quantized, and every product is
one pass over the samples. LoRA-One (lora_one.py) reads it in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from llm_lowrank.adapters.adapter import Adapter, PairAdapter, as_pair_adapters
from llm_lowrank.adapters.method import Method
from llm_lowrank.adapters.probes import probe_bytes, top_directions
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.pairs import Pairs
from llm_lowrank.numerics.spectrum import Triplets

COLUMNS = 4  # of a product with G, for each trainable pair: what the code of the paper takes


@dataclass(frozen=True)
class GradientStart(LoRA):
    """LoRA with a start from the singular directions of G. The defaults are those of the runs of both papers."""

    rank: int = 8
    """Trainable pairs per module."""
    alpha: float | None = 16.0
    """Adapter scale s = alpha / sqrt(rank), or alpha / rank without use_rslora."""
    use_rslora: bool = True
    """Scale s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)."""
    samples: int = 8
    """Samples whose gradient gives the start: the first ones of the run."""
    gamma: float = 16.0
    """How small the starting pairs are: both factors are divided by its root."""
    svd_niter: int = 4
    """Iterations of the randomized SVD of the gradient, of two passes over the samples each; two more passes come
    before and after."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        if self.samples < 1:
            complaints.append(f"method.samples must be at least 1, not {self.samples}")
        if self.gamma <= 0:
            complaints.append(f"method.gamma must be positive, not {self.gamma}")
        if self.svd_niter < 0:
            complaints.append(f"method.svd_niter must be at least 0, not {self.svd_niter}")
        return complaints

    @property
    def calibration(self) -> int:
        return self.samples

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        layers = as_pair_adapters(adapters)
        spread, each = super().statistics(adapters)
        return spread, each + probe_bytes(layers, [COLUMNS * layer.rank for layer in layers])

    def calibrate(self, adapters: list[Adapter], engine: Engine, backward: Callable[[], None]) -> None:
        layers = as_pair_adapters(adapters)
        found = top_directions(
            layers,
            engine,
            backward,
            [self.directions(layer.rank) for layer in layers],
            columns=[COLUMNS * layer.rank for layer in layers],
            niter=self.svd_niter,
        )
        for adapter, triplets in zip(layers, found, strict=True):
            if triplets.S[0] == 0:
                continue  # the samples do not reach this layer: it has no directions, and starts as LoRA does
            start = self.starting(adapter, triplets)
            with engine.edit(*adapter.factors()) as (a, b, *bank):
                a.value.copy_(start.A)
                b.value.copy_(start.B)
                if bank:  # takes from the function what the trained pairs add to it
                    bank[0].value.copy_(start.A)
                    bank[1].value.copy_(-start.B)

    def directions(self, rank: int) -> int:
        """How many singular triplets of G a module with `rank` trainable pairs starts from."""
        raise NotImplementedError

    def starting(self, adapter: PairAdapter, found: Triplets) -> Pairs:
        """Return the pairs with which a module starts, from the largest triplets of its G."""
        raise NotImplementedError


@Method.register_subclass("lora_ga")
@dataclass(frozen=True)
class LoRAGA(GradientStart):
    """Start from the gradient of the first samples; the function stays."""

    samples: int = 128
    """Samples whose gradient gives the start: the first ones of the run (the paper: 64 batches of 2)."""
    gamma: float = 16.0
    """How small the starting pairs are: both factors are divided by its root."""

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        rank = self.rank_of(name)
        self.check_fits("2 x method.rank =", self.directions(rank), name, linear)
        return self.layer(name, linear, codec, self.pair_settings(name, rank, seed))

    def directions(self, rank: int) -> int:
        return 2 * rank

    def starting(self, adapter: PairAdapter, found: Triplets) -> Pairs:
        r = adapter.rank
        c = adapter.shape[0] ** 0.25 / self.gamma**0.5
        return Pairs(c * found.U[:, r : 2 * r], c * found.V[:, :r].T)
