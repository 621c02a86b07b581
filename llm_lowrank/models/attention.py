"""Attention without a mask, for training: transformers' sdpa, told that causality is all that a mask would say.

    o_i = sum_{j <= i} softmax_j(q_i k_j / sqrt(d)) v_j           for the tokens j of i's own example

A batch is padded on the right, so that no token comes before the padding that it must not see. transformers makes a
(batch, 1, t, t) mask of it all the same as soon as one row is padded: with a mask, torch cannot take its flash kernel,
copies keys and values for every query head, and computes the half above the diagonal too. Besides, transformers reads
the mask on the host to find that out, so that the device runs dry twice in every forward.

    rows of one example      `causal` asks sdpa for causality alone
    packed rows, on CUDA     all rows are joined to one, whose examples torch.nn.attention.varlen keeps apart by their
                             lengths: it is flash-attn's variable-length kernel, and comes with torch
    packed rows elsewhere    masks, as transformers makes them from the positions

`leave_masks_out` proves for the model at hand that nothing changes. Answers are generated with masks, because there
prompts are padded on the left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llm_lowrank.engines.base import Engine

NAME = "causal_sdpa"  # of this attention in a model's config
LENGTH = 6  # tokens of a row in the proof
# Settings of a config that let a token see only some of those before it; a row that is no longer needs no mask for it.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window")


def causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output, (batch, t, heads, d), for transformers' AttentionInterface.

    query (batch, heads, t, d), key and value (batch, heads of keys, t, d). cu_seq_lens_q: where the examples of one
    joined row begin, and its length: int32 (examples + 1,).
    """
    assert query.shape[2] == key.shape[2], "this attention is for training: there are no keys of earlier tokens"
    if cu_seq_lens_q is None or max_length_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    q, k, v = (t[0].transpose(0, 1) for t in (query, *(t.repeat_interleave(groups, 1) for t in (key, value))))
    return varlen(q, k, v, starts=cu_seq_lens_q, longest=max_length_q, scaling=scaling)[None], None


def varlen(q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor, longest: int, scaling: float | None) -> Tensor:
    """Causal attention within each example of a joined row: (t, heads, d) each -> (t, heads, d)."""
    from torch.nn.attention.varlen import varlen_attn

    answer = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0))
    assert isinstance(answer, Tensor)
    return answer


AttentionInterface.register(NAME, causal)


def joins_rows(model: PreTrainedModel) -> bool:
    """Whether packed rows must become one row, because this attention tells examples apart by their lengths."""
    return model.config._attn_implementation == NAME or "flash" in str(model.config._attn_implementation)


@contextmanager
def with_masks(model: PreTrainedModel) -> Iterator[None]:
    """Within this block the model makes masks again, for rows that are padded on the left or have earlier keys."""
    used = model.config._attn_implementation
    if used == NAME:
        model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = used


@torch.no_grad()
def leave_masks_out(engine: Engine, model: PreTrainedModel, wrapped: nn.Module, *, longest: int, packed: bool) -> str:
    """Let the model train without masks if that changes nothing; return "" or why it keeps them. Collective.

    The proof: the logits of real tokens are bitwise the same whatever the padding behind them is, and equal those with
    a mask up to rounding. longest: the tokens of the longest row. Packed rows are proved by `check_apart`.
    """
    if reason := _needs_masks(engine, model, longest, packed):
        return reason
    training = model.training
    wrapped.eval()
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = 1 + torch.arange(2 * LENGTH, device=engine.device).view(2, LENGTH) * 7 % (vocabulary - 1)
    mask = torch.ones_like(ids)
    mask[1, LENGTH // 2 :] = 0
    other = torch.where(mask == 1, ids, 0)

    def logits(ids: Tensor) -> Tensor:
        return wrapped(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask == 1].float()

    masked = logits(ids)
    model.config._attn_implementation = NAME
    found, again = logits(ids), logits(other)
    away = float((found - masked).norm() / masked.norm())
    good = torch.equal(found, again) and away <= 4 * torch.finfo(model.dtype).eps ** 0.5
    if all(engine.gather(good)):
        reason = ""
    else:
        model.config._attn_implementation = "sdpa"
        reason = f"{type(model).__name__} without masks answers otherwise ({away:.0e} apart)"
    wrapped.train(training)
    return reason


def _needs_masks(engine: Engine, model: PreTrainedModel, longest: int, packed: bool) -> str:
    """Why masks cannot be left out, or an empty string; the same on every rank."""
    config = model.config.get_text_config()
    if model.config._attn_implementation != "sdpa":
        return f"attention is {model.config._attn_implementation}"
    for name in WINDOWS:
        window = getattr(config, name, None)
        if isinstance(window, int) and window < longest:
            return f"{name} is {window}, and rows may have {longest} tokens"
    if packed and engine.device.type != "cuda":
        return f"packed rows need them on {engine.device.type}"
    if packed and model.dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel for packed rows does not take {str(model.dtype).removeprefix('torch.')}"
    if packed and (getattr(config, "attention_dropout", 0.0) or 0.0) > 0:
        return "the kernel for packed rows has no dropout"
    return ""
