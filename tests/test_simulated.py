"""On a simulated accelerator: no operation mixes devices, and a step waits for the device as rarely as promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec, Dense, Int8, Nf4, nf4
from llm_lowrank.engines import Engine
from llm_lowrank.engines.fsdp import FSDP
from llm_lowrank.methods.core import Core
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.droplora import DropLoRA
from llm_lowrank.methods.flat_lora import FlatLoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.lora_ga import LoRAGA
from llm_lowrank.methods.lora_xs import LoRAXS
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.methods.reslora import ResLoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.methods.vera import VeRA
from llm_lowrank.models import checkpoint, export
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import ranks, simulated, tiny
from tests.test_launch import place, records  # noqa: F401 - place is a fixture
from tests.test_laws import LAST
from tests.test_laws import METHODS as LAWS
from tests.test_runs import settings

METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4),
    "lora-dropout": LoRA(rank=4, dropout=0.1),
    "dora": DoRA(rank=4),
    "pissa": PiSSA(rank=4, svd_cache=""),
    "srlora-weight": SRLoRA(rank=4, target_rank=8, into="weight", svd_cache=""),
    "srlora-bank": SRLoRA(rank=4, target_rank=8, into="bank", svd_cache=""),
    "relora-weight": ReLoRA(rank=4, interval=2, restart_warmup=0, into="weight"),
    "relora-bank": ReLoRA(rank=4, interval=2, restart_warmup=0, into="bank"),
    "rasa": RaSA(rank=4),
    "reslora": ResLoRA(rank=4),
    "flat_lora": FlatLoRA(rank=4),
    "lora_xs": LoRAXS(rank=4, svd_cache=""),
    "vera": VeRA(rank=4),
    "lora_ga": LoRAGA(rank=4, samples=6, svd_niter=1),
    "droplora-token": DropLoRA(rank=4, mask="token"),
    "droplora-sample": DropLoRA(rank=4, mask="sample"),
    "droplora-step": DropLoRA(rank=4, mask="step"),
    "losia": LoSiA(period=2, output_factor=0),
    "losia-dense": LoSiA(period=2, output_factor=0, pro=False),
    "losia-bank": LoSiA(period=2, output_factor=0, into="bank"),
    "core": Core(p=4, samples=0, interval=2),
    "lora-plus": LoRA(rank=4, b_rate=4.0),
    **{f"lora-{name}": LoRA(rank=4, direction=rule) for name, rule in tiny.DIRECTIONS.items()},
}
METHODS |= {name: LAWS[label] for name, label in LAST.items() if type(LAWS[label]) not in map(type, METHODS.values())}
LAYERS, MODULES = 2, 14  # of the tiny model
WAITS = 6  # for a module, of a direction: LoRA-RITE decomposes six matrices
CODECS: dict[str, Codec] = {
    "fp32": Dense(torch.float32),
    "bf16": Dense(torch.bfloat16),
    "nf4": Nf4(torch.bfloat16),
    "nf4-double": Nf4(torch.bfloat16, double_quant=True),
    "int8": Int8(torch.bfloat16),
}


def test_values_of_two_devices_do_not_meet():
    with simulated.Accelerator() as device:
        there, here = torch.ones(3, device=simulated.LAZY), torch.ones(3)
        assert there.device.type == "lazy" and (there + there * 2).sum().item() == 9
        with pytest.raises(simulated.DeviceMix, match="add"):
            there + here
        with pytest.raises(simulated.DeviceMix, match="numpy"):
            there.numpy()
        with device.counting() as counts:
            (there + torch.tensor(2.0)).tolist()  # a number may be on the host
            here.to(simulated.LAZY)
            here.to(simulated.LAZY, non_blocking=True)  # from pageable memory: the host waits all the same
            here.pin_memory().to(simulated.LAZY, non_blocking=True)
            there.cpu()
    kinds = [kind for kind, _ in counts.syncs.elements()]
    assert sorted(kinds) == ["copy to the device", "copy to the device", "copy to the host", "read"]


def live(name: str, codec: str, folder: Path) -> simulated.Counts:
    """Train, exchange, save, resume, export, all on the device; what the last step counted."""
    method, dtype = METHODS[name], "fp32" if codec == "fp32" else "bf16"
    nf4.levels.cache_clear()  # they stay on the device that asked first
    try:
        with simulated.Accelerator() as device:
            trainee = tiny.Trainee(method, "plain", dtype, codec=CODECS[codec], total=12)
            exchanges = method.schedule(12, trainee.adapters)
            for step in range(5):
                with device.counting() as counts:
                    trainee.step(step)
                if step + 1 in exchanges:
                    method.exchange(trainee.adapters, trainee.engine, step + 1, trainee.total)
            saved = trainee.save(folder, 5)
            resumed = tiny.Trainee(
                method,
                "plain",
                dtype,
                codec=CODECS[codec],
                total=12,
                resume_from=saved,
            )
            for run in (trainee, resumed):
                torch.manual_seed(0)  # of dropout
                run.step(5)
            one, two = trainee.values(), resumed.values()
            assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
            export.save_adapter(
                trainee.engine,
                trainee.adapters,
                method=method,
                path=folder / "adapter",
                base_model_name_or_path="model",
            )
    finally:
        nf4.levels.cache_clear()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    return counts


def cells() -> list:
    """Every method over every codec that it takes; CI runs all methods in bf16 and all codecs with LoRA."""
    found = []
    for name in METHODS:
        for codec in CODECS:
            if CODECS[codec].writable or not name.endswith("-weight"):
                ci = codec == "bf16" or name == "lora" or (name in ("srlora-bank", "losia-bank") and codec == "nf4")
                found.append(pytest.param(name, codec, marks=[] if ci else pytest.mark.wide, id=f"{name}-{codec}"))
    return found


@pytest.mark.parametrize("name, codec", cells())
def test_a_run_stays_on_its_device(name, codec, tmp_path):
    counts = live(name, codec, tmp_path)
    ours = [kind for kind, line in counts.syncs.elements() if not line.startswith(("elsewhere", "transformers/"))]
    if getattr(METHODS[name], "directs", False):  # eigenvalues on the host; the norm twice; a look at each layer
        waits = 0 if name == "core" else WAITS  # the step that was counted is none at which CORE's basis turns
        assert len(ours) <= waits * MODULES + LAYERS + 2, counts.syncs
    else:
        assert ours == ["read"], counts.syncs  # the norm, however many modules there are


def steps_of(device: simulated.Simulation, monkeypatch: pytest.MonkeyPatch) -> dict[str, simulated.Counts]:
    """What each phase of a run counts, by the name of the phase."""
    counts: dict[str, simulated.Counts] = {}

    def at(engine: Engine, phase: str) -> None:
        device.counts = counts.setdefault(phase, simulated.Counts())

    monkeypatch.setattr(Engine, "at", at)
    return counts


RUNS = {
    "fp32": {},
    "checkpointing": {"gradient_checkpointing": True, "dtype": "bfloat16"},
    "nf4": {"codec": "nf4", "dtype": "bfloat16"},
    "int8-on-nan-skip": {"codec": "int8", "dtype": "bfloat16", "on_nan": "skip"},
    "whole-modules": {"modules_to_save": "[embed_tokens, norm]", "dtype": "bfloat16"},
    "lion-packed": {"optim": "lion", "data.packing": True, "data.max_length": 64},
}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_a_whole_run_stays_on_the_device_and_a_step_waits_for_it_twice(place, tmp_path, monkeypatch, changes):  # noqa: F811
    nf4.levels.cache_clear()
    arguments = settings(
        place, "srlora", tmp_path / "out", engine="plain", report_to="none", save_steps=3, logging_steps=2, **changes
    )
    try:
        with simulated.Accelerator() as device:
            counts = steps_of(device, monkeypatch)
            train(parse(arguments))
    finally:
        nf4.levels.cache_clear()
    before, after = (r["loss"] for r in records(tmp_path / "out", "eval"))
    assert after < before
    steps = {name: c.syncs for name, c in counts.items() if name.startswith("step ")}
    assert len(steps) == 6
    # One for the norm, by which a step is skipped, and for on_nan: skip one to know that before; at logging_steps the
    # meter's and SRLoRA's figures. Packed rows have masks on this device, as on a CPU, and steps 3 and 6 save.
    allowed = 2 if "on_nan" in changes else 1
    if not changes.get("data.packing"):
        assert sum(steps["step 1"].values()) <= allowed and sum(steps["step 5"].values()) <= allowed, steps
        assert sum(steps["step 2"].values()) <= allowed + 3 and sum(steps["step 4"].values()) <= allowed + 3, steps


def offloaded(name: str, folder: str) -> None:
    """FSDP2 with its shards on the host: forward and backward on the CPU, everything else with an engine on a device.

    The results are those of the same run on the CPU alone.
    """
    method = METHODS[name]

    def trained(device: torch.device) -> dict[str, torch.Tensor]:
        trainee = tiny.Trainee(method, "fsdp", zero={"cpu_offload": True}, total=12)
        engine, exchanges = trainee.engine, method.schedule(12, trainee.adapters)
        engine.device = device
        method.start(trainee.adapters, engine)  # what it keeps lies where the engine computes
        for step in range(6):
            engine.device = torch.device("cpu")
            trainee.forward_backward(step)
            engine.device = device
            method.observe(trainee.adapters, engine)
            engine.step(*method.rates(trainee.adapters, step, 12, lambda step: 1e-2))
            if step + 1 in exchanges:
                method.exchange(trainee.adapters, engine, step + 1, trainee.total)
        assert exchanges
        # a checkpoint gives each statistic back where the parameter lies that it is about
        opened = trainee.save(Path(folder) / device.type, 6)
        for adapter in trainee.adapters:
            again = checkpoint._my_memory(engine, adapter, opened)
            assert again.keys() == adapter.memory.keys()
            for key, value in again.items():
                now = adapter.memory[key]
                assert key not in adapter.spans or value.device == now.device, (key, value.device, now.device)
                assert torch.equal(value, now.to(value.device)), key
        return trainee.values()

    wanted = trained(torch.device("cpu"))
    with simulated.Accelerator():
        # a simulated device has no mesh, so that DTensors cannot move there
        Engine._device = staticmethod(lambda: torch.device("cpu"))
        gather = FSDP._gather_whole
        FSDP._gather_whole = lambda engine, t: t.full_tensor().detach().clone().to(engine.device)
        try:
            found = trained(simulated.LAZY)
        finally:
            FSDP._gather_whole = gather
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found)


@pytest.mark.parametrize("name", ["srlora-bank", "relora-bank"])
def test_methods_that_read_gradients_and_edit_moments_work_over_offloaded_shards(name, tmp_path):
    ranks.run(1, offloaded, name, str(tmp_path))
