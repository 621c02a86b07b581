"""LoSiA: train a sub-matrix of every W and move it to where it matters.  https://arxiv.org/abs/2507.04487

    y = x W^T + x_Y S^T placed at the outputs X       S (p, q) is trained; the layer computes with W[X, Y] + S
    dS = g_X^T x_Y                                    LoSiA-Pro: the compact gradient, never dL/dW; of x only x_Y stays

Slots of `period` steps belong to the layers in turn. In its slot a layer records the importance of all its entries,
from dL/dW:

    I = |w dL/dw - (w dL/dw)^2 / 2|      mean, spread: moving averages (importance.py)      Q = mean * spread

At the end of its slot the layer chooses rows X and columns Y with a large sum of Q[X, Y]: the best of three greedy
choices. This is the layer's exchange step: W[X, Y] += S (if W cannot be written, S stays in the bank as a live block),
S = 0 at the new place, the moments of S start anew, and the layer's rate warms up.

m out, n in, |X| = p = floor(factor m), |Y| = q = floor(factor n). In the output layer only rows are chosen,
floor(output_factor m) of them.

The published code writes S into W at every step. Here S is the change since the slot began, as float32: a bfloat16 W is
rounded once a slot instead of at every step, a quantized W is never touched, and no rank writes its shard of W while
training. docs/design/0003 has the comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llm_lowrank.adapters.adapter import Adapter, Whole, generator, layer_number
from llm_lowrank.adapters.exchange import Exchanged, Into, check_drift, into_weight_, needs_bank, probe
from llm_lowrank.adapters.method import Method, output_layer
from llm_lowrank.codecs import Codec
from llm_lowrank.engines.base import Engine
from llm_lowrank.engines.weight import Weight
from llm_lowrank.numerics import importance
from llm_lowrank.numerics.functional import Decode, Multiply, base_linear, compute_dtype, flat_rows, unflattened
from llm_lowrank.numerics.pairs import Block, Pairs

Importance = Literal["mix", "first", "second"]
Record = Callable[[Tensor | None, Tensor], None]


class Subnet(Adapter):
    """The block S (p, q) at rows X and columns Y, and the bank: blocks that were trained before and cannot go into W.

    X and Y are in `memory`: numbers of rows and columns, in ascending order, the same on every rank.
    """

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        *,
        codec: Codec,
        seed: int,
        size: tuple[int, int],
        live: int,
        pro: bool,
    ) -> None:
        super().__init__(name, linear, codec, seed)
        self.size, self.live, self.pro = size, live, pro
        self.S = self.factor(*size)
        self.bank_S = self.factor(live * size[0], size[1], trained=False) if live else None
        random = generator(seed, name)
        for axis, (key, count) in enumerate(zip(("rows", "columns"), size, strict=True)):
            with torch.device("cpu"):
                self.memory[key] = torch.randperm(self.shape[axis], generator=random)[:count].sort().values
        # X and Y of the bank's live blocks, in the order of the blocks
        self.memory["live_rows"] = self.memory["rows"].new_zeros(0, size[0])
        self.memory["live_columns"] = self.memory["columns"].new_zeros(0, size[1])
        self.record: Record | None = None  # the next backward calls this with dL/dW; None: it is not recorded
        self.dense: Tensor | None = None  # the sum of dL/dW over this rank's micro-batches

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        """S and the bank start as zeros."""
        assert pairs is None
        zeros = {"S": torch.zeros(self.size, device="cpu")}
        return zeros | ({"bank_S": torch.zeros(self.bank_S.shape, device="cpu")} if self.bank_S is not None else {})

    def places(self) -> list[tuple[slice, Tensor, Tensor]]:
        """(rows in `bank_S`, X, Y) of every live block."""
        p = self.size[0]
        live = zip(self.memory["live_rows"], self.memory["live_columns"], strict=True)
        return [(slice(k * p, (k + 1) * p), rows, columns) for k, (rows, columns) in enumerate(live)]

    @torch.compiler.disable  # backward records the gradient of W
    def forward(self, x: Tensor) -> Tensor:
        at = self.memory["rows"], self.memory["columns"]
        record = self.record if self.training else None
        if self.pro:
            return _SubnetLinear.apply(
                x,
                self.S,
                self.bank_S,
                self.bias,
                *at,
                self.places(),
                self.decode,
                self.multiply(x),
                record,
                *self.parts(),
            )
        # without Pro, to compare: autograd makes dL/dW of the whole W, and its block
        w = self.decode(*self.parts())
        for rows, row, column in self.places():
            assert self.bank_S is not None
            w = w.index_put((row[:, None], column), self.bank_S[rows].to(w.dtype), accumulate=True)
        w = w.index_put((at[0][:, None], at[1]), self.S.to(w.dtype), accumulate=True)
        if record is not None and w.requires_grad:  # reentrant checkpointing runs the first forward without gradients
            w.register_hook(partial(record, None))
        return base_linear(x, w, self.bias)

    def record_gradient(self, g: Tensor | None, x: Tensor) -> None:
        """Add g^T x to dL/dW, or x itself if g is None.  g (t, m), x (t, n), or x (m, n)"""
        if self.dense is None:
            self.dense = torch.zeros(self.shape, device=x.device)
        self.dense.add_(x if g is None else g.T @ x)

    def blocks_beside(self, whole: Whole) -> list[Block]:
        """S and the live blocks. Collective."""
        blocks = [Block(self.memory["rows"], self.memory["columns"], whole(self.S), self.shape)]
        if self.bank_S is not None:
            bank = whole(self.bank_S)
            blocks += [Block(rows, columns, bank[at], self.shape) for at, rows, columns in self.places()]
        return blocks

    def change(self, whole: Whole) -> Pairs:
        return Pairs.cat([block.pairs() for block in self.blocks_beside(whole)])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, subnet={self.size[0]} x {self.size[1]}, live={self.live}"


class _SubnetLinear(torch.autograd.Function):
    """y = x W^T + sum over S and the live blocks of (x_Y S^T at X) + b.

    Of x only x_Y is kept for backward, or all of x while dL/dW is recorded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        S: Tensor,
        blocks: Tensor | None,
        bias: Tensor | None,
        rows: Tensor,
        columns: Tensor,
        places: list[tuple[slice, Tensor, Tensor]],
        decode: Decode,
        multiply: Multiply | None,
        record: Record | None,
        *parts: Tensor,
    ) -> Tensor:
        ctx.dtype, ctx.x_dtype = compute_dtype(x), x.dtype
        ctx.places, ctx.decode, ctx.record = places, decode, record
        with torch.autocast(x.device.type, enabled=False):
            flat = flat_rows(x.to(ctx.dtype))  # (t, n)
            y = multiply(flat, bias, *parts) if multiply else base_linear(flat, decode(*parts), bias)  # (t, m)
            x_Y = _columns(flat, columns)  # (t, q)
            _add_columns_(y, rows, x_Y @ S.to(ctx.dtype).T)
            for at, X, Y in places:
                assert blocks is not None
                _add_columns_(y, X, _columns(flat, Y) @ blocks[at].to(ctx.dtype).T)
        read = (flat if record is not None else x_Y) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(read, S, blocks, rows, columns, *parts)
        return unflattened(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        read, S, blocks, rows, columns, *parts = ctx.saved_tensors
        dx = dS = None
        with torch.autocast(g.device.type, enabled=False):
            flat = flat_rows(g.to(ctx.dtype))  # (t, m)
            g_X = _columns(flat, rows)  # (t, p)
            # dx: W's part, then that of S and of each live block
            if ctx.needs_input_grad[0]:
                dx = flat @ ctx.decode(*parts).to(ctx.dtype)  # (t, n)
                _add_columns_(dx, columns, g_X @ S.to(ctx.dtype))
                for at, X, Y in ctx.places:
                    _add_columns_(dx, Y, _columns(flat, X) @ blocks[at].to(ctx.dtype))
                dx = dx.view(*g.shape[:-1], dx.shape[1]).to(ctx.x_dtype)
            # dS, and in the layer's slot dL/dW from all of x
            if ctx.needs_input_grad[1]:
                if ctx.record is not None:
                    ctx.record(flat, read)
                    read = _columns(read, columns)
                dS = (g_X.T @ read).to(S.dtype)  # (p, q)
        return dx, dS, *(None for _ in range(8)), *(None for _ in parts)


def _columns(x: Tensor, at: Tensor) -> Tensor:
    return x if len(at) == x.shape[1] else x.index_select(1, at)


def _add_columns_(y: Tensor, at: Tensor, more: Tensor) -> None:
    if len(at) == y.shape[1]:
        y.add_(more)
    else:
        y.index_add_(1, at, more)


# --- choosing ---------------------------------------------------------------------------------------------------------


def localize(q: Tensor, part: Weight, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return rows X and columns Y with a large sum of Q[X, Y]: the best of three greedy choices.

    q: my rows of Q, zero where an entry belongs to another rank; size: (|X|, |Y|). Only sums of rows and columns
    travel. Collective.
    """
    m, (row_count, column_count) = part.shape[0], size
    q = q.double()

    def row_sums(block: Tensor) -> Tensor:  # my rows' sums -> all rows' sums, (m,)
        sums = torch.zeros(m, dtype=q.dtype, device=q.device)
        sums[part.rows] = block.sum(1)
        return part.sum(sums)

    def column_sums(rows: Tensor | None) -> Tensor:  # over some rows of Q, or all, (n,)
        return part.sum((q if rows is None else q * _indicator(rows, m)[part.rows, None]).sum(0))

    best_rows, best_columns = top(row_sums(q), row_count), top(column_sums(None), column_count)
    choices = [
        (best_rows, best_columns),  # each by its sums over the whole of Q
        (best_rows, top(column_sums(best_rows), column_count)),  # rows first, then columns by their sums in these rows
        (top(row_sums(q[:, best_columns]), row_count), best_columns),  # columns first
    ]
    # a sum over the block takes another round, as each rank has only some of the rows
    sums = [float(row_sums(q[:, columns])[rows].sum()) for rows, columns in choices]
    return choices[sums.index(max(sums))]


def top(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest scores, in ascending order; of equal scores the first."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def _indicator(at: Tensor, total: int) -> Tensor:
    """(total,) with 1 at the indices `at`, otherwise 0."""
    indicator = torch.zeros(total, dtype=torch.float64, device=at.device)
    indicator[at] = 1.0
    return indicator


# --- the method -------------------------------------------------------------------------------------------------------


@Method.register_subclass("losia")
@dataclass(frozen=True)
class LoSiA(Method):
    """Train a sub-matrix of every weight and exchange it, layer by layer, for the entries that matter most."""

    factor: float = 0.125
    """Share of the rows and of the columns of a weight that is trained (the paper's p)."""
    output_factor: float = 0.125
    """Share of the rows of the output layer that is trained (the paper's p_o); 0: none. A layer tied to the embeddings
    needs 0."""
    period: int = 100
    """Steps of a slot; every layer has one exchange in period x number of layers steps."""
    importance: Importance = "mix"
    """Importance of an entry w with gradient g: mix |wg - (wg)^2 / 2|, first |wg|, second (wg)^2."""
    beta1: float = 0.85
    """Decay of the mean importance."""
    beta2: float = 0.85
    """Decay of the spread of the importance (uncertainty)."""
    rewarm_steps: int = -1
    """Steps over which a layer's rate warms up after its exchange; -1: as many as period, 0: none."""
    into: Into = "auto"
    """Where the trained block of a layer goes at an exchange: into the weight, or into a bank of live blocks; auto:
    weight if it is dense."""
    max_live_blocks: int = 4
    """Blocks of a layer that the bank has room for."""
    moments: Literal["seeded", "zeroed"] = "seeded"
    """Second moment at a new place: mean of the old place's, or zero (first updates up to 6.5 times too large)."""
    export_rank: int | None = 256
    """Largest rank of the exported LoRA; the error of that is printed, and the merged model has the whole change."""
    pro: bool = True
    """Compact gradients; false: the gradient of the whole W, then its block (slow, to compare)."""

    def complaints(self) -> list[str]:
        complaints = super().complaints()
        for name, low in (("factor", "above 0"), ("output_factor", "at least 0")):
            value = getattr(self, name)
            if not 0 <= value <= 1 or (value == 0 and name == "factor"):
                complaints.append(f"method.{name} must be {low} and at most 1, not {value}")
        complaints += self.wrong_decays("beta1", "beta2")
        for name, least in (("period", 1), ("rewarm_steps", -1), ("max_live_blocks", 1)):
            if getattr(self, name) < least:
                complaints.append(f"method.{name} must be at least {least}, not {getattr(self, name)}")
        return complaints

    def statistics(self, adapters: Sequence[Adapter]) -> tuple[int, int]:
        """The bytes of mean and spread of one layer's entries, and of the layer's gradients, summed on every rank.

        All three are float32.
        """
        layers = [
            sum(4 * a.shape[0] * a.shape[1] for a in adapters if a.group == group) for group in range(_groups(adapters))
        ]
        return 2 * max(layers), max(layers)

    def targets(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The linear modules that `target_modules` names, and the output layer if `output_factor` is above 0."""
        wanted, output = super().targets(model), output_layer(model)
        if self.output_factor == 0:
            named = next((name for name, module in wanted.items() if module is output), None)
            if named is not None:
                raise ValueError(
                    f"method.target_modules names {named}, the output layer, of which method.output_factor: 0 trains "
                    "nothing"
                )
            return wanted
        name, layer = next(
            ((k, m) for k, m in model.named_modules() if m is output and isinstance(m, nn.Linear)), (None, None)
        )
        if name is None or layer is None:
            raise ValueError("method.output_factor is above 0, but the model has no linear output layer; set it to 0")
        if _is_tied(model, layer):
            raise ValueError(
                f"method.output_factor: {name} shares its weight with the embeddings, which would change too; set "
                "method.output_factor: 0"
            )
        return wanted | {name: layer}

    def build(self, name: str, linear: nn.Linear, codec: Codec, seed: int) -> Adapter:
        m, n = linear.weight.shape
        # the only module outside of the decoder layers is the output layer
        output = self.output_factor > 0 and layer_number(name) < 0
        size = (int(self.output_factor * m), n) if output else (int(self.factor * m), int(self.factor * n))
        if 0 in size:
            setting = "output_factor" if output else "factor"
            raise ValueError(
                f"{name}: method.{setting} {getattr(self, setting)} of its {m} x {n} weight is less than one row or "
                "column; raise it"
            )
        # any dense W takes the block, also one in bfloat16: a block is rounded once
        bank = needs_bank("weight" if self.into == "auto" and codec.writable else self.into, codec)
        live = self.max_live_blocks if bank else 0
        return Subnet(name, linear, codec=codec, seed=seed, size=size, live=live, pro=self.pro)

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        """Number the groups: the output layer's, if it is trained, then one for each decoder layer.

        Each of the N groups owns every N-th slot.
        """
        order = sorted({layer_number(adapter.name) for adapter in adapters})
        for adapter in adapters:
            adapter.group = order.index(layer_number(adapter.name))

    def schedule(self, total_steps: int, adapters: Sequence[Adapter] = ()) -> tuple[int, ...]:
        """The ends of all slots before the end of the run: after an exchange there nothing could be learned any more.

        Raise ValueError if the bank has no room for the blocks of so many exchanges.
        """
        count = _groups(adapters)
        live = min((a.live for a in _subnets(adapters) if a.live), default=0)
        for group in range(count):
            exchanges = len(self.group_exchanges(group, count, total_steps - 1))
            if live and exchanges > live:
                raise ValueError(
                    f"every layer moves {exchanges} times in {total_steps} steps, and the bank has room for {live} "
                    f"blocks; raise method.period to {(total_steps - 1) // (count * live + 1) + 1} or more, or "
                    f"method.max_live_blocks to {exchanges}"
                )
        return tuple(range(self.period, total_steps, self.period))

    def group_exchanges(self, group: int, groups: int, done: int) -> list[int]:
        """The exchange steps of a group, up to `done`: (group + 1) period + j groups period, j = 0, 1, ..."""
        return list(range((group + 1) * self.period, done + 1, groups * self.period))

    def owner(self, step: int, groups: int) -> int:
        """The group that owns the slot of a 0-based step."""
        return step // self.period % groups

    def rates(
        self, adapters: Sequence[Adapter], step: int, total_steps: int, rate: Callable[[int], float]
    ) -> list[float]:
        """rate(step) min(1, (step - t0 + 1) / rewarm_steps), t0 the group's last exchange; rate(step) before it."""
        count, ramp = _groups(adapters), self.period if self.rewarm_steps < 0 else self.rewarm_steps
        last = [self.group_exchanges(group, count, step)[-1:] for group in range(count)]
        return [rate(step) * (min(1.0, (step - t0[0] + 1) / ramp) if t0 and ramp else 1.0) for t0 in last]

    def start(self, adapters: list[Adapter], engine: Engine) -> None:
        for adapter in adapters:
            adapter.memory = {key: value.to(engine.device) for key, value in adapter.memory.items()}
            adapter.spans = {"mean": "W", "spread": "W"}

    def batch(self, adapters: list[Adapter], step: int, samples: Sequence[int]) -> None:
        owner = self.owner(step, _groups(adapters))
        for adapter in _subnets(adapters):
            adapter.record = adapter.record_gradient if adapter.group == owner else None

    def observe(self, adapters: list[Adapter], engine: Engine) -> None:
        """Update the importance of every entry of the layers that have recorded dL/dW. Collective."""
        for adapter in _subnets(adapters):
            if adapter.record is None:
                continue
            assert adapter.dense is not None, f"{adapter.name}: no backward since the step began"
            # every rank has the gradient of its micro-batches; after the sum each looks at its rows of W
            part = engine.part(adapter)
            g = engine.sum(adapter.dense)[part.rows] / engine.loss_scale
            adapter.dense = None
            wg = self.entries(adapter, engine, part).mul_(g)
            now = {"mix": (wg - wg.square() / 2).abs(), "first": wg.abs(), "second": wg.square()}[self.importance]
            for key in ("mean", "spread"):
                adapter.memory.setdefault(key, torch.zeros_like(now))
            mean, spread = adapter.memory["mean"], adapter.memory["spread"]
            importance.smooth_([mean], [spread], now=[now], beta1=self.beta1, beta2=self.beta2)

    def discard(self, adapters: list[Adapter]) -> None:
        for adapter in _subnets(adapters):
            adapter.dense = None

    def entries(self, adapter: Subnet, engine: Engine, part: Weight) -> Tensor:
        """My rows of W + S + live blocks, with which the layer computes; zero where an entry belongs to another rank.

        Collective.
        """
        w = part.read()
        for block in adapter.blocks_beside(engine.whole):
            w = w + block.of_rows(part.rows)  # not in place: read() returns a view of a float32 W
        return part.mine_(w)

    def exchange(self, adapters: list[Adapter], engine: Engine, step: int, total_steps: int) -> Exchanged | None:
        """Exchange the blocks of the layer whose slot ends. Collective."""
        owner = self.owner(step - 1, _groups(adapters))
        events, chosen = [], []
        # Without a mean every step of the slot was skipped; nothing is known, and the block stays in its place.
        for adapter in (a for a in _subnets(adapters) if a.group == owner and "mean" in a.memory):
            mean, spread = adapter.memory.pop("mean"), adapter.memory.pop("spread")
            q = mean * spread
            # checked on all ranks together, so that all of them fail
            if not engine.sum(q.isfinite().all().logical_not().double()) == 0:
                raise RuntimeError(
                    f"{adapter.name}: importance is not finite; a gradient was NaN or infinite in this slot"
                )
            rows, columns = localize(q, engine.part(adapter), adapter.size)
            chosen += [rows, columns]
            events.append(exchange_block_(engine, adapter, rows=rows, columns=columns, moments=self.moments))
        engine.same("the chosen rows and columns", *chosen)
        return Exchanged.total(events) if events else None


@torch.no_grad()
def exchange_block_(engine: Engine, adapter: Subnet, *, rows: Tensor, columns: Tensor, moments: str) -> Exchanged:
    """Freeze S in its place and start it at zero at (rows, columns). The function does not change. Collective."""
    # the layer's answer to a random input, to measure the drift of the function
    x = probe(engine, adapter)
    before = _apply_blocks(adapter, engine, x)
    old, lost = (adapter.memory["rows"], adapter.memory["columns"]), 0.0
    # S starts at zero, its moments anew
    with engine.edit(adapter.S) as (s,):
        trained = s.value.clone()
        s.value.zero_()
        starts = engine.settings.kind.moments
        for name, moment in s.moments.items():
            moment.fill_(float(moment.mean()) if moments == "seeded" and starts[name] == "mean" else 0.0)
    # the trained block goes into W, or into the next empty slot of the bank
    if adapter.bank_S is None:
        lost = into_weight_(engine, adapter, Block(*old, trained, adapter.shape))
    else:
        filled, p = len(adapter.memory["live_rows"]), adapter.size[0]
        assert filled < adapter.live, f"{adapter.name}: the bank is full"
        with engine.edit(adapter.bank_S) as (bank,):
            assert not bank.value[filled * p : (filled + 1) * p].any(), (
                f"{adapter.name}: a slot of the bank is not empty"
            )
            bank.value[filled * p : (filled + 1) * p] = trained
        for key, at in zip(("live_rows", "live_columns"), old, strict=True):
            adapter.memory[key] = torch.cat([adapter.memory[key], at[None]])
    adapter.memory["rows"], adapter.memory["columns"] = rows, columns
    drift = check_drift(adapter, before, _apply_blocks(adapter, engine, x), exact=adapter.bank_S is not None)
    return Exchanged(
        adapter.S.numel(),
        into="weight" if adapter.bank_S is None else "bank",
        drift=drift,
        lost=lost,
        seconds=0.0,  # time and traffic are measured around the whole hook, see measure_exchange
        traffic=0,
        unit="entries",
    )


def _apply_blocks(adapter: Subnet, engine: Engine, x: Tensor) -> Tensor:
    """The layer's answer to x without the bias: (n, k) -> (m, k). Collective."""
    y = engine.weight(adapter).matmul(x)
    for block in adapter.blocks_beside(engine.whole):
        y[block.rows] += block.values @ x[block.columns]
    return y


def _is_tied(model: nn.Module, layer: nn.Linear) -> bool:
    """Whether another module has the same weight."""
    return any(
        p is layer.weight for module in model.modules() if module is not layer for p in module.parameters(recurse=False)
    )


def _subnets(adapters: Sequence[Adapter]) -> list[Subnet]:
    assert all(isinstance(adapter, Subnet) for adapter in adapters)
    return list(adapters)  # type: ignore[arg-type]


def _groups(adapters: Sequence[Adapter]) -> int:
    return 1 + max((adapter.group for adapter in adapters), default=0)
