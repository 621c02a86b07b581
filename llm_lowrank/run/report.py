"""The report of a run, output_dir/report.html: one page, made of the files in output_dir alone.

`llm-lowrank report RUN ...` writes the reports of these output folders again, for example after a run was stopped.
`llm-lowrank compare RUN RUN ... [--output compare.html]` puts several runs on one page. Exit codes: 0 done; 2 a folder
is no run's, or a file cannot be read or written.

A run writes its report at the end. `log_start` records at the start what no other record of metrics.jsonl has.
results.py reads the files, report_page.py makes the page of them, drawing.py has its charts and tables.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llm_lowrank.models.card import Card
from llm_lowrank.models.checkpoint import whole_shape
from llm_lowrank.models.loading import Loaded
from llm_lowrank.models.push import push
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.files import write_text
from llm_lowrank.run import forecast, report_page
from llm_lowrank.run.hardware import Gpu, find
from llm_lowrank.run.memory import Predicted
from llm_lowrank.run.merging import merge_adapter
from llm_lowrank.run.messages import describe_batch
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run
from llm_lowrank.run.recipe import Recipe
from llm_lowrank.run.results import Results, read_results

REPORT = "report.html"
PACKAGES = (
    *("llm-lowrank", "torch", "deepspeed", "transformers", "tokenizers", "datasets"),
    *("bitsandbytes", "flash-attn", "liger-kernel", "numpy"),
)


# --- what a run does --------------------------------------------------------------------------------------------------


def log_start(metrics: Metrics, run: Run, loaded: Loaded, predicted: Predicted) -> None:
    """Record what loading did, and what this start trains, on what, with which versions."""
    step, engine, device = run.resume_step or 0, run.engine, run.engine.device
    metrics.write("load", step, **loaded.figures())
    facts: dict[str, Any] = {
        "model": run.source.name,
        "engine": f"{type(engine).__name__}, {engine.world} rank(s) on {device.type}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "steps": run.total_steps,
        "batch": f"{run.batches.global_batch} {describe_batch(run)}",
        "held_out": len(run.corpus.held_out),
        "trainable": sum(whole_shape(p).numel() for p in run.model.parameters() if p.requires_grad),
        "modules": [adapter.name for adapter in run.adapters],
        "versions": versions(),
    }
    if device.type == "cuda" and (gpu := find(facts["device"])) is not None:
        facts["predicted"] = predicted_step(run, predicted, gpu)
    metrics.write("run", step, facts=facts)


def predicted_step(run: Run, predicted: Predicted, gpu: Gpu) -> dict[str, Any]:
    """What the data sheet of a GPU says of a step: from all traffic hidden behind the products to none of it."""
    ranks, nodes = forecast.ranks(run.recipe, run.engine.world)
    step = forecast.predict_step(run.recipe, run.work, predicted.held, predicted.sizes, gpu, ranks, nodes)
    tokens = step.tokens * ranks
    return {
        "gpu": gpu.names[0],
        "seconds_per_step": [step.least, step.most],
        "tokens_per_second": [tokens / step.most, tokens / step.least],
    }


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a training depends on; those that are not there are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def merge_and_report(recipe: Recipe, source: Source) -> None:
    """Write output_dir/merged if the recipe asks for it, the model cards and output_dir/report.html in any case, and
    upload what is to be uploaded. Call on rank 0. ValueError says what was not done; all else is on the disk then.
    """
    try:
        if recipe.save_merged:
            tqdm.write(f"merged:  {merge_adapter(recipe, source)}")
    finally:
        tqdm.write(try_report(recipe.output))
    if recipe.push_to_hub:
        try:
            tqdm.write("\n".join(push(recipe.output, recipe.hub_model_id, recipe.hub_private_repo)))
        except ValueError as error:
            again = f"llm-lowrank push {shlex.quote(str(recipe.output))} tries again"
            raise ValueError(f"the run is done and saved, but not uploaded: {error} {again}") from error


def try_report(folder: Path) -> str:
    """Write cards and report of a finished run and return a line about it. A fault is a warning: the run is done."""
    try:
        found = read_results(folder)
        card = Card.of(
            found.settings,
            changed=found.changed,
            facts=found.facts,
            evaluations=found.of("eval") + found.of("kept"),
            adapter=found.adapter,
        )
        card.write(folder)
        return f"report:  {write_report(found)}"
    except Exception as error:
        return (
            f"warning: the run is done and saved, but its report was not written: {type(error).__name__}: {error}; "
            f"llm-lowrank report {shlex.quote(str(folder))} tries again"
        )


# --- writing ----------------------------------------------------------------------------------------------------------


def write_report(run: str | Path | Results) -> Path:
    """Write report.html into an output folder and return its path. ValueError if the folder is no run's."""
    results = run if isinstance(run, Results) else read_results(run)
    path = results.folder / REPORT
    write_text(path, report_page.report(results))
    return path


def write_comparison(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write one page about several runs and return its path. ValueError if a folder is no run's."""
    path = Path(path).expanduser()
    write_text(path, report_page.comparison([read_results(folder) for folder in folders]))
    return path


def main(argv: Sequence[str]) -> int:
    """Do what the command line says: `report RUN ...` or `compare RUN RUN ...`. Return the exit code."""
    parser = argparse.ArgumentParser("llm-lowrank", description="Reports of runs as HTML pages.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("report", help="write RUN/report.html again")
    one.add_argument("runs", nargs="+", metavar="RUN", help="the output folder of a run")
    many = verbs.add_parser("compare", help="put several runs on one page")
    many.add_argument("runs", nargs="+", metavar="RUN", help="the output folder of a run, two or more of them")
    many.add_argument("--output", default="compare.html", help="the page to write, by default compare.html")
    options = parser.parse_args(argv)
    try:
        if options.verb == "report":
            for run in options.runs:
                print(f"report: {write_report(run)}")
        elif len(options.runs) < 2:
            raise ValueError("compare needs the output folders of two runs or more; for one run use report")
        else:
            print(f"comparison: {write_comparison(options.runs, options.output)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
