"""What the methods learn on a real model, on tasks that LoRA neither fails nor solves, and what they forget on the way.

    python benchmarks/real.py pilot     LoRA alone on eighteen tasks; the tasks of the comparison are chosen by this
    python benchmarks/real.py run       every method on every chosen task
    python benchmarks/real.py table     writes the tables of docs/quality.md from the results of the runs

The model is SmolLM2-135M-Instruct. With one GPU and sixteen cores:

    python recipes/data/stdlib_code.py output/stdlib-code.jsonl
    python recipes/data/stdlib_code.py output/stdlib-short-code.jsonl --longest 300
    nvidia-cuda-mps-control -d          # lets the processes use the GPU side by side
    python benchmarks/real.py pilot --jobs 14
    python benchmarks/real.py run --jobs 14

Two CPU cores whose products in bfloat16 are fast (avx512_bf16) make two runs at a time with `--jobs 2`. A run of
`fractions` takes 4 minutes of one of them, CORE's takes 11 to 17.

`--steps 2400` takes twenty times as many. `--minutes 8` begins no run after eight minutes; what is missing is made by
the next start.

Tasks. Questions come from reasoning-gym, and their exact match is that of generated answers. `pilot` trains LoRA once
on each of CANDIDATES. Those are taken whose exact match is nearest to 50 %, of different kinds if possible, provided
that it is from 20 to 80 % and at least ten points above that of one answer for all questions.
`alpaca` and `short_code`, functions of at most 300 characters, are text, of which only the held-out loss is known.

Rates. Every method has its own rate for each task. It is chosen by the held-out loss of runs of half the steps, with
one seed that is not reported, among three rates, and as long as the best one is the first or the last, among the next
one on that side too.

Forgetting. Before and after a run the loss is taken of text that it was not trained on: the held-out examples of
`alpaca` and `code`.

Everything else is as in benchmarks/quality.py: one JSON file a run, the same data, batches, warm-up, cosine schedule,
clipping and modules for all methods, AdamW without weight decay, and about the same number of trained parameters.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import draccus
import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.gpu_device import CUDA, card_name
from benchmarks.quality import (
    PAGE,
    ROOT,
    TITLES,
    Comparison,
    Result,
    Spec,
    best,
    between_marks,
    of,
    pool_of,
    quiet,
    rates_of,
    read_runs,
    silence,
    spread,
)
from benchmarks.quality import methods as all_methods
from llm_lowrank.adapters.method import Method
from llm_lowrank.data import Data, Example, load_corpus, tokenizer_of
from llm_lowrank.methods.core import Core
from llm_lowrank.models.architectures import skeleton
from llm_lowrank.models.source import DEMO, Source
from llm_lowrank.numerics.files import write_json, write_text
from llm_lowrank.run.calibration import calibrate
from llm_lowrank.run.held_out import evaluate, held_out_loss
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run, make_engine, prepare
from llm_lowrank.run.recipe import Recipe
from llm_lowrank.run.signals import Signals
from llm_lowrank.run.train import load, train_steps

GYM = "reasoning-gym:"
CODE, SHORT_CODE = "output/stdlib-code.jsonl", "output/stdlib-short-code.jsonl"
RATES = (6e-5, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2)
FIRST = slice(2, 5)  # of RATES: those that every method is tried with
TUNING, PILOT, SEEDS = 100, 200, (0, 1, 2)
WINDOW = (0.2, 0.8)  # of LoRA's exact match
MARGIN = 0.1  # of LoRA's exact match over that of one answer for all questions
TAKEN = 4  # tasks
METHODS = ("lora", "lora_plus", "dora", "rasa", "losia", "srlora", "core", "core_4r")
CONTROLS = {  # made only if they are named
    "core_light": "CORE, bases of 64 samples in two passes",
    "core_random": "CORE between random bases",
}
EVERY = (*METHODS, *CONTROLS)
NAMES = TITLES | {"core_4r": "CORE, p = 4 r"} | CONTROLS


@dataclass(frozen=True)
class Task:
    """Something to learn. A task of questions has settings of reasoning-gym."""

    kind: str
    dataset: str
    settings: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0  # of the comparison's steps, where the data is small

    @property
    def asks(self) -> bool:
        return self.dataset.startswith(GYM)

    @property
    def is_code(self) -> bool:
        return self.dataset in (CODE, SHORT_CODE)


def gym(kind: str, name: str, **settings: Any) -> Task:
    return Task(kind, GYM + name, settings)


CANDIDATES: dict[str, Task] = {
    "sums": gym("arithmetic", "chain_sum", min_terms=3, max_terms=3, min_digits=2, max_digits=2),
    "long_sums": gym("arithmetic", "chain_sum", min_terms=4, max_terms=5, min_digits=1, max_digits=2),
    "products": gym("arithmetic", "products", min_digits=2, max_digits=2),
    "decimals": gym("arithmetic", "decimal_chain_sum", max_terms=2, max_digits=2, max_decimal_places=2),
    "expressions": gym("arithmetic", "basic_arithmetic", min_terms=3, max_terms=3, max_digits=1),
    "legs": gym("arithmetic", "leg_counting", min_animals=2, max_animals=3, max_instances=5),
    "divisors": gym("numbers", "gcd", max_value=200),
    "fractions": gym("numbers", "fraction_simplification", max_value=30, max_factor=12, styles=["plain"]),
    "bases": gym("numbers", "base_conversion", max_base=8, min_value=1, max_value=5000),
    "equations": gym("numbers", "simple_equations", max_terms=2, max_value=30),
    "backward": gym("letters", "spell_backward", max_word_len=8),
    "letters": gym("letters", "letter_counting", min_words=4, max_words=8),
    "insertion": gym("letters", "string_insertion", max_string_length=10),
    "number_lists": gym("lists", "number_sorting", min_numbers=5, max_numbers=8, max_decimals=0),
    "word_lists": gym("lists", "word_sorting", min_words=4, max_words=7),
    "filters": gym("lists", "number_filtering", min_numbers=5, max_numbers=8, max_decimals=1),
    "reversals": gym("lists", "word_sequence_reversal", min_words=6, max_words=12),
    "families": gym("relations", "family_relationships", max_family_size=6),
}
TEXTS: dict[str, Task] = {  # whose loss is taken before and after a run on another task
    "code": Task("text", CODE, share=0.5),
    "alpaca": Task("text", "recipes/data/alpaca-sample.json", share=0.25),
}
LEARNED = {"short_code": Task("text", SHORT_CODE, share=1 / 3), "alpaca": TEXTS["alpaca"]}
TASKS = CANDIDATES | TEXTS | LEARNED


@dataclass(frozen=True)
class Setting:
    """The setting of a comparison on one task."""

    task: Task
    steps: int = 120
    batch: int = 16
    warmup: int = 12
    rank: int = 16
    held_out: int = 256
    max_length: int = 256
    dtype: str = "bfloat16"
    model: str = DEMO

    def length(self, tuning: bool) -> int:
        """The number of steps of a run. Rates are chosen by runs of half the steps."""
        steps = max(2, round(self.steps * self.task.share))
        return steps // 2 if tuning and self.task.asks else steps

    def data(self) -> Data:
        if self.task.asks:
            size = self.steps * self.batch + self.held_out
            generated = {"task": dict(self.task.settings), "size": size, "held_out": self.held_out}
            return Data(dataset=self.task.dataset, max_length=self.max_length, **generated)
        # of code no module of a held-out function is trained on, and the body follows the docstring
        code = {"held_out_by": "module", "prompt_style": "plain"} if self.task.is_code else {}
        return Data(dataset=self.task.dataset, max_length=self.max_length, held_out=64, **code)  # type: ignore[arg-type]


@dataclass
class Adapted(Result):
    """The result of a run, with the losses of other text before and after it."""

    others: dict[str, tuple[float, float]] = field(default_factory=dict)
    exact_match_before: float | None = None  # of the pilot's runs
    constant: float | None = None  # exact match of one answer for all questions, in the pilot's runs
    device: str = ""


def methods(model: PreTrainedModel, rank: int, steps: int) -> dict[str, Method]:
    """Return the settings of methods as benchmarks/quality.py has them, of CORE at p = 4 r, and of the controls."""
    known = all_methods(model, rank, steps, "auto") | {
        "core_4r": Core(p=4 * rank),
        "core_light": Core(like_rank=rank, samples=64, svd_niter=0),
        "core_random": Core(like_rank=rank, samples=0),
    }
    return {name: known[name] for name in EVERY}


# --- one run ----------------------------------------------------------------------------------------------------------


def recipe_of(setting: Setting, method: Method, spec: Spec, output: str) -> Recipe:
    return Recipe(
        model_name_or_path=str(Source.open(setting.model).path),
        output_dir=output,
        save_merged=False,
        engine="plain",
        dtype=setting.dtype,  # type: ignore[arg-type]
        # on CPUs sdpa in bfloat16 takes four times as long as plain products, forward and backward, for 64 tokens
        attn_implementation="auto" if CUDA or setting.dtype == "float32" else "eager",
        report_to="none",
        optim="sgd" if method.own_step else "adamw",
        method=method,
        data=setting.data(),
        per_device_train_batch_size=setting.batch,
        # on CPUs all processes share the memory of the host
        per_device_eval_batch_size=128 if CUDA else 32,
        max_steps=setting.length(spec.tuning),
        seed=spec.seed,
        learning_rate=spec.rate,
        warmup_steps=min(setting.warmup, setting.length(spec.tuning) // 2),
        logging_steps=10,
    )


def run_task(setting: Setting, spec: Spec) -> Adapted:
    """Run the library's own loop once, and take the losses of other text before and after it."""
    blank = skeleton(Source.open(setting.model).path, torch.float32, "sdpa")
    method = methods(blank, setting.rank, setting.length(spec.tuning))[spec.method]
    with tempfile.TemporaryDirectory() as output, Signals() as signals, Metrics(output, "none", True) as metrics:
        recipe = recipe_of(setting, method, spec, output)
        run = prepare(recipe, make_engine(recipe))
        model, _ = load(run, signals)
        result = Adapted(sum(p.numel() for p in model.parameters() if p.requires_grad), device=card_name())
        others = [] if spec.tuning or spec.seed == PILOT else other_texts(setting)
        before = {name: text_loss(run, model, name) for name in others}
        if spec.seed == PILOT:
            result.exact_match_before = evaluate(run, model, 0, metrics).exact_match
            answers = Counter(question.answer for question in run.corpus.questions)
            result.constant = max(answers.values()) / answers.total()
        began = time.perf_counter()
        try:
            calibrate(run, model)
            train_steps(run, model, metrics, signals)
        except FloatingPointError:  # diverged
            return result
        result.seconds = time.perf_counter() - began
        if spec.tuning:
            loss = own_loss(run, model)
        else:
            known = evaluate(run, model, run.total_steps, metrics)
            loss, result.exact_match = known.loss, known.exact_match or 0.0
        result.others = {name: (before[name], text_loss(run, model, name)) for name in others}
        records = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    result.train_curve = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
    result.loss = loss if loss is not None and math.isfinite(loss) else None
    return result


def run_alone(setting: Setting, spec: Spec) -> Adapted:
    """Make a run and give the memory of the device back: the other processes need it."""
    try:
        return run_task(setting, spec)
    finally:
        gc.collect()  # a model and its adapters refer to each other
        torch.cuda.empty_cache()


def silently(setting: Setting, spec: Spec) -> Adapted:
    """Make a run without the library's output."""
    with silence():
        return run_alone(setting, spec)


def own_loss(run: Run, model: nn.Module) -> float:
    """Return the loss of the run's own held-out examples."""
    size = run.recipe.per_device_eval_batch_size
    return held_out_loss(run.engine, model, run.corpus.held_out, size, run.batches.pad_id, run.loss_layer)


def other_texts(setting: Setting) -> list[str]:
    """Return the names of the texts that a run is not trained on."""
    task = setting.task
    return [name for name, text in TEXTS.items() if text != task and not (text.is_code and task.is_code)]


def text_loss(run: Run, model: nn.Module, name: str) -> float:
    """Return the loss of the held-out examples of a text; they are the same ones in every run."""
    examples = text_examples(name, str(run.source.path))
    loss = held_out_loss(run.engine, model, examples, 32, run.batches.pad_id, run.loss_layer)
    model.train()
    return loss


@functools.cache
def text_examples(name: str, folder: str) -> Sequence[Example]:
    """Return the held-out examples of a text for the tokenizer of a model's folder, encoded once in each process."""
    data = Setting(TEXTS[name]).data()
    return load_corpus(data, tokenizer_of(folder, data.chat_template), 0).held_out


# --- the comparison ---------------------------------------------------------------------------------------------------


def comparison(folder: Path, setting: Setting) -> Comparison:
    """Return the comparison on one task. Its folder is named by the task."""
    model = skeleton(Source.open(setting.model).path, torch.float32, "sdpa")
    settings, tuning = (
        {k: draccus.encode(m) for k, m in methods(model, setting.rank, setting.length(short)).items()}
        for short in (False, True)
    )
    return Comparison(folder, setting, settings, tuning, functools.partial(run_alone, setting))  # type: ignore[arg-type]


def wanted(compared: Comparison, method: str, seeds: Sequence[int], rates: Sequence[float]) -> list[Spec]:
    """Return the runs that a method's next result waits for: rates to be tried, or else the runs that are reported.

    rates: those to report in the place of the one that is chosen.
    """
    if not rates:
        runs = read_runs(compared.folder)
        known = rates_of(runs, method)
        if missing := [Spec(method, rate, TUNING, True) for rate in RATES[FIRST] if rate not in known]:
            return missing
        rate = best(runs, method)
        at = RATES.index(rate)
        if rate in (known[0], known[-1]) and 0 < at < len(RATES) - 1:
            return [Spec(method, RATES[at - 1 if rate == known[0] else at + 1], TUNING, True)]
        rates = [rate]
    return [spec for rate in rates for seed in seeds if not compared.done(spec := Spec(method, rate, seed))]


def fill(
    compared: Sequence[Comparison],
    names: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    jobs: int,
    until: float,
) -> None:
    """Make the runs of all comparisons, those of the first one first. No run begins after `until`.

    rates: see `wanted`. A run that finds no memory is made again later, beside one run less. After another error the
    method is left out of that comparison.
    """
    chains = [(one, name) for one in compared for name in names]
    running: dict[Future[str], tuple[Comparison, str, Spec]] = {}
    with pool_of(jobs) as pool:
        while True:
            busy = {(one.folder, spec) for one, _, spec in running.values()}
            ready = (
                (one, name, spec)
                for one, name in chains
                for spec in wanted(one, name, seeds, rates)
                if (one.folder, spec) not in busy
            )
            while len(running) < jobs and time.monotonic() < until and (begun := next(ready, None)):
                running[pool.submit(begun[0].make, begun[2])] = begun
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                one, name, _ = running.pop(future)
                error = future.exception()
                if isinstance(error, torch.OutOfMemoryError) and jobs > 1:
                    jobs -= 1
                    print(f"{one.folder.name}: {name} found no memory; from now on {jobs} runs at a time", flush=True)
                elif error:
                    chains = [chain for chain in chains if chain != (one, name)]
                    print(f"{one.folder.name}: {name} is left out: {type(error).__name__}: {error}", flush=True)
                else:
                    print(f"{one.folder.name}: {future.result()}", flush=True)


# --- the pilot --------------------------------------------------------------------------------------------------------


def pilot(folder: Path, setting: Setting, names: Sequence[str], rate: float, jobs: int) -> None:
    """Train LoRA once on every candidate named, and write pilot.json with the tasks chosen, again after each."""
    known: dict[str, Adapted] = {}
    with pool_of(jobs) as pool:
        runs = {
            pool.submit(silently, replace(setting, task=CANDIDATES[name]), Spec("lora", rate, PILOT)): name
            for name in names
        }
        for run in as_completed(runs):
            name = runs[run]
            if error := run.exception():
                print(f"{name}: {type(error).__name__}: {error}", flush=True)
                continue
            known[name] = result = run.result()
            print(f"{name}: {result.exact_match_before:.1%} -> {result.exact_match:.1%}, {result.seconds:.0f} s")
            columns = {
                "before": {name: result.exact_match_before for name, result in known.items()},
                "constant": {name: result.constant for name, result in known.items()},
                "exact_match": {name: result.exact_match for name, result in known.items()},
            }
            facts = {"rate": rate, "steps": setting.steps, **columns}
            write_json(folder / "pilot.json", facts | {"chosen": chosen(columns["exact_match"], columns["constant"])})


def chosen(known: dict[str, float], constant: dict[str, float]) -> list[str]:
    """Return the tasks nearest to one half, the first of each kind before all others."""
    inside = [name for name, exact in known.items() if WINDOW[0] <= exact <= WINDOW[1]]
    nearest = sorted(inside, key=lambda name: abs(known[name] - 0.5))
    nearest = [name for name in nearest if known[name] >= constant[name] + MARGIN]
    of_kind = {CANDIDATES[name].kind: name for name in reversed(nearest)}
    first = [name for name in nearest if name in of_kind.values()]
    return (first + [name for name in nearest if name not in first])[:TAKEN]


def tasks_of(folder: Path) -> dict[str, Task]:
    """Return the tasks that the pilot chose, and the texts that are learned."""
    return {name: CANDIDATES[name] for name in json.loads((folder / "pilot.json").read_text())["chosen"]} | LEARNED


# --- the page ---------------------------------------------------------------------------------------------------------


def table(folder: Path, page: Path) -> None:
    """Write the tables between the marks of the page."""
    found = {name: runs for name in tasks_of(folder) | TEXTS if (runs := read_runs(folder / name))}
    asked = {name: runs for name, runs in found.items() if name in CANDIDATES}
    titles = {
        "Exact match in %, and in brackets the mean difference from LoRA over the same seeds:": (asked, exact),
        "Held-out loss of the same runs, and of text:": (found, held_out),
        "Rates:": (found, lambda runs, name: f"{best(runs, name):g}"),
        "Loss of text that a run was not trained on, after minus before:": (found, forgotten),
        "Runs of these tables that a CPU made:": (found, on_cpu),
    }
    lines = []
    for title, (runs, cell) in titles.items():
        head, line, *body = rows(runs, cell, tuning=False)
        lines += [title, "", head, line, *body, ""] if body else []
    title = (
        "Held-out loss of the runs that rates are chosen with, at the best rate. There is one seed, and the tasks with "
    )
    lines += [title + "questions have half the steps:", "", *rows(found, tried, tuning=True)]
    write_text(page, between_marks(page.read_text(encoding="utf-8"), "tasks", "\n".join(lines)))


def rows(found: dict[str, list[dict[str, Any]]], cell: Any, tuning: bool) -> list[str]:
    """Return a table of methods and tasks. A cell without a run is empty; empty rows and columns are left out."""
    known = {
        (name, task): cell(runs, name)
        for name in EVERY
        for task, runs in found.items()
        if rates_of(runs, name) and of(runs, name, tuning, best(runs, name))
    }
    tasks = [task for task in found if any((name, task) in known for name in EVERY)]
    lines = [f"| method | {' | '.join(tasks)} |", f"|---|{'---:|' * len(tasks)}"]
    for name in EVERY:
        if any(cells := [known.get((name, task), "") for task in tasks]):
            lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return lines


def exact(runs: list[dict[str, Any]], name: str) -> str:
    values = [100 * result["exact_match"] for result in of(runs, name, False, best(runs, name))]
    return spread(values, 1) + few(values) + difference(runs, name, lambda result: 100 * result["exact_match"], 1)


def held_out(runs: list[dict[str, Any]], name: str) -> str:
    values = [result["loss"] for result in of(runs, name, False, best(runs, name)) if result["loss"] is not None]
    return spread(values, 3) + few(values) + difference(runs, name, lambda result: result["loss"], 3)


def few(values: Sequence[float]) -> str:
    """Return how many runs there are, if seeds are missing."""
    return "" if len(values) >= len(SEEDS) else f", {len(values)} of {len(SEEDS)}"


def tried(runs: list[dict[str, Any]], name: str) -> str:
    return f"{of(runs, name, True, best(runs, name))[0]['loss']:.3f}"


def forgotten(runs: list[dict[str, Any]], name: str) -> str:
    results = of(runs, name, False, best(runs, name))
    texts = sorted({text for result in results for text in result["others"]})
    both = [[result["others"][text] for result in results if result["others"]] for text in texts]
    changes = [[after - before for before, after in pairs] for pairs in both]
    return ", ".join(f"{text} {spread(values, 2)}" for text, values in zip(texts, changes, strict=True))


def on_cpu(runs: list[dict[str, Any]], name: str) -> str:
    devices = [result.get("device") for result in of(runs, name, False, best(runs, name))]
    return f"{devices.count('cpu')} of {len(devices)}" if "cpu" in devices else ""


def difference(runs: list[dict[str, Any]], name: str, value: Any, digits: int) -> str:
    """Return the mean difference from LoRA over the seeds that both have, in brackets."""
    both = [by_seed(runs, method, value) for method in (name, "lora")]
    seeds = both[0].keys() & both[1].keys()
    if name == "lora" or not seeds:
        return ""
    return f" ({statistics.mean(both[0][seed] - both[1][seed] for seed in seeds):+.{digits}f})"


def by_seed(runs: list[dict[str, Any]], name: str, value: Any) -> dict[int, float]:
    """Return the values of the reported runs by their seeds, without those that are not known."""
    rate = best(runs, name) if rates_of(runs, name) else None
    found = [(r["settings"]["run"], r["result"]) for r in runs]
    values = {
        run["seed"]: value(result)
        for run, result in found
        if (run["method"], run["rate"], run["tuning"]) == (name, rate, False)
    }
    return {seed: value for seed, value in values.items() if value is not None}


# --- the command line -------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare what the methods learn on a real model.")
    parser.add_argument("what", choices=["pilot", "run", "table"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "quality" / "tasks")
    parser.add_argument("--methods", nargs="+", choices=EVERY, default=list(METHODS))
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=list(TASKS),
        help="by default those that the pilot chose; of `pilot`: all",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="seeds that are reported")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[], help="rates to report in the place of the one that is chosen"
    )
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--model", default=Setting.model, help="a folder or a name, as model_name_or_path")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=Setting.dtype)
    parser.add_argument("--pilot-rate", type=float, default=2e-3)
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after so many no run begins")
    parser.add_argument("--page", type=Path, default=PAGE, help="of `table`: the page to write into")
    args = parser.parse_args(argv)
    if args.rates and args.what != "run":
        parser.error("--rates: only `run` makes runs at given rates")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    until = time.monotonic() + 60 * args.minutes
    quiet()
    setting = Setting(Task("", ""), steps=args.steps, dtype=args.dtype, model=args.model)
    if args.what == "table":
        table(args.output, args.page)
        return
    Source.open(setting.model)  # converted once, before the processes ask for it
    if args.what == "pilot":
        names = [name for name in args.tasks or CANDIDATES if name in CANDIDATES]
        pilot(args.output, setting, names, args.pilot_rate, args.jobs)
        return
    tasks = tasks_of(args.output) if not args.tasks else {n: TASKS[n] for n in args.tasks}
    compared = [comparison(args.output / name, replace(setting, task=task)) for name, task in tasks.items()]
    fill(compared, args.methods, args.seeds, args.rates, args.jobs, until)


if __name__ == "__main__":
    main()
