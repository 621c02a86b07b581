"""Draw a run: its losses over the steps, with its exchanges.  python benchmarks/picture.py OUTPUT_DIR PICTURE

Reads OUTPUT_DIR/metrics.jsonl. The grey line is the training loss, the dots are the held-out loss, and a vertical line
is an exchange. These commands draw the picture of the README:

    python launch/train.py --engine plain --logging_steps 1 --eval_steps 12
    python benchmarks/picture.py output/demo docs/assets/run.png

Needs the extra bench.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Records = list[dict[str, Any]]


def read(folder: Path) -> Records:
    """Return the records of a run's metrics.jsonl."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise SystemExit(f"error: {file} is not there; give the output_dir of a run")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def curve(records: Records, kind: str, name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which records of this kind hold this value, and the values."""
    points = [(r["step"], r[name]) for r in records if r["kind"] == kind and r.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def draw(records: Records, path: Path) -> None:
    """Write the picture of a run, 1600 pixels wide: readable at half of that."""
    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axis.plot(*curve(records, "train", "loss"), color="0.6", lw=1.5, label="training loss")
    axis.plot(*curve(records, "eval", "loss"), color="tab:blue", lw=2, marker="o", ms=6, label="held-out loss")
    exchanges = [r for r in records if r["kind"] == "exchange"]
    for number, event in enumerate(exchanges):
        between = event["step"] + 0.5  # an exchange follows its step and precedes the next one
        label = None if number else "exchange"
        axis.axvline(between, color="tab:orange", lw=2, ls="--", label=label)
        axis.annotate(
            f"a layer's function changes\nby at most {event['drift']:.0e} of itself",
            xy=(between, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(7, 0),
            textcoords="offset points",
            va="top",
            fontsize=11,
            color="0.25",
        )
    axis.set_xlabel("training step", fontsize=12)
    axis.set_ylabel("loss per trained token", fontsize=12)
    axis.set_xlim(0, records[-1]["step"] + 1)
    axis.set_ylim(0, None)
    axis.tick_params(labelsize=11)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=11, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=200, facecolor="white")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a run: its losses over the steps, with its exchanges.")
    parser.add_argument("run", type=Path, help="output_dir of the run")
    parser.add_argument("picture", type=Path, help="file to write, .png or .svg")
    options = parser.parse_args()
    draw(read(options.run), options.picture)


if __name__ == "__main__":
    main()
