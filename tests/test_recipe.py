"""Recipes: what a command line or a file means, what is refused, and that a saved recipe is the run's."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from llm_lowrank.adapters.method import Method
from llm_lowrank.data import Data
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.methods.directions.reflora import RefLoRA
from llm_lowrank.methods.directions.riemannian import Riemannian
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.numerics.schedule import Schedule
from llm_lowrank.run import command_line
from llm_lowrank.run.build import attention, attentions, deepspeed_config, optimization, schedule_of
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import HEADINGS, IDENTITY, Recipe, parse, save
from llm_lowrank.run.synonyms import SYNONYMS

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]


@pytest.fixture
def file(tmp_path):
    """Writes settings to a YAML file and returns the arguments that read it."""

    def write(text: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(text)
        return ["--config_path", str(tmp_path / "recipe.yaml")]

    return write


def refusal(*argv: str) -> str:
    with pytest.raises(RecipeError) as error:
        validate(parse(argv))
    return str(error.value)


# --- what is meant ----------------------------------------------------------------------------------------------------


def test_no_arguments_are_the_demo():
    demo = parse([])
    assert demo == Recipe()
    assert (demo.model_name_or_path, demo.data.dataset) == ("smollm2-135m-instruct", "reasoning-gym:chain_sum")
    assert isinstance(demo.method, SRLoRA) and len(demo.method.schedule(60)) >= 2
    assert parse(["--config_path", str(ROOT / "recipes" / "demo.yaml")]) == demo
    written_out = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text())
    assert set(written_out) == {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("spelling", [["--{}", "{}"], ["--{}={}"]])
def test_both_spellings_of_an_override(spelling):
    given = {
        "learning_rate": "1e-5",
        "max_steps": "-1",
        "method.rank": "24",
        "data.task.max_digits": "3",
        "output_dir": "007",
    }
    argv = [part for key, value in given.items() for part in ("\0".join(spelling).format(key, value)).split("\0")]
    recipe = parse(argv)
    assert (recipe.learning_rate, recipe.max_steps, recipe.method.rank, recipe.output_dir) == (1e-5, -1, 24, "007")
    assert recipe.data.task == {**Recipe().data.task, "max_digits": 3}


def test_the_command_line_overrides_the_file(file):
    argv = file("learning_rate: 1e-5\nseed: 1\nmethod: {type: srlora, rank: 8, gamma: 0.25}\n")
    recipe = parse([*argv, "--seed=2", "--method.rank", "12"])
    assert (recipe.learning_rate, recipe.seed) == (1e-5, 2)
    assert recipe.method == SRLoRA(rank=12, gamma=0.25)
    assert recipe.data == Recipe().data


@pytest.fixture
def files(tmp_path):
    """Writes a.yaml, b.yaml, ... and returns the arguments that read them in this order."""

    def write(**texts: str) -> list[str]:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return ["--config_path", ",".join(str(tmp_path / f"{name}.yaml") for name in texts)]

    return write


def test_a_later_file_overrides_an_earlier_one_setting_by_setting(files):
    argv = files(
        a="learning_rate: 1e-5\nseed: 1\nmethod: {type: srlora, rank: 8, gamma: 0.25}\ndata: {dataset: rows.jsonl}\n",
        b="seed: 2\ndata.max_length: 99\n",
        c="method: {rank: 12}\ndata: {held_out: 3}\n",
    )
    recipe = parse(argv)
    assert (recipe.learning_rate, recipe.seed, recipe.method) == (1e-5, 2, SRLoRA(rank=12, gamma=0.25))
    assert recipe.data == Data(dataset="rows.jsonl", max_length=99, held_out=3)
    assert parse([*argv, "--seed", "3", "--method.gamma", "0.5"]).method == SRLoRA(rank=12, gamma=0.5)
    assert parse([argv[0], argv[1].replace(",", " , ")]) == recipe


def test_a_later_files_method_keeps_what_both_methods_have(files):
    argv = files(
        a="method: {type: srlora, rank: 8, target_rank: 24, target_modules: [q_proj]}", b="method: {type: lora}"
    )
    assert parse(argv).method == LoRA(rank=8, target_modules=["q_proj"])
    assert parse([*argv, "--method.type", "srlora"]).method == SRLoRA(rank=8, target_modules=["q_proj"])
    demo = parse(files(a="method: {target_rank: 24}", b="method: {type: lora}"))  # the first file continues the demo
    assert demo.method == LoRA()


def test_a_direction_is_a_section_of_the_method_with_a_type_of_its_own(files):
    recipe = parse(["--method.type", "lora", "--method.direction.type", "reflora", "--method.direction.warmup", "3"])
    assert recipe.method == LoRA(direction=RefLoRA(warmup=3))
    argv = files(
        a="method: {type: lora, rank: 8, direction: {type: reflora, warmup: 3}}",
        b="method: {direction: {type: riemannian}}",
    )
    assert parse(argv).method == LoRA(rank=8, direction=Riemannian())
    assert parse([*argv, "--method.direction.type", "reflora"]).method == LoRA(rank=8, direction=RefLoRA())
    assert parse([*argv, "--method.type", "losia"]).method == LoSiA()  # which has no pairs and no direction
    assert parse(["--method.direction.type", "riemannian"]).method == dataclasses.replace(
        Recipe().method, direction=Riemannian()
    )
    assert "method.direction.type: is missing beside the other settings; write one of none, " in refusal(
        "--method.type", "lora", "--method.direction.warmup", "3"
    )


def test_a_mistake_is_named_with_its_file(files, tmp_path):
    argv = files(
        a="seed: many\nmethod: {type: lora, rnak: 8}\nmax_steps: none\n",
        b="method: {alpha: [1], target_rank: 9}\ndata: {task: 3}\nmax_steps: 7\nfsdp: {shard_size: x}\nlr: 1e-3\n",
    )
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    assert set(refusal(*argv, "--save_steps", "often").splitlines()) == {
        f"{a}: seed: 'many' is not a value of type int",
        f"{a}: unknown setting 'method.rnak'; did you mean method.rank?",
        f"{b}: method.alpha: '[1]' is not a value of type float",
        f"{b}: unknown setting 'method.target_rank': method.type lora does not have it",
        f"{b}: data.task: '3' is not a section; write data.task.name value, or {{name: value}}",
        f"{b}: fsdp.shard_size: 'x' is not a value of type int",
        f"{b}: unknown setting 'lr'; did you mean learning_rate?",
        "save_steps: 'often' is not a value of type int",
    }
    assert refusal(*argv, "--seed", "few").splitlines()[0] == "seed: 'few' is not a value of type int"
    assert refusal("--config_path", f"{a},").endswith("has an empty name; write a.yaml,b.yaml")
    assert "nowhere.yaml: No such file" in refusal("--config_path", f"{a},nowhere.yaml")


def test_a_run_of_files_has_a_folder_of_its_own(files):
    argv = files(**{"llama-3.1-8b": "seed: 1", "math": "seed: 2"})
    assert parse(argv).output_dir == "output/llama-3.1-8b-math"
    assert parse(files(mine="seed: 1")).output_dir == "output/mine"
    assert parse([*argv, "--output_dir", "there"]).output_dir == "there"
    assert parse(files(a="output_dir: there", b="seed: 1")).output_dir == "there"
    assert parse(["--seed", "1"]).output_dir == "output/demo"


def test_dotted_names_in_a_file(file):
    assert parse(file("method.rank: 8\ndata.size: 100\n")).method.rank == 8


def test_switches_need_no_value():
    recipe = parse(["--dry_run", "--gradient_checkpointing", "--save_merged", "false"])
    assert (recipe.dry_run, recipe.gradient_checkpointing, recipe.save_merged) == (True, True, False)


def test_lists_are_written_with_commas():
    expected = ["q_proj", "v_proj"]
    assert parse(["--method.target_modules", "q_proj,v_proj"]).method.target_modules == expected
    assert parse(["--method.target_modules=[q_proj, v_proj]"]).method.target_modules == expected


def test_another_dataset_or_method_starts_from_its_own_defaults(file):
    assert parse(["--data.dataset", "rows.jsonl"]).data == Data(dataset="rows.jsonl")
    assert parse(file("data: {dataset: rows.jsonl, max_length: 99}")).data == Data(dataset="rows.jsonl", max_length=99)
    assert parse(["--data.size", "100"]).data == dataclasses.replace(Recipe().data, size=100)
    assert parse(["--method.type", "lora"]).method == LoRA()


def test_changing_the_files_method_keeps_what_both_methods_have(file):
    argv = file("method: {type: srlora, rank: 8, target_rank: 24, target_modules: [q_proj]}")
    assert parse([*argv, "--method.type", "lora"]).method == LoRA(rank=8, target_modules=["q_proj"])
    assert "rnak" in refusal(*file("method: {type: srlora, rnak: 8}"), "--method.type", "lora")


@pytest.mark.parametrize("flag", [["--local_rank=3"], ["--local_rank", "3"], ["--local-rank=0"]])
def test_what_the_deepspeed_launcher_adds_is_dropped(flag):
    assert parse([*flag, "--seed", "7"]) == parse(["--seed", "7"])


def test_a_saved_recipe_parses_back(tmp_path):
    argv = "--method.type srlora --method.alpha 8 --method.target_modules q_proj,v_proj --adam_epsilon 1e-12"
    argv += " --learning_rate 3e-7"
    recipe = parse(
        [*argv.split(), "--data.dataset=r\u00e9ponses: #1.jsonl", "--output_dir", "null", "--data.split", "train[:5%]"]
    )
    sharded = dataclasses.replace(
        recipe, engine="fsdp", codec="nf4", codec_double_quant=True, fsdp=Sharding(False, True, 2)
    )
    for original in (recipe, Recipe(), dataclasses.replace(recipe, method=LoRA(use_rslora=True)), sharded):
        save(original, tmp_path / "out" / "recipe.yaml")
        assert parse(["--config_path", str(tmp_path / "out" / "recipe.yaml")]) == original


def rates(*argv: str, total: int) -> Schedule:
    return schedule_of(parse(argv), total)


@pytest.mark.parametrize(
    "total, warmup", [(1, 0), (2, 1), (3, 1), (9, 4), (10, 5), (11, 5), (12, 5), (80, 5), (100_000, 5)]
)
def test_a_default_warm_up_fits_every_run(total, warmup):
    assert rates(total=total) == Schedule(Recipe.learning_rate, total, warmup, "cosine", 0.0)
    validate(parse([f"--max_steps={total}"]))


def test_the_schedule_gets_the_recipes_numbers():
    argv = ["--lr_scheduler_type=warmup_stable_decay", "--learning_rate=0.5", "--min_lr_rate=0.25"]
    assert rates(*argv, "--warmup_steps=7", total=60) == Schedule(0.5, 60, 7, "warmup_stable_decay", 0.25)
    assert rates(*argv, "--warmup_ratio=0.1", total=30) == Schedule(0.5, 30, 3, "warmup_stable_decay", 0.25)
    assert rates("--warmup_steps=0", total=60).warmup == rates("--warmup_ratio=0", total=60).warmup == 0
    assert rates("--warmup_steps=4", total=4).warmup == 4
    assert rates("--warmup_ratio=0.03", total=1000).warmup == 30
    assert rates("--warmup_ratio=0.03", total=10).warmup == 0


def test_a_warm_up_that_is_longer_than_the_data_is_refused_when_the_data_is_known():
    validate(parse(["--warmup_steps=100"]))  # of the data nothing is known yet
    with pytest.raises(
        RecipeError, match=r"^warmup_steps \(100\) is more than the 73 steps of the run; lower it or tr"
    ):
        rates("--warmup_steps=100", total=73)
    assert rates("--warmup_steps=73", total=73).warmup == 73


def test_the_optimizer_gets_the_recipes_numbers():
    argv = (
        "--learning_rate 0.5 --adam_beta1 0.1 --adam_beta2 0.2 --adam_epsilon 0.3 --weight_decay 0.4 --max_grad_norm 0"
    )
    settings = optimization(
        parse([*argv.split(), "--gradient_accumulation_steps=6", "--per_device_train_batch_size=7"])
    )
    assert (settings.learning_rate, settings.betas, settings.eps, settings.weight_decay) == (0.5, (0.1, 0.2), 0.3, 0.4)
    assert (settings.max_grad_norm, settings.accumulation, settings.micro_batch) == (0.0, 6, 7)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, meant",
    [
        ("lora_r", "method.rank"),
        ("lora_alpha", "method.alpha"),
        ("lora_dropout", "method.dropout"),
        ("lora_target_modules", "method.target_modules"),
        ("batch_size", "per_device_train_batch_size"),
        ("micro_batch_size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("epochs", "num_train_epochs"),
        ("max_seq_length", "data.max_length"),
        ("cutoff_len", "data.max_length"),
        ("bf16", "dtype bfloat16"),
        ("fp16", "dtype bfloat16"),
        ("rank", "method.rank"),  # without its section
        ("learning-rate", "learning_rate"),
        ("learing_rate", "learning_rate"),
        ("method.rnk", "method.rank"),
        ("data.max_len", "data.max_length"),
        ("data.rank", "method.rank"),
    ],
)
def test_an_unknown_setting_names_the_one_that_was_meant(file, key, meant):
    for argv in ([f"--{key}", "8"], [f"--{key}=8"], file(f"{key}: 8\n")):
        assert f"unknown setting '{key}'; did you mean {meant}" in refusal(*argv)


def test_an_unknown_setting_without_a_likeness(file):
    assert refusal("--xylophone", "8") == "unknown setting 'xylophone'; --help lists what there is"
    assert "unknown setting 'method.task'" in refusal(*file("method: {type: lora, task: {a: 1}}"))


def test_all_mistakes_are_told_at_once():
    message = refusal("--lr", "1", "--epochs", "2", "--max_steps", "many")
    assert [line.partition(";")[0] for line in message.splitlines()] == [
        "unknown setting 'lr'",
        "unknown setting 'epochs'",
        "max_steps: 'many' is not a value of type int",
    ]


@pytest.mark.parametrize("argv", [["--method.type", "lora", "--method.target_rank", "9"], ["FILE"]])
def test_a_setting_of_another_method_is_refused(file, argv):
    argv = file("method: {type: lora, target_rank: 9}") if argv == ["FILE"] else argv
    assert refusal(*argv) == "unknown setting 'method.target_rank': method.type lora does not have it"


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--learning_rate abc", "learning_rate: 'abc' is not a value of type float"),
        ("--max_steps 1.5", "max_steps: '1.5' is not a value of type int"),
        ("--seed true", "seed: 'True' is not a value of type int"),
        ("--dry_run maybe", "dry_run: 'maybe' is not a value of type true|false"),
        ("--method.rank abc", "method.rank: 'abc' is not a value of type int"),
        ("--method.alpha abc", "method.alpha: 'abc' is not a value of type float"),
        ("--weight_decay [1]", "weight_decay: '[1]' is not a value of type float"),
        ("--seed null", "seed needs a value (int)"),
        ("--learning_rate", "--learning_rate needs a value"),
        ("--data.task 3", "data.task: '3' is not a section"),
        ("--method.target_modules 3", "method.target_modules: '3' is not a list; write a,b,c"),
        ("--method lora", "method is a section of settings, not a value; did you mean method.type lora?"),
        ("--method lora --method.rank 3", "method was given a value, 'lora', and is a section"),
        ("--engine ddp", "engine: 'ddp' is not one of plain, deepspeed, fsdp"),
        ("--codec int4", "codec: 'int4' is not one of dense, nf4, int8"),
        ("--codec_double_quant", "codec_double_quant: true is for codec: nf4, not dense"),
        ("--codec int8 --codec_double_quant true", "codec_double_quant: true is for codec: nf4, not int8"),
        ("--merge_base dequantized", "merge_base: dequantized is for codec: nf4 or int8"),
        ("--codec nf4 --merge_base dequantized --save_merged false", "save_merged: false that nothing is merged"),
        ("--merge_base trained", "merge_base: 'trained' is not one of original, dequantized"),
        ("--fsdp.cpu_offload", "the settings under fsdp are for engine: fsdp, not deepspeed"),
        (
            "--fsdp.reshard_after_forward false --engine plain",
            "the settings under fsdp are for engine: fsdp, not plain",
        ),
        ("--fsdp.shard_size -1 --engine fsdp", "fsdp.shard_size must be at least 0, not -1"),
        ("--fsdp.shard_size half", "fsdp.shard_size: 'half' is not a value of type int"),
        ("--fsdp 2", "fsdp is a section of settings, not a value"),
        ("--dtype float16", "dtype: 'float16' is not one of float32, bfloat16"),
        ("--method.type lorra", "method.type: 'lorra' is not one of lora, "),
        ("--seed 3 extra", "unexpected argument 'extra'"),
        ("--config_path nowhere.yaml", "--config_path nowhere.yaml: No such file"),
        ("--method.target_rank 3", "method.target_rank (3) must be at least method.rank (16)"),
        ("--method.rank 0", "method.rank must be at least 1, not 0"),
        ("--data.max_length 1", "data.max_length=1: must be at least 2"),
        ("--learning_rate 0", "learning_rate must be above 0, not 0.0"),
        ("--learning_rate nan", "learning_rate must be above 0, not nan"),
        ("--max_grad_norm -1", "max_grad_norm must be at least 0"),
        ("--adam_beta2 1", "adam_beta2 must be at least 0 and below 1"),
        ("--max_steps 0", "max_steps must be at least 1, or -1"),
        ("--max_steps 4 --warmup_steps 5", "warmup_steps (5) is more than max_steps (4)"),
        ("--warmup_steps -1", "warmup_steps must be at least 0, not -1"),
        (
            "--warmup_steps 5 --warmup_ratio 0.1",
            "warmup_steps (5) and warmup_ratio (0.1) both say how long the warm-up",
        ),
        ("--warmup_ratio 1", "warmup_ratio must be at least 0 and below 1, not 1.0"),
        ("--warmup_ratio -0.1", "warmup_ratio must be at least 0 and below 1, not -0.1"),
        ("--min_lr_rate 1.5", "min_lr_rate must be at least 0 and at most 1, not 1.5"),
        (
            "--min_lr_rate 0.1 --lr_scheduler_type constant",
            "min_lr_rate (0.1) has no use with lr_scheduler_type: constant",
        ),
        ("--lr_scheduler_type wsd", "'wsd' is not one of cosine, linear, constant, warmup_stable_decay"),
        ("--optim adam", "optim: 'adam' is not one of adamw, lion"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size must be at least 1"),
        ("--output_dir=", "output_dir must name a folder"),
        ("--model_name_or_path /nowhere", "model_name_or_path: /nowhere does not exist"),
        ("--deepspeed nowhere.json", "deepspeed: nowhere.json is not a file"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_setting(argv, message):
    assert message in refusal(*argv.split())


def test_a_file_that_is_no_recipe_is_refused(file):
    assert "is not YAML" in refusal(*file("method: {type: lora"))
    assert "must hold settings" in refusal(*file("- lora\n"))


def test_an_output_folder_in_use_is_refused(tmp_path):
    argv = ["--output_dir", str(tmp_path)]
    validate(parse(argv))
    (tmp_path / "adapter").mkdir()
    assert "is not empty" in refusal(*argv)
    validate(parse([*argv, "--overwrite_output_dir"]))
    validate(parse([*argv, "--dry_run"]))  # writes nothing
    assert "is a file" in refusal("--output_dir", __file__)


def test_recipes_are_found_here_and_where_the_library_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(["--config_path", "recipes/demo.yaml,recipes/rasa.yaml"]).method.rank == 32
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/rasa.yaml").write_text("method: {type: rasa, rank: 5}")
    assert parse(["--config_path", "recipes/demo.yaml,recipes/rasa.yaml"]).method.rank == 5
    assert f"the library's own recipes are in {ROOT / 'recipes'}" in refusal("--config_path", "recipes/dmo.yaml")


def test_deepspeed_settings_are_found_here_and_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert deepspeed_config(Recipe()) == ROOT / "ds_configs" / "zero3.json"
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text("{")
    assert deepspeed_config(Recipe()).resolve() == (tmp_path / "ds_configs" / "zero3.json").resolve()
    assert "is not JSON" in refusal("--output_dir", str(tmp_path / "out"))
    validate(parse(["--engine", "plain", "--output_dir", str(tmp_path / "out")]))  # does not need the file


def test_missing_packages_are_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal("--output_dir", str(tmp_path))
    assert "pip install deepspeed or --engine plain" in message
    assert "tensorboard is not installed" in message
    argv = ["--output_dir", str(tmp_path), "--engine", "plain", "--report_to", "none"]
    validate(parse(argv))
    validate(parse([*argv, "--engine", "fsdp"]))
    validate(parse([*argv, "--codec", "int8"]))
    assert "codec: nf4 needs bitsandbytes; pip install bitsandbytes" in refusal(*argv, "--codec", "nf4")


FLASH, CUDA = "flash_attention_2", "a CUDA device of capability 8.0 or more"


@pytest.mark.parametrize(
    "dtype, capability, installed, lacking",
    [
        ("bfloat16", (9, 0), True, []),
        ("float32", (9, 0), True, ["dtype: bfloat16"]),
        ("bfloat16", (7, 5), True, [CUDA]),
        ("bfloat16", (8, 0), False, ["flash-attn"]),
        ("bfloat16", None, True, [CUDA]),
        ("float32", None, False, ["dtype: bfloat16", CUDA]),
    ],
)
def test_auto_attention_is_flash_attention_where_nothing_is_missing(
    monkeypatch, tmp_path, dtype, capability, installed, lacking
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: capability is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    monkeypatch.setattr("llm_lowrank.run.build.is_flash_attn_2_available", lambda: installed)
    argv = ["--output_dir", str(tmp_path), "--dtype", dtype]
    recipe = parse(argv)
    assert attentions(recipe) == [*([] if lacking else [FLASH]), "sdpa", "eager"]
    model = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attentions(recipe)[0]))
    kernel, why = attention(recipe, model)
    assert kernel == ("sdpa" if lacking else FLASH) and all(text in why for text in lacking)
    assert attentions(parse([*argv, "--attn_implementation", "eager"])) == ["eager"]
    argv += ["--attn_implementation", FLASH]
    if not lacking:
        return validate(parse(argv))
    message = refusal(*argv)
    assert f"attn_implementation: {FLASH} needs {' and '.join(lacking)}" in message
    assert ('pip install --no-build-isolation "llm-lowrank[cuda]"' in message) == ("flash-attn" in lacking)


@pytest.mark.parametrize(
    "argv",
    [
        "--engine fsdp",
        "--engine fsdp --codec nf4 --codec_double_quant",
        "--engine fsdp --codec int8 --fsdp.cpu_offload",
        "--codec nf4 --dtype bfloat16",
        "--engine plain --codec int8 --merge_base dequantized",
    ],
)
def test_every_engine_takes_every_codec(argv, tmp_path):
    validate(parse([*argv.split(), "--output_dir", str(tmp_path)]))


def test_the_fsdp_section_is_its_sharding(file):
    argv = file("engine: fsdp\nfsdp: {reshard_after_forward: false, shard_size: 2}\n")
    assert parse(argv).fsdp == Sharding(reshard_after_forward=False, shard_size=2)
    assert parse([*argv, "--fsdp.cpu_offload", "--fsdp.shard_size=4"]).fsdp == Sharding(False, True, 4)
    assert "unknown setting 'fsdp.shards'" in refusal(*argv, "--fsdp.shards", "2")


# --- help -------------------------------------------------------------------------------------------------------------


def test_help_has_every_setting_with_its_type_default_and_text(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    parts = re.split(r"\nmethod\.(?:direction\.)?type \w+:", text)  # two types may have settings of the same name
    for key in command_line.settings(Recipe):
        entry = text.partition(f"  --{key} ")[2].partition("\n  --")[0]
        assert entry, f"--{key} is missing"
        assert all(part.count(f"  --{key} ") <= 1 for part in parts), f"--{key} comes twice"
        # what is unset says what that means
        assert "(default:" in entry or "by default" in " ".join(entry.split()), entry
        assert len(entry.split()) > 5 or key.endswith(".type"), f"--{key} says too little: {entry}"
    assert "--learning_rate float\n" in text and f"(default: {Recipe().learning_rate})" in text
    assert (
        "--engine {plain,deepspeed,fsdp}" in text
        and "--codec {dense,nf4,int8}" in text
        and "--fsdp.shard_size int" in text
    )
    assert "--method.type {lora," in text and "}  (default: srlora)" in text
    assert "--data.max_length int" in text and "(default: 128)" in text  # the demo's, not the class's
    for heading in HEADINGS.values():
        assert f"\n{heading}:\n" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_setting_that_the_optimizer_has_not_is_refused(tmp_path):
    recipe = parse(
        [
            f"--output_dir={tmp_path / 'out'}",
            "--engine=plain",
            "--report_to=none",
            "--optim=lion",
            "--adam_epsilon=1e-6",
        ]
    )
    with pytest.raises(RecipeError, match="adam_epsilon is of AdamW, optim: lion has none; remove it"):
        validate(recipe)


def test_tables_about_settings_name_settings():
    keys = {*command_line.settings(Recipe), "config_path"}
    assert set(HEADINGS) <= keys
    assert {f"{section}.{key}" for section, key in IDENTITY.items()} <= keys
    assert {meant.split()[0] for meant in SYNONYMS.values()} <= keys
    assert not {name for name in SYNONYMS if name in keys}, "a synonym hides a setting"
    assert set(Method.get_known_choices()) >= {"lora", "pissa", "srlora"}
