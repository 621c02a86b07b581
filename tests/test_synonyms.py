"""Other libraries' names: every one that docs/migrate.md lists is answered, and with what the page says."""

import re
from pathlib import Path

import pytest

from llm_lowrank.run.command_line import RecipeError, settings
from llm_lowrank.run.recipe import Recipe, parse
from llm_lowrank.run.synonyms import NOT_HERE, REFUSALS, SYNONYMS

pytestmark = pytest.mark.quick

PAGE = (Path(__file__).parents[1] / "docs" / "migrate.md").read_text(encoding="utf-8")
KEYS = settings(Recipe).keys() | {"config_path"}
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
ASKED = [  # they had no answer once, or a wrong one
    "load_in_4bit",
    "quantization_bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "load_in_8bit",
    "use_lion",
    "relora",
    "jagged_restart_steps",
    "rasa_k",
    "pissa_init",
    "init_lora_weights",
    "lora_target_linear",
    "attn_impl",
    "sdpa",
    "train_on_inputs",
    "completion_only_loss",
    "assistant_only_loss",
    "mask_history",
    "fsdp_config",
    "enable_liger_kernel",
    "eval_strategy",
    "save_strategy",
    "padding_free",
    "dataset_config",
    "adapter_name_or_path",
    "data_seed",
    "lora_modules_to_save",
    "checkpoint_dir",
    "lora_weights",
    "lora_bias",
    "train_on_responses_only",
    "response_template",
    "enable_thinking",
    "nproc_per_node",
    "use_cache",
    "eval_accumulation_steps",
]


def rows() -> list[tuple[str, str]]:
    """(their name, what the page says about it) of every table that translates."""
    found = []
    for line in PAGE.partition("## PEFT")[2].splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
        if line.startswith("| ") and "`" in cells[-2]:
            found += [(name, cells[-1]) for name in re.findall(r"`([^`]+)`", cells[-2])]
    return found


ROWS = rows()


def refusal(name: str) -> str:
    with pytest.raises(RecipeError) as error:
        parse([f"--{name}", "1"])
    return str(error.value)


def test_a_synonym_names_a_setting_that_exists():
    assert {meant.split()[0] for meant in SYNONYMS.values()} <= KEYS


def test_no_answer_hides_a_setting():
    assert not REFUSALS.keys() & KEYS
    assert not NOT_HERE.keys() & (SECTIONS | {key.rpartition(".")[2] for key in KEYS})


@pytest.mark.parametrize("theirs, ours", ROWS)
def test_a_name_of_the_page_is_answered_as_the_page_says(theirs, ours):
    if ours.startswith("not here: "):
        assert f"; not offered here: {NOT_HERE[theirs]}" in refusal(theirs)
    else:
        setting, _, value = ours.split("`")[1].partition(": ")  # `method.type: dora`, or a name alone
        assert setting in KEYS
        assert re.search(rf"; did you mean {re.escape(f'{setting} {value}'.strip())}\b", refusal(theirs))


def test_every_name_of_the_tables_is_answered():
    silent = [name for name in [*ASKED, *REFUSALS] if not re.search("did you mean|not offered here:", refusal(name))]
    assert silent == []


@pytest.mark.parametrize(
    "name, meant",
    {
        "learning_rat": "learning_rate",
        "batchsize": "",
        "warmup_ration": "warmup_ratio",
        "max_step": "max_steps",
        "save_total": "save_total_limit",
        "gradientcheckpointing": "gradient_checkpointing",
        "data.pack_ing": "data.packing",
        # near by their letters, and the names of other things
        "use_qalora": "",
        "log_interval": "logging_steps",
        "lr_schedule": "lr_scheduler_type",
        "total_steps": "max_steps",
        "train_norm": "",
        "use_cache": "",
        "hub_revision": "",
        "eval_accumulation_steps": "",
        "training_mode": "",
        "svd_lora": "",
    }.items(),
)
def test_a_slip_is_answered_with_the_name_and_another_word_with_none(name, meant):
    found = re.search(r"did you mean (\S+?)\?$", refusal(name))
    assert (found[1] if found else "") == meant


def test_a_section_that_is_a_setting_elsewhere_is_answered_so():
    assert "did you mean engine fsdp?" in refusal("fsdp")
    assert "did you mean method.type" in refusal("method"), "no other library has it: its first setting"


def test_the_names_that_are_the_same_are_settings():
    same = PAGE.partition("## What is the same")[2].partition("## What differs")[0]
    names = re.findall(r"`([a-z_]+)`", same.partition("These names have other values")[0].partition("here:")[2])
    names += re.findall(r"^\| `([a-z_]+)` \|", same, re.MULTILINE)
    assert len(names) >= 25
    assert set(names) <= KEYS


def test_the_page_has_the_names_that_users_type():
    assert len({theirs for theirs, _ in ROWS}) >= 150
    assert {theirs for theirs, _ in ROWS} >= set(ASKED[: ASKED.index("data_seed")]) - {"sdpa"}
    unknown = {theirs for theirs, _ in ROWS} - REFUSALS.keys()
    assert unknown <= {key.rpartition(".")[2] for key in KEYS}, "neither in the tables nor a part of a setting's name"
