"""A trace of some steps by torch's profiler: what each operation took, on the host and on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from llm_lowrank.run.prepare import Run

HEAVIEST = 10  # operations that are printed


def profiled(run: Run, steps: Iterable[int]) -> Iterator[int]:
    """Yield the steps, and trace those that profile_steps names with all that happens in them, on rank 0.

    The trace begins before the first of them and is written behind the last. It costs time and memory of its own.
    """
    asked = run.recipe.profile_steps
    if not asked or not run.engine.main:
        yield from steps
        return
    first, last = asked
    if last <= (done := run.resume_step or 0):
        run.say(f"profile_steps: steps {first} to {last} are done already; nothing is profiled")
    first = max(first, done + 1)
    tracer: profile | None = None
    try:
        for step in steps:
            if step == first <= last:
                tracer = _start(run.engine.device)
            yield step
            if step == last and tracer is not None:
                run.say(_write(run, tracer, first, last))
                tracer = None
    finally:
        if tracer is not None:  # the run ends early
            tracer.stop()


def _start(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    tracer = profile(activities=activities)
    tracer.start()
    return tracer


def _write(run: Run, tracer: profile, first: int, last: int) -> str:
    """End the trace, write it, and return where it is with the operations that took longest."""
    on_device = run.engine.device.type == "cuda"
    if on_device:
        torch.cuda.synchronize(run.engine.device)  # so that the kernels of the last step are in the trace
    tracer.stop()
    path = run.recipe.output / "profile" / f"rank{run.engine.rank}-steps-{first}-{last}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tracer.export_chrome_trace(str(path))
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    heaviest = tracer.key_averages().table(sort_by=key, row_limit=HEAVIEST, max_name_column_width=50)
    return f"profile of steps {first} to {last}: {path} (open it in https://ui.perfetto.dev)\n{heaviest}"
