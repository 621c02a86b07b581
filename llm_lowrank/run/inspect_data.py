"""Look at the data before training: examples with trained tokens in colour, lengths, cut and dropped rows, padding.

`llm-lowrank inspect [--examples 3] [--color auto] [--config_path recipe.yaml] [--name value ...]`, with the settings of
`llm-lowrank train`.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from llm_lowrank.data import IGNORE, Stream, best_fit, describe_ends, describe_unused
from llm_lowrank.models.source import config_folder
from llm_lowrank.models.stopping import read_ends
from llm_lowrank.run.build import read_data
from llm_lowrank.run.recipe import Recipe, parse

GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
WIDTH = 50  # characters of the longest bar
BARS = 12


def main(argv: list[str]) -> int:
    """Print what a command line asks for; return the exit code."""
    parser = argparse.ArgumentParser(
        "llm-lowrank inspect",
        description=__doc__.partition("\n")[0],
        epilog="All other settings are those of `llm-lowrank train`.",
    )
    parser.add_argument("--examples", type=natural, default=3, help="Number of examples to print.")
    parser.add_argument(
        "--color", choices=["auto", "always", "never"], default="auto", help="auto: colour on a terminal."
    )
    options, rest = parser.parse_known_args(argv)
    colored = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())

    try:
        recipe = parse(rest)
        folder = config_folder(recipe.model_name_or_path, recipe.model_revision)
        tokenizer, corpus, _ = read_data(recipe, folder, 0, 1)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for example in corpus.some(options.examples):
        print(paint(tokenizer, example.input_ids, example.labels, colored), end="\n\n")
    print(
        f"{recipe.data.dataset}, prompts: {', '.join(corpus.styles)}; {'green' if colored else '[brackets]'}: trained"
    )
    print(describe_ends(tokenizer, corpus.ends, [*read_ends(Path(folder)), tokenizer.eos_token_id]))
    longest = recipe.data.max_length
    print(
        f"held out {len(corpus.held_out)}, dropped {sum(corpus.dropped.values())}, cut to {longest} tokens "
        f"{corpus.truncated}"
    )
    for reason, count in corpus.dropped.items():
        print(f"  dropped {count}: {reason}")
    if corpus.unused:
        print(describe_unused(corpus.unused))
    if corpus.date:
        print(f"the chat template writes the date: {corpus.date} here; a run keeps the day on which it began")
    if isinstance(corpus.train, Stream):
        print("a stream: its lengths are not known")
        return 0
    lengths, trained = corpus.train.lengths, corpus.train.trained
    print(
        f"to train on {len(lengths)}: {lengths.sum():,} tokens, {trained.sum():,} of them trained "
        f"({trained.sum() / lengths.sum():.1%})"
    )
    print(histogram(lengths))
    print(padding(lengths, recipe))
    return 0


def natural(text: str) -> int:
    """Read a number that is not negative. ValueError for anything else."""
    if (number := int(text)) < 0:
        raise ValueError(text)
    return number


def paint(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int], colored: bool) -> str:
    """Return the text of an example with its trained tokens in colour or in brackets."""
    text, start = "", 0
    marks = [label != IGNORE for label in labels]
    while start < len(ids):
        # one stretch of tokens that are all trained or all not
        end = next((at for at in range(start, len(ids)) if marks[at] != marks[start]), len(ids))
        stretch = tokenizer.decode(ids[start:end])
        if colored:
            text += f"{GREEN if marks[start] else DIM}{stretch}{PLAIN}"
        else:
            text += f"[{stretch}]" if marks[start] else stretch
        start = end
    return text


def histogram(lengths: np.ndarray) -> str:
    """Return a bar for each range of lengths, and percentiles. lengths (examples,): tokens."""
    low, high = int(lengths.min()), int(lengths.max())
    counts, edges = np.histogram(lengths, bins=min(BARS, high - low + 1), range=(low - 0.5, high + 0.5))
    rows = [
        f"{math.ceil(edges[k]):>8} {count:>8} {'#' * round(WIDTH * count / counts.max())}"
        for k, count in enumerate(counts)
    ]
    few, half, most = np.percentile(lengths, [5, 50, 95])
    return "\n".join(
        [
            f"{'tokens':>8} {'examples':>8}",
            *rows,
            f"5 % below {few:.0f}, half below {half:.0f}, 95 % below {most:.0f}",
        ]
    )


def padding(lengths: np.ndarray, recipe: Recipe) -> str:
    """Return how much of a batch is padding: with batches drawn at random, grouped by length, and packed."""
    size = recipe.per_device_train_batch_size
    mixed, grouped = np.random.default_rng(recipe.seed).permutation(lengths), np.sort(lengths)

    def padding_share(order: np.ndarray) -> float:
        computed = sum(size * order[at : at + size].max() for at in range(0, len(order), size))
        return 1 - order.sum() / computed

    rows = best_fit(lengths.tolist(), recipe.data.max_length)
    full = lengths.sum() / (len(rows) * recipe.data.max_length)
    return (
        f"padding in batches of {size}: {padding_share(mixed):.1%}; "
        f"with data.group_by_length about {padding_share(grouped):.1%}; "
        f"with data.packing {1 - full:.1%}, {len(rows)} rows of {recipe.data.max_length}, "
        f"{len(lengths) / len(rows):.1f} examples in each"
    )
