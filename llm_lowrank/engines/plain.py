"""One process, or one per device with torch's DistributedDataParallel: every rank holds everything."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from llm_lowrank.engines.base import MOMENTS, Engine, Local, Optimization, Read, Slot, adamw, trainables
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.engines.weight import Weight


class Plain(Engine):
    def wrap(self, model: nn.Module, settings: Optimization, read: Read) -> nn.Module:
        self._fill(model, read)
        self.settings, self.micro = settings, 0
        self.params = trainables(model)
        self.optimizer = adamw(self.params, settings)
        self.ddp = DistributedDataParallel(model) if self.world > 1 else None
        self._reduce_at_boundary()
        return self.ddp or model

    def _rows(self, p: nn.Parameter) -> slice:
        return slice(0, len(p))

    def _hold(self, p: nn.Parameter, rows: Tensor) -> nn.Parameter:
        return nn.Parameter(rows.to(self.device), p.requires_grad)

    def weight(self, linear: FrozenLinear) -> Weight:
        return Weight.everything(linear.shape, linear.codec, linear.named_parts(), self.device)

    def local(self, p: nn.Parameter) -> Local:
        run = self._run(p)
        return Local(run.start, p.data.view(-1)[run], {k: v.view(-1)[run] for k, v in self._moments(p).items()})

    def gradient(self, p: nn.Parameter) -> Tensor:
        assert p.grad is not None, "gradient() before backward"
        return p.grad.reshape(-1)[self._run(p)]

    def _run(self, p: nn.Parameter) -> slice:
        # Every rank holds all of p; for statistics each takes an even run, so that the runs cover p once.
        size = -(-p.numel() // self.world)
        start = min(self.rank * size, p.numel())
        return slice(start, min(start + size, p.numel()))

    def whole(self, p: nn.Parameter) -> Tensor:
        return p.data.clone()

    def slot(self, p: nn.Parameter) -> Slot:
        return Slot(p.data.clone(), {k: v.clone() for k, v in self._moments(p).items()})

    def put(self, p: nn.Parameter, slot: Slot) -> None:
        p.data.copy_(slot.value)
        for k, v in self._moments(p).items():
            v.copy_(slot.moments[k])

    def _moments(self, p: nn.Parameter) -> dict[str, Tensor]:
        state = self.optimizer.state.get(p, {}) if p.requires_grad else {}
        return {k: state[k] for k in MOMENTS if k in state}

    def _reduce_at_boundary(self) -> None:
        if self.ddp is not None:  # what DDP's no_sync() sets; here the forward of the next micro-batch must see it too
            self.ddp.require_backward_grad_sync = self.micro == self.settings.accumulation - 1

    def backward(self, loss: Tensor) -> None:
        (loss * self.world).backward()  # DDP divides by the world size
        self.micro += 1
        self._reduce_at_boundary()

    def step(self, learning_rate: float) -> float:
        assert self.micro == self.settings.accumulation, (self.micro, self.settings.accumulation)
        self.micro = 0
        self._reduce_at_boundary()
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.settings.max_grad_norm or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    def close(self) -> None:
        # DDP's reducer would hold the process group longest and, when it goes, join gloo's threads without letting go of the
        # interpreter lock that they may be waiting for: now and then a rank hung at its end. Without it the group goes first.
        ddp = getattr(self, "ddp", None)
        if ddp is not None:
            ddp.reducer = ddp.logger = None
        super().close()
