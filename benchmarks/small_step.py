"""A step of the quality benchmark's small model, as a multiple of a bare loop's.  python benchmarks/small_step.py

    bare    the same LLaMA and LoRA in functions of plain torch: no modules, no mask, no padding; the same optimizer
    short   the bare loop without what no answer needs: the last token, and in the last layer all positions but the
            answer's, save for keys and values
    lora    the library: Batches, transformers' LLaMA, the adapters, the plain engine
    dora, core  so, too; bare has no counterpart of them

A small model shows what a step costs beside its products: Python, and operators on little data. With --batch 1 nearly
nothing else is left. All arms run in one process of one thread, one after the other in each round, the order turned by
one from round to round. The figures are ratios of CPU time to the bare loop's in the same round, and the ratio of the
least times, which other programs on the machine disturb least.

Besides, a round judges the held-out examples, as a run of the benchmark does nine times, and at the start CORE looks at
its calibration samples. Both are given in steps of the bare loop.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.families import FAMILIES, LENGTH, examples
from benchmarks.quality import CLIP, IGNORE, Base, Small, fresh, judged, labelled, quiet
from benchmarks.step_time import cpu_name, own_rows
from llm_lowrank.adapters.adapter import Adapter, generator
from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.adapters.redirect import make_step
from llm_lowrank.codecs import Dense
from llm_lowrank.data import Batches
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.core import Core
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.optimizers import Optimization
from llm_lowrank.run.calibration import calibrate_on, first_samples
from llm_lowrank.run.held_out import batch_loss

SMALL, RATE = Small(), 1e-3
QUERY, KEY, VALUE, OUT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
SHIFTED = FAMILIES["digits"].shifted
GATE, UP, DOWN = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def batches(size: int) -> Batches:
    return Batches(labelled(examples(SHIFTED, SMALL.train, generator(0, "training"))), size, pad_id=0)


class Library:
    """A method of the library on the small model."""

    def __init__(self, model: LlamaForCausalLM, batch: int, method: Method) -> None:
        self.method, self.made, self.batches = method, 0, batches(batch)
        self.adapters: list[Adapter] = attach(model, method, Dense(torch.float32))
        optim = "sgd" if method.own_step else "adamw"
        settings = Optimization(RATE, optim=optim, max_grad_norm=0.0 if method.directs else CLIP)
        self.engine = Plain()
        self.model = self.engine.wrap(model, settings, own_rows)
        for adapter in self.adapters:
            adapter.started()
        method.start(self.adapters, self.engine)
        self.model.train()

    def step(self) -> float:
        """Make a step; return its loss."""
        (micro,) = self.batches.step(self.made)
        rates = self.method.rates(self.adapters, self.made, SMALL.steps, lambda step: RATE)
        self.method.batch(self.adapters, self.made, micro.samples)
        loss = batch_loss(self.model, micro, self.engine.device) / micro.tokens
        self.engine.backward(loss)
        self.method.observe(self.adapters, self.engine)
        make_step(self.engine, self.method, self.adapters, self.made, rates, CLIP)
        self.made += 1
        return float(loss.detach())

    def calibrate(self) -> None:
        micros = first_samples(self.batches, self.method.calibration)
        tokens = sum(int((micro.labels[:, 1:] != IGNORE).sum()) for micro in micros)
        losses = lambda: (batch_loss(self.model, m, self.engine.device) / tokens for m in micros)  # noqa: E731
        calibrate_on(self.engine, self.model, self.method, self.adapters, losses)


@dataclass
class Pair:
    """A frozen weight with LoRA's pairs, plain."""

    W: Tensor
    A: Tensor
    B: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W) + F.linear(F.linear(x, self.A), self.B)


class Bare:
    """The same loop without the library: the model's tensors and functions of torch."""

    def __init__(self, model: LlamaForCausalLM, batch: int, short: bool = False) -> None:
        self.config, self.short, self.made, self.batches = model.config, short, 0, batches(batch)
        self.tensors = {name: p.detach() for name, p in model.named_parameters()}
        self.pairs: dict[str, Pair] = {}
        for name, linear in model.named_modules():
            if isinstance(linear, nn.Linear) and name != "lm_head":
                (m, n), bound = linear.weight.shape, 1 / math.sqrt(linear.weight.shape[1])
                A = torch.empty(SMALL.rank, n).uniform_(-bound, bound).requires_grad_()
                self.pairs[name] = Pair(linear.weight.detach(), A, torch.zeros(m, SMALL.rank, requires_grad=True))
        self.trained = [t for pair in self.pairs.values() for t in (pair.A, pair.B)]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=True)
        size = model.config.head_dim
        angles = torch.outer(torch.arange(32.0), 10000 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.config.rms_norm_eps)

    def rotated(self, x: Tensor, first: int) -> Tensor:
        """Turn queries or keys (batch, heads, t, d) of the positions from `first` on."""
        at = slice(first, first + x.shape[2])
        left, right = x.chunk(2, -1)
        return x * self.cos[at] + torch.cat([-right, left], -1) * self.sin[at]

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of the answers, (batch, LENGTH, symbols)."""
        if self.short:
            tokens = tokens[:, :-1]
        length = tokens.shape[1]
        x, heads = self.tensors["model.embed_tokens.weight"][tokens], self.config.num_attention_heads
        for number in range(self.config.num_hidden_layers):
            layer = f"model.layers.{number}"
            first = length - LENGTH if self.short and number == self.config.num_hidden_layers - 1 else 0
            h = self.norm(x, f"{layer}.input_layernorm")
            q, k, v = (
                self.pairs[f"{layer}.{part}"](rows).unflatten(-1, (heads, -1)).transpose(1, 2)
                for part, rows in ((QUERY, h[:, first:]), (KEY, h), (VALUE, h))
            )
            causal = torch.ones(length, length, dtype=torch.bool).tril()[first:] if first else None
            mixed = F.scaled_dot_product_attention(
                self.rotated(q, first), self.rotated(k, 0), v, attn_mask=causal, is_causal=causal is None
            )
            x = x[:, first:] + self.pairs[f"{layer}.{OUT}"](mixed.transpose(1, 2).flatten(2))
            h = self.norm(x, f"{layer}.post_attention_layernorm")
            gate, up, down = (self.pairs[f"{layer}.{part}"] for part in (GATE, UP, DOWN))
            x = x + down(F.silu(gate(h)) * up(h))
        x = x if self.short else x[:, length - LENGTH - 1 : -1]
        return F.linear(self.norm(x, "model.norm"), self.tensors["lm_head.weight"])

    def step(self) -> float:
        (micro,) = self.batches.step(self.made)
        loss = F.cross_entropy(self.logits(micro.input_ids).flatten(0, 1), micro.labels[:, -LENGTH:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.made += 1
        return loss.item()


def taken(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of a small model, relative to a bare loop's.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="in each round")
    parser.add_argument("--batch", type=int, default=SMALL.batch, help="examples of a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    quiet()
    base = Base()
    methods = {"lora": LoRA(rank=SMALL.rank), "dora": DoRA(rank=SMALL.rank), "core": Core(like_rank=SMALL.rank)}
    arms: dict[str, Library | Bare] = {
        "bare": Bare(fresh(base), args.batch),
        "short": Bare(fresh(base), args.batch, short=True),
    }
    arms |= {name: Library(fresh(base), args.batch, method) for name, method in methods.items()}
    core, lora = arms["core"], arms["lora"]
    assert isinstance(core, Library) and isinstance(lora, Library)
    calibration = taken(core.calibrate)
    losses = {name: arm.step() for name, arm in arms.items()}  # of the function at the start, which is everybody's
    assert max(losses.values()) - min(losses.values()) < 1e-4, f"the arms do not compute the same function: {losses}"
    held_out = examples(SHIFTED, SMALL.held_out, generator(0, "reported"))
    seconds: dict[str, list[float]] = {name: [] for name in (*arms, "judged")}
    for i in range(args.rounds):
        names = list(arms)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(sum(taken(arms[name].step) for _ in range(args.steps)) / args.steps)
        seconds["judged"].append(taken(lambda: judged(lora.model, held_out)))
    seconds["calibration"] = [calibration] * args.rounds
    print(f"rounds={args.rounds} steps={args.steps} batch={args.batch} torch={torch.__version__} {cpu_name()}")
    print(
        f"{'':12}{'median':>8}{'min':>8}{'max':>8}{'least':>8}{'ms':>9}   ratios of CPU time to a step of the bare loop"
    )
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["bare"], strict=True)]
        figures = (statistics.median(ratios), min(ratios), max(ratios), min(times) / min(seconds["bare"]))
        print(f"{name:12}{''.join(f'{x:8.2f}' for x in figures)}{1000 * statistics.median(times):9.1f}")


if __name__ == "__main__":
    main()
