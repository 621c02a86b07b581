"""Forward + backward of an adapted LLaMA, as a multiple of the frozen model alone.  python benchmarks/step_time.py

    limit        the frozen model with no adapter: forward and the gradient of its input, which every adapter method has
                 to compute
    peft lora    peft.get_peft_model with LoRA on every linear of the decoder layers; peft dora: the same with use_dora
    losia 0.1.5  the layer of the PyPI package losia (LoSiA-Pro), after `pip install --no-deps losia` (its optimizer
                 needs CUDA)
    others       llm_lowrank's methods on the same linears, with the same rank, LoSiA with the paper's 1/8; in "losia
                 slot" one of the layers records its whole gradient besides, as one of N does at any time

All run in one process on the same tokens and over the same weights, one after the other in each round, the order turned
by one from round to round, so that whatever else the machine is doing hits them alike; the figures are the median,
least and greatest of the per-round ratios to the limit. The embeddings' output requires a gradient in all of them, so
that the input gradient flows through every layer. The optimizer's step is not part of it. Weights are random; only the
shapes matter.

    python benchmarks/step_time.py --directions

times whole steps, the optimizer's part included, of LoRA with every direction, of LoRA+ and of CORE with some p, as
multiples of LoRA's step; "total" has CORE's turns, which come every 15th step. It also prints what a step adds to the
traffic of sharded engines: the gradients of A and B go to every rank, and under ZeRO-3 and FSDP2 their values too.
"""

import argparse
import copy
import importlib.util
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

import llm_lowrank.methods  # noqa: F401 - registers them
from llm_lowrank.adapters.direction import Direction
from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.adapters.redirect import make_step
from llm_lowrank.codecs import Dense
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.core import Core
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.numerics.optimizers import Optimization

RATE, CLIP = 1e-4, 1.0
VOCABULARY = 512  # small, so that the linears dominate


def llama(hidden: int, layers: int, tokens: int, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,  # 2816 at 1024
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=tokens,
    )
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def with_peft(model: nn.Module, rank: int, **settings: object) -> nn.Module:
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    )


def with_ours(model: nn.Module, method: Method) -> nn.Module:
    adapters = attach(model, method, Dense(model.dtype))
    for adapter in adapters:  # what `start` does once a model is loaded
        adapter.started()
        if method.get_choice_name(type(method)) == "dora":
            for p in (adapter.magnitude, adapter.norms):
                p.data.copy_(adapter.weight.norm(dim=1))
    method.batch(adapters, 0, [0])
    return model


def without_slot(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "record"):
            module.record = None
    return model


def with_losia(model: nn.Module, factor: float) -> nn.Module | None:
    """Return the published LoSiA-Pro layer on random rows and columns; None if the package is not installed."""
    spec = importlib.util.find_spec("losia")
    if spec is None or spec.submodule_search_locations is None:
        return None
    # alone: the package compiles CUDA when imported
    file = Path(spec.submodule_search_locations[0], "peft_training", "losia_pro.py")
    spec = importlib.util.spec_from_file_location("losia_pro", file)
    assert spec is not None and spec.loader is not None
    pro = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pro)
    pro.replace_linear_recursive(model.model)
    for module in model.modules():
        if isinstance(module, pro.SelectiveLinear):
            module.weight.requires_grad_(True)
            module.setxy(*(torch.randperm(total)[: int(factor * total)].sort().values for total in module.weight.shape))
    return model


def shared(model: nn.Module) -> nn.Module:
    """Copy a model; the copy shares its weights."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def arms(limit: nn.Module, rank: int) -> dict[str, nn.Module]:
    """Return every model that is timed.

    PiSSA and ReLoRA have LoRA's layer; SRLoRA has it too, and with `into: bank` frozen pairs beside it.
    """
    kinds = Method.get_known_choices()
    methods = {
        "lora": kinds["lora"](rank=rank),
        "pissa": kinds["pissa"](rank=rank),
        "dora": kinds["dora"](rank=rank),
        "srlora": kinds["srlora"](rank=rank, target_rank=2 * rank, into="weight"),
        "srlora bank": kinds["srlora"](rank=rank, target_rank=2 * rank, into="bank"),
        "relora": kinds["relora"](rank=rank, into="weight"),
        "rasa": kinds["rasa"](rank=rank),
        "droplora token": kinds["droplora"](rank=rank, mask="token"),
        "droplora step": kinds["droplora"](rank=rank, mask="step"),
        "losia pro": kinds["losia"](output_factor=0),
        "losia slot": kinds["losia"](output_factor=0),
        "losia dense": kinds["losia"](output_factor=0, pro=False),
    }
    models = {
        "limit": limit,
        "peft lora": with_peft(shared(limit), rank),
        "peft dora": with_peft(shared(limit), rank, use_dora=True),
    }
    published = with_losia(copy.deepcopy(limit), 0.125)  # its weights take gradients: not shared
    models |= {} if published is None else {"losia 0.1.5": published}
    ours = {name: with_ours(shared(limit), method) for name, method in methods.items()}
    return models | {name: model if name == "losia slot" else without_slot(model) for name, model in ours.items()}


class Stepped:
    """LoRA with an optimizer, in one process."""

    def __init__(self, model: nn.Module, method: Method) -> None:
        self.method, self.step = method, 1000  # behind every warm-up
        self.adapters = attach(model, method, Dense(model.dtype))
        for adapter in self.adapters:  # what starts at zero is not zero in a step like any other
            adapter.started()
            (adapter.S if hasattr(adapter, "S") else adapter.B).data.normal_(std=0.01)
        optim = "sgd" if method.own_step else "adamw"
        self.engine = Plain()
        settings = Optimization(RATE, optim=optim, max_grad_norm=0.0 if method.directs else CLIP)
        self.model = self.engine.wrap(model, settings, own_rows)
        self.trained = sum(p.numel() for p in self.engine.params)

    def __call__(self, ids: Tensor) -> float:
        """Make a step; return its seconds."""
        start = time.perf_counter()
        self.engine.backward(self.model(input_ids=ids, labels=ids).loss)
        rates = self.method.rates(self.adapters, self.step, 10_000, lambda step: RATE)
        make_step(self.engine, self.method, self.adapters, self.step, rates, CLIP)
        self.step += 1
        return time.perf_counter() - start


def own_rows(name: str, module: nn.Module, rows: dict[str, slice]) -> dict[str, Tensor]:
    """What a model without a checkpoint is filled with: what it has, not copied."""
    return {key: getattr(module, key).data[at] for key, at in rows.items()}


def whole_steps(limit: nn.Module, rank: int, ids: Tensor, rounds: int, only: list[str] | None = None) -> None:
    """Time whole steps with every direction, and of CORE, and print the table. only: rows to time beside LoRA's."""
    kinds = {name: kind for name, kind in Direction.get_known_choices().items() if name != "none"}
    methods: dict[str, Method] = {"lora": LoRA(rank=rank), "lora+": LoRA(rank=rank, b_rate=16.0)}
    methods |= {f"core {p}": Core(p=p) for p in (64, 128, 256)}
    methods |= {f"core {p} one V": Core(p=p, share_v=True) for p in (64, 256)}
    methods |= {name: LoRA(rank=rank, direction=kind()) for name, kind in kinds.items()}
    methods = {name: method for name, method in methods.items() if name == "lora" or not only or name in only}
    arms = {name: Stepped(shared(limit), method) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 2):
        order = list(arms)
        for name in order[i % len(order) :] + order[: i % len(order)]:
            taken = arms[name](ids)
            if i >= 2:  # warm-up
                seconds[name].append(taken)
    print("ratios to LoRA's step; bytes that a step adds to the traffic of ZeRO-1 and 2 | of ZeRO-3 and FSDP2")
    print(f"{'':16}{'median':>8}{'min':>8}{'max':>8}{'total':>8}{'ms':>9}   bytes")
    for name, row in summary(seconds, "lora").items():
        floats = 4 * arms[name].trained if methods[name].directs else 0
        total = sum(seconds[name]) / sum(seconds["lora"])
        ratios = f"{row['median']:8.3f}{row['min']:8.3f}{row['max']:8.3f}{total:8.3f}"
        values = 0 if name.startswith("core") else floats  # CORE does not look at S
        print(f"{name:16}{ratios}{1000 * row['seconds']:9.1f}   {floats:,} | {floats + values:,}")


def step(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Run one forward and backward; return (seconds, loss). Gradients are freed when the clock has stopped."""
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds, loss.item()


def measure(models: dict[str, nn.Module], ids: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every arm in every round."""
    for model in models.values():
        model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    losses, *_ = ({name: step(model, ids)[1] for name, model in models.items()} for _ in range(2))  # warm-up
    assert max(losses.values()) - min(losses.values()) < 0.05, f"the arms do not compute the same function: {losses}"
    seconds: dict[str, list[float]] = {name: [] for name in models}
    names = list(models)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(step(models[name], ids)[0])
    return seconds


def summary(seconds: dict[str, list[float]], reference: str = "limit") -> dict[str, dict[str, float]]:
    rows = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds[reference], strict=True)]
        rows[name] = {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "seconds": statistics.median(times),
        }
    return rows


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
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
    parser.add_argument("--directions", action="store_true", help="whole steps of LoRA with every direction instead")
    parser.add_argument("--only", nargs="*", help="names of the rows to measure, beside the reference")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    limit = llama(args.hidden, args.layers, args.tokens, getattr(torch, args.dtype))
    if args.directions:
        shown = ("hidden", "layers", "tokens", "rank", "dtype", "threads", "rounds")
        print(*(f"{name}={getattr(args, name)}" for name in shown), cpu_name())
        return whole_steps(limit, args.rank, torch.randint(VOCABULARY, (1, args.tokens)), args.rounds, args.only)
    models = arms(limit, args.rank)
    models = {name: model for name, model in models.items() if name == "limit" or not args.only or name in args.only}
    trainable = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in models.items()}
    ids = torch.randint(VOCABULARY, (1, args.tokens))
    rows = summary(measure(models, ids, args.rounds))

    setting = {name: value for name, value in vars(args).items() if name != "output"}
    machine = {
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }
    print(" ".join(f"{name}={value}" for name, value in (setting | machine).items()))
    print(
        f"{'':16}{'median':>8}{'min':>8}{'max':>8}{'ms':>9}{'trained':>12}   ratios to the limit, forward + backward, "
        "no optimizer step"
    )
    for name, row in rows.items():
        ratios = f"{row['median']:8.3f}{row['min']:8.3f}{row['max']:8.3f}"
        print(f"{name:16}{ratios}{1000 * row['seconds']:9.1f}{trainable[name]:12,}")
    if args.output:
        args.output.write_text(json.dumps({"setting": setting, "machine": machine, "ratios": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
