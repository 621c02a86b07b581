"""transformers' Trainer and TRL's over our engines: what they train is what the library's own loop trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from trl import SFTConfig, SFTTrainer

from llm_lowrank.adapters.method import Method
from llm_lowrank.engines.fsdp import Sharding
from llm_lowrank.integrations.own_loop import prepare
from llm_lowrank.integrations.trainer import lowrank
from llm_lowrank.methods.core import Core
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.droplora import DropLoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.lora_ga import LoRAGA
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.run.command_line import RecipeError
from tests import ranks, tiny
from tests.test_data import CHATML, byte_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/trainer.md"
SHORTER = """
def shorter(self):
    self.max_steps, self.use_cpu, self.report_to, self.logging_steps = 3, True, "none", 1
    made(self)
trl.SFTConfig.__post_init__ = shorter
"""
STEPS, SAMPLES, RATE = 4, 6, 1e-2
PAIRS: dict[str, Any] = {"rank": 4, "alpha": 6}
SR = SRLoRA(**PAIRS, target_rank=7, svd_cache="")  # exchanges after steps 1 and 3
METHODS: dict[str, Method] = {
    "lora": LoRA(**PAIRS),
    "lora-b-rate": LoRA(**PAIRS, b_rate=4.0),
    "pissa": PiSSA(**PAIRS, svd_cache=""),
    "dora": DoRA(**PAIRS),
    "srlora": SR,
    "relora": ReLoRA(**PAIRS, interval=2, restart_warmup=1),
    "rasa": RaSA(rank=4, k=2),
    "droplora": DropLoRA(**PAIRS, p=0.5),
    "losia": LoSiA(factor=0.25, period=1, output_factor=0),
}
# engine of the Trainer -> ranks, and what the user writes into its arguments
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (2, {}),
    "zero2": (2, {"deepspeed": {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}}),
    "zero3": (3, {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}),
    "fsdp": (2, {"fsdp": True, "fsdp_config": {"fsdp_version": 2, "reshard_after_forward": True}}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.llama().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """accelerate keeps its state in classes and in the environment, which is no other test's business."""
    with mock.patch.dict(os.environ):
        yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def data(steps: int = STEPS, samples: int = SAMPLES) -> Dataset:
    rows = [row.tolist() for step in range(steps) for row in tiny.batch(step, samples)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def arguments(folder: Path | str, kind: type[TrainingArguments] = TrainingArguments, **changes: Any) -> Any:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = changes.get("gradient_accumulation_steps", 1)
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": SAMPLES // world // accumulation,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return kind(**{**settings, **changes})


def trainer_of(kind: type[Trainer], model: Any, folder: Any, method: Method, codec: str, **changes: Any) -> Any:
    _forget()
    config = SFTConfig if kind is SFTTrainer else TrainingArguments
    more: dict[str, Any] = {"eval_dataset": data(1)}
    more |= {} if kind is SFTTrainer else {"data_collator": default_data_collator}
    if kind is SFTTrainer:
        changes = {"max_length": None, "gradient_checkpointing": True, **changes}
        more["processing_class"] = tokenizer()
    rows = changes.pop("rows", None) or data()
    more["modules_to_save"] = changes.pop("modules_to_save", [])
    args = arguments(folder, config, **changes)
    return lowrank(kind)(str(model), args, method=method, codec=codec, train_dataset=rows, **more)


def tokenizer() -> Any:
    return byte_tokenizer()


def values(trainer: Any) -> dict[str, Tensor]:
    prepared = trainer.prepared
    return {name: prepared.engine.whole(p).cpu() for name, p in prepared.base.named_parameters() if p.requires_grad}


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        control.should_training_stop = state.global_step == self.steps


def trained(
    kind: type[Trainer], model: str, folder: str, method: Method, codec: str, engine: str, **changes: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a Trainer's run, and what it trained; the adapter is in the folder afterwards."""
    with mock.patch.dict(os.environ):
        trainer = trainer_of(kind, model, folder, method, codec, **ENGINES[engine][1] if engine else {}, **changes)
        trainer.train()
        trainer.save_model()
        found = values(trainer)
    _forget()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], found


def reference(method: Method, codec: str = "fp32", accumulation: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """The same by the loop that tests the laws."""
    t = tiny.Trainee(method, "plain", codec, accumulation, max_grad_norm=0.5, total=STEPS)
    due = method.schedule(STEPS, t.adapters)
    losses = []
    for step in range(STEPS):
        losses.append(t.step(step, RATE))
        if step + 1 in due:
            t.exchange(step + 1)
    return losses, t.values()


def check_alike(found: tuple[list[float], dict[str, Tensor]], wanted: tuple[list[float], dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert wanted[0][-1] != wanted[0][0]
    for name, value in found[1].items():
        torch.testing.assert_close(value, wanted[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", METHODS)
def test_a_trainer_trains_what_our_loop_trains(model, tmp_path, name):
    check_alike(trained(Trainer, str(model), str(tmp_path), METHODS[name], "dense", ""), reference(METHODS[name]))


@pytest.mark.parametrize(
    "name, engine",
    [
        pytest.param(name, engine, marks=[] if name == "srlora" else pytest.mark.wide)
        for name in METHODS
        for engine in ENGINES
    ],
)
def test_so_it_does_over_nf4_on_every_engine_that_the_arguments_name(model, tmp_path, name, engine):
    world, method = ENGINES[engine][0], METHODS[name]
    by_rank = ranks.run(world, trained, Trainer, str(model), str(tmp_path), method, "nf4", engine, timeout=120)
    assert all(losses == by_rank[0][0] for losses, _ in by_rank)
    check_alike(by_rank[0], reference(method, "nf4"))


def launched(model: str, folder: str, environment: dict[str, str]) -> tuple[str, Any, list[float]]:
    """The engine that the environment chooses, its settings, and the losses of a run."""
    with mock.patch.dict(os.environ, environment):
        trainer = trainer_of(SFTTrainer, model, folder, SR, "nf4")
        trainer.train()
        assert not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled
    _forget()
    engine = trainer.prepared.engine
    settings = getattr(engine, "sharding", None) or engine.stage
    return type(engine).__name__, settings, [e["loss"] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize(
    "environment, engine",
    [
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"},
            ("FSDP", Sharding(reshard_after_forward=False)),
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ("Zero", 3)),
    ],
)
def test_what_accelerate_launch_sets_chooses_the_engine(model, tmp_path, environment, engine):
    by_rank = ranks.run(2, launched, str(model), str(tmp_path), environment, timeout=120)
    assert by_rank[0][:2] == engine
    assert by_rank[0][2] == pytest.approx(reference(SR, "nf4")[0], rel=1e-6)


@pytest.mark.parametrize(
    "engine", [name if name in ("zero3", "fsdp") else pytest.param(name, marks=pytest.mark.wide) for name in ENGINES]
)
def test_trls_trainer_trains_the_same_with_its_own_loss(model, tmp_path, engine):
    world = ENGINES[engine][0]
    by_rank = ranks.run(world, trained, SFTTrainer, str(model), str(tmp_path), SR, "nf4", engine, timeout=120)
    check_alike(by_rank[0], reference(SR, "nf4"))


def test_trls_trainer_in_one_process_with_accumulation(model, tmp_path):
    found = trained(SFTTrainer, str(model), str(tmp_path), SR, "dense", "", gradient_accumulation_steps=3)
    check_alike(found, reference(SR, accumulation=3))


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("modules", [[], ["norm", "embed_tokens"]], ids=["adapters", "whole modules"])
def test_the_adapter_that_a_trainer_saves_is_the_model_that_it_trained(model, tmp_path, modules):
    trainer = trainer_of(Trainer, model, tmp_path, SR, "dense", modules_to_save=modules)
    trainer.train()
    trainer.save_model()
    ids = tiny.batch(77)
    trainer.prepared.base.eval()
    with torch.no_grad():
        wanted = trainer.prepared.model(input_ids=ids).logits
        found = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(model), tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    trainer.prepared.merge(tmp_path / "whole")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "whole/merged").eval()
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def resumed(model: str, folder: str, engine: str, rest: bool) -> tuple[list[float], dict[str, Tensor]]:
    """A whole run that saves after step 2, or what is left of it after that step."""
    with mock.patch.dict(os.environ):
        changes = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine", "warmup_steps": 1}
        trainer = trainer_of(Trainer, model, folder, SR, "nf4", **ENGINES[engine][1] if engine else {}, **changes)
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if rest else None)
        found = values(trainer)
    _forget()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], found


@pytest.mark.parametrize(
    "engine", ["", "zero3", *(pytest.param(name, marks=pytest.mark.wide) for name in ENGINES if name != "zero3")]
)
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(model, tmp_path, engine):
    world = ENGINES[engine][0] if engine else 1
    run = ranks.run if engine else lambda world, body, *args, timeout: [body(*args)]
    whole, rest = (run(world, resumed, str(model), str(tmp_path), engine, part, timeout=120)[0] for part in (0, 1))
    assert rest[0] == whole[0]  # the Trainer keeps the log of the first steps
    assert all(torch.equal(value, whole[1][name]) for name, value in rest[1].items())


def test_the_first_script_of_trls_documentation_runs_with_the_lines_that_the_page_adds(tmp_path):
    """On two ranks of torchrun, as it stands but for what the hub would hold and how long it trains."""
    chats = [
        {"messages": [{"role": "user", "content": f"{k} + 1"}, {"role": "assistant", "content": str(k + 1)}]}
        for k in range(16)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    tokenizer = byte_tokenizer(CHATML)
    tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(tmp_path / "Qwen3-0.6B")
    tokenizer.save_pretrained(tmp_path / "Qwen3-0.6B")
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "trl" in block]
    ours = [line for line in script.splitlines() if "lowrank" in line or "method=" in line]
    assert len(ours) <= 5
    for there, here in (
        ('"Qwen/Qwen3-0.6B"', repr(str(tmp_path / "Qwen3-0.6B"))),
        (
            'load_dataset("trl-lib/Capybara", split="train")',
            'load_dataset("json", data_files="chats.jsonl", split="train")',
        ),
        ("rank=16, target_rank=32", "rank=4, target_rank=8"),
    ):
        assert there in script
        script = script.replace(there, here)
    # arguments of the Trainer come from its own defaults; only the number of steps is set here
    (tmp_path / "script.py").write_text(f"import trl\nmade = trl.SFTConfig.__post_init__\n{SHORTER}\n{script}")
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "script.py"],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    (found,) = (tmp_path / "Qwen3-0.6B-SFT").glob("checkpoint-*")
    tuned = load_file(found / "adapter_model.safetensors")
    assert any(float(value.abs().max()) > 0 for name, value in tuned.items() if "lora_B" in name)
    assert json.loads((found / "trainer_state.json").read_text())["log_history"]


def test_a_checkpoint_of_another_run_is_refused(model, tmp_path):
    resumed(str(model), str(tmp_path), "", False)
    other = trainer_of(Trainer, model, tmp_path, LoRA(rank=4), "nf4", save_strategy="no")
    with pytest.raises(RecipeError, match="was written by another run"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_short_last_step_of_an_epoch(model, tmp_path):
    """Five micro-batches with accumulation 2: the third step has one micro-batch, which is its whole batch."""
    rows = data(5, 2)
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_steps": 3, "rows": rows}
    found = trained(Trainer, str(model), str(tmp_path), LoRA(**PAIRS), "dense", "", **changes)
    settings = {"learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.5}
    own = prepare(str(model), LoRA(**PAIRS), max_steps=3, seed=0, **settings)
    losses = []
    for ids in (torch.tensor(rows[k : k + 4]["input_ids"]) for k in (0, 4, 8)):
        loss = own.model(input_ids=ids, labels=ids).loss
        own.backward(loss)
        own.optimizer.step()
        losses.append(float(loss.detach()))
    check_alike(found, (losses, {name: p.detach() for name, p in own.base.named_parameters()}))


@pytest.mark.parametrize("method", [LoRAGA(**PAIRS, samples=6, svd_niter=2), Core(p=6, samples=6, interval=2)])
def test_a_method_that_looks_at_gradients_first_sees_the_first_samples(model, tmp_path, method):
    found = trained(Trainer, str(model), str(tmp_path), method, "dense", "", optim="sgd")
    settings = {"learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.5}
    ids = tiny.batch(0)

    def first(model: torch.nn.Module) -> Iterator[Tensor]:
        yield model(input_ids=ids, labels=ids).loss

    own = prepare(str(model), method, max_steps=STEPS, calibration=first, seed=0, optim="sgd", **settings)
    losses = []
    for step in range(STEPS):
        batch = tiny.batch(step)
        loss = own.model(input_ids=batch, labels=batch).loss
        own.backward(loss)
        own.optimizer.step()
        losses.append(float(loss.detach()))
    check_alike(found, (losses, {name: p.detach() for name, p in own.base.named_parameters()}))


def test_figures_of_the_method_and_of_exchanges_are_in_the_trainers_log(model, tmp_path):
    trainer = trainer_of(Trainer, model, tmp_path, SR, "dense")
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [step for step, _ in trainer.prepared.exchanges] == list(SR.schedule(STEPS))
    assert [entry["step"] for entry in log if "exchange/pairs" in entry] == list(SR.schedule(STEPS))
    assert all(entry["exchange/drift"] < 1e-5 for entry in log if "exchange/drift" in entry)
    assert any(key.startswith("method/") for entry in log for key in entry)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"fp16": True}, "fp16: the backbone"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, "load_best_model"),
        ({"optim": "adafactor"}, "optim: adafactor is not one of adamw_torch"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices: each rank"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "lr_scheduler_type: "),
    ],
)
def test_what_the_engines_cannot_honor_is_refused_by_name(model, tmp_path, changes, said):
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        pytest.raises((RecipeError, ValueError), match=said),
    ):
        trainer_of(Trainer, model, tmp_path, LoRA(rank=4), "dense", **changes).train()


def test_an_optimizer_of_ones_own_and_peft_are_refused(model, tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for name, value in (("optimizers", (optimizer, None)), ("peft_config", object()), ("model_init", print)):
        with pytest.raises(RecipeError, match=f"^{name}: "):
            lowrank(Trainer)(str(model), arguments(tmp_path), method=LoRA(rank=4), **{name: value})


def test_two_engines_and_fsdps_first_version_are_refused(model, tmp_path):
    args = arguments(tmp_path)
    args.fsdp_plugin_args = {"fsdp_version": 2}
    with pytest.raises(RecipeError, match=r"engine: deepspeed is asked for, and args .* say fsdp"):
        lowrank(Trainer)(str(model), args, method=LoRA(rank=4), engine="deepspeed")
    args.fsdp_plugin_args = {"fsdp_version": 1}
    with pytest.raises(RecipeError, match="set fsdp_version: 2"):
        lowrank(Trainer)(str(model), args, method=LoRA(rank=4))
    args.fsdp_plugin_args = {"fsdp_version": 2, "activation_checkpointing": True}
    with pytest.raises(
        RecipeError, match=r"activation_checkpointing is accelerate's.* set gradient_checkpointing: true"
    ):
        lowrank(Trainer)(str(model), args, method=LoRA(rank=4))


def test_packed_samples_that_a_method_must_tell_apart_are_refused(model, tmp_path):
    with pytest.raises(RecipeError, match=r"^packing, padding_free: .*cannot tell them apart"):
        trainer_of(SFTTrainer, model, tmp_path, DropLoRA(**PAIRS, p=0.5, mask="sample"), "dense", packing=True)


def test_an_adapter_that_trls_loss_goes_around_is_refused(tmp_path):
    tiny.llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"SFTTrainer computes its loss from the weight of lm_head .*output_factor=0"):
        trainer_of(SFTTrainer, tmp_path, tmp_path, LoSiA(factor=0.25, period=1, output_factor=0.5), "dense")
    with pytest.raises(RecipeError, match=r"from the weight of lm_head .* would not be trained"):
        trainer_of(SFTTrainer, tmp_path, tmp_path, LoRA(rank=4), "dense", modules_to_save=["lm_head"])


def test_a_second_training_is_refused(model, tmp_path):
    trainer = trainer_of(Trainer, model, tmp_path, LoRA(rank=4), "dense", max_steps=1)
    trainer.train()
    with pytest.raises(RuntimeError, match="make a new trainer"):
        trainer.train()


def test_a_model_that_is_loaded_already_is_taken_unless_it_was_changed(model, tmp_path):
    loaded = LlamaForCausalLM.from_pretrained(model)
    trainer = lowrank(Trainer)(
        loaded, arguments(tmp_path), method=SR, train_dataset=data(), data_collator=default_data_collator
    )
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(reference(SR)[0], rel=1e-6)
    with torch.no_grad():
        loaded.model.layers[1].mlp.up_proj.weight[3, 2] += 1
    with pytest.raises(RecipeError, match=r"model: model.layers.1.mlp.up_proj.weight is not what .* holds"):
        lowrank(Trainer)(loaded, arguments(tmp_path), method=SR)


def test_the_files_of_a_checkpoint_hold_the_adapter_of_its_step(model, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(Trainer, model, tmp_path / "long", SR, "dense", **changes).train()
    short = trainer_of(Trainer, model, tmp_path / "short", SR, "dense", **changes)
    short.add_callback(StopAfter(2))
    short.train()
    short.save_model()
    found, wanted = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (tmp_path / "long/checkpoint-2", tmp_path / "short")
    )
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    named = json.loads((tmp_path / "short/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(model)
