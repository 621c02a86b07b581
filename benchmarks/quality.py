"""What the methods learn in the same steps.

    python benchmarks/quality.py WHAT [--output FOLDER]

    small   a LLaMA of 0.9 M parameters, pre-trained here on one family of string tasks, then adapted to a shifted one
    controls  CORE in the same setting, on ten other seeds, beside runs that take one of its parts away or spend what it
              spends in another way
    remedies  LoRA with exchanges by gradient energy, and with turns of its pairs, on the seeds of `controls`
    scores  SRLoRA with each of its scores, and how many fresh pairs every exchange replaces again
    tables, places  some of these methods on two other families of string tasks
    places_short  the same on `places` in a third of the steps, in which no method has learned everything
    long    CORE with exchanges, in runs of twice the steps on `tables`
    real    SmolLM2-135M-Instruct, adapted to reasoning-gym:chain_sum with the settings of recipes/demo.yaml
    real_scores  SRLoRA with each of its scores on that model, in runs of a third of the steps
    table   writes the tables and the curves of docs/quality.md from the results of the runs

All methods have the same data, batches, steps, tokens, warm-up and cosine, clipping, AdamW without weight decay (RaSA
too), and modules: all linears of the decoder layers, and for LoSiA the output layer too, if it is not tied to the
embeddings. They have about the same number of trainable parameters: methods that train pairs have rank r, and LoSiA's
share of rows and columns is the one whose count is nearest to LoRA's. Each method gets its own learning rate, tuned
over the same grid with seeds that are not reported: the rate with the highest exact match is taken, and among equal
ones the rate with the lowest loss. The scale s is 1 except where a method says otherwise (rsLoRA: sqrt r; RaSA: its d
and e). Schedules of methods that exchange what they train are scaled to the run.

A seed decides the training examples, their order and how the adapters start; for `real` also the held-out questions.
In `small` a rate is chosen on one fixed set of examples, and another fixed set is reported.

Exact match of `small` is teacher-forced: every token of the answer must be the most likely token after the right
tokens before it. This is the case exactly if greedy decoding writes the answer. `real` generates.

Every run writes one JSON file, named by its method, rate and seed; a run whose file exists is not repeated. --jobs N
uses N processes of one thread each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args

import draccus
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.families import FAMILIES, LENGTH, SYMBOLS, examples
from benchmarks.remedies import REMEDIES, SCORES, Remedy, remedies, scores
from llm_lowrank.adapters.adapter import Adapter, generator
from llm_lowrank.adapters.direction import Direction
from llm_lowrank.adapters.exchange import Into
from llm_lowrank.adapters.method import ALL_LINEAR, Method, attach, find_targets, output_layer
from llm_lowrank.adapters.redirect import make_step
from llm_lowrank.codecs import Dense
from llm_lowrank.data import IGNORE, Batches, Example, MicroBatch
from llm_lowrank.engines.base import Engine, Optimization
from llm_lowrank.engines.plain import Plain
from llm_lowrank.evaluation.record import origin
from llm_lowrank.methods.core import Core
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.droplora import DropLoRA
from llm_lowrank.methods.flat_lora import FlatLoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.lora_ga import LoRAGA
from llm_lowrank.methods.lora_one import LoRAOne
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models import loading
from llm_lowrank.models.architectures import skeleton
from llm_lowrank.models.source import DEMO, Source
from llm_lowrank.numerics.files import write_json, write_text
from llm_lowrank.numerics.schedule import Schedule
from llm_lowrank.run.build import build_model
from llm_lowrank.run.calibration import calibrate_on, first_samples
from llm_lowrank.run.held_out import batch_loss
from llm_lowrank.run.recipe import Recipe
from llm_lowrank.run.train import train

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quality.md"
TITLES = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "pissa": "PiSSA",
    "pissa_subspace": "PiSSA's subspace, B = 0",
    "dora": "DoRA",
    "srlora": "SRLoRA",
    "rasa": "RaSA",
    "droplora": "DropLoRA",
    "relora": "ReLoRA",
    "losia": "LoSiA",
    "lora_plus": "LoRA+",
    "riemannian": "Riemannian",
    "reflora": "RefLoRA",
    "reflora_s": "RefLoRA-S",
    "lora_rite": "LoRA-RITE",
    "lora_pro": "LoRA-Pro",
    "altlora": "AltLoRA",
    "flat_lora": "Flat-LoRA",
    "lora_ga": "LoRA-GA",
    "lora_one": "LoRA-One",
    "core": "CORE",
    "full": "all parameters",
}
CONTROLS = {
    "core": "CORE, as many parameters as LoRA of rank r",
    "core_small": "CORE, p = 3 r",
    "core_random": "CORE between random bases",
    "core_fixed": "CORE without turns: plain Adam on S",
    "core_small_random": "CORE, p = 3 r, between random bases",
    "core_small_fixed": "CORE, p = 3 r, without turns",
    "core_small_exchanged": "CORE, p = 3 r, with an exchange after half of the steps",
    "core_shared": "CORE, V shared by modules of one input",
    "core_small_shared": "CORE, p = 3 r, V shared by modules of one input",
    "lora": "LoRA, rank r",
    "core_one_pass": "CORE, bases of one pass (svd_niter 0)",
    "core_exact": "CORE, bases to rounding (svd_niter 10)",
    "lora_wide": "LoRA, rank 5.6 r: CORE's FLOPs",
    "rslora_wide": "rsLoRA, rank 5.6 r",
    "lora_plus_wide": "LoRA+, rank 5.6 r",
    "lora_soap": "LoRA, rank r, with SOAP on both sides",
    "lora_soap_small_side": "LoRA, rank r, with SOAP on the r x r side alone",
    "dora": "DoRA, rank r",
    "losia": "LoSiA",
    "full_muon": "all weights of the linears, Muon",
    "full_soap": "all weights of the linears, SOAP",
}
LONG = {
    "lora": "LoRA, rank r",
    "once": "CORE, p = 2 r, without an exchange",
    "one_into_weight": "CORE, p = 2 r, one exchange, into W",
    "three_into_weight": "CORE, p = 2 r, three exchanges, into W",
    "one_into_bank": "CORE, p = 2 r, one exchange, into the bank",
    "three_into_bank": "CORE, p = 2 r, three exchanges, into the bank",
}
IN_FAMILIES = ("core", "core_small", "core_random", "lora", "dora", "losia")  # in the comparisons on other families
CLIP = 1.0  # max_grad_norm
# Settings that were added after the first runs: with these values a method is what it was before.
LATER: dict[str, Any] = {
    "exclude_modules": [],
    "export_rank": None,
    "subspace": False,
    "b_rate": 1.0,
    "direction": {"type": "none"},
    "score": "paper",
    "exchanges": [],
    "into": "auto",
    "share_v": False,
    "adapter": "",
    "adapter_role": "trained",
    "trains": "AB",
}
RENAMED = {"max_export_rank": "export_rank"}  # settings of methods in older files: their names now
DIRECTIONS = {name: kind for name, kind in Direction.get_known_choices().items() if name != "none"}
WINDOWS = 20  # points of the curve of the training loss
LOOKS = 8  # points of the curve of the held-out loss
AT_ONCE = 128  # examples of a forward that judges: the memory of all of them at once would be fetched anew every time

# --- examples -------------------------------------------------------------------------------------------------------


def labelled(tokens: Tensor) -> list[Example]:
    """Return the labels: only answers are trained."""
    return [Example(row, [IGNORE] * (len(row) - LENGTH) + row[-LENGTH:]) for row in tokens.tolist()]


def answered(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (count * 4, symbols) and tokens (count * 4) of the answers."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, -LENGTH - 1 : -1]
    return logits.flatten(0, 1), tokens[:, -LENGTH:].flatten()


@torch.no_grad()
def judged(model: nn.Module, tokens: Tensor) -> tuple[float, float]:
    """Return (mean loss of an answer's token, share of the answers that are right in all tokens)."""
    training, found = model.training, []
    model.eval()
    for some in tokens.split(AT_ONCE):
        logits, answers = answered(model, some)
        right = (logits.argmax(1) == answers).view(-1, LENGTH).all(1)
        found.append(torch.stack([nn.functional.cross_entropy(logits, answers, reduction="sum"), right.sum()]))
    model.train(training)
    loss, right = torch.stack(found).sum(0)
    return float(loss) / (len(tokens) * LENGTH), float(right) / len(tokens)


# --- the small model --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """The small model and its pre-training.

    Its output layer is not tied to the embeddings, so that LoSiA can train it as in its paper.
    """

    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    steps: int = 900
    batch: int = 64
    rate: float = 2e-3
    seed: int = 0
    family: str = "digits"  # of benchmarks/families.py


@dataclass(frozen=True)
class Small:
    """The setting of the small comparison."""

    base: Base = Base()
    steps: int = 300
    batch: int = 32
    warmup: int = 15
    rank: int = 8
    train: int = 4096  # examples
    held_out: int = 512


def pretrained(folder: Path, base: Base) -> Path:
    """Return the checkpoint of the model that knows its own family; train and write it if there is none."""
    note = folder / "pretrained.json"
    if note.is_file():
        if (made := {"family": "digits"} | json.loads(note.read_text())["settings"]) != asdict(base):
            raise ValueError(f"{folder} was pre-trained with other settings, {made}; choose another --output")
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    model, began = fresh(base), time.perf_counter()
    pretrain(model, base)
    family = FAMILIES[base.family]
    own, shifted = (judged(model, examples(rules, 1024, generator(0, "after pre-training")))[1] for rules in family)
    print(f"pre-trained: exact match {own:.1%} of its own family, {shifted:.1%} of the shifted one", flush=True)
    model.save_pretrained(folder)
    write_text(folder / ".gitignore", "*\n")  # a clone pre-trains again
    result = {
        "own": own,
        "shifted": shifted,
        "parameters": model.num_parameters(),
        "seconds": time.perf_counter() - began,
    }
    write_json(note, {"settings": asdict(base), "result": result, **origin()})  # last: now the folder is complete
    return folder


def fresh(base: Base) -> LlamaForCausalLM:
    torch.manual_seed(base.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SYMBOLS),
            hidden_size=base.hidden,
            intermediate_size=base.intermediate,
            num_hidden_layers=base.layers,
            num_attention_heads=base.heads,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def pretrain(model: LlamaForCausalLM, base: Base) -> None:
    """Train on new examples in every step."""
    random = generator(base.seed, "pre-training")
    optimizer = torch.optim.AdamW(model.parameters(), lr=base.rate, weight_decay=0.01)
    model.train()
    schedule = Schedule(base.rate, base.steps, warmup=base.steps // 12)
    for step in range(base.steps):
        tokens = examples(FAMILIES[base.family].own, base.batch, random)
        loss = nn.functional.cross_entropy(*answered(model, tokens))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 200 == 0:
            print(f"pre-training: step {step + 1} of {base.steps}, loss {loss.item():.3f}", flush=True)


# --- the methods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Full(Method):
    """Every parameter of the model is trained: what adapters are measured against. Not a method of the library: it
    shards nothing.
    """

    optimizer: str = "adamw"
    """adamw, or muon or soap for the weights of the decoder's linears alone."""

    def targets(self, model: nn.Module) -> dict[str, nn.Linear]:
        return {}

    def link(self, model: nn.Module, adapters: list[Adapter]) -> None:
        model.requires_grad_(self.optimizer == "adamw")
        if self.optimizer != "adamw":
            for linear in find_targets(model, [ALL_LINEAR]).values():  # type: ignore[arg-type]
                linear.weight.requires_grad_(True)

    def put_optimizer(self, engine: Plain, rate: float) -> None:
        """Replace the engine's optimizer, if it is another one. Muon's steps have the length of AdamW's."""
        if self.optimizer == "muon":
            engine.optimizer = torch.optim.Muon(
                engine.params, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
        elif self.optimizer == "soap":
            from benchmarks.soap import SoapOptimizer

            engine.optimizer = SoapOptimizer(engine.params, lr=rate)


def methods(model: PreTrainedModel, rank: int, steps: int, svd_cache: str) -> dict[str, Method]:
    """Return the settings of every method for a run of `steps` steps on this model (without values). Settings that are
    not named have the method's defaults.
    """
    return {
        "lora": LoRA(rank=rank),
        "rslora": LoRA(rank=rank, use_rslora=True),
        "pissa": PiSSA(rank=rank, svd_cache=svd_cache),
        "pissa_subspace": PiSSA(rank=rank, subspace=True, svd_cache=svd_cache),
        "dora": DoRA(rank=rank),
        "srlora": SRLoRA(rank=rank, target_rank=2 * rank, svd_cache=svd_cache),
        "rasa": RaSA(rank=rank),
        "droplora": DropLoRA(rank=rank),
        "relora": ReLoRA(rank=rank, interval=max(2, steps // 3), restart_warmup=max(1, steps // 30)),
        "losia": matched_losia(model, rank, steps),
        "lora_plus": LoRA(rank=rank, b_rate=16.0),
        **{
            name: LoRA(rank=rank, direction=kind())
            for name, kind in Direction.get_known_choices().items()
            if name != "none"
        },
        "flat_lora": FlatLoRA(rank=rank),
        "core": Core(like_rank=rank),
        "lora_ga": LoRAGA(rank=rank),
        "lora_one": LoRAOne(rank=rank),
        "full": Full(),
    }


def controls(model: PreTrainedModel, rank: int, steps: int, svd_cache: str) -> dict[str, Method]:
    """Return the settings of CORE and of its controls, as `methods` does."""
    from benchmarks.soap import SmallSide, Soap  # registers a direction, which no other comparison should know

    never, wide = 10 * steps, round(5.6 * rank)
    return {
        "core": Core(like_rank=rank),
        "core_small": Core(p=3 * rank),
        "core_random": Core(like_rank=rank, samples=0),
        "core_fixed": Core(like_rank=rank, interval=never),
        "core_small_random": Core(p=3 * rank, samples=0),
        "core_small_fixed": Core(p=3 * rank, interval=never),
        "core_small_exchanged": Core(p=3 * rank, exchanges=[steps // 2]),
        "core_shared": Core(like_rank=rank, share_v=True),
        "core_small_shared": Core(p=3 * rank, share_v=True),
        "lora": LoRA(rank=rank),
        "core_one_pass": Core(like_rank=rank, svd_niter=0),
        "core_exact": Core(like_rank=rank, svd_niter=10),
        "lora_wide": LoRA(rank=wide),
        "rslora_wide": LoRA(rank=wide, use_rslora=True),
        "lora_plus_wide": LoRA(rank=wide, b_rate=16.0),
        "lora_soap": LoRA(rank=rank, direction=Soap()),
        "lora_soap_small_side": LoRA(rank=rank, direction=SmallSide()),
        "dora": DoRA(rank=rank),
        "losia": matched_losia(model, rank, steps),
        "full_muon": Full(optimizer="muon"),
        "full_soap": Full(optimizer="soap"),
    }


def matched_losia(model: PreTrainedModel, rank: int, steps: int) -> LoSiA:
    """Return LoSiA with about LoRA's number of trainable parameters, the output layer's included; every layer has two
    exchanges, as far as the steps allow.

    An output layer that is tied to the embeddings is left out.
    """
    output = output_layer(model)
    tied = model.get_input_embeddings().weight is output.weight
    share = 0.0 if tied else LoSiA.output_factor
    shapes = [tuple(linear.weight.shape) for linear in find_targets(model, [ALL_LINEAR]).values()]
    m, n = output.weight.shape
    wanted = sum(rank * (m + n) for m, n in shapes) - int(share * m) * n

    def off(factor: float) -> int:
        return abs(sum(int(factor * m) * int(factor * n) for m, n in shapes) - wanted)

    period = max(1, steps // (2 * (model.config.num_hidden_layers + (not tied))))
    return LoSiA(factor=min((k / 1000 for k in range(1, 1001)), key=off), output_factor=share, period=period)


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """The settings in which the runs of a comparison differ."""

    method: str
    rate: float
    seed: int
    tuning: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}-rate{self.rate:g}-seed{self.seed}{'-tuning' * self.tuning}"


@dataclass
class Result:
    trainable: int
    exact_match: float = 0.0
    loss: float | None = None  # held-out; None: the run diverged
    train_curve: list[tuple[int, float]] = field(default_factory=list)  # (step, mean since the last point)
    held_out_curve: list[tuple[int, float]] = field(default_factory=list)
    exchanges: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (step, Method.metrics after it)
    seconds: float = 0.0


Methods = Callable[[PreTrainedModel, int, int, str], dict[str, Method]]  # of `methods` and `controls`


def run_small(checkpoint: Path, small: Small, spec: Spec, among: Methods = methods) -> Result:
    """Adapt the small model once. among: the function that knows the method."""
    source, engine = Source.open(checkpoint), Plain()
    model = skeleton(checkpoint, torch.float32, "sdpa")
    method = among(model, small.rank, small.steps, "")[spec.method]
    adapters = attach(model, method, Dense(torch.float32), spec.seed)
    loading.bind(model, adapters, source)
    settings = Optimization(
        spec.rate,
        optim="sgd" if method.own_step else "adamw",
        max_grad_norm=0.0 if method.directs else CLIP,
        micro_batch=small.batch,
    )
    if adapters:
        model, _ = loading.load(engine, model, adapters=adapters, method=method, tensors=source, settings=settings)
    else:
        model = engine.wrap(model, settings, partial(plain_rows, source))
        assert isinstance(method, Full), "only the whole model has no adapters"
        method.put_optimizer(engine, spec.rate)
    shifted = FAMILIES[small.base.family].shifted
    training = labelled(examples(shifted, small.train, generator(spec.seed, "training")))
    batches = Batches(training, small.batch, pad_id=0, seed=spec.seed)
    held_out = examples(shifted, small.held_out, generator(0, "chosen on" if spec.tuning else "reported")).to(
        engine.device
    )
    result = Result(sum(p.numel() for p in model.parameters() if p.requires_grad))
    return adapt(engine, model, adapters, method, batches, held_out, small, spec.rate, result)


def plain_rows(source: Source, name: str, module: nn.Module, rows: dict[str, slice]) -> dict[str, Tensor]:
    """Read for an engine the rows of a module from a checkpoint that holds the model alone."""
    return {k: source.rows(f"{name}.{k}", at.start, at.stop) for k, at in rows.items()}


def adapt(
    engine: Engine,
    model: nn.Module,
    adapters: list[Adapter],
    method: Method,
    batches: Batches,
    held_out: Tensor,
    small: Small,
    peak: float,
    result: Result,
) -> Result:
    """Run the training loop on one process and return the result."""
    began, total, since = time.perf_counter(), small.steps, []
    exchange_steps = method.schedule(total, adapters)
    schedule = Schedule(peak, total, warmup=small.warmup)
    if method.calibration:
        look(engine, model, method, adapters, first_samples(batches, method.calibration))
    model.train()
    result.held_out_curve.append((0, judged(model, held_out)[0]))
    for step in range(1, total + 1):
        (micro,) = batches.step(step - 1)
        rates = method.rates(adapters, step - 1, total, schedule.rate)
        method.batch(adapters, step - 1, micro.samples)
        loss = batch_loss(model, micro, engine.device) / micro.tokens
        engine.backward(loss)
        method.observe(adapters, engine)
        if not make_step(engine, method, adapters, step - 1, rates, CLIP) < float("inf"):
            result.loss, result.exact_match = None, 0.0
            return result
        if step in exchange_steps:
            if isinstance(method, Remedy) and step in method.exchanges:
                ahead = range(step, step + method.looks)
                look(engine, model, method, adapters, [micro for t in ahead for micro in batches.step(t)])
            method.exchange(adapters, engine, step, total)
            if method.recalibrates:
                look(engine, model, method, adapters, first_samples(batches, method.calibration, step))
            result.exchanges.append((step, method.metrics(adapters, engine)))
        since.append(loss.detach())
        if step % math.ceil(total / WINDOWS) == 0 or step == total:
            result.train_curve.append((step, float(torch.stack(since).mean())))
            since = []
        if step % math.ceil(total / LOOKS) == 0 or step == total:
            result.loss, result.exact_match = judged(model, held_out)
            result.held_out_curve.append((step, result.loss))
    result.seconds = time.perf_counter() - began
    return result


def look(
    engine: Engine, model: nn.Module, method: Method, adapters: list[Adapter], micros: Sequence[MicroBatch]
) -> None:
    """Let the method look at the gradients of some samples."""
    tokens = sum(int((micro.labels[:, 1:] != IGNORE).sum()) for micro in micros)
    calibrate_on(
        engine, model, method, adapters, lambda: (batch_loss(model, m, engine.device) / tokens for m in micros)
    )


@dataclass(frozen=True)
class Real:
    """The setting of the comparison on a real model; the data are the demo's."""

    model: str = DEMO
    batch: int = 8
    warmup: int = 5
    rank: int = 16
    size: int = 704
    tuning_size: int = 280  # a rate is chosen in runs of a third of the steps
    held_out: int = 64

    def examples(self, tuning: bool) -> int:
        """Held out ones with them."""
        return self.tuning_size if tuning else self.size

    def steps(self, tuning: bool) -> int:
        """Of one pass over what is not held out; a few fewer if questions repeat."""
        return math.ceil((self.examples(tuning) - self.held_out) / self.batch)


def run_real(real: Real, spec: Spec, among: Methods = methods) -> Result:
    """Run the library's own loop once. among: the function that knows the method."""
    folder = Source.open(real.model).path
    method = among(skeleton(folder, torch.float32, "sdpa"), real.rank, real.steps(spec.tuning), "auto")[spec.method]
    demo = Recipe()
    with tempfile.TemporaryDirectory() as output:
        recipe = replace(
            demo,
            model_name_or_path=str(folder),
            output_dir=output,
            save_merged=False,
            engine="plain",
            report_to="none",
            method=method,
            data=replace(demo.data, size=real.examples(spec.tuning), held_out=real.held_out),
            per_device_train_batch_size=real.batch,
            seed=spec.seed,
            learning_rate=spec.rate,
            warmup_steps=real.warmup,
            logging_steps=5,
        )
        model, _ = build_model(recipe, folder)
        result, began = Result(sum(p.numel() for p in model.parameters() if p.requires_grad)), time.perf_counter()
        try:
            train(recipe)
        except FloatingPointError:  # diverged
            return result
        records = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    result.train_curve = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    result.held_out_curve = [(r["step"], r["loss"]) for r in records if r["kind"] == "eval" and "loss" in r]
    of_method = [(r["step"], r) for r in records if r["kind"] == "method"]  # every logging_steps
    result.exchanges = [(step, {k: r[k] for k in r if k not in ("kind", "step")}) for step, r in of_method]
    result.exact_match = [r["exact_match"] for r in records if r["kind"] == "eval" and "exact_match" in r][-1]
    result.loss, result.seconds = result.held_out_curve[-1][1], time.perf_counter() - began
    return result


# --- the grid ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """The runs of one table: their folder, their common settings, and the function that makes a run."""

    folder: Path
    setting: Small | Real
    settings: dict[str, dict[str, Any]]  # of every method, in the runs that are reported
    tuning: dict[str, dict[str, Any]]  # in those that a rate is chosen with
    run: Callable[[Spec], Result]

    def file(self, spec: Spec) -> Path:
        return self.folder / f"{spec.name}.json"

    def stamp(self, spec: Spec) -> dict[str, Any]:
        """Return the settings that the file of this run must hold."""
        settings = self.tuning if spec.tuning else self.settings
        return {"run": asdict(spec), "method": settings[spec.method], "setting": asdict(self.setting)}

    def found(self, spec: Spec) -> dict[str, Any]:
        """Return the settings that the file of this run holds, in today's names, with those that its method had not
        yet.
        """
        settings = json.loads(self.file(spec).read_text())["settings"]
        now = self.stamp(spec)["method"]
        held = {RENAMED.get(key, key): value for key, value in settings["method"].items()}
        if "base" in settings["setting"]:
            settings["setting"]["base"] = {"family": "digits"} | settings["setting"]["base"]
        return settings | {"method": {key: LATER[key] for key in LATER if key in now} | held}

    def done(self, spec: Spec) -> bool:
        """Return whether the file of the run exists. A file with other settings under the same name is an error: the
        table would mix two experiments.
        """
        if not self.file(spec).is_file():
            return False
        if self.found(spec) != self.stamp(spec):
            raise ValueError(
                f"{self.file(spec)} is of a run with other settings; move it away or choose another --output"
            )
        return True

    def make(self, spec: Spec) -> str:
        """Make a run, write its file and return a line to print. The output of the library is dropped."""
        with silence():
            result = self.run(spec)
        write_json(self.file(spec), {"settings": self.stamp(spec), "result": asdict(result), **origin()})
        loss = "diverged" if result.loss is None else f"held-out loss {result.loss:.3f}"
        return f"{spec.name}: exact match {result.exact_match:.1%}, {loss}, {result.seconds:.0f} s"

    def fill(self, specs: Iterable[Spec], jobs: int) -> None:
        """Make the runs that have no file yet."""
        missing = [spec for spec in specs if not self.done(spec)]
        for number, line in enumerate(made(self.make, missing, jobs), 1):
            print(f"[{number}/{len(missing)}] {line}", flush=True)


def made(make: Callable[[Spec], str], specs: Sequence[Spec], jobs: int) -> Iterator[str]:
    """Yield the lines as they come, from one process or several of one thread each. After a failure no run begins."""
    if jobs == 1:
        yield from map(make, specs)
        return
    with pool_of(jobs) as pool:
        try:
            for future in as_completed([pool.submit(make, spec) for spec in specs]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def silence() -> Iterator[None]:
    """Drop what is printed in this block."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def pool_of(jobs: int) -> ProcessPoolExecutor:
    """Return a pool of processes that end with this one, however it ends."""
    return ProcessPoolExecutor(jobs, get_context("spawn"), begin_work, (os.getpid(),))


def begin_work(parent: int) -> None:
    """Prepare a process of the pool. A run of minutes should not go on when nobody waits for it."""
    quiet()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def quiet() -> None:
    """Use one thread and print no progress bars."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def compare(
    comparison: Comparison,
    names: Sequence[str],
    rates: Sequence[float],
    tuning: Sequence[int],
    seeds: Sequence[int],
    jobs: int,
) -> None:
    """Run all rates with the tuning seeds, then each method's best rate with the seeds that are reported."""
    comparison.fill([Spec(name, rate, seed, True) for seed in tuning for rate in rates for name in names], jobs)
    runs = read_runs(comparison.folder)
    comparison.fill([Spec(name, best(runs, name), seed) for seed in seeds for name in names], jobs)


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Return the runs of a table, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]


def of(runs: list[dict[str, Any]], method: str, tuning: bool, rate: float | None = None) -> list[dict[str, Any]]:
    """Return the results of a method's tuning runs, or of its reported runs."""
    keys = [(r["settings"]["run"], r["result"]) for r in runs]
    return [
        result
        for run, result in keys
        if run["method"] == method and run["tuning"] == tuning and rate in (None, run["rate"])
    ]


def rates_of(runs: list[dict[str, Any]], method: str) -> list[float]:
    """Return the rates of the grid, ascending."""
    specs = [r["settings"]["run"] for r in runs]
    return sorted({spec["rate"] for spec in specs if spec["method"] == method and spec["tuning"]})


def best(runs: list[dict[str, Any]], method: str) -> float:
    """Return the rate with the highest mean exact match over the tuning seeds, then with the lowest mean loss."""

    def score(rate: float) -> tuple[float, float]:
        results = of(runs, method, True, rate)
        losses = [math.inf if result["loss"] is None else result["loss"] for result in results]
        return statistics.mean(result["exact_match"] for result in results), -statistics.mean(losses)

    return max(rates_of(runs, method), key=score)


# --- the page ---------------------------------------------------------------------------------------------------------


def tabulate(folder: Path, page: Path, name: str, titles: dict[str, str]) -> None:
    """Write a comparison's table and conclusions between the marks of the page, and its curves into a file."""
    runs = read_runs(folder)
    rows = {m: of(runs, m, False, best(runs, m)) for m in titles if rates_of(runs, m)}
    rows = {method: results for method, results in rows.items() if results}
    if not rows:
        print(f"{name}: no run of a tuned rate in {folder}")
        return
    lines = [
        "| method | trainable | best rate | seeds | exact match, % | held-out loss |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        row(titles[method], results, best(runs, method), rates_of(runs, method)) for method, results in rows.items()
    ]
    grid = ", ".join(f"{rate:g}" for rate in sorted({rate for method in rows for rate in rates_of(runs, method)}))
    picture = page.with_name(f"{page.stem}-{name}.png")
    draw({titles[m]: results for m, results in rows.items()}, picture)
    text = "\n".join(
        [*lines, "", f"Grid of rates: {grid}.", *verdict(rows, titles), "", f"![loss curves]({picture.name})"]
    )
    write_text(page, between_marks(page.read_text(encoding="utf-8"), name, text))
    print(f"{name}: {len(rows)} rows written to {page}, curves to {picture}")


def row(title: str, results: list[dict[str, Any]], rate: float, grid: list[float]) -> str:
    """Return one line of the table. A rate at an end of the grid is marked: a better one may lie outside."""
    diverged = sum(result["loss"] is None for result in results)
    losses = [result["loss"] for result in results if result["loss"] is not None]
    loss = spread(losses, 3) + f" ({diverged} diverged)" * bool(diverged)
    edge = " (edge)" if len(grid) > 1 and rate in (grid[0], grid[-1]) else ""
    exact = spread([100 * result["exact_match"] for result in results], 1)
    return f"| {title} | {results[0]['trainable']:,} | {rate:g}{edge} | {len(results)} | {exact} | {loss} |"


def spread(values: list[float], digits: int) -> str:
    """Return mean and standard deviation as text."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "none"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def verdict(rows: dict[str, list[dict[str, Any]]], titles: dict[str, str]) -> list[str]:
    """Return sentences that name the methods whose exact match differs from LoRA's by more than twice the standard
    error of the difference. With fewer than three seeds the sentence says that there are too few.
    """
    exact = {
        method: [result["exact_match"] for result in results] for method, results in rows.items() if method != "full"
    }
    if "lora" not in exact or min(map(len, exact.values())) < 3:
        return ["With so few seeds the table says nothing about differences as small as its spreads."]
    groups: dict[str, list[str]] = {"Above LoRA": [], "Below LoRA": [], "Not told apart from LoRA": []}
    lora = exact.pop("lora")
    for method, values in exact.items():
        difference = statistics.mean(values) - statistics.mean(lora)
        error = math.sqrt(statistics.variance(values) / len(values) + statistics.variance(lora) / len(lora))
        told = abs(difference) > 2 * error
        groups["Not told apart from LoRA" if not told else "Above LoRA" if difference > 0 else "Below LoRA"].append(
            titles[method]
        )
    return [f"{group}: {', '.join(names) or 'none'}." for group, names in groups.items()]


def between_marks(page: str, name: str, text: str) -> str:
    """Return the page with the text between <!-- name --> and <!-- /name --> replaced."""
    head, opening, rest = page.partition(f"<!-- {name} -->")
    _, closing, tail = rest.partition(f"<!-- /{name} -->")
    if not closing:
        raise ValueError(f"the page has no place for the table: lines <!-- {name} --> and <!-- /{name} -->")
    return f"{head}{opening}\n{text}\n{closing}{tail}"


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw training and held-out loss of every row: the mean over the seeds, and a band from the least to the greatest.

    Of more than ten rows the bands would hide one another, and are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 5), layout="constrained")
    kinds = (("train_curve", "training loss"), ("held_out_curve", "held-out loss"))
    for axis, (curve, heading) in zip(axes, kinds, strict=True):
        for number, (title, results) in enumerate(rows.items()):
            curves = [result[curve] for result in results if result["loss"] is not None]
            if curves:
                points = [(at[0][0], [value for _, value in at]) for at in zip(*curves, strict=False)]
                steps, color = [step for step, _ in points], f"C{number % 10}"
                line = ("-", "--", ":")[number // 10 % 3]
                mean = [statistics.mean(v) for _, v in points]
                axis.plot(steps, mean, line, label=title, marker="o", ms=3, lw=1.5, color=color)
                if len(rows) <= 10:
                    least, most = [min(v) for _, v in points], [max(v) for _, v in points]
                    axis.fill_between(steps, least, most, alpha=0.15, lw=0, color=color)
        axis.set(title=heading, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


# --- the command line -------------------------------------------------------------------------------------------------


def in_families(model: PreTrainedModel, rank: int, steps: int, svd_cache: str) -> dict[str, Method]:
    known = methods(model, rank, steps, svd_cache) | controls(model, rank, steps, svd_cache)
    return {name: known[name] for name in IN_FAMILIES}


def exchanging(model: PreTrainedModel, rank: int, steps: int, svd_cache: str) -> dict[str, Method]:
    """Return the settings of CORE with exchanges after equal parts of the run, as `methods` does."""
    counts = {"one": 1, "three": 3}
    return {"lora": LoRA(rank=rank), "once": Core(p=2 * rank)} | {
        f"{word}_into_{into}": Core(
            p=2 * rank, into=into, exchanges=[steps * i // (count + 1) for i in range(1, count + 1)]
        )
        for into in get_args(Into)
        if into != "auto"
        for word, count in counts.items()
    }


def small_comparison(folder: Path, small: Small, among: Methods = methods) -> Comparison:
    home = folder.with_name("small" if small.base.family == "digits" else small.base.family)
    checkpoint = pretrained(home / "pretrained", small.base)
    model = skeleton(checkpoint, torch.float32, "sdpa")
    settings = {k: draccus.encode(m) for k, m in among(model, small.rank, small.steps, "").items()}
    return Comparison(folder, small, settings, settings, partial(run_small, checkpoint, small, among=among))


def real_comparison(folder: Path, real: Real, among: Methods = methods) -> Comparison:
    model = skeleton(Source.open(real.model).path, torch.float32, "sdpa")
    settings, tuning = (
        {k: draccus.encode(m) for k, m in among(model, real.rank, real.steps(short), "auto").items() if k != "full"}
        for short in (False, True)
    )
    return Comparison(folder, real, settings, tuning, partial(run_real, real, among=among))


SMALL_GRID = {"rates": [1e-3, 2.5e-3, 4e-3, 6e-3, 1e-2], "tuning_seeds": [100, 101], "seeds": [0, 1, 2, 3, 4]}
CONTROL_GRID = {
    "rates": [2.5e-3, 4e-3, 6e-3, 1e-2, 1.6e-2, 2.5e-2],
    "tuning_seeds": [100, 101],
    "seeds": list(range(5, 15)),
}
REMEDY_GRID = {"rates": [2.5e-3, 4e-3, 6e-3], "tuning_seeds": [100, 101], "seeds": list(range(5, 15))}
SCORE_GRID = {"rates": [2.5e-3, 4e-3, 6e-3], "tuning_seeds": [100, 101], "seeds": list(range(5, 10))}
FAMILY_GRID = {"rates": [1e-3, 2.5e-3, 6e-3, 1.6e-2], "tuning_seeds": [100], "seeds": [0, 1, 2, 3, 4]}
LONG_GRID = {"rates": [2.5e-3, 1e-2, 1.6e-2, 2.5e-2], "tuning_seeds": [100], "seeds": [5, 6, 7]}
REAL_GRID = {"rates": [5e-4, 1.5e-3, 5e-3], "tuning_seeds": [100], "seeds": [0, 1]}
REAL_SCORE_GRID: dict[str, list[Any]] = {"rates": [1.5e-4], "tuning_seeds": [100], "seeds": []}


class SmallRuns(NamedTuple):
    """A comparison on the small model."""

    family: str
    pretrain_steps: int
    among: Methods
    titles: dict[str, str]
    grid: dict[str, list[Any]]
    steps: int = Small.steps


SMALL: dict[str, SmallRuns] = {
    "small": SmallRuns("digits", 900, methods, TITLES, SMALL_GRID),
    "controls": SmallRuns("digits", 900, controls, CONTROLS, CONTROL_GRID),
    "remedies": SmallRuns("digits", 900, remedies, REMEDIES, REMEDY_GRID),
    "scores": SmallRuns("digits", 900, scores, SCORES, SCORE_GRID),
    "tables": SmallRuns("tables", 2400, in_families, CONTROLS, FAMILY_GRID),
    "places": SmallRuns("places", 900, in_families, CONTROLS, FAMILY_GRID),
    "places_short": SmallRuns("places", 900, in_families, CONTROLS, FAMILY_GRID, steps=100),
    "long": SmallRuns("tables", 2400, exchanging, LONG, LONG_GRID, steps=600),
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare what the methods learn in the same steps.")
    parser.add_argument("what", choices=[*SMALL, "real", "real_scores", "table"])
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality", help="where the runs lie"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(TITLES | CONTROLS | REMEDIES | SCORES | LONG),
        help="by default all; of `real` all but full",
    )
    parser.add_argument("--rates", nargs="+", type=float, help="the grid; by default that of docs/quality.md")
    parser.add_argument("--tuning-seeds", nargs="+", type=int, help="seeds with which a rate is chosen")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds that are reported")
    parser.add_argument("--steps", type=int, help="of the small model; by default those of docs/quality.md")
    parser.add_argument("--pretrain-steps", type=int, help="of the small model; by default those of docs/quality.md")
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--page", type=Path, default=PAGE, help="of `table`: the page to write into")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    quiet()
    if args.what == "table":
        for name, titles in [*((name, runs.titles) for name, runs in SMALL.items()), ("real", TITLES)]:
            tabulate(args.output / name, args.page, name, titles)
        return
    folder = args.output / args.what
    if args.what == "real":
        comparison, default = real_comparison(folder, Real()), REAL_GRID
    elif args.what == "real_scores":
        comparison, default = real_comparison(folder, Real(), scores), REAL_SCORE_GRID
    else:
        runs = SMALL[args.what]
        base = Base(steps=args.pretrain_steps or runs.pretrain_steps, family=runs.family)
        comparison, default = (
            small_comparison(folder, Small(base, steps=args.steps or runs.steps), runs.among),
            runs.grid,
        )
    grid = {key: getattr(args, key) or values for key, values in default.items()}
    names = args.methods or list(comparison.settings)
    compare(comparison, names, grid["rates"], grid["tuning_seeds"], grid["seeds"], args.jobs)


if __name__ == "__main__":
    main()
