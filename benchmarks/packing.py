"""Real tokens per second of padded, length-grouped and packed batches.  python benchmarks/packing.py

The demo model (SmolLM2-135M-Instruct) has LoRA of rank 16; a step is forward + backward over functions of Python's
standard library (recipes/data/stdlib_code.py, plain prompts, cut to 512 tokens), fp32, one process. A batch is 8
examples, or 8 / (examples in a packed row) packed rows, so that all three compute about the same number of real
tokens. Padding is not counted. All three run in every round, and their order changes from round to round; the figures
are medians and extremes of the per-round ratios to padded batches. Losses are not compared here: tests/test_packing.py
shows that the losses are the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_lowrank.adapters.adapter import PairAdapter
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.data import Batches, Data, load_corpus, pad_id
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models.source import DEMO, Source
from llm_lowrank.run.held_out import batch_loss

LENGTH, EXAMPLES = 512, 8
CODE = Path(__file__).parents[1] / "recipes" / "data" / "stdlib_code.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Source.open(DEMO).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as scratch:
        data = f"{scratch}/stdlib-code.jsonl"
        subprocess.run([sys.executable, str(CODE), data], check=True)
        corpus = load_corpus(Data(data, prompt_style="plain", max_length=LENGTH, held_out=0), tokenizer, 0)
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    for adapter in attach(model, LoRA(rank=16), Dense(torch.float32)):
        assert isinstance(adapter, PairAdapter)
        nn.init.normal_(adapter.A, std=0.02)
        nn.init.zeros_(adapter.B)

    def batches(per_device: int, pack: int = 0, grouped: bool = False) -> Batches:
        return Batches(corpus.train, per_device, pad_id=pad_id(tokenizer, len(tokenizer)), pack=pack, grouped=grouped)

    packed = batches(1, LENGTH)
    rows = max(1, round(EXAMPLES * packed.rows / len(corpus.train)))
    kinds = {"padded": batches(EXAMPLES), "grouped": batches(EXAMPLES, grouped=True), "packed": batches(rows, LENGTH)}
    # step 0 of grouped batches has the longest examples: the rounds begin at step 1
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    shares: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in tqdm(range(options.rounds + 1), unit="round"):
        order = list(kinds)[number % 3 :] + list(kinds)[: number % 3]
        for kind in order:
            (micro,) = kinds[kind].step(number + 1)
            began = time.perf_counter()
            (batch_loss(model, micro, torch.device("cpu")) / micro.tokens).backward()
            if number:  # the first round warms up
                speeds[kind].append(micro.real / (time.perf_counter() - began))
                shares[kind].append(micro.real / micro.input_ids.numel())
    print(
        f"{platform.processor() or platform.machine()}, {options.threads} thread(s), torch {torch.__version__}, "
        f"{options.rounds} rounds"
    )
    print(
        f"transformers {transformers.__version__}; {len(corpus.train)} examples, {packed.rows} packed rows of {LENGTH}"
    )
    for kind in kinds:
        ratios = [speed / padded for speed, padded in zip(speeds[kind], speeds["padded"], strict=True)]
        result = {
            "kind": kind,
            "real tokens/s": round(statistics.median(speeds[kind]), 1),
            "of all": round(statistics.mean(shares[kind]), 3),
            "ratio": [round(f(ratios), 2) for f in (statistics.median, min, max)],
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
