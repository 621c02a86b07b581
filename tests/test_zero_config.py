"""The DeepSpeed configuration: every "auto" is replaced, and what cannot be right is refused by name before anything
starts.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.codecs import Codec, Dense, Nf4
from llm_lowrank.engines.base import Optimization
from llm_lowrank.engines.frozen import persistent_size
from llm_lowrank.engines.zero import Zero
from llm_lowrank.engines.zero_config import KNOBS, REFUSALS, resolve
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.losia import LoSiA
from tests import tiny

SHIPPED = sorted((Path(__file__).parents[1] / "ds_configs").glob("*.json"))
SETTINGS = Optimization(accumulation=3, micro_batch=2, max_grad_norm=0.5)

# For every path of REFUSALS: values that must be refused, and values that are harmless.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "zero_optimization.zero_quantized_nontrainable_weights": ([True], [False]),
    "zero_optimization.zero_quantized_weights": ([True], [False]),
    "zero_optimization.zero_quantized_gradients": ([True], [False]),
    "zero_optimization.zero_hpz_partition_size": ([2, 8], [1]),
    "zero_optimization.mics_shard_size": ([1, 4], [-1]),
    "zero_optimization.offload_param.device": (["nvme"], ["cpu", "none"]),
    "zero_optimization.offload_optimizer.device": (["nvme"], ["cpu", "none"]),
    "bf16.enabled": ([True], ["auto", False]),
    "fp16.enabled": ([True], ["auto", False]),
}


def minimal(stage: Any = 3, **zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **zero}}


def with_value(path: str, value: Any) -> dict[str, Any]:
    config = minimal()
    *parents, last = path.split(".")
    at = config
    for parent in parents:
        at = at.setdefault(parent, {})
    at[last] = value
    return config


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    return [leaf for v in value for leaf in leaves(v)] if isinstance(value, list) else [value]


def resolved(config: dict[str, Any], world: int = 4) -> dict[str, Any]:
    return resolve(config, SETTINGS, world, persistent=1234)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_shipped_files_resolve_without_an_auto_left(file):
    config = json.loads(file.read_text())
    assert "auto" in leaves(config)
    before = copy.deepcopy(config)
    found = resolved(config)
    assert config == before  # the input stays as the user wrote it
    assert "auto" not in leaves(found)
    assert found["train_micro_batch_size_per_gpu"] == 2 and found["gradient_accumulation_steps"] == 3
    assert found["train_batch_size"] == 2 * 3 * 4
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"]["stage"] == before["zero_optimization"]["stage"]
    assert found["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert found["zero_optimization"]["stage3_param_persistence_threshold"] == 1234  # the largest factor stays gathered


def test_there_are_the_four_shipped_files():
    assert [file.name for file in SHIPPED] == ["zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"]
    assert [json.loads(file.read_text())["zero_optimization"]["stage"] for file in SHIPPED] == [1, 2, 3, 3]


def test_pinned_memory_follows_the_machine():
    found = resolved(json.loads(SHIPPED[3].read_text()))["zero_optimization"]
    assert (
        found["offload_param"]
        == found["offload_optimizer"]
        == {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    )


def test_no_clipping_is_passed_to_deepspeed_which_clips_at_one_otherwise():
    assert resolve(minimal(), Optimization(), 1, 1)["gradient_clipping"] == 0.0


def test_precision_is_never_left_to_deepspeed():
    found = resolved({**minimal(), "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}})
    assert "bf16" not in found and "fp16" not in found  # its fp32 mode: the frozen pairs and masters stay as they are


def test_our_own_optimizer_is_always_allowed():
    found = resolved({**minimal(), "zero_allow_untested_optimizer": False, "zero_force_ds_cpu_optimizer": True})
    assert found["zero_allow_untested_optimizer"] is True and found["zero_force_ds_cpu_optimizer"] is False


def test_numbers_that_the_user_wrote_stay():
    config = minimal(reduce_bucket_size=7, stage3_param_persistence_threshold=0, overlap_comm=False)
    config |= {
        "steps_per_print": 5,
        "wall_clock_breakdown": True,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 24,
    }
    found = resolved(config)
    assert found["zero_optimization"]["reduce_bucket_size"] == 7
    assert found["zero_optimization"]["stage3_param_persistence_threshold"] == 0  # 0 is a number, not "not set"
    assert found["zero_optimization"]["overlap_comm"] is False
    assert found["steps_per_print"] == 5 and found["wall_clock_breakdown"] is True and found["train_batch_size"] == 24


def test_every_refusal_has_its_values_here():
    assert sorted(path for path, _, _ in REFUSALS) == sorted(VALUES)


@pytest.mark.parametrize("path,value", [(path, value) for path, (bad, _) in VALUES.items() for value in bad])
def test_a_setting_that_cannot_be_right_is_refused_by_name_with_what_to_do(path, value):
    (why,) = (why for refused, _, why in REFUSALS if refused == path)
    config = with_value(path, value)
    before = copy.deepcopy(config)
    with pytest.raises(ValueError) as caught:
        resolved(config)
    assert str(caught.value) == f"DeepSpeed config: {path} = {value!r} cannot be used: {why}"
    assert config == before


@pytest.mark.parametrize("path,value", [(path, value) for path, (_, good) in VALUES.items() for value in good])
def test_the_same_setting_with_a_harmless_value_is_accepted(path, value):
    section, _, rest = path.partition(".")
    found = resolved(with_value(path, value))
    if section == "zero_optimization":
        key = rest.split(".")[0]
        assert found[section][key] == with_value(path, value)[section][key]


@pytest.mark.parametrize(
    "key,near",
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("xyz", None),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(key, near):
    with pytest.raises(ValueError, match=f"DeepSpeed config: key {key!r} is not an engine knob") as caught:
        resolved({**minimal(), key: 1})
    hint = str(caught.value).partition("; did you mean ")[2]
    assert hint.startswith(f"{near!r}?") if near else hint == ""


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "amp", "activation_checkpointing"])
def test_what_the_recipe_sets_is_no_engine_knob(key):
    assert key not in KNOBS
    with pytest.raises(ValueError, match=rf"{key}.*set in the recipe"):
        resolved({**minimal(), key: {}})


@pytest.mark.parametrize(
    "key,value,recipe",
    [
        ("train_micro_batch_size_per_gpu", 8, 2),
        ("gradient_accumulation_steps", 1, 3),
        ("train_batch_size", 6, 24),
        ("gradient_clipping", 1.0, 0.5),
        ("gradient_clipping", 0.0, 0.5),
    ],
)
def test_a_conflict_with_the_recipe_names_both_values(key, value, recipe):
    with pytest.raises(
        ValueError,
        match=f'DeepSpeed config: {key} is {value} but the recipe asks for {recipe}; write "auto" in the JSON',
    ):
        resolved({**minimal(), key: value})


@pytest.mark.parametrize("stage", [0, None, 4, "3", "auto"])
def test_a_stage_without_sharding_is_refused(stage):
    with pytest.raises(
        ValueError, match=f"zero_optimization.stage must be 1, 2 or 3, not {stage!r}; use `engine: plain`"
    ):
        resolved(minimal(stage))


def test_a_config_without_zero_is_refused():
    with pytest.raises(ValueError, match=r"zero_optimization.stage must be 1, 2 or 3, not None"):
        resolved({"gradient_clipping": "auto"})


def test_an_auto_that_nobody_can_replace_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no automatic value for zero_optimization.sub_group_size; write a number"):
        resolved(minimal(sub_group_size="auto"))


@pytest.mark.parametrize("text", [None, "{not json"], ids=["missing", "not-json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "zero9.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"DeepSpeed config {path}"):
        Zero(path)


def test_everything_trained_may_stay_gathered_but_no_frozen_weight():
    def size(method: Method, codec: Codec) -> int:
        model = tiny.skeleton(tie_word_embeddings=False)
        attach(model, method, codec)
        return persistent_size(model)

    assert size(LoRA(rank=3), Dense()) == 3 * 43  # the largest factor
    assert size(LoRA(rank=14), Dense()) == 14 * 42 - 1, (
        "k_proj (14 x 42) is no larger than A (14 x 43): it would stay whole on every rank"
    )
    assert size(LoSiA(factor=0.5, output_factor=0.5), Dense()) == 14 * 42 - 1
    assert size(LoRA(rank=14), Nf4()) == 14 * 32 - 1  # codes
