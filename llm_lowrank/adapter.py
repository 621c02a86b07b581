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

    A starts uniform in +-1/sqrt(n) (Kaiming with a = sqrt 5, as in the paper's code), B at zero. The bank, in float32 too
    so that pairs move bitwise, starts with `bank` zero pairs.
    """

    def __init__(
        self, name: str, linear: nn.Linear, codec: Codec, rank: int, scale: float, bank: int = 0, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__(linear, codec)
        (m, n), device = self.shape, linear.weight.device
        self.name, self.rank, self.scale, self.dropout = name, rank, scale, dropout
        bound = 1 / math.sqrt(n)
        with torch.device("cpu"):  # the generator's, so that A starts alike on every device
            start = torch.empty(rank, n).uniform_(-bound, bound, generator=generator(seed, name))
        self.A = nn.Parameter(start.to(device))
        self.B = nn.Parameter(torch.zeros(m, rank, device=device))
        self.bank_A = nn.Parameter(torch.zeros(bank, n, device=device), requires_grad=False) if bank else None
        self.bank_B = nn.Parameter(torch.zeros(m, bank, device=device), requires_grad=False) if bank else None
        # W as stored now = W of the checkpoint + the sum of the ledger. Rank 0 only, in host memory, s folded in.
        self.ledger: list[Pairs] = []
        # Directions that wait to be trained, when they do not wait in the bank. Rank 0 only, in host memory.
        self.reserve: Pairs | None = None
        # What a method remembers, each tensor over this rank's runs. Anything here is part of a checkpoint.
        self.memory: dict[str, Tensor] = {}
        # Reads the untouched W from the checkpoint; None when the model did not come from one.
        self.source: Callable[[], Tensor] | None = None

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
