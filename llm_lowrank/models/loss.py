"""The loss of a language model, computed inside of the output layer: for trained positions only, block by block.

    loss = sum over trained positions t of  log sum_v exp(z_tv) - z_t,label(t)         z = layer(x), v in the vocabulary

For 8k tokens and a vocabulary of 128k the logits in float32 take 4 GB, and they are held a few times over. Here the
layer's forward gets the labels during one call of the model. It takes the rows of x whose label is trained, so that
prompts and padding have no logits at all. It computes the logits in blocks of at most BLOCK numbers and drops each
block at once. In the place of logits the model returns the summed loss.

    one block           its logits are kept for backward, as usual
    frozen layer        the gradient of x is computed together with each block: nothing is computed twice
    adapted layer       each block is computed again in backward, where the parameters get their gradients; so it is
                        with a layer that is trained in some rows (adapters/tokens.py) or whole (adapters/whole.py)

The model's forward still calls the layer's module once, on every rank, even without trained positions. The hooks of
ZeRO-3 and FSDP2 therefore gather the layer's weight as always. Within this call only the layer's own forward is used.
The layer may thus be quantized, and adapted in any way that treats the rows of x one by one.

There are two alternatives. A fused kernel (Liger's) takes the weight of a plain linear layer as one tensor, and needs
Triton. torch.nn.functional.linear_cross_entropy takes such a weight too; for a bfloat16 x it returns the sum in
bfloat16, and on CPUs it makes a float32 copy of the weight.

With label smoothing e the loss of a position is (1 - e) of this plus e / |v| sum_v (log sum_u exp(z_tu) - z_tv): the
cross entropy with a share e spread over the vocabulary. https://arxiv.org/abs/1512.00567 section 7

DFT, dynamic fine-tuning, multiplies the loss of a position by the probability of its label, which counts as a constant:
p_t (-log p_t), so that the gradient is that of -log p_t times p_t. https://arxiv.org/abs/2508.05629 equation 9

Some models change the logits after the layer (Gemma 2 squashes them, Granite and Cohere scale them). `loss_layer`
checks this before a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.tokens import TokenHead
from llm_lowrank.adapters.whole import WholeHead
from llm_lowrank.data import IGNORE
from llm_lowrank.engines.base import Engine, send
from llm_lowrank.engines.frozen import FrozenLinear

# Logits at a time, about four times over while their gradient is computed: 128 MB in float32, or 512 MB on an
# accelerator, whose products are fastest for a multiple of TILE rows.
BLOCK, BLOCK_ON_ACCELERATOR, TILE = 2**25, 2**27, 256
PROBE = 8  # tokens of the input with which `loss_layer` checks a model

Forward = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # logits (t, v), labels (t,) -> the summed loss ()
LossType = Literal["nll", "dft"]


def sum_loss(
    model: nn.Module,
    inputs: dict[str, Any],
    labels: Tensor,
    layer: nn.Module | None,
    smoothing: float = 0.0,
    kind: LossType = "nll",
) -> Tensor:
    """Return the negative log-likelihood of all labels that are not IGNORE, summed, at least in float32.

    A label is predicted from the tokens before it. labels (batch, length) are not shifted and on the host, where they
    can be counted without waiting for the device. layer: the result of `loss_layer`; None computes all logits.
    smoothing: the share of every label that is spread over the vocabulary. kind dft: weighted as DFT does, without
    smoothing.
    """
    assert not (smoothing and kind == "dft")
    loss = dft if kind == "dft" else partial(nll, smoothing=smoothing)
    if layer is None:
        logits = model(**inputs, use_cache=False).logits
        return loss(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
    with answering(layer, labels, loss):
        return model(**inputs, use_cache=False).logits.sum()


def nll(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The summed cross entropy in at least float32: logits (t, v), labels (t,) -> ()."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed cross entropy weighted by the probability of each label: logits (t, v), labels (t,) -> ()."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")  # (t,), 0 without a label
    return (loss * loss.detach().neg().exp()).sum()


@contextmanager
def answering(layer: nn.Module, labels: Tensor, loss: Loss = nll) -> Iterator[None]:
    """Within this block the layer returns the summed loss in the place of logits."""
    assert "forward" not in vars(layer), "the output layer has a forward of its own already"
    forward: Forward = layer.forward
    layer.forward = partial(_answer, layer, forward, labels, loss)
    try:
        yield
    finally:
        del layer.forward  # the object's attribute; the class still has its forward


def _answer(layer: nn.Module, forward: Forward, labels: Tensor, of_logits: Loss, x: Tensor) -> Tensor:
    """The summed loss, with as many axes as logits have: x (batch, length, n) -> (1, 1, 1)."""
    assert x.shape[:2] == labels.shape, (x.shape, labels.shape)
    # the rows of x that predict a trained label: the label behind position `before` of a sample
    sample, before = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    at = send(sample * labels.shape[1] + before, x.device)  # (t,)
    wanted = send(labels[sample, before + 1], x.device)  # (t,)
    rows = x.flatten(0, 1).index_select(0, at)  # (t, n)
    vocabulary = layer.shape[0] if isinstance(layer, FrozenLinear) else layer.out_features
    assert isinstance(vocabulary, int)
    size = block_rows(vocabulary, x.device)

    def loss(rows: Tensor, wanted: Tensor) -> Tensor:
        return of_logits(forward(rows), wanted)

    # one block, or no backward at all: autograd may keep the logits
    plain = len(rows) <= size or not torch.is_grad_enabled()
    # a frozen layer needs no gradient but that of x
    if not plain and not isinstance(layer, Adapter | TokenHead | WholeHead):
        return _Frozen.apply(rows, wanted, size, loss).view(1, 1, 1)
    # an adapted layer, or one that is trained in rows or whole: it gets its gradients when backward computes the block
    # again
    total = torch.zeros((), device=x.device)
    for block in zip(rows.split(size), wanted.split(size), strict=True):
        total = total + (loss(*block) if plain else checkpoint(loss, *block, use_reentrant=False))
    return total.view(1, 1, 1)


def block_rows(vocabulary: int, device: torch.device) -> int:
    """Return the rows of a block of logits."""
    if device.type == "cpu":
        return max(1, BLOCK // vocabulary)
    rows = max(1, BLOCK_ON_ACCELERATOR // vocabulary)
    return rows if rows < TILE else rows // TILE * TILE


class _Frozen(torch.autograd.Function):
    """The sum of a loss over blocks of rows. The forward computes the gradient of the rows together with the loss."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, wanted: Tensor, size: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        total, gradient = torch.zeros((), device=rows.device), torch.empty_like(rows)
        for first in range(0, len(rows), size):
            block = slice(first, first + size)
            with torch.enable_grad():
                x = rows[block].detach().requires_grad_()
                block_loss = loss(x, wanted[block])
                (gradient[block],) = torch.autograd.grad(block_loss, x)
            total = total + block_loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * g[None, None]).to(gradient.dtype), None, None, None  # with axes, g keeps its float32


@torch.no_grad()
def loss_layer(engine: Engine, model: PreTrainedModel, wrapped: nn.Module) -> tuple[nn.Module | None, str]:
    """Return the layer in which this model's loss can be computed, or None and the reason why not. Collective.

    The forward must call the layer once, the layer's output must be the model's logits bit for bit, and the loss that
    is computed in the layer must equal that of the logits. Without such a layer all logits are computed.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear | FrozenLinear):
        return None, f"the output layer is a {type(layer).__name__}"
    if isinstance(layer, FrozenLinear) and not layer.rowwise:
        return None, "what is trained on the output layer depends on where in the batch a token is"
    ids = torch.arange(PROBE, device=engine.device)[None] % model.get_input_embeddings().num_embeddings
    labels = torch.where(torch.arange(PROBE) == 2, IGNORE, ids.cpu())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    # the layer's output must be the model's logits, on every rank
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
    # and both losses must agree; the mean over the ranks is the same on all of them
    else:
        expected = nll(logits[0, :-1], labels[0, 1:].to(logits.device))
        apart = float(engine.sum((sum_loss(wrapped, inputs, labels, layer) / expected - 1).abs())) / engine.world
        if not apart <= torch.finfo(logits.dtype).eps ** 0.5:
            reason = f"the loss made in the output layer is {apart:.0e} away from that of the logits"
    wrapped.train(training)
    return (None, reason) if reason else (layer, "")
