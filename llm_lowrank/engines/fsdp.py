"""PyTorch FSDP2: every parameter a DTensor, cut along its rows.  https://arxiv.org/abs/2304.11277,
torch.distributed.fsdp.fully_shard

One group per decoder layer, gathered for its forward and backward, and a root group for the rest: embeddings, the
output layer, the last norm, and whatever layers share, which stays gathered from the first forward to the last
backward. Ranks form a mesh (replicas, shards); with one replica that is plain sharding, with more hybrid sharding.

No mixed precision policy of FSDP's is used beyond float32 reduction: it would cast every floating parameter in its
all-gather, the float32 pairs of the bank and a codec's scales with them. The backbone is stored in its dtype, codes and
scales are bytes, A and B are cast where they are used.

Writing to a DTensor by index changes nothing, without a word; every edit here goes to the local tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llm_lowrank.engines.base import TIMEOUT, Read, Slot, Span, TorchEngine, share
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.engines.memory import Held, Sizes
from llm_lowrank.engines.weight import Weight
from llm_lowrank.numerics.optimizers import Optimization


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 spreads the model."""

    reshard_after_forward: bool = True
    """Free a layer's gathered parameters after its forward and gather them again for backward; false: more memory, less
    traffic."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer in host memory between uses."""
    shard_size: int = 0
    """Ranks that share one copy of the model; the copies are replicas (hybrid sharding). 0: all ranks share one."""

    def __post_init__(self) -> None:
        if self.shard_size < 0:
            raise ValueError(f"fsdp.shard_size must be at least 0, not {self.shard_size}")

    def shards(self, world: int) -> int:
        """Return how many ranks share one copy; ValueError if the copies do not come out even."""
        if self.shard_size and world % self.shard_size:
            raise ValueError(
                f"fsdp.shard_size ({self.shard_size}) does not divide the {world} ranks; take one that does, or 0 for "
                "all"
            )
        return self.shard_size or world


def held(sizes: Sizes, world: int, sharding: Sharding | None, optimization: Optimization) -> list[Held]:
    """Return what a rank holds. sharding: None stands for the defaults."""
    sharding = sharding or Sharding()
    shards = sharding.shards(world)  # the ranks that share one copy
    w, k, t = sizes.parts
    moments = len(optimization.kind.moments)
    # Between a forward and its backward the root group stays gathered, and of the layers either all, or one that is in
    # use and the next one, which is on its way.
    root = w + k + t - sizes.layers
    layers = min(2 * sizes.layer, sizes.layers) if sharding.reshard_after_forward else sizes.layers
    return [
        Held(
            title="FSDP2",
            legend="R, L: the root group of FSDP2; its largest decoder layer. N under fsdp.shard_size: the ranks that "
            "share one copy",
            notes=("fsdp.cpu_offload: what FSDP2 shards lies in host memory between uses.",)
            if sharding.cpu_offload
            else (),
            frozen=(w / shards, "W / N"),
            bank=(k / shards, "K / N"),
            adapters=(t / shards, "T / N"),
            gradients=(t / shards, "T / N"),
            moments=(moments * t / shards, f"{moments} T / N"),
            gathered=(root + layers, "R + 2 L" if sharding.reshard_after_forward else "R + all L"),
        )
    ]


class FSDP(TorchEngine):
    """FSDP2, with every parameter a DTensor."""

    always_a_group = True  # a device mesh lies over a process group
    shards_parameters = True

    def __init__(self, sharding: Sharding | None = None, timeout: float = TIMEOUT) -> None:
        super().__init__(timeout)
        self.sharding = sharding or Sharding()
        shards = self.sharding.shards(self.world)
        shape, names = (self.world // shards, shards), ("replica", "shard")
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self.mesh = mesh if shape[0] > 1 else mesh["shard"]
        self.replica, self.replicas = self.rank // shards, shape[0]
        self.group = mesh["shard"].get_group()

    def wrap(self, model: nn.Module, settings: Optimization, read: Read) -> nn.Module:
        self.model = self._shard(model)
        self._fill(model, read)
        self._optimize(model, settings)
        # FSDP2 averages gradients over ranks; here they are sums
        for module in self.groups:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        # The root stays gathered after a forward, for its backward. Without a backward to come it would stay so, and
        # the module would answer with the gathered parameters, whose edits are lost.
        model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else self._reshard())
        return model

    def _shard(self, model: nn.Module) -> FSDPModule:
        layers = decoder_layers(model)
        _refuse_shared(model, layers)
        shard = partial(
            fully_shard,
            mesh=self.mesh,
            mp_policy=MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False),
            offload_policy=CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.sharding.cpu_offload
            else OffloadPolicy(),
        )
        with _codes_are_parameters():
            for layer in layers:
                shard(layer, reshard_after_forward=self.sharding.reshard_after_forward)
            root = shard(model, reshard_after_forward=False)
        self.groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
        return root

    def _reshard(self) -> None:
        for module in self.groups:
            module.reshard()

    # ---- where a parameter lives

    @property
    def _host(self) -> torch.device:
        return torch.device("cpu") if self.sharding.cpu_offload else self.device

    def _rows(self, p: nn.Parameter) -> slice:
        # torch's chunks of a DTensor are even shares, too
        return share(p.shape[0], self.mesh.get_local_rank(self.mesh.ndim - 1), self.mesh.size(-1))

    def _hold(self, p: nn.Parameter, rows: Tensor) -> nn.Parameter:
        assert isinstance(p, DTensor), "a parameter escaped sharding"
        # not DTensor.from_local, which moves its rows to the devices of the mesh, away from the host
        sharded = nn.Parameter(torch.empty_like(p, device=self._host), p.requires_grad)
        local = _local(sharded)
        assert local.shape == rows.shape and local.dtype == rows.dtype, (local.shape, rows.shape, local.dtype)
        assert local.device == self._host, "a shard is not where offloading wants it"
        local.copy_(rows)
        return sharded

    def weight(self, linear: FrozenLinear) -> Weight:
        parts = {name: _local(part) for name, part in linear.named_parts().items()}
        rows = self._rows(next(iter(linear.named_parts().values())))
        return Weight.of_rows(
            linear.shape,
            linear.codec,
            parts,
            first=rows.start,
            stop=rows.stop,
            device=self.device,
            sum=partial(self.sum, group=self.group),
        )

    def _span(self, p: nn.Parameter) -> tuple[int, slice]:
        """Return where this rank's span starts in the flattened p, and where it lies in the local tensor.

        Replicas hold the same rows; each takes an even span of them.
        """
        span = share(_local(p).numel(), self.replica, self.replicas)
        width = p.numel() // max(1, p.shape[0])
        return self._rows(p).start * width + span.start, span

    def span(self, p: nn.Parameter) -> Span:
        start, span = self._span(p)
        moments = {k: _local(v).view(-1)[span] for k, v in self._moments(p).items()}
        return Span(start, _local(p).view(-1)[span], moments)

    def gradient(self, p: nn.Parameter) -> Tensor:
        assert isinstance(p.grad, DTensor), "gradient() before backward"
        return _local(p.grad).reshape(-1)[self._span(p)[1]]  # beside the span: both on the host when offloaded

    def put_gradient(self, p: nn.Parameter, whole: Tensor) -> None:
        assert isinstance(p.grad, DTensor), "put_gradient() before backward"
        _local(p.grad).copy_(whole[self._rows(p)])

    def _gather_whole(self, t: Tensor) -> Tensor:
        """Return a copy of all rows. Collective."""
        self.traffic += t.numel() * t.element_size() * (self.mesh.size(-1) > 1)
        moved = t.to(self.device)  # from the host, when offloaded
        assert isinstance(moved, DTensor), "the parameters of this layer are still gathered"
        return moved.full_tensor().detach().clone()  # of one rank the full tensor is the local one

    def whole(self, p: nn.Parameter) -> Tensor:
        return self._gather_whole(p)

    def slot(self, p: nn.Parameter) -> Slot:
        return Slot(self.whole(p), {k: self._gather_whole(v) for k, v in self._moments(p).items()})

    def put(self, p: nn.Parameter, slot: Slot) -> None:
        rows = self._rows(p)
        _local(p).copy_(slot.value[rows])
        for k, v in self._moments(p).items():
            _local(v).copy_(slot.moments[k][rows])

    # ---- steps

    def backward(self, loss: Tensor) -> None:
        self.micro += 1
        last = self.micro == self.settings.accumulation
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        loss.backward()


@contextmanager
def _codes_are_parameters() -> Iterator[None]:
    """Let torch 2.11 and 2.12 shard a quantized weight.

    Their fully_shard makes every shard a parameter that requires a gradient before it asks whether the parameter did,
    which no parameter of bytes can. Within this block such a parameter requires none. torch 2.13 needs no help.
    """
    if Version(torch.__version__) >= Version("2.13"):
        yield
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    def parameter(data: Tensor, requires_grad: bool | None = None) -> nn.Parameter:
        return nn.Parameter(data, data.is_floating_point() if requires_grad is None else requires_grad)

    original = _fsdp_param.nn
    _fsdp_param.nn = SimpleNamespace(**{**vars(nn), "Parameter": parameter})  # type: ignore[assignment]
    try:
        yield
    finally:
        _fsdp_param.nn = original


def _local(t: Tensor) -> Tensor:
    """Return this rank's rows, outside of autograd; what is written to them changes the parameter."""
    assert isinstance(t, DTensor), "the parameters of this layer are still gathered"
    return t.to_local().detach()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that transformers says must not be split over devices; ValueError if it names none."""
    names = getattr(model, "_no_split_modules", None) or ()
    layers = [m for m in model.modules() if type(m).__name__ in names]
    if not layers:
        raise ValueError(
            f"cannot tell the decoder layers of {type(model).__name__}, which transformers should name; use engine: "
            "deepspeed"
        )
    return layers


def _refuse_shared(model: nn.Module, layers: list[nn.Module]) -> None:
    """Raise ValueError if layers share a parameter that belongs to one of them.

    It must belong to the root group, so that a module outside of the layers owns it. FSDP2 swaps a parameter for its
    gathered values in the modules of one group only; in another group it would stay a shard.
    """
    users: dict[nn.Parameter, set[int]] = defaultdict(set)
    for i, layer in enumerate(layers):
        for p in layer.parameters():
            users[p].add(i)
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module not in inside:
            for p in module.parameters(recurse=False):
                users[p].add(-1)
    for name, p in model.named_parameters():
        if len(users[p]) > 1:
            raise ValueError(
                f"{name} is registered in several decoder layers, which FSDP2 cannot share; let one module outside of "
                "the layers own it, and let the layers read it from there"
            )
