"""What stands in the folders of models and adapters: a file that cannot be read is named, with what to do; weights that
the model would not use, or that are no numbers, are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from launch import merge, train
from tests.test_stop import FAMILIES, cache, save_model, settings, tokenizer_of  # noqa: F401 - cache: of every test here

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n"
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "model", tokenizer_of(FAMILIES["ChatML with marks"]))


@pytest.fixture
def model(base, tmp_path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def refused(capsys, model: Path, place: Path, **changes: object) -> str:
    """What a run says that does not begin."""
    assert train.main(settings(model, place, max_steps=1, save_merged=False, **changes)) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and not (place / "out").exists()
    return said


def changed(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


BROKEN: dict[str, tuple[str, str | bytes | dict, str]] = {
    "cut config": ("config.json", "{", "config.json is damaged or no JSON"),
    "config of a list": ("config.json", "[]", "config.json holds list and no object"),
    "config that fits no model": ("config.json", {"num_attention_heads": 5}, "cannot read the config of"),
    "config of a later version": (
        "config.json",
        {"rope_parameters": {"rope_type": "later", "rope_theta": 1e4}},
        "cannot be made from config.json",
    ),
    "cut generation config": ("generation_config.json", "{", "generation_config.json is damaged or no JSON"),
    "generation config of a list": ("generation_config.json", "[]", "generation_config.json holds list and no object"),
    "end that is a text": ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>', and it is the"),
    "cut tokenizer config": ("tokenizer_config.json", "{", "tokenizer_config.json is damaged or no JSON"),
    "cut tokenizer": ("tokenizer.json", '{"version": "1.0"', "tokenizer.json is no JSON object; download or write it"),
    "pointer": ("tokenizer.json", LFS, "a pointer of Git LFS: git lfs pull"),
    "template in UTF-16": (
        "chat_template.jinja",
        "{{ messages }}".encode("utf-16"),
        "chat_template.jinja is not UTF-8",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_small_file_that_cannot_be_read_is_named(model, tmp_path, capsys, name):
    file, content, message = BROKEN[name]
    if isinstance(content, dict):
        changed(model / file, **content)
    else:
        (model / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(capsys, model, tmp_path)
    assert message in said and str(model) in said


def test_a_model_without_a_tokenizer_is_told_what_it_needs(model, tmp_path, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    assert "has no tokenizer that can be read; it needs tokenizer.json" in refused(capsys, model, tmp_path)


def test_the_output_dir_of_a_run_is_not_its_model(base, tmp_path, capsys):
    (tmp_path / "earlier" / "merged").mkdir(parents=True)
    said = refused(capsys, tmp_path / "earlier", tmp_path)
    assert f"it is the output_dir of a run, so give {tmp_path / 'earlier' / 'merged'}" in said
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf cannot be read as a GGUF model" in refused(capsys, tmp_path / "x.gguf", tmp_path)


WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "NaN": (lambda s: {**s, WEIGHT: s[WEIGHT].index_fill(0, torch.tensor([0]), float("nan"))}, "NaN or infinity"),
    "infinity": (lambda s: {**s, WEIGHT: s[WEIGHT].index_fill(0, torch.tensor([0]), float("inf"))}, "NaN or infinity"),
    "bias": (
        lambda s: {**s, WEIGHT.replace("weight", "bias"): torch.ones(96)},
        "up_proj.bias, for which LlamaForCausalLM has no place: without it, model.layers.0.mlp.up_proj would",
    ),
    "adapter": (
        lambda s: {**s, WEIGHT.replace("weight", "lora_A.default.weight"): torch.ones(4, 64)},
        "lora_A.default.weight, for which LlamaForCausalLM has no place: .* merge the adapter first",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_would_make_another_model_are_refused(model, tmp_path, capsys, name):
    change, message = WEIGHTS[name]
    file = model / "model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file, {"format": "pt"})
    said = refused(capsys, model, tmp_path)
    assert all(part in said for part in message.split(".* "))


def test_types_that_differ_and_tensors_that_transformers_leaves_out_too(model, tmp_path, capsys):
    """Weights in bfloat16 with norms in float16, and the rotary frequencies that older versions stored."""
    file = model / "model.safetensors"
    weights = {key: value.half() if "norm" in key else value.bfloat16() for key, value in load_file(file).items()}
    save_file({**weights, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, file, {"format": "pt"})
    assert train.main(settings(model, tmp_path, max_steps=1)) == 0
    assert "not used of the checkpoint: 1 tensors, model.layers.0.self_attn.rotary" in capsys.readouterr().out
    stored = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert {key: value.dtype for key, value in weights.items()}.items() <= {
        k: v.dtype for k, v in stored.items()
    }.items()


# An adapter's folder, merged.


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_LOWRANK_CACHE", str(place / "cache"))
        assert train.main(settings(base, place, max_steps=1, save_merged=False)) == 0
    return place / "out" / "adapter"


def merged(capsys, adapter: Path, base: Path, output: Path) -> tuple[int, str]:
    arguments = ["--checkpoint", adapter, "--output", output, "--model_name_or_path", base]
    code = merge.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert code == 0 or not output.exists()
    return code, said.out + said.err


def add_nan(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(weights)
    save_file({**weights, name: weights[name] * float("nan")}, file, {"format": "pt"})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda at: (at / "adapter_config.json").write_text("{"), "adapter_config.json is damaged or no JSON"),
        (lambda at: (at / "adapter_config.json").write_text("[]"), "adapter_config.json holds list and no object"),
        (lambda at: changed(at / "adapter_config.json", r=None), "adapter_config.json: r is None, not a number"),
        (lambda at: (at / "generation_config.json").write_text("{"), "generation_config.json is damaged or no JSON"),
        (add_nan, "the adapter or the base holds NaN or infinity"),
    ],
)
def test_an_adapter_that_cannot_be_read_is_named(trained, base, tmp_path, capsys, change, message):
    adapter = Path(shutil.copytree(trained, tmp_path / "adapter"))
    change(adapter)
    code, said = merged(capsys, adapter, base, tmp_path / "merged")
    assert code == 2 and message in said and "Traceback" not in said


def test_tokens_that_an_adapter_was_trained_with_are_in_the_merged_model(trained, base, tmp_path, capsys):
    """A token beyond the embedding is left out (most are for padding), another number for a token is refused."""
    wide = Path(shutil.copytree(base, tmp_path / "wide"))
    rows = json.loads((wide / "config.json").read_text())["vocab_size"]
    weights = load_file(wide / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], weights[name][:1]])  # a row that no token has
    save_file(weights, wide / "model.safetensors", {"format": "pt"})
    changed(wide / "config.json", vocab_size=rows + 1)
    adapter = Path(shutil.copytree(trained, tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    tokenizer.save_pretrained(adapter)
    code, said = merged(capsys, adapter, wide, tmp_path / "merged")
    assert code == 0 and "the tokenizer is the adapter's, with 1 token more than the base's" in said
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("<call>")["input_ids"] == [rows]

    code, said = merged(capsys, adapter, base, tmp_path / "narrow")
    assert code == 0 and "tokens more" not in said
    assert len(AutoTokenizer.from_pretrained(tmp_path / "narrow")) == rows

    content = json.loads((adapter / "tokenizer.json").read_text())
    content["added_tokens"][-2]["id"], content["added_tokens"][-1]["id"] = rows, rows - 1
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    code, said = merged(capsys, adapter, wide, tmp_path / "other")
    assert code == 2 and "was trained with another tokenizer than that of" in said
