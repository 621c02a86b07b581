"""The count of floating-point operations is that of the products that torch computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.codecs import Codec, Dense, Nf4
from llm_lowrank.data import IGNORE, Batches, Example
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.losia import LoSiA, Subnet
from llm_lowrank.methods.mora import MoRA, SquareAdapter
from llm_lowrank.methods.osora import OSoRA, SpectrumAdapter
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.methods.reslora import ResLoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.methods.vera import VeRA
from llm_lowrank.models.loss import sum_loss
from llm_lowrank.run.flops import Shape, full_shape, visible, work_of
from llm_lowrank.run.hardware import GPUS, find, peak, peak_memory
from tests import tiny
from tests.test_architectures import MIXTURES, plain_model

aten = torch.ops.aten
ROWS, LENGTH = 3, 11


class Products(TorchDispatchMode):
    """Counts two operations for each multiplication and addition of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.bmm.default):
            a, b = args[:2]
        elif func in (aten.addmm.default, aten.addmm_.default, aten.baddbmm.default):
            a, b = args[1:3]
        else:
            return func(*args, **(kwargs or {}))
        self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


METHODS: dict[str, tuple[Method, Codec]] = {
    "lora": (LoRA(rank=4), Dense(torch.float32)),
    "lora-dropout": (LoRA(rank=4, dropout=0.1), Dense(torch.float32)),
    "lora-nf4": (LoRA(rank=4), Nf4(torch.float32)),
    "srlora-bank": (SRLoRA(rank=4, target_rank=8, into="bank", svd_cache=""), Dense(torch.float32)),
    "rasa": (RaSA(rank=4), Dense(torch.float32)),
    "reslora": (ResLoRA(rank=4), Dense(torch.float32)),
    "vera": (VeRA(rank=4), Dense(torch.float32)),
    "osora": (OSoRA(rank=4, svd_cache=""), Dense(torch.float32)),
    "mora": (MoRA(rank=4), Dense(torch.float32)),
    "losia": (LoSiA(output_factor=0), Dense(torch.float32)),
    "losia-output": (LoSiA(output_factor=0.5), Dense(torch.float32)),
}


def spared(adapters: list[Adapter]) -> float:
    """What is counted for a token and not computed, as nobody needs the gradient of the embedded tokens: dx of the
    first module's product, and dx of W, bank and product of its siblings.
    """
    first = adapters[0].name.rpartition(".")[0]
    found = 0.0
    for a in adapters:
        if a.name not in (f"{first}.q_proj", f"{first}.k_proj", f"{first}.v_proj"):
            continue
        trained = [p for owner in (a, *a.borrows) for p in owner.parameters() if p.requires_grad and p.ndim > 1]
        # dx takes all of LoSiA's block and of MoRA's square, and of pairs the half that is next to the input
        found += sum(
            2 * p.numel() for p in trained if isinstance(a, Subnet | SquareAdapter) or p.shape[1] == a.shape[1]
        )
        if a is not adapters[0]:
            bank = [p for name, p in a.named_parameters() if name.startswith("bank_")]
            bank += [a.A] if isinstance(a, SpectrumAdapter) else []
            found += 2 * (a.shape[0] * a.shape[1] + a.lent()[0]) + sum(2 * p.numel() for p in bank)
    return found


def measured(method: Method, codec: Codec, recomputed: bool) -> tuple[float, float, list[Adapter]]:
    """The products of a micro-batch: counted by torch, and by `work_of` for attention that computes whole squares."""
    model = tiny.llama(tie_word_embeddings=False, attn_implementation="eager")
    adapters = attach(model, method, codec)
    work = work_of(model, recomputed)
    for adapter in adapters:
        adapter.started()
    if recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) % tiny.VOCABULARY
    labels = torch.where(torch.arange(LENGTH) < 5, IGNORE, ids)
    with Products() as products:
        sum_loss(model, {"input_ids": ids}, labels, model.get_output_embeddings()).backward()
    lengths = np.full(ROWS, LENGTH)
    expected = work.hardware(Shape(lengths, lengths, int((labels[:, 1:] != IGNORE).sum())))
    layers, width = model.config.num_hidden_layers, 2 * model.config.num_attention_heads * model.config.head_dim
    expected += (2 * (1 + recomputed) + 4) * layers * width * (ROWS * LENGTH**2 - visible(lengths))
    return products.flops, expected, adapters


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("name", METHODS)
def test_the_count_is_that_of_torch(name, recomputed):
    found, expected, adapters = measured(*METHODS[name], recomputed)
    assert found == expected - (0 if recomputed else spared(adapters) * ROWS * LENGTH)


def test_layers_before_the_first_trained_one_have_no_backward():
    names = [f"model.layers.1.mlp.{name}_proj" for name in ("up", "gate", "down")]
    found, expected, _ = measured(LoRA(rank=4, target_modules=names), Dense(torch.float32), False)
    whole, _, _ = measured(LoRA(rank=4), Dense(torch.float32), False)
    assert found <= expected <= 1.2 * found < whole


def test_a_frozen_element_takes_four_operations_a_token_and_a_trained_one_six():
    model = tiny.llama(tie_word_embeddings=False)
    adapters = attach(model, LoRA(rank=4), Dense(torch.float32))
    work = work_of(model, recomputed=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(a.shape[0] * a.shape[1] for a in adapters)
    first = adapters[0].shape[0] * adapters[0].shape[1]
    output = tiny.VOCABULARY * 42
    attention = 2 * (2 + 4) * 2 * 3 * 14 * ROWS * LENGTH * (LENGTH + 1) / 2
    tokens, logits = ROWS * LENGTH, ROWS * (LENGTH - 1)
    needed = (4 * frozen - 2 * first + 6 * trained) * tokens + 4 * output * logits + attention
    assert work.model(full_shape(ROWS, LENGTH)) == needed
    # computed again: a forward of the layers, not of the output layer; and nothing is spared at the embedded tokens
    again = (2 * frozen + 2 * trained + 2 * first) * tokens + attention / 3
    assert work.hardware(full_shape(ROWS, LENGTH)) == needed + again
    assert work.hardware(full_shape(ROWS, LENGTH), whole_logits=True) == needed + again + 4 * output * ROWS


def test_padding_is_computed_and_not_needed():
    examples = [Example(list(range(n)), [IGNORE] * (n - 2) + [1, 2]) for n in (3, 5, 9)]
    (micro,) = Batches(examples, 4, pad_id=0).step(0)
    shape = Shape.of(micro)  # the fourth row is empty
    assert sorted(shape.lengths) == [3, 5, 9] and list(shape.computed) == [9] * 4 and shape.trained == 6
    (micro,) = Batches(examples, 2, pad_id=0, pack=10).step(0)
    shape = Shape.of(micro)
    assert sorted(shape.lengths) == [3, 5, 9] and sorted(shape.computed) == [1, 3, 5, 9] and shape.trained == 6


def test_a_window_bounds_the_pairs():
    assert visible(np.array([4])) == 10 and visible(np.array([4, 2]), window=3) == (1 + 2 + 3 + 3) + 3


@pytest.mark.parametrize("kind", ["bloom", "gemma2", "gpt2", "gpt_bigcode", "llama", "opt", "phi3"])
def test_the_count_of_a_forward_is_that_of_torch_in_every_architecture(kind):
    model = plain_model(kind, attn_implementation="eager").eval()
    with torch.no_grad(), Products() as products:
        model(input_ids=torch.arange(ROWS * LENGTH).view(ROWS, LENGTH), use_cache=False)
    work = work_of(model, recomputed=False)
    squares = sum(2 * layer.width for layer in work.attention) * ROWS * LENGTH**2  # of eager attention
    assert products.flops == work.layers.forward(ROWS * LENGTH) + work.output.forward(ROWS * LENGTH) + squares


def test_a_token_counts_the_experts_that_it_is_sent_to():
    settings = {**MIXTURES["qwen3_moe"], "num_experts": 4}
    one, two = (
        work_of(plain_model("qwen3_moe", **{**settings, "num_experts_per_tok": chosen}), False) for chosen in (1, 2)
    )
    model = plain_model("qwen3_moe", **settings)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert two.layers.frozen - one.layers.frozen == experts / 4


def test_a_tied_output_layer_computes_too():
    assert work_of(tiny.llama(tie_word_embeddings=True), False).output.frozen == tiny.VOCABULARY * 42


def test_layers_with_a_window_are_counted_by_it():
    model = plain_model("gemma2", sliding_window=4)
    assert sorted(layer.window for layer in work_of(model, False).attention) == [0, 4]


def test_a_gpu_is_found_by_its_whole_name():
    assert find("NVIDIA H100 80GB HBM3") is GPUS["h100"] and find("NVIDIA H100 PCIe") is GPUS["h100-pcie"]
    assert find("NVIDIA A10") is GPUS["a10"]
    for unknown in ("NVIDIA A10G", "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "cpu"):
        assert find(unknown) is None
    names = [name for gpu in GPUS.values() for name in gpu.names]
    assert len(names) == len(set(names))
    for gpu in GPUS.values():
        assert 1.8 < gpu.bfloat16 / gpu.float32 < 32 and gpu.peak("bfloat16") == gpu.bfloat16


def test_a_cpu_has_memory_and_no_peak():
    cpu = torch.device("cpu")
    assert peak(cpu, "float32") is None
    before, _ = peak_memory(cpu)
    kept = torch.ones(2**25)  # 128 MB
    after, _ = peak_memory(cpu)
    assert before > 2**26 and after >= kept.nbytes
