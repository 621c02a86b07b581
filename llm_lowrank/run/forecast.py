"""The time of a step on a GPU that is not at hand, and the bytes that it sends, from data sheets. A prediction.

    computing   hardware FLOPs (flops.py) / (PRODUCTS x peak), or where it takes longer the bytes of the weights in all
                passes / (MEMORY x bandwidth); then the bytes that decoding reads and writes / (MEMORY x bandwidth)
    links       bytes that a rank receives / (LINKS x speed); over several nodes the speed of a ring is that of a GPU's
                link or of its node's network, whichever is less
    a step      between max(computing, links), if everything is hidden behind the products, and their sum

Received by a rank in a step, with W, K, T of the memory table, N ranks, f = (N - 1) / N, a micro-batches:

    plain       2 f T                           an all-reduce of the gradients, after the last micro-batch
    ZeRO-1      2 f T                           gradients to their owners, new values back
    ZeRO-2      (a + 1) f T                     gradients after each micro-batch
    ZeRO-3      f (2 a G + P + a T)             G is gathered for each forward and again for its backward; P, the small
                                                parameters, once; G + P = W + K + T
    FSDP2       f (a (R + 2 L) + T)             R: the root group; L: all layers, once if they stay gathered
                                                (reshard_after_forward: false); replicas add 2 T / N (r - 1) / r, and N
                                                is then the ranks that share one of the r copies

Sources: rings, https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md; ZeRO, https://arxiv.org/abs/1910.02054
section 7.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_lowrank.engines import Held, Sizes
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.flops import Work, full_shape
from llm_lowrank.run.hardware import GPUS, GPUS_PER_NODE, Gpu
from llm_lowrank.run.memory import Column, cells
from llm_lowrank.run.recipe import Recipe

PRODUCTS, MEMORY, LINKS = 0.4, 0.8, 0.7  # assumed shares of the peak figures

Traffic = list[tuple[float, int]]  # bytes that a rank receives in a step, and the ranks among which they travel


def ranks(recipe: Recipe, world: int) -> tuple[int, int]:
    """Return the ranks and the nodes of a dry run. Without a launcher, `nodes` have GPUS_PER_NODE ranks each.

    RecipeError if the launcher's ranks do not fill the nodes evenly.
    """
    if recipe.nodes is None:
        return world, math.ceil(world / GPUS_PER_NODE)
    if world == 1:
        return recipe.nodes * GPUS_PER_NODE, recipe.nodes
    if world % recipe.nodes:
        raise RecipeError(f"nodes: {world} ranks do not fill {recipe.nodes} nodes evenly; give another number of nodes")
    return world, recipe.nodes


def forecast(recipe: Recipe, work: Work, ways: Sequence[Column], sizes: Sizes, world: int, nodes: int) -> str:
    """Return the predicted time of a step and its traffic, under each engine, with the assumptions."""
    gpu = GPUS[recipe.gpu]
    lines = [cells(f"predicted step on {recipe.gpu}, {world} rank(s)", [way.heading for way in ways])]
    columns: list[list[float]] = []
    for way in ways:
        step = predict_step(recipe, work, way.held, sizes, gpu, world, nodes)
        mfu = 100 * step.model_flops / step.least / (gpu.peak(recipe.dtype) * 1e12)
        times = [step.computing, step.links, step.least, step.most]
        columns.append([step.received / 1e9, *times, step.tokens / step.least, mfu])
    labels = ["received over links, GB a rank", "computing, s", "links, s", "step, links hidden, s"]
    labels += ["step, links not hidden, s", "tokens/s per GPU, links hidden", "MFU, links hidden, %"]
    for label, row in zip(labels, zip(*columns, strict=True), strict=True):
        lines.append(cells(label, [_number(value) for value in row]))
    return "\n".join([*lines, *_assumptions(recipe, gpu, world, nodes)])


@dataclass(frozen=True)
class Step:
    """A predicted step of full rows, on one of the ranks."""

    received: float  # bytes
    computing: float  # seconds, as all that follow
    links: float
    tokens: int
    model_flops: float

    @property
    def least(self) -> float:
        """With all traffic hidden behind the products."""
        return max(self.computing, self.links)

    @property
    def most(self) -> float:
        """With none of it hidden."""
        return self.computing + self.links


def predict_step(recipe: Recipe, work: Work, held: Held, sizes: Sizes, gpu: Gpu, world: int, nodes: int) -> Step:
    """Return the predicted step of a recipe under one way to spread the model."""
    accumulation = recipe.gradient_accumulation_steps
    shape = full_shape(recipe.per_device_train_batch_size, recipe.data.max_length)
    sent = traffic(held, sizes, recipe, world)
    return Step(
        received=sum(nbytes for nbytes, _ in sent),
        computing=accumulation * computing_time(work, recipe, gpu),
        links=sum(nbytes / (LINKS * speed(gpu, among, world, nodes)) for nbytes, among in sent),
        tokens=accumulation * int(shape.lengths.sum()),
        model_flops=accumulation * work.model(shape),
    )


def computing_time(work: Work, recipe: Recipe, gpu: Gpu) -> float:
    """Return the seconds that a GPU computes for a full micro-batch."""
    shape = full_shape(recipe.per_device_train_batch_size, recipe.data.max_length)
    passes = 3 if recipe.gradient_checkpointing else 2
    products = work.hardware(shape) / (PRODUCTS * gpu.peak(recipe.dtype) * 1e12)
    bandwidth = MEMORY * gpu.memory * 1e9
    return max(products, passes * work.weights / bandwidth) + passes * work.decoding / bandwidth


def speed(gpu: Gpu, among: int, world: int, nodes: int) -> float:
    """Return the bytes per second that a rank can receive in a ring of so many ranks."""
    within = among <= world // nodes
    return 1e9 * (gpu.link if within else min(gpu.link, gpu.network))


def traffic(held: Held, sizes: Sizes, recipe: Recipe, world: int) -> Traffic:
    """Return what a rank receives in a step under one way to spread the model."""
    a = recipe.gradient_accumulation_steps
    w, k, t = sizes.parts
    f = (world - 1) / world
    if held.title == "ZeRO-3":
        small = held.persistent[0]
        return [(f * (2 * a * (w + k + t - small) + small + a * t), world)]
    if held.title == "FSDP2":
        sharding = recipe.fsdp if recipe.engine == "fsdp" else Sharding()
        shards = sharding.shards(world)
        replicas = world // shards
        root, times = w + k + t - sizes.layers, 2 if sharding.reshard_after_forward else 1
        gathered = (shards - 1) / shards * (a * (root + times * sizes.layers) + t)
        return [(gathered, shards), (2 * t / shards * (replicas - 1) / replicas, world)]
    times = {"plain": 2, "ZeRO-1": 2, "ZeRO-2": a + 1}[held.title]
    return [(times * f * t, world)]


def _assumptions(recipe: Recipe, gpu: Gpu, world: int, nodes: int) -> list[str]:
    rows, length = recipe.per_device_train_batch_size, recipe.data.max_length
    lines = [
        "A prediction from data sheets; nothing of it was measured. Assumed:",
        f"  rows: {rows} of data.max_length = {length} tokens, all trained; with shorter rows a step takes less",
        f"  products: {PRODUCTS:.0%} of {gpu.peak(recipe.dtype):g} TFLOP/s ({gpu.names[0]}, dense, {recipe.dtype}); "
        f"weights and decoding: {MEMORY:.0%} of {gpu.memory:g} GB/s",
    ]
    if world > 1:
        over = f" and {gpu.network:g} GB/s for a node's network" if nodes > 1 else ""
        lines.append(
            f"  links: {LINKS:.0%} of {gpu.link:g} GB/s in one direction between GPUs{over}; "
            f"{nodes} node(s) of {world // nodes} GPUs"
        )
        lines.append("  overlap: all of the traffic is hidden behind the products, or none of it")
    lines.append(
        "Not counted: exchanges, evaluation, checkpoints, reading data, offloading to the host, waiting for ranks"
    )
    return lines


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
