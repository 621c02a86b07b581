"""What is trained beside a frozen weight.

    Adapter        a frozen linear with something trained on it; what every method's layer owes the floors above
    PairAdapter    y = W x + s B A x + s bank_B bank_A x + bias        https://arxiv.org/abs/2106.09685 eq. 3, with a bank
    Shared         parameters that several adapters use, owned by one module

m out, n in, r pairs, k bank pairs. What one layer alone uses sits on that layer, since ZeRO-3 gathers for a forward
only what the module itself owns, or says that it borrows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_lowrank.codecs import Codec
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.numerics.functional import Product, adapter_linear
from llm_lowrank.numerics.pairs import Change, Pairs

Whole = Callable[[nn.Parameter], Tensor]  # a copy of a parameter that may be sharded; collective


def digest(seed: int, name: str, step: int) -> bytes:
    """What the randomness of one module at one step is made of: the same on every rank and after a resume."""
    return hashlib.sha256(f"{seed}:{name}:{step}".encode()).digest()


def generator(seed: int, name: str, step: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(int.from_bytes(digest(seed, name, step)[:8], "little") >> 1)


def fill_(module: Adapter | Shared) -> None:
    """Gives a module that is not on the meta device its starting values."""
    if all(p.is_meta for p in module.parameters(recurse=False)):
        return  # and draws no values, which takes seconds for a large model
    for name, value in module.initial().items():
        p = getattr(module, name)
        if not p.is_meta:
            p.data.copy_(value)


def uniform_rows(r: int, n: int, random: torch.Generator) -> Tensor:
    """How A starts: uniform in +-1/sqrt(n) (Kaiming with a = sqrt 5, as in LoRA's code), on the host.  (r, n)"""
    bound = 1 / math.sqrt(n)
    with torch.device("cpu"):  # the generator's, so that A starts alike on every device
        return torch.empty(r, n).uniform_(-bound, bound, generator=random)


class Shared(nn.Module):
    """Parameters that several adapters use: once in the optimizer, the gradient norm and a checkpoint.

    One module outside of the decoder layers owns them (FSDP2 shards them with the root); a layer names it in `borrows`
    and takes them by `read` at each forward, as engines swap parameters.

    Reentrant checkpointing runs a backward of its own for every layer, so that a shared parameter's gradient would come
    layer by layer; DDP and ZeRO-2/3 refuse one that comes twice. In there all layers but the first read leaves in the
    place of the parameters. What these receive waits here for the first layer's gradient, which comes last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[str, Tensor] = {}

    def read(self, name: str, first: bool) -> Tensor:
        """A parameter, for the forward of one layer, the first one of the model that uses it or another."""
        p: nn.Parameter = getattr(self, name)
        in_backward = torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1
        if in_backward and not first:
            leaf = p.detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(partial(self._wait, name))
            return leaf
        if not in_backward and name in self.waiting:
            raise RuntimeError(
                f"the first layer that shares {name} took no part in the last backward, others did; checkpoint all "
                "layers or none"
            )
        # FSDP2 shows another object in forward than it gives the optimizer
        if p.requires_grad and not hasattr(p, "complete"):
            p.complete = p.register_hook(partial(self._complete, name))  # type: ignore[attr-defined]
        return p

    def _wait(self, name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.waiting[name] = self.waiting[name].add_(leaf.grad) if name in self.waiting else leaf.grad
        leaf.grad = None

    def _complete(self, name: str, gradient: Tensor) -> Tensor:
        return gradient + self.waiting.pop(name) if name in self.waiting else gradient

    def initial(self) -> dict[str, Tensor]:
        """Whole starting values of every parameter, on the host."""
        raise NotImplementedError


class Adapter(FrozenLinear):
    """A frozen linear with something trained on it."""

    group = 0  # of the optimizer's parameters: groups may have rates of their own, see Method.rates

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, seed: int = 0) -> None:
        super().__init__(linear, codec)
        self.name, self.seed = name, seed
        # W as stored now = W of the checkpoint + the sum of the ledger. Rank 0 only, in host memory, s folded in.
        self.ledger: list[Change] = []
        self.taken = 0  # entries that left W before it was encoded
        # What a method remembers; anything here is part of a checkpoint. `spans` says of a key whose span of this rank it
        # lies along: a parameter's, or W (the rows of engine.part); what is not in it is the same on every rank.
        self.memory: dict[str, Tensor] = {}
        self.spans: dict[str, str] = {}
        # Reads the untouched W from the checkpoint; set by whoever loads the model.
        self.source: Callable[[], Tensor] | None = None

    def factor(self, *size: int, trained: bool = True) -> nn.Parameter:
        """A float32 parameter without values on W's device."""
        return nn.Parameter(torch.empty(size, device=self.parts()[0].device), requires_grad=trained)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """Whole starting values, on the host, of every parameter but W's parts and the bias.

        `pairs` were taken out of W.
        """
        raise NotImplementedError

    @property
    def only_pairs(self) -> bool:
        """Whether s B A and `extras` are all that is beside W: then they are exported as they were trained."""
        return False

    def change(self, whole: Whole) -> Pairs:
        """What the parameters add to W now, s folded in, with W as stored now behind it. Collective."""
        raise NotImplementedError

    def extras(self, whole: Whole) -> dict[str, Tensor]:
        """Tensors of the layer's own that a PEFT checkpoint holds beside A and B. Collective."""
        return {}


class PairAdapter(Adapter):
    """A (r, n) and B (m, r) are float32 masters, trained as they are and cast to the compute dtype in forward.

    The bank of frozen pairs is float32 too, so that pairs move bitwise.
    """

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        codec: Codec,
        rank: int,
        scale: float,
        bank: int = 0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(name, linear, codec, seed)
        m, n = self.shape
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.A, self.B = self.factor(rank, n), self.factor(m, rank)
        self.bank_A = self.factor(bank, n, trained=False) if bank else None
        self.bank_B = self.factor(m, bank, trained=False) if bank else None
        # Directions that wait to be trained, when they do not wait in the bank. Rank 0 only, in host memory.
        self.reserve: Pairs | None = None

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """With pairs (taken out of W): the first r are trained, the others fill the bank.

        Without: A uniform, B and the bank zero, so that
        the layer starts as it was.
        """
        (m, n), r, bank = self.shape, self.rank, 0 if self.bank_A is None else len(self.bank_A)
        if pairs is None:
            start = uniform_rows(r, n, generator(self.seed, self.name))
            with torch.device("cpu"):
                pairs = Pairs(torch.zeros(m, r + bank), torch.cat([start, torch.zeros(bank, n)]))
        assert len(pairs) == r + bank, (
            f"{self.name}: {len(pairs)} starting pairs for {r} trainable and {bank} in the bank"
        )
        values = {"A": pairs.A[:r], "B": pairs.B[:, :r]}
        return values | ({"bank_A": pairs.A[r:], "bank_B": pairs.B[:, r:]} if bank else {})

    # ---- what a method may do differently

    def products(self, x: Tensor) -> list[Product]:
        """The trained products beside W in this forward."""
        return [Product(self.A, self.B)]

    def direction(self) -> tuple[Tensor, Tensor] | None:
        """(magnitude, |rows of W|), where the length of W's rows is trained apart."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        bank = None if self.bank_A is None or self.bank_B is None else Product(self.bank_A, self.bank_B)
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else None
        return adapter_linear(
            x,
            self.parts(),
            decode=self.decode,
            products=self.products(x),
            scale=self.scale,
            bias=self.bias,
            bank=bank,
            dropped=dropped,
            direction=self.direction(),
        )

    def factors(self) -> tuple[nn.Parameter, ...]:
        """A, B and, if there is one, the bank's."""
        return (
            (self.A, self.B)
            if self.bank_A is None or self.bank_B is None
            else (self.A, self.B, self.bank_A, self.bank_B)
        )

    @property
    def only_pairs(self) -> bool:
        return self.bank_A is None

    def change(self, whole: Whole) -> Pairs:
        """s B A + s bank_B bank_A."""
        parts = [whole(p) for p in self.factors()]
        return Pairs.cat([Pairs(b, a).scaled(self.scale) for a, b in zip(parts[::2], parts[1::2], strict=True)])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, bank={0 if self.bank_A is None else len(self.bank_A)}"


def as_pair_adapters(adapters: Sequence[Adapter]) -> list[PairAdapter]:
    """The same, known to be pairs."""
    assert all(isinstance(adapter, PairAdapter) for adapter in adapters)
    return list(adapters)  # type: ignore[arg-type]
