"""The loss of a language model without its logits: made inside of the output layer, for trained positions only, a block
of them at a time.

    loss = sum over trained positions t of  log sum_v exp(z_tv) - z_t,label(t)            z = layer(x), v over the vocabulary

Whole logits in float32 are 4 GB for 8k tokens and 128k words, a few times over. Here the layer's forward is given the
labels for the time of one call of the model. It picks the rows of x whose label is trained (of prompts and padding no
logits are made at all), and goes through them in blocks of at most BLOCK logits, which are dropped at once. What the
model answers in the place of logits is the sum.

    one block           as it is, kept for backward
    frozen layer        the gradient of x is made with the block, while its logits are there: nothing is computed twice
    adapted layer       the block is computed again in backward, where gradients of parameters have their place and their scale

It is still one call of the layer's module by the model's own forward, so that the hooks of ZeRO-3 and FSDP2 gather its
weight as always, on every rank, trained positions or not; within the call only the layer's own forward is used, so that
it may be coded or adapted in any way that takes rows one by one. A fused kernel (Liger's) takes the bare weight of a
plain linear instead, as one tensor, and needs Triton. torch.nn.functional.linear_cross_entropy takes a bare weight too,
returns the sum in bfloat16 for a bfloat16 x, and on CPUs makes a float32 copy of the weight for it.

Some models change logits after the layer (Gemma 2 squashes them, Granite and Cohere scale them). `loss_layer` finds out
before a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.data import IGNORE
from llm_lowrank.engines.base import Engine
from llm_lowrank.engines.frozen import FrozenLinear

BLOCK = 2**25  # logits at a time: 128 MB in float32, about four times over while their gradient is made
PROBE = 8  # tokens that `loss_layer` looks at

Forward = Callable[[Tensor], Tensor]


def sum_loss(model: nn.Module, inputs: dict[str, Any], labels: Tensor, layer: nn.Module | None) -> Tensor:
    """Negative log-likelihood of the labels that are not IGNORE, each predicted from what is before it, summed.

    At least float32.

    labels (batch, length), not shifted, on the host: how many are trained is asked without waiting for the device.
    layer: what `loss_layer` found; None makes whole logits.
    """
    if layer is None:
        logits = model(**inputs, use_cache=False).logits
        return nll(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
    with answering(layer, labels):
        return model(**inputs, use_cache=False).logits.sum()


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


@contextmanager
def answering(layer: nn.Module, labels: Tensor) -> Iterator[None]:
    """In here the layer answers with the summed loss."""
    assert "forward" not in vars(layer), "the output layer has a forward of its own already"
    forward: Forward = layer.forward
    layer.forward = partial(_answer, layer, forward, labels)
    try:
        yield
    finally:
        del layer.forward  # of the object; the class still has it


def _answer(layer: nn.Module, forward: Forward, labels: Tensor, x: Tensor) -> Tensor:
    """(batch, length, n) -> (1, 1, 1): as many axes as logits have."""
    assert x.shape[:2] == labels.shape, (x.shape, labels.shape)
    sample, before = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    at = (sample * labels.shape[1] + before).to(x.device)
    wanted = labels[sample, before + 1].to(x.device)  # (t,)
    rows = x.flatten(0, 1).index_select(0, at)  # (t, n)
    vocabulary = layer.shape[0] if isinstance(layer, FrozenLinear) else layer.out_features
    assert isinstance(vocabulary, int)
    size = max(1, BLOCK // vocabulary)

    def loss(rows: Tensor, wanted: Tensor) -> Tensor:
        return nll(forward(rows), wanted)

    kept = len(rows) <= size or not torch.is_grad_enabled()
    if not kept and not isinstance(layer, Adapter):
        return _Frozen.apply(rows, wanted, size, loss).view(1, 1, 1)
    total = torch.zeros((), device=x.device)
    for block in zip(rows.split(size), wanted.split(size), strict=True):
        total = total + (loss(*block) if kept else checkpoint(loss, *block, use_reentrant=False))
    return total.view(1, 1, 1)


class _Frozen(torch.autograd.Function):
    """The sum of a loss over blocks of rows, its gradient for the rows made on the way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, wanted: Tensor, size: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        total, gradient = torch.zeros((), device=rows.device), torch.empty_like(rows)
        for first in range(0, len(rows), size):
            block = slice(first, first + size)
            with torch.enable_grad():
                x = rows[block].detach().requires_grad_()
                part = loss(x, wanted[block])
                (gradient[block],) = torch.autograd.grad(part, x)
            total = total + part.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * g[None, None]).to(gradient.dtype), None, None, None  # with axes, g keeps its float32


@torch.no_grad()
def loss_layer(engine: Engine, model: PreTrainedModel, wrapped: nn.Module) -> tuple[nn.Module | None, str]:
    """The layer in which this model's loss can be made, or None and why: whole logits are needed. Collective.

    It must be called once in a forward, what it answers must be the model's logits bit for bit, and the loss made in it
    that of the logits.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear | FrozenLinear):
        return None, f"the output layer is a {type(layer).__name__}"
    if isinstance(layer, FrozenLinear) and not layer.rowwise:
        return None, "what is trained on the output layer depends on where in the batch a token is"
    ids = torch.arange(PROBE, device=engine.device)[None] % model.get_input_embeddings().num_embeddings
    labels = torch.where(torch.arange(PROBE) == 2, IGNORE, ids.cpu())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    answers: list[Tensor] = []
    training = model.training
    wrapped.eval()
    handle = layer.register_forward_hook(lambda _module, _args, answer: answers.append(answer))
    try:
        logits = wrapped(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    untouched = len(answers) == 1 and torch.equal(answers[0].float(), logits.float())
    reason = ""
    if engine.sum(torch.tensor(float(untouched), device=engine.device)) < engine.world:
        reason = f"{type(model).__name__} changes logits after its output layer"
    else:
        whole = nll(logits[0, :-1], labels[0, 1:].to(logits.device))
        apart = float(engine.sum((sum_loss(wrapped, inputs, labels, layer) / whole - 1).abs())) / engine.world
        if not apart <= torch.finfo(logits.dtype).eps ** 0.5:
            reason = f"the loss made in the output layer is {apart:.0e} away from that of the logits"
    wrapped.train(training)
    return (None, reason) if reason else (layer, "")
