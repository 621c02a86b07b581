"""How many floating-point operations a step of training takes: a multiplication and an addition are two.

    matrices        t tokens; P frozen elements, P' of them behind something trained; Q trained elements
                    forward    2 (P + Q) t
                    backward   2 P' t               dx alone: a frozen weight gets no gradient
                             + 4 Q t                dx and the gradients of both factors
                    so 4 t for each frozen element and 6 t for each trained one, not 6 t for all
    output layer    the same, with the trained positions in the place of t: no other has logits (models/loss.py)
    attention       p pairs of a query and a key that it sees: l (l + 1) / 2 for an example of l tokens (causal)
                    forward    2 h (a + b) p        h heads, a elements of a query, b of a value:  Q K^T and P V
                    backward   4 h (a + b) p        dQ, dK, dP, dV

This is the count of PaLM, https://arxiv.org/abs/2204.02311 appendix B (there 6 N + 12 L H Q T a token: all is trained,
and attention is counted whole), for a model of which most is frozen.

Two counts are kept, as in https://arxiv.org/abs/2205.05198 section 6 ("model" and "hardware" FLOPs):

    model       what the training needs: real tokens, each product once. MFU = model FLOPs / s / peak of the devices
    hardware    what the device computes: padding too, and all logits where the loss cannot be made in the output layer;
                under gradient checkpointing the forward of the layers twice, and dx of all of them (P' = P), because
                transformers then asks for the gradient of the embedded tokens

P contains the bank, with the room of its full size. Of the fused experts of a mixture, each token counts those that it
is sent to. P' follows from the order of the modules. Of the first adapted module and its siblings (q_proj, k_proj,
v_proj) a little is counted that nobody computes: dx of k_proj, v_proj and the three products, less than 0.1 % of
LLaMA-3.1-8B. Under checkpointing the last products of a layer are not computed again if nothing in them is trained.

Not counted, in either: norms, activations, softmax and what else is no product; decoding of a quantized W; the second
Q K^T of flash attention's backward, and the half that attention with a mask computes in vain; what a method computes
beside the layers (DoRA's lengths of rows, LoSiA's statistics); an adapted output layer's blocks, computed twice; the
pairs that DropLoRA leaves out, which count as if they were there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from llm_lowrank.adapters.adapter import Adapter, Shared
from llm_lowrank.adapters.tokens import TokenEmbedding, TokenHead
from llm_lowrank.adapters.whole import WholeEmbedding, WholeHead
from llm_lowrank.data import IGNORE, MicroBatch
from llm_lowrank.engines.frozen import FrozenLinear


@dataclass(frozen=True)
class Matrices:
    """Elements of matrices that every token is multiplied by."""

    frozen: float = 0.0  # P
    behind: float = 0.0  # P', of these: those that have something trained before them, so that dx is computed
    trained: float = 0.0  # Q

    def __add__(self, other: Matrices) -> Matrices:
        return Matrices(self.frozen + other.frozen, self.behind + other.behind, self.trained + other.trained)

    def forward(self, tokens: float) -> float:
        return 2 * (self.frozen + self.trained) * tokens

    def backward(self, tokens: float) -> float:
        return (2 * self.behind + 4 * self.trained) * tokens


@dataclass(frozen=True)
class Attention:
    """The attention of one layer."""

    width: int  # h (a + b)
    window: int  # keys that a query sees at most; 0: all before it
    behind: bool  # whether something trained stands in this layer or before it


@dataclass(frozen=True)
class Shape:
    """What of a micro-batch decides how much is computed."""

    lengths: np.ndarray  # (examples,) tokens of each real example
    computed: np.ndarray  # the same of what attention computes: with padding
    trained: int  # positions whose label is trained

    @classmethod
    def of(cls, micro: MicroBatch) -> Shape:
        """Read the shape of a micro-batch, which is on the host."""
        labels = micro.labels
        trained = int((labels[:, 1:] != IGNORE).sum())
        if micro.position_ids is None:
            assert micro.attention_mask is not None
            lengths = micro.attention_mask.sum(1).numpy()[: len(micro.samples)]  # the rows behind are empty
            return cls(lengths, np.full(len(labels), labels.shape[1]), trained)
        starts = np.flatnonzero(micro.position_ids.numpy().ravel() == 0)
        computed = np.diff(starts, append=labels.numel())
        # the padding of a row stands there as an example of its own, without a trained token
        real = np.add.reduceat((labels != IGNORE).numpy().ravel(), starts, dtype=np.int64) > 0
        return cls(computed[real], computed, trained)


@dataclass(frozen=True)
class Work:
    """What a model with its adapters multiplies a token by, and how many bytes of weights that takes."""

    layers: Matrices
    output: Matrices
    attention: tuple[Attention, ...]
    recomputed: bool  # gradient checkpointing
    weights: float  # bytes of the weights that the products of one pass read
    decoding: float  # bytes that one pass reads and writes to decode quantized weights

    def model(self, shape: Shape) -> float:
        """FLOPs that the training of these examples needs."""
        tokens = float(shape.lengths.sum())
        matrices = self.layers.forward(tokens) + self.layers.backward(tokens)
        forward, backward = self._attention(shape.lengths)
        output = self.output.forward(shape.trained) + self.output.backward(shape.trained)
        return matrices + forward + backward + output

    def hardware(self, shape: Shape, whole_logits: bool = False) -> float:
        """FLOPs that the device computes for it. whole_logits: see models/loss.py."""
        tokens = float(shape.computed.sum())
        layers, forwards = self.layers, 1
        if self.recomputed:
            layers, forwards = replace(self.layers, behind=self.layers.frozen), 2
        matrices = forwards * layers.forward(tokens) + layers.backward(tokens)
        forward, backward = self._attention(shape.computed, everywhere=self.recomputed)
        logits = tokens if whole_logits else shape.trained
        return matrices + forwards * forward + backward + self.output.forward(logits) + self.output.backward(logits)

    def _attention(self, lengths: np.ndarray, everywhere: bool = False) -> tuple[float, float]:
        """FLOPs of all layers' attention, forward and backward. everywhere: in backward before what is trained, too."""
        pairs = {window: visible(lengths, window) for window in {layer.window for layer in self.attention}}
        forward = sum(2 * layer.width * pairs[layer.window] for layer in self.attention)
        backward = sum(4 * layer.width * pairs[layer.window] for layer in self.attention if layer.behind or everywhere)
        return forward, backward


def visible(lengths: np.ndarray, window: int = 0) -> float:
    """Return the pairs of a query and a key that it sees, itself included, in examples of these lengths."""
    seen = np.minimum(lengths, window) if window else lengths
    return float((seen * (seen + 1) / 2 + (lengths - seen) * seen).sum())


def work_of(model: PreTrainedModel, recomputed: bool) -> Work:
    """Count a model whose adapters are attached; it needs no values, and must not be sharded yet."""
    config, output = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    layers, last = Matrices(), Matrices()
    behind, weights, decoding = False, 0.0, 0.0
    started: list[str] = []  # the trained modules, in the model's order
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        if isinstance(module, TokenEmbedding | WholeEmbedding):
            behind = True
            started.append("0")  # before the first layer
        if isinstance(module, Shared | nn.Embedding):
            continue
        count = _matrices(module, name, config, behind, seen)
        if module is output:
            last += count
        else:
            layers += count
        read, decoded = _moved(module)
        weights, decoding = weights + read, decoding + decoded
        owners = (module, *getattr(module, "borrows", ()))
        # vectors too, which count as no product
        if any(p.requires_grad for owner in owners for p in owner.parameters(recurse=False)):
            behind = True
            started.append(name)
    return Work(layers, last, _attention_of(config, started), recomputed, weights, decoding)


def _matrices(module: nn.Module, name: str, config: Any, behind: bool, seen: set[nn.Parameter]) -> Matrices:
    """Count the matrices of one module, without those of the modules in it."""
    if isinstance(module, FrozenLinear):
        frozen, trained = float(module.shape[0] * module.shape[1]), 0.0
        if isinstance(module, Adapter):
            own = dict(module.named_parameters(recurse=False))
            beside = {key: p for key, p in own.items() if key not in module.part_names and p.ndim > 1}
            lent_frozen, lent_trained = module.lent()
            computed = sum(p.numel() for key, p in beside.items() if p.requires_grad or key in module.like_trained)
            trained = float(lent_trained + computed)
            frozen += lent_frozen + sum(p.numel() for p in beside.values()) - computed
        return Matrices(frozen, frozen * behind, trained)
    frozen = 0.0
    for key, p in module.named_parameters(recurse=False):
        if p.ndim > 1 and (p not in seen or isinstance(module, nn.Linear)):  # a tied output layer computes too
            seen.add(p)
            experts = p.ndim > 2 and "experts" in f"{name}.{key}"
            chosen = getattr(config, "num_experts_per_tok", None)
            frozen += p.numel() * (chosen / len(p) if experts and chosen else 1.0)
    trained = float(module.trained.numel()) if isinstance(module, TokenHead) else 0.0
    if isinstance(module, WholeHead):
        frozen, trained = 0.0, frozen
    return Matrices(frozen, frozen * behind, trained)


def _moved(module: nn.Module) -> tuple[float, float]:
    """Bytes that a product with a module's frozen weight reads of it, and that decoding it first reads and writes."""
    if isinstance(module, FrozenLinear) and module.makes_w:
        decoded = float(module.shape[0] * module.shape[1] * module.codec.dtype.itemsize)
        return decoded, decoded + sum(part.nbytes for part in module.parts())
    params = module.parts() if isinstance(module, FrozenLinear) else module.parameters(recurse=False)
    return float(sum(p.nbytes for p in params if p.ndim > 1)), 0.0


def _attention_of(config: Any, trained: list[str]) -> tuple[Attention, ...]:
    """Return the layers that have attention over pairs of tokens, as far as the config says so."""
    heads, count = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(heads, int) or not isinstance(count, int):
        return ()  # a model without attention, or with other heads in every layer
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = heads * ((getattr(config, "qk_head_dim", None) or size) + (getattr(config, "v_head_dim", None) or size))
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    windows = {
        "full_attention": 0,
        "sliding_attention": getattr(config, "sliding_window", None) or 0,
        "chunked_attention": getattr(config, "attention_chunk_size", None) or 0,
    }
    # the number of the layer in which the first trained module stands
    numbers = [[int(part) for part in name.split(".") if part.isdigit()] for name in trained]
    first = min((found[0] for found in numbers if found), default=count)
    return tuple(
        Attention(width, windows[kind], number >= first) for number, kind in enumerate(kinds) if kind in windows
    )


def full_shape(rows: int, length: int) -> Shape:
    """Return the shape of a micro-batch of so many rows without padding, all of whose tokens are trained."""
    lengths = np.full(rows, length)
    return Shape(lengths, lengths, rows * (length - 1))
