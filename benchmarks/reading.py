"""Host time of packed batches, and rows per second with workers.  python benchmarks/reading.py

The rows are those of recipes/data/alpaca-sample.json, each many times with a number behind its instruction, written
with the chat template of SmolLM2-135M-Instruct.

Batches: a micro-batch is 8 packed rows of 2048 tokens. `lists` reads its examples as Python lists and makes tensors of
these, as version 0.2.0 did; `arrays` is what a run does. Both make the same batches, which is checked. CPU time of the
thread is compared, which other programs on the machine change less than wall time.

Waiting: the wall time for which the loop waits for a step's batch of the kind `arrays`, while a step takes 0.2 s
without the processor, as a step on another device. `in turn` makes the batch between the steps, `ahead` in a thread.

Workers: rows per second of wall time after the first batch of rows; the time until that batch, in which the workers
start; and the CPU time of the run's own process, which reads the rows and takes the tokens back.

The arms take turns and change their order from round to round. Medians over the rounds are printed, and the median,
least and greatest ratio within a round to the first arm.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from step_time import cpu_name
from transformers import AutoTokenizer

from llm_lowrank.data import IGNORE, Batches, Data, ExampleTable, MicroBatch, load_corpus
from llm_lowrank.data.rows import row_options
from llm_lowrank.data.sources import OpenDataset, open_dataset
from llm_lowrank.data.workers import encode_all
from llm_lowrank.models.source import DEMO, Source
from llm_lowrank.run.ahead import Ahead

LENGTH, PER_DEVICE = 2048, 8
STEP = 0.2  # seconds
SAMPLE = Path(__file__).parents[1] / "recipes" / "data" / "alpaca-sample.json"
CPU = torch.device("cpu")


class Lists(Batches):
    """Batches whose examples are read as lists, for comparison."""

    def _collate(self, rows: list[int], tokens: int) -> MicroBatch:
        assert isinstance(self.examples, ExampleTable) and self.packs is not None
        if not hasattr(self, "table"):
            self.table = self.examples.table.select(self.examples.numbers)
        members = [[self.table[index] for index in self.packs[row]] for row in rows]
        longest = max(sum(len(example["input_ids"]) for example in row) for row in members)
        input_ids = torch.full((self.per_device, longest), self.pad_id)
        labels = torch.full((self.per_device, longest), IGNORE)
        position_ids = torch.zeros(self.per_device, longest, dtype=torch.int64)
        for number, row in enumerate(members):
            start = 0
            for example in row:
                end = start + len(example["input_ids"])
                input_ids[number, start:end] = torch.tensor(example["input_ids"])
                labels[number, start:end] = torch.tensor(example["labels"])
                labels[number, start] = IGNORE
                position_ids[number, start:end] = torch.arange(end - start)
                start = end
            position_ids[number, start:] = torch.arange(longest - start)
        real = sum(len(example["input_ids"]) for row in members for example in row)
        samples = tuple(self.packs[row][0] for row in rows)
        starts = torch.cat([(position_ids.flatten() == 0).nonzero()[:, 0], torch.tensor([labels.numel()])]).int()
        longest = int(starts.diff().max())
        return MicroBatch(input_ids, None, position_ids, labels, tokens, real, samples, starts, longest)


def write_rows(path: Path, count: int) -> None:
    rows = json.loads(SAMPLE.read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            file.write(json.dumps({**row, "instruction": f"{row['instruction']} ({number})"}) + "\n")


def compare(arms: dict[str, Callable[[int], float]], rounds: int, unit: str) -> None:
    """Measure every arm in every round, after a round that warms up, and print the figures."""
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(rounds + 1):
        for arm in list(arms)[number % len(arms) :] + list(arms)[: number % len(arms)]:
            value = arms[arm](number)
            if number:
                found[arm].append(value)
    first = next(iter(found.values()))
    for arm, values in found.items():
        ratios = [value / base for value, base in zip(values, first, strict=True)]
        figures = {"median": round(statistics.median(values), 2), "unit": unit}
        figures["ratio"] = [round(f(ratios), 3) for f in (statistics.median, min, max)]
        print(json.dumps({"arm": arm, **figures}), flush=True)


def cpu_ms(batches: Batches, number: int, count: int = 5) -> float:
    """CPU milliseconds of a micro-batch."""
    began = time.thread_time()
    for t in range(number * count, (number + 1) * count):
        batches.step(t)
    return (time.thread_time() - began) / count * 1e3


def waiting_ms(step: Callable[[int], object], number: int, count: int = 5) -> float:
    """Milliseconds that a loop waits for the batch of a step."""
    waited = 0.0
    for t in range(number * count, (number + 1) * count):
        began = time.perf_counter()
        step(t)
        waited += time.perf_counter() - began
        time.sleep(STEP)
    return waited / count * 1e3


Times = list[tuple[float, float]]


def encode(dataset: OpenDataset, options: dict[str, Any], workers: int, times: Times, _: int) -> float:
    """Rows that become tokens in a second, after the first batch of them. Into `times` go the seconds until that batch
    and the CPU milliseconds of this process for each row after it.
    """
    began = time.perf_counter()
    batches = encode_all(iter(dataset.rows), len(dataset.rows), options, workers)
    next(batches)
    first, cpu = time.perf_counter(), time.process_time()
    rows = sum(len(batch) for batch in batches)
    times.append((first - began, (time.process_time() - cpu) / rows * 1e3))
    return rows / (time.perf_counter() - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="Of batches and waiting.")
    parser.add_argument("--worker_rounds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(Source.open(DEMO).path)
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "rows.jsonl"
        write_rows(path, options.rows)
        data = load_corpus(Data(str(path), held_out=0, max_length=LENGTH), tokenizer, 0)
        lists, arrays = (kind(data.train, PER_DEVICE, pad_id=2, pack=LENGTH) for kind in (Lists, Batches))
        left, right = lists.step(0)[0], arrays.step(0)[0]
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True)
        )
        print(f"{left.real} tokens in a micro-batch, {len(data.train) / arrays.rows:.1f} examples in a row")
        compare({"lists": partial(cpu_ms, lists), "arrays": partial(cpu_ms, arrays)}, options.rounds, "CPU ms")
        with Ahead(arrays, 10**9, CPU) as ahead:
            arms = {"in turn": partial(waiting_ms, arrays.step), "ahead": partial(waiting_ms, ahead.step)}
            compare(arms, options.rounds, "ms of waiting")
        settings = Data(str(path), max_length=LENGTH)
        dataset = open_dataset(str(path), settings, 0)
        of_rows = row_options(dataset, settings, tokenizer, "chat", "")
        found: dict[int, Times] = {1: [], 2: []}
        arms = {f"workers {n}": partial(encode, dataset, of_rows, n, times) for n, times in found.items()}
        compare(arms, options.worker_rounds, "rows/s")
        for n, times in found.items():
            start, cpu = (statistics.median(values) for values in zip(*times[1:], strict=True))
            print(f"workers {n}: {start:.1f} s until the first batch, {cpu:.3f} CPU ms of this process for a row")


if __name__ == "__main__":
    main()
