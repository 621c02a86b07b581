"""Draw the ranks that llm_lowrank.run.ranks has written, a panel a file: docs/ranks.png.

`python docs/assets/ranks.py ranks-stable-rank.yaml ranks-gelora.yaml ... --output docs/ranks.png`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import yaml

matplotlib.use("Agg")
from matplotlib import pyplot


def grid(pattern: dict[str, int]) -> tuple[list[str], np.ndarray]:
    """Return the kinds of modules, and the rank of each kind in each layer: (kinds, layers)."""
    at = {name: (name.rpartition(".")[2], next(int(w) for w in name.split(".") if w.isdigit())) for name in pattern}
    kinds = list(dict.fromkeys(kind for kind, _ in at.values()))
    found = np.full((len(kinds), 1 + max(layer for _, layer in at.values())), np.nan)
    for name, rank in pattern.items():
        kind, layer = at[name]
        found[kinds.index(kind), layer] = rank
    return kinds, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    figure, axes = pyplot.subplots(len(args.files), figsize=(11, 2.3 * len(args.files)), layout="constrained")
    for axis, path in zip(np.atleast_1d(axes), args.files, strict=True):
        kinds, ranks = grid(yaml.safe_load(path.read_text(encoding="utf-8"))["method"]["rank_pattern"])
        axis.imshow(ranks, cmap="viridis", aspect="auto", vmin=1, vmax=64)
        for (row, column), rank in np.ndenumerate(ranks):
            axis.text(column, row, f"{rank:.0f}", ha="center", va="center", fontsize=6, color="w" if rank < 40 else "k")
        axis.set(title=path.stem.removeprefix("ranks-"), yticks=range(len(kinds)), yticklabels=kinds)
        axis.tick_params(labelsize=7)
    np.atleast_1d(axes)[-1].set_xlabel("decoder layer")
    figure.savefig(args.output, dpi=100)


if __name__ == "__main__":
    main()
