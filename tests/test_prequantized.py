import json
import sys

import pytest
import torch
from bitsandbytes import functional
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llm_lowrank.models.merging import merge
from llm_lowrank.models.prequantized import without_announcement
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


# ---- weights in 8 bits


M, N = 131, 72  # rows and columns of no whole number of blocks


def plain_dequantized(codes, scales, block):
    """W[i, j] = code[i, j] * scale[i // a, j // b], element by element."""
    w = torch.empty(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            w[i, j] = codes[i, j].float() * scales[i // block[0], j // block[1]].float()
    return w


def write_scaled(folder, quantization, tensors, dtype="float32", key="quantization_config"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": dtype, key: quantization}))
    save_file({name: value.clone() for name, value in tensors.items()}, folder / SINGLE)
    return folder


def compressed(strategy, kind="float", stored="float-quantized", **more):
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        "ignore": ["lm_head"],
    }


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
SCALED = {  # config, name of the scales, shape of the scales, block, dtype of the codes
    "fp8 by blocks": (
        {**FP8, "weight_block_size": [32, 16]},
        "weight_scale_inv",
        (5, 5),
        (32, 16),
        torch.float8_e4m3fn,
    ),
    "fp8 in one block": (
        {**FP8, "weight_block_size": [128, 128]},
        "weight_scale_inv",
        (2, 1),
        (128, 128),
        torch.float8_e4m3fn,
    ),
    "fp8, one scale": (FP8, "weight_scale_inv", (), (M, N), torch.float8_e4m3fn),
    "compressed, one scale": (compressed("tensor"), "weight_scale", (1,), (M, N), torch.float8_e4m3fn),
    "compressed by rows": (compressed("channel"), "weight_scale", (M, 1), (1, N), torch.float8_e4m3fn),
    "compressed by blocks": (
        compressed("block", block_structure=[64, 64]),
        "weight_scale",
        (3, 2),
        (64, 64),
        torch.float8_e4m3fn,
    ),
    "compressed int8": (compressed("channel", "int", "int-quantized"), "weight_scale", (M, 1), (1, N), torch.int8),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SCALED)
def test_weights_in_8_bits_are_decoded(tmp_path, kind, dtype):
    config, name, shape, block, stored_as = SCALED[kind]
    torch.manual_seed(0)
    codes = (torch.randn(M, N) * 30).to(stored_as)
    scales = torch.rand(shape) + 0.01
    tensors = {"a.weight": codes, f"a.{name}": scales, "a.input_scale": torch.ones(1), "b.weight": torch.randn(3, 4)}
    opened = Source.open(write_scaled(tmp_path / "q", config, tensors, dtype))
    wanted = plain_dequantized(codes, scales.reshape(-(-M // block[0]), -(-N // block[1])), block).to(
        getattr(torch, dtype)
    )
    assert opened.prequantized and opened.names() == ["a.weight", "b.weight"] and not opened.is_nf4("a.weight")
    assert opened.layout("a.weight") == (wanted.dtype, [M, N])
    assert torch.equal(opened.tensor("a.weight"), wanted) and opened.tensor("a.weight").dtype == wanted.dtype
    for start, stop in ((0, M), (0, 1), (31, 33), (60, 130), (M - 1, M), (7, 7)):
        assert torch.equal(opened.rows("a.weight", start, stop), wanted[start:stop])
    assert torch.equal(opened.tensor("b.weight"), tensors["b.weight"])


def test_the_fingerprint_of_weights_in_8_bits_depends_on_the_codes(tmp_path):
    prints = set()
    for number in (1.0, 2.0):
        tensors = {"a.weight": torch.full((4, 4), number).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(())}
        prints.add(Source.open(write_scaled(tmp_path / str(number), FP8, tensors)).fingerprint)
    assert len(prints) == 2


CODES = torch.ones(8, 4).to(torch.float8_e4m3fn)
BLOCKS = {**FP8, "weight_block_size": [4, 4]}


@pytest.mark.parametrize(
    "config, tensors, says",
    [
        (
            BLOCKS,
            {"a.weight": CODES, "a.weight_scale_inv": torch.ones(3, 1)},
            rf"scales float32 \[3, 1\], not \[2, 1\].*{AGAIN}",
        ),
        (BLOCKS, {"a.weight_scale_inv": torch.ones(2, 1)}, f"a.weight is missing.*{AGAIN}"),
        (
            BLOCKS,
            {"a.weight": torch.ones(8, 4), "a.weight_scale_inv": torch.ones(2, 1)},
            "stored as float32.*not as a matrix of float8_e4m3fn",
        ),
        (BLOCKS, {"a.weight": torch.ones(8, 4)}, "no tensor named weight_scale_inv; if all weights are plain"),
        (
            BLOCKS,
            {"a.weight": CODES, "a.weight_scale_inv": torch.ones(2, 1), "b.weight": CODES.clone()},
            "b.weight is stored as float8_e4m3fn",
        ),
        ({**FP8, "weight_block_size": [4]}, {"a.weight": CODES}, r"weight_block_size \[4\] is not read"),
        (
            compressed("group", group_size=4),
            {"a.weight": CODES},
            rf"float of 8 bits, symmetric, with scales by group.*{START_OVER}",
        ),
        (
            compressed("channel", "int", "int-quantized", symmetric=False),
            {"a.weight": CODES},
            "int of 8 bits, asymmetric",
        ),
        (compressed("channel", num_bits=4), {"a.weight": CODES}, "float of 4 bits"),
        (compressed("channel", stored="pack-quantized"), {"a.weight": CODES}, "of format pack-quantized"),
        ({**compressed("channel"), "sparsity_config": {"format": "dense"}}, {"a.weight": CODES}, "sparse"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, {"a.weight": CODES}, "no config_groups"),
        ({"quant_method": "mxfp4"}, {"a.weight": CODES}, rf"\(mxfp4\).*{START_OVER}"),
    ],
)
def test_weights_in_8_bits_that_cannot_be_read_are_refused(tmp_path, config, tensors, says):
    with pytest.raises(ValueError, match=says):
        Source.open(write_scaled(tmp_path / "q", config, tensors))


# ---- weights that are no weights, and a config that does not say so in words that are read


W = torch.randn(8, 4)
UNANNOUNCED = {
    "int8 with scales": (
        {"a.weight": W.to(torch.int8), "a.weight_scale": torch.ones(8, 1)},
        "a.weight is stored as int8",
    ),
    "fp8 alone": ({"a.weight": W.to(torch.float8_e4m3fn)}, "a.weight is stored as float8_e4m3fn"),
    "uint8": ({"a.weight": W.to(torch.uint8)}, "a.weight is stored as uint8"),
    "integers stored as floats": (
        {"a.weight": W.round(), "a.weight_scale": torch.ones(8, 1)},
        "a.weight_scale looks like",
    ),
    "block scales": ({"a.weight": W, "a.weight_scale_inv": torch.ones(1, 1)}, "a.weight_scale_inv looks like"),
    "GPTQ": ({"a.qweight": W.to(torch.int32), "a.qzeros": W.to(torch.int32), "a.scales": W}, "a.qweight looks like"),
    "AWQ": ({"a.weight": W, "a.scales": W}, "a.scales looks like"),
    "HQQ": ({"a.W_q": W.to(torch.uint8), "a.scale": W, "a.zero": W}, "a.W_q looks like"),
    "bitsandbytes int8": ({"a.weight": W, "a.SCB": torch.ones(8)}, "a.SCB looks like"),
    "bitsandbytes nf4": ({"a.weight": W, "a.weight.absmax": torch.ones(1)}, "a.weight.absmax looks like"),
    "packed": ({"a.weight_packed": W.to(torch.int32)}, "a.weight_packed looks like"),
    "zero points": ({"a.weight": W, "a.zero_point": torch.ones(1)}, "a.zero_point looks like"),
    "quanto": ({"a.weight._data": W.to(torch.int8), "a.weight": W}, "a.weight._data looks like"),
}


@pytest.mark.parametrize("kind", UNANNOUNCED)
def test_codes_without_an_announcement_are_refused_by_name(tmp_path, kind):
    tensors, says = UNANNOUNCED[kind]
    with pytest.raises(ValueError, match=f"{says}.*{START_OVER}"):
        Source.open(write_scaled(tmp_path / "q", None, tensors))


def test_what_only_resembles_a_scale_is_a_tensor_like_others(tmp_path):
    tensors = {
        "norm.weight": torch.ones(4),
        "norm.scale": torch.ones(4),
        "attn.logit_scale": torch.ones(()),
        "layer_scale": torch.ones(4),
        "attn.bias": torch.ones(1, 1, 3, 3, dtype=torch.uint8),  # GPT-2's causal mask
        "position_ids": torch.arange(4),
        "k_proj.weight": W,
        "attn.k_scale": torch.ones(1),
        "k_proj.output_scale": torch.ones(1),
    }
    assert sorted(Source.open(write_scaled(tmp_path / "q", None, tensors)).names()) == sorted(tensors)


@pytest.mark.parametrize(
    "config, says",
    [
        ({"compression_config": {"quant_method": "nonsense"}}, r"\(nonsense\)"),
        ({"compression_config": {"format": "pack-quantized"}}, r"\(unknown method\)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"\(awq\)"),
        ({"quantization": "int4"}, "quantization: 'int4', which is not read"),
        ({"quant_method": "gptq"}, "quant_method: 'gptq', which is not read"),
    ],
)
def test_every_word_for_quantization_is_heard(tmp_path, config, says):
    folder = write_scaled(tmp_path / "q", None, {"a.weight": W})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{says}.*{START_OVER}"):
        Source.open(folder)


def test_a_file_of_another_tool_announces_too(tmp_path):
    folder = write_scaled(tmp_path / "q", None, {"a.weight": W})
    (folder / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"has a hf_quant_config.json.*{START_OVER}"):
        Source.open(folder)


def test_compression_config_is_read_as_quantization_config(tmp_path):
    tensors = {"a.weight": CODES, "a.weight_scale": torch.full((8, 1), 2.0)}
    opened = Source.open(write_scaled(tmp_path / "q", compressed("channel"), tensors, key="compression_config"))
    assert torch.equal(opened.tensor("a.weight"), torch.full((8, 4), 2.0))


def test_a_config_without_the_announcement_keeps_all_else():
    config = {"dtype": "bfloat16", "quantization_config": {"a": 1}, "text_config": {"quant_method": "x", "n": 2}}
    assert without_announcement(config) == {"dtype": "bfloat16", "text_config": {"n": 2}}


def test_a_merge_over_weights_in_8_bits_is_a_plain_checkpoint(tmp_path):
    """The decoded weights + the adapter, in the config's dtype; plain transformers reads the folder."""
    model = llama()
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("_proj.weight"):
            m, n = value.shape
            state[name] = (value * 100).to(torch.float8_e4m3fn)
            state[f"{name}_scale_inv"] = torch.rand(-(-m // 16), -(-n // 16)) / 100
            value.copy_(plain_dequantized(state[name], state[f"{name}_scale_inv"], (16, 16)))
        elif name != "lm_head.weight":
            state[name] = value
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    base = write_scaled(tmp_path / "base", {**FP8, "weight_block_size": [16, 16]}, state)
    written = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**model.config.to_dict(), **written}))
    merge(Source.open(base), tmp_path / "adapter", tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(merged(batch(1)).logits, adapted(batch(1)).logits, atol=1e-4)
