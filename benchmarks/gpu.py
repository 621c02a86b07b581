"""Prove and measure on a real GPU, in one go.  python benchmarks/gpu.py --out OUT

    python benchmarks/gpu.py --out OUT                          one GPU: laws, then figures, about five minutes
    python benchmarks/gpu.py --out OUT --only methods dense     some items
    torchrun --nproc_per_node N benchmarks/gpu.py --out OUT --ranks       what one GPU cannot show
    python benchmarks/gpu.py --out OUT --device cpu --small     whether the script itself works; two minutes on 2 cores

Items are in the order of their value. Each has a limit of time and fails alone: they run in a process of their own, and
if this hangs or dies, that costs the item that it was in, and another process goes on with the next one. One process
has one process group for all its ZeRO and FSDP2 cells. Every row is written to OUT as soon as it is known; OUT/table.md
is what can be committed, under benchmarks/results/gpu/<card>. Models are random, of the shapes of a config in
tests/configs, so that neither a network nor a checkpoint is needed. The exit code is 1 if something failed.

Without pip, put the repository before the wheels (benchmarks/wheels.sh): some wheels have a top-level package `tests`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import os
import sys
import time
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_results import Results, bad_rows, count, failure, is_law, keep, read, table, write  # noqa: E402

START = 120.0  # seconds until a process must have begun its first item
GRACE = 15.0  # seconds over an item's limit after which its process is ended


class Item(NamedTuple):
    module: str
    function: str  # of (arguments, Results)
    seconds: float  # that it may take
    title: str


LAWS, FIGURES, MODELS = (f"benchmarks.gpu_{name}" for name in ("laws", "figures", "models"))
ITEMS: dict[str, Item] = {
    "methods": Item(LAWS, "methods", 80, "Four steps of every method, compared with the same steps on the CPU."),
    "engines": Item(LAWS, "engines", 80, "The same over ZeRO and FSDP2 in a group of one rank, and offloaded."),
    "resume": Item(LAWS, "resume", 30, "Saved and resumed: whether two further steps are bitwise the same."),
    "peft": Item(LAWS, "peft", 20, "Exported adapters, loaded by PEFT: logits."),
    "codecs": Item(LAWS, "codecs", 25, "The kernels of nf4 and int8 (tests/gpu/test_codecs.py)."),
    "ceilings": Item(FIGURES, "ceilings", 15, "A copy and a large product: what nothing is faster than."),
    "decode": Item(FIGURES, "decode", 15, "Decoding one W; of copy: the rate of its bytes over that of a copy."),
    "layer": Item(FIGURES, "layer", 30, "Forward and backward of one linear, of attention and of the loss."),
    "dense": Item(MODELS, "dense", 75, "Forward and backward of the model in bf16; ratio: to the frozen model."),
    "nf4": Item(
        MODELS,
        "nf4",
        80,
        "The same in nf4, beside PEFT over bitsandbytes, and in int8; of bf16: to lora in bf16.",
    ),
    "speeds": Item(MODELS, "speeds", 55, "Every method on four layers; ratio: to the frozen model."),
    "updates": Item(MODELS, "updates", 40, "The optimizer's part of a step behind each direction, four layers."),
    "exchange": Item(MODELS, "exchange", 60, "SRLoRA's start and exchange, of the whole model."),
    "launcher": Item(LAWS, "launcher", 90, "torchrun launch/train.py, ZeRO-3 and nf4, stopped and resumed."),
    "compile": Item(MODELS, "compiled", 60, "torch.compile of each decoder layer, four layers."),
    "generation": Item(MODELS, "generation", 40, "Answers of the model in nf4, decoded or not; same: of the tokens."),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prove and measure on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: whether the script itself works")
    parser.add_argument("--ranks", action="store_true", help="under torchrun: what one GPU cannot show")
    parser.add_argument("--only", nargs="*", choices=ITEMS, default=list(ITEMS), help="these items")
    parser.add_argument("--config", default="Llama-3.1-8B", help="the model's shapes, a folder of tests/configs")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.small:
        args.layers, args.tokens, args.rank, args.rounds = 2, 64, 4, 2
    return args


def prepare(args: argparse.Namespace) -> None:
    """Set what must be in the environment before torch is imported."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, asked for before CUDA starts
    os.environ.setdefault("NCCL_DEBUG", "WARN")
    if args.device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    else:
        os.environ.pop("DS_ACCELERATOR", None)  # DeepSpeed would shard to the host


def machine(args: argparse.Namespace) -> str:
    """Note the machine in the results; return the card's name."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from benchmarks.gpu_device import card_name

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    names = ("transformers", "deepspeed", "peft", "bitsandbytes", "triton")
    software = {"Python": platform.python_version(), "torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    software |= {name: installed(name) for name in names}
    setting = {key: str(value) for key, value in vars(args).items()}
    found = {"card": card_name(), "small": args.small, "command": command(), "software": software, "setting": setting}
    if os.environ.get("RANK", "0") == "0":
        write(args.out, read(args.out) | {"machine": found})
    return str(found["card"])


def command() -> str:
    return " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])


# --- the process that does the work -----------------------------------------------------------------------------------


def work(items: dict[str, Item], args: argparse.Namespace, pipe: Connection) -> None:
    """Do items one after the other, and say which has begun and which has ended."""
    # warnings and progress go to a file: of the output on a machine that is lent, often only the end comes back
    os.dup2(os.open(args.out / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    from benchmarks.gpu_device import start

    card = machine(args)
    for module in {item.module for item in items.values()}:
        with contextlib.suppress(Exception):  # an item that needs it will say what is wrong
            import_module(module)  # now, for it takes the time of no item
    for name, item in items.items():
        pipe.send(("began", name))
        results = Results(name, args.out, card, item.seconds, left=round(start(), 3), small=args.small)
        began = time.monotonic()
        broken = False
        try:
            getattr(import_module(item.module), item.function)(args, results)
        except Exception as error:
            broken = "CUDA error" in str(error) or "NCCL" in str(error)
            fail(args, name, failure(error)["error"], results.rows, time.monotonic() - began, card)
        print(f"[{card}] {name}: {time.monotonic() - began:.0f} s. {said(results.rows)}", flush=True)
        pipe.send(("ended", name))
        if broken:
            return  # nothing can be done on the device any more by this process


def said(rows: list) -> str:
    return " ".join(count(rows)) if is_law(rows) else ""


def fail(args: argparse.Namespace, name: str, error: str, rows: list, seconds: float, card: str) -> None:
    print(f"[{card}] {name}: FAILED: {error}", flush=True)
    keep(args.out, name, rows, seconds, error=error)


# --- the process that watches -----------------------------------------------------------------------------------------


def follow(items: dict[str, Item], args: argparse.Namespace) -> dict[str, Item]:
    """Let one process do the items; return those that are left when it is gone."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=work, args=(items, args, theirs))
    worker.start()
    theirs.close()
    left, current, limit = dict(items), "", START
    while left:
        if not ours.poll(limit):
            reason = f"more than {limit:g} s, the process was ended"
            break
        try:
            kind, name = ours.recv()
        except EOFError:
            worker.join()
            reason = f"the process died with exit code {worker.exitcode}" if current else ""
            break
        if kind == "began":
            current, limit = name, items[name].seconds + GRACE
        else:
            del left[name]
            current, limit = "", START
            write_table(args)
    if left and (current or len(left) == len(items)):  # in an item, or before any of them
        name = next(iter(left))
        del left[name]
        known = read(args.out)
        card, rows = known.get("machine", {}).get("card", "unknown card"), known.get(name, {}).get("rows", [])
        fail(args, name, reason or "no process could be started", rows, limit, card)
    worker.join(0 if left else GRACE)
    worker.kill()
    worker.join()
    return left


def write_table(args: argparse.Namespace) -> None:
    text = table(read(args.out), {name: item.title for name, item in ITEMS.items()})
    (args.out / "table.md").write_text(text)


def main() -> int:
    args = arguments()
    prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.ranks:
        from benchmarks.gpu_ranks import main as ranks

        return ranks(args, machine)
    write(args.out, {key: value for key, value in read(args.out).items() if key not in (*args.only, "machine")})
    began, left = time.monotonic(), {name: item for name, item in ITEMS.items() if name in args.only}
    while left:
        left = follow(left, args)
    known = read(args.out)
    if "machine" in known:
        write_table(args)
    bad = bad_rows(known, args.only)
    print(f"{time.monotonic() - began:.0f} s, {len(bad)} failed" + "".join(f"\n  {line}" for line in bad))
    print(f"the table: {args.out / 'table.md'}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
