"""Runs on GPUs, of the model that benchmarks/soak.py makes:  pytest -m gpu tests/gpu

With one GPU every run is in this process, in a group of one rank. With several, benchmarks/gpu.py --ranks is started
over all of them.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks import soak
from llm_lowrank.run.recipe import Recipe, parse
from llm_lowrank.run.train import train

CUDA = torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")]
ROOT = Path(__file__).parents[2]
ENGINES: dict[str, dict[str, object]] = {
    "plain": {},
    **{name: {"engine": "deepspeed", "deepspeed": f"ds_configs/{name}.json"} for name in ("zero2", "zero3")},
    "zero3_offload": {"engine": "deepspeed", "deepspeed": "ds_configs/zero3_offload.json"},
    "fsdp": {"engine": "fsdp"},
    "fsdp_offload": {"engine": "fsdp", "fsdp.cpu_offload": True},
}


def trained(place: Path, output: Path, **changes: object) -> tuple[bytes, dict[int, float]]:
    """Train with SRLoRA; return the bytes of the adapter and the losses."""
    settings = {"dtype": "bfloat16", "save_steps": 0, **changes}
    train(parse(soak.arguments_of(place, output, **({"engine": "plain"} | settings))))
    adapter, losses = soak.result(output)
    return adapter, dict(losses)


@pytest.mark.parametrize("codec", ["dense", "nf4", "int8"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_trains_exchanges_and_exports(place, tmp_path, engine, codec):
    """The run itself compares the gathered bytes of a quantized weight before it trains."""
    _, losses = trained(place, tmp_path / "out", codec=codec, **ENGINES[engine])
    assert len(losses) == soak.STEPS and losses[soak.STEPS] < losses[1]
    assert '"kind": "exchange"' in (tmp_path / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("engine", ["plain", "zero3", "fsdp_offload"])
def test_a_deterministic_run_resumes_bitwise(place, tmp_path, engine):
    if "deterministic" not in {field.name for field in fields(Recipe)}:
        pytest.skip("the recipe has no such setting")
    settings = {"deterministic": True, "save_total_limit": 9, **ENGINES[engine]}
    whole, losses = trained(place, tmp_path / "one", save_steps=8, **settings)
    checkpoint = tmp_path / "one/checkpoints/step-000008"
    again, later = trained(place, tmp_path / "two", save_steps=8, resume_from_checkpoint=checkpoint, **settings)
    assert later == {step: loss for step, loss in losses.items() if step > 8}
    assert again == whole


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_several_gpus_compute_what_one_does(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [f"--nproc_per_node={torch.cuda.device_count()}", str(ROOT / "benchmarks/gpu.py")]
    done = subprocess.run(
        [*launcher, *script, "--ranks", "--small", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
