"""The adapter: trainable pairs, and perhaps a bank of frozen ones, beside a frozen weight.

    y = W x + s B A x + s bank_B bank_A x + bias        https://arxiv.org/abs/2106.09685 eq. 3, with a bank

m out, n in, r pairs, k bank pairs. Everything sits on one module, since ZeRO-3 gathers for a forward only what the
module itself owns.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_lowrank.codecs import Codec
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.functional import adapter_linear
from llm_lowrank.pairs import Pairs


def generator(seed: int, name: str, step: int = 0) -> torch.Generator:
    """Randomness of one module at one step: the same on every rank and after a resume."""
    digest = hashlib.sha256(f"{seed}:{name}:{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Adapter(FrozenLinear):
    """A (r, n) and B (m, r) are float32 masters, trained as they are and cast to the compute dtype in forward.

    The bank of frozen pairs is float32 too, so that pairs move bitwise.
    """

    def __init__(
        self, name: str, linear: nn.Linear, codec: Codec, rank: int, scale: float, bank: int = 0, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(linear, codec)
        (m, n), device = self.shape, linear.weight.device
        self.name, self.rank, self.scale, self.dropout = name, rank, scale, dropout
        self.seed = seed

        def factor(*size: int, trained: bool) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device), requires_grad=trained)

        self.A, self.B = factor(rank, n, trained=True), factor(m, rank, trained=True)
        self.bank_A = factor(bank, n, trained=False) if bank else None
        self.bank_B = factor(m, bank, trained=False) if bank else None
        if not linear.weight.is_meta:
            for part, value in self.initial().items():
                getattr(self, part).data.copy_(value)
        # W as stored now = W of the checkpoint + the sum of the ledger. Rank 0 only, in host memory, s folded in.
        self.ledger: list[Pairs] = []
        # Directions that wait to be trained, when they do not wait in the bank. Rank 0 only, in host memory.
        self.reserve: Pairs | None = None
        # What a method remembers, each tensor over this rank's runs. Anything here is part of a checkpoint.
        self.memory: dict[str, Tensor] = {}
        # Reads the untouched W from the checkpoint; set by whoever loads the model.
        self.source: Callable[[], Tensor] | None = None

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """Whole starting values of A, B and the bank, on the host.

        With pairs (taken out of W): the first r are trained, the others fill the bank. Without: A uniform in +-1/sqrt(n) (Kaiming
        with a = sqrt 5, as in the paper's code), B and the bank zero, so that the layer starts as it was.
        """
        (m, n), r, bank = self.shape, self.rank, 0 if self.bank_A is None else len(self.bank_A)
        if pairs is None:
            bound = 1 / math.sqrt(n)
            with torch.device("cpu"):  # the generator's, so that A starts alike on every device
                start = torch.empty(r, n).uniform_(-bound, bound, generator=generator(self.seed, self.name))
                pairs = Pairs(torch.zeros(m, r + bank), torch.cat([start, torch.zeros(bank, n)]))
        assert len(pairs) == r + bank, f"{self.name}: {len(pairs)} starting pairs for {r} trainable and {bank} in the bank"
        values = {"A": pairs.A[:r], "B": pairs.B[:, :r]}
        values |= {"bank_A": pairs.A[r:], "bank_B": pairs.B[:, r:]} if bank else {}
        return {k: v.clone() for k, v in values.items()}  # trained in place: the ledger keeps the pairs as they were

    def forward(self, x: Tensor) -> Tensor:
        if self.dropout and self.training:
            # Only the trainable branch sees the dropped input, so it cannot share x with the fused product.
            if self.bank_A is None or self.bank_B is None:
                y = super().forward(x)
            else:
                y = adapter_linear(x, self.parts(), self.decode, self.bank_A, self.bank_B, self.scale, self.bias)
            dropped = F.dropout(x, self.dropout)
            return y + self.scale * F.linear(F.linear(dropped, self.A.to(x.dtype)), self.B.to(x.dtype))
        return adapter_linear(x, self.parts(), self.decode, self.A, self.B, self.scale, self.bias, self.bank_A, self.bank_B)

    def factors(self) -> tuple[nn.Parameter, ...]:
        """A, B and, if there is one, the bank's."""
        return (self.A, self.B) if self.bank_A is None or self.bank_B is None else (self.A, self.B, self.bank_A, self.bank_B)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, bank={0 if self.bank_A is None else len(self.bank_A)}"
