"""DeepSpeed ZeRO stages 1, 2 and 3.

DeepSpeed runs in its fp32 mode whatever the backbone's dtype is: the backbone is cast before it is handed over, the
adapters and the bank stay float32. Its bf16 mode would cast the whole module, and with it every frozen pair, so that
pairs could no longer move bitwise between trainable and frozen.

What an edit must reach (all of it is written by `put`):

    stage 1, 2   p.data, a view of the flat group that every rank holds; this rank's fragment of the flat master; its
                 moments
    stage 3      p.ds_tensor, this rank's padded slice; the same slice of the master and of the moments; p.data while
                 the parameter is persisted, that is small enough to be left gathered between steps
"""

from __future__ import annotations

import datetime
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from llm_lowrank.engines.base import (
    TIMEOUT,
    Engine,
    Read,
    Slot,
    Span,
    optimizer,
    set_rates,
    share,
    trainables,
)
from llm_lowrank.engines.frozen import FrozenLinear, persistent_size
from llm_lowrank.engines.weight import Weight
from llm_lowrank.engines.zero_config import Config, read_config, resolve
from llm_lowrank.numerics.optimizers import Optimization, initial_state


class _Slices(deepspeed.zero.Init):
    """Make a parameter a ZeRO-3 parameter without sending rank 0's values: each rank has read its own."""

    def _zero_init_param(self, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()


SHARED_MEMORY_COLLECTIVE = "deepspeed_shm_comm"


class Zero(Engine):
    """DeepSpeed ZeRO, of the stage that the configuration names."""

    always_a_group = True  # DeepSpeed wants a process group for one process too

    def __init__(self, config: Config | str | Path, timeout: float = TIMEOUT) -> None:
        self.config = read_config(config)
        self.stage: int = self.config.get("zero_optimization", {}).get("stage", 0)
        self.shards_parameters = self.stage == 3
        deepspeed.utils.logger.setLevel(logging.WARNING)
        # DeepSpeed calls two collectives by their old names
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        # DeepSpeed would compile a shared-memory collective in C++ at its first start on a CPU, and a build that was
        # killed leaves a lock on which every later start waits forever. gloo does the same work without a compiler.
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_COLLECTIVE] = False
        super().__init__(timeout)
        chosen = deepspeed.accelerator.get_accelerator().device_name()
        if chosen != self.device.type:
            raise ValueError(
                f"DeepSpeed works on {chosen}, this run on {self.device.type}: DS_ACCELERATOR="
                f"{os.environ.get('DS_ACCELERATOR', '')} in the environment decides that; unset it, or set it to "
                f"{self.device.type}"
            )

    def _join(self, timeout: datetime.timedelta) -> None:
        deepspeed.init_distributed(self.backends, timeout=timeout, verbose=False)

    def wrap(self, model: nn.Module, settings: Optimization, read: Read) -> nn.Module:
        if not deepspeed.comm.is_initialized():  # a group made by torch is taken over
            deepspeed.init_distributed(verbose=False)
        self.settings, self.micro, self.loss_scale = settings, 0, float(self.world)
        self.linked = False  # see _link
        with self.together():
            config = resolve(self.config, settings, self.world, persistent_size(model))

        # before there are values: a slice of a quantized W must hold whole rows
        if self.shards_parameters:
            self.init = _Slices(config_dict_or_path=config, dtype=torch.float32)
            for module in model.modules():
                if isinstance(module, FrozenLinear):
                    module.pad_rows(self.world)
        self._fill(model, read)

        # ZeRO-3 gathers the parameters of the module that runs; what it reads of other modules must be declared
        if self.shards_parameters:
            for module in model.modules():
                for lender in getattr(module, "borrows", ()):
                    for p in lender.parameters():
                        deepspeed.zero.register_external_parameter(module, p)

        self.params = trainables(model)
        self.ds, *_ = deepspeed.initialize(
            model=model, model_parameters=self.params, optimizer=optimizer(model, settings), config=config
        )
        self.zero = self.ds.optimizer  # the ZeRO optimizer; .optimizer inside it is ours over flat partitions
        return self.ds

    def _rows(self, p: nn.Parameter) -> slice:
        if not self.shards_parameters:
            return super()._rows(p)
        # a slice is a span of the flattened p, which may start and stop within a row: every row that it touches counts
        span = share(p.numel(), self.rank, self.world)
        if span.start == span.stop:
            return slice(0, 0)
        width = max(1, p.numel() // max(1, len(p)))  # elements of a row
        return slice(span.start // width, -(-span.stop // width))

    def _hold(self, p: nn.Parameter, rows: Tensor) -> nn.Parameter:
        if not self.shards_parameters:
            return super()._hold(p, rows)
        # DeepSpeed makes a slice from a whole parameter, so there must be one for a moment. Only this rank's rows of it
        # get values. The others are never read, and on a CPU their pages are never even mapped.
        whole = torch.empty(p.shape, dtype=p.dtype, device=self.init.local_device)
        whole[self._rows(p)] = rows.to(whole.device)
        # this cuts the slice out and frees the whole
        sliced = nn.Parameter(whole, p.requires_grad)
        self.init._convert_to_zero_parameters([sliced])
        return sliced

    # ---- where a parameter lives

    def _span(self, p: nn.Parameter) -> slice:
        """Return the span of the flattened p that this rank's ZeRO-3 slice holds, padding left out."""
        return share(p.ds_numel, self.rank, self.world)

    def _moment_names(self, p: nn.Parameter) -> list[str]:
        state = self.zero.optimizer.state
        return [k for k in self.settings.kind.moments if p.requires_grad and any(k in s for s in state.values())]

    def weight(self, linear: FrozenLinear) -> Weight:
        parts = linear.named_parts()
        if self.stage < 3:
            return Weight.everything(linear.shape, linear.codec, parts, self.device)
        if not linear.codec.writable:  # stored_rows is a multiple of the world: slices are whole rows
            each = linear.stored_rows // self.world
            return Weight.of_rows(
                linear.shape,
                linear.codec,
                {name: part.ds_tensor for name, part in parts.items()},
                first=self.rank * each,
                stop=(self.rank + 1) * each,
                device=self.device,
                sum=self.sum,
            )
        ((name, part),) = parts.items()  # a dense W has one part, whose slices may cut rows
        span = self._span(part)
        numel = span.stop - span.start
        return Weight(
            shape=linear.shape,
            codec=linear.codec,
            parts={name: part.ds_tensor.data[:numel]},
            start=span.start,
            numel=numel,
            device=self.device,
            sum=self.sum,
            written=lambda: self._renew(part),
        )

    def _renew(self, p: nn.Parameter) -> None:
        """Gather a persisted parameter again from the slices: its gathered copy is what the forward uses."""
        if p.ds_status == ZeroParamStatus.AVAILABLE:
            p.partition(has_been_updated=False)
            p.all_gather()

    def span(self, p: nn.Parameter) -> Span:
        names = self._moment_names(p)
        if self.stage == 3:
            span = self._span(p)
            numel = span.stop - span.start
            moments = {k: safe_get_local_optimizer_state(p, k).view(-1)[:numel] for k in names}
            return Span(span.start, safe_get_local_fp32_param(p).detach().view(-1)[:numel], moments)
        fragment = p._hp_mapping
        if fragment is None:  # this rank's flat partition holds nothing of p
            nothing = p.new_empty(0)
            return Span(0, nothing, dict.fromkeys(names, nothing))
        moments = {k: fragment.get_optim_state_fragment(k) for k in names}
        return Span(fragment.lp_fragment_address.start, fragment.hp_fragment.detach(), moments)

    def gradient(self, p: nn.Parameter) -> Tensor:
        if self.stage == 3:
            span = self._span(p)
            return safe_get_local_grad(p).view(-1)[: span.stop - span.start]
        if p._hp_mapping is None:
            return p.new_empty(0)
        grad = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group).view(-1)
        # in fp32 mode DeepSpeed keeps the fragment alone
        assert grad.numel() == p._hp_mapping.lp_fragment_address.numel
        return grad

    def put_gradient(self, p: nn.Parameter, whole: Tensor) -> None:
        if self.stage == 3:
            safe_set_local_grad(p, self._slice(p, whole))
        else:
            p.set_full_hp_grad(whole)

    def whole_masters(self, params: Sequence[nn.Parameter]) -> list[Tensor]:
        if self.stage < 3:
            return [self.whole(p) for p in params]  # every rank holds them, and fp32 mode has no other master
        return super().whole_masters(params)

    def whole(self, p: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return p.data.clone()
        self.traffic += p.ds_numel * p.element_size()
        with deepspeed.zero.GatheredParameters([p]):
            return p.data.clone()

    def slot(self, p: nn.Parameter) -> Slot:
        moments = {}
        for k in self._moment_names(p):
            moments[k] = safe_get_full_optimizer_state(p, k)
            self.traffic += moments[k].nbytes
        return Slot(self.whole(p), moments)  # fp32 mode: what the forward sees equals the master

    def put(self, p: nn.Parameter, slot: Slot) -> None:
        if self.stage < 3:
            p.data.copy_(slot.value)
            if p.requires_grad:
                safe_set_full_fp32_param(p, slot.value)
                for k, v in slot.moments.items():
                    safe_set_full_optimizer_state(p, v, k)
            return
        p.ds_tensor.data.copy_(self._slice(p, slot.value))
        if p.requires_grad:
            safe_set_local_fp32_param(p, self._slice(p, slot.value))
            for k, v in slot.moments.items():
                safe_set_local_optimizer_state(p, self._slice(p, v), k)
        if p.ds_status == ZeroParamStatus.AVAILABLE:
            p.data.copy_(slot.value)

    def _slice(self, p: nn.Parameter, whole: Tensor) -> Tensor:
        """Return this rank's slice of a whole value, padded with zeros to the size of the slice."""
        span = self._span(p)
        padded = whole.new_zeros(p.ds_tensor.numel())
        padded[: span.stop - span.start] = whole.view(-1)[span]
        return padded

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over ranks; the shares of the loss are to be summed. scale_wrt_gas would divide once more.
        self.ds.backward(loss * self.loss_scale, scale_wrt_gas=False)
        self.micro += 1
        if not self.ds.is_gradient_accumulation_boundary():
            self.ds.step()  # counts the micro-batch, steps nothing

    def step(self, *rates: float) -> float:
        assert self.micro == self.settings.accumulation, (self.micro, self.settings.accumulation)
        self.micro = 0
        set_rates(self.zero.param_groups, rates)
        self.ds.step()
        if self.zero.overflow:  # a gradient that is not finite: DeepSpeed has left the step out
            return float("inf")
        self._link()
        return float(self.ds.get_global_grad_norm())

    def forget(self) -> None:
        # DeepSpeed clears its own buffers in a step alone. A step of rate 0 changes no value, and the optimizer's state
        # is made anew after it.
        self.step(*[0.0] * len(self.zero.param_groups))
        self.linked = False
        self.prime(0)

    def _link(self) -> None:
        """Let DeepSpeed look once more for the moments of every parameter in its flat state.

        It looks once, after the step of the first group, when the other groups have no moments yet.
        """
        if self.stage < 3 and not self.linked:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()
            self.linked = True

    def prime(self, steps: int) -> None:
        flat = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        for partition in flat:
            self.zero.optimizer.state[partition] = initial_state(partition.detach(), steps, self.settings)
        self._link()

    def unload(self) -> None:
        if hasattr(self, "ds"):
            self.ds.destroy()
            if self.stage == 3:  # hooks of autograd refer to the model, where no garbage collector sees them
                for p in self.ds.module.parameters():
                    p.data, p.ds_tensor.data = p.new_empty(0), p.ds_tensor.new_empty(0)
        super().unload()

    def close(self) -> None:
        self.unload()
        # not torch's call: DeepSpeed keeps groups of its own, which a second run in this process would use
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
        super().close()
