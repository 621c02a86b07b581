"""One process, or one per device with torch's DistributedDataParallel: every rank holds everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm_lowrank.engines.base import Read, Slot, Span, TorchEngine, share
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.engines.memory import Held, Sizes
from llm_lowrank.engines.weight import Weight
from llm_lowrank.numerics.optimizers import Optimization


def held(sizes: Sizes, world: int, settings: None, optimization: Optimization) -> list[Held]:
    """Return what a rank holds: everything. DDP reduces gradients in buckets, which are a second copy."""
    w, k, t = sizes.parts
    moments = len(optimization.kind.moments)
    return [
        Held(
            title="plain",
            frozen=(w, "W"),
            bank=(k, "K"),
            adapters=(t, "T"),
            gradients=(t, "T") if world == 1 else (2 * t, "2 T"),
            moments=(moments * t, f"{moments} T"),
        )
    ]


class Plain(TorchEngine):
    """One process, or DDP."""

    def wrap(self, model: nn.Module, settings: Optimization, read: Read) -> nn.Module:
        self.loss_scale = float(self.world)
        self._fill(model, read)
        self._optimize(model, settings)
        # Every rank has read the same values and computes the same buffers, so that DDP need not send them.
        self.ddp = (
            DistributedDataParallel(model, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True)
            if self.world > 1
            else None
        )
        self._reduce_at_boundary()
        return self.ddp or model

    def weight(self, linear: FrozenLinear) -> Weight:
        return Weight.everything(linear.shape, linear.codec, linear.named_parts(), self.device)

    def span(self, p: nn.Parameter) -> Span:
        span = self._span(p)
        return Span(span.start, p.data.view(-1)[span], {k: v.view(-1)[span] for k, v in self._moments(p).items()})

    def gradient(self, p: nn.Parameter) -> Tensor:
        assert p.grad is not None, "gradient() before backward"
        return p.grad.reshape(-1)[self._span(p)]

    def put_gradient(self, p: nn.Parameter, whole: Tensor) -> None:
        assert p.grad is not None, "put_gradient() before backward"
        p.grad.copy_(whole)

    def whole_gradients(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        return [p.grad.clone() for p in params if p.grad is not None]

    def whole_masters(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        return [self.whole(p) for p in params]

    def put_gradients(self, params: Sequence[nn.Parameter], wholes: Sequence[Tensor]) -> None:
        # Every rank has computed them from the same values. One different bit, of another kind of device, would part
        # the copies without a word.
        if self.world > 1:
            flat = self.broadcast(lambda: [torch.cat([whole.flatten() for whole in wholes])])[0]
            wholes = [
                t.view_as(whole) for t, whole in zip(flat.split([w.numel() for w in wholes]), wholes, strict=True)
            ]
        super().put_gradients(params, wholes)

    def _span(self, p: nn.Parameter) -> slice:
        # every rank holds all of p; for statistics each takes an even span, so that the spans cover p once
        return share(p.numel(), self.rank, self.world)

    def whole(self, p: nn.Parameter) -> Tensor:
        return p.data.clone()

    def slot(self, p: nn.Parameter) -> Slot:
        return Slot(p.data.clone(), {k: v.clone() for k, v in self._moments(p).items()})

    def put(self, p: nn.Parameter, slot: Slot) -> None:
        p.data.copy_(slot.value)
        for k, v in self._moments(p).items():
            v.copy_(slot.moments[k])

    def _reduce_at_boundary(self) -> None:
        if self.ddp is not None:  # what DDP's no_sync() sets; here the forward of the next micro-batch must see it too
            self.ddp.require_backward_grad_sync = self.micro == self.settings.accumulation - 1

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale).backward()  # DDP divides by the world size
        self.micro += 1
        self._reduce_at_boundary()

    def step(self, *rates: float) -> float:
        norm = super().step(*rates)
        self._reduce_at_boundary()
        return norm

    def forget(self) -> None:
        super().forget()
        self._reduce_at_boundary()

    def unload(self) -> None:
        if (ddp := getattr(self, "ddp", None)) is not None:
            ddp.reducer = ddp.logger = None
        super().unload()

    def close(self) -> None:
        # DDP's reducer would hold the process group longest. When it is freed, it joins gloo's threads and keeps the
        # interpreter lock that they may be waiting for: now and then a rank hung at its end. Without the reducer the
        # group is freed first.
        self.unload()
        super().close()
