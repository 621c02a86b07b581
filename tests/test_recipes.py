"""Every command of recipes/README.md is a run that would start, and a small one of its kind does.

Planned: read, checked and described from the model's published config alone (tests/configs), without weights and hub;
the length of a run comes from the size of the published data. Trained: two steps on a tiny model of the same
architecture, on rows with the published columns.
"""

import json
import math
import re
import shlex
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from draccus import encode
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_lowrank.adapters.method import Method
from llm_lowrank.data import PRESETS
from llm_lowrank.data.sources import REASONING_GYM, check_settings
from llm_lowrank.run import dry_run
from llm_lowrank.run.build import schedule_of
from llm_lowrank.run.checks import validate
from llm_lowrank.run.recipe import Recipe, parse
from llm_lowrank.run.resuming import FREE
from llm_lowrank.run.train import train

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
FILES = {path.stem for path in FOLDER.glob("*.yaml")}
MODELS = ("llama-2-7b", "llama-3.1-8b", "llama-3.1-70b", "smollm2-135m")
TASKS = {"math": "metamathqa", "code": "magicoder-evol-instruct", "chat": "alpaca"}
METHODS = ("srlora", "rasa", "droplora", "losia")
ROWS = {"metamathqa": 395_000, "magicoder-evol-instruct": 111_183, "alpaca": 52_002}
STDLIB = "output/stdlib-code.jsonl"


# --- the commands -----------------------------------------------------------------------------------------------------


def documented() -> list[str]:
    """The commands of the tables in recipes/README.md."""
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    return [line.split("`")[1] for line in lines if line.startswith("| `") and "--config_path" in line]


COMMANDS = documented()


def stack(command: str) -> tuple[str, ...]:
    """The files that a command combines."""
    return tuple(re.findall(r"recipes/([\w.-]+)\.yaml", command))


def arguments(command: str) -> list[str]:
    words = shlex.split(command)
    at = words.index("--config_path") + 1
    words[at] = words[at].replace("recipes/", f"{FOLDER}/")
    return words[at - 1 :]


@cache
def recipe(command: str) -> Recipe:
    return parse(arguments(command))


def world(command: str) -> int:
    """The ranks that a command starts."""
    per_node = re.search(r"--(?:num_gpus|nproc_per_node|gpus-per-node) (\d+)", command)
    nodes = re.search(r"--nodes (\d+)", command)
    return (int(per_node[1]) if per_node else 1) * (int(nodes[1]) if nodes else 1)


def global_batch(command: str) -> int:
    settings = recipe(command)
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps * world(command)


def steps(command: str) -> int:
    """Optimizer steps of the run, as far as the size of the data tells."""
    settings, data = recipe(command), recipe(command).data
    if settings.max_steps > 0:
        return settings.max_steps
    part = re.fullmatch(r"train\[:(\d+)\]", data.split)
    rows = int(part[1]) if part else data.size if data.dataset.startswith(REASONING_GYM) else ROWS[data.dataset]
    examples = (rows - data.held_out) // (15 if data.packing else 1)  # of Alpaca, about so many fill 2048 tokens
    return int(math.ceil(examples / global_batch(command)) * settings.num_train_epochs)


def published(name: str) -> dict[str, Any]:
    """The config of a model as it was published; a tuned model has the shape of its base."""
    stem = name.rpartition("/")[2].removesuffix("-instruct")
    return json.loads((ROOT / "tests" / "configs" / stem / "config.json").read_text())


@cache
def command_of(method: str, task: str) -> str:
    """The first command of a method for a task."""
    return next(command for command in COMMANDS if stack(command)[1:] == (task, method))


# --- what the papers say ----------------------------------------------------------------------------------------------

RASA = {
    "batch": 192, "optim": "lion", "learning_rate": 5e-4, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "lr_scheduler_type": "cosine", "min_lr_rate": 0.0, "warmup_ratio": 0.1, "warmup_steps": None,
    "method.rank": 32, "method.alpha": 32, "method.dropout": 0.05, "method.k": None,
    "method.target_modules": ["all-linear"], "data.split": "train", "data.max_length": 4096,
    "data.prompt_style": "alpaca", "data.group_by_length": True,
}  # fmt: skip
DROPLORA = {
    "batch": 128, "optim": "adamw", "learning_rate": 3e-4, "weight_decay": 0.1, "adam_beta2": 0.999,
    "lr_scheduler_type": "linear", "min_lr_rate": 0.0, "warmup_ratio": None, "warmup_steps": 100,
    "method.rank": 32, "method.alpha": 64, "method.dropout": 0.05, "method.p": 0.5, "method.mask": "token",
    "method.target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], "data.split": "train",
}  # fmt: skip
LOSIA = {
    "batch": 4, "optim": "adamw", "learning_rate": 5e-5, "weight_decay": 0.0, "adam_epsilon": 1e-6,
    "lr_scheduler_type": "cosine", "min_lr_rate": 0.1, "warmup_ratio": 0.1, "warmup_steps": None,
    "method.factor": 0.125, "method.output_factor": 0.125, "method.period": 100, "method.importance": "mix",
    "data.max_length": 2048, "data.split": "train[:50512]", "num_train_epochs": 3.0, "steps": 37_500,
}  # fmt: skip
SRLORA = {  # ours: the paper trains no LLaMA
    "batch": 128, "optim": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0, "lr_scheduler_type": "cosine",
    "method.rank": 64, "method.target_rank": 128, "method.svd_placement": "spread",
}  # fmt: skip
PUBLISHED = {
    ("rasa", "math"): RASA | {"num_train_epochs": 8.0, "method.alpha": 8},
    ("rasa", "code"): RASA | {"num_train_epochs": 8.0},
    ("rasa", "chat"): RASA | {"num_train_epochs": 3.0},  # ours
    ("droplora", "math"): DROPLORA | {"num_train_epochs": 1.0, "method.rank": 64, "method.alpha": 128},
    ("droplora", "code"): DROPLORA | {"num_train_epochs": 3.0},
    ("droplora", "chat"): DROPLORA | {"num_train_epochs": 3.0},
    ("losia", "math"): LOSIA,
    ("losia", "code"): LOSIA,
    ("losia", "chat"): LOSIA | {"method.period": 150},
    ("srlora", "math"): SRLORA | {"num_train_epochs": 1.0},
    ("srlora", "code"): SRLORA | {"num_train_epochs": 3.0},
    ("srlora", "chat"): SRLORA | {"num_train_epochs": 3.0},
}


def value(command: str, key: str) -> Any:
    if key in ("batch", "steps"):
        return global_batch(command) if key == "batch" else steps(command)
    found: Any = recipe(command)
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("method, task", PUBLISHED)
def test_the_settings_that_were_published_take_one_command(method, task):
    command = command_of(method, task)
    expected = PUBLISHED[method, task]
    assert {key: value(command, key) for key in expected} == expected
    settings = recipe(command)
    assert (settings.data.dataset, settings.dtype, settings.codec) == (TASKS[task], "bfloat16", "dense")
    assert (settings.engine, settings.deepspeed) == ("deepspeed", "ds_configs/zero3.json")
    assert settings.data.held_out == 512 and settings.data.bad_rows == ("drop" if task == "chat" else "refuse")


@pytest.mark.parametrize("method, task", PUBLISHED)
def test_both_models_are_trained_alike(method, task):
    command = command_of(method, task)
    this, other = (encode(recipe(re.sub("llama-2-7b|llama-3.1-8b", name, command))) for name in MODELS[:2])
    assert {key for key in this if this[key] != other[key]} == {"model_name_or_path", "output_dir"}
    names = {this["model_name_or_path"], other["model_name_or_path"]}
    assert names == {"meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B"}


def test_the_70b_run_of_rasa_has_the_papers_rank_and_batch():
    (command,) = [command for command in COMMANDS if stack(command) == ("llama-3.1-70b", "math", "rasa")]
    expected = RASA | {"method.rank": 4, "method.alpha": 8, "num_train_epochs": 8.0}
    assert {key: value(command, key) for key in expected} == expected
    assert world(command) == 2 * recipe(command).fsdp.shard_size == 16


@pytest.mark.parametrize("method", METHODS)
def test_another_engine_learns_the_same(method):
    """Nothing differs that a run may not change when it goes on from a checkpoint."""
    (command,) = [c for c in COMMANDS if stack(c)[2:] == (method,) and "torchrun" in c and "packing" not in c]
    model, task, _ = stack(command)
    base = re.sub("llama-2-7b|llama-3.1-8b", model, command_of(method, task))
    this, other = encode(recipe(command)), encode(recipe(base))
    assert {key for key in this if this[key] != other[key]} <= FREE and this["engine"] == "fsdp"
    assert global_batch(command) == global_batch(base)


def test_what_is_trained_is_what_the_papers_say():
    """RaSA prints its number for LLaMA-3.1-8B; LoSiA's is p^2 of every weight of a LLaMA-2-7B and p_o of its output
    layer.
    """
    rasa, losia = recipe(command_of("rasa", "code")), recipe(command_of("losia", "chat"))
    assert trained(rasa.method, published(rasa.model_name_or_path)) == 83_921_024
    assert trained(losia.method, published(losia.model_name_or_path)) == 101_187_584 + 16_384_000


# --- planned ----------------------------------------------------------------------------------------------------------

WHOLE = {  # planned with all of their layers, the others with two
    command_of("srlora", "math"),
    command_of("rasa", "code"),
    command_of("droplora", "math"),
    next(command for command in COMMANDS if "losia" in command and "nf4" in command),
    next(command for command in COMMANDS if "70b" in command and "srlora" in command),
}


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
    if kind == "core":
        return settings.p**2 * len(wanted) * layers
    if kind == "lora_xs":
        return settings.rank**2 * len(wanted) * layers
    if kind == "edora":
        return sum(settings.rank**2 + m for m, _ in wanted) * layers
    if kind in ("vera", "osora"):
        return sum(settings.rank + m for m, _ in wanted) * layers
    if kind == "mora":
        return sum(round(math.sqrt((m + n) * settings.rank)) ** 2 for m, n in wanted) * layers
    if kind in ("lora_fa", "miss", "sbora"):  # sbora: of its variant fa
        return settings.rank * sum(m for m, _ in wanted) * layers
    pairs = settings.rank * sum(m + n for m, n in wanted) * layers
    if kind in ("adalora", "sora", "beamlora"):
        return pairs + settings.rank * len(wanted) * layers
    if kind == "rasa":
        k = max(1, settings.rank // 8)
        return pairs + len(wanted) * layers * (settings.rank - k + layers * k)
    return pairs + (sum(m for m, _ in wanted) * layers if kind == "dora" else 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_dry_run_from_the_config_alone(command, tmp_path):
    config = published(recipe(command).model_name_or_path) | ({} if command in WHOLE else {"num_hidden_layers": 2})
    (tmp_path / "config.json").write_text(json.dumps(config))
    total = steps(command)
    here = ["--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "output"), "--max_steps", str(total)]
    run = parse([*arguments(command), *here])
    validate(run)
    check_settings(run.data)
    text = dry_run.describe(run, world(command))

    kind = run.method.get_choice_name(type(run.method))
    assert re.search(rf"^method:\n  type: {kind}$|^method: {{type: {kind}\b", text, re.M)
    assert f"trainable {trained(run.method, config):,} of " in text
    engine = {"plain": "plain", "fsdp": "FSDP2", "deepspeed": f"ZeRO-{re.sub('[^0-9]', '', run.deepspeed)}"}[run.engine]
    assert re.search(rf" \*{engine}\b", text)
    assert f"global batch {global_batch(command)} = " in text and f"\n{total} optimizer steps, " in text
    assert schedule_of(run, total).warmup < total / 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_fits_what_it_starts(command):
    settings = recipe(command)
    launcher = {"deepspeed": ["deepspeed"], "fsdp": ["torchrun", "sbatch"], "plain": ["python", "torchrun"]}
    assert command.split()[0] in launcher[settings.engine]
    assert set(stack(command)) <= FILES
    assert settings.output_dir == f"output/{'-'.join(stack(command))}"
    dataset = settings.data.dataset
    assert dataset in PRESETS or dataset == STDLIB or dataset.startswith(REASONING_GYM)


def test_every_file_is_in_a_command():
    assert {stem for command in COMMANDS for stem in stack(command)} == FILES


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_comments_reckon_rightly(path):
    text = path.read_text()
    settings = yaml.safe_load(text)
    found = re.search(r"# (\d+) x (\d+) x (\d+) [A-Za-z]+ = (\d+) ", text)
    if "gradient_accumulation_steps" in settings and path.stem != "demo":
        assert found
        per, accumulated, count, result = map(int, found.groups())
        batch = (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"])
        assert (per, accumulated) == batch and per * accumulated * count == result
        assert all(world(c) in (count, 1) for c in COMMANDS if path.stem in stack(c) and path.stem in MODELS[2:])
    for line in re.findall(r"^# +((?:deepspeed|torchrun|python|sbatch) .*recipes/.*)$", text, re.M):
        if "--config_path" in line:
            validate(parse([*arguments(line), "--dry_run"]))


def test_recipes_that_others_name_are_there():
    files = [ROOT / "README.md", FOLDER / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/**/*")]
    named = {
        name for file in files if file.is_file() for name in re.findall(r"recipes/([\w.-]+)\.yaml", file.read_text())
    }
    assert named <= FILES


# --- trained for two steps --------------------------------------------------------------------------------------------

# Rows of the published columns; one of Alpaca's has no answer, as 28 of the published ones.
ANSWERS = [(f"What is {n} plus {n % 7}?", f"It is {n + n % 7}.") for n in range(60)]
TABLES: dict[str, list[dict[str, str]]] = {
    "math": [{"query": q, "response": a, "type": "GSM_Rephrased", "original_question": q} for q, a in ANSWERS],
    "code": [{"instruction": q, "response": f"```python\n{a}\n```"} for q, a in ANSWERS],
    "chat": [{"instruction": q, "input": "", "output": a, "text": f"{q} {a}"} for q, a in ANSWERS],
    "stdlib-code": [
        {"module": f"m{n % 9}", "name": "f", "prompt": f'def f{n}(x):\n    """{q}"""\n', "completion": "    pass\n"}
        for n, (q, _) in enumerate(ANSWERS)
    ],
}
TABLES["chat"][5]["output"] = ""
SMALLER = {  # what does not fit weights of 8 rows and a run of two steps
    "srlora": "--method.rank 4 --method.target_rank 6",  # one exchange
    "rasa": "--method.rank 8",
    "droplora": "--method.rank 8 --warmup_steps 1",
    "losia": "--method.period 1",  # an exchange after the first step
}
RUNS = [  # every file, every method with every task
    *((MODELS[(i + j) % 4], task, method) for (i, task), (j, method) in product(enumerate(TASKS), enumerate(METHODS))),
    ("smollm2-135m", "stdlib-code"),
    ("llama-3.1-8b", "chat"),
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Makes the folder of a model of a published architecture: its heads' grouping, positions, tied layers and dtype,
    two layers of a few heads of 8.
    """

    @cache
    def make(stem: str) -> Path:
        config = published(parse(["--config_path", str(FOLDER / f"{stem}.yaml")]).model_name_or_path)
        folder = tmp_path_factory.mktemp(stem)
        tokenizer = byte_tokenizer()
        tokenizer.save_pretrained(folder)
        groups = config["num_attention_heads"] // config["num_key_value_heads"]
        heads = math.lcm(groups, 4)
        small = {
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // groups,
            "hidden_size": 8 * heads,
            "head_dim": 8,
            "intermediate_size": 8 * heads * config["intermediate_size"] // config["hidden_size"],
            "vocab_size": len(tokenizer),
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**config, **small})).to(getattr(torch, config["torch_dtype"]))
        model.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("files", RUNS, ids="-".join)
def test_two_steps_on_a_tiny_model_of_the_same_architecture(files, tiny, tmp_path):
    model, task, *method = files
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TABLES[task]))
    changes = {
        "model_name_or_path": tiny(model),
        "output_dir": tmp_path / "output",
        "data.dataset": tmp_path / "rows.jsonl",
        "data.preset": TASKS.get(task, "none"),
        "data.held_out": 8,
        "max_steps": 2,
        "learning_rate": 0.01,  # two published steps are smaller than a step of bfloat16, and a merge says so
        "engine": "plain",
        "logging_steps": 1,
    }
    if method == ["losia"]:
        changes |= {"data.split": "train[:58]"}  # the published part has more rows than the file
        if model == "smollm2-135m":
            changes |= {"method.output_factor": 0}  # the output layer is tied
    if model == "llama-3.1-70b":
        changes |= {"fsdp.shard_size": 0, "save_merged": True}  # for one process
    argv = [part for key, value in changes.items() for part in (f"--{key}", str(value))]
    more = SMALLER[method[0] if method else "srlora"]  # the default
    paths = ",".join(str(FOLDER / f"{stem}.yaml") for stem in files)
    run = parse(["--config_path", paths, *argv, *more.split()])
    validate(run)
    train(run)

    rows = [json.loads(line) for line in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) >= 2 and all(map(math.isfinite, losses))
    assert any("exchange" in str(row) for row in rows) == (not method or method[0] in ("srlora", "losia"))
    assert parse(["--config_path", str(tmp_path / "output" / "recipe.yaml")]) == run
    saved = json.loads((tmp_path / "output" / "merged" / "config.json").read_text())
    assert saved["num_hidden_layers"] == 2 and (tmp_path / "output" / "adapter" / "adapter_config.json").is_file()


def test_the_small_runs_cover_every_file_but_the_demo():
    assert {stem for files in RUNS for stem in files} == FILES - {"demo"}
    assert {files[1:] for files in RUNS if len(files) == 3} == set(product(TASKS, METHODS))
