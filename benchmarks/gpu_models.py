"""Seconds and memory of a whole model, beside the frozen model alone and beside PEFT; benchmarks/gpu.py runs it.

    limit     the frozen model: forward, and the gradient of its input, which every adapter method has to compute
    lora      ours; peft: peft.get_peft_model with LoRA of the same rank on the same linears
    peft      with transformers' loss, as its users have it; "our loss" is the loss without whole logits

Arms of one table share the frozen weights and take turns, so that what else a machine does hits them alike; a ratio is
the median of the rounds' ratios. Every step is a forward and a backward with activation checkpointing; the optimizer's
step is not part of it. Weights are drawn on the device when the loader asks for them.

TFLOP/s are llm_lowrank.run.flops' model FLOPs: what checkpointing computes again is not counted. "of product" is their
share of what a large product reaches in the same process; MFU in a run's log is a share of the data sheet's peak.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import llm_lowrank.methods  # noqa: F401 - registers them
from benchmarks.gpu_device import CUDA, DEVICE, median_of, peak, reset_peak, seconds_of, wait
from benchmarks.gpu_results import Results, Row, failure, read
from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.direction import Direction
from llm_lowrank.adapters.exchange import measure_exchange
from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.adapters.redirect import make_step
from llm_lowrank.codecs import Codec, Dense, Int8, Nf4
from llm_lowrank.codecs import nf4 as nf4_codec
from llm_lowrank.codecs.base import from_bytes
from llm_lowrank.codecs.nf4 import levels
from llm_lowrank.engines.base import Engine, Optimization
from llm_lowrank.engines.frozen import FrozenLinear, codes_multiplied
from llm_lowrank.engines.fsdp import decoder_layers
from llm_lowrank.engines.plain import Plain
from llm_lowrank.models.architectures import skeleton
from llm_lowrank.models.attention import leave_masks_out, with_masks
from llm_lowrank.models.compiling import compile_layers
from llm_lowrank.models.loading import bind, load
from llm_lowrank.models.loss import sum_loss
from llm_lowrank.run.flops import full_shape, work_of

ROOT = Path(__file__).parents[1]
KINDS = Method.get_known_choices()
BF16 = torch.bfloat16
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "head_dim": 32,
}


class Drawn:
    """The tensors of a model, drawn on the device when they are asked for; always the same ones."""

    def __init__(self, model: nn.Module) -> None:
        self.like = {name: (p.dtype, list(p.shape)) for name, p in model.named_parameters()}
        self.last: tuple[str, Tensor] | None = None

    def names(self) -> list[str]:
        return list(self.like)

    def layout(self, name: str) -> tuple[torch.dtype, list[int]]:
        return self.like[name]

    def tensor(self, name: str) -> Tensor:
        if self.last is None or self.last[0] != name:
            dtype, shape = self.like[name]
            generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
            matrix = len(shape) > 1
            make = partial(torch.randn, generator=generator) if matrix else torch.ones
            self.last = name, make(shape, device=DEVICE, dtype=dtype).mul_(0.02 if matrix else 1.0)
        return self.last[1]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name)[start:stop]

    def is_nf4(self, name: str) -> bool:
        return False

    def nf4_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        raise AssertionError(name)


class Trained(NamedTuple):
    """A model that is ready to be trained, and how long that took."""

    engine: Engine
    model: PreTrainedModel
    wrapped: nn.Module  # the one to call
    adapters: list[Adapter]
    seconds: float


def loaded(
    args: argparse.Namespace, method: Method, codec: Codec, layers: int, engine: Engine | None = None
) -> Trained:
    """A model of the config's shapes under a method, as a run has it: checkpointed, and without masks."""
    config = json.loads((ROOT / "tests/configs" / args.config / "config.json").read_text())
    config |= {"num_hidden_layers": layers} | (SMALL if args.small else {})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        model = skeleton(folder, BF16, "sdpa")
    source, engine = Drawn(model), engine or Plain()
    adapters = attach(model, method, codec, 0)
    bind(model, adapters, source)
    began = time.perf_counter()
    settings = Optimization(optim="sgd" if method.own_step else "adamw")
    wrapped, _ = load(engine, model, adapters=adapters, method=method, tensors=source, settings=settings)
    for adapter in adapters:
        adapter.started()  # a calibration would change none of the times
    wait()
    seconds = time.perf_counter() - began
    for adapter in adapters:
        adapter.source = None  # or copies of the model would copy the last tensor that was drawn
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    leave_masks_out(engine, model, wrapped, longest=args.tokens, packed=False)
    method.batch(adapters, 0, [0])
    wrapped.train()  # of DeepSpeed's engine it returns nothing
    return Trained(engine, model, wrapped, adapters, seconds)


def tokens(args: argparse.Namespace, count: int = 0, rows: int = 1) -> Tensor:
    words = SMALL["vocab_size"] if args.small else 128256
    generator = torch.Generator().manual_seed(0)
    return torch.randint(words, (rows, count or args.tokens), generator=generator).to(DEVICE)


# --- other layers over the same frozen weights ------------------------------------------------------------------------


def sharing(model: nn.Module, change: Callable[[FrozenLinear], nn.Module]) -> Any:
    """A copy over the same frozen weights with another layer in the place of every frozen or adapted one."""
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for name, module in [(n, m) for n, m in twin.named_modules() if isinstance(m, FrozenLinear)]:
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, change(module))
    return twin


def dense_linear(layer: FrozenLinear) -> nn.Module:
    linear = nn.Linear(layer.shape[1], layer.shape[0], bias=False, device="meta")
    (linear.weight,) = layer.parts()
    return linear


def decoding(layer: FrozenLinear) -> nn.Module:
    """Our own frozen layer over the same codes."""
    frozen = FrozenLinear(nn.Linear(layer.shape[1], layer.shape[0], bias=False, device="meta"), layer.codec)
    for name, part in layer.named_parts().items():
        setattr(frozen, name, part)
    return frozen


def four_bit(layer: FrozenLinear) -> nn.Module:
    """bitsandbytes' layer over our codes: where n is a multiple of 64 the layouts are the same."""
    import bitsandbytes

    (m, n), parts = layer.shape, layer.named_parts()
    assert n % 64 == 0, "rows are padded in our layout"
    linear = bitsandbytes.nn.Linear4bit(n, m, bias=False, compute_dtype=BF16, quant_type="nf4", device="meta")
    scales, codes = from_bytes(parts["scales"].data).flatten(), parts["codes"].data
    state = bitsandbytes.functional.QuantState(
        scales, torch.Size((m, n)), levels(codes.device), 64, quant_type="nf4", dtype=BF16
    )
    linear.weight = bitsandbytes.nn.Params4bit(
        codes.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        quant_type="nf4",
        blocksize=64,
        compress_statistics=False,
        bnb_quantized=True,
        module=linear,
    )
    linear.quant_state = state
    return linear


def with_peft(model: Any, rank: int, quantized: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model.is_loaded_in_4bit = quantized
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


# --- steps ------------------------------------------------------------------------------------------------------------


def stepping(model: Any, ids: Tensor, *, theirs: bool = False, peft: bool = False, padded: bool = False) -> Callable:
    """A forward and a backward, which returns the loss.

    theirs: transformers' own loss. peft: under autocast, which its float32 adapters want. padded: the last token is.
    """
    labels, mask = ids.cpu(), torch.ones_like(ids)
    mask[:, -1] = 0
    inputs = {"input_ids": ids} | ({"attention_mask": mask} if padded else {})
    output = (model.get_base_model() if peft else model).get_output_embeddings()

    def step() -> float:
        with torch.autocast(DEVICE.type, BF16) if peft else contextlib.nullcontext():
            if theirs:
                loss = model(**inputs, labels=ids, use_cache=False).loss
            else:
                loss = sum_loss(model, inputs, labels, output) / (ids.shape[1] - 1)
        loss.backward()
        for p in model.parameters():
            p.grad = None
        return float(loss.detach())

    return step


def turns(
    results: Results,
    arms: dict[str, Callable[[], float]],
    rounds: int,
    figures: Callable[[float], Row],
    beside: bool = False,
) -> None:
    """Time arms in turns and add a row for each; the first one is what the others' ratios are to.

    beside: the arms are models of their own, and memory is the peak above that of all of them at rest.
    """
    known: dict[str, Row] = {}
    for name, step in arms.items():
        try:
            step()
            held = reset_peak()
            known[name] = {"loss": step(), **peak(held if beside else None)}
        except Exception as error:
            results.add(name, **failure(error))
            if "CUDA error" in str(error):
                raise
    names = [name for name in arms if name in known]
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(seconds_of(arms[name]))
    for name in names:
        ratios = [a / b for a, b in zip(times[name], times[names[0]], strict=True)]
        seconds = statistics.median(times[name])
        results.add(name, ms=1e3 * seconds, ratio=statistics.median(ratios), **figures(seconds), **known[name])


def rates(args: argparse.Namespace, model: Any, count: int = 0) -> Callable[[float], Row]:
    t = count or args.tokens
    flops = work_of(model, recomputed=True).model(full_shape(1, t))
    k = 256 if args.small else 8192
    x, y = (torch.randn(k, k, device=DEVICE, dtype=BF16) for _ in range(2))
    best = 2 * k**3 / median_of(lambda: x @ y)
    return lambda seconds: {
        "tokens/s": t / seconds,
        "TFLOP/s": flops / seconds / 1e12,
        "of product": flops / seconds / best,
    }


# --- items ------------------------------------------------------------------------------------------------------------


def dense(args: argparse.Namespace, results: Results) -> None:
    """The model in bf16."""
    trained = loaded(args, KINDS["lora"](rank=args.rank), Dense(BF16), args.layers)
    results.add("load", s=trained.seconds)
    model, ids = trained.model, tokens(args)
    limit, peft = sharing(model, dense_linear), with_peft(sharing(model, dense_linear), args.rank, False)

    def masked() -> float:
        with with_masks(model):
            return stepping(model, ids, padded=True)()

    def deterministic() -> float:
        torch.use_deterministic_algorithms(True)
        try:
            return step()
        finally:
            torch.use_deterministic_algorithms(False)

    step = stepping(model, ids, padded=True)
    arms = {
        "limit": stepping(limit, ids),
        "lora": step,
        "lora, masks": masked,
        "lora, deterministic": deterministic,
        "peft, our loss": stepping(peft, ids, peft=True),
        "peft": stepping(peft, ids, theirs=True, peft=True),
    }
    turns(results, arms, args.rounds, rates(args, model))
    few = ids[:, : args.tokens // 8]
    arms = {
        f"{few.shape[1]} tokens, {name}": stepping(arm, few, peft=name == "peft")
        for name, arm in (("limit", limit), ("lora", model), ("peft", peft))
    }
    turns(results, arms, args.rounds, rates(args, model, few.shape[1]))


def nf4(args: argparse.Namespace, results: Results) -> None:
    """The model in nf4 beside PEFT over bitsandbytes, and in int8."""
    earlier = read(results.out).get("dense", {"rows": []})["rows"]
    in_bf16 = [row["ms"] for row in earlier if row["row"] == "lora" and "ms" in row]
    for name, codec in (("", Nf4(BF16)), ("int8 ", Int8(BF16))):
        quantized(args, results, name, codec, in_bf16)
        gc.collect()  # the next model begins without this one


def quantized(args: argparse.Namespace, results: Results, name: str, codec: Codec, in_bf16: list[float]) -> None:
    trained, ids = loaded(args, KINDS["lora"](rank=args.rank), codec, args.layers), tokens(args)
    results.add(f"{name}load", s=trained.seconds)
    model = trained.model
    arms = {f"{name}limit": stepping(sharing(model, decoding), ids), f"{name}lora": stepping(model, ids)}
    if isinstance(codec, Nf4):
        try:
            stepping(sharing(model, four_bit), ids)()
        except Exception as error:
            if CUDA:
                raise
            results.add("peft", skipped=f"Linear4bit does not work here: {type(error).__name__}: {error}")
        else:
            peft = with_peft(sharing(model, four_bit), args.rank, True)
            arms["bitsandbytes, frozen"] = stepping(sharing(model, four_bit), ids)
            arms["peft, our loss"] = stepping(peft, ids, peft=True)
            arms["peft"] = stepping(peft, ids, theirs=True, peft=True)
    rate = rates(args, model)

    def figures(seconds: float) -> Row:
        return rate(seconds) | ({"of bf16": 1e3 * seconds / in_bf16[0]} if in_bf16 else {})

    turns(results, arms, args.rounds, figures)


def speeds(args: argparse.Namespace, results: Results) -> None:
    """Every method on a few layers of the same shapes."""
    r = args.rank
    methods = {
        "lora": KINDS["lora"](rank=r),
        "dora": KINDS["dora"](rank=r),
        "srlora, bank": KINDS["srlora"](rank=r, target_rank=2 * r, into="bank", svd_cache=""),
        "rasa": KINDS["rasa"](rank=r),
        "droplora, token": KINDS["droplora"](rank=r),
        "droplora, step": KINDS["droplora"](rank=r, mask="step"),
        "losia": KINDS["losia"](output_factor=0),
        "flat_lora": KINDS["flat_lora"](rank=r),
        "core, p 4 r": KINDS["core"](p=4 * r),
        "core, p 8 r": KINDS["core"](p=8 * r),
        "core, p 16 r": KINDS["core"](p=16 * r),
    }
    ids = tokens(args)
    arms: dict[str, Callable[[], float]] = {}
    for name, method in methods.items():
        model = loaded(args, method, Dense(BF16), 1 if args.small else 4).model
        for module in model.modules():
            if hasattr(module, "record"):
                module.record = None  # of LoSiA: one layer of many records its whole gradient at any time
        if not arms:
            arms["limit"] = stepping(sharing(model, dense_linear), ids)
        arms[name] = stepping(model, ids)
    turns(results, arms, args.rounds, lambda seconds: {}, beside=True)


def updates(args: argparse.Namespace, results: Results) -> None:
    """What follows the last backward of a step: the optimizer alone, and behind each direction."""
    r, layers = args.rank, 1 if args.small else 4
    rules = {name: kind for name, kind in Direction.get_known_choices().items() if name != "none"}
    methods: dict[str, Method] = {"lora": KINDS["lora"](rank=r)}
    methods |= {name: KINDS["lora"](rank=r, direction=kind()) for name, kind in rules.items()}
    methods |= {f"core, p {k} r": KINDS["core"](p=k * r, interval=2) for k in (4, 8, 16)}
    ids = tokens(args, 64)

    def cell(method: Method) -> Row:
        engine, model, wrapped, adapters, _ = loaded(args, method, Dense(BF16), layers)
        head, times = model.get_output_embeddings(), []
        for step in range(200, 206):  # behind every warm-up; CORE turns at every second one
            engine.backward(sum_loss(wrapped, {"input_ids": ids}, ids.cpu(), head))
            wait()
            began = time.perf_counter()
            make_step(engine, method, adapters, step, method.rates(adapters, step, 1000, lambda step: 1e-6), 1.0)
            wait()
            times.append(1e3 * (time.perf_counter() - began))
        fast, slow = sorted(times[2:])[1:3]
        return {
            "modules": len(adapters),
            "least ms": min(times[2:]),
            "ms": (fast + slow) / 2,
            "most ms": max(times[2:]),
        }

    for name, method in methods.items():
        results.cell(name, partial(cell, method))


def exchange(args: argparse.Namespace, results: Results) -> None:
    """SRLoRA on the whole model: its start, its look at the gradients, and one exchange of all pairs."""
    method = KINDS["srlora"](rank=args.rank, target_rank=2 * args.rank, gamma=1.0, svd_cache="", svd_niter=1)

    def cell(codec: Codec) -> Row:
        engine, model, _, adapters, seconds = loaded(args, method, codec, args.layers)
        ids = tokens(args, 64)
        engine.backward(sum_loss(model, {"input_ids": ids}, ids.cpu(), model.get_output_embeddings()))
        observing = seconds_of(lambda: method.observe(adapters, engine))
        engine.step(1e-4)
        wait()
        began = time.perf_counter()
        event = measure_exchange(engine, partial(method.exchange, adapters, engine, 1, 2))
        wait()
        assert event is not None
        took = time.perf_counter() - began
        drift = {"drift": event.drift, "modules": event.modules}
        return {"load s": seconds, "observe ms": 1e3 * observing, "exchange s": took, **drift}

    results.cell("bf16", partial(cell, Dense(BF16)))
    results.cell("nf4", partial(cell, Nf4(BF16)))


def compiled(args: argparse.Namespace, results: Results) -> None:
    """torch.compile of each decoder layer, over bf16 and nf4."""
    for name, codec in (("bf16", Dense(BF16)), ("nf4", Nf4(BF16))):
        compared_with_compiled(args, results, name, codec)
        torch._dynamo.reset()  # what was compiled holds its model
        gc.collect()


def compared_with_compiled(args: argparse.Namespace, results: Results, name: str, codec: Codec) -> None:
    ids = tokens(args)
    model = loaded(args, KINDS["lora"](rank=args.rank), codec, 1 if args.small else 4).model
    twin = sharing(model, lambda layer: layer)
    if args.small:
        for decoder_layer in decoder_layers(twin):
            decoder_layer.compile(backend="aot_eager")
    else:
        compile_layers(twin)
    arms = {f"{name} lora": stepping(model, ids), f"{name} lora, compiled": stepping(twin, ids)}
    began = time.perf_counter()
    try:
        arms[f"{name} lora, compiled"]()
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        results.add(f"{name} compiling", **failure(error))
        return
    results.add(f"{name} compiling", s=time.perf_counter() - began)
    turns(results, arms, args.rounds, lambda seconds: {})


def generation(args: argparse.Namespace, results: Results) -> None:
    """Milliseconds of a new token in nf4, and of one linear of few rows: decoded, and multiplied with the codes.

    same: share of the answers' tokens that the decoded model gives, too. Behind a token that differs all may differ.
    """
    m, n = (96, 128) if args.small else (14336, 4096)
    codec = Nf4(BF16)
    parts = codec.encode(torch.randn(m, n, device=DEVICE, dtype=BF16))
    nf4_codec.MULTIPLIES = (DEVICE.type,)  # on the CPU too, where bitsandbytes decodes, so that this script is tried
    multiplies = codec.multiplies(n, BF16, DEVICE)
    if not multiplies:
        results.add("codes multiplied", skipped="this bitsandbytes has no gemm_4bit")

    def linear(rows: int) -> Row:
        x = torch.randn(rows, n, device=DEVICE, dtype=BF16)
        ms = {"decoded ms": 1e3 * median_of(lambda: nn.functional.linear(x, codec.decode(parts, n)))}
        if not multiplies:
            return ms
        decoded, found = x @ codec.decode(parts, n).T, codec.multiply(x, parts, n, None)
        away = float((found - decoded).float().norm() / decoded.float().norm())
        seconds = median_of(lambda: codec.multiply(x, parts, n, None))
        return ms | {"codes multiplied ms": 1e3 * seconds, "apart": away}

    for rows in (1, 16):
        results.cell(f"linear of {rows} rows", partial(linear, rows))
    model = loaded(args, KINDS["lora"](rank=args.rank), codec, args.layers).model.eval()
    new = 4 if args.small else 32
    answers: dict[int, Tensor] = {}

    def answered(rows: int, multiplied: bool) -> Row:
        prompts = tokens(args, 16, rows)
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

        def once() -> Tensor:
            return model.generate(input_ids=prompts, use_cache=True, **settings)[:, prompts.shape[1] :]

        with torch.no_grad(), with_masks(model), codes_multiplied(model) if multiplied else contextlib.nullcontext():
            found = once()
            seconds = median_of(once, 0, 2)
        same = float((found == answers.setdefault(rows, found)).float().mean())
        return {"ms a token": 1e3 * seconds / new, "tokens/s": rows * new / seconds, "same": same}

    for rows in (1, 16):
        results.cell(f"answers of {rows} rows, decoded", partial(answered, rows, False))
        if multiplies:
            results.cell(f"answers of {rows} rows, codes multiplied", partial(answered, rows, True))
