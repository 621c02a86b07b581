"""A simulated accelerator, for tests without a GPU: tensors that claim another device and hold CPU values.

    with simulated.Accelerator() as device:       # engines take `device` for theirs
        ...
        with device.counting() as counts:
            one step
    counts.syncs      what a GPU would be waited for, by line:  {("read", "run/meter.py:40"): 1, ...}
    counts.kernels    what would be launched, by line

A dispatch mode sees every operation of torch. An operation that mixes tensors of the host and of the device raises, as
it would on CUDA. A synchronization is counted where the host asks for a value of the device (`float(t)`, `t.tolist()`,
`torch.equal`, an index of booleans) and where it copies between the two, except from pinned memory with
`non_blocking`, which no host waits for.

The device is torch's `lazy`, whose backward autograd runs in the thread that calls it. The simulation knows no streams
and no order in time, no kernel of CUDA, and no communication: NCCL and DeepSpeed's accelerator do not know the device.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llm_lowrank.engines.base import Engine

LAZY = torch.device("lazy", 0)
aten = torch.ops.aten

# Operations whose result the host must know before it can go on.
READS = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
)
INDEXED = (
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
)
# Parts of the names of operations that make a view and launch nothing.
VIEWS = ("detach", "view", "alias", "transpose", "expand", "slice", "select.int", "squeeze", "permute", "split")
VIEWS += ("as_strided", "unbind", "aten.t.")


class DeviceMix(RuntimeError):
    """An operation got tensors of two devices."""


@dataclass
class Counts:
    """Synchronizations (kind, line) and kernels (line) while counting."""

    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)


class OnDevice(torch.Tensor):
    """A tensor that claims to be on the device; `host` has its values."""

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnDevice:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=LAZY,
        )

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    def __repr__(self) -> str:
        return f"OnDevice({self.host})"

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def tolist(self) -> Any:
        Accelerator.current.sync("read")
        return self.host.tolist()

    def numpy(self, *args: object, **kwargs: object) -> Any:
        raise DeviceMix(f"numpy() of a tensor on the device at {place()}")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Accelerator.current.run(func, args, kwargs or {})


def place() -> str:
    """The innermost line of the package that is being run, or of transformers if there is none."""
    frame, elsewhere = sys._getframe(1), "elsewhere"
    while frame is not None:
        name = frame.f_code.co_filename
        if "/llm_lowrank/" in name:
            return f"{name.rpartition('/llm_lowrank/')[2]}:{frame.f_lineno}"
        if "/transformers/" in name and elsewhere == "elsewhere":
            elsewhere = f"transformers/{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return elsewhere


def host_of(value: Any) -> Any:
    return value.host if isinstance(value, OnDevice) else value


def is_lazy(device: Any) -> bool:
    return device is not None and torch.device(device).type == "lazy"


class Simulation:
    """What happens to each operation while the device is there."""

    def __init__(self) -> None:
        self.counts: Counts | None = None
        self.pinned: dict[int, torch.Tensor] = {}  # address of the storage -> what keeps it alive
        self.seeds: set[int] = set()  # of the device's generators

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        self.counts = counts = Counts()
        try:
            yield counts
        finally:
            self.counts = None

    def is_pinned(self, t: torch.Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self.pinned

    def sync(self, kind: str) -> None:
        if self.counts is not None:
            self.counts.syncs[kind, place()] += 1

    def kernel(self) -> None:
        if self.counts is not None:
            self.counts.kernels[place()] += 1

    # ---- operations

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten._to_copy.default:
            return self._copied(func, args[0], kwargs)
        if func is aten.copy_.default:
            return self._copy_into(func, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        here = [t for t in leaves if isinstance(t, OnDevice)]
        self._check(func, args, leaves, here)

        # a factory such as torch.empty(..., device=lazy)
        made = is_lazy(kwargs.get("device"))
        if made:
            generator = kwargs.get("generator")
            if generator is not None and generator.initial_seed() not in self.seeds:
                raise DeviceMix(f"{func} with a generator of the host for a tensor of the device at {place()}")
            kwargs = {**kwargs, "device": torch.device("cpu")}
        to_host = not made and kwargs.get("device") is not None

        if here:
            self._count(func, args)
        result = func(*tree_map(host_of, args), **tree_map(host_of, kwargs))
        if to_host or not (here or made):
            return result
        # what an in-place operation returns is the tensor that it was given
        known = {id(t.host): t for t in here}
        return tree_map(lambda t: known.get(id(t), OnDevice(t)) if isinstance(t, torch.Tensor) else t, result)

    def _copied(self, func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        here = isinstance(source, OnDevice)
        target = kwargs.get("device")
        to_device = is_lazy(target) if target is not None else here
        if here and to_device:
            self.kernel()
        elif here != to_device and not (to_device and kwargs.get("non_blocking") and self.is_pinned(source)):
            self.sync("copy to the device" if to_device else "copy to the host")
        result = func(host_of(source), **{k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")})
        return OnDevice(result) if to_device else result

    def _copy_into(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        target, source = args[:2]
        if isinstance(target, OnDevice) and isinstance(source, OnDevice):
            self.kernel()
        elif isinstance(target, OnDevice) != isinstance(source, OnDevice):
            self.sync("copy into")
        func(host_of(target), host_of(source), *args[2:], **kwargs)
        return target

    def _check(self, func: Any, args: Any, leaves: list[Any], here: list[OnDevice]) -> None:
        """Raise DeviceMix for tensors of two devices; as in torch, a number may be on the host, and so may an index."""
        host = [t for t in leaves if isinstance(t, torch.Tensor) and not isinstance(t, OnDevice) and t.dim() > 0]
        host = [t for t in host if not t.is_meta]
        if not here or not host:
            return
        if func in INDEXED and isinstance(args[0], OnDevice):
            values = args[2] if len(args) > 2 else None
            if not any(values is t for t in host):
                self.sync("index of the host")
                return
        shapes = [tuple(t.shape) for t in host]
        raise DeviceMix(f"{func} at {place()}: {shapes} on the host beside {[tuple(t.shape) for t in here]}")

    def _count(self, func: Any, args: Any) -> None:
        masks = func in INDEXED and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
        if func in READS or masks:
            self.sync("read")
        if not any(part in str(func) for part in VIEWS):
            self.kernel()


class _Mode(TorchDispatchMode):
    """Sends every operation to the simulation, those without a tensor of the device too."""

    def __enter__(self) -> _Mode:
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor([...], device=lazy) is made on the host first
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self.lifted)
        super().__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Accelerator.current.run(func, args, kwargs or {})


class _Autocast:
    """torch.autocast, which does not know the device."""

    real = torch.autocast

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        self.inner = None if device_type == "lazy" else self.real(device_type, *args, **kwargs)

    def __enter__(self) -> Any:
        return self.inner and self.inner.__enter__()

    def __exit__(self, *exception: Any) -> Any:
        return self.inner and self.inner.__exit__(*exception)


class _Generator(torch.Generator):
    """torch.Generator, which cannot be of the device. A mode gets another object of it, and knows it by its seed."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu" if is_lazy(device) else device)
        made.on_device = is_lazy(device)
        return made

    def manual_seed(self, seed: int) -> torch.Generator:
        if self.on_device:
            Accelerator.current.seeds.add(seed)
        return super().manual_seed(seed)


class Accelerator:
    """While entered, engines have the simulated device."""

    current: Simulation

    def __enter__(self) -> Simulation:
        Accelerator.current = simulation = Simulation()
        enabled = torch.is_autocast_enabled
        self.before = [
            (Engine, "_device", vars(Engine)["_device"]),
            (torch, "autocast", torch.autocast),
            (torch.amp.autocast_mode, "autocast", torch.amp.autocast_mode.autocast),
            (torch, "is_autocast_enabled", enabled),
            (torch.Tensor, "pin_memory", torch.Tensor.pin_memory),
            (torch, "Generator", torch.Generator),
            (torch, "lazy", None),
        ]

        def pin(t: torch.Tensor, *_: Any) -> torch.Tensor:
            pinned = t.clone()
            simulation.pinned[pinned.untyped_storage().data_ptr()] = pinned
            return pinned

        Engine._device = staticmethod(lambda: LAZY)  # type: ignore[method-assign]
        torch.autocast = torch.amp.autocast_mode.autocast = _Autocast  # type: ignore[assignment, misc]
        torch.is_autocast_enabled = lambda kind=None: (  # type: ignore[assignment]
            False if kind == "lazy" else enabled(kind) if kind else enabled()
        )
        torch.lazy = SimpleNamespace(_initialized=False)  # type: ignore[attr-defined]  # no random state of its own
        torch.Generator = _Generator  # type: ignore[misc]
        torch.Tensor.pin_memory = pin  # type: ignore[method-assign, assignment]
        self.mode = _Mode()
        self.mode.__enter__()
        return simulation

    def __exit__(self, *exception: Any) -> None:
        self.mode.__exit__(*exception)
        for owner, name, value in self.before:
            setattr(owner, name, value)
