"""What has to hold on a GPU as it does on the CPU; benchmarks/gpu.py runs it.

Cells are short runs of the tests' tiny LLaMA (tests/tiny.py) with the methods of tests/test_laws.py and their own
exchanges. Each is compared with the same run on the CPU by the plain engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import soak
from benchmarks.gpu_device import CPU, DEVICE
from benchmarks.gpu_results import Results, Row
from llm_lowrank.engines import fsdp
from llm_lowrank.engines.base import Engine
from llm_lowrank.models import export
from tests import tiny
from tests.test_laws import METHODS, refused
from tests.tiny import Trainee

ROOT = Path(__file__).parents[1]
TYPES = ("fp32", "bf16", "nf4", "int8")
# |logits - those on the CPU| / |those on the CPU| after four steps. On the CPU alone the logits of bf16 are 1.1 % to
# 3.1 % from those of float32, by method.
LIMITS = {"fp32": 1e-4, "bf16": 5e-2, "nf4": 1e-2, "int8": 1e-2}
STEPS = 4
SHARDED = (
    "lora",
    "lora-lora_rite",
    "srlora-bank",
    "relora-weight",
    "losia-bank",
    "rasa",
    "core",
)  # methods that the engines are tried with
DRAWN = ("flat_lora",)  # methods that draw random numbers on the device: no run on the CPU has the same ones
# heads of 64 and rows of 512 tokens, which torch's flash attention takes in several tiles
WIDE = dict(
    hidden_size=128,
    intermediate_size=192,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=1024,
    length=512,
)
fsdp.init_device_mesh = cache(fsdp.init_device_mesh)  # a mesh makes a group, and NCCL a communicator, each time


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Within this block engines have this device for theirs."""
    before = vars(Engine)["_device"]
    Engine._device = staticmethod(lambda: device)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Engine._device = before  # type: ignore[method-assign]


def lived(label: str, engine: str, dtype: str, steps: int = STEPS, **more: object) -> tuple[Trainee, float]:
    """A run of a few steps with the method's exchanges; and the largest change of the function by an exchange."""
    method, drift = METHODS[label], 0.0
    t = Trainee(method, engine, dtype, total=steps + 1, **more)
    due = method.schedule(steps + 1, t.adapters)
    for step in range(1, steps + 1):
        t.step(step)
        if step in due and (event := method.exchange(t.adapters, t.engine, step, t.total)) is not None:
            drift = max(drift, event.drift)
    return t, drift


def apart(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    a, b = (t.detach().cpu().double() for t in (a, b))
    return float((a - b).norm() / b.norm())


@cache
def on_the_cpu(label: str, dtype: str, samples: int) -> Tensor:
    """The logits of the plain run on the CPU."""
    with on(CPU):
        return lived(label, "plain", dtype, samples=samples)[0].logits()


def compared(label: str, engine: str, dtype: str, samples: int = 6, **settings: object) -> Row:
    """A cell: how far a run's logits are from those of the plain run on the CPU."""
    wanted = on_the_cpu(label, dtype, samples)
    t, drift = lived(label, engine, dtype, samples=samples, **settings)
    found = apart(t.logits(), wanted)
    return {"apart": found, "drift": drift, "good": found <= LIMITS[dtype]}


# --- items ------------------------------------------------------------------------------------------------------------


def methods(args: argparse.Namespace, results: Results) -> None:
    """Every method x every stored type, by the plain engine."""
    for label in METHODS:
        if label in DRAWN and DEVICE != CPU:
            results.add(label, skipped="its noise is drawn on the device, and another one draws other numbers")
            continue
        for dtype in TYPES[1:3] if args.small else TYPES:
            if not refused(label, dtype):
                results.cell(f"{label} {dtype}", partial(compared, label, "plain", dtype))


def host(engine: str) -> dict[str, object]:
    """An engine's settings that keep what it can in host memory."""
    if engine == "fsdp":
        return {"cpu_offload": True}
    place = {"device": "cpu", "pin_memory": DEVICE.type == "cuda"}
    return {"offload_optimizer": place} | ({"offload_param": place} if engine == "zero3" else {})


def engines(args: argparse.Namespace, results: Results) -> None:
    """The engines with groups of processes, in one group of one rank for all of them; then both offloads."""
    for engine in ("zero3", "fsdp", "zero2"):
        for label in SHARDED[1:4:2] if args.small else SHARDED:
            for dtype in TYPES[1:3] if args.small else TYPES:
                if not refused(label, dtype):
                    results.cell(f"{engine} {label} {dtype}", partial(compared, label, engine, dtype))
    for engine in ("zero3", "fsdp", "zero2"):
        for label in ("srlora-bank", "srlora-weight"):
            for dtype in ("bf16", "nf4"):
                if not refused(label, dtype):
                    cell = partial(compared, label, engine, dtype, zero=host(engine))
                    results.cell(f"{engine} offload {label} {dtype}", cell)


def resume(args: argparse.Namespace, results: Results) -> None:
    """A run that is saved and resumed, with and without deterministic algorithms of torch.

    Only with them the two must be bitwise the same; without, the row says whether they are.
    """
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            for label in ("srlora-bank", "losia-bank", "droplora-token-dora")[: 1 if args.small else None]:
                for engine, dtype in (("plain", "bf16"), ("plain", "nf4"), ("zero3", "bf16"), ("fsdp", "bf16")):
                    name = f"{engine} {label} {dtype}{', deterministic' * deterministic}"
                    results.cell(name, partial(resumed, label, engine, dtype, deterministic))
        finally:
            torch.use_deterministic_algorithms(False)


def resumed(label: str, engine: str, dtype: str, must: bool) -> Row:
    method = METHODS[label]
    first, _ = lived(label, engine, dtype, 2, **WIDE)
    with tempfile.TemporaryDirectory() as folder:
        resume_from = first.save(Path(folder), 2)
        second = Trainee(method, engine, dtype, total=3, resume_from=resume_from, **WIDE)  # type: ignore[arg-type]
        values = []
        for t in (first, second):
            for step in (3, 4):
                t.step(step)
            values.append(t.values())
    one, two = values
    same = all(torch.equal(one[name], two[name]) for name in one)
    away = max(apart(two[name], one[name]) for name in one if one[name].norm() > 0)
    return {"bitwise": same, "apart": away, "good": same or (not must and away < LIMITS[dtype])}


def peft(args: argparse.Namespace, results: Results) -> None:
    """Adapters that PEFT loads over the untouched model, on the device."""
    for label in METHODS:
        for dtype in ("bf16",) if args.small else ("fp32", "bf16"):
            if not refused(label, dtype):
                results.cell(f"{label} {dtype}", partial(loaded_by_peft, label, dtype))


def loaded_by_peft(label: str, dtype: str) -> Row:
    from peft import PeftModel

    t, _ = lived(label, "plain", dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter")
        export.save_adapter(t.engine, t.adapters, method=METHODS[label], path=path, base_model_name_or_path="base")
        base = tiny.llama(dtype)
        base.load_state_dict(t.original)
        model = PeftModel.from_pretrained(base.to(DEVICE), path).eval()
        with torch.no_grad():
            found = apart(model(input_ids=tiny.batch(99).to(DEVICE)).logits, t.logits())
    return {"apart": found, "good": found <= LIMITS[dtype]}


def codecs(args: argparse.Namespace, results: Results) -> None:
    """The checks of tests/gpu/test_codecs.py, which pytest runs too."""
    from tests.gpu import test_codecs as checks

    def cell(check: object, *arguments: object) -> Row:
        assert callable(check)
        check(*arguments)
        return {"good": True}

    for codec in checks.CODECS:
        for m, n in checks.SHAPES:
            call = partial(cell, checks.test_codes_decode_as_on_the_cpu, codec, m, n)
            results.cell(f"decodes as on the CPU, {codec}, {m} x {n}", call)
        for check in checks.CHECKS:
            results.cell(f"{check.__name__.removeprefix('test_')}, {codec}", partial(cell, check, codec))
    for codec in checks.NF4:
        call = partial(cell, checks.test_products_with_codes_are_those_of_the_decoded_weight, codec)
        results.cell(f"products with codes are those of the decoded weight, {codec}", call)


# --- as a user starts it ----------------------------------------------------------------------------------------------


def launcher(args: argparse.Namespace, results: Results) -> None:
    """torchrun launch/train.py on a model of its own: stopped by SIGUSR1, then resumed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        soak.place(folder)
        output = folder / "out"
        changes = {"codec": "nf4", "dtype": "bfloat16", "max_steps": 60, "save_steps": 2}
        train = soak.arguments_of(folder, output, "deepspeed", **changes)
        results.cell("started, stopped by SIGUSR1", partial(stopped, train, output))
        results.cell("resumed", partial(finished, train, output))


def started(train: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    return subprocess.Popen(
        [*command, str(ROOT / "launch/train.py"), *train],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def stopped(train: list[str], output: Path) -> Row:
    """Start a run and stop it after its first checkpoint."""
    import psutil

    run, began = started(train), time.monotonic()
    try:
        latest = output / "checkpoints/LATEST"
        while not latest.is_file():
            if run.poll() is not None or time.monotonic() - began > 60:
                raise RuntimeError(f"no checkpoint after {time.monotonic() - began:.0f} s: {ended(run)}")
            time.sleep(0.02)
        ready = time.monotonic() - began
        (rank,) = [p for p in psutil.Process(run.pid).children() if "launch/train.py" in " ".join(p.cmdline())]
        os.kill(rank.pid, soak.signal.SIGUSR1)
        said, _ = run.communicate(timeout=30)
    finally:
        run.terminate()
    good = "stopped by a signal after step" in said and not (output / "adapter").exists()
    return {"first checkpoint s": ready, "good": good} | ({} if good else {"error": said[-400:]})


def ended(run: subprocess.Popen[str]) -> str:
    run.terminate()
    return run.communicate(timeout=30)[0][-1000:]


def finished(train: list[str], output: Path) -> Row:
    """Start the run again, which resumes, and let it come to its end."""
    run = started(train)
    try:
        said, _ = run.communicate(timeout=75)
    finally:
        run.terminate()
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    good = run.returncode == 0 and steps == list(range(1, len(steps) + 1))
    good = good and (output / "adapter/adapter_model.safetensors").is_file()
    return {"steps": len(steps), "good": good} | ({} if good else {"error": said[-400:]})
