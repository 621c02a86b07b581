"""Peak resident memory of a rank while a model is loaded and at an exchange.  python benchmarks/memory.py

    loading         peak - baseline  <=  shard + beside + 2 x largest tensor + LOADING
    exchange   peak - before    <=  one decoder layer + EXCHANGE            (decoded, in float32)

A random LLaMA, untied, vocabulary 32000, about --gigabytes on disk in float32, is written tensor by tensor. Then, for
every engine x codec, --ranks fresh processes load it under SRLoRA (rank 16 through 32 directions; into the weight where
it is dense, into the bank where it is coded), take two training steps and one exchange. A process measures itself:
VmRSS and VmHWM of /proc/self/status, the peak reset before each stretch. The baseline is taken when everything is
imported, before the process group. Before every first reading the garbage is collected and the allocator's free pages
are given back, so that a peak cannot hide in memory that was resident anyway.

shard is what a rank holds of the parameters: slices of the backbone (codes and scales where it is coded), of A, B and
the bank. Beside it lies what the method and the engine keep by design, counted from the objects themselves: rank 0's
ledger and the directions that wait, and the small parameters that ZeRO-3 leaves gathered. Masters and buffers of the
optimizer are not counted: they have to fit in the rest. The constants:

    LOADING     128 MB: 88 for the block of 2^21 elements of W that is worked on, five and a half times in float64;
                40 for buffers of gloo, of the matrix products and of DeepSpeed, and for code that is mapped when it
                first runs
    EXCHANGE    64 MB: the same 40, and 24 for an allocator that gives back pages late

The exit code is 1 if a bound does not hold.
"""

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import make
from llm_lowrank.engines.base import Engine, Optimization
from llm_lowrank.engines.fsdp import FSDP
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models.architectures import skeleton
from llm_lowrank.models.loading import bind, load
from llm_lowrank.models.source import SINGLE, Source
from llm_lowrank.numerics.files import stream_safetensors

ENGINES, CODECS = ("deepspeed", "fsdp"), ("dense", "nf4")
LOADING, EXCHANGE = 128e6, 64e6
MB = 1e6
COLUMNS = ("shard", "beside", "loading", "bound", "resident", "sec", "recomp.", "bound", "layer", "W", "sec")


def write(folder: Path, gigabytes: float, hidden: int, vocabulary: int) -> None:
    """Write a random LLaMA in float32, as close to `gigabytes` as whole layers allow."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        max_position_embeddings=64,
    )
    layer = 4 * hidden**2 + 3 * hidden * config.intermediate_size
    config.num_hidden_layers = max(1, round((gigabytes * 1e9 / 4 - 2 * vocabulary * hidden) / layer))
    with init_empty_weights():
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    stream_safetensors(
        folder / SINGLE,
        {name: (torch.float32, shape) for name, shape in shapes.items()},
        lambda name: (
            torch.ones(shapes[name])
            if len(shapes[name]) == 1
            else torch.randn(shapes[name], generator=generator).mul_(0.02)
        ),
        {"format": "pt"},
    )


# --- one rank ---------------------------------------------------------------------------------------------------------


def resident(what: str) -> int:
    """Return VmRSS or VmHWM, in bytes."""
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def from_here() -> int:
    """Return the resident size without garbage, and let the peak start from it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def make_engine(name: str) -> Engine:
    if name == "fsdp":
        return FSDP()
    from llm_lowrank.engines.zero import Zero

    return Zero({"zero_optimization": {"stage": 3}})


def shard(engine: Engine, model: nn.Module) -> int:
    """Return the bytes of this rank's slices of all parameters."""
    return sum(
        t.nbytes for p in model.parameters() for t in [p.to_local() if isinstance(engine, FSDP) else p.ds_tensor]
    )


def beside(engine: Engine, model: nn.Module, adapters: list[Adapter]) -> int:
    """Return the bytes of the pairs in rank 0's host memory and of ZeRO-3's gathered copies."""
    pairs = [p for a in adapters for p in [*a.ledger, a.reserve] if p is not None]
    gathered = 0 if isinstance(engine, FSDP) else sum(p.data.nbytes for p in model.parameters())
    return gathered + sum(p.A.nbytes + p.B.nbytes for p in pairs)


def rank_of_many(engine_name: str, codec_name: str, folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    codec = make(codec_name, torch.float32)
    codec.decode(codec.encode(torch.ones(64, 64)), 64)  # bitsandbytes is imported when it is first used
    if engine_name == "deepspeed":
        import deepspeed  # noqa: F401
    method = SRLoRA(rank=16, target_rank=32, svd_niter=1, svd_cache="")

    baseline, began = from_here(), time.perf_counter()
    engine = make_engine(engine_name)
    source = Source.open(folder)
    model = skeleton(source.path, torch.float32, "sdpa")
    adapters = attach(model, method, codec)
    bind(model, adapters, source)
    wrapped, _ = load(engine, model, adapters=adapters, method=method, tensors=source, settings=Optimization())
    seconds, loading = time.perf_counter() - began, resident("VmHWM") - baseline
    mine, more = shard(engine, model), beside(engine, model, adapters)

    ids = torch.randint(source.layout("lm_head.weight")[1][0], (1, 16))
    for _ in range(2):
        logits = wrapped(input_ids=ids, use_cache=False).logits
        engine.backward(F.cross_entropy(logits[0, :-1], ids[0, 1:]) / engine.world)
        del logits
        method.observe(adapters, engine)
        engine.step(1e-4)
    before, began = from_here(), time.perf_counter()
    event = method.exchange(adapters, engine, 2, 4)
    assert event is not None and event.modules == len(adapters)
    exchanging, extra = time.perf_counter() - began, resident("VmHWM") - before

    sizes = {name: 4 * torch.Size(source.layout(name)[1]).numel() for name in source.names()}
    row = {
        "rank": engine.rank,
        "model": sum(sizes.values()),
        "shard": mine,
        "beside": more,
        "largest": max(sizes.values()),
        "layer": sum(size for name, size in sizes.items() if ".layers.0." in name),
        "W": max(4 * a.shape[0] * a.shape[1] for a in adapters),
        "baseline": baseline,
        "loading": loading,
        "resident": before - baseline,
        "seconds": seconds,
        "exchange": extra,
        "exchange_seconds": exchanging,
    }
    engine.close()
    return row


# --- all ranks --------------------------------------------------------------------------------------------------------


def launch(
    script: str, ranks: int, arguments: list[str], threads: int = 1, timeout: float = 300.0
) -> list[dict[str, Any]]:
    """Run a script in `ranks` fresh processes under torchrun. Return, by rank, what each wrote as JSON to
    <last argument>/<rank>.json.
    """
    with tempfile.TemporaryDirectory() as answers:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
            script,
            *arguments,
            answers,
        ]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        launcher = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            printed, _ = launcher.communicate(timeout=timeout)
        finally:
            launcher.terminate()  # it takes its ranks along
            launcher.wait()
        if launcher.returncode:
            raise RuntimeError(f"{' '.join(command)} failed\n{printed}")
        return [json.loads((Path(answers) / f"{rank}.json").read_text()) for rank in range(ranks)]


def measure(engine: str, codec: str, ranks: int, folder: str | Path) -> list[dict[str, float]]:
    """Return what each of `ranks` fresh processes measures of itself, in bytes and seconds, by rank."""
    return launch(__file__, ranks, ["--rank_of", engine, codec, str(folder)])


def loading_bound(row: dict[str, float]) -> float:
    return row["shard"] + row["beside"] + 2 * row["largest"] + LOADING


def exchange_bound(row: dict[str, float]) -> float:
    return row["layer"] + EXCHANGE


def report(engine: str, codec: str, rows: list[dict[str, float]]) -> bool:
    """Print the figures of the worst rank, each column for itself. Return whether both bounds hold on every rank."""
    worst = {name: max(row[name] for row in rows) for name in rows[0]}
    good = all(row["loading"] <= loading_bound(row) and row["exchange"] <= exchange_bound(row) for row in rows)
    figures = (
        *(worst[name] / MB for name in ("shard", "beside", "loading")),
        loading_bound(worst) / MB,
        worst["resident"] / MB,
        worst["seconds"],
        worst["exchange"] / MB,
        exchange_bound(worst) / MB,
        worst["layer"] / MB,
        worst["W"] / MB,
        worst["exchange_seconds"],
    )
    cells = "".join(f"{figure:9.1f}" for figure in figures)
    print(f"{engine:10}{codec:6}{len(rows):6}{cells}{'' if good else '  BEYOND ITS BOUND'}", flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak resident memory per rank while loading and at an exchange.")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of the model on disk, in float32")
    parser.add_argument("--hidden", type=int, default=1536, help="width of the model, a multiple of 64")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=CODECS)
    parser.add_argument("--output", type=Path, help="write what every rank measured here as JSON")
    # engine, codec, model, answers: what measure() starts
    parser.add_argument("--rank_of", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        engine, codec, model, answers = args.rank_of
        row = rank_of_many(engine, codec, Path(model))
        (Path(answers) / f"{row['rank']}.json").write_text(json.dumps(row))
        return 0

    print(
        f"{'engine':10}{'codec':6}{'ranks':>6}{''.join(f'{name:>9}' for name in COLUMNS)}   MB of the worst rank, over "
        "the baseline"
    )
    results, good = {}, True
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.gigabytes, args.hidden, args.vocabulary)
        for engine in args.engines:
            for codec in args.codecs:
                rows = results[f"{engine} {codec}"] = measure(engine, codec, args.ranks, folder)
                good &= report(engine, codec, rows)
    print(f"model {rows[0]['model'] / MB:.1f} MB, its largest tensor {rows[0]['largest'] / MB:.1f} MB, both in float32")
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
