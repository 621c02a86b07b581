"""benchmarks/gpu.py on the CPU, with tiny shapes, so that it works on the day when there is a GPU."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu_results import PREDICTIONS, Results, bad_rows, read, table

ROOT = Path(__file__).parents[1]
CHEAP = ("codecs", "ceilings", "decode", "layer", "dense")


def run(out: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> str:
    """Start the script as a user does; return what it printed."""
    command = [*launcher, str(ROOT / "benchmarks/gpu.py"), "--out", str(out), "--device", "cpu", "--small", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check(out: Path, items: list[str]) -> None:
    """Every item has rows, none is bad, and what is predicted is measured."""
    known = read(out)
    assert set(known) == {"machine", *items} and not bad_rows(known, items)
    assert known["machine"]["card"] == "cpu" and "--small" in known["machine"]["command"]
    written = (out / "table.md").read_text()
    for item in items:
        assert known[item]["rows"] and f"## {item}" in written
    rows = {(item, row["row"]): row for item in items for row in known[item]["rows"]}
    for item, row, figure in PREDICTIONS:
        # the memory of a CPU is not read
        assert item not in items or figure in rows[item, row] or figure == "peak GB", (item, row, figure)


def test_the_cheapest_items_run_on_the_cpu(tmp_path):
    said = run(tmp_path, "--only", *CHEAP)
    check(tmp_path, list(CHEAP))
    assert all(line.startswith("[cpu] ") for line in said.splitlines()[:-2])


@pytest.mark.wide
def test_the_whole_script_runs_on_the_cpu(tmp_path):
    run(tmp_path)
    check(tmp_path, list(gpu.ITEMS))


@pytest.mark.wide
def test_what_one_gpu_cannot_show_runs_on_two_ranks_of_gloo(tmp_path):
    run(
        tmp_path,
        "--ranks",
        launcher=(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    )
    known = read(tmp_path)
    names = ["ranks_laws", "ranks_links", "ranks_steps"]
    assert set(known) == {"machine", *names} and not bad_rows(known, names)
    assert len(known["ranks_laws"]["rows"]) > 30 and (tmp_path / "ranks.md").is_file()


# --- items that fail --------------------------------------------------------------------------------------------------


def dies(args: argparse.Namespace, results: Results) -> None:
    results.add("before", x=1)
    os._exit(7)


def hangs(args: argparse.Namespace, results: Results) -> None:
    time.sleep(1000)


def breaks(args: argparse.Namespace, results: Results) -> None:
    results.cell("this row", lambda: {"x": 1 / 0})
    results.cell("the next row", lambda: {"x": 2})
    raise ValueError("so be it")


def works(args: argparse.Namespace, results: Results) -> None:
    results.cell("a row", lambda: {"x": 1})
    results.seconds = 0
    results.cell("a late row", lambda: {"x": 1})


def test_an_item_that_hangs_or_dies_costs_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    items = {f.__name__: gpu.Item(__name__, f.__name__, 1, "-") for f in (dies, hangs, breaks, works)}
    args = argparse.Namespace(out=tmp_path, small=False)
    left, processes = items, 0
    while left:
        left, processes = gpu.follow(left, args), processes + 1
    known = read(tmp_path)
    assert processes == 3
    assert known["dies"]["error"] == "the process died with exit code 7" and known["dies"]["rows"][0]["x"] == 1
    assert known["hangs"]["error"] == "more than 1.5 s, the process was ended"
    assert known["breaks"]["error"] == "ValueError: so be it"
    broken, fine = known["breaks"]["rows"]
    assert broken["error"] == "ZeroDivisionError: division by zero" and "1 / 0" in broken["trace"] and fine["x"] == 2
    good, late = known["works"]["rows"]
    assert good["x"] == 1 and late["skipped"] == "the item's 0 s were over"
    assert len(bad_rows(known, items)) == 4
    assert "ZeroDivisionError" in table(known, dict.fromkeys(items, "-"))
