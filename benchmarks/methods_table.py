"""The table of docs/methods/comparison.md: what each method costs on one model, and what it learned on the small one.

The model is LLaMA-3.1-8B, built from its config without weights. Every method has its defaults, but for CHANGED. Exact
match comes from the runs of benchmarks/quality.py small. `python benchmarks/pages.py` writes the table.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.quality import PAGE, ROOT, best, of, rates_of, read_runs
from benchmarks.site import method_files, title_of
from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.codecs import Dense
from llm_lowrank.models.architectures import skeleton
from llm_lowrank.run.flops import full_shape, work_of
from llm_lowrank.run.memory import sizes_of

CONFIG = ROOT / "tests" / "configs" / "Llama-3.1-8B"
TOKENS, STEPS = 2048, 3000
RANK = 16
# Beside their defaults: LoRA's rank, where a paper's default is another one
CHANGED = {
    "lora_ga": {"rank": RANK},
    "lora_one": {"rank": RANK},
    "sbora": {"rank": RANK},
    "srlora": {"target_rank": 2 * RANK},
}


def method_of(name: str) -> Method:
    return Method.get_known_choices()[name](**CHANGED.get(name, {}))


def row(name: str, step_of_lora: float | None) -> tuple[str, float]:
    """Return a line of the table, and the FLOPs of a step."""
    model, method = skeleton(CONFIG, torch.bfloat16, "sdpa"), method_of(name)
    adapters = attach(model, method, Dense(torch.bfloat16), 0)
    sizes = sizes_of(model, method)
    trained = sum(elements for elements, _ in sizes.trained)
    flops = work_of(model, recomputed=False).model(full_shape(1, TOKENS))
    exchanges = len(method.schedule(STEPS, adapters))
    cells = [
        f"[{title_of(name)}]({name}.md)",
        f"{trained / 1e6:.2f} M",
        gigabytes(sizes.parts[1]),
        gigabytes(sum(sizes.statistics)),
        f"{flops / (step_of_lora or flops):.2f}",
        str(exchanges),
        learned(name),
    ]
    return f"| {' | '.join(cells)} |", flops


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 5e6 else "-"


def learned(name: str) -> str:
    """Exact match on the small comparison, %; empty without a reported run."""
    runs = read_runs(PAGE.parents[1] / "benchmarks" / "results" / "quality" / "small")
    results = of(runs, name, False, best(runs, name)) if rates_of(runs, name) else []
    return f"{100 * statistics.mean(result['exact_match'] for result in results):.1f}" if results else ""


def table() -> str:
    lines = [
        "| method | trained | frozen beside W | remembered of gradients | FLOPs of a step, of LoRA's "
        "| events in 3000 steps | small model, % |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    step_of_lora = None
    for name in method_files():
        line, flops = row(name, step_of_lora)
        step_of_lora = step_of_lora or flops
        lines.append(line)
    return "\n".join(lines)
