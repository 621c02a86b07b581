"""Every file in recipes/ is a run that would start: read, checked and planned from the model's config alone, without
weights and hub.

The shapes of the models stand in tests/configs, as they were published. The length of a run comes from the size of the
published data.
"""

import json
import re
from functools import cache
from math import ceil
from pathlib import Path

import pytest
from draccus import encode

from llm_lowrank.adapters.method import Method
from llm_lowrank.data import PRESETS
from llm_lowrank.data.sources import REASONING_GYM, check
from llm_lowrank.run import dry_run
from llm_lowrank.run.recipe import FREE, Recipe, parse, validate

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
STEMS = [path.stem for path in RECIPES]
TASKS = {"math": "metamathqa", "code": "magicoder-evol-instruct", "chat": "alpaca"}
METHODS = ("srlora", "rasa", "droplora", "losia")
ROWS = {
    "metamathqa": 395_000,
    "magicoder-evol-instruct": 111_183,
    "alpaca": 52_002,
    "ultrachat": 207_865,
    "stdlib-code": 5_000,
}
WHOLE = {  # planned with all of their layers, the others with two
    "llama-3.1-8b-math-srlora",
    "llama-3.1-8b-code-rasa",
    "llama-2-7b-math-droplora",
    "llama-2-7b-code-losia-nf4",
    "llama-3.1-70b-math-srlora-nf4-2nodes",
}


@cache
def recipe(stem: str) -> Recipe:
    return parse(["--config_path", str(ROOT / "recipes" / f"{stem}.yaml")])


def head(stem: str) -> str:
    """The comment on top of the file."""
    return (ROOT / "recipes" / f"{stem}.yaml").read_text().partition("\n\n")[0]


def ranks(command: str) -> int:
    """That a command starts."""
    per_node = re.search(r"--(?:num_gpus|nproc_per_node|gpus-per-node) (\d+)", command)
    nodes = re.search(r"--nodes (\d+)", command)
    return (int(per_node[1]) if per_node else 1) * (int(nodes[1]) if nodes else 1)


def commands(stem: str) -> list[str]:
    return [line.removeprefix("#   ") for line in head(stem).splitlines() if line.startswith("#   ")]


def world(stem: str) -> int:
    return ranks(commands(stem)[0])


def global_batch(stem: str) -> int:
    return recipe(stem).per_device_train_batch_size * recipe(stem).gradient_accumulation_steps * world(stem)


def steps(stem: str) -> int:
    """Of the run, as far as the size of the data tells."""
    settings, data = recipe(stem), recipe(stem).data
    if settings.max_steps > 0:
        return settings.max_steps
    part = re.fullmatch(r"train\[:(\d+)\]", data.split)
    rows = int(part[1]) if part else data.size if data.dataset.startswith(REASONING_GYM) else ROWS[data.dataset]
    examples = (rows - data.held_out) // (15 if data.packing else 1)  # of Alpaca, about so many fill 2048 tokens
    return int(ceil(examples / global_batch(stem)) * settings.num_train_epochs)


def shape(stem: str) -> dict:
    """The published config of the model; a tuned one has the shape of its base."""
    name = recipe(stem).model_name_or_path.rpartition("/")[2].removesuffix("-Instruct").removesuffix("-instruct")
    config = json.loads((ROOT / "tests" / "configs" / name / "config.json").read_text())
    return config if stem in WHOLE else config | {"num_hidden_layers": 2}


def trained(settings: Method, config: dict) -> int:
    """Parameters that a method trains in a LLaMA, from the papers' formulas."""
    d, f, v, layers = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
    kv = d * config["num_key_value_heads"] // config["num_attention_heads"]
    linear = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}  # (m, n)
    linear |= {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    names, kind = settings.target_modules, settings.get_choice_name(type(settings))
    wanted = [linear[name] for name in (linear if names == ["all-linear"] else names)]
    if kind == "losia":
        p = settings.factor
        return sum(int(p * m) * int(p * n) for m, n in wanted) * layers + int(settings.output_factor * v) * d
    pairs = settings.rank * sum(m + n for m, n in wanted) * layers
    if kind == "rasa":
        k = max(1, settings.rank // 8)
        return pairs + len(wanted) * layers * (settings.rank - k + layers * k)
    return pairs + (sum(m for m, _ in wanted) * layers if kind == "dora" else 0)


@pytest.mark.parametrize("stem", STEMS)
def test_a_dry_run_from_the_config_alone(stem, tmp_path):
    config = shape(stem)
    (tmp_path / "config.json").write_text(json.dumps(config))
    total = steps(stem)
    run = parse(
        [
            "--config_path",
            str(ROOT / "recipes" / f"{stem}.yaml"),
            "--model_name_or_path",
            str(tmp_path),
            "--output_dir",
            str(tmp_path / "output"),
            "--max_steps",
            str(total),
        ]
    )
    validate(run)
    check(run.data)
    text = dry_run.describe(run, world(stem))

    kind = run.method.get_choice_name(type(run.method))
    assert re.search(rf"^method:\n  type: {kind}$|^method: {{type: {kind}\b", text, re.M)
    assert f"trainable {trained(run.method, config):,} of " in text
    engine = {"plain": "plain", "fsdp": "FSDP2", "deepspeed": f"ZeRO-{re.sub('[^0-9]', '', run.deepspeed)}"}[run.engine]
    assert re.search(rf" \*{engine}\b", text)
    assert f"global batch {global_batch(stem)} = " in text and f"\n{total} optimizer steps, " in text


def test_what_is_trained_is_what_the_papers_say():
    """RaSA prints its number for LLaMA-3.1-8B; LoSiA's is p^2 of every weight of a LLaMA-2-7B and p_o of its output
    layer.
    """
    assert trained(recipe("llama-3.1-8b-code-rasa").method, shape("llama-3.1-8b-code-rasa")) == 83_921_024
    assert (
        trained(recipe("llama-2-7b-code-losia-nf4").method, shape("llama-2-7b-code-losia-nf4"))
        == 101_187_584 + 16_384_000
    )


@pytest.mark.parametrize("path", RECIPES, ids=STEMS)
def test_a_recipe_says_how_it_is_started_and_what_it_is(path):
    stem, settings = path.stem, recipe(path.stem)
    assert commands(stem) and all(f"--config_path recipes/{path.name}" in command for command in commands(stem))
    launcher = commands(stem)[0].split()[0]
    assert (
        launcher in {"deepspeed": ["deepspeed"], "fsdp": ["torchrun", "sbatch"], "plain": ["python"]}[settings.engine]
    )
    assert settings.output_dir == f"output/{stem}"
    dataset = settings.data.dataset
    assert dataset in PRESETS or dataset == "stdlib-code" or dataset.startswith(REASONING_GYM)
    if stem != "demo":
        model = settings.model_name_or_path.rpartition("/")[2].lower().removesuffix("-hf").removesuffix("-instruct")
        assert re.match(
            rf"{model}-(math|code|chat)-{settings.method.get_choice_name(type(settings.method))}(-|$)", stem
        )


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "demo"], ids=lambda path: path.stem)
def test_comments_reckon_rightly(path):
    settings, text = recipe(path.stem), path.read_text()
    per, accumulated, count, product = map(int, re.search(r"# (\d+) x (\d+) x (\d+) [A-Za-z]+ = (\d+) ", text).groups())
    assert (per, accumulated) == (settings.per_device_train_batch_size, settings.gradient_accumulation_steps)
    assert (count, product) == (world(path.stem), global_batch(path.stem))
    assert settings.warmup_steps < steps(path.stem) / 5
    if tenth := re.search(r"# a tenth of (?:about )?([\d,]+) steps", text):
        total = int(tenth[1].replace(",", ""))
        assert total == steps(path.stem) and settings.warmup_steps == round(total / 10)


def test_every_paper_has_every_task_on_both_models():
    """On one node of 8 GPUs with ZeRO-3, with the batch of the papers; LoSiA's is 4, which 8 GPUs cannot share."""
    batch = {"srlora": 128, "rasa": 192, "droplora": 128, "losia": 8}
    for model, name in (("llama-3.1-8b", "meta-llama/Llama-3.1-8B"), ("llama-2-7b", "meta-llama/Llama-2-7b-hf")):
        for task, dataset in TASKS.items():
            for method in METHODS:
                stem = f"{model}-{task}-{method}"
                settings = recipe(stem)
                assert (settings.model_name_or_path, settings.data.dataset) == (name, dataset)
                assert (settings.engine, settings.deepspeed, settings.codec) == (
                    "deepspeed",
                    "ds_configs/zero3.json",
                    "dense",
                )
                assert (world(stem), global_batch(stem), settings.data.packing) == (8, batch[method], False)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_both_models_are_trained_alike(task, method):
    this, other = (encode(recipe(f"{model}-{task}-{method}")) for model in ("llama-3.1-8b", "llama-2-7b"))
    assert {key for key in this if this[key] != other[key]} == {"model_name_or_path", "output_dir"}


VARIANTS = [
    stem for stem in STEMS if re.search(r"-(fsdp|zero2)$", stem) and re.sub(r"-(fsdp|zero2)$", "", stem) in STEMS
]


def test_every_method_has_a_variant_on_fsdp2():
    assert {
        recipe(stem).method.get_choice_name(type(recipe(stem).method)) for stem in VARIANTS if stem.endswith("-fsdp")
    } == set(METHODS)


@pytest.mark.parametrize("stem", VARIANTS)
def test_another_engine_learns_the_same(stem):
    """Nothing differs that a run may not change when it goes on from a checkpoint."""
    this, base = (encode(recipe(name)) for name in (stem, re.sub(r"-(fsdp|zero2)$", "", stem)))
    assert {key for key in this if this[key] != base[key]} <= FREE
    assert global_batch(stem) == global_batch(re.sub(r"-(fsdp|zero2)$", "", stem))


def test_recipes_show_every_method():
    shown = {type(recipe(stem).method) for stem in STEMS}
    assert shown == {kind for kind in Method.get_known_choices().values() if kind.__module__.startswith("llm_lowrank.")}


def test_recipes_that_others_name_are_there():
    files = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/**/*")]
    named = {
        name for file in files if file.is_file() for name in re.findall(r"recipes/([\w.-]+)\.yaml", file.read_text())
    }
    assert named - {"x"} <= set(STEMS)
