"""The sentences that a run prints."""

from __future__ import annotations

import torch

from llm_lowrank.adapters.adapter import Adapter, PairAdapter
from llm_lowrank.adapters.exchange import Exchanged
from llm_lowrank.adapters.tokens import TrainedTokens
from llm_lowrank.data import Stream, StreamBatches, describe_ends, describe_unused
from llm_lowrank.models.architectures import names_of_experts
from llm_lowrank.models.coverage import coverage
from llm_lowrank.models.stopping import stops_of
from llm_lowrank.models.vocabulary import token_rows
from llm_lowrank.models.whole import describe_whole, whole_modules
from llm_lowrank.run.build import attention
from llm_lowrank.run.hardware import find
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run
from llm_lowrank.run.recipe import Recipe

HOPELESS = 10  # skipped steps in a row, after which it is not bad luck


def opening(run: Run) -> str:
    """What is about to be trained, on what data, and where the pairs of an exchange will go."""
    engine, recipe = run.engine, run.recipe
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    padding = run.tokenizer.convert_ids_to_tokens(run.batches.pad_id)
    if run.tokenizer.pad_token_id is not None and run.batches.pad_id != run.tokenizer.pad_token_id:
        padding += f" (the embedding has no row for {run.tokenizer.pad_token})"
    lines = [
        f"{type(recipe.method).__name__} on {len(run.adapters)} modules of {run.source.path}: "
        f"{trained:,} trainable parameters",
        f"{type(engine).__name__} engine, {engine.world} rank(s) on {engine.device.type}, {describe_storage(recipe)}; "
        f"{run.total_steps} steps of {run.batches.global_batch} {describe_batch(run)} ({len(run.corpus.held_out)} held "
        "out)",
        f"prompts: {', '.join(run.corpus.styles)}; padding: {padding}, masked and never trained",
        describe_ends(run.tokenizer, run.corpus.ends, stops_of(run.model, run.tokenizer)),
        coverage(run.model).describe(recipe.codec),
        "attention: " + ", ".join(attention(recipe, run.model)),
        f"learning rate: {run.schedule}",
    ]
    if (rows := token_rows(run.model)) is not None:
        lines += [rows.tokens.describe(), *_absent_tokens(run, rows.tokens)]
    if whole := whole_modules(run.model):
        lines.append(describe_whole(whole))
    lines += [run.kernels] if run.kernels else []
    lines += describe_speed(recipe, engine.device)
    lines += describe_inherited(run) + run.notes
    lines += _beyond_positions(run)
    if mistaken := names_of_experts(run.model, [adapter.name for adapter in run.adapters]):
        lines.append(
            f"adapter/ will hold {', '.join(mistaken)}, which PEFT may take for the experts of the mixture; use "
            f"merged/, or leave them out: --method.exclude_modules {','.join(mistaken)}"
        )
    if run.unused:
        first = ", ".join(run.unused[:3]) + (", ..." if len(run.unused) > 3 else "")
        lines.append(f"not used of the checkpoint: {len(run.unused)} tensors, {first}")
    if run.corpus.dropped or run.corpus.truncated:
        lines.append(f"data: {run.corpus.truncated} examples truncated, dropped {run.corpus.dropped or 'none'}")
    if run.corpus.unused:
        lines.append(describe_unused(run.corpus.unused))
    if run.corpus.date:
        lines.append(f"the chat template writes the date: {run.corpus.date}, also when the run resumes")
    if run.exchange_steps and run.adapters[0].bank_room is not None:
        lines.append(_exchanges(run, run.adapters[0]))
    lines += recipe.method.advice(run.exchange_steps)
    return "\n".join(lines)


def _absent_tokens(run: Run, tokens: TrainedTokens) -> list[str]:
    """A line about tokens of the recipe that the data does not have; of a stream nothing is known yet."""
    if isinstance(run.corpus.train, Stream):
        return []
    named, held = {*run.recipe.new_tokens, *run.recipe.trained_tokens}, run.corpus.train.held(list(tokens.names))
    absent = [text for token, text in tokens.names.items() if text in named and token not in held]
    if not absent:
        return []
    return [
        f"tokens: {' '.join(absent)}: in no example of the data, so that nothing teaches the model what they mean; are "
        "they written as in the data?"
    ]


def describe_speed(recipe: Recipe, device: torch.device) -> list[str]:
    """Lines about what a GPU can do in the recipe's dtype, and what to set if that is little."""
    if device.type != "cuda":
        return []
    name = torch.cuda.get_device_name(device)
    gpu = find(name)
    if gpu is None:
        lines = [f"MFU is not given: there is no peak figure for {name}"]
    else:
        lines = [f"MFU is the share of {gpu.peak(recipe.dtype):g} TFLOP/s, the peak of {name} in {recipe.dtype}"]
    if recipe.dtype == "float32" and torch.get_float32_matmul_precision() == "highest":
        fast = f", which has {gpu.bfloat16:g} TFLOP/s here" if gpu else ""
        lines.append(
            "float32 on CUDA: TF32 is off, so that no product uses tensor cores. For speed set dtype: bfloat16"
            f"{fast}; adapters are trained in float32 in any case"
        )
    return lines


def describe_inherited(run: Run) -> list[str]:
    """A line about the adapter that the run starts from, if there is one."""
    found = [a.inherited for a in run.adapters if isinstance(a, PairAdapter) and a.inherited is not None]
    if not found:
        return []
    others = len(run.adapters) - len(found)
    start = f"; the {others} others start as without it" if others else ""
    pairs = sum(inherited.rank for inherited in found)
    return [f"{run.recipe.method.inherits}: its {pairs} pairs of {len(found)} modules are {found[0]}{start}"]


def _beyond_positions(run: Run) -> list[str]:
    """A line about examples that are longer than those on which the model was pretrained."""
    most = getattr(run.model.config, "max_position_embeddings", None)
    if not most or isinstance(run.corpus.train, Stream) or run.corpus.train.lengths.max() <= most:
        return []
    longest = run.corpus.train.lengths.max()
    return [
        f"the longest example has {longest} tokens, the model's max_position_embeddings is {most}: its positions "
        f"extrapolate; data.max_length {most} would cut such examples"
    ]


def _exchanges(run: Run, adapter: Adapter) -> str:
    """When pairs are exchanged, where the frozen ones go, and why."""
    where = "kept in a bank beside the weight" if adapter.bank_room else "fused into the weight"
    lossy = "would round away part of" if adapter.codec.writable else "would round away"
    why = "holds" if adapter.codec.holds_small_updates else lossy
    steps = ", ".join(map(str, run.exchange_steps))
    storage = describe_storage(run.recipe)
    return f"exchanges after steps {steps}; frozen pairs are {where}, which in {storage} {why} small updates"


def describe_batch(run: Run) -> str:
    """What the samples of a batch are, and how many samples there are."""
    if isinstance(run.batches, StreamBatches):
        return "samples from a stream"
    examples = len(run.batches.examples)
    if run.batches.packs is None:
        return f"samples from {examples}"
    full = run.batches.lengths.sum() / (run.batches.rows * run.batches.pack)
    return f"rows from {run.batches.rows}, into which {examples} examples are packed ({full:.1%} full)"


def describe_storage(recipe: Recipe) -> str:
    """How the frozen weights are stored."""
    return recipe.dtype if recipe.codec == "dense" else f"{recipe.codec} computed in {recipe.dtype}"


def log_exchange(metrics: Metrics, step: int, event: Exchanged) -> str:
    """Record an exchange, and return the line that says what moved, what it cost and what rounding took."""
    milliseconds = event.seconds * 1000
    metrics.write(
        "exchange",
        step,
        modules=event.modules,
        **{event.unit: event.pairs},
        into=event.into,
        drift=event.drift,
        lost=event.lost,
        meant=event.meant,
        milliseconds=milliseconds,
        bytes=event.traffic,
        **({"by_module": dict(event.by_module)} if event.by_module else {}),
    )
    cost = f"{milliseconds:.0f} ms, {event.traffic / 1e6:.1f} MB communicated"
    if event.meant:
        return (
            f"step {step}: exchange: {event.pairs} {event.unit} of {event.modules} modules rewritten, which is meant "
            f"to change the function: by up to {event.drift:.1e} of a layer's answer, {event.lost:.1e} of what was "
            f"trained; {cost}"
        )
    if event.into == "bank":
        lost = f", compressing the bank took {event.lost:.1e} of it" if event.lost else ""
    else:
        lost = f", rounding took {event.lost:.1%} of the update" if event.lost > 1e-4 else ""
    return (
        f"step {step}: exchange: {event.pairs} {event.unit} of {event.modules} modules, frozen ones into the "
        f"{event.into}; "
        f"largest drift {event.drift:.1e}{lost}; {cost}"
    )


def log_kept(metrics: Metrics, run: Run) -> str:
    """Record which state the run keeps, and return the line that says so and why the run ended."""
    best, why = run.best, run.best.verdict(run.made, run.total_steps)
    metrics.write("kept", run.made, of_step=best.step or run.made, early=best.exhausted, why=why)
    return why


def describe_skipped_step(run: Run, step: int, norm: float, *, in_a_row: int) -> str:
    """Return the line about a step without a finite gradient; raise FloatingPointError if the step ends the run."""
    what = f"step {step}: the gradient norm is {norm}"
    if run.recipe.on_nan == "stop":
        raise FloatingPointError(
            f"{what}; lower learning_rate, look at the data, or skip such steps with --on_nan skip"
        )
    if in_a_row == HOPELESS:
        raise FloatingPointError(
            f"{what}, as in the {in_a_row - 1} steps before it; lower learning_rate or look at the data"
        )
    return f"{what}: skipped ({run.skipped} of {step} steps so far)"


def describe_stream(stream: Stream, dropped: dict[str, int]) -> str:
    """What reading the stream left out, as far as it was read."""
    unused = f"; {describe_unused(stream.unused)}" if stream.unused else ""
    said = f"{stream.truncated} examples truncated, dropped {dropped or 'none'}"
    return f"of the stream, as far as it was read: {said}{unused}"
