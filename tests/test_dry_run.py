"""A dry run tells the truth: its counts are those of the model that is built, its bytes those that the engines hold."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Codec, Dense, Nf4
from llm_lowrank.data import Data
from llm_lowrank.engines import ENGINES
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.numerics.optimizers import Optimization
from llm_lowrank.run import dry_run, memory
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.forecast import ranks as ranks_of_run
from llm_lowrank.run.recipe import Recipe, parse
from tests import ranks, tiny

METHOD = SRLoRA(rank=4, target_rank=8, svd_cache="")
SHAPE = dict(
    hidden_size=36, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10
)


@pytest.fixture
def recipe(tmp_path):
    """A run on a folder that holds a config.json and nothing else."""
    tiny.config(**SHAPE).save_pretrained(tmp_path / "model")
    return Recipe(
        model_name_or_path=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), max_steps=60, method=METHOD
    )


def row(text: str, name: str) -> list[str]:
    """The cells of a row of the parameters."""
    table = text.partition("\nparameters ")[2].partition("\nmemory ")[0]
    (line,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
    return line.removeprefix(name).replace(" x ", "x").split()


def numbers(cells: list[str]) -> list[int]:
    return [0 if cell in ("-", "shared") else int(cell.replace(",", "")) for cell in cells]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # without a bank and with one
def test_counts_are_those_of_the_built_model(recipe, dtype):
    text = dry_run.describe(replace(recipe, dtype=dtype), world=1)

    assert "attention on this machine: " in text and "attn_implementation: auto" in text

    model = tiny.llama(**SHAPE)
    attach(model, METHOD, Dense(getattr(torch, dtype)))
    named = dict(model.named_parameters())
    trained = sum(p.numel() for p in named.values() if p.requires_grad)
    bank = sum(p.numel() for name, p in named.items() if "bank_" in name)
    frozen = sum(p.numel() for p in named.values()) - trained - bank
    assert (bank > 0) == (dtype == "bfloat16")
    assert numbers(row(text, "total")[:3]) == [frozen, bank, trained]
    assert f"trainable {trained:,} of {frozen + bank + trained:,}" in text

    # k_proj: 2 layers, 2 heads of 10 rows, 36 columns; each pair 20 + 36 elements
    assert row(text, "k_proj")[:2] == ["2", "20x36"]
    assert numbers(row(text, "k_proj")[2:]) == [2 * 20 * 36, 2 * 4 * 56 * (bank > 0), 2 * 4 * 56]
    assert row(text, "embed") == ["1", "67x36", "2,412", "-", "-"]
    assert row(text, "lm_head") == ["1", "67x36", "shared", "-", "-"]  # tied to the embedding
    assert row(text, "norm") == ["5", "36", "180", "-", "-"]
    assert max(map(len, text.splitlines())) <= 120


def test_an_untied_output_layer_is_counted_and_not_adapted(recipe):
    tiny.config(**SHAPE, tie_word_embeddings=False).save_pretrained(recipe.model_name_or_path)
    assert row(dry_run.describe(recipe, world=1), "lm_head") == ["1", "67x36", "2,412", "-", "-"]


def test_schedule_from_max_steps(recipe):
    text = dry_run.describe(recipe, world=2)
    assert "60 optimizer steps, 2 exchanges: after step 20, 40" in text
    assert "global batch 16 = 8 per rank x 1 accumulated x 2 rank(s)" in text
    assert "60 optimizer steps, 0 exchanges: none" in dry_run.describe(replace(recipe, method=LoRA(rank=4)), world=2)


def test_schedule_from_the_data(recipe, tmp_path):
    vocabulary = {
        text: number
        for number, text in enumerate(["<s>", "</s>", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "+", "=", "?"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        recipe.model_name_or_path
    )
    rows = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = replace(
        recipe,
        max_steps=-1,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        data=Data(dataset=str(tmp_path / "sums.jsonl"), held_out=10, max_length=64),
    )
    text = dry_run.describe(recipe, world=2)  # 50 examples in batches of 4: 13 steps an epoch
    assert "39 optimizer steps, 2 exchanges: after step 13, 26" in text


def test_an_unknown_length_is_said(recipe):
    text = dry_run.describe(replace(recipe, max_steps=-1, data=Data(dataset="/nowhere/rows.jsonl")), world=1)
    assert "steps and exchanges are not known without the data (or max_steps)" in text


def test_an_output_folder_in_use_is_said(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    assert "not empty" not in dry_run.describe(recipe, world=1)
    (tmp_path / "out" / "recipe.yaml").touch()
    assert "not empty" in dry_run.describe(recipe, world=1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": LoRA(target_modules=["q_porj"])}, "q_porj.*matches no linear module; did you mean 'q_proj'"),
        ({"method": LoRA(rank=21)}, "k_proj: rank 21 is more than min.m, n. = 20"),
        ({"method": SRLoRA(rank=4, target_rank=80), "max_steps": 400}, "target_rank 80 is more than"),
        ({"method": SRLoRA(rank=2, target_rank=18), "max_steps": 3}, "do not fit into 3 steps"),
        ({"model_name_or_path": "/nowhere"}, "/nowhere does not exist; give a checkpoint folder"),
    ],
)
def test_what_the_run_would_refuse_is_refused(recipe, change, message):
    with pytest.raises(ValueError, match=message):
        dry_run.describe(replace(recipe, **change), world=1)


def test_a_deepspeed_config_that_cannot_be_right_is_refused(recipe, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}')
    with pytest.raises(ValueError, match="zero_quantized_weights"):
        dry_run.describe(replace(recipe, deepspeed=str(tmp_path / "ds.json")), world=1)


def test_every_row_has_a_formula_under_every_engine(recipe):
    table = dry_run.describe(recipe, world=2).partition("memory per rank")[2].splitlines()
    rows = [line[:36].strip() for line in table[1:11]]
    start = table.index(next(line for line in table if line.startswith("formulas")))
    assert table[start].split()[1:6] == ["plain", "ZeRO-1", "ZeRO-2", "*ZeRO-3", "FSDP2"]
    assert [line[:36].strip() for line in table[start + 1 : start + 11]] == rows
    frozen, gradients = table[start + 1], table[start + 5]
    assert frozen.split()[2:11] == ["W", "W", "W", "W", "/", "N", "W", "/", "N"]
    assert gradients.split()[1:13] == ["2", "T", "T", *"T/NT/NT/N"]


def test_the_recipes_engine_is_starred(recipe):
    def heads(**changes):
        return (
            dry_run.describe(replace(recipe, **changes), world=1)
            .split("memory per rank")[1]
            .splitlines()[0]
            .partition("rank(s)")[2]
            .split()[:5]
        )

    assert heads() == ["plain", "ZeRO-1", "ZeRO-2", "*ZeRO-3", "FSDP2"]
    assert heads(deepspeed="ds_configs/zero2.json") == ["plain", "ZeRO-1", "*ZeRO-2", "ZeRO-3", "FSDP2"]
    assert heads(engine="plain") == ["*plain", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2"]
    assert heads(engine="fsdp") == ["plain", "ZeRO-1", "ZeRO-2", "ZeRO-3", "*FSDP2"]


# --- time -------------------------------------------------------------------------------------------------------------

LARGE = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, head_dim=128)


def predicted(text: str) -> dict[str, dict[str, float]]:
    """label -> heading -> number, of the table of a step."""
    head, *rows = text.partition("predicted step on ")[2].partition("A prediction")[0].strip().splitlines()
    names = [name.lstrip("*") for name in head.partition("rank(s)")[2].split()]
    table = {}
    for line in rows:
        numbers = line[36:].replace(",", "").split()
        table[line[:36].strip()] = dict(zip(names, map(float, numbers), strict=True))
    return table


@pytest.fixture
def large(recipe):
    """Four layers of LLaMA-3.1-8B's shapes."""
    tiny.config(**LARGE, num_hidden_layers=4, vocab_size=32000).save_pretrained(recipe.model_name_or_path)
    data = replace(recipe.data, max_length=1024)
    return replace(recipe, method=LoRA(rank=16), dtype="bfloat16", data=data, gpu="h100", dry_run=True)


def test_a_step_is_predicted_from_its_operations_and_bytes(large):
    text = dry_run.describe(replace(large, nodes=2), world=1)
    assert "predicted step on h100, 16 rank(s)" in text and "memory per rank, GiB, 16 rank(s)" in text
    assert "2 node(s) of 8 GPUs" in text and "nothing of it was measured" in text and "40% of 989 TFLOP/s" in text
    assert max(map(len, text.splitlines())) <= 120
    model, _ = dry_run.build_model(large, large.model_name_or_path)
    w, k, t = memory.sizes_of(model, large.method).parts
    step = predicted(text)
    received = step["received over links, GB a rank"]
    f = 15 / 16
    assert received["plain"] == received["ZeRO-1"] == received["ZeRO-2"] == pytest.approx(2 * f * t / 1e9, rel=0.01)
    assert received["ZeRO-3"] == pytest.approx(f * (2 * (w + k + t) + t) / 1e9, rel=0.05)  # less what stays gathered
    elements, tokens = w / 2 - 32000 * 4096, 8 * 1024
    products = (4 * elements + 6 * t / 4 + 4 * 32000 * 4096) * tokens
    assert step["computing, s"]["plain"] == pytest.approx(products / (0.4 * 989e12), rel=0.06)  # and attention
    for way in received:
        computing, links = step["computing, s"][way], step["links, s"][way]
        assert links == pytest.approx(received[way] / (0.7 * 400), rel=0.01)  # the network of a node
        assert step["step, links hidden, s"][way] == max(computing, links)
        assert step["step, links not hidden, s"][way] == pytest.approx(computing + links, rel=0.01)
        assert step["tokens/s per GPU, links hidden"][way] == pytest.approx(tokens / max(computing, links), rel=0.01)


def test_what_changes_a_prediction(large):
    def column(world: int = 8, way: str = "ZeRO-3", **changes) -> dict[str, float]:
        text = dry_run.describe(replace(large, **changes), world=world)
        return {label: ways[way] for label, ways in predicted(text).items()}

    base = column()
    received, computing, links = "received over links, GB a rank", "computing, s", "links, s"
    assert column(1)[links] == column(1)[received] == 0
    assert base[links] == pytest.approx(base[received] / (0.7 * 450), rel=0.01)  # within a node
    assert column(gpu="l4")[computing] == pytest.approx(base[computing] * 989 / 121, rel=0.01)
    assert column(dtype="float32")[computing] == pytest.approx(base[computing] * 989 / 67, rel=0.01)
    again = column(gradient_checkpointing=True)
    assert 1.3 < again[computing] / base[computing] < 1.5 and again[received] == base[received]
    twice = column(gradient_accumulation_steps=2)
    assert twice[computing] == pytest.approx(2 * base[computing], rel=0.01)
    assert 1.9 < twice[received] / base[received] < 2
    assert column(way="plain", gradient_accumulation_steps=2)[received] == column(way="plain")[received]
    nf4 = column(codec="nf4")
    assert nf4[computing] > base[computing] and nf4[received] < base[received] / 2
    # with one short row a step is bounded by reading the weights
    few = column(way="plain", per_device_train_batch_size=1, data=replace(large.data, max_length=2))
    w = 2 * (4 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336) + 32000 * 4096)
    assert few[computing] == pytest.approx(2 * w / (0.8 * 3350e9), rel=0.01)
    # FSDP2
    fsdp = {"way": "FSDP2", "engine": "fsdp", "deepspeed": large.deepspeed}
    kept, shared = column(**fsdp, fsdp=Sharding(reshard_after_forward=False)), column(**fsdp)
    assert 1.4 < shared[received] / kept[received] < 2
    copies = column(16, **fsdp, fsdp=Sharding(shard_size=8))
    assert copies[received] == pytest.approx(shared[received], rel=0.02)
    assert copies[links] < column(16, **fsdp)[links]  # what is gathered stays within a node


def test_ranks_of_a_launcher_fill_the_nodes(large):
    assert ranks_of_run(large, 16) == (16, 2) and ranks_of_run(large, 1) == (1, 1)
    assert ranks_of_run(replace(large, nodes=4), 1) == (32, 4) and ranks_of_run(replace(large, nodes=4), 8) == (8, 4)
    with pytest.raises(RecipeError, match="nodes: 8 ranks do not fill 3 nodes evenly"):
        dry_run.describe(replace(large, nodes=3), world=8)


def test_a_gpu_is_for_a_dry_run(recipe):
    with pytest.raises(RecipeError) as refused:
        validate(replace(recipe, gpu="h100", nodes=2, engine="plain"))
    assert "gpu is for a dry run" in str(refused.value) and "nodes is for a dry run" in str(refused.value)
    with pytest.raises(RecipeError, match="gpu: 'h101' is not one of none, a100"):
        parse(["--dry_run", "--gpu", "h101"])
    assert parse(["--dry_run", "--gpu", "h100", "--nodes", "2"]).nodes == 2


# --- bytes ------------------------------------------------------------------------------------------------------------

THRESHOLD = 150  # between the elements of one A and another, so that ZeRO-3 keeps some whole


def held(engine_name: str, zero: dict, codec: Codec) -> dict[str, int]:
    """Bytes that this rank holds after a step."""
    trainee = tiny.Trainee(METHOD, engine_name, dtype="bf16", zero=zero, codec=codec, **SHAPE)
    trainee.step(0)
    engine, found = trainee.engine, dict.fromkeys(("frozen weights", "bank", "adapters", "adapters, master copy"), 0)
    whole = 0
    for name, p in trainee.model.named_parameters():
        row = "adapters" if p.requires_grad else "bank" if "bank_" in name else "frozen weights"
        found[row] += p.ds_tensor.nbytes if engine_name == "zero3" else mine(p).nbytes
        whole += p.nbytes if engine_name == "zero3" and p.ds_persist else 0
    optimizer = engine.zero.optimizer if engine_name.startswith("zero") else engine.optimizer
    if engine_name.startswith("zero"):
        flat = (
            engine.zero.fp32_partitioned_groups_flat
            if engine_name == "zero3"
            else engine.zero.single_partition_of_fp32_groups
        )
        found["adapters, master copy"] = sum(p.nbytes for p in flat)
    found["moments"] = sum(
        mine(state[key]).nbytes for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")
    )
    kept = [
        v for adapter in trainee.adapters for key, v in adapter.memory.items() if key.startswith(("mean_", "spread_"))
    ]
    found["importance statistics"] = sum(v.nbytes for v in kept)
    found["small parameters, kept whole"] = whole
    return found


def mine(t: torch.Tensor) -> torch.Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


CASES = [
    ("plain", "plain", {}),
    ("ZeRO-1", "zero1", {}),
    ("ZeRO-2", "zero2", {}),
    ("ZeRO-3", "zero3", {"stage3_param_persistence_threshold": THRESHOLD}),
    ("FSDP2", "fsdp", {}),
    ("FSDP2", "fsdp", {"shard_size": 1}),
]


@pytest.mark.parametrize("codec", [Dense(torch.bfloat16), Nf4(torch.bfloat16)], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    "title, engine_name, settings", CASES, ids=["plain", "zero1", "zero2", "zero3", "fsdp", "fsdp-hybrid"]
)
def test_expected_bytes_are_those_that_two_ranks_hold(title, engine_name, settings, codec):
    model = tiny.skeleton("bf16", **SHAPE)
    adapters = attach(model, METHOD, codec)
    assert all(isinstance(a, Adapter) and a.bank_A is not None for a in adapters)
    kind, made = tiny.ENGINES[engine_name]
    sizes = memory.sizes_of(model, METHOD)
    columns = {c.title: c for c in ENGINES[kind].held(sizes, 2, made(**settings), Optimization())}
    expected = {label: nbytes for label, (nbytes, _) in columns[title].rows(sizes, 2).items()}
    measured = ranks.run(2, held, engine_name, settings, codec)
    for label in measured[0]:
        mean = sum(found[label] for found in measured) / 2
        assert mean == pytest.approx(expected[label], rel=0.02), label  # slices are padded
