import json
import sys

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llm_lowrank.models.source import INDEX, SINGLE, Source
from tests.tiny import batch, llama

DOWN = "model.layers.1.mlp.down_proj.weight"  # (128, 192)
QUERY = "model.layers.0.self_attn.q_proj.weight"  # (128, 128)
STATE = "quant_state.bitsandbytes__nf4"


def save_quantized(folder, double=True, dtype=torch.float32, shard="10MB", **options):
    """A LLaMA with rows of whole blocks, quantized by transformers and bitsandbytes; lm_head and what is no linear stay
    plain.
    """
    plain = folder.with_name(f"{folder.name}-plain")
    llama(
        hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    ).save_pretrained(plain)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, **options
    )
    AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=dtype).save_pretrained(
        folder, max_shard_size=shard
    )
    return folder


CHECKPOINTS = {
    "nested": {},
    "single bf16": {"double": False, "dtype": torch.bfloat16},
    "nested fp16 in shards": {"dtype": torch.float16, "shard": "10KB"},
    "single, stored as bf16": {"double": False, "bnb_4bit_quant_storage": torch.bfloat16},
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    return save_quantized(tmp_path_factory.mktemp("quantized") / "model", **CHECKPOINTS[request.param])


def quantized_linears(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {
        f"{name}.weight": layer.weight for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"
    }


def test_decoded_weights_are_those_of_bitsandbytes(checkpoint):
    opened, linears = Source.open(checkpoint), quantized_linears(checkpoint)
    assert opened.prequantized and len(linears) == 14
    assert [name for name in opened.names() if opened.is_nf4(name)] == [
        name for name in opened.names() if name in linears
    ]
    for name, weight in linears.items():
        wanted = functional.dequantize_4bit(weight.data, weight.quant_state)
        assert opened.layout(name) == (wanted.dtype, list(wanted.shape))
        assert opened.tensor(name).dtype == wanted.dtype and torch.equal(opened.tensor(name), wanted), name


def test_rows_are_rows_of_the_tensor(checkpoint):
    opened = Source.open(checkpoint)
    for name in (DOWN, QUERY, "model.embed_tokens.weight", "model.norm.weight"):
        whole = opened.tensor(name)
        m = len(whole)
        for start, stop in ((0, m), (0, 1), (37, 41), (m - 1, m), (m // 2, m), (5, 5), (m, m)):
            rows = opened.rows(name, start, stop)
            assert rows.dtype == whole.dtype and torch.equal(rows, whole[start:stop]), (name, start, stop)
    with pytest.raises(AssertionError):
        opened.rows(DOWN, 0, 129)


NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


@pytest.mark.parametrize("name", [DOWN, QUERY])
def test_codes_and_scales_give_the_weight(checkpoint, name):
    """W[i, j] = map[code[i, j]] * scale[i, j // 64], written naively over what nf4_rows hands out."""
    opened = Source.open(checkpoint)
    dtype, (m, n) = opened.layout(name)
    for start, stop in ((0, m), (37, 41), (m - 1, m), (9, 9)):
        parts = opened.nf4_rows(name, start, stop)
        assert {key: (part.dtype, tuple(part.shape)) for key, part in parts.items()} == {
            "codes": (torch.uint8, (stop - start, n // 2)),
            "scales": (torch.uint8, (stop - start, 4 * n // 64)),
        }
        codes = torch.stack([parts["codes"] >> 4, parts["codes"] & 15], -1).flatten(1)  # (rows, n)
        scales = parts["scales"].view(torch.float32).repeat_interleave(64, 1)  # (rows, n)
        assert torch.equal((NF4[codes.int()] * scales).to(dtype), opened.tensor(name)[start:stop])


def test_scales_are_un_nested_as_bitsandbytes_does(tmp_path):
    folder = save_quantized(tmp_path / "q")
    state = quantized_linears(folder)[DOWN].quant_state
    wanted = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert len(wanted) > state.state2.blocksize, "should need more than one nested block"
    assert torch.equal(Source.open(folder).nf4_rows(DOWN, 0, 128)["scales"].view(torch.float32).flatten(), wanted)


def test_names_are_those_of_the_model(checkpoint):
    opened, plain = Source.open(checkpoint), Source.open(checkpoint.with_name("model-plain"))
    assert sorted(opened.names()) == sorted(plain.names()) == sorted(opened.files)
    assert sorted(name for _, names in opened.shards() for name in names) == sorted(plain.names())
    assert all(opened.layout(name)[1] == plain.layout(name)[1] for name in plain.names())
    assert not plain.prequantized and not plain.is_nf4(DOWN) and not opened.is_nf4("model.norm.weight")
    if (checkpoint / INDEX).exists():
        home = json.loads((checkpoint / INDEX).read_text())["weight_map"]
        assert any(home[name] != home[f"{name}.absmax"] for name in opened.names() if opened.is_nf4(name)), (
            "parts should lie apart"
        )
    with pytest.raises(ValueError, match="no tensor named"):
        opened.tensor(f"{DOWN}.absmax")
    with pytest.raises(AssertionError):
        opened.nf4_rows("model.norm.weight", 0, 1)


def test_decoded_model_is_the_one_that_transformers_dequantizes(tmp_path):
    folder = save_quantized(tmp_path / "q")
    opened, model = Source.open(folder), AutoModelForCausalLM.from_pretrained(tmp_path / "q-plain")
    before = logits(model)
    model.load_state_dict({name: opened.tensor(name) for name in opened.names()}, strict=False)  # lm_head is tied
    # not the quantized model itself: on the CPU it computes about as precisely as bfloat16, whatever its compute dtype
    # (measured 3e-3)
    quantized = AutoModelForCausalLM.from_pretrained(folder)
    quantized.dequantize()
    assert torch.equal(logits(model), logits(quantized))
    assert (before - logits(quantized)).abs().max() > 0.01, "quantizing should matter"


def logits(model):
    with torch.no_grad():
        return model(batch(0)).logits


# ---- refusals


def write_weight(folder, tensors=None, config=None, state=None):
    """One quantized weight (4, 128), with changes to its tensors (None removes one), to the config and to its state."""
    w = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    codes, found = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    stored = {"x.weight": codes} | {f"x.weight.{key}": value for key, value in found.as_dict(packed=True).items()}
    described = json.loads(bytes(stored[f"x.weight.{STATE}"].numpy())) | (state or {})
    stored[f"x.weight.{STATE}"] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
    for key, value in (tensors or {}).items():
        key = f"x.weight{key}"
        if value is None:
            del stored[key]
        elif isinstance(value, str):
            stored[f"x.weight{value}"] = stored.pop(key)
        else:
            stored[key] = value
    quantization = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        **(config or {}),
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file(stored, folder / SINGLE)
    return folder


def test_weight_written_by_hand_is_read(tmp_path):
    folder = write_weight(tmp_path / "q")
    stored = load_file(folder / SINGLE)
    parts = {key.removeprefix("x.weight."): value for key, value in stored.items() if key != "x.weight"}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    assert torch.equal(Source.open(folder).tensor("x.weight"), functional.dequantize_4bit(stored["x.weight"], state))


START_OVER = "start from the unquantized checkpoint"
AGAIN = "download the checkpoint again"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"config": {"quant_method": "gptq"}}, rf"\(gptq\).*{START_OVER}"),
        ({"config": {"quant_method": "awq", "load_in_4bit": None}}, rf"\(awq\).*{START_OVER}"),
        ({"config": {"load_in_4bit": False, "load_in_8bit": True}}, rf"\(bitsandbytes int8\).*{START_OVER}"),
        ({"config": {"bnb_4bit_quant_type": "fp4"}}, rf"\(fp4\).*{START_OVER}"),
        ({"tensors": {f".{STATE}": ".quant_state.bitsandbytes__fp4"}}, f"x.weight is stored in fp4.*{START_OVER}"),
        ({"state": {"blocksize": 128}}, f"x.weight is quantized in blocks of 128, only 64.*{START_OVER}"),
        ({"state": {"shape": [16, 32]}}, rf"shape \[16, 32\].*whole blocks of 64.*{START_OVER}"),
        ({"state": {"shape": [2, 2, 128]}}, rf"shape \[2, 2, 128\].*{START_OVER}"),
        ({"tensors": {".quant_map": torch.linspace(-1, 1, 16)}}, f"quant_map that is not that of nf4.*{START_OVER}"),
        ({"tensors": {".quant_map": torch.zeros(256)}}, f"quant_map that is not that of nf4.*{START_OVER}"),
        ({"tensors": {".absmax": None}}, rf"not described completely.*x.weight.absmax.*{AGAIN}"),
        ({"tensors": {".nested_quant_map": None}}, rf"not described completely.*nested_quant_map.*{AGAIN}"),
        ({"tensors": {"": None}}, rf"not described completely.*{AGAIN}"),
        ({"tensors": {f".{STATE}": torch.zeros(3, dtype=torch.uint8)}}, rf"not described completely.*{AGAIN}"),
        ({"state": {"dtype": "float5"}}, rf"not described completely.*float5.*{AGAIN}"),
        ({"state": {"shape": [8, 128]}}, rf"do not fit its shape \[8, 128\]; {AGAIN}"),
        ({"tensors": {".absmax": torch.zeros(7, dtype=torch.uint8)}}, rf"do not fit its shape.*{AGAIN}"),
        # scales in bytes, and nothing to decode them
        ({"tensors": {".nested_absmax": None}}, rf"do not fit its shape.*{AGAIN}"),
        ({"tensors": {".nested_absmax": torch.zeros(2)}}, rf"do not fit its shape.*{AGAIN}"),
        ({"tensors": {f".{STATE}": ".other"}}, "there are none; if all are plain, delete its quantization_config"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, changes, says):
    folder = write_weight(tmp_path / "q", **changes)
    with pytest.raises(ValueError, match=says):
        Source.open(folder)


def test_missing_bitsandbytes_says_what_to_install_and_plain_checkpoints_do_without(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it is an ImportError now
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        Source.open(write_weight(tmp_path / "q"))
    llama().save_pretrained(tmp_path / "plain")
    assert not Source.open(tmp_path / "plain").prequantized


def test_file_that_was_cut_short_is_noticed(tmp_path):
    folder = write_weight(tmp_path / "q")
    opened, raw = Source.open(folder), (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="ends too early"):
        opened.tensor("x.weight")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        Source.open(folder)
