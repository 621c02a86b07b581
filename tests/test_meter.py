"""What a user sees while a run trains: operations, memory, a profile, and the algorithms that torch may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.data import Batches, Example
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.run import deterministic, hardware, meter
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.flops import Shape, work_of
from llm_lowrank.run.messages import describe_speed
from llm_lowrank.run.meter import Meter
from llm_lowrank.run.recipe import Recipe, parse
from llm_lowrank.run.train import train
from tests import ranks, simulated, tiny
from tests.test_launch import place, records  # noqa: F401 - place is a fixture
from tests.test_runs import settings

GB = 1e9


def micro_batches(world: int = 1, rank: int = 0) -> list:
    """A step of two micro-batches a rank; the examples are of many lengths."""
    examples = [Example(list(range(n)), list(range(n))) for n in range(3, 11)]
    return Batches(examples, 8 // (2 * world), pad_id=0, accumulation=2, rank=rank, world=world).step(0)


def work():
    model = tiny.llama()
    attach(model, LoRA(rank=4), Dense(torch.float32))
    return work_of(model, recomputed=False)


def reported(whole_logits: bool = False) -> dict:
    """The record of one step of this rank's share, in which 2 s pass."""
    engine = Plain()
    seen = Meter(work(), peak=1e-3, whole_logits=whole_logits)
    for micro in micro_batches(engine.world, engine.rank):
        seen.add(torch.tensor(0.5), micro)
    seen.step(True)
    seen.began -= 2.0
    return seen.report(engine)


def test_operations_memory_and_tokens_of_a_step_are_reported():
    record, count = reported(), work()
    assert record["tokens_per_second"] == pytest.approx(52 / 2, rel=0.05)
    assert record["tokens_per_second_per_device"] == record["tokens_per_second"]
    shapes = [Shape.of(micro) for micro in micro_batches()]
    needed, computed = (sum(map(count_of, shapes)) for count_of in (count.model, count.hardware))
    assert computed > needed  # there is padding
    assert record["tflops_per_device"] == pytest.approx(needed / 2 / 1e12, rel=0.05)
    assert record["mfu"] == pytest.approx(record["tflops_per_device"] / 1e-3)
    per_needed = record["hardware_tflops_per_device"] / record["tflops_per_device"]
    assert per_needed == pytest.approx(computed / needed)
    assert reported(whole_logits=True)["hardware_tflops_per_device"] > record["hardware_tflops_per_device"]
    resident = hardware.peak_memory(torch.device("cpu"))[0] / GB
    assert 0.05 < record["memory_gb"] <= resident and record["memory_reserved_gb"] == record["memory_gb"]


def test_two_ranks_report_the_same_operations_in_all():
    one, two = reported(), ranks.run(2, reported)
    assert two[0]["tokens_per_second"] == pytest.approx(one["tokens_per_second"], rel=0.05)
    assert two[0]["tflops_per_device"] * 2 == pytest.approx(one["tflops_per_device"], rel=0.05)
    assert two[0]["mfu"] * 2 == pytest.approx(one["mfu"], rel=0.05)
    assert two[0]["memory_gb"] == two[1]["memory_gb"]  # the largest of both


def test_without_a_peak_there_is_no_mfu_and_without_a_count_no_operations():
    engine = Plain()
    seen = Meter(work())
    seen.add(torch.tensor(1.0), micro_batches()[0])
    seen.step(True)
    record = seen.report(engine)
    assert "mfu" not in record and record["tflops_per_device"] > 0
    seen = Meter()
    seen.add(torch.tensor(1.0), micro_batches()[0])
    seen.step(True)
    assert not any("flops" in name for name in seen.report(engine))


def test_a_report_waits_for_the_device_once():
    with simulated.Accelerator() as device:
        engine = Plain()
        seen = Meter(work(), peak=1.0)
        micros = micro_batches()
        with device.counting() as counts:
            for micro in micros:
                seen.add(torch.ones((), device=engine.device), micro)
            seen.step(True)
        assert not counts.syncs
        with device.counting() as counts:
            seen.report(engine)
    assert list(counts.syncs.values()) == [1], counts.syncs


def test_memory_of_cuda_is_that_of_torchs_allocator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: pytest.fail("it waited for the device"))
    assert hardware.peak_memory(torch.device("cuda", 0)) == (5, 7)


def test_peak_memory_is_that_of_this_program_alone():
    code = "import torch; from llm_lowrank.run.hardware import peak_memory; print(*peak_memory(torch.device('cpu')))"
    kept = torch.ones(2**28)  # 1 GB, which the started program does not have
    used, _ = map(int, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert used < kept.nbytes


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profiled(place, tmp_path_factory):  # noqa: F811
    """A run with a profile of steps 3 and 4, and the same one stopped behind step 3 and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"engine": "plain", "report_to": "none", "logging_steps": 2, "deterministic": True, "save_merged": False}
    return folder, lambda name, **changes: settings(place, "lora", folder / name, **common, **changes)


def test_a_run_reports_profiles_and_compares_memory(profiled, capsys):
    folder, arguments = profiled
    train(parse(arguments("whole", profile_steps="[3,4]", save_steps=3)))
    said = capsys.readouterr().out
    output = folder / "whole"
    # the log
    first, *_ = records(output, "train")
    assert {"tokens_per_second_per_device", "tflops_per_device", "hardware_tflops_per_device", "memory_gb"} <= set(
        first
    )
    assert "mfu" not in first and 0 < first["tflops_per_device"] <= first["hardware_tflops_per_device"]
    # the trace
    path = output / "profile" / "rank0-steps-3-4.json"
    trace = json.loads(path.read_text())
    names = {event["name"] for event in trace["traceEvents"] if "name" in event}
    assert f"profile of steps 3 to 4: {path}" in said and any("addmm" in name for name in names)
    table = said.partition(str(path))[2]
    assert 8 <= sum("aten::" in line or "#" in line or "Backward" in line for line in table.splitlines()) <= 14
    # the end
    (memory,) = records(output, "memory")
    assert f"memory: predicted {memory['predicted_gb']:.2f} GB a rank" in said
    assert f"measured at most {memory['measured_gb']:.2f} GB" in said
    assert 0 < memory["predicted_gb"] < memory["before_loading_gb"] <= memory["measured_gb"]


def test_a_deterministic_run_resumes_bitwise_and_switches_back(profiled, monkeypatch, capsys):
    folder, arguments = profiled
    seen = []
    step = Plain.step
    monkeypatch.setattr(
        Plain, "step", lambda *args: seen.append(torch.are_deterministic_algorithms_enabled()) or step(*args)
    )
    checkpoint = folder / "whole" / "checkpoints" / "step-000003"
    train(parse(arguments("resumed", resume_from_checkpoint=checkpoint, profile_steps="[1,2]")))
    assert seen == [True] * 3 and not torch.are_deterministic_algorithms_enabled()
    assert os.environ[deterministic.CUBLAS] == ":4096:8"
    whole, resumed = (load_file(folder / name / "adapter/adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert "profile_steps: steps 1 to 2 are done already; nothing is profiled" in capsys.readouterr().out
    assert not (folder / "resumed" / "profile").exists()


@pytest.mark.parametrize(
    "steps, message",
    [
        ("5,4", r"\[5, 4\] is not a first and a last step"),
        ("0,4", r"\[0, 4\] is not a first"),
        ("3,", r"\[3\] is not a first"),
        ("1,2,3", "is not a first and a last step"),
        ("2,7", "ends behind the run, which has 6 steps"),
        ("a,b", "profile_steps"),
    ],
)
def test_steps_to_profile_are_checked(tmp_path, steps, message):
    arguments = ["--profile_steps", steps, "--max_steps", "6", "--output_dir", str(tmp_path), "--engine", "plain"]
    with pytest.raises(RecipeError, match=message):
        validate(parse(arguments))


def test_a_profile_behind_an_epoch_is_refused_before_a_model_is_loaded(profiled):
    _, arguments = profiled
    with pytest.raises(RecipeError, match=r"profile_steps: .* ends behind the run"):
        train(parse(arguments("short", max_steps=-1, num_train_epochs=1, profile_steps="[2,9999]")))


# --- algorithms and speed ---------------------------------------------------------------------------------------------


def test_a_workspace_of_the_users_is_kept_and_one_that_comes_too_late_is_refused(monkeypatch):
    monkeypatch.setenv(deterministic.CUBLAS, ":16:8")
    with deterministic.algorithms(True):
        assert torch.are_deterministic_algorithms_enabled() and os.environ[deterministic.CUBLAS] == ":16:8"
    monkeypatch.delenv(deterministic.CUBLAS)
    with deterministic.algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled() and deterministic.CUBLAS not in os.environ
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="CUDA has started in this process without"), deterministic.algorithms(True):
        pass


def test_a_run_in_float32_on_cuda_says_what_to_set(monkeypatch):
    cuda, recipe = torch.device("cuda", 0), Recipe(dtype="float32")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peak, note = describe_speed(recipe, cuda)
    assert "67 TFLOP/s, the peak of NVIDIA H100 80GB HBM3 in float32" in peak
    assert "set dtype: bfloat16, which has 989 TFLOP/s here" in note
    assert len(describe_speed(replace(recipe, dtype="bfloat16"), cuda)) == 1
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another card")
    assert "MFU is not given: there is no peak figure for another card" in describe_speed(recipe, cuda)[0]
    assert describe_speed(recipe, torch.device("cpu")) == []
    run = SimpleNamespace(
        engine=SimpleNamespace(device=cuda), recipe=replace(recipe, dtype="bfloat16"), work=work(), loss_layer=None
    )
    assert meter.meter_of(run).peak is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert meter.meter_of(run).peak == 989 and meter.meter_of(run).whole_logits
