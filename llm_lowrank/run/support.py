"""What works with what, asked of the code that refuses: `llm-lowrank support` prints it, `llm-lowrank support
docs/support.md` writes it down.

Every combination of a method, an engine and a codec goes through the checks that a run makes before its first step: the
recipe's, the method's on a model without weights, and the engine's. The page lists those that are refused, with the
reason that a user would read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.codecs import CODECS
from llm_lowrank.engines import ENGINES, Sizes
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.engines.zero_config import resolve
from llm_lowrank.numerics.optimizers import Optimization
from llm_lowrank.run import SHIPPED
from llm_lowrank.run.build import codec, engine_settings, optimization
from llm_lowrank.run.checks import validate
from llm_lowrank.run.memory import sizes_of
from llm_lowrank.run.recipe import Recipe

Settings = dict[str, Any]
# Settings of a recipe under which an engine, or a codec, is tried beside its defaults: name of the variant -> settings.
ENGINE_VARIANTS: dict[str, dict[str, Settings]] = {
    "deepspeed": {
        "ZeRO-1": {"deepspeed": "ds_configs/zero1.json"},
        "ZeRO-2": {"deepspeed": "ds_configs/zero2.json"},
        "ZeRO-3": {"deepspeed": "ds_configs/zero3.json"},
        "ZeRO-3 with CPU offload": {"deepspeed": "ds_configs/zero3_offload.json"},
    },
    "plain": {"one process or DDP": {}},
    "fsdp": {
        "FSDP2": {},
        "FSDP2 with CPU offload": {"fsdp": Sharding(cpu_offload=True)},
        "FSDP2 with replicas": {"fsdp": Sharding(shard_size=2)},
    },
}
CODEC_VARIANTS: dict[str, dict[str, Settings]] = {
    "dense": {"dense float32": {"dtype": "float32"}, "dense bfloat16": {"dtype": "bfloat16"}},
    "nf4": {"nf4": {}, "nf4 with double quantization": {"codec_double_quant": True}},
}
INTO: dict[str, Settings] = {f"into: {into}": {"into": into} for into in ("auto", "weight", "bank")}
PAIRS: Settings = {"rank": 4}
# method -> settings that every row has, and rows: name of the row -> settings
OPTIONS: dict[str, tuple[Settings, dict[str, Settings]]] = {
    "srlora": (PAIRS, INTO),
    "relora": ({**PAIRS, "interval": 100}, INTO),
    "cola": (PAIRS, INTO),
    "plora": ({**PAIRS, "interval": 100}, INTO),
    "droplora": (
        PAIRS,
        {
            **{f"mask: {mask}": {"mask": mask} for mask in ("token", "sample", "step", "model")},
            "use_dora: true": {"use_dora": True},
        },
    ),
    "core": ({"p": 4, "exchanges": [100]}, INTO),
    "squeeze": ({**PAIRS, "target_rank": 2}, {"": {}}),
    "adalora": ({**PAIRS, "target_rank": 2}, {"": {}}),
    "losia": ({"output_factor": 0.0}, INTO | {"output_factor: 0.125": {"output_factor": 0.125}}),
}
RUN_OPTIONS: dict[str, Settings] = {
    "merge_base: dequantized": {"merge_base": "dequantized"},
    "gradient_checkpointing: true": {"gradient_checkpointing": True},
    "gradient_accumulation_steps: 4": {"gradient_accumulation_steps": 4},
    "max_grad_norm: 0": {"max_grad_norm": 0.0},
}
ZERO_OPTIONS: list[tuple[str, object]] = [
    ("contiguous_gradients", True),
    ("overlap_comm", True),
    ("stage3_param_persistence_threshold", 100000),
    ("offload_param", {"device": "cpu"}),
    ("offload_param", {"device": "nvme"}),
    ("offload_optimizer", {"device": "cpu"}),
    ("offload_optimizer", {"device": "nvme"}),
    ("zero_hpz_partition_size", 8),
    ("mics_shard_size", 8),
    ("zero_quantized_weights", True),
    ("zero_quantized_nontrainable_weights", True),
    ("zero_quantized_gradients", True),
]
WORLD, STEPS = 4, 400


def variants(kind: str, names: dict[str, Any], of: dict[str, dict[str, Settings]]) -> dict[str, Settings]:
    """Return every engine, or codec, of a table as settings of a recipe; kind: the recipe's name for it."""
    return {
        variant: {kind: name, **settings} for name in names for variant, settings in of.get(name, {name: {}}).items()
    }


def attached(recipe: Recipe) -> Sizes:
    """Return the sizes of a small model with a recipe's adapters, whatever its engine is.

    ValueError if it cannot be adapted.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1))
    adapters = attach(model, recipe.method, codec(recipe))
    recipe.method.schedule(STEPS, adapters)
    return sizes_of(model, recipe.method)


def refusal(recipe: Recipe, sizes: Callable[[], Sizes]) -> str | None:
    """Return why this run would not start, or None. sizes: gives those of `attached`."""
    try:
        validate(recipe)
        ENGINES[recipe.engine].held(sizes(), WORLD, engine_settings(recipe), optimization(recipe))
    except ValueError as error:
        # the sentence is the same for every codec that is refused for the same reason
        return " ".join(str(error).split()).replace(f"codec: {recipe.codec}", "this codec")
    return None


def methods() -> Iterator[tuple[str, Method]]:
    """Yield every method with each of its options."""
    for name, kind in sorted(Method.get_known_choices().items()):
        common, options = OPTIONS.get(name, (PAIRS if "rank" in kind.__dataclass_fields__ else {}, {"": {}}))
        for option, settings in options.items():
            yield f"{name} `{option}`" if option else name, kind(**{**common, **settings})


@cache
def exceptions() -> dict[tuple[str, str], list[str]]:
    """Return what is refused: (reason, with which codecs and engines) -> the settings."""
    base = Recipe(output_dir=str(SHIPPED / "output" / "none-of-this-is-written"), report_to=["none"])
    engines, codecs = variants("engine", ENGINES, ENGINE_VARIANTS), variants("codec", CODECS, CODEC_VARIANTS)
    rows: list[tuple[str, Settings]] = [
        (name, {"method": method, **({"optim": "sgd"} if method.own_step else {})}) for name, method in methods()
    ]
    rows += [(f"`{option}`", settings) for option, settings in RUN_OPTIONS.items()]
    refused: dict[tuple[str, str], list[str]] = {}
    for row, settings in rows:
        where: dict[str, dict[str, list[str]]] = {}  # reason -> codec -> engines
        for stored, storage in codecs.items():
            sizes = cache(partial(attached, replace(base, **settings, **storage)))
            for engine, spread in engines.items():
                if why := refusal(replace(base, **settings, **storage, **spread), sizes):
                    where.setdefault(why, {}).setdefault(stored, []).append(engine)
        for why, by_codec in where.items():
            cells = [
                stored if len(on) == len(engines) else f"{stored} on {', '.join(on)}" for stored, on in by_codec.items()
            ]
            refused.setdefault((why, "; ".join(cells)), []).append(row)
    return refused


def zero_exceptions() -> dict[str, str]:
    """Return the options under `zero_optimization` that are refused -> the reason."""
    refused = {}
    for key, value in ZERO_OPTIONS:
        try:
            resolve({"zero_optimization": {"stage": 3, key: value}}, Optimization(), WORLD, persistent=64)
        except ValueError as error:
            reason = " ".join(str(error).split()).partition("cannot be used: ")[2]
            refused[json.dumps({key: value})[1:-1]] = reason
    return refused


INTRODUCTION = """\
Every method works with every codec on every engine, but for the exceptions in the two tables. A run that asks for one
of these is refused before anything is loaded, with the reason that stands here. Everything else is tested;
`CONTRIBUTING.md` says in which combinations."""


def page() -> str:
    """Return the page, as Markdown."""
    engines, codecs = variants("engine", ENGINES, ENGINE_VARIANTS), variants("codec", CODECS, CODEC_VARIANTS)
    lines = [
        "# What works with what",
        "",
        f"- Methods: {', '.join(sorted(Method.get_known_choices()))}",
        f"- Engines: {', '.join(engines)}",
        f"- Codecs: {', '.join(codecs)}",
        "",
        INTRODUCTION,
        "",
        "## Methods and options of a run",
        "",
        "| Refused | with the codec | because |",
        "|---|---|---|",
    ]
    lines += [f"| {', '.join(rows)} | {where} | {why} |" for (why, where), rows in exceptions().items()]
    lines += ["", "## Options of DeepSpeed, under `zero_optimization`", "", "| Refused | because |", "|---|---|"]
    lines += [f"| `{option}` | {why} |" for option, why in zero_exceptions().items()]
    lines += [
        "",
        "`llm-lowrank support docs/support.md` writes this page from the checks that refuse a run, and a test keeps it "
        "current.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Print the page, or write it to the file that is given; return the exit code."""
    parser = argparse.ArgumentParser(
        "llm-lowrank support", description="Print which methods, engines and codecs do not go together, and why."
    )
    parser.add_argument("file", nargs="?", type=Path, help="A file to write instead of printing.")
    file = parser.parse_args(argv).file
    if file is None:
        print(page(), end="")
    else:
        file.write_text(page(), encoding="utf-8")
    return 0
