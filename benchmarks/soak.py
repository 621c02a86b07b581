"""A run that is killed again and again ends like an uninterrupted run.

    python benchmarks/soak.py [--kills 200] [--engine deepspeed]

A small SRLoRA run on 2 ranks saves a checkpoint every 3 steps. Each start of the run is one life. For each life a seed
draws a rank, a phase (reading the data, loading, restoring, a step, an exchange, a save, the export), a signal
(SIGKILL, SIGTERM, SIGUSR1) and some milliseconds; when the rank comes to the phase, it gets the signal after this
time. Both ranks must end by themselves. Then the run is resumed with --resume_from_checkpoint auto. A run that reaches
its end is compared with an uninterrupted run: the adapter and the losses must be the same, bitwise. Then the next run
begins, until --kills ranks were killed.

Ranks are forked from a process that has imported everything (multiprocessing's forkserver), so that a life costs a
second or two. A rank runs launch/train.py with the environment that a launcher would give it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
FORK = mp.get_context("forkserver")
FORK.set_forkserver_preload(["deepspeed", "datasets", "bitsandbytes", "llm_lowrank.run.train"])
ENDS = 90.0  # seconds after which a rank that has not ended hangs


@dataclass(frozen=True)
class Strike:
    """A signal for a rank that has come to a phase for the `count`-th time in its life."""

    phase: str  # the beginning of the phase's name
    kind: signal.Signals = signal.SIGKILL
    rank: int = 0
    delay: float = 0.0  # seconds
    count: int = 1
    times: int = 1  # how often the signal is sent


@dataclass
class Life:
    """How the ranks of one start ended."""

    codes: list[int | None]  # exit codes; None: the process had to be ended
    said: str  # output of all ranks
    struck: bool  # whether the signal was sent
    seconds: float = 0.0
    phases: list[list[str]] = field(default_factory=list)  # the phases that each rank came to


def _rank(arguments: list[str], environment: dict[str, str], log: str, pipe: Connection) -> None:
    """Run a rank in this process as if a launcher had started it."""
    os.environ.update(environment)
    with open(log, "a", encoding="utf-8") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    from llm_lowrank.engines.base import Engine

    original = Engine.at

    def report(engine: Engine, phase: str) -> None:
        pipe.send(phase)
        original(engine, phase)

    Engine.at = report
    sys.argv = [str(ROOT / "launch" / "train.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def free_ports(count: int) -> list[int]:
    """Return different free ports of this host."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def live(arguments: list[str], world: int = 2, strike: Strike | None = None, grace: float = ENDS) -> Life:
    """Start the ranks, send the signal, and wait for the end; like a launcher, wait `grace` seconds for the other ranks
    when the first one has ended.
    """
    began, (port,) = time.monotonic(), free_ports(1)
    pipes, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log")
        for rank in range(world):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "DS_ACCELERATOR": "cpu",
            }
            read_end, write_end = FORK.Pipe(duplex=False)
            process = FORK.Process(target=_rank, args=(arguments, environment, log, write_end))
            process.start()
            write_end.close()
            pipes.append(read_end)
            processes.append(process)
        phases, struck = _follow(pipes, processes, strike, began + ENDS)
        wait([process.sentinel for process in processes], max(0.0, began + ENDS - time.monotonic()))
        deadline = min(began + ENDS, time.monotonic() + grace)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
        said = Path(log).read_text(encoding="utf-8", errors="replace") if os.path.exists(log) else ""
    return Life(codes, said, struck, time.monotonic() - began, phases)


def _follow(
    pipes: list[Connection], processes: list[Any], strike: Strike | None, deadline: float
) -> tuple[list[list[str]], bool]:
    """Collect the phases that the ranks report, until one has closed its pipe, and send the signal when it is due."""
    phases: list[list[str]] = [[] for _ in pipes]
    open_pipes, struck = dict(zip(pipes, range(len(pipes)), strict=True)), False
    while len(open_pipes) == len(pipes) and time.monotonic() < deadline:
        for pipe in wait(list(open_pipes), max(0.0, deadline - time.monotonic())):
            rank = open_pipes[pipe]
            try:
                phases[rank].append(pipe.recv())
            except (EOFError, OSError):
                del open_pipes[pipe]
                continue
            if strike is None or struck or rank != strike.rank or not phases[rank][-1].startswith(strike.phase):
                continue
            if sum(phase.startswith(strike.phase) for phase in phases[rank]) == strike.count:
                time.sleep(strike.delay)
                for _ in range(strike.times):
                    if processes[rank].is_alive():
                        os.kill(processes[rank].pid, strike.kind)
                        struck = True
    return phases, struck


# --- the run ----------------------------------------------------------------------------------------------------------

STEPS, SAVE = 24, 3
PHASES = {  # phase -> how often a life can come to it
    "reading the data": 1,
    "loading the model": 1,
    "restoring": 1,
    "the evaluation": 2,
    "step": 9,
    "the exchange": 2,
    "saving": 3,
    "the export": 1,
}


def place(folder: Path) -> None:
    """Write a small LLaMA with a tokenizer of bytes, and sums to learn."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rows = [{"prompt": f"{i} + 1 =", "completion": str(i + 1)} for i in range(120)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments_of(folder: Path, output: Path, engine: str, **changes: object) -> list[str]:
    settings = {
        "model_name_or_path": folder / "model",
        "output_dir": output,
        "data.dataset": folder / "data.jsonl",
        "data.held_out": 8,
        "data.max_length": 64,
        "max_steps": STEPS,
        "warmup_steps": 1,
        "logging_steps": 1,
        "method.type": "srlora",
        "method.rank": 4,
        "method.target_rank": 8,
        "method.svd_cache": "",
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "engine": engine,
        "report_to": "none",
        "save_merged": False,
        "save_steps": SAVE,
        "ddp_timeout": 30,
        "resume_from_checkpoint": "auto",
        **changes,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def result(output: Path) -> tuple[bytes, list[tuple[int, float]]]:
    """Return the bytes of the adapter and the losses."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]
    return (output / "adapter" / "adapter_model.safetensors").read_bytes(), losses


def drawn(draw: random.Random) -> Strike:
    phase = draw.choice(sorted(PHASES))
    kind = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1])
    return Strike(
        phase, kind, draw.randrange(2), draw.choice([0.0, 0.0, draw.uniform(0, 0.05)]), draw.randint(1, PHASES[phase])
    )


def soak(folder: Path, kills: int, seed: int, engine: str) -> dict[str, Any]:
    """Kill ranks and return the counts. AssertionError if a life hung or a run ended with another result."""
    place(folder)
    whole = live(arguments_of(folder, folder / "whole", engine))
    assert whole.codes == [0, 0], whole.said[-3000:]
    wanted, draw = result(folder / "whole"), random.Random(seed)
    counts: Counter[str] = Counter()
    slowest, done, output, lives, runs = 0.0, 0, folder / "run", 0, 0
    with tqdm(total=kills, unit="kill") as bar:
        while done < kills or output.exists():  # the last run comes to its end, too
            strike = drawn(draw) if done < kills else None
            life, lives = live(arguments_of(folder, output, engine), strike=strike), lives + 1
            assert None not in life.codes, f"{strike}: exit codes {life.codes}, a rank hung:\n{life.said[-3000:]}"
            if life.struck and strike is not None and life.codes != [0, 0]:
                assert life.codes[strike.rank] != 0, (strike, life.codes, life.said[-3000:])
                done, slowest = done + 1, max(slowest, life.seconds)
                counts[f"{strike.phase}, {strike.kind.name}"] += 1
                bar.update()
            elif life.codes == [0, 0]:
                adapter, losses = result(output)
                assert adapter == wanted[0], "the adapter differs from the adapter of the uninterrupted run"
                assert losses == wanted[1], "the losses differ from the losses of the uninterrupted run"
                runs += 1
                shutil.rmtree(output)
            else:
                raise AssertionError(f"{strike}: exit codes {life.codes} without a signal:\n{life.said[-3000:]}")
    figures = {
        "kills": done,
        "lives": lives,
        "runs": runs,
        "seed": seed,
        "engine": engine,
        "slowest": round(slowest, 1),
    }
    return figures | {"counts": dict(sorted(counts.items()))}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Kill a run again and again and compare its end.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["deepspeed", "fsdp", "plain"], default="deepspeed")
    args = parser.parse_args(argv)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = soak(Path(folder), args.kills, args.seed, args.engine)
    for what, count in report.pop("counts").items():
        print(f"{count:5d}  {what}")
    print(json.dumps(report | {"seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
