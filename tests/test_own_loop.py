"""prepare(): a loop of one's own trains what the library's loop trains, and is told where it does not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import LlamaForCausalLM

import llm_lowrank
from llm_lowrank import LoRA, Prepared, SRLoRA, prepare
from llm_lowrank.engines.base import RankError
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.methods.core import Core
from llm_lowrank.methods.lora_ga import LoRAGA
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.messages import HOPELESS
from tests import ranks, tiny

STEPS, SAMPLES, RATE = 4, 6, 1e-2
METHOD = SRLoRA(rank=4, alpha=6, target_rank=7, svd_cache="")  # exchanges after steps 1 and 3
ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "seed": 0,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.5,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """An engine with a group of one process says so in the environment, which is no other test's business."""
    with mock.patch.dict(os.environ):
        yield


def micro_batches(step: int, prepared: Prepared) -> Iterator[Tensor]:
    """This rank's part of a global batch."""
    tokens, engine = tiny.batch(step, SAMPLES), prepared.engine
    accumulation = prepared.recipe.gradient_accumulation_steps
    yield from tokens.view(accumulation, engine.world, -1, tokens.shape[1])[:, engine.rank]


def step_of(prepared: Prepared, step: int) -> float:
    total = 0.0
    for ids in micro_batches(step, prepared):
        loss = prepared.model(input_ids=ids, labels=ids).loss
        prepared.backward(loss)
        total += float(loss.detach()) / prepared.parts
    prepared.optimizer.step()
    return float(prepared.engine.sum(torch.tensor(total)))


def lived(model: str, folder: str, engine: str, codec: str, **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """A whole run: its losses, and what it trained. The adapter lies in the folder afterwards."""
    if engine.startswith("zero"):
        file = Path(folder) / f"{engine}-{os.environ['RANK']}.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": int(engine[-1])}}))
        engine, settings = "deepspeed", {**settings, "deepspeed": str(file)}
    prepared = prepare(model, METHOD, codec, engine, **{**SETTINGS, **settings})
    losses = [step_of(prepared, step) for step in range(STEPS)]
    assert [step for step, _ in prepared.exchanges] == list(METHOD.schedule(STEPS))
    prepared.save_adapter(folder)
    return losses, {
        name: prepared.engine.whole(p).cpu() for name, p in prepared.base.named_parameters() if p.requires_grad
    }


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
@pytest.mark.parametrize(
    "engine, world, codec, modules",
    [
        ("plain", 1, "dense", []),
        ("plain", 2, "nf4", []),
        ("fsdp", 2, "nf4", []),
        ("zero2", 2, "dense", ["embed_tokens", "norm"]),
        ("zero3", 3, "nf4", []),
    ],
)
def test_a_loop_of_ones_own_trains_what_our_loop_trains(model, tmp_path, engine, world, codec, modules):
    dtype = "fp32" if codec == "dense" else codec
    t = tiny.Trainee(METHOD, "plain", dtype, max_grad_norm=0.5, total=STEPS, modules=modules)
    wanted = []
    for step in range(STEPS):
        wanted.append(t.step(step, RATE))
        if step + 1 in METHOD.schedule(STEPS, t.adapters):
            t.exchange(step + 1)
    arguments = (model, str(tmp_path), engine, codec)
    live = partial(lived, modules_to_save=modules)
    losses, values = live(*arguments) if world == 1 else ranks.run(world, live, *arguments, timeout=120)[0]
    assert not modules or "model.norm.weight" in values
    assert losses == pytest.approx(wanted, rel=1e-6)
    for name, value in t.values().items():
        if name in values:
            torch.testing.assert_close(values[name], value, rtol=1e-4, atol=1e-6)
    found = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model), tmp_path)
    if codec == "dense":
        torch.testing.assert_close(found(input_ids=tiny.batch(99)).logits, t.logits(), rtol=1e-4, atol=1e-5)


def test_accumulation_and_the_schedule_of_the_settings(model, tmp_path):
    three, _ = lived(model, str(tmp_path), "plain", "dense", gradient_accumulation_steps=3)
    assert three == pytest.approx(lived(model, str(tmp_path), "plain", "dense")[0], rel=1e-6)
    prepared = prepare(model, METHOD, **{**SETTINGS, "lr_scheduler_type": "linear", "warmup_steps": 2})
    seen = []
    for step in range(STEPS):
        seen.append(prepared.optimizer.param_groups[0]["lr"])
        step_of(prepared, step)
    assert seen == pytest.approx([prepared.rate(step) for step in range(STEPS)]) and seen[0] < seen[1] > seen[3]


def test_what_is_saved_goes_on_bitwise(model, tmp_path):
    whole = prepare(model, METHOD, "nf4", **SETTINGS)
    losses = [step_of(whole, step) for step in range(2)]
    whole.save(tmp_path)
    losses += [step_of(whole, step) for step in range(2, STEPS)]
    rest = prepare(model, METHOD, "nf4", resume_from=tmp_path, **SETTINGS)
    assert rest.step == 2
    assert losses[2:] == [step_of(rest, step) for step in range(2, STEPS)]
    for (name, p), q in zip(whole.base.named_parameters(), rest.base.parameters(), strict=True):
        assert torch.equal(p, q), name
    with pytest.raises(RecipeError, match=r"learning_rate: 0\.01 in the checkpoint, 0\.02 now"):
        prepare(model, METHOD, "nf4", resume_from=tmp_path, **{**SETTINGS, "learning_rate": 0.02})
    with pytest.raises(ValueError, match="holds no checkpoint of this library"):
        prepare(model, METHOD, "nf4", resume_from=tmp_path / "elsewhere", **SETTINGS)


@pytest.mark.parametrize("merge_base", ["original", "dequantized"])
def test_the_merged_model_answers_as_the_trained_one(model, tmp_path, merge_base):
    prepared = prepare(model, METHOD, "dense" if merge_base == "original" else "nf4", **SETTINGS)
    for step in range(STEPS):
        step_of(prepared, step)
    said = str(prepared.merge(tmp_path, merge_base))
    assert "14 modules merged" in said
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    prepared.model.eval()
    ids = tiny.batch(99)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, prepared.model(ids).logits, rtol=1e-3, atol=1e-4)


def test_a_method_that_looks_at_gradients_first_asks_for_them(model):
    method = LoRAGA(rank=4, samples=6, svd_niter=2)
    with pytest.raises(RecipeError, match=r"LoRAGA looks at gradients before its first step.*give prepare calibration"):
        prepare(model, method, **SETTINGS)
    ids = tiny.batch(0)
    made = []

    def losses(model: torch.nn.Module) -> Iterator[Tensor]:
        made.append(True)
        yield model(input_ids=ids, labels=ids).loss

    prepared = prepare(model, method, calibration=losses, **SETTINGS)
    start = prepared.adapters[0].A.detach().clone()
    assert made and float(start.norm()) > 0
    ids = ids.flip(0)  # the same samples in another order
    other = prepare(model, method, calibration=losses, **SETTINGS)
    torch.testing.assert_close(other.adapters[0].A.detach(), start, rtol=1e-3, atol=1e-4)


def test_a_core_is_calibrated_again_after_an_exchange(model):
    method = Core(p=6, samples=6, svd_niter=1, interval=2, exchanges=[2], into="bank")
    asked, done = [], 0

    def losses(model: torch.nn.Module) -> Iterator[Tensor]:
        asked.append(done)
        ids = tiny.batch(done)
        yield model(input_ids=ids, labels=ids).loss

    prepared = prepare(model, method, calibration=losses, **{**SETTINGS, "optim": "sgd"})
    for step in range(STEPS):
        done = step + 1
        step_of(prepared, step)
    assert set(asked) == {0, 2}


def test_a_gradient_that_is_not_finite_changes_nothing_and_ends_a_hopeless_run(model, capsys):
    prepared = prepare(model, LoRA(rank=4), **{**SETTINGS, "max_steps": 50})
    step_of(prepared, 0)
    before = [p.detach().clone() for p in prepared.engine.params]
    ids = tiny.batch(1)

    def hopeless() -> None:
        for _ in range(50):
            prepared.backward(prepared.model(input_ids=ids, labels=ids).loss * float("nan"))
            prepared.optimizer.step()

    with pytest.raises(RuntimeError, match=f"gradients of {HOPELESS} steps in a row were not finite"):
        hopeless()
    assert prepared.step == 1 + HOPELESS and prepared.skipped == HOPELESS
    assert all(torch.equal(p, q) for p, q in zip(prepared.engine.params, before, strict=True))
    assert "a gradient is not finite; the step changed nothing" in capsys.readouterr().err


def test_mistakes_of_a_loop_are_named(model):
    prepared = prepare(model, LoRA(rank=4), **{**SETTINGS, "max_steps": 1, "gradient_accumulation_steps": 2})
    ids = tiny.batch(0)
    loss = prepared.model(input_ids=ids, labels=ids).loss
    prepared.backward(loss)
    with pytest.raises(RuntimeError, match="backward was called 1 times before"):
        prepared.optimizer.step()
    prepared.backward(prepared.model(input_ids=ids, labels=ids).loss)
    with pytest.raises(RuntimeError, match="backward was called 3 times"):
        prepared.backward(prepared.model(input_ids=ids, labels=ids).loss)
    prepared.optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match="a scheduler of your own has no effect here"):
        prepared.optimizer.step()
    prepared.optimizer.param_groups[0]["lr"] = RATE
    prepared.optimizer.step()
    for _ in range(2):
        prepared.backward(prepared.model(input_ids=ids, labels=ids).loss)
    with pytest.raises(RuntimeError, match="all 1 steps are done; give a larger max_steps"):
        prepared.optimizer.step()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"rank": 4}, "rank is no setting of prepare; there are adam_beta1"),
        ({"eval_steps": 2}, "eval_steps is no setting of prepare"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"codec": "nf4", "method": LoRA(rank=4), "fsdp": Sharding(cpu_offload=True)}, "settings under fsdp"),
        ({"method": Core(p=4)}, "set optim: sgd"),
    ],
)
def test_settings_that_do_not_fit_are_named_before_the_model_is_read(model, settings, said):
    with (
        mock.patch("llm_lowrank.integrations.own_loop.Source.open", side_effect=AssertionError),
        pytest.raises(RecipeError, match=said),
    ):
        prepare(model, **{"method": METHOD, **SETTINGS, **settings})


def test_a_model_that_is_loaded_already(model):
    loaded = LlamaForCausalLM.from_pretrained(model)
    assert step_of(prepare(loaded, METHOD, **SETTINGS), 0) == step_of(prepare(model, METHOD, **SETTINGS), 0)
    with torch.no_grad():
        loaded.model.norm.weight[0] += 1
    with pytest.raises(RecipeError, match=r"model: model.norm.weight is not what .* holds; save the changed model"):
        prepare(loaded, METHOD, **SETTINGS)
    with pytest.raises(RecipeError, match="model: it was not loaded from a folder"):
        prepare(tiny.llama(), METHOD, **SETTINGS)


def test_an_adapter_of_another_model_is_refused_and_one_that_changed_is_not_resumed_with(model, tmp_path):
    other = tiny.llama()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    prepare(str(tmp_path / "other"), LoRA(rank=4), **SETTINGS).save_adapter(tmp_path / "strange")
    with pytest.raises(ValueError, match="strange"):
        prepare(model, LoRA(rank=4, adapter=str(tmp_path / "strange")), **SETTINGS)
    first = prepare(model, LoRA(rank=4), **SETTINGS)
    step_of(first, 0)
    first.save_adapter(tmp_path / "mine")
    second = prepare(model, LoRA(rank=4, adapter=str(tmp_path / "mine")), **SETTINGS)
    second.save(tmp_path)
    step_of(first, 1)
    first.save_adapter(tmp_path / "mine")
    with pytest.raises(RecipeError, match=r"method.adapter: .*the weights are not those of the checkpoint"):
        prepare(model, LoRA(rank=4, adapter=str(tmp_path / "mine")), resume_from=tmp_path, **SETTINGS)


def from_its_own_folder(folders: list[str]) -> str:
    return ranks.caught(lambda: prepare(folders[int(os.environ["RANK"])], METHOD, **SETTINGS), ValueError, RankError)


def test_nodes_with_different_copies_of_a_model_are_told(model, tmp_path):
    other = tiny.llama()
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(tmp_path)
    said = ranks.run(2, from_its_own_folder, [model, str(tmp_path)])
    assert all("rank 0 and rank 1 do not read the same" in line for line in said), said


SCRIPT = """
import atexit, sys
import torch.distributed as dist
from llm_lowrank import LoRA, prepare
atexit.register(lambda: print("a group is left:", dist.is_initialized()))
prepared = prepare(sys.argv[1], LoRA(rank=4), max_steps=1)
assert dist.is_initialized()
if sys.argv[2] == "fail":
    raise RuntimeError("of the script")
"""


@pytest.mark.parametrize("end, left", [("well", False), ("fail", True)])
def test_a_script_leaves_the_group_at_its_end_but_not_after_an_exception(model, tmp_path, end, left):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("script.py", model, end),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (run.returncode == 0) is (end == "well"), run.stderr[-3000:]
    assert f"a group is left: {left}" in run.stdout


def test_the_names_that_a_notebook_needs_are_at_the_top():
    assert llm_lowrank.prepare is prepare and llm_lowrank.Prepared is Prepared
    assert {"prepare", "train", "Recipe", "Data"} <= set(llm_lowrank.__all__)
