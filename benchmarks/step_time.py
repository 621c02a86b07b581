"""Forward + backward of an adapted LLaMA, as a multiple of the frozen model alone.  python benchmarks/step_time.py

    limit   the frozen model with no adapter: forward and the gradient of its input, which every adapter method has to compute
    peft    peft.get_peft_model with LoRA on every linear of the decoder layers
    ours    llm_lowrank with the same rank on the same linears

All three run in one process on the same tokens, one after the other in each round, the order turned by one from round to round, so that
whatever else the machine is doing hits them alike; the figures are the median, least and greatest of the per-round ratios to the limit.
The embeddings' output requires a gradient in all three, so that the input gradient flows through every layer. The optimizer's step is not
part of it: it is the same for both adapters and nothing for the limit. Weights are random; only the shapes matter.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llm_lowrank.codecs import Dense
from llm_lowrank.method import attach
from llm_lowrank.methods.lora import LoRA

VOCABULARY = 512                                    # small, so that the linears dominate


def llama(hidden: int, layers: int, tokens: int, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,         # 2816 at 1024
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=tokens,
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def with_peft(model: nn.Module, rank: int) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def with_ours(model: nn.Module, rank: int) -> nn.Module:
    attach(model, LoRA(rank=rank), Dense(model.dtype))
    return model


def step(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """One forward and backward -> (seconds, loss). Gradients are freed outside the clock."""
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds, loss.item()


def measure(models: dict[str, nn.Module], ids: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round."""
    for model in models.values():
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    losses = {name: [step(model, ids)[1] for _ in range(2)][0] for name, model in models.items()}        # warm-up
    assert max(losses.values()) - min(losses.values()) < 0.05, f"the arms do not compute the same function: {losses}"
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(step(models[name], ids)[0])
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    rows = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["limit"], strict=True)]
        rows[name] = {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "seconds": statistics.median(times),
        }
    return rows


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description="Forward + backward, relative to the frozen model alone.")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="length of the one sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    limit = llama(args.hidden, args.layers, args.tokens, getattr(torch, args.dtype))
    models = {
        "limit": limit,
        "peft": with_peft(copy.deepcopy(limit), args.rank),
        "ours": with_ours(copy.deepcopy(limit), args.rank),
    }
    trainable = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    assert trainable["peft"] == trainable["ours"], f"the arms do not train the same parameters: {trainable}"
    ids = torch.randint(VOCABULARY, (1, args.tokens))
    rows = summary(measure(models, ids, args.rounds))

    setting = {name: value for name, value in vars(args).items() if name != "output"}
    machine = {"cpu": cpu_name(), "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    print(" ".join(f"{name}={value}" for name, value in (setting | machine).items()))
    print(f"{'':8}{'median':>8}{'min':>8}{'max':>8}{'ms':>9}   ratios to the limit, forward + backward, no optimizer step")
    for name, row in rows.items():
        print(f"{name:8}{row['median']:8.3f}{row['min']:8.3f}{row['max']:8.3f}{1000 * row['seconds']:9.1f}")
    if args.output:
        args.output.write_text(json.dumps({"setting": setting, "machine": machine, "ratios": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
