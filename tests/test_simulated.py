"""On a simulated accelerator: no operation mixes devices, and a step waits for the device as rarely as promised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec, Dense, Int8, Nf4, nf4
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.droplora import DropLoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models import checkpoint, export
from tests import simulated, tiny

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
    "droplora-token": DropLoRA(rank=4, mask="token"),
    "droplora-sample": DropLoRA(rank=4, mask="sample"),
    "droplora-step": DropLoRA(rank=4, mask="step"),
    "losia": LoSiA(period=2, output_factor=0),
    "losia-dense": LoSiA(period=2, output_factor=0, pro=False),
    "losia-bank": LoSiA(period=2, output_factor=0, into="bank"),
}
CODECS: dict[str, Codec] = {
    "fp32": Dense(torch.float32),
    "bf16": Dense(torch.bfloat16),
    "nf4": Nf4(torch.bfloat16),
    "nf4-double": Nf4(torch.bfloat16, double_quant=True),
    "int8": Int8(torch.bfloat16),
}


def test_values_of_two_devices_do_not_meet():
    with simulated.accelerator() as device:
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
        with simulated.accelerator() as device:
            trainee = tiny.Trainee(method, "plain", dtype, codec=CODECS[codec], total=12)
            exchanges = method.schedule(12, trainee.adapters)
            for step in range(5):
                with device.counting() as counts:
                    trainee.step(step)
                if step + 1 in exchanges:
                    method.exchange(trainee.adapters, trainee.engine, step + 1)
            saved = checkpoint.save(
                trainee.engine,
                trainee.model,
                adapters=trainee.adapters,
                output=folder,
                step=5,
                skipped=0,
                recipe={},
                base="model",
                data={},
                keep=1,
            ).finish()
            resumed = tiny.Trainee(
                method,
                "plain",
                dtype,
                codec=CODECS[codec],
                total=12,
                resume_from=checkpoint.Checkpoint.open(saved),
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
    assert sum(counts.syncs.values()) <= 4, counts.syncs
