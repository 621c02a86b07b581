"""What benchmarks/gpu.py finds: rows that are on the disk as soon as they are known, and the table of them.

    OUT/results.json    {"machine": the card, the software and the setting, item: {"rows": [...], "seconds": ...}, ...}
    OUT/table.md        all of it, a prediction beside a figure where there is one

A row is a dict: {"row": name, figure: value, ...}. A row of a law has "good": true or false. A row that could not be
made has "skipped" or "error" with the reason.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RESULTS = "results.json"

# What was expected of one H100 before anything had run on one, for LLaMA-3.1-8B's shapes and 4096 tokens: bytes and
# operations over the two ceilings, 3.0 TB/s and 790 TFLOP/s, with what the kernels are known to reach of them.
PREDICTIONS: dict[tuple[str, str, str], str] = {
    ("ceilings", "copy", "TB/s"): "3.0",
    ("ceilings", "bf16 product", "TFLOP/s"): "790",
    ("decode", "nf4", "decode ms"): "0.06-0.08",
    ("decode", "int8", "decode ms"): "0.06",
    ("layer", "linear, lora", "ratio"): "1.15",
    ("layer", "attention, causal", "ms"): "1.3",
    ("layer", "attention, a mask", "ms"): "6",
    ("layer", "loss, 261 rows", "ms"): "25",
    ("layer", "loss, 1024 rows", "ms"): "18",
    ("dense", "lora", "ratio"): "1.10-1.14",
    ("dense", "lora", "tokens/s"): "8500-9000",
    ("dense", "lora", "of product"): "0.36-0.38",
    ("dense", "lora", "peak GB"): "20.5",
    ("dense", "lora, masks", "tokens/s"): "6000-6500",
    ("dense", "peft, our loss", "ratio"): "1.20-1.35",
    ("dense", "peft", "peak GB"): "25",
    ("nf4", "lora", "of bf16"): "1.04-1.06",
    ("nf4", "lora", "peak GB"): "9.7",
    ("nf4", "int8 lora", "of bf16"): "1.05",
    ("exchange", "bf16", "exchange s"): "0.4-1",
    ("exchange", "bf16", "load s"): "10-20",
}


@dataclass
class Results:
    """The rows of one item."""

    item: str
    out: Path
    card: str
    seconds: float  # after which no further row is begun
    small: bool = False  # shapes that the predictions are not about
    rows: list[Row] = field(default_factory=list)
    left: float = 0.0  # GB that earlier items of the process left on the device; peaks count from there
    silent: bool = False  # of all ranks but the first

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    def add(self, name: str, /, **figures: Any) -> None:
        """Keep a row, write the item's file, print the row."""
        row: Row = {"row": name, **figures}
        self.rows.append(row)
        if self.silent:
            return
        keep(self.out, self.item, self.rows, time.monotonic() - self.began, left=self.left)
        if figures.get("good") is True:
            return  # the end of the item says how many there are
        shown_ones = {key: value for key, value in figures.items() if key != "trace"}
        cells = "  ".join(f"{key} {self._beside(name, key, value)}" for key, value in shown_ones.items())
        print(f"[{self.card}] {self.item}: {name:30} {cells}", flush=True)

    def _beside(self, row: str, figure: str, value: Any) -> str:
        prediction = None if self.small else PREDICTIONS.get((self.item, row, figure))
        return shown(value) + (f" (predicted {prediction})" if prediction else "")

    def cell(self, name: str, call: Callable[[], Row]) -> None:
        """Add the row that the call returns. One that fails is a row too, and what comes next is done all the same.

        An error of the device is raised, because a process cannot go on after it.
        """
        if time.monotonic() - self.began > self.seconds:
            self.add(name, skipped=f"the item's {self.seconds:g} s were over")
            return
        began = time.monotonic()
        try:
            figures = call()
        except Exception as error:
            self.add(name, **failure(error))
            if "CUDA error" in str(error) or "NCCL" in str(error):
                raise
        else:
            self.add(name, **figures, s=round(time.monotonic() - began, 2))


def failure(error: BaseException) -> Row:
    """The figures of a row that failed."""
    where = "".join(traceback.format_tb(error.__traceback__)[-4:])
    return {"error": f"{type(error).__name__}: {str(error)[:400]}", "trace": where, "good": False}


def read(out: Path) -> dict[str, Any]:
    """What is in a folder of results."""
    path = out / RESULTS
    return json.loads(path.read_text()) if path.is_file() else {}


def write(out: Path, known: dict[str, Any]) -> None:
    """Replace the file at once: the process may be ended at any time."""
    aside = out / f"{RESULTS}.tmp"
    aside.write_text(json.dumps(known, indent=1) + "\n")
    os.replace(aside, out / RESULTS)


def keep(out: Path, item: str, rows: list[Row], seconds: float, **more: Any) -> None:
    """Write what is known of an item."""
    write(out, read(out) | {item: {"seconds": round(seconds, 1), **more, "rows": rows}})


def shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.1e}"


def bad_rows(known: dict[str, Any], names: Collection[str]) -> list[str]:
    """The items that failed and the rows that are wrong, by name."""
    bad = []
    for item in [name for name in names if name in known]:
        bad += [f"{item}: {known[item]['error']}"] if "error" in known[item] else []
        wrong = [row for row in known[item]["rows"] if row.get("good") is False]
        bad += [f"{item}: {row['row']}: {row.get('error') or row}" for row in wrong]
    return bad


def table(known: dict[str, Any], titles: dict[str, str]) -> str:
    """The Markdown of everything that is known of these items."""
    machine = known["machine"]
    lines = [f"# {machine['card']}", "", f"`{machine['command']}`", ""]
    lines += [", ".join(f"{name} {version}" for name, version in machine["software"].items()) + ".", ""]
    if machine["small"]:
        lines += ["Tiny shapes, to see that the script works: these are no figures of the product.", ""]
    else:
        memory = "Memory is the peak of a step, above what the items before it had left on the device."
        lines += [f"In brackets is what was predicted for one H100 before the run. {memory}", ""]
    if bad := bad_rows(known, titles):
        lines += ["**Failed**", "", *(f"- {line}".replace("\n", " ") for line in bad), ""]
    for name, title in titles.items():
        if name in known:
            rows = known[name]["rows"]
            left = f", {known[name]['left']:g} GB left by earlier items" if known[name].get("left") else ""
            lines += [f"## {name}", "", f"{title} ({machine['card']}, {known[name]['seconds']:g} s{left})", ""]
            lines += count(rows) if is_law(rows) else list(_figures(name, rows, machine))
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def is_law(rows: list[Row]) -> bool:
    return bool(rows) and all("good" in row or "skipped" in row for row in rows)


def count(rows: list[Row]) -> list[str]:
    """What to say of the cells of laws."""
    good, skipped = (sum(bool(row.get(key)) for row in rows) for key in ("good", "skipped"))
    said = [f"{len(rows)} cells: {good} good, {skipped} skipped, {len(rows) - good - skipped} failed."]
    apart = [row for row in rows if row.get("apart") is not None]
    if apart:
        worst = max(apart, key=lambda row: row["apart"])
        said.append(f"Furthest from what was wanted: {worst['row']}, {shown(worst['apart'])}.")
    for reason in sorted({row["skipped"] for row in rows if "skipped" in row}):
        said.append(f"Skipped ({sum(row.get('skipped') == reason for row in rows)}): {reason}.")
    return said


def _figures(item: str, rows: list[Row], machine: dict[str, Any]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("row", "s", "trace", "good")))
    yield f"| card | row | {' | '.join(columns)} |"
    yield f"|---|---|{'---:|' * len(columns)}"
    for row in rows:
        cells = []
        for column in columns:
            prediction = None if machine["small"] else PREDICTIONS.get((item, row["row"], column))
            cells.append((shown(row[column]) if column in row else "") + (f" ({prediction})" if prediction else ""))
        yield f"| {machine['card']} | {row['row']} | {' | '.join(cells)} |"
