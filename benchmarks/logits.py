"""Memory and time of the loss at a large vocabulary: whole logits against blocks.  python benchmarks/logits.py

The model is a random LLaMA, small but for its vocabulary (tied, as in LLaMA 3.2), with LoRA on the linears of its
decoder layers. A step is the forward and backward of one sequence. There are three cases: every position is trained;
one of four is trained, as where a completion follows a prompt; every position is trained and LoRA is on the output
layer too (untied), whose blocks are computed twice. Each case compares whole logits (`whole`: the loss of
transformers) with blocks (`blocks`: llm_lowrank/models/loss.py).

Every figure comes from a fresh process, which makes a short step first, so that all code is loaded. The peak is VmHWM
less what was resident before the step (benchmarks/memory.py says how it is read); seconds are CPU time of one thread.
The arms take turns and change their order from round to round. Medians over the rounds are printed, and for time the
median, least and greatest ratio of blocks to whole logits within a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import transformers
from memory import from_here, resident
from step_time import cpu_name
from transformers import LlamaConfig, LlamaForCausalLM

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.data import IGNORE
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models.loss import BLOCK, sum_loss

CASES = {"all": 1, "quarter": 4, "adapted": 1}  # one position of so many is trained
ARMS = ("whole", "blocks")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Measure one arm of one case in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype, adapted = getattr(torch, args.dtype), args.case == "adapted"
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=args.tokens,
        tie_word_embeddings=not adapted,
    )
    model = LlamaForCausalLM(config).to(dtype)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    attach(model, LoRA(rank=16, target_modules=linears + ["lm_head"] * adapted), Dense(dtype))
    ids = torch.randint(args.vocabulary, (1, args.tokens))
    labels = torch.where(torch.arange(args.tokens) >= args.tokens - args.tokens // CASES[args.case], ids, IGNORE)
    layer = model.get_output_embeddings() if args.arm == "blocks" else None
    for length in (64, args.tokens):
        model.zero_grad()
        before, began = from_here(), time.process_time()
        loss = sum_loss(model, {"input_ids": ids[:, -length:]}, labels[:, -length:], layer)
        loss.backward()
        seconds, peak = time.process_time() - began, resident("VmHWM") - before
    gradient = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"peak": peak, "seconds": seconds, "loss": loss.item(), "gradient": gradient.item()}


def child(args: argparse.Namespace, **own: str) -> dict[str, float]:
    settings = {k: v for k, v in vars(args).items() if k != "rounds"} | own
    command = [sys.executable, __file__, *(f"--{k}={v}" for k, v in settings.items())]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory and time of the loss, whole logits against blocks.")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--case", choices=CASES, default="all")
    parser.add_argument(
        "--arm", choices=["", *ARMS], default="", help="measure this one in this process and print it as JSON"
    )
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args)))
        return
    print(
        f"{cpu_name()}, torch {torch.__version__}, transformers {transformers.__version__}; {BLOCK // args.vocabulary} "
        "positions a block"
    )
    print(" ".join(f"{k}={v}" for k, v in vars(args).items() if k not in ("arm", "case", "dtype")))
    print(
        f"{'':18}{'whole MB':>10}{'blocks MB':>11}{'ratio':>8}{'whole s':>10}{'blocks s':>10}   time, median (least, "
        "greatest ratio)"
    )
    for dtype in ("float32", "bfloat16"):
        for case in CASES:
            rounds = []
            for i in range(args.rounds):
                rounds.append(
                    {arm: child(args, dtype=dtype, case=case, arm=arm) for arm in (ARMS if i % 2 == 0 else ARMS[::-1])}
                )
            whole, blocks = rounds[0]["whole"], rounds[0]["blocks"]
            for key in ("loss", "gradient"):
                assert abs(blocks[key] / whole[key] - 1) < (1e-4 if dtype == "float32" else 1e-2), (
                    case,
                    dtype,
                    whole,
                    blocks,
                )
            peaks, seconds = (
                [statistics.median(r[arm][key] for r in rounds) for arm in ARMS] for key in ("peak", "seconds")
            )
            ratios = sorted(r["blocks"]["seconds"] / r["whole"]["seconds"] for r in rounds)
            memory = f"{peaks[0] / 1e6:>10.0f}{peaks[1] / 1e6:>11.0f}{peaks[1] / peaks[0]:>8.2f}"
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})"
            print(
                f"{dtype} {case}".ljust(18) + f"{memory}{seconds[0]:>10.2f}{seconds[1]:>10.2f}   {spread}", flush=True
            )


if __name__ == "__main__":
    main()
