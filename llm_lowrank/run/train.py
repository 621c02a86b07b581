"""The loop. Everything that happens in a run happens here, in this order, by explicit calls."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import draccus
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from llm_lowrank.adapters.adapter import Adapter, PairAdapter
from llm_lowrank.adapters.exchange import Exchanged, measure_exchange
from llm_lowrank.data import Batches, Corpus, Example, MicroBatch, Stream, StreamBatches, pad_id
from llm_lowrank.engines.base import Engine
from llm_lowrank.engines.fsdp import FSDP
from llm_lowrank.engines.plain import Plain
from llm_lowrank.files import check_writable, write_text
from llm_lowrank.models import checkpoint, export, loading
from llm_lowrank.models.checkpoint import Checkpoint
from llm_lowrank.models.generate import accuracy
from llm_lowrank.models.loss import loss_layer, sum_loss
from llm_lowrank.models.packing import check_apart, flat
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.schedule import learning_rate
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.recipe import (
    Recipe,
    attention,
    build_model,
    check_same_run,
    deepspeed_config,
    optimization,
    read_data,
    save,
)

SAMPLES = 5  # answers printed after training
LEFT_OUT = 10  # steps in a row without a finite gradient, after which it is not bad luck


@dataclass
class Run:
    """What is there once everything is checked, before any weight is read."""

    source: Source
    tokenizer: transformers.PreTrainedTokenizerBase
    corpus: Corpus
    model: transformers.PreTrainedModel
    adapters: list[Adapter]
    batches: Batches | StreamBatches
    total_steps: int
    exchange_steps: tuple[int, ...]
    unused: list[str]  # tensors of the checkpoint that the model has no place for
    resumed: Checkpoint | None = None  # of this run, to go on from
    loss_layer: nn.Module | None = None  # in which the loss can be made; None: from whole logits
    notes: list[str] = field(default_factory=list)  # what a user should know before it starts

    @property
    def facts(self) -> dict[str, int | str]:
        """Of the data; a run that goes on must have the same."""
        return {
            "global_batch": self.batches.global_batch,
            "total_steps": self.total_steps,
            "data": self.corpus.fingerprint,
        }


class Preempted(Exception):
    """A signal asked the run to stop; what it had done is in a checkpoint."""


class Signals:
    """While it is entered SIGTERM and SIGUSR1 ask the run to stop where it can next. A second one changes nothing."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self.before = {kind: signal.signal(kind, self._ask) for kind in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def anywhere(self, engine: Engine, busy: bool = False) -> tuple[bool, bool]:
        """Whether any rank was asked, and whether any is busy. Collective."""
        asked, working = engine.sum(torch.tensor([float(self.asked), float(busy)], device=engine.device)).tolist()
        return bool(asked), bool(working)

    def check(self, engine: Engine) -> None:
        """Preempted if any rank was asked before the training began: there is nothing new to save. Collective."""
        if self.anywhere(engine)[0]:
            raise Preempted(
                "stopped by a signal before the first step of this start; go on with --resume_from_checkpoint auto"
            )


class Saving:
    """The checkpoints of a run: at most one is on its way."""

    def __init__(self, engine: Engine, metrics: Metrics, say: Callable[[str], None]) -> None:
        self.engine, self.metrics, self.say = engine, metrics, say
        self.writing: checkpoint.Writing | None = None
        self.step, self.waited = 0, 0.0

    @property
    def busy(self) -> bool:
        return self.writing is not None and self.writing.busy

    def begin(self, step: int, save: Callable[[], checkpoint.Writing]) -> None:
        """Copies what is to be saved; the one before is completed first. Collective."""
        self.finish()
        began = time.perf_counter()
        self.engine.at(f"saving after step {step}")
        self.step, self.writing = step, save()
        self.waited = time.perf_counter() - began

    def finish(self) -> None:
        """Completes what is on its way, if anything is. Collective."""
        if self.writing is None:
            return
        began, writing, self.writing = time.perf_counter(), self.writing, None
        where = writing.finish()
        size = sum(file.stat().st_size for file in where.iterdir()) if self.engine.main else 0
        waited = self.waited + time.perf_counter() - began
        self.metrics.write("save", self.step, waited=waited, beside=writing.seconds, bytes=size)
        self.say(f"step {self.step}: saved {where}")


def train(recipe: Recipe) -> None:
    """Trains what the recipe says and writes output_dir. Collective: every rank calls it.

    Preempted if a signal ended it early.
    """
    engine = make_engine(recipe)
    try:
        with Signals() as signals, engine.guard():
            source = _train(recipe, engine, signals)
    except Preempted:
        engine.close()
        raise
    engine.close()  # merging reads and writes files only: no rank needs to wait for rank 0
    if recipe.save_merged and engine.main:
        output = recipe.output
        backbone = export.Backbone.open(output / export.BACKBONE) if recipe.merge_base == "dequantized" else None
        tqdm.write(f"merged:  {export.merge(source, output / 'adapter', output / 'merged', backbone=backbone)}")


def _train(recipe: Recipe, engine: Engine, signals: Signals) -> Source:
    """The run but for merging; where the model came from. Collective."""
    engine.at("reading the data")
    with engine.together():
        run = prepare(recipe, engine)
    find_checkpoint(recipe, engine, run)
    signals.check(engine)
    method, adapters, total = recipe.method, run.adapters, run.total_steps
    say = tqdm.write if engine.main else _silent
    say(opening(recipe, engine, run))
    resumed, output = run.resumed, recipe.output
    engine.at("loading the model")
    model, loaded = loading.load(engine, run.model, adapters, method, run.source, optimization(recipe), resumed)
    say(str(loaded))
    torch.manual_seed(recipe.seed * 1000 + engine.rank)  # dropout differs between ranks
    done = skipped = 0
    if resumed is not None:
        engine.at(f"restoring {resumed.path}")
        checkpoint.restore(engine, run.model, adapters, resumed)
        done, skipped = resumed.step, resumed.skipped
    signals.check(engine)
    engine.at("looking at the model")
    if recipe.data.packing:
        check_apart(engine, run.model, model)
    run.loss_layer, reason = loss_layer(engine, run.model, model)
    if reason:
        say(f"the loss is made from whole logits: {reason}")
    if engine.main:
        clear(output, resumed is not None)
        save(recipe, output / "recipe.yaml")

    def save_run(step: int) -> checkpoint.Writing:
        return checkpoint.save(
            engine,
            run.model,
            adapters,
            output,
            step,
            skipped,
            draccus.encode(recipe),
            run.source.fingerprint,
            run.facts,
            recipe.save_total_limit,
        )

    with Metrics(
        output, recipe.report_to, engine.main, None if resumed is None else done, draccus.encode(recipe)
    ) as metrics:
        metrics.write(
            "load",
            done,
            seconds=loaded.seconds,
            bytes=loaded.bytes,
            modules=loaded.modules,
            pairs=loaded.pairs,
            error=loaded.errors[loaded.worst],
        )
        before = None
        if resumed is None:
            engine.at("the evaluation before training")
            before = evaluate(recipe, engine, run, model, 0, metrics)
            say(f"before training: {before}")

        def rate(step: int) -> float:
            return learning_rate(step, total, recipe.learning_rate, recipe.warmup_steps, recipe.lr_scheduler_type)

        saving = Saving(engine, metrics, say)
        seen, row = Seen(), 0  # row: steps left out since the last good one
        with tqdm(total=total, initial=done, desc="train", unit="step", disable=not engine.main) as bar:
            for step in range(done + 1, total + 1):
                engine.at(f"step {step}")
                rates = method.rates(adapters, step - 1, total, rate)
                for micro in run.batches.step(step - 1):
                    method.batch(adapters, step - 1, micro.samples)
                    loss = batch_loss(model, micro, engine.device, run.loss_layer, flat(run.model)) / micro.tokens
                    engine.backward(loss)
                    seen.add(loss, micro)
                if good := recipe.on_nan == "stop" or engine.finite():
                    method.observe(adapters, engine)
                else:
                    method.discard(adapters)
                norm = engine.step(*rates)
                if good := good and norm < float("inf"):
                    row = 0
                else:
                    skipped, row = skipped + 1, row + 1
                    if recipe.on_nan == "stop" or row == LEFT_OUT:
                        saving.finish()  # what was saved before this step is good
                    say(report_skipped_step(recipe, step, norm, skipped, row))
                seen.step(good)
                if step in run.exchange_steps:
                    engine.at(f"the exchange after step {step}")
                    if (
                        event := measure_exchange(engine, partial(method.exchange, adapters, engine, step))
                    ) is not None:
                        say(log_exchange(metrics, step, "exchange", event))
                bar.update()
                if step % recipe.logging_steps == 0 or step == total:
                    record = seen.report(engine) | {"learning_rate": max(rates), "grad_norm": norm}
                    if skipped:
                        record["skipped"] = skipped
                    metrics.write("train", step, **record)
                    upcoming = next((s for s in run.exchange_steps if s > step), None)
                    bar.set_postfix(
                        loss="none" if record["loss"] is None else f"{record['loss']:.4f}",
                        lr=f"{max(rates):.2e}",
                        tok_s=f"{record['tokens_per_second']:.0f}",
                        next_exchange=upcoming,
                    )
                if recipe.eval_steps and step % recipe.eval_steps == 0 and step < total:
                    paused = time.perf_counter()
                    engine.at(f"the evaluation after step {step}")
                    say(f"step {step}: {evaluate(recipe, engine, run, model, step, metrics)}")
                    seen.began += time.perf_counter() - paused
                stop, busy = signals.anywhere(engine, saving.busy)
                if not busy:
                    saving.finish()
                # at the end too: exporting can fail
                if stop or (recipe.save_steps and (step % recipe.save_steps == 0 or step == total)):
                    saving.begin(step, partial(save_run, step))
                if step < total and stop:
                    saving.finish()
                    raise Preempted(
                        f"stopped by a signal after step {step} of {total}; go on with --resume_from_checkpoint auto"
                    )

        saving.finish()
        if isinstance(run.corpus.train, Stream):
            cut, dropped = run.corpus.train.truncated, dict(run.corpus.dropped)
            say(f"of the stream, as far as it was read: {cut} examples truncated, dropped {dropped or 'none'}")
        engine.at("the evaluation after training")
        after = evaluate(recipe, engine, run, model, total, metrics)
        for question, answer, expected, score in after.samples[:SAMPLES]:
            say(f"  {question!r}\n    answered {answer!r}, expected {expected!r}, score {score:g}")
        say(
            f"before training: {before}\nafter training:  {after}"
            if before is not None
            else f"after training:  {after}"
        )
        engine.at("the export")
        saved = export.save_adapter(engine, adapters, method, output / "adapter", run.source.name)
        if recipe.data.chat_template and engine.main:
            write_text(output / "adapter" / export.TEMPLATE, str(run.tokenizer.chat_template))
        say(f"adapter: {saved}")
        if recipe.codec != "dense":
            say(merged_gaps(recipe, engine, run, model, metrics))
    return run.source


def merged_gaps(recipe: Recipe, engine: Engine, run: Run, model: nn.Module, metrics: Metrics) -> str:
    """What either merge would do to the answers, so that a user can choose; keeps what the second one needs.

    Collective.
    """
    examples = run.corpus.some(recipe.per_device_eval_batch_size)
    (micro,) = Batches(examples, len(examples), 1, 0, 1, 0, pad_id(run.tokenizer), 1).step(0)
    inputs = micro.inputs(engine.device)
    bases: dict[str, export.Merging | None] = dict.fromkeys(("original", "dequantized"))
    with engine.together():
        if engine.main:
            output = recipe.output
            export.Backbone.save(output / export.BACKBONE, run.model)
            lora = export.Lora.open(output / "adapter")
            bases["original"] = export.Merging(run.source, lora)
            bases["dequantized"] = export.Merging(
                run.source, lora, backbone=export.Backbone.open(output / export.BACKBONE)
            )
    model.eval()
    lines = []
    for base, found in zip(bases, export.gaps(run.model, model, inputs, list(bases.values())), strict=True):
        if found is not None:
            metrics.write("gap", run.total_steps, base=base, logits=found.logits, agreement=found.agreement)
            lines.append(f"merged into the {base} weights: {found}{' (merge_base)' * (base == recipe.merge_base)}")
    return "\n".join(lines)


def clear(output: Path, going_on: bool) -> None:
    """Removes what an earlier run left where overwrite_output_dir allows it, so that nothing of two runs is mixed;
    other files stay.
    """
    for name in ("adapter", "merged", *([] if going_on else ["tensorboard", checkpoint.FOLDER])):
        if (output / name).exists():  # what cannot be removed is an error now, not after the training
            shutil.rmtree(output / name)
    (output / export.BACKBONE).unlink(missing_ok=True)


def make_engine(recipe: Recipe) -> Engine:
    if recipe.engine == "plain":
        return Plain(recipe.ddp_timeout)
    if recipe.engine == "fsdp":
        return FSDP(recipe.fsdp, recipe.ddp_timeout)
    from llm_lowrank.engines.zero import Zero  # deepspeed is imported only when it is asked for

    return Zero(deepspeed_config(recipe), recipe.ddp_timeout)


def prepare(recipe: Recipe, engine: Engine) -> Run:
    """Reads the data and checks everything that a mistake in the recipe could break; no weights yet.

    No communication.
    """
    if not engine.main:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    source = Source.open(recipe.model_name_or_path)
    tokenizer, corpus, batches = read_data(recipe, source.path, engine.rank, engine.world)
    total = recipe.max_steps if recipe.max_steps > 0 else batches.total_steps
    model, adapters = build_model(recipe, source.path)
    exchange_steps = recipe.method.schedule(total, adapters)
    unused = loading.bind(model, adapters, source)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    run = Run(source, tokenizer, corpus, model, adapters, batches, total, exchange_steps, unused)
    if engine.main:
        check_writable(recipe.output)
    return run


def find_checkpoint(recipe: Recipe, engine: Engine, run: Run) -> None:
    """Sets run.resumed. Rank 0 reads all of it once, to compare checksums; the others open what it has found.

    Collective.
    """
    with engine.together():
        if engine.main:
            run.resumed, run.notes = find_resumable(recipe, run.source, run.facts)
    path = engine.gather(None if run.resumed is None else str(run.resumed.path))[0]
    with engine.together():
        if isinstance(path, str) and not engine.main:
            run.resumed = Checkpoint.open(Path(path), checked=True)


def find_resumable(recipe: Recipe, source: Source, facts: dict[str, int | str]) -> tuple[Checkpoint | None, list[str]]:
    """What resume_from_checkpoint names, checked against this run, and what is to be said about it."""
    asked = recipe.resume_from_checkpoint
    if asked == "none":
        return None, []
    if asked == "auto":
        found, damaged = checkpoint.newest(recipe.output)
        notes = [f"NOT used: {line}" for line in damaged]
        if found is None and damaged:
            damaged.append("resume_from_checkpoint: no checkpoint is whole; move them away to start from the beginning")
            raise ValueError("\n".join(damaged))
        if found is None:
            return None, [f"no checkpoint in {recipe.output}: starting from the beginning"]
    else:
        found, notes = Checkpoint.open(Path(asked).expanduser()), []
    check_same_run(recipe, found.state["recipe"], found.path)
    if found.state["base"] != source.fingerprint:
        raise ValueError(f"{found.path} was written over another model than the one that is in {source.path} now")
    saved = found.state["data"]
    other = {name for name in facts.keys() | saved.keys() if facts.get(name) != saved.get(name)}
    if other == {"data"}:
        raise ValueError(
            f"{found.path} was written by a run over other data: what {recipe.data.dataset} holds has changed since "
            "then"
        )
    if other:
        raise ValueError(
            f"{found.path} was written by a run with {saved}, now it is {facts}; set per_device_train_batch_size and "
            "gradient_accumulation_steps so that their product with the number of ranks is the same, and use the same "
            "data"
        )
    return found, [*notes, f"going on from {found.path}: {found.step} of {facts['total_steps']} steps are done"]


def opening(recipe: Recipe, engine: Engine, run: Run) -> str:
    """What is about to be trained, and where exchanges will go."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    padding = run.tokenizer.convert_ids_to_tokens(pad_id(run.tokenizer))
    lines = [
        f"{type(recipe.method).__name__} on {len(run.adapters)} modules of {run.source.path}: {trained:,} trainable "
        "parameters",
        f"{type(engine).__name__} engine, {engine.world} rank(s) on {engine.device.type}, {describe_storage(recipe)}; "
        f"{run.total_steps} steps of "
        f"{run.batches.global_batch} {amount(run)} ({len(run.corpus.held_out)} held out)",
        f"prompts: {', '.join(run.corpus.styles)}; padding: {padding}, masked and never trained",
        "attention: " + ", ".join(attention(recipe)),
    ]
    lines += run.notes
    if run.unused:
        lines.append(
            f"not used of the checkpoint: {len(run.unused)} tensors, "
            f"{', '.join(run.unused[:3])}{', ...' * (len(run.unused) > 3)}"
        )
    if run.corpus.dropped or run.corpus.truncated:
        lines.append(f"data: {run.corpus.truncated} examples truncated, dropped {run.corpus.dropped or 'none'}")
    if run.exchange_steps and isinstance(adapter := run.adapters[0], PairAdapter):
        where = "kept in a bank beside the weight" if adapter.bank_A is not None else "fused into the weight"
        lossy = "would round away part of" if adapter.codec.writable else "would round away"
        why = "holds" if adapter.codec.holds_small_updates else lossy
        lines.append(
            f"exchanges after steps {', '.join(map(str, run.exchange_steps))}; frozen pairs are {where}, which in "
            f"{describe_storage(recipe)} "
            f"{why} small updates"
        )
    return "\n".join(lines)


def amount(run: Run) -> str:
    """What the samples of a batch are, and how many there are."""
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


def batch_loss(
    model: nn.Module, batch: MicroBatch, device: torch.device, layer: nn.Module | None = None, flat: bool = False
) -> Tensor:
    """Negative log-likelihood of the trained tokens, summed, so that shares of a global batch add up to its mean.

    layer: see loss.py. flat: see packing.py.
    """
    return sum_loss(model, batch.inputs(device, flat), batch.targets(flat), layer)


class Seen:
    """Loss, tokens and time since the last report."""

    def __init__(self) -> None:
        # of the step that is being made; on the device: reading it every step would wait for the device
        self.now: Tensor | float = 0.0
        self._restart()

    def _restart(self) -> None:
        self.loss: Tensor | float = 0.0
        self.tokens, self.steps, self.good, self.began = 0, 0, 0, time.perf_counter()

    def add(self, loss: Tensor, micro: MicroBatch) -> None:
        """A micro-batch."""
        self.now = self.now + loss.detach()
        self.tokens += micro.real

    def step(self, good: bool) -> None:
        """The step is done; the loss of one that was left out does not count."""
        if good:
            self.loss, self.good = self.loss + self.now, self.good + 1
        self.now, self.steps = 0.0, self.steps + 1

    def report(self, engine: Engine) -> dict[str, float | None]:
        """Means over the steps since the last report, of all ranks; None: all were left out. Collective."""
        totals = torch.tensor([float(self.loss), float(self.tokens)], dtype=torch.float64, device=engine.device)
        loss, tokens = engine.sum(totals).tolist()
        seconds, steps, good = time.perf_counter() - self.began, self.steps, self.good
        self._restart()
        return {
            "loss": loss / good if good else None,
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / steps,
        }


def report_skipped_step(recipe: Recipe, step: int, norm: float, skipped: int, row: int) -> str:
    """What is said of a step without a finite gradient, or FloatingPointError if it ends the run."""
    what = f"step {step}: the gradient norm is {norm}"
    if recipe.on_nan == "stop":
        raise FloatingPointError(
            f"{what}; lower learning_rate, look at the data, or leave such steps out with --on_nan skip"
        )
    if row == LEFT_OUT:
        raise FloatingPointError(
            f"{what}, as in the {row - 1} steps before it; lower learning_rate or look at the data"
        )
    return f"{what}: left out ({skipped} of {step} steps so far)"


@dataclass(frozen=True)
class Evaluation:
    loss: float | None  # mean over the trained tokens of the held-out examples; None without any
    exact_match: float | None = None
    count: int = 0
    samples: tuple[tuple[str, str, str, float], ...] = ()

    def __str__(self) -> str:
        loss = "no held-out examples" if self.loss is None else f"held-out loss {self.loss:.4f}"
        return (
            loss
            if self.exact_match is None
            else f"{loss}, exact match {self.exact_match:.1%} of {self.count} held-out questions"
        )


def held_out_loss(
    engine: Engine,
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    filler: int,
    layer: nn.Module | None = None,
) -> float:
    """Mean over the trained tokens of the examples. layer: see loss.py. Collective."""
    batches = Batches(examples, batch_size, 1, engine.rank, engine.world, 0, filler, 1)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    model.eval()
    with torch.no_grad():
        for t in tqdm(range(batches.total_steps), desc="evaluate", unit="batch", leave=False, disable=not engine.main):
            for micro in batches.step(t):
                total += batch_loss(model, micro, engine.device, layer)
    return float(engine.sum(total)) / int(batches.trained.sum())


def answer_room(examples: Sequence[Example]) -> int:
    """Tokens that an answer may have: none that the data gives has more."""
    return max(example.trained for example in examples) + 4


def evaluate(recipe: Recipe, engine: Engine, run: Run, model: nn.Module, step: int, metrics: Metrics) -> Evaluation:
    """Loss on the held-out examples and, if the data has them, answers to the held-out questions. Collective."""
    held_out = run.corpus.held_out
    if not len(held_out):
        return Evaluation(None)
    found = Evaluation(
        held_out_loss(engine, model, held_out, recipe.per_device_eval_batch_size, pad_id(run.tokenizer), run.loss_layer)
    )
    if run.corpus.questions:
        report = accuracy(
            run.model,
            run.tokenizer,
            run.corpus.questions,
            engine.rank,
            engine.world,
            engine.sum,
            answer_room(held_out),
            recipe.per_device_eval_batch_size,
            synced=engine.shards_parameters and engine.world > 1,
        )
        found = Evaluation(found.loss, report.exact_match, report.count, tuple(report.samples))
        metrics.write("eval", step, exact_match=report.exact_match, mean_score=report.mean_score)
    model.train()
    metrics.write("eval", step, loss=found.loss)
    return found


def log_exchange(metrics: Metrics, step: int, what: str, event: Exchanged) -> str:
    """Records an exchange and returns its line."""
    milliseconds = event.seconds * 1000
    metrics.write(
        "exchange",
        step,
        what=what,
        modules=event.modules,
        **{event.unit: event.pairs},
        into=event.into,
        drift=event.drift,
        lost=event.lost,
        milliseconds=milliseconds,
        bytes=event.traffic,
    )
    if event.into == "bank":
        lost = f", compressing the bank took {event.lost:.1e} of it" if event.lost else ""
    else:
        lost = f", rounding took {event.lost:.1%} of the update" if event.lost > 1e-4 else ""
    return (
        f"step {step}: {what}: {event.pairs} {event.unit} of {event.modules} modules, frozen ones into the "
        f"{event.into}; "
        f"largest drift {event.drift:.1e}{lost}; {milliseconds:.0f} ms, {event.traffic / 1e6:.1f} MB communicated"
    )


def _silent(line: str) -> None:
    """Ranks other than 0 do not print."""
