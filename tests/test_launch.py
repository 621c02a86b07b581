"""launch/train.py as a user starts it: under deepspeed, torchrun and python, with good and with bad input.

A launcher and its ranks import everything anew, a quarter of a minute on two cores. Where the launcher is not what is
looked at, the ranks are forked with the environment that one would give (benchmarks/soak.py).
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.soak import live
from launch import merge, train
from llm_lowrank.run.report import write_comparison
from tests import tiny
from tests.test_data import CHATML, byte_tokenizer

ROOT = Path(__file__).parents[1]
# of a launched run
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# two files of tests may launch at a time
PORT = 29731 + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
DEEPSPEED = (str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(PORT))
PYTHON = (sys.executable,)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model, its tokenizer and two data files."""
    folder = tmp_path_factory.mktemp("launch")
    tokenizer = byte_tokenizer(CHATML)
    model = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "columns.jsonl").write_text('{"query": "2 + 2", "response": "4"}\n' * 3)
    (folder / "empty.jsonl").write_text(
        '{"prompt": "a", "completion": "b"}\n{"messages": 1, "prompt": "c", "completion": ""}\n'
    )
    (folder / "silent.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n' * 3)
    return folder


def recipe(place: Path, **changes: object) -> list[str]:
    settings = {
        "model_name_or_path": place / "model",
        "output_dir": place / "out",
        "data.dataset": place / "data.jsonl",
        "data.held_out": 8,
        "data.max_length": 64,
        "max_steps": 6,
        "warmup_steps": 1,
        "logging_steps": 1,
        "method.type": "srlora",
        "method.rank": 4,
        "method.target_rank": 8,
        "method.svd_cache": place / "svd",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
    }
    return [f"--{name}={value}" for name, value in {**settings, **changes}.items()]


def launch(launcher: tuple[str, ...], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*launcher, str(ROOT / "launch/train.py"), *arguments],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )


def succeed(launcher: tuple[str, ...] | int, arguments: list[str]) -> str:
    """What a run says that ends well: under a launcher, or as so many ranks."""
    if isinstance(launcher, int):
        life = live(arguments, launcher)
        assert life.codes == [0] * launcher, life.said[-4000:]
        return life.said
    done = launch(launcher, arguments)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def records(output: Path, kind: str) -> list[dict]:
    return [r for r in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]


@pytest.fixture(scope="module")
def runs(place) -> dict[str, Path]:
    """The same recipe, global batch 8 packed rows, under both launchers and on every kind of engine: into the weight,
    fp32.
    """
    started = {
        "plain": (1, {"engine": "plain", "per_device_train_batch_size": 8}),
        "ddp": (2, {"engine": "plain", "gradient_accumulation_steps": 2}),
        "deepspeed": (
            DEEPSPEED,
            {"engine": "deepspeed", "per_device_train_batch_size": 4, "gradient_checkpointing": True},
        ),
        "fsdp": (TORCHRUN, {"engine": "fsdp", "per_device_train_batch_size": 4, "gradient_checkpointing": True}),
    }
    outputs = {}
    for name, (launcher, changes) in started.items():
        outputs[name] = place / f"out-{name}"
        said = succeed(launcher, recipe(place, output_dir=outputs[name], **{"data.packing": True, **changes}))
        (outputs[name] / "said.txt").write_text(said)
    return outputs


def test_launchers_and_engines_train_alike(runs):
    losses = {name: [r["loss"] for r in records(output, "train")] for name, output in runs.items()}
    assert len(losses["plain"]) == 6
    for name in ("ddp", "deepspeed", "fsdp"):  # float32 sums in another order, over 6 steps of Adam
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-4), name


def test_a_run_learns_and_exchanges_on_schedule(runs):
    for output in runs.values():
        before, after = (r["loss"] for r in records(output, "eval"))
        assert after < before
        events = records(output, "exchange")
        assert [(e["kind"], e["step"], e["pairs"]) for e in events] == [("exchange", 2, 28), ("exchange", 4, 28)]
        (loaded,) = records(output, "load")
        assert (loaded["modules"], loaded["pairs"]) == (14, 56) and loaded["error"] < 1e-6
        assert all(e["drift"] < 1e-6 and e["into"] == "weight" for e in events)


def test_reports_of_all_engines_agree(runs, tmp_path):
    pages = {name: (output / "report.html").read_text(encoding="utf-8") for name, output in runs.items()}
    assert all("finished, 6 steps" in page for page in pages.values())
    facts = {name: records(output, "run")[0]["facts"] for name, output in runs.items()}
    assert facts["plain"]["trainable"] > 0
    for name, output in runs.items():
        assert all(facts[name][key] == facts["plain"][key] for key in ("trainable", "modules", "steps", "held_out"))
        for event, other in zip(records(output, "exchange"), records(runs["plain"], "exchange"), strict=True):
            for figure, values in event["by_module"].items():
                assert values == pytest.approx(other["by_module"][figure], rel=1e-3), (name, figure)
    compared = write_comparison(list(runs.values()), tmp_path / "compare.html").read_text(encoding="utf-8")
    assert all(f"out-{name}" in compared for name in runs)


def test_a_run_leaves_what_the_readme_promises(runs):
    for output in runs.values():
        settings = yaml.safe_load((output / "recipe.yaml").read_text())
        assert settings["method"]["target_rank"] == 8
        assert list((output / "tensorboard").glob("events.*"))
        assert "held-out loss" in (output / "said.txt").read_text()
        leftovers = [p.name for p in output.rglob("*") if "tmp" in p.name]
        assert not leftovers


def test_adapter_in_peft_and_merged_in_transformers_agree(runs, place):
    tokens = torch.arange(24).view(2, 12)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    untouched = base(tokens).logits
    for output in runs.values():
        merged = AutoModelForCausalLM.from_pretrained(output / "merged")(tokens).logits
        adapted = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(place / "model"), output / "adapter"
        )(tokens).logits
        assert (merged - adapted).abs().max() < 1e-4
        assert (merged - untouched).abs().max() > 1e-2
        assert AutoTokenizer.from_pretrained(output / "merged").chat_template == CHATML
        assert load_file(output / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module", params=["fsdp", "deepspeed"])
def coded_run(place, request) -> Path:
    """nf4 over 2 ranks, merged into what was trained on."""
    output = place / f"out-nf4-{request.param}"
    settings = {"engine": request.param, "codec": "nf4", "merge_base": "dequantized", "per_device_train_batch_size": 4}
    (output / "said.txt").write_text(succeed(2, recipe(place, output_dir=output, **settings)))
    return output


def test_a_run_over_nf4_learns_and_says_what_either_merge_would_do(coded_run):
    before, after = (r["loss"] for r in records(coded_run, "eval"))
    assert after < before
    assert all(e["drift"] < 1e-5 and e["into"] == "bank" for e in records(coded_run, "exchange"))
    (loaded,) = records(coded_run, "load")
    assert 0.03 < loaded["error"] < 0.15  # of nf4
    gaps = {r["base"]: r for r in records(coded_run, "gap")}
    assert gaps["dequantized"]["logits"] < 1e-5 and gaps["dequantized"]["agreement"] == 1.0
    assert 0.01 < gaps["original"]["logits"] < 0.5
    said = (coded_run / "said.txt").read_text()
    assert re.search(r"merged into the dequantized weights: logits 0.0% apart.*\(merge_base\)", said)


def test_an_adapter_trained_over_nf4_loads_on_the_unquantized_and_on_a_quantized_base(coded_run, place):
    tokens = torch.arange(24).view(2, 12)
    merged = AutoModelForCausalLM.from_pretrained(coded_run / "merged")(tokens).logits
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    untouched = base(tokens).logits
    adapted = peft.PeftModel.from_pretrained(base, coded_run / "adapter")(tokens).logits
    gap, moved = (merged - adapted).norm(), (adapted - untouched).norm()
    assert 0 < gap < moved  # what nf4 took from W is between them

    quantized = AutoModelForCausalLM.from_pretrained(
        place / "model",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    # in eval its CPU kernel rounds to bf16
    over = peft.PeftModel.from_pretrained(quantized, coded_run / "adapter").train()(tokens).logits
    assert (over - adapted).norm() < moved


def test_the_other_merge_can_be_made_later(coded_run, place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for base in ("original", "dequantized"):
        assert merge.main(["--checkpoint", str(coded_run), "--output", f"~/{base}", "--merge_base", base]) == 0
    (in_run,), (later,) = (
        [*folder.glob("*.safetensors")] for folder in (coded_run / "merged", tmp_path / "dequantized")
    )
    assert in_run.read_bytes() == later.read_bytes()
    tokens = torch.arange(24).view(2, 12)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "original")(tokens).logits
    adapted = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(place / "model"), coded_run / "adapter"
    )(tokens).logits
    assert (merged - adapted).abs().max() < 1e-4


def test_no_process_is_left_behind(runs, place):
    processes = {p: p.joinpath("cmdline") for p in Path("/proc").iterdir() if p.name.isdigit()}
    left = [p.name for p, line in processes.items() if line.exists() and str(place).encode() in line.read_bytes()]
    assert not left


BAD = {
    "unknown key": ({"lora_r": 8}, "lora_r.*method.rank"),
    "unknown method setting": ({"method.gama": 0.5}, "method.gama.*method.gamma"),
    "target that matches nothing": ({"method.target_modules": "q_prj"}, "q_prj.*q_proj"),
    "rank above min(m, n)": ({"method.rank": 15, "method.target_rank": 15}, r"rank.* 15 .*min\(m, n\) = 14"),
    "target_rank below rank": ({"method.target_rank": 2}, "target_rank.*2.*rank.*4"),
    "missing model": ({"model_name_or_path": "/nowhere/model"}, "/nowhere/model"),
    "missing dataset": ({"data.dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
    "missing columns": ({"data.dataset": "{place}/columns.jsonl"}, "query.*response|prompt.*completion"),
    "no completion token": ({"data.dataset": "{place}/silent.jsonl", "data.held_out": 1}, "row 0"),
    "used output_dir": ({"output_dir": "{place}"}, "not empty"),
    "too few steps for the switches": ({"max_steps": 1}, "steps"),
    "value out of range": ({"learning_rate": -1}, "learning_rate"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_readable_message(case, place, capsys, tmp_path):
    changes, message = BAD[case]
    changes = {
        "engine": "plain",
        "output_dir": tmp_path / "out",
        **{k: str(v).format(place=place) for k, v in changes.items()},
    }
    assert train.main(recipe(place, **changes)) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes, message",
    [({"method.target_modules": "q_prj"}, "q_proj"), ({"unknown": 1}, "unknown")],
    ids=["target", "key"],
)
def test_bad_input_ends_all_ranks(changes, message, place, tmp_path):
    life = live(recipe(place, output_dir=tmp_path / "out", engine="plain", **changes))
    assert life.codes == [2, 2]
    said_once(life.said, message)
    assert not (tmp_path / "out").exists()


def test_bad_input_ends_the_launcher(place, tmp_path):
    (place / "fixed.json").write_text(json.dumps({"train_batch_size": 7, "zero_optimization": {"stage": 2}}))
    done = launch(DEEPSPEED, recipe(place, output_dir=tmp_path / "out", deepspeed=place / "fixed.json"))
    assert done.returncode != 0
    said_once(done.stdout + done.stderr, "train_batch_size is 7 but the recipe asks for 4")
    assert not (tmp_path / "out").exists()


def test_a_port_that_is_taken_ends_the_run_with_the_options_that_change_it(place, tmp_path, capfd, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        where = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in where.items():
            monkeypatch.setenv(name, str(value))
        assert train.main(recipe(place, output_dir=tmp_path / "out", engine="plain")) == 2
    said = capfd.readouterr().err
    assert f"port {port} on 127.0.0.1, where the ranks should meet, is taken by another program; give another" in said
    assert all(option in said for option in ("--master_port N", "--rdzv-endpoint 127.0.0.1:N", "MASTER_PORT=N"))
    assert "did every node start" not in said and not (tmp_path / "out").exists()


def said_once(said: str, message: str) -> None:
    assert len([line for line in said.splitlines() if "error: " in line and message in line]) == 1, said[-4000:]


def test_bf16_runs_into_the_bank_and_says_so(place, tmp_path, capsys):
    sums = {"data.dataset": "reasoning-gym:chain_sum", "data.size": 24, "data.max_length": 160}
    changes = {"engine": "plain", "dtype": "bfloat16", "eval_steps": 2, **sums}
    assert train.main(recipe(place, output_dir=tmp_path / "out", **changes)) == 0
    captured = capsys.readouterr()
    said = captured.out
    assert all(shown in captured.err for shown in ("loss=", "lr=", "tok_s=", "next_exchange=4"))  # the progress bar
    assert "kept in a bank beside the weight, which in bfloat16 would round away" in said and "exact match" in said
    assert [(e["into"], e["lost"]) for e in records(tmp_path / "out", "exchange")] == [("bank", 0.0)] * 2
    for value in ("loss", "exact_match"):  # questions are asked as often as the loss is measured
        assert [r["step"] for r in records(tmp_path / "out", "eval") if value in r] == [0, 2, 4, 6]
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["r"] <= 2 * 8 and config["base_model_name_or_path"] == str(place / "model")


def test_overwriting_leaves_nothing_of_the_earlier_run(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    output = tmp_path / "out"  # which the command line calls ~/out
    for name in ("adapter/old.txt", "merged/old.txt", "tensorboard/old.txt", "notes.txt"):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text("of an earlier run")
    assert train.main(recipe(place, output_dir="~/out", engine="plain")) == 2
    assert (output / "merged/old.txt").exists()
    assert train.main(recipe(place, output_dir="~/out", engine="plain", overwrite_output_dir=True)) == 0
    assert [p.name for p in output.rglob("*.txt")] == ["notes.txt"]
    assert (output / "merged/model.safetensors").exists()


def test_a_diverged_run_ends_with_one_message(place, tmp_path, capsys):
    changes = {"engine": "plain", "learning_rate": 1e30, "method.type": "lora", "lr_scheduler_type": "constant"}
    arguments = [
        a for a in recipe(place, output_dir=tmp_path / "out", **changes) if "target_rank" not in a and "svd" not in a
    ]
    assert train.main(arguments) == 1
    assert re.search(r"^error: step \d+: the gradient norm is (nan|inf)", capsys.readouterr().err, re.MULTILINE)
