"""CORE: train a small dense matrix between two frozen bases, with Adam in the eigenbasis of its own gradient.

    y = W x + U S V^T x        U (m, p), V (n, p) frozen, orthonormal columns        S (p, p) trained, 0 at the start

U and V are the leading singular directions of dL/dW, L the mean loss of the first `samples` samples of the run. What
the layer computes is linear in S, so that no factor sets the length of another one's step, as A and B do in LoRA.

Adam works in a basis that follows the gradient of S, as SOAP does for whole weights (https://arxiv.org/abs/2409.11321).
With g = dL/dS = U^T (dL/dW) V, and Q_L, Q_R (p, p) orthogonal, at first 1:

    g' = Q_L^T g Q_R        m, v <- Adam's moments of g'        S <- S - rate Q_L [m^ / (sqrt(v^) + eps)] Q_R^T

and every K = `interval` steps, from the sums over these steps:

    sum g' g'^T = R_L diag(a) R_L^T        sum g'^T g' = R_R diag(b) R_R^T
    Q_L <- Q_L R_L        Q_R <- Q_R R_R        m^ <- R_L^T m^ R_R        v^_ij <- a_i b_j / (K sum a)

v^ is now the second moment of a gradient whose covariance is a Kronecker product, and Adam's bias is corrected as after
K steps. To turn U, S and V themselves would be the same run. Here only the optimizer's state turns, so that the
function is kept bitwise and no shard is rewritten.

The change of W is a LoRA of rank p, with B = U S and A = V^T.

Modules i that read the same x may share V (`share_v`), one frozen matrix in place of one for each:

    y_i = W_i x + U_i S_i V^T x        V: leading eigenvectors of sum_i G_i^T G_i / |G_i|^2,  G_i = dL/dW_i

U_i comes from G_i alone, as before. Each module has the same say in V, for Adam's steps do not depend on |G_i| either:
the gradient of k is often a small part of that of v, and V would be v's.

A turn needs nothing for that. V never turns: what turns is the basis Q_R,i (p, p) of each module's own optimizer.

A long run may leave the first subspace. At the steps that `exchanges` names, these p pairs freeze, and training starts
again between new bases:

    W <- W + U S V^T, or the bank <- (U S, V^T)        U, V <- from the gradient at the next `samples` samples
    S <- 0        Adam starts anew: m = v = 0, Q_L = Q_R = 1, no step counted        the function stays
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter, Shared, Whole, fill_, generator
from llm_lowrank.adapters.direction import Update
from llm_lowrank.adapters.exchange import Exchanged, Into, check_drift, into_weight_, needs_bank, probe
from llm_lowrank.adapters.method import Method
from llm_lowrank.adapters.probes import probe_bytes, top_directions
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.numerics.functional import Product, adapter_linear
from llm_lowrank.numerics.gram import eigh_on_host, in_one_copy
from llm_lowrank.numerics.pairs import Pairs
from llm_lowrank.numerics.spectrum import Triplets

FLOOR = 1e-3  # of the mean second moment, added to each: a direction without a gradient is not divided by zero
COLUMNS = 1.5  # of a product with dL/dW, for each direction that is wanted
# last words of the names of siblings that read the same x
READ_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
Memory = dict[str, Tensor]


@Method.register_subclass("core")
@dataclass(frozen=True)
class Core(Method):
    """Train a dense p x p matrix per module between the leading directions of the gradient of the first samples."""

    p: int = 64
    """Rows and columns of a module's trained matrix: the rank of what is exported."""
    like_rank: int | None = None
    """Instead of p: train as many parameters as a LoRA of this rank, p = floor(sqrt(like_rank (m + n))); by default p
    counts."""
    samples: int = 256
    """Samples whose gradient gives the bases: the first ones of the run. 0: random bases."""
    svd_niter: int = 2
    """Iterations of the randomized SVD of that gradient, of two passes over the samples each; two more passes come
    before and after."""
    interval: int = 15
    """Steps after which the optimizer's basis turns."""
    share_v: bool = False
    """Share V between q_proj, k_proj and v_proj of a layer, and between its gate_proj and up_proj, where p is the same:
    fewer frozen bases."""
    exchanges: list[int] = field(default_factory=list)
    """Exchange steps, in ascending order: U S V^T freezes, and S starts at zero between new bases; by default none."""
    into: Into = "auto"
    """Where U S V^T goes at an exchange: into the weight, or unrounded into a bank beside it; auto: weight if it is
    float32, else bank."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        complaints += [
            f"method.{name} must be at least {least}, not {getattr(self, name)}"
            for name, least in (("p", 1), ("like_rank", 1), ("samples", 0), ("svd_niter", 0), ("interval", 1))
            if getattr(self, name) is not None and getattr(self, name) < least
        ]
        complaints += self.wrong_decays("beta1", "beta2")
        if any(earlier >= later for earlier, later in pairwise((0, *self.exchanges))):
            complaints.append(
                f"method.exchanges must be steps from 1 on in ascending order, each once, not {self.exchanges}"
            )
        return complaints + ([] if self.eps > 0 else [f"method.eps must be above 0, not {self.eps:g}"])

    @property
    def directs(self) -> bool:
        return True

    @property
    def own_step(self) -> str:
        return "method.type: core"

    @property
    def calibration(self) -> int:
        return self.samples

    @property
    def recalibrates(self) -> bool:
        return self.samples > 0

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        layers = _cores(adapters)
        probes = probe_bytes(layers, [_columns(layer) for layer in layers]) if self.samples else 0
        steps = sum(remembered(layer.p) for layer in layers)  # nothing yet during the first calibration
        return 0, probes + steps if self.exchanges else max(probes, steps)

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        m, n = linear.weight.shape
        p, setting = (self.p, "p") if self.like_rank is None else (math.isqrt(self.like_rank * (m + n)), "like_rank")
        if p > min(m, n):
            raise ValueError(
                f"{name}: method.{setting} asks for p = {p}, more than min(m, n) = {min(m, n)} of its {m} x {n} "
                f"weight; lower it, or leave the module out: --method.exclude_modules {name.rpartition('.')[2]}"
            )
        bank = p * len(self.exchanges) if needs_bank(self.into, codec) else 0
        return CoreLayer(name, linear, codec, seed, p, self, bank=bank)

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        if not self.share_v:
            return
        groups: dict[tuple[str, int, int], list[CoreLayer]] = defaultdict(list)
        for layer in _cores(adapters):
            parent, _, word = layer.name.rpartition(".")
            for number, words in enumerate(READ_TOGETHER):
                if word in words:
                    groups[parent, number, layer.p].append(layer)
        together = {key: layers for key, layers in groups.items() if len(layers) > 1}
        if not together:
            named = "; ".join(", ".join(words) for words in READ_TOGETHER)
            raise ValueError(
                f"method.share_v: no two of the adapted modules share a V. These could, where p is the same: {named}. "
                "Leave it out"
            )
        for (parent, _, _), layers in together.items():
            # the modules' own parent owns the basis, so that an engine shards and gathers it with their layer
            basis, word = Basis(layers), layers[0].name.rpartition(".")[2]
            model.get_submodule(parent).add_module(f"v_of_{word}", basis)
            for layer in layers:
                layer.join(basis)

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        if late := [step for step in self.exchanges if step >= total_steps]:
            raise ValueError(
                f"method.exchanges names step {late[0]}, and the run has {total_steps} steps: nothing would be trained "
                "after that exchange; leave it out or train longer"
            )
        return tuple(self.exchanges)

    def calibrate(self, adapters: list[Adapter], engine: Engine, backward: Callable[[], None]) -> None:
        layers = _cores(adapters)
        found = top_directions(
            layers,
            engine,
            backward,
            # a direction that is none of the first p of each module may be one of all together
            [layer.p if layer.right is layer else min(_columns(layer), *layer.shape) for layer in layers],
            columns=[_columns(layer) for layer in layers],
            niter=self.svd_niter,
        )
        lent: dict[Basis, list[Triplets]] = defaultdict(list)
        for layer, triplets in zip(layers, found, strict=True):
            if triplets.S[0] == 0:
                continue  # the samples do not reach this layer; its bases stay random
            if isinstance(layer.right, Basis):
                lent[layer.right].append(triplets)
            with engine.edit(*layer.bases()) as (u, *vt):
                u.value.copy_(triplets.U[:, : layer.p])
                for own in vt:
                    own.value.copy_(triplets.V.T)
        # ranks may round a decomposition differently: all take that of rank 0
        shared = engine.broadcast(lambda: [leading(found, basis.p) for basis, found in lent.items()]) if lent else []
        for basis, V in zip(lent, shared, strict=True):
            with engine.edit(basis.Vt) as (vt,):
                vt.value.copy_(V.T)

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        number, layers = self.exchanges.index(step), _cores(adapters)
        events = [freeze_(engine, layer, number, step) for layer in layers]
        # last, as U S V^T is zero by now in all modules that read such a V
        lent = dict.fromkeys(layer.right for layer in layers if isinstance(layer.right, Basis))
        fresh = engine.broadcast(lambda: [basis.afresh(step) for basis in lent]) if lent else []
        for basis, new in zip(lent, fresh, strict=True):
            with engine.edit(basis.Vt) as (vt,):
                vt.value.copy_(new)
        return Exchanged.total(events)

    def steps_since(self, step: int) -> int:
        """The steps that were done before this 0-based one since the start or the last exchange."""
        return step - max((exchanged for exchanged in self.exchanges if exchanged <= step), default=0)

    # ---- the optimizer of S; everything is float64, and (k, p, p) for k modules in one go

    def step_along(self, gradients: Tensor, memory: Memory, step: int) -> Tensor:
        """Return the steps of S in units of the rate, and remember the gradients; both (k, p, p).

        step: 0-based, counted from the last exchange.

        The host reads nothing of the device, but at the steps at which the basis turns.
        """
        Q_L, Q_R, m, v, seen = (memory[f"core_{name}"] for name in ("Q_L", "Q_R", "m", "v", "seen"))
        g = Q_L.mT @ gradients @ Q_R
        memory["core_left"] += g @ g.mT
        memory["core_right"] += g.mT @ g
        m.lerp_(g, 1 - self.beta1)
        v.lerp_(g.square(), 1 - self.beta2)
        memory["core_taken"] += 1
        seen += 1
        mean, size = m / (1 - self.beta1**seen), (v / (1 - self.beta2**seen)).sqrt()
        along = Q_L @ (mean / (size + self.eps)) @ Q_R.mT
        if (step + 1) % self.interval == 0:
            self.turn(memory)
        return along

    def turn(self, memory: Memory) -> None:
        """Turn the bases to the eigenvectors of the last gradients, and carry the moments over."""
        (a, R_L), (b, R_R) = (spectra(memory[f"core_{side}"]) for side in ("left", "right"))
        # K steps were taken since the last turn: fewer than `interval` if some gradients were not finite
        K, m, v, seen = (memory[f"core_{name}"] for name in ("taken", "m", "v", "seen"))
        energy = a.sum(-1)[:, None, None]
        turns = energy > 0  # otherwise every gradient of the module was zero
        second = a[:, :, None] * b[:, None, :] / (K * energy)
        second += FLOOR * second.mean((1, 2), keepdim=True)
        carried = R_L.mT @ m @ R_R * ((1 - self.beta1**K) / (1 - self.beta1**seen))
        v.copy_(torch.where(turns, second * (1 - self.beta2**K), v))
        m.copy_(torch.where(turns, carried, m))
        for name, turned in (("Q_L", R_L), ("Q_R", R_R)):
            basis = memory[f"core_{name}"]
            basis.copy_(torch.where(turns, basis @ turned, basis))
        seen.copy_(torch.where(turns, K, seen))
        for name in ("left", "right", "taken"):
            memory[f"core_{name}"].zero_()


class Basis(Shared):
    """What modules that read the same x share: `Vt` = V^T (p, n), and with a bank its side of x, `bank_A` (k, n)."""

    stays_gathered = False  # two or three modules read it, and it travels for each as an own V would

    def __init__(self, layers: Sequence[CoreLayer]) -> None:
        super().__init__()
        first = layers[0]
        self.n, self.bank_room = first.shape[1], first.bank_room
        self.name = "+".join([first.name, *(layer.name.rpartition(".")[2] for layer in layers[1:])])
        self.seed, self.p = first.seed, first.p
        self.Vt = first.factor(self.p, self.n, trained=False)
        self.bank_A = first.factor(self.bank_room, self.n, trained=False) if self.bank_room else None
        fill_(self)

    def initial(self) -> dict[str, Tensor]:
        """The starting values: a random V, which `calibrate` replaces."""
        with torch.device("cpu"):
            bank = {"bank_A": torch.zeros(self.bank_room, self.n)} if self.bank_room else {}
        return {"Vt": self.afresh()} | bank

    def afresh(self, step: int = 0) -> Tensor:
        """A random V^T on the host. step: the exchange step, or 0 for the start."""
        return orthonormal(self.n, self.p, generator(self.seed, self.name, step)).T.contiguous()


class CoreLayer(Adapter):
    """A frozen linear with U S V^T beside it: `U` (m, p) and `Vt` = V^T (p, n) are frozen, `S` (p, p) is trained.

    The bank has room for the p pairs of each exchange: `bank_B` (m, k), `bank_A` (k, n). A layer that shares V has
    neither Vt nor bank_A: `right` has them.
    """

    directed = ("S",)

    def __init__(
        self, name: str, linear: nn.Linear, codec: Codec, seed: int, p: int, method: Core, *, bank: int = 0
    ) -> None:
        super().__init__(name, linear, codec, seed)
        m, n = self.shape
        self.p, self.method = p, method
        self.bank_room: int = bank
        self.stacked: Memory | None = None  # of the first layer of those that step in one go
        self.U, self.Vt = self.factor(m, p, trained=False), self.factor(p, n, trained=False)
        self.S = self.factor(p, p)
        self.bank_A = self.factor(bank, n, trained=False) if bank else None
        self.bank_B = self.factor(m, bank, trained=False) if bank else None

    def join(self, basis: Basis) -> None:
        """Read V^T and the bank's A of this basis from now on, in place of its own."""
        del self.Vt, self.bank_A
        self.borrows = (basis,)

    @property
    def right(self) -> CoreLayer | Basis:
        """Whose Vt and bank_A the layer reads: its own, or those that it shares."""
        return next((lender for lender in self.borrows if isinstance(lender, Basis)), self)

    def bases(self) -> list[nn.Parameter]:
        """U and, if the layer does not share it, Vt."""
        return [self.U, *([self.Vt] if self.right is self else [])]

    def bank(self) -> tuple[nn.Parameter, nn.Parameter] | None:
        """bank_A and bank_B, or None without a bank."""
        A, B = self.right.bank_A, self.bank_B
        return None if A is None or B is None else (A, B)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """The starting values: random bases, which `calibrate` replaces, and S = 0: the function starts as it was."""
        assert pairs is None, "core takes no pairs out of W"
        (m, n), k = self.shape, self.bank_room
        with torch.device("cpu"):
            bank = {"bank_B": torch.zeros(m, k)} if k else {}
            bank |= {"bank_A": torch.zeros(k, n)} if k and self.right is self else {}
        return self.afresh() | bank

    def afresh(self, step: int = 0) -> dict[str, Tensor]:
        """S = 0 and random U and own V^T, on the host. step: the exchange step, or 0 for the start."""
        (m, n), random = self.shape, generator(self.seed, self.name, step)
        U = orthonormal(m, self.p, random)
        right = {"Vt": orthonormal(n, self.p, random).T.contiguous()} if self.right is self else {}
        with torch.device("cpu"):
            return {"S": torch.zeros(self.p, self.p), "U": U} | right

    def forward(self, x: Tensor) -> Tensor:
        core = Product(self.right.Vt, self.U, core=self.S)
        banked = [] if (bank := self.bank()) is None else [Product(*bank)]
        return adapter_linear(
            x,
            self.parts(),
            decode=self.decode,
            products=[core, *banked, *self.probes],
            scale=self.scale,
            bias=self.bias,
            multiply=self.multiply(x),
        )

    @classmethod
    def direct_together(
        cls,
        layers: Sequence[Adapter],
        values: Sequence[dict[str, Tensor]],
        gradients: Sequence[dict[str, Tensor]],
        updates: Sequence[Update],
    ) -> None:
        """Replace the gradients of S by the steps, for all modules whose p is the same in one go."""
        all_cores = _cores(layers)
        for p in sorted({layer.p for layer in all_cores}):
            at = [i for i, layer in enumerate(all_cores) if layer.p == p]
            cores, method = [all_cores[i] for i in at], all_cores[0].method
            stacked = torch.stack([gradients[i]["S"] for i in at]).double()
            since = method.steps_since(updates[0].step)
            steps = method.step_along(stacked, memory_of(cores, stacked), since).float()
            for i, along in zip(at, steps, strict=True):
                gradients[i]["S"] = along

    def pairs(self, whole: Whole) -> Pairs:
        """The p pairs of U S V^T. Collective."""
        return Pairs(whole(self.U) @ whole(self.S), whole(self.right.Vt))

    def change(self, whole: Whole) -> Pairs:
        """U S V^T and the bank."""
        if (bank := self.bank()) is None:
            return self.pairs(whole)
        A, B = bank
        return Pairs.cat([self.pairs(whole), Pairs(whole(B), whole(A))])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}, bank={self.bank_room}"


@torch.no_grad()
def freeze_(engine: Engine, layer: CoreLayer, number: int, step: int) -> Exchanged:
    """Freeze U S V^T and start S at zero between random bases; the function does not change. Collective.

    A V that the layer shares stays, for others still read it.

    number: of the exchange, from 0. step: so many steps are done.
    """

    def answer() -> Tensor:
        change = layer.change(engine.whole)
        return engine.weight(layer).matmul(x) + change.B @ (change.A @ x)

    x, lost = probe(engine, layer), 0.0
    before, trained = answer(), layer.pairs(engine.whole)
    # ranks may round U S and a basis differently: all take those of rank 0
    B, *fresh = engine.broadcast(lambda: [trained.B, *layer.afresh(step).values()])
    trained = Pairs(B, trained.A)
    # the trained pairs go into W, or into their place in the bank
    if (place := layer.bank()) is None:
        lost = into_weight_(engine, layer, trained.take(trained.B.any(0)))
    else:
        with engine.edit(*place) as (a, b):  # modules that share bank_A leave the same there
            bank, where = Pairs(b.value, a.value), torch.arange(layer.p, device=engine.device) + number * layer.p
            assert not bank.B[:, where].any(), f"{layer.name}: the bank's place of exchange {number + 1} is not empty"
            bank.put_(where, trained)
    # S, U and an own V^T start again, and Adam with them: `memory_of` makes its state at the next step
    with engine.edit(layer.S, *layer.bases()) as slots:
        for slot, value in zip(slots, fresh, strict=True):
            slot.value.copy_(value)
    layer.memory.clear()
    layer.stacked = None
    into_bank = place is not None
    drift = check_drift(layer, before, answer(), exact=into_bank)
    engine.release(4 * math.prod(layer.shape))  # as float32
    # time and traffic are measured around the whole hook, see measure_exchange
    return Exchanged(layer.p, into="bank" if into_bank else "weight", drift=drift, lost=lost, seconds=0.0, traffic=0)


def start(like: Tensor) -> Memory:
    """What is remembered before the first step. like: gradients of S, (k, p, p)."""
    zero, one = torch.zeros_like(like), torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    matrices = {"Q_L": one, "Q_R": one, "m": zero, "v": zero, "left": zero, "right": zero}
    counts = {"seen": zero[:, :1, :1], "taken": zero[:, :1, :1]}  # steps for Adam's bias; since the last turn
    whole = {name: value.expand_as(zero) for name, value in matrices.items()} | counts
    return {f"core_{name}": value.clone(memory_format=torch.contiguous_format) for name, value in whole.items()}


def memory_of(cores: Sequence[CoreLayer], like: Tensor) -> Memory:
    """Return what these layers remember, each tensor stacked; what they hold themselves are views of it.

    It is stacked once, at the first step of a run or after it resumed.
    """
    first = cores[0]
    if first.stacked is None or any(
        layer.memory.get(name) is None or layer.memory[name].data_ptr() != value[i].data_ptr()
        for name, value in first.stacked.items()
        for i, layer in enumerate(cores)
    ):
        new = start(like)
        first.stacked = {
            name: torch.stack([layer.memory.get(name, value[i]) for i, layer in enumerate(cores)])
            for name, value in new.items()
        }
        for i, layer in enumerate(cores):
            layer.memory |= {name: value[i] for name, value in first.stacked.items()}
    return first.stacked


def orthonormal(size: int, count: int, random: torch.Generator) -> Tensor:
    """Random orthonormal columns, (size, count), on the host."""
    with torch.device("cpu"):
        return torch.linalg.qr(torch.randn(size, count, generator=random))[0]


def leading(found: Sequence[Triplets], p: int) -> Tensor:
    """The p leading eigenvectors of sum_i G_i^T G_i / |G_i|^2, (n, p), from the leading singular triplets of each G_i.

    They are the left singular vectors of [V_1 diag(S_1) / |S_1|, V_2 diag(S_2) / |S_2|, ...].
    """
    sides = torch.cat([triplets.V * (triplets.S / triplets.S.norm()) for triplets in found], 1)
    return torch.linalg.svd(sides, full_matrices=False)[0][:, :p]


def spectra(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k, p), none below 0, and eigenvectors (k, p, p) of k positive semidefinite matrices."""
    values, V = eigh_on_host(grams)
    return in_one_copy(values.clamp_min(0), V, grams.device)


def remembered(p: int) -> int:
    """The bytes that `start` returns."""
    return 8 * (6 * p * p + 2)


def _columns(layer: CoreLayer) -> int:
    return math.ceil(COLUMNS * layer.p)


def _cores(adapters: Sequence[Adapter]) -> list[CoreLayer]:
    assert all(isinstance(adapter, CoreLayer) for adapter in adapters)
    return list(adapters)  # type: ignore[arg-type]
