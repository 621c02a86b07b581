"""What the floors above may ask of the way a model is spread over ranks.

There is one contract and several engines: one process or DDP (plain.py), DeepSpeed ZeRO-1/2/3 (zero.py), PyTorch FSDP2
(fsdp.py). Above this floor no code knows how many ranks there are; a decision is taken on rank 0 and broadcast.

A model comes without values, its parameters on the meta device. `wrap` asks for the rows that this rank will hold,
module by module, and keeps nothing else, so that no rank ever holds the whole model on its way to the others.

Loss: `backward` wants this rank's share, such that the shares of all ranks and micro-batches sum to the loss of the
global batch. Gradients are sums over ranks and micro-batches, whatever the library underneath divides by.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.engines.watch import Watch
from llm_lowrank.engines.weight import Weight
from llm_lowrank.numerics.files import raw_bytes
from llm_lowrank.numerics.optimizers import Optimization, check_state, initial_state, penalize

TIMEOUT = 1800.0  # seconds without progress after which a guarded run ends
PATIENCE = 120.0  # seconds by which the process group waits longer: its error names no rank
RELEASE = 2**25  # bytes of weights after which freed host memory goes back to the system

# read(module name, module, {parameter name: rows of its dim 0}) -> those rows. All ranks ask for the modules in the
# same order, each for its own rows, so that a reader may communicate.
Read = Callable[[str, nn.Module, dict[str, slice]], dict[str, Tensor]]


class RankError(RuntimeError):
    """Another rank failed; the message is that rank's."""


class LostContact(RuntimeError):
    """A collective failed: another rank is gone."""


@dataclass
class Span:
    """This rank's contiguous stretch of a flattened parameter; nothing in it was communicated."""

    start: int  # flat position of its first element
    value: Tensor  # (numel,) the master value, a view of it outside of autograd
    # by the optimizer's names, each (numel,); empty before the first step and for frozen parameters
    moments: dict[str, Tensor]


@dataclass
class Slot:
    """A whole parameter, and its moments if it is trained and has been stepped."""

    value: Tensor
    moments: dict[str, Tensor]


def trainables(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters, of which there must be one at least."""
    params = [p for p in model.parameters() if p.requires_grad]
    assert params, "the model has no trainable parameter"
    return params


def optimizer(model: nn.Module, settings: Optimization) -> torch.optim.Optimizer:
    """Return the optimizer of the trainable parameters.

    A parameter belongs to the group that `groups` of its module gives to its name, else to the module's `group`, by
    default 0. Groups are numbered without a gap, because torch's schedulers and DeepSpeed disagree about empty ones.
    What `penalties` of a module gives to a name holds for the whole group, see optimizers.shrink_.
    """
    groups: dict[int, list[nn.Parameter]] = {}
    penalties: dict[int, set[float]] = {}
    grouped: set[nn.Parameter] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p not in grouped:
                grouped.add(p)
                number = getattr(module, "groups", {}).get(name, getattr(module, "group", 0))
                groups.setdefault(number, []).append(p)
                penalties.setdefault(number, set()).add(getattr(module, "penalties", {}).get(name, 0.0))
    assert all(len(found) == 1 for found in penalties.values()), f"one penalty for each group, not {penalties}"
    assert sorted(groups) == list(range(len(groups))), f"groups {sorted(groups)}"
    listed = [{"params": groups[number], "penalty": penalties[number].pop()} for number in range(len(groups))]
    check_state(settings)
    return penalize(settings.kind.build(listed, settings))


def set_rates(groups: list[dict[str, Any]], rates: Sequence[float]) -> None:
    """Set one learning rate for every group."""
    assert len(groups) == len(rates), (len(groups), len(rates))
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def share(total: int, index: int, of: int) -> slice:
    """Return the index-th of so many even shares of 0 .. total.

    A share is ceil(total / of) long, so that the last shares may be smaller or empty.
    """
    size = -(-total // of)
    start = min(index * size, total)
    return slice(start, min(start + size, total))


def _not_met(error: dist.DistError) -> Exception:
    """Return the error of a rank that did not meet the others: a port that is taken is so at the next start, too."""
    rank, host, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    reason = str(error).partition("\n")[0]
    if "failed to listen" not in reason:
        return LostContact(f"rank {rank} did not meet the others at {host}; did every node start? {reason}")
    why = "is taken by another program" if "EADDRINUSE" in reason else f"cannot be opened ({reason})"
    return OSError(
        f"port {port} on {host}, where the ranks should meet, {why}; give another one, the same on every node: "
        f"--master_port N to the launcher (deepspeed, torchrun), --rdzv-endpoint {host}:N to torchrun with "
        "--rdzv-backend, or MASTER_PORT=N in the environment"
    )


def send(t: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on the device. It leaves from pinned memory, so that the host need not wait."""
    return t if device.type == "cpu" else t.pin_memory().to(device, non_blocking=True)


# what an engine has of a model while it is wrapped
OF_MODEL = ("params", "settings", "optimizer", "model", "groups", "ddp", "ds", "zero", "init")


class Engine(ABC):
    """How a model is spread over ranks."""

    def __init__(self, timeout: float = TIMEOUT) -> None:
        """Join the process group that the launcher describes in the environment (RANK, WORLD_SIZE, MASTER_ADDR, ...).

        timeout: seconds without progress after which a guarded run ends, see watch.py.
        """
        self.device = self._device()
        if not dist.is_initialized() and (int(os.environ.get("WORLD_SIZE", "1")) > 1 or self.always_a_group):
            for key, value in (
                ("RANK", "0"),
                ("WORLD_SIZE", "1"),
                ("LOCAL_RANK", "0"),
                ("MASTER_ADDR", "127.0.0.1"),
                ("MASTER_PORT", "0"),
            ):
                os.environ.setdefault(key, value)
            try:
                self._join(datetime.timedelta(seconds=timeout + PATIENCE))
            except dist.DistError as error:
                raise _not_met(error) from error
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.main = self.rank == 0
        self.timeout = timeout
        self.watch: Watch | None = None  # of a guarded run
        self.worked_on = 0  # bytes of weights, see release
        self.traffic = 0  # bytes that this rank handed to collectives of ours, for the exchange log

    always_a_group = False  # whether a single process needs a process group too
    loss_scale = 1.0  # the factor by which `backward` multiplies the loss, for hooks that read gradients inside of it
    params: list[nn.Parameter]  # what is trained, once the model is wrapped
    settings: Optimization  # of the optimizer, once the model is wrapped
    shards_parameters = False  # whether every forward is collective, so that no rank may run fewer of them

    @staticmethod
    def _device() -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        return device

    @property
    def backends(self) -> str:
        """The backends of the process group, by device: what is offloaded is reduced on the host."""
        return "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"

    def _join(self, timeout: datetime.timedelta) -> None:
        dist.init_process_group(self.backends, timeout=timeout)

    # ---- what each engine says for itself

    @abstractmethod
    def wrap(self, model: nn.Module, settings: Optimization, read: Read) -> nn.Module:
        """Shard the model, fill it, build the optimizer of its trainable parameters; return the module to call.

        Collective.
        """

    @abstractmethod
    def weight(self, linear: FrozenLinear) -> Weight:
        """Return the frozen weight of a layer, as far as this rank holds it."""

    @abstractmethod
    def span(self, p: nn.Parameter) -> Span:
        """Return this rank's span of a trainable p. The spans of all ranks cover p exactly once. No communication."""

    @abstractmethod
    def gradient(self, p: nn.Parameter) -> Tensor:
        """Return the gradient of the same span, on the device of its value: reduced, accumulated, unscaled, unclipped.

        It may be called between the last backward of a step and `step`.
        """

    @abstractmethod
    def put_gradient(self, p: nn.Parameter, whole: Tensor) -> None:
        """Replace the gradient of p, as `step` will use it. `whole` is float32 and the same on every rank. Local.

        It may be called where `gradient` may.
        """

    @abstractmethod
    def whole(self, p: nn.Parameter) -> Tensor:
        """Return a copy of p as the forward sees it. Collective."""

    @abstractmethod
    def slot(self, p: nn.Parameter) -> Slot:
        """Return copies of p's master and moments, whole. Collective."""

    @abstractmethod
    def put(self, p: nn.Parameter, slot: Slot) -> None:
        """Write every copy of p: the one of the forward, the master, the moments.

        The slot is the same on every rank. Collective.
        """

    @abstractmethod
    def prime(self, steps: int) -> None:
        """Give a fresh optimizer the state that it has after so many steps, with moments of zero.

        `put` replaces the moments afterwards.
        """

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of this micro-batch's share of the loss.

        It is reduced over ranks at the last micro-batch of a step.
        """

    @abstractmethod
    def step(self, *rates: float) -> float:
        """Clip, step with one learning rate for every group, clear the gradients; return the norm before clipping.

        If the gradient is not finite, no value and no moment changes.
        """

    @abstractmethod
    def forget(self) -> None:
        """Clear the gradients of a whole step's micro-batches in the place of `step`, before the first step of all.

        The run goes on bitwise as if they had not been.
        """

    # ---- signs of life

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Watch the run inside: one that stands still ends and says why, see watch.py.

        A collective that fails raises LostContact.
        """
        if self.world == 1:
            yield
            return
        try:
            self.watch = Watch(self.rank, self.world, self.timeout, dist.distributed_c10d._get_default_store())
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            reason = str(error).partition("\n")[0]
            phase = self.watch.phase if self.watch else "the start"
            raise LostContact(f"rank {self.rank} lost contact with another rank in {phase}: {reason}") from error
        finally:
            if self.watch is not None:
                self.watch.close()

    def at(self, phase: str) -> None:
        """Note that the run has come to this phase, which is named if the run stands still."""
        if self.watch is not None:
            self.watch.at(phase)

    def call(self) -> None:
        """Note that this rank has come to something that all ranks come to."""
        if self.watch is not None:
            self.watch.call()

    def beat(self) -> None:
        """Note that this rank has done a piece of work of which ranks have different amounts."""
        if self.watch is not None:
            self.watch.beat()

    # ---- where every rank holds everything, unless an engine says otherwise

    def _rows(self, p: nn.Parameter) -> slice:
        """Return the rows of dim 0 of which this rank will hold an element."""
        return slice(0, len(p))

    def _hold(self, p: nn.Parameter, rows: Tensor) -> nn.Parameter:
        """Return the parameter that replaces p, which has no values, given this rank's rows of it."""
        return nn.Parameter(rows.to(self.device), p.requires_grad)

    def part(self, linear: FrozenLinear) -> Weight:
        """Return some rows of the frozen weight, for statistics: the rows of all ranks cover W once.

        No communication.
        """
        if self.shards_parameters or self.world == 1:
            return self.weight(linear)
        rows = share(linear.shape[0], self.rank, self.world)
        parts = {name: part[rows] for name, part in linear.named_parts().items()}
        return Weight.of_rows(
            linear.shape, linear.codec, parts, first=rows.start, stop=rows.stop, device=self.device, sum=self.sum
        )

    # ---- written once

    def finite(self) -> bool:
        """Return whether every gradient is finite, between the last backward of a step and `step`. Collective."""
        bad = torch.stack([self.gradient(p).isfinite().all().logical_not() for p in self.params]).any()
        return not self.sum(bad.double())

    def gradient_norm(self) -> float:
        """Return the norm of all gradients together, where `gradient` may be called. Collective."""
        squares = [self.gradient(p).double().square().sum().to(self.device) for p in self.params]
        return float(self.sum(torch.stack(squares).sum()).sqrt())

    def whole_gradients(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return float32 copies of some gradients, whole, where `gradient` may be called. Collective."""
        return self.join_spans(params, [self.gradient(p) for p in params])

    def whole_masters(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return copies of some trainable parameters, whole, as the optimizer holds them. Collective."""
        return self.join_spans(params, [self.span(p).value for p in params])

    def join_spans(self, params: Sequence[nn.Parameter], mine: Sequence[Tensor]) -> list[Tensor]:
        """Return float32 tensors of which each rank has its span of each parameter, whole. Collective, in one buffer.

        mine: this rank's spans, such as a method keeps them in adapter.memory.
        """
        shapes = [torch.Size(getattr(p, "ds_shape", p.shape)) for p in params]  # ZeRO-3 leaves an empty p.data
        sizes = [shape.numel() for shape in shapes]
        flat = torch.zeros(sum(sizes), device=self.device)
        for p, whole, span in zip(params, flat.split(sizes), mine, strict=True):
            start = self.span(p).start
            whole[start : start + span.numel()] = span
        self.sum(flat)
        return [whole.view(shape) for whole, shape in zip(flat.split(sizes), shapes, strict=True)]

    def put_gradients(self, params: Sequence[nn.Parameter], wholes: Sequence[Tensor]) -> None:
        """Replace some gradients, see put_gradient. Collective: where ranks hold copies, all take those of rank 0."""
        for p, whole in zip(params, wholes, strict=True):
            self.put_gradient(p, whole)

    def _fill(self, model: nn.Module, read: Read) -> None:
        """Give every parameter its values, one module at a time; a parameter of two modules is read once.

        Collective.
        """
        # in training all ranks make the same forwards; in evaluation one rank may have more of them
        model.register_forward_pre_hook(lambda *_: self.call() if model.training else self.beat())
        filled: dict[nn.Parameter, nn.Parameter] = {}  # without values -> with them
        for name, module in model.named_modules():
            self.call()
            params = dict(module.named_parameters(recurse=False, remove_duplicate=False))
            rows = {k: self._rows(p) for k, p in params.items() if p not in filled}
            values = read(name, module, rows) if rows else {}
            for k, p in params.items():
                if p not in filled:
                    filled[p] = self._hold(p, values.pop(k).contiguous())
                setattr(module, k, filled[p])
            for k, buffer in module.named_buffers(recurse=False):
                setattr(module, k, buffer.to(self.device))
            self.release(RELEASE)  # at once: everything that was read for this module is free now

    def release(self, nbytes: int) -> None:
        """Give freed host memory back to the system, once weights of RELEASE bytes were worked on since the last time.

        glibc keeps freed blocks of up to 32 MB, and weights of many sizes fragment its heap: without this call a rank
        that loads 1.5 GB peaked at nearly twice its bound (benchmarks/memory.py). A call after every small weight would
        double the time of an exchange.
        """
        self.worked_on += nbytes
        if self.worked_on >= RELEASE and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            self.worked_on = 0
            libc.malloc_trim(0)

    @contextmanager
    def edit(self, *params: nn.Parameter) -> Iterator[list[Slot]]:
        """Yield the whole values and moments of some parameters, and write on exit what the block has left in them.

        All ranks must leave the same values. Shapes, dtypes and the identity of every Parameter stay. The master and
        the moments are read back and compared; the copy that the forward sees can be compared with `whole`. Collective.
        """
        slots = [self.slot(p) for p in params]
        shapes = [s.value.shape for s in slots]
        yield slots
        for p, s, shape in zip(params, slots, shapes, strict=True):
            assert s.value.shape == shape and all(v.shape == shape for v in s.moments.values()), (s.value.shape, shape)
            self.put(p, s)
            if p.requires_grad:
                held = self.span(p)
                span = slice(held.start, held.start + held.value.numel())
                assert _equal(held.value, s.value.view(-1)[span]), "an edited master did not persist"
                assert held.moments.keys() == s.moments.keys(), (held.moments.keys(), s.moments.keys())
                assert all(_equal(v, s.moments[k].view(-1)[span]) for k, v in held.moments.items()), (
                    "edited moments did not persist"
                )

    def sum(self, t: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Sum t over ranks, those of a group or all, in place; return t. Collective."""
        self.call()
        if self.world > 1 and dist.get_world_size(group) > 1:
            self.traffic += t.nbytes
            dist.all_reduce(t, group=group)
        return t

    def gather(self, what: object) -> list[object]:
        """Return a small Python value of every rank, on every rank. Collective."""
        self.call()
        if self.world == 1:
            return [what]
        by_rank: list[object] = [None] * self.world
        dist.all_gather_object(by_rank, what)
        return by_rank

    def broadcast(self, compute: Callable[[], list[Tensor]], source: int = 0) -> list[Tensor]:
        """Run `compute` on one rank only and return its tensors on all ranks, on the engine's device. Collective.

        If it raises there, every other rank raises RankError with the message, so that none waits for a rank that is
        gone.
        """
        self.call()
        tensors: list[Tensor] = []
        head: list[Any] = [None]
        failure: Exception | None = None

        # The rank that computes makes a head: the shapes and dtypes of its tensors, or the message of its failure. It
        # catches everything, for the others are about to wait for this head.
        if self.rank == source:
            try:
                tensors = [t.to(self.device).contiguous() for t in compute()]
                head = [[(tuple(t.shape), t.dtype) for t in tensors]]
            except Exception as error:
                failure, head = error, [f"{type(error).__name__}: {error}"]

        # The head travels first: after a failure every rank raises here, the one that failed with its own error.
        if self.world > 1:
            dist.broadcast_object_list(head, src=source)
        if failure is not None:
            raise failure
        if isinstance(head[0], str):
            raise RankError(f"rank {source}: {head[0]}")

        # Then the tensors, into room that the head describes.
        if self.world > 1:
            if self.rank != source:
                tensors = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in head[0]]
            for t in tensors:
                self.traffic += t.nbytes
                dist.broadcast(t, src=source)
        return tensors

    def same(self, what: str, *tensors: Tensor) -> None:
        """Raise RuntimeError unless all ranks hold bitwise the same tensors. Collective."""
        if self.world == 1:
            return
        digest = hashlib.sha256()
        for t in tensors:
            digest.update(raw_bytes(t))
        digests = [str(value) for value in self.gather(digest.hexdigest())]
        if len(set(digests)) > 1:
            raise RuntimeError(f"{what} differ between ranks {[d[:8] for d in digests]}: refusing to train on")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do local work that can fail on one rank and not on another: if it fails anywhere, it fails everywhere.

        Collective.
        """
        # Every rank comes to the gather below, whatever happened to its work.
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            error = e

        # The type of an error is part of its message only where a user could not have caused it.
        unexpected = (
            ""
            if error is None or isinstance(error, (ValueError, OSError, ImportError))
            else f"{type(error).__name__}: "
        )
        messages = self.gather(None if error is None else f"{unexpected}{error}")

        # All ranks raise the failure of the first one that failed: that rank its own error, the others a RankError.
        first = next((rank for rank, message in enumerate(messages) if message is not None), None)
        if first == self.rank and error is not None:
            raise error
        if first is not None:
            raise RankError(f"rank {first}: {messages[first]}")

    def unload(self) -> None:
        """Let go of the wrapped model and of its optimizer, so that their memory is free and another can be wrapped."""
        for name in OF_MODEL:
            self.__dict__.pop(name, None)
        gc.collect()  # hooks refer to their modules, and modules to their hooks
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Leave the process group, so that no process or thread stays behind."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _equal(held: Tensor, wanted: Tensor) -> bool:
    """Whether two tensors hold the same; a span that is offloaded lies on the host, a slot on the device."""
    return torch.equal(held, wanted.to(held.device))


class TorchEngine(Engine):
    """An engine that steps the optimizer over its parameters itself."""

    micro: int  # micro-batches since the last step

    def _optimize(self, model: nn.Module, settings: Optimization) -> None:
        self.settings, self.micro = settings, 0
        self.params = trainables(model)
        self.optimizer = optimizer(model, settings)

    def prime(self, steps: int) -> None:
        for p in self.params:
            self.optimizer.state[p] = initial_state(p.detach(), steps, self.settings)

    def _moments(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = self.optimizer.state.get(p, {}) if p.requires_grad else {}
        return {k: state[k] for k in self.settings.kind.moments if k in state}

    def step(self, *rates: float) -> float:
        assert self.micro == self.settings.accumulation, (self.micro, self.settings.accumulation)
        self.micro = 0
        total = torch.nn.utils.clip_grad_norm_(self.params, self.settings.max_grad_norm or float("inf"))
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        set_rates(self.optimizer.param_groups, rates)
        if norm < float("inf"):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def forget(self) -> None:
        assert self.micro == self.settings.accumulation, (self.micro, self.settings.accumulation)
        self.micro = 0
        self.optimizer.zero_grad()
