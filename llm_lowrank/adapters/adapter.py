"""What is trained beside a frozen weight.

    Adapter        a frozen linear with trained parameters; the interface that every method's layer offers
    PairAdapter    y = W x + s B A x + s bank_B bank_A x + bias      https://arxiv.org/abs/2106.09685 eq. 3, with a bank
    Shared         parameters that several adapters use, owned by one module

m out, n in, r pairs, k bank pairs. A parameter that only one layer uses belongs to that layer: for a forward ZeRO-3
gathers only the parameters that the module itself owns or names in `borrows`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llm_lowrank.adapters.direction import GRADIENT, Direction, Update
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.numerics.functional import Product, adapter_linear
from llm_lowrank.numerics.pairs import Change, Pairs

Whole = Callable[[nn.Parameter], Tensor]  # a copy of a parameter that may be sharded; collective
Place = Literal["trained", "weight", "bank"]  # where the pairs of an adapter that was trained before go


def digest(seed: int, name: str, step: int) -> bytes:
    """The seed of one module's random numbers at one step: the same on every rank and after a resume."""
    return hashlib.sha256(f"{seed}:{name}:{step}".encode()).digest()


def generator(seed: int, name: str, step: int = 0) -> torch.Generator:
    """A random generator of one module at one step, on the host: the same on every rank and after a resume."""
    return torch.Generator().manual_seed(int.from_bytes(digest(seed, name, step)[:8], "little") >> 1)


def fill_(module: Adapter | Shared) -> None:
    """Write the starting values into a module that is not on the meta device."""
    if all(p.is_meta for p in module.parameters(recurse=False)):
        return  # drawing values that nobody needs would take seconds for a large model
    for name, value in module.initial().items():
        p = getattr(module, name)
        if not p.is_meta:
            p.data.copy_(value)


def uniform_rows(r: int, n: int, random: torch.Generator) -> Tensor:
    """The starting value of A, (r, n) on the host: uniform in +-1/sqrt(n), Kaiming with a = sqrt 5 as LoRA's code."""
    bound = 1 / math.sqrt(n)
    with torch.device("cpu"):  # the generator's device, so that A starts alike on every device
        return torch.empty(r, n).uniform_(-bound, bound, generator=random)


class Shared(nn.Module):
    """Parameters that several adapters use. The optimizer, the gradient norm and a checkpoint have each of them once.

    One module owns the parameters, outside of the decoder layers (FSDP2 shards them with the root) or in the one that
    has all of these adapters. An adapter names this module in `borrows` and calls `read` at each forward, because
    engines swap parameters; what is never trained it may read as it is.

    Reentrant checkpointing runs a separate backward for every layer, so that the gradient of a shared parameter would
    arrive once per layer. DDP and ZeRO-2/3 fail if a parameter's gradient arrives twice. During recomputation every
    layer except the first therefore uses a detached copy. The gradients of these copies are collected here and added to
    the first layer's gradient, which is computed last.
    """

    groups: Mapping[str, int] = {}  # as of an Adapter
    stays_gathered = True  # ZeRO-3 may leave what is as small gathered between uses, see engines.frozen.persistent_size

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[str, Tensor] = {}  # collected gradients of the detached copies

    def read(self, name: str, first: bool) -> Tensor:
        """Return the parameter `name` for the forward of one layer. `first`: the model's first layer that uses it."""
        p: nn.Parameter = getattr(self, name)
        in_backward = torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1  # a recomputation
        if in_backward and not first and p.requires_grad:
            leaf = p.detach().requires_grad_()
            leaf.register_post_accumulate_grad_hook(partial(self._wait, name))
            return leaf
        if not in_backward and name in self.waiting:
            raise RuntimeError(
                f"the first layer that shares {name} took no part in the last backward, others did; checkpoint all "
                "layers or none"
            )
        # once for every object: FSDP2 shows another object in forward than it gives the optimizer
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
        """The starting values of all parameters, whole, on the host."""
        raise NotImplementedError


class Adapter(FrozenLinear):
    """A frozen linear with trained parameters."""

    group = 0  # the optimizer's group of these parameters; groups may have different rates, see Method.rates
    groups: Mapping[str, int] = {}  # the group of a parameter, by its name, where it is another one
    scale = 1.0  # s, of everything beside W
    directed: tuple[str, ...] = ()  # the trained parameters whose steps `direct` decides
    looks_at: tuple[str, ...] = ()  # those whose values it looks at for that
    takes = True  # whether the starting pairs leave W; otherwise they are only looked at, and W stays as it is
    penalties: Mapping[str, float] = {}  # of parameters, by their names: see optimizers.shrink_
    bank_room: int | None = None  # pairs that may freeze into a bank, 0 if into W; None: such a layer freezes no pairs
    like_trained: tuple[str, ...] = ()  # frozen matrices whose gradient is made on the way to another, to count FLOPs

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, seed: int = 0) -> None:
        super().__init__(linear, codec)
        self.name, self.seed = name, seed
        self.target = name  # by which PEFT's target_modules selects this layer
        # W as stored now = W of the checkpoint + the sum of the ledger. Rank 0 only, in host memory, s folded in.
        self.ledger: list[Change] = []
        self.taken = 0  # entries that left W before it was encoded
        # What a method remembers of the layer; a checkpoint saves all of it. An entry that is named in `spans` covers
        # only this rank's span: of the parameter with that name, or of W (the rows of engine.part). The other entries
        # are the same on every rank.
        self.memory: dict[str, Tensor] = {}
        self.spans: dict[str, str] = {}
        # Reads the untouched W from the checkpoint; set by whoever loads the model.
        self.source: Callable[[], Tensor] | None = None
        # Products beside the trained ones, with a factor of zeros whose gradient is read, see adapters/probes.py.
        self.probes: list[Product] = []
        self._refusal: RemovableHandle | None = None  # of forwards, until the method is started

    def await_start(self, method: str) -> None:
        """Refuse every forward until `started` is called. `method`: the name of the method, for the message.

        Without its start a method would train something else than what it is called, and nothing would fail.
        """
        self._refusal = self.register_forward_pre_hook(partial(_refuse_forward, method))

    def await_calibration(self, method: str) -> None:
        """Refuse every forward of training until `started` is called: the method has yet to look at data."""
        self._refusal = self.register_forward_pre_hook(partial(_refuse_training, method))

    def started(self) -> None:
        """Allow forwards: what the method does before its first step is done, or a checkpoint has restored it."""
        if self._refusal is not None:
            self._refusal.remove()
            self._refusal = None

    def factor(self, *size: int, trained: bool = True) -> nn.Parameter:
        """Return a new float32 parameter on W's device, without values."""
        return nn.Parameter(torch.empty(size, device=self.parts()[0].device), requires_grad=trained)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values, whole and on the host, of all parameters except W's parts and the bias.

        `pairs` are those of Method.starting_pairs: they were taken out of W, unless the adapter `takes` none.
        """
        raise NotImplementedError

    def direct(self, values: dict[str, Tensor], gradients: dict[str, Tensor], update: Update) -> None:
        """Replace the gradients of the parameters in `directed`, in the dictionary, see adapters/redirect.py. Local.

        values: of the parameters in `looks_at`; gradients: of those in `directed`, clipped. By their names, whole and
        float32.
        """
        raise NotImplementedError

    @classmethod
    def direct_together(
        cls,
        layers: Sequence[Adapter],
        values: Sequence[dict[str, Tensor]],
        gradients: Sequence[dict[str, Tensor]],
        updates: Sequence[Update],
    ) -> None:
        """`direct` for the adapters of one decoder layer. A class that can do them in one go needs fewer kernels."""
        for layer, looked_at, found, update in zip(layers, values, gradients, updates, strict=True):
            layer.direct(looked_at, found, update)

    @property
    def directing(self) -> str:
        """The name of what `direct` does, for a message."""
        return type(self).__name__

    @property
    def only_pairs(self) -> bool:
        """Whether s B A and `extras` are the whole change of W, apart from the ledger."""
        return False

    def lent(self) -> tuple[int, int]:
        """The elements of borrowed matrices that the products read: (frozen, trained), for a count of FLOPs."""
        sizes = [(p.numel(), p.requires_grad) for lender in self.borrows for p in lender.parameters() if p.ndim > 1]
        trained = sum(size for size, needs in sizes if needs)
        return sum(size for size, _ in sizes) - trained, trained

    def change(self, whole: Whole) -> Pairs:
        """The pairs that the parameters now add to the stored W, with s folded in. Collective."""
        raise NotImplementedError

    def extras(self, whole: Whole) -> dict[str, Tensor]:
        """The layer's other tensors that a PEFT checkpoint stores beside A and B. Collective."""
        return {}


def _refuse_forward(method: str, adapter: Adapter, *_: object) -> None:
    raise RuntimeError(
        f"{adapter.name}: {method} was attached and not started, so that this forward would not be that of {method}. "
        "Load the weights with llm_lowrank.models.loading.load, which starts the method (with resume_from, "
        "llm_lowrank.models.checkpoint.restore does), or set the values yourself and call started() on every adapter"
    )


def _refuse_training(method: str, adapter: Adapter, *_: object) -> None:
    if adapter.training:
        raise RuntimeError(
            f"{adapter.name}: {method} has seen no calibration samples yet, so that this step would not be that of "
            f"{method}. Call llm_lowrank.run.calibration.calibrate_on before the first step, or set the values "
            "yourself and call started() on every adapter"
        )


@dataclass(frozen=True)
class Inherited:
    """The pairs of an adapter that was trained before, from which a layer starts."""

    read: Callable[[], Pairs]  # float32, on the host; s B A of the layer is what the adapter changed
    rank: int  # pairs
    place: Place

    def __str__(self) -> str:
        return {"trained": "trained on", "weight": "frozen into W", "bank": "frozen into the bank"}[self.place]


@dataclass(frozen=True)
class PairSettings:
    """The settings of one layer with pairs, see PairAdapter."""

    rank: int  # r, the trainable pairs
    scale: float  # s
    bank: int = 0  # k, the frozen pairs that the bank has room for; 0: no bank
    dropout: float = 0.0  # on the input of the trained products
    seed: int = 0  # the run's; a layer draws from (seed, its name)
    direction: Direction = GRADIENT  # what the optimizer steps along


class PairAdapter(Adapter):
    """y = W x + s B A x + s bank_B bank_A x + bias, with A (r, n), B (m, r), bank_A (k, n), bank_B (m, k).

    A and B are float32 masters: they are trained as they are and cast to the compute dtype in forward. The bank of
    frozen pairs is float32 too, so that an exchange copies pairs bitwise. https://arxiv.org/abs/2106.09685 eq. 3

    A factor that `trains` does not name keeps its starting value. It is a float32 parameter without a gradient, like
    the bank: engines shard it, and a checkpoint stores it.
    """

    trains = "AB"  # the letters of the factors that are trained
    directed = looks_at = ("A", "B")

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> None:
        super().__init__(name, linear, codec, settings.seed)
        (m, n), rank, bank = self.shape, settings.rank, settings.bank
        self.rank, self.scale, self.dropout = rank, settings.scale, settings.dropout
        self.rule = settings.direction
        self.A = self.factor(rank, n, trained="A" in self.trains)
        self.B = self.factor(m, rank, trained="B" in self.trains)
        self.bank_A = self.factor(bank, n, trained=False) if bank else None
        self.bank_B = self.factor(m, bank, trained=False) if bank else None
        # The bank's slots that the method may use, the first ones. An engine may leave an empty tensor in the bank's
        # place, so that its length says nothing.
        self.bank_room: int = bank
        # Directions that wait to be trained, when they do not wait in the bank. Rank 0 only, in host memory.
        self.reserve: Pairs | None = None
        self.inherited: Inherited | None = None

    def inherit(self, inherited: Inherited) -> None:
        """Start from an adapter that was trained before. Call before the layer has values.

        Pairs that are frozen into the bank get slots of their own, the last ones: no exchange touches them.
        """
        (m, n), self.inherited = self.shape, inherited
        if inherited.place == "bank":
            slots = self.bank_room + inherited.rank
            self.bank_A, self.bank_B = self.factor(slots, n, trained=False), self.factor(m, slots, trained=False)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values of A, B and the bank.

        Of `pairs` the first r are trained and the others fill the bank. Without `pairs` A
        is uniform and B and the bank are zero, so that the function starts as it was. An inherited adapter that is
        trained on gives A and B, one that is frozen into the bank the last pairs there.
        """
        (m, n), r, bank = self.shape, self.rank, self.bank_room
        inherited = self.inherited
        if pairs is None:
            start = uniform_rows(r, n, generator(self.seed, self.name))
            with torch.device("cpu"):
                pairs = Pairs(torch.zeros(m, r + bank), torch.cat([start, torch.zeros(bank, n)]))
            if inherited is not None and inherited.place == "trained":
                pairs = Pairs.cat([inherited.read(), pairs.take(slice(r, None))])
        assert len(pairs) == r + bank, (
            f"{self.name}: {len(pairs)} starting pairs for {r} trainable and {bank} in the bank"
        )
        if inherited is not None and inherited.place == "bank":
            pairs = Pairs.cat([pairs, inherited.read()])
        values = {"A": pairs.A[:r], "B": pairs.B[:, :r]}
        return values | ({} if self.bank_A is None else {"bank_A": pairs.A[r:], "bank_B": pairs.B[:, r:]})

    # ---- what a method may override

    def direct(self, values: dict[str, Tensor], gradients: dict[str, Tensor], update: Update) -> None:
        pairs = Pairs(values["B"].double(), values["A"].double())
        found = Pairs(gradients["B"].double(), gradients["A"].double())
        directed = self.rule.direct(pairs, found, self.memory, update)
        gradients["A"], gradients["B"] = directed.A.float(), directed.B.float()

    @property
    def directing(self) -> str:
        return type(self.rule).__name__

    def products(self, x: Tensor) -> list[Product]:
        """The trained products that this forward adds to W x."""
        return [Product(self.A, self.B)]

    def direction(self) -> tuple[Tensor, Tensor] | None:
        """(magnitude, |rows of W|) for a method that trains the lengths of W's rows separately, otherwise None."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        bank = None if self.bank_A is None or self.bank_B is None else Product(self.bank_A, self.bank_B)
        # probes read what W reads: with them nothing is dropped
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training and not self.probes else None
        direction = self.direction()
        return adapter_linear(
            x,
            self.parts(),
            decode=self.decode,
            products=[*self.products(x), *self.probes],
            scale=self.scale,
            bias=self.bias,
            bank=bank,
            dropped=dropped,
            direction=direction,
            multiply=self.multiply(x) if direction is None else None,
        )

    def factors(self) -> tuple[nn.Parameter, ...]:
        """A, B and, with a bank, bank_A and bank_B."""
        if self.bank_A is None or self.bank_B is None:
            return self.A, self.B
        return self.A, self.B, self.bank_A, self.bank_B

    @property
    def only_pairs(self) -> bool:
        return self.bank_A is None

    def pairs(self, whole: Whole) -> Pairs:
        """The trained pairs, B and A as a PEFT LoRA names them. Collective."""
        return Pairs(whole(self.B), whole(self.A))

    def change(self, whole: Whole) -> Pairs:
        """s B A + s bank_B bank_A."""
        change = self.pairs(whole).scaled(self.scale)
        if self.bank_A is None or self.bank_B is None:
            return change
        return Pairs.cat([change, Pairs(whole(self.bank_B), whole(self.bank_A)).scaled(self.scale)])

    def extra_repr(self) -> str:
        bank = 0 if self.bank_A is None else len(self.bank_A)
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}, bank={bank}"


def as_pair_adapters(adapters: Sequence[Adapter]) -> list[PairAdapter]:
    """The same adapters, typed as PairAdapters."""
    assert all(isinstance(adapter, PairAdapter) for adapter in adapters)
    return list(adapters)  # type: ignore[arg-type]


def layer_number(name: str) -> int:
    """The number of the decoder layer in a module's name; -1 outside of the layers."""
    return next((int(word) for word in name.split(".") if word.isdigit()), -1)
