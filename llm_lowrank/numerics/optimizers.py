"""The optimizers: how each is built, which moments it keeps, and from what a moment starts at an exchange.

There is one table, OPTIMIZERS. The recipe's `optim`, the engines, checkpoints, exchanges and the memory of --dry_run
read it. Before it trains, every engine compares the table with the state that a step really makes (check_state).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from lion_pytorch.foreach import Lion
from torch import Tensor

# What the moment of a pair that becomes trainable starts from: zero, as a mean of gradients does, or the mean over the
# pairs that stay trainable, as a mean of squares does, by which a step is divided.
Start = Literal["zero", "mean"]
Groups = list[dict[str, Any]]  # of parameters, as torch's optimizers take them


@dataclass(frozen=True)
class Optimization:
    """The settings with which an engine builds and steps the optimizer."""

    learning_rate: float = 1e-4
    optim: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0  # 0 means no clipping
    accumulation: int = 1  # micro-batches per optimizer step
    micro_batch: int = 1  # samples per micro-batch and rank

    @property
    def kind(self) -> OptimizerKind:
        """The entry of the table that `optim` names."""
        return OPTIMIZERS[self.optim]


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer. Weight decay is decoupled (https://arxiv.org/abs/1711.05101)."""

    title: str  # in messages
    build: Callable[[Groups, Optimization], torch.optim.Optimizer]
    # Its moments by their names in torch's state, each as large as the parameter and of its dtype.
    moments: Mapping[str, Start]
    counter: bool  # whether the state counts the steps, as a scalar "step"
    settings: tuple[str, ...]  # of the recipe, beside learning_rate and weight_decay
    decays: bool = True  # whether it takes weight_decay


def _adamw(groups: Groups, o: Optimization) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=o.learning_rate,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        fused=True if _has_fused(groups[0]["params"][0]) else None,  # one kernel for all parameters
    )


class _Lion(Lion):
    """lion_pytorch's Lion, whose operations each take all tensors of a group."""

    param_groups: Groups

    def step(self, closure: None = None) -> None:
        # torch refuses an empty list, and DeepSpeed's ZeRO-3 empties all groups but the one that it steps
        groups = self.param_groups
        self.param_groups = [group for group in groups if any(p.grad is not None for p in group["params"])]
        super().step()
        self.param_groups = groups


def _lion(groups: Groups, o: Optimization) -> torch.optim.Optimizer:
    return _Lion(groups, lr=o.learning_rate, betas=o.betas, weight_decay=o.weight_decay)


def _sgd(groups: Groups, o: Optimization) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=o.learning_rate, weight_decay=o.weight_decay)


def _sgd_momentum(groups: Groups, o: Optimization) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=o.learning_rate, momentum=o.betas[0])


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(
        "AdamW",
        _adamw,
        {"exp_avg": "zero", "exp_avg_sq": "mean"},
        counter=True,
        settings=("adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
    # https://arxiv.org/abs/2302.06675 algorithm 2
    "lion": OptimizerKind("Lion", _lion, {"exp_avg": "zero"}, counter=False, settings=("adam_beta1", "adam_beta2")),
    # Without momentum torch's weight decay is the decoupled one: p <- p - rate (g + decay p).
    "sgd": OptimizerKind("SGD", _sgd, {}, counter=False, settings=()),
    "sgd_momentum": OptimizerKind(
        "SGD with momentum",
        _sgd_momentum,
        {"momentum_buffer": "zero"},
        counter=False,
        settings=("adam_beta1",),
        decays=False,  # torch would add it to the momentum
    ),
}

if TYPE_CHECKING:
    OptimizerName = str  # a type checker knows no Literal that is computed
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]


def penalize(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let every step of the optimizer end with shrink_ where a group has a `penalty`; return the optimizer."""
    if any(group.get("penalty") for group in optimizer.param_groups):
        optimizer.register_step_post_hook(lambda stepped, *_: shrink_(stepped.param_groups))
    return optimizer


@torch.no_grad()
def shrink_(groups: Groups) -> None:
    """Make the proximal step of each group's L1 penalty, in place.

        p <- sign(p) max(|p| - rate * penalty, 0)

    This is the soft threshold: the proximal operator of rate * penalty * sum |p|. Small entries become exactly 0. It
    works on each entry alone and remembers nothing, so that shards of any cut get the same values, and padding of zeros
    stays zero.
    """
    for group in groups:
        threshold = group["lr"] * group.get("penalty", 0.0)
        if threshold:
            for p in group["params"]:
                p.copy_(p.sign() * (p.abs() - threshold).clamp_min(0))


def initial_state(t: Tensor, steps: int, settings: Optimization) -> dict[str, Tensor]:
    """Return the state of one tensor after so many steps, its moments zero."""
    where = t.device if _has_fused(t) else torch.device("cpu")  # the fused kernel counts on the device
    counter = {"step": torch.tensor(float(steps), device=where)} if settings.kind.counter else {}
    return counter | {name: torch.zeros_like(t) for name in settings.kind.moments}


def check_state(settings: Optimization) -> None:
    """Assert that a step of the optimizer leaves the state that the table describes, and nothing beside it.

    A moment that the table does not name would be neither saved nor restored nor renewed at an exchange. torch makes
    the state at the first step, so this takes a step over a parameter of six elements.
    """
    p = torch.nn.Parameter(torch.ones(2, 3, device="cpu"))
    p.grad = torch.ones_like(p)
    optimizer = settings.kind.build([{"params": [p]}], settings)
    optimizer.step()
    found = {k: _describe(v) for k, v in optimizer.state[p].items() if v is not None}
    expected = {k: _describe(v) for k, v in initial_state(p.detach(), 1, settings).items()}
    assert found == expected, (
        f"optim: {settings.optim} keeps {found or 'nothing'} of a parameter of shape (2, 3), but OPTIMIZERS says "
        f"{expected or 'nothing'}: what the table does not name would be neither saved nor renewed at an exchange"
    )


def _has_fused(t: Tensor) -> bool:
    return t.device.type in ("cpu", "cuda")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__
