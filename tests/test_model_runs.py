"""Whole runs over models that are not the usual LLaMA: what is printed, and what lies in output_dir at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from llm_lowrank.models.source import SINGLE, Source
from llm_lowrank.run.dry_run import describe
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests.test_architectures import MIXTURES, SIZES, VISION, plain_model, widened
from tests.test_data import CHATML, byte_tokenizer
from tests.test_limits import ROWS, argv

TOKENIZER = byte_tokenizer(CHATML)
TOKENS = torch.arange(24).view(2, 12)


def answers(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def in_8_bits(folder: Path) -> Path:
    """Write the linear weights of a checkpoint in fp8 with one scale for each block of 16 x 16."""
    tensors = load_file(folder / SINGLE)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        m, n = tensors[name].shape
        tensors[f"{name}_scale_inv"] = torch.full((-(-m // 16), -(-n // 16)), 0.01)
        tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("codec", ["dense", "nf4"])
def test_a_run_over_a_checkpoint_in_fp8(tmp_path, codec, capsys):
    """It is decoded while it is read, stored as the codec says, and merged into a plain checkpoint."""
    model = in_8_bits(saved(plain_model("llama", vocab_size=len(TOKENIZER)), tmp_path / "model"))
    train(parse(argv(tmp_path, model, ROWS, codec=codec, save_merged=True)))
    said = capsys.readouterr().out
    assert "adapted: 100.0% of the layer weights" in said
    assert ("quantized: 100.0% of the layer weights" in said) == (codec == "nf4")
    config = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged = load_file(tmp_path / "out" / "merged" / SINGLE)
    assert all(tensor.dtype == torch.float32 for tensor in merged.values()) and not any(
        "scale" in key for key in merged
    )
    assert answers(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")).isfinite().all()


def test_a_mixture_in_fp8_is_decoded_expert_by_expert(tmp_path):
    """As DeepSeek's checkpoints: each expert's matrices in fp8 on disk, one tensor in the model."""
    model = plain_model("qwen3_moe", vocab_size=len(TOKENIZER), **MIXTURES["qwen3_moe"])
    folder = in_8_bits(saved(model, tmp_path / "model"))
    stored = load_file(folder / SINGLE)
    opened = Source.open(folder).plain
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for expert, fused in enumerate(opened.rows(name, 1, 3), 1):
        halves = [stored[f"model.layers.1.mlp.experts.{expert}.{half}_proj.weight"].float() for half in ("gate", "up")]
        assert torch.equal(fused, torch.cat(halves) * torch.tensor(0.01))
    assert torch.equal(opened.tensor(name)[1:3], opened.rows(name, 1, 3))
    assert opened.layout(name) == (torch.float32, list(opened.tensor(name).shape))
    train(parse(argv(tmp_path, folder, ROWS, allow_partial=True, save_merged=True)))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert torch.allclose(merged.state_dict()[name], opened.tensor(name))


@pytest.mark.parametrize("engine", ["plain", "fsdp", "deepspeed"])
def test_a_run_over_the_attention_of_a_mixture(tmp_path, engine, capsys):
    folder = saved(plain_model("qwen3_moe", vocab_size=len(TOKENIZER), **MIXTURES["qwen3_moe"]), tmp_path / "model")
    refused = parse(argv(tmp_path, folder, ROWS, engine=engine))
    for ask in (train, lambda recipe: describe(recipe, 1)):
        with pytest.raises(ValueError, match="the experts of a mixture are fused"):
            ask(refused)
    train(parse(argv(tmp_path, folder, ROWS, engine=engine, allow_partial=True, save_merged=True)))
    said = capsys.readouterr().out
    assert "of the layer weights; outside of linear modules: mlp.experts.gate_up_proj (" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out" / "adapter")
    assert (answers(merged) - answers(adapted)).abs().max() < 1e-4


def test_a_run_over_the_text_of_a_model_for_images(tmp_path):
    torch.manual_seed(0)
    text = {**SIZES, "vocab_size": len(TOKENIZER)}
    config = transformers.CONFIG_MAPPING["gemma3"](text_config=text, vision_config=VISION)
    folder = saved(widened(AutoModelForImageTextToText.from_config(config)), tmp_path / "model")
    train(parse(argv(tmp_path, folder, ROWS, save_merged=True)))
    kind = AutoModelForImageTextToText
    merged = answers(kind.from_pretrained(tmp_path / "out" / "merged"))
    adapted = answers(PeftModel.from_pretrained(kind.from_pretrained(folder), tmp_path / "out" / "adapter"))
    assert (merged - adapted).abs().max() < 1e-4 < 1e-3 < (merged - answers(kind.from_pretrained(folder))).abs().max()


@pytest.mark.parametrize("codec", ["dense", "int8"])
def test_a_run_over_a_tied_output_layer(tmp_path, codec):
    model = plain_model("llama", vocab_size=len(TOKENIZER), tie_word_embeddings=True)
    folder = saved(model, tmp_path / "model")
    targets = {"method.target_modules": "[lm_head,q_proj]", "codec": codec}
    with pytest.raises(ValueError, match="lm_head, which shares its weight with the embedding"):
        train(parse(argv(tmp_path, folder, ROWS, save_merged=True, **targets)))
    train(parse(argv(tmp_path, folder, ROWS, **targets)))
    base = answers(AutoModelForCausalLM.from_pretrained(folder))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "out" / "adapter")
    assert (answers(adapted) - base).abs().max() > 1e-3
    assert not (tmp_path / "out" / "merged").exists()
