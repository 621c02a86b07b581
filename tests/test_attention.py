"""Training without masks: only where it changes nothing, and then nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig, PreTrainedModel

from llm_lowrank.data import Example, collate
from llm_lowrank.engines.plain import Plain
from llm_lowrank.models import attention
from llm_lowrank.models.packing import check_apart

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def model_of(config, **changes) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **changes).eval()


def llama(**changes) -> PreTrainedModel:
    return model_of(LlamaConfig(**SIZES), **changes)


def leave_out(model: PreTrainedModel, longest: int = 16, packed: bool = False) -> str:
    return attention.leave_masks_out(Plain(), model, model, longest=longest, packed=packed)


def examples(*lengths: int) -> list[Example]:
    return [Example(ids := [1 + (7 * i + 3 * n) % 60 for i in range(n)], ids) for n in lengths]


def batch(rows: list[list[Example]], packed: bool = False):
    arrays = [[example.arrays for example in row] for row in rows]
    return collate(arrays, len(rows), pad_id=0, tokens=1, samples=(), packed=packed)


def real_logits(model: PreTrainedModel, micro) -> Tensor:
    logits = model(**micro.inputs(torch.device("cpu")), use_cache=False).logits
    return logits[micro.attention_mask.bool()]


def test_logits_and_gradients_are_those_with_masks(monkeypatch):
    micro = batch([[row] for row in examples(9, 4, 6)])
    model = llama()
    masked = real_logits(model, micro)
    masked.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *args, **kwargs: seen.append(kwargs) or kernel(*args, **kwargs),
    )
    assert leave_out(model) == ""
    seen.clear()
    free = real_logits(model, micro)
    free.square().mean().backward()
    torch.testing.assert_close(free, masked, rtol=0, atol=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=1e-7)
    assert len(seen) == 2  # layers: causality alone, and no copy of the keys for each query head
    assert all(call["attn_mask"] is None and call["is_causal"] and call["enable_gqa"] for call in seen)


def test_a_model_whose_positions_come_from_the_mask_has_them_still():
    model = model_of(
        OPTConfig(
            vocab_size=61,
            hidden_size=32,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    )
    micro = batch([[row] for row in examples(9, 4)])
    masked = real_logits(model, micro)
    assert leave_out(model) == ""
    torch.testing.assert_close(real_logits(model, micro), masked, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change, longest, packed, says",
    [
        ({"attn_implementation": "eager"}, 16, False, "attention is eager"),
        ({"config": MistralConfig(**SIZES, sliding_window=8)}, 16, False, "sliding_window is 8, and rows may have 16"),
        ({"config": MistralConfig(**SIZES, sliding_window=8)}, 8, False, ""),
        ({}, 16, True, "packed rows need them on cpu"),
    ],
)
def test_what_needs_masks_keeps_them(change, longest, packed, says):
    model = model_of(change.pop("config", LlamaConfig(**SIZES)), **change)
    used = model.config._attn_implementation
    reason = leave_out(model, longest, packed)
    assert says in reason and bool(says) == bool(reason)
    assert model.config._attn_implementation == (used if says else attention.NAME)


def test_a_model_that_sees_the_padding_keeps_its_masks():
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # sees what comes after a token unless a mask forbids it
    assert "LlamaForCausalLM without masks answers otherwise" in leave_out(model)
    assert model.config._attn_implementation == "sdpa"


def test_answers_to_prompts_of_several_lengths_are_the_same(monkeypatch):
    model = llama()
    ids = torch.tensor([[0, 0, 5, 9, 11], [7, 8, 9, 10, 12]])
    arguments = dict(
        input_ids=ids,
        attention_mask=(ids != 0).long(),
        max_new_tokens=6,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    wanted = model.generate(**arguments)
    assert leave_out(model) == ""
    with attention.with_masks(model):
        assert torch.equal(model.generate(**arguments), wanted)
    assert model.config._attn_implementation == attention.NAME
    with pytest.raises(AssertionError, match="this attention is for training"):
        model.generate(**arguments)


def reference(q: Tensor, k: Tensor, v: Tensor, *, starts: Tensor, longest: int, scaling: float | None) -> Tensor:
    """What the kernel for rows of several lengths computes, example by example."""
    assert longest == int(starts.diff().max()) and starts.dtype == torch.int32
    parts = []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        q1, k1, v1 = (t[start:stop].transpose(0, 1) for t in (q, k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q1, k1, v1, is_causal=True, scale=scaling)
        parts.append(found.transpose(0, 1))
    return torch.cat(parts)


def test_packed_rows_are_joined_and_told_apart_by_their_lengths(monkeypatch):
    monkeypatch.setattr(attention, "varlen", reference)
    monkeypatch.setattr(attention, "_needs_masks", lambda *_: "")
    a, b, c, d = examples(5, 3, 4, 6)
    micro = batch([[a, b], [c, d]], packed=True)
    model = llama()
    cpu = torch.device("cpu")
    masked = model(**micro.inputs(cpu), use_cache=False).logits
    assert leave_out(model, packed=True) == ""
    assert attention.joins_rows(model)
    inputs = micro.inputs(cpu, flat=True)
    assert inputs["cu_seq_lens_q"].tolist()[:2] == [0, 5] and inputs["max_length_q"] == 6
    free = model(**inputs, use_cache=False).logits.view(masked.shape)
    real = torch.tensor([[True] * 8 + [False] * 2, [True] * 10])
    torch.testing.assert_close(free[real], masked[real], rtol=0, atol=1e-6)
    check_apart(Plain(), model, model)


def test_a_kernel_that_mixes_examples_is_refused(monkeypatch):
    def mixed(q, k, v, *, starts, longest, scaling):
        return reference(q, k, v, starts=torch.tensor([0, len(q)]).int(), longest=len(q), scaling=scaling)

    monkeypatch.setattr(attention, "varlen", mixed)
    monkeypatch.setattr(attention, "_needs_masks", lambda *_: "")
    model = llama()
    assert leave_out(model, packed=True) == ""
    with pytest.raises(ValueError, match="causal_sdpa attention lets packed examples see each other"):
        check_apart(Plain(), model, model)
