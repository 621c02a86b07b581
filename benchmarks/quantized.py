"""Our training against PEFT's, on the same random LLaMA.  python benchmarks/quantized.py

    python benchmarks/quantized.py            nf4, one process: engine plain against PEFT + bitsandbytes
    python benchmarks/quantized.py --zero3    dense, two ranks: our ZeRO-3 against PEFT on ZeRO-3, both with the same
                                              DeepSpeed configuration

LoRA of the same rank on every linear of the decoder layers in both; everything computed in --dtype, adapters in
float32. Per arm, in fresh processes: start-up, from the checkpoint on disk to a model that can be trained, imports done
before; peak resident memory over the imports while loading and in three training steps, and what stays after loading
(benchmarks/memory.py says how it is read; the worst rank counts). Then both arms in the same process(es) on the same
tokens, in turns, the order changed from round to round: seconds of a training step, that is forward, backward, clipping
and AdamW over the adapters. Figures are medians, for the ratio the median, least and greatest of the rounds' own
ratios. Only training steps are timed: without gradients bitsandbytes may take another, packed bfloat16 kernel on a CPU.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import deepspeed
import peft
import torch
import transformers
from memory import from_here, launch, resident
from peft import LoraConfig, get_peft_model
from step_time import VOCABULARY, cpu_name, llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations import HfDeepSpeedConfig

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import make
from llm_lowrank.engines.base import Engine, Optimization, adamw, trainables
from llm_lowrank.engines.plain import Plain
from llm_lowrank.engines.zero import Zero, resolve
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models.architectures import skeleton
from llm_lowrank.models.loading import bind, load
from llm_lowrank.models.source import Source

ARMS = ("ours", "peft")
OPTIMIZATION = Optimization(max_grad_norm=1.0)
ZERO3 = {"zero_optimization": {"stage": 3}}
Step = Callable[[Tensor], float]  # a training step on a batch -> its loss


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def ours(folder: Path, engine: Engine, codec: str, dtype: torch.dtype, rank: int) -> Step:
    method, source = LoRA(rank=rank), Source.open(folder)
    model = skeleton(folder, dtype, "sdpa")
    adapters = attach(model, method, make(codec, dtype))
    bind(model, adapters, source)
    wrapped, _ = load(engine, model.train(), adapters=adapters, method=method, tensors=source, settings=OPTIMIZATION)

    def step(ids: Tensor) -> float:
        loss = mean_loss(wrapped, ids)
        engine.backward(loss / engine.world)
        engine.step(OPTIMIZATION.learning_rate)
        return loss.item()

    return step


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    ).train()


def peft_nf4(folder: Path, dtype: torch.dtype, rank: int) -> Step:
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = with_lora(
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized, dtype=dtype, device_map="cpu"), rank
    )
    params = trainables(model)
    optimizer = adamw(params, OPTIMIZATION)

    def step(ids: Tensor) -> float:
        loss = mean_loss(model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(params, OPTIMIZATION.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def peft_zero3(folder: Path, engine: Engine, dtype: torch.dtype, rank: int) -> Step:
    largest = rank * transformers.AutoConfig.from_pretrained(folder).intermediate_size
    config = resolve(ZERO3, OPTIMIZATION, engine.world, largest)
    streaming = HfDeepSpeedConfig(config)  # while it lives, from_pretrained shards what it reads
    model = with_lora(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), rank)
    del streaming
    params = trainables(model)
    wrapped, *_ = deepspeed.initialize(
        model=model, model_parameters=params, optimizer=adamw(params, OPTIMIZATION), config=config
    )

    def step(ids: Tensor) -> float:
        loss = mean_loss(wrapped, ids)
        wrapped.backward(loss)
        wrapped.step()
        return loss.item()

    return step


# --- in the measured processes ----------------------------------------------------------------------------------------


def build(arm: str, args: argparse.Namespace, engine: Engine, dtype: torch.dtype) -> Step:
    if arm == "ours":
        return ours(args.folder, engine, "dense" if args.zero3 else "nf4", dtype, args.rank)
    return peft_zero3(args.folder, engine, dtype, args.rank) if args.zero3 else peft_nf4(args.folder, dtype, args.rank)


def tokens(args: argparse.Namespace, engine: Engine) -> Tensor:
    return torch.randint(VOCABULARY, (1, args.tokens), generator=torch.Generator().manual_seed(engine.rank))


def start(arm: str, args: argparse.Namespace, engine: Engine, dtype: torch.dtype) -> dict[str, Any]:
    """Measure start-up and memory of one arm."""
    ids, before, began = tokens(args, engine), from_here(), time.perf_counter()
    step = build(arm, args, engine, dtype)
    row = {"start": time.perf_counter() - began, "loading": resident("VmHWM") - before}
    row["kept"] = from_here() - before
    row["loss"] = [step(ids) for _ in range(3)]
    return row | {"training": resident("VmHWM") - before}


def in_turns(args: argparse.Namespace, engine: Engine, dtype: torch.dtype) -> dict[str, Any]:
    """Return the seconds of every step of both arms."""
    ids = tokens(args, engine)
    # ours first: transformers must not shard our skeleton
    steps = {arm: build(arm, args, engine, dtype) for arm in ARMS}
    losses, *_ = ({arm: step(ids) for arm, step in steps.items()} for _ in range(2))  # warm-up
    assert max(losses.values()) - min(losses.values()) < 0.02, f"the arms do not compute the same function: {losses}"
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for i in range(args.rounds):
        for arm in ARMS if i % 2 else ARMS[::-1]:
            began = time.perf_counter()
            steps[arm](ids)
            seconds[arm].append(time.perf_counter() - began)
    return seconds


# --- in the process that compares -------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Run everything for one dtype and print its lines."""

    def run(task: str) -> list[dict[str, Any]]:
        command = ["--folder", str(args.folder), "--task", task, "--dtypes", dtype]
        command += [f"--{name}={getattr(args, name)}" for name in ("rank", "tokens", "rounds", "threads")]
        command += ["--zero3"] if args.zero3 else []
        return launch(__file__, 2 if args.zero3 else 1, [*command, "--answers"], 1 if args.zero3 else args.threads)

    rows = {}
    for arm in ARMS:
        measured = run(arm)
        rows[arm] = {k: max(row[k] for row in measured) for k in ("start", "loading", "kept", "training")}
    times = run("turns")[0]
    for arm in ARMS:
        rows[arm]["step"] = statistics.median(times[arm])
        r = rows[arm]
        memory = "".join(f"{r[name] / 1e6:9.1f}" for name in ("loading", "kept", "training"))
        print(f"{dtype:10}{arm:8}{r['start']:9.2f}{memory}{1000 * r['step']:9.1f}")
    ratios = {k: rows["ours"][k] / rows["peft"][k] for k in rows["ours"]}
    rounds = [a / b for a, b in zip(times["ours"], times["peft"], strict=True)]
    ratios |= {"step": statistics.median(rounds), "step_min": min(rounds), "step_max": max(rounds)}
    cells = "".join(f"{ratios[k]:9.3f}" for k in ("start", "loading", "kept", "training", "step"))
    print(f"{'':10}{'ratio':8}{cells}   ours / peft; step {min(rounds):.3f} .. {max(rounds):.3f}", flush=True)
    return {"arms": rows, "ratios": ratios, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Our nf4 training against PEFT + bitsandbytes, or ZeRO-3 against PEFT on ZeRO-3."
    )
    parser.add_argument("--zero3", action="store_true", help="dense on ZeRO-3, two ranks, one thread each")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="length of the one sequence, per rank")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16"], help="by default both; float32 with --zero3"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--folder", type=Path, help="an existing checkpoint; by default a random one is written")
    # with --answers: what compare() starts
    parser.add_argument("--task", choices=[*ARMS, "turns"], help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.dtypes = args.dtypes or (["float32"] if args.zero3 else ["float32", "bfloat16"])

    if args.task:
        torch.set_num_threads(1 if args.zero3 else args.threads)
        dtype = getattr(torch, args.dtypes[0])
        engine = Zero(ZERO3) if args.zero3 else Plain()
        row = in_turns(args, engine, dtype) if args.task == "turns" else start(args.task, args, engine, dtype)
        (args.answers / f"{engine.rank}.json").write_text(json.dumps(row))
        engine.close()
        return

    machine = {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "deepspeed": deepspeed.__version__,
    }
    setting = {name: value for name, value in vars(args).items() if name not in ("output", "task", "answers", "folder")}
    print(" ".join(f"{name}={value}" for name, value in (setting | machine).items()))
    print(f"{'dtype':10}{'':8}{'start s':>9}{'load MB':>9}{'kept MB':>9}{'train MB':>9}{'step ms':>9}")
    with tempfile.TemporaryDirectory() as folder:
        if args.folder is None:
            args.folder = Path(folder)
            torch.manual_seed(0)
            llama(args.hidden, args.layers, args.tokens, torch.float32).save_pretrained(folder)
        results = {dtype: compare(args, dtype) for dtype in args.dtypes}
    if args.output:
        args.output.write_text(
            json.dumps({"setting": setting, "machine": machine, "results": results}, indent=2) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())
