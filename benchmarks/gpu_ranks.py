"""What one GPU cannot show.  torchrun --nproc_per_node N benchmarks/gpu.py --out OUT --ranks

    laws      short runs of the tests' tiny LLaMA over all ranks: DDP, ZeRO-1, 2 and 3, FSDP2, FSDP2 with replicas, and
              the offloads, each compared with the plain engine of one rank on the same global batch
              and, with LoRA, the codes and scales that the engines gather with that engine's, bitwise
    links     how fast the ranks gather bytes and sum floats
    steps     seconds of a training step of a few layers of --config, beside those of one rank without the others

What one rank computes alone is computed before the ranks meet. They meet once; a collective that stands still ends all
ranks after PATIENCE seconds, and what was found until then is in OUT/results.json. Not tried: ranks that die, several
nodes.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

PATIENCE = 120.0
TITLES = {
    "ranks_laws": "Four steps over all ranks, compared with the plain engine of one rank.",
    "ranks_links": "Collectives over all ranks; GB/s: bytes that a rank has at the end, per second.",
    "ranks_steps": "A training step, optimizer included, with the same tokens on each rank; ratio: to one rank alone.",
}


def main(args: argparse.Namespace, machine: Callable[[argparse.Namespace], str]) -> int:
    """Everything, on every rank; return the exit code."""
    world, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_RANK"))
    import torch
    import torch.distributed as dist

    if args.device == "cuda":
        torch.cuda.set_device(local)
    from benchmarks.gpu_results import Results, bad_rows, read, table

    card = f"{world} x {machine(args)}"
    found = {item: Results(item, args.out, card, 300, args.small, silent=os.environ["RANK"] != "0") for item in TITLES}

    # alone
    os.environ["WORLD_SIZE"] = "1"
    cells = list(laws(args, world))
    wanted = {(label, dtype): plain(label, dtype, world) for _, _, label, dtype, _ in cells}
    alone = {name: training(args, "plain", name) for name in STEPS}
    os.environ["WORLD_SIZE"] = str(world)

    # together
    backends = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backends, timeout=datetime.timedelta(seconds=PATIENCE))
    for name, engine, label, dtype, settings in cells:
        cell = partial(compared, engine, label, dtype, settings, wanted[label, dtype])
        found["ranks_laws"].cell(name, partial(everywhere, cell))
    links(args, found["ranks_links"])
    for name, one in alone.items():
        for engine in ("plain", "zero3", "fsdp"):
            figures = partial(stepped, args, engine, name, one)
            found["ranks_steps"].cell(f"{'ddp' if engine == 'plain' else engine} {name}", figures)
    dist.barrier()
    dist.destroy_process_group()
    if os.environ["RANK"] != "0":
        return 0
    known = read(args.out)
    known["machine"]["card"] = card
    (args.out / "ranks.md").write_text(table(known, TITLES))
    bad = bad_rows(known, TITLES)
    print(f"{len(bad)} failed" + "".join(f"\n  {line}" for line in bad))
    return 1 if bad else 0


# --- laws -------------------------------------------------------------------------------------------------------------


def laws(args: argparse.Namespace, world: int) -> list[tuple[str, str, str, str, dict[str, Any]]]:
    """(name, engine, method, stored type, settings of the engine) of every cell."""
    from benchmarks.gpu_laws import SHARDED, TYPES, host, refused

    plans: list[tuple[str, str, dict[str, Any]]] = [
        ("ddp", "plain", {}),
        *((name, name, {}) for name in ("zero1", "zero2", "zero3", "fsdp")),
        *((f"{name} offload", name, host(name)) for name in ("zero2", "zero3", "fsdp")),
    ]
    if world % 2 == 0:
        replicas = {"shard_size": world // 2}
        plans += [("fsdp replicas", "fsdp", replicas)]
        plans += [("fsdp replicas offload", "fsdp", replicas | {"cpu_offload": True})]
    found = []
    for name, engine, settings in plans:
        labels = ("srlora-bank", "srlora-weight") if "offload" in name else SHARDED
        for label in labels[:2] if args.small else labels:
            for dtype in TYPES[1:3] if args.small or "offload" in name else TYPES:
                if not refused(label, dtype):
                    found.append((f"{name} {label} {dtype}", engine, label, dtype, settings))
    return found


def plain(label: str, dtype: str, world: int) -> dict[str, Any]:
    """What one rank comes to alone: logits, and the bytes of the frozen parts."""
    from benchmarks.gpu_laws import lived

    t, _ = lived(label, "plain", dtype, samples=2 * world)
    return {"logits": t.logits(), "parts": parts(t)}


def parts(t: Any) -> dict[str, Any]:
    """The stored bytes of every frozen weight, gathered, without rows of padding."""
    from llm_lowrank.engines.frozen import FrozenLinear

    frozen = {name: m for name, m in t.model.named_modules() if isinstance(m, FrozenLinear)}
    return {
        f"{name}.{k}": t.engine.whole(p)[: m.shape[0]].cpu()
        for name, m in frozen.items()
        for k, p in m.named_parts().items()
    }


def compared(engine: str, label: str, dtype: str, settings: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    from benchmarks.gpu_laws import LIMITS, apart, lived

    t, drift = lived(label, engine, dtype, samples=2 * dist.get_world_size(), zero=settings)
    found = apart(t.logits(), wanted["logits"])
    row = {"apart": found, "drift": drift, "good": found <= LIMITS[dtype]}
    if label == "lora":  # another method may have changed W, or taken pairs out of it that only nearly agree
        same = all(part.equal(wanted["parts"][name]) for name, part in parts(t).items())
        row |= {"same bytes": same, "good": row["good"] and same}
    return row


def everywhere(cell: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A cell on every rank: the row of the rank that is furthest off; RuntimeError if it failed on one."""
    import torch.distributed as dist

    from benchmarks.gpu_results import failure

    try:
        mine = cell()
    except Exception as error:
        mine = failure(error)
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, mine)
    for rank, row in enumerate(rows):
        if "error" in row:
            raise RuntimeError(f"rank {rank}: {row['error']}\n{row['trace']}")
    return max(rows, key=lambda row: (not row["good"], row["apart"]))


# --- figures ----------------------------------------------------------------------------------------------------------


def links(args: argparse.Namespace, results: Any) -> None:
    import torch
    import torch.distributed as dist

    from benchmarks.gpu_device import DEVICE, median_of

    world, size = dist.get_world_size(), 2**16 if args.small else 2**28
    mine = torch.zeros(size // world // 4 * 4, dtype=torch.uint8, device=DEVICE)
    whole = torch.zeros(len(mine) * world, dtype=torch.uint8, device=DEVICE)
    floats = torch.zeros(size // 4, device=DEVICE)

    def rate(call: Callable[[], object], nbytes: int) -> dict[str, float]:
        seconds = median_of(call)
        return {"ms": 1e3 * seconds, "GB/s": nbytes / seconds / 1e9}

    gather = partial(dist.all_gather_into_tensor, whole, mine)
    results.cell(f"gather {whole.nbytes / 1e6:.0f} MB of bytes", partial(rate, gather, whole.nbytes))
    total = partial(dist.all_reduce, floats)
    results.cell(f"sum {floats.nbytes / 1e6:.0f} MB of floats", partial(rate, total, floats.nbytes))


STEPS = ("bf16", "nf4")


def training(args: argparse.Namespace, engine: str, dtype: str) -> dict[str, float]:
    """Seconds of a step of four layers, and the peak of this rank's memory."""
    import torch

    from benchmarks.gpu_device import median_of, peak, reset_peak, start
    from benchmarks.gpu_models import KINDS, loaded, tokens
    from llm_lowrank.codecs import Dense, Nf4
    from llm_lowrank.models.loss import sum_loss
    from tests import tiny

    start()
    codec = Nf4(torch.bfloat16) if dtype == "nf4" else Dense(torch.bfloat16)
    layers = 2 if args.small else 4
    trained = loaded(args, KINDS["lora"](rank=args.rank), codec, layers, tiny.engine(engine))
    ids, output = tokens(args), trained.model.get_output_embeddings()
    labels, count = ids.cpu(), trained.engine.world * (ids.shape[1] - 1)

    def step() -> None:
        loss = sum_loss(trained.wrapped, {"input_ids": ids}, labels, output)
        trained.engine.backward(loss / count)
        trained.engine.step(1e-4)

    step()
    reset_peak()
    return {"ms": 1e3 * median_of(step, 2, args.rounds), **peak()}


def stepped(args: argparse.Namespace, engine: str, dtype: str, one: dict[str, float]) -> dict[str, Any]:
    import torch.distributed as dist

    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, training(args, engine, dtype))
    ms = statistics.median(row["ms"] for row in rows)
    tokens = 1e3 * args.tokens * len(rows) / ms
    most = {key: max(row[key] for row in rows) for key in rows[0] if key != "ms"}
    return {"ms": ms, "ratio": ms / one["ms"], "tokens/s of all": tokens, **most}
