"""Rows of the embedding and of the output layer that are trained, beside the frozen matrices.

    e_i = R[row(i)]       z_i = R'[row(i)] . x       of a token i with a trained row
    e_i = W[i]            z_i = W'[i] . x            of every other token

W, W' (v, n) stay frozen as they are. R, R' (t, n) are float32 parameters of one module outside of the decoder layers;
where the output layer shares the embedding's W, R' is R. Tokens from v on have no row in W, so that all of them have
trained rows: the matrices never grow during a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Shared, fill_

Rows = Callable[[int, int], Tensor]  # some rows of W, by their first and last + 1
BLOCK = 2**24  # elements of W that are summed at a time: 128 MB in float64


@dataclass(frozen=True)
class TrainedTokens:
    """The tokens whose rows are trained."""

    rows: int  # v, the rows of W
    names: Mapping[int, str]  # token -> its text, ascending; from v on without a gap
    new: frozenset[int]  # of these: those that start as the mean of all rows of W, or of their pieces
    pieces: Mapping[int, list[int]] = field(default_factory=dict)  # new token -> what its text was before

    def __post_init__(self) -> None:
        ids = list(self.names)
        assert ids == sorted(ids) and set(range(self.rows, self.size)) <= set(ids) and self.new <= set(ids), ids

    @property
    def size(self) -> int:
        """The rows that W would have with the tokens beyond it."""
        return max([self.rows, *(token + 1 for token in self.names)])

    @property
    def inside(self) -> list[int]:
        """The tokens that have a row in W; they stand first."""
        return [token for token in self.names if token < self.rows]

    def index(self) -> Tensor:
        """Return token -> its trained row, or -1: (size,) on the host."""
        with torch.device("cpu"):
            index = torch.full((self.size,), -1)
            index[list(self.names)] = torch.arange(len(self.names))
        return index

    def describe(self) -> str:
        """What a run says of them."""
        old = [text for token, text in self.names.items() if token not in self.new]
        parts = [f"{len(old)} trained: {_some(old)}"] if old else []
        if self.new:
            new = [text for token, text in self.names.items() if token in self.new]
            start = "the mean of the rows of their old pieces" if self.pieces else "the mean of all rows"
            parts.insert(0, f"{len(new)} new, which start as {start}: {_some(new)}")
        grown = f"; a merged model has {self.size} rows, the base {self.rows}" if self.size > self.rows else ""
        return f"tokens: {'; '.join(parts)}{grown}"


def _some(names: list[str]) -> str:
    return " ".join(names[:8]) + (" ..." if len(names) > 8 else "")


class TokenRows(Shared):
    """The trained rows: `embedding` (t, n) and, unless the layers share W, `output` (t, n)."""

    def __init__(self, tokens: TrainedTokens, matrices: dict[str, tuple[str, Tensor]]) -> None:
        """matrices: embedding, output -> the name of the module and its W."""
        super().__init__()
        self.tokens, self.modules_of = tokens, {key: name for key, (name, _) in matrices.items()}
        self.embedding: nn.Parameter
        self.output: nn.Parameter | None
        self.register_parameter("output", None)
        for key, (_, w) in matrices.items():
            self.register_parameter(key, nn.Parameter(torch.empty(len(tokens.names), w.shape[1], device=w.device)))
        # read the untouched W; whoever loads the model replaces these
        self.sources: dict[str, Rows] = {key: partial(_rows_of, w) for key, (_, w) in matrices.items()}
        fill_(self)

    def initial(self) -> dict[str, Tensor]:
        return {key: self._start(rows) for key, rows in self.sources.items()}

    def _start(self, rows: Rows) -> Tensor:
        """Return (t, n) on the host: rows of W, and for new tokens the mean of all rows or of those of their pieces."""
        tokens = self.tokens
        values: list[Tensor] = []
        mean: Tensor | None = None
        for token in tokens.names:
            if token not in tokens.new:
                values.append(rows(token, token + 1)[0].float())
            elif token in tokens.pieces:
                found = [rows(piece, piece + 1)[0].double() for piece in tokens.pieces[token]]
                values.append(torch.stack(found).mean(0).float())
            else:
                mean = _mean(rows, tokens.rows) if mean is None else mean
                values.append(mean)
        return torch.stack(values).cpu()

    def extra_repr(self) -> str:
        return f"{len(self.tokens.names)} rows of {', '.join(self.modules_of.values())}"


def _rows_of(w: Tensor, start: int, stop: int) -> Tensor:
    return w.detach()[start:stop]


def _mean(rows: Rows, count: int) -> Tensor:
    """Return the mean of so many rows, (n,), summed in float64 block by block."""
    total = rows(0, 1)[0].double()
    step = max(1, BLOCK // len(total))
    for first in range(1, count, step):
        total = total + rows(first, min(first + step, count)).double().sum(0)
    return (total / count).float()


def embed_scale(embedding: nn.Embedding) -> Tensor | None:
    """What Gemma 3's embedding multiplies the rows by that it looks up; None of every other embedding."""
    scale = getattr(embedding, "embed_scale", None)
    return scale if isinstance(scale, Tensor) else None


def is_lookup(embedding: nn.Module) -> bool:
    """Whether a module is an embedding that does nothing but look rows up, and perhaps scale them."""
    return type(embedding) is nn.Embedding or (
        isinstance(embedding, nn.Embedding) and embed_scale(embedding) is not None
    )


def look_as(ours: nn.Embedding, embedding: nn.Embedding, rows: int) -> None:
    """Give an embedding that is made here what torch's class has beside the weight. rows: that it can look up."""
    ours.num_embeddings, ours.embedding_dim = rows, embedding.embedding_dim
    ours.padding_idx, ours.max_norm, ours.norm_type = embedding.padding_idx, None, 2.0
    ours.scale_grad_by_freq, ours.sparse = False, False


class TokenEmbedding(nn.Embedding):
    """An embedding with trained rows in the place of some, and behind its last one."""

    def __init__(self, embedding: nn.Embedding, rows: TokenRows) -> None:
        nn.Module.__init__(self)
        tokens = rows.tokens
        look_as(self, embedding, tokens.size)
        self.weight = embedding.weight  # the same parameter, which an output layer may share
        self.borrows = (rows,)
        self.last = tokens.rows - 1
        self.index: Tensor
        self.scale: Tensor | None
        self.register_buffer("index", tokens.index(), persistent=False)
        self.register_buffer("scale", embed_scale(embedding), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        (rows,) = self.borrows
        row = self.index[input]
        frozen = F.embedding(input.clamp_max(self.last), self.weight)
        trained = F.embedding(row.clamp_min(0), rows.embedding).to(frozen.dtype)
        found = torch.where((row >= 0)[..., None], trained, frozen)
        return found if self.scale is None else found * self.scale.to(found.dtype)


class TokenHead(nn.Linear):
    """An output layer with trained rows in the place of some, and behind its last one."""

    def __init__(self, linear: nn.Linear, rows: TokenRows) -> None:
        nn.Module.__init__(self)
        tokens = rows.tokens
        self.in_features, self.out_features = linear.in_features, tokens.size
        self.weight, self.bias = linear.weight, linear.bias
        self.borrows = (rows,)
        with torch.device("cpu"):
            inside = torch.tensor(tokens.inside, dtype=torch.long)
        self.inside: Tensor
        self.register_buffer("inside", inside, persistent=False)

    @property
    def trained(self) -> nn.Parameter:
        """The rows R' (t, n)."""
        (rows,) = self.borrows
        return rows.embedding if rows.output is None else rows.output

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.weight, self.bias)  # (..., v)
        own = F.linear(x, self.trained.to(x.dtype))  # (..., t)
        inside, count = self.inside, len(self.inside)
        if count:
            replaced = own[..., :count] if self.bias is None else own[..., :count] + self.bias[inside]
            logits = logits.index_copy(-1, inside, replaced)
        return logits if count == own.shape[-1] else torch.cat([logits, own[..., count:]], -1)
