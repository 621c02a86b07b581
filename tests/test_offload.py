"""CPU offload, as in ds_configs/zero3_offload.json and FSDP2's: the same losses, exchanges and values as without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llm_lowrank.methods.srlora import SRLoRA
from tests import ranks, tiny

CPU = {"device": "cpu", "pin_memory": False}
SHIPPED = json.loads((Path(__file__).parents[1] / "ds_configs/zero3_offload.json").read_text())["zero_optimization"]


def train(engine: str, into: str, zero: dict) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    t = tiny.Trainee(SRLoRA(rank=4, target_rank=8, svd_cache="", into=into), engine, zero=zero)
    losses = []
    for step in range(4):
        losses.append(t.step(step))
        if step % 2:
            t.method.exchange(t.adapters, t.engine, 1, t.total)
    return losses, t.values(), t.weights()


def test_the_shipped_file_offloads_parameters_and_optimizer():
    assert SHIPPED["stage"] == 3
    assert SHIPPED["offload_param"]["device"] == SHIPPED["offload_optimizer"]["device"] == "cpu"


@pytest.mark.parametrize("into", ["bank", "weight"])
@pytest.mark.parametrize(
    "engine, offload",
    [
        ("zero2", {"offload_optimizer": CPU}),
        ("zero3", {"offload_optimizer": CPU, "offload_param": CPU}),
        ("fsdp", {"cpu_offload": True}),
        ("fsdp", {"cpu_offload": True, "shard_size": 1}),
    ],
    ids=["zero2", "zero3", "fsdp", "fsdp-hybrid"],
)
def test_offload_changes_nothing(engine, offload, into):
    want, values, weights = ranks.run(2, train, engine, into, {})[0]
    got, values_off, weights_off = ranks.run(2, train, engine, into, offload)[0]
    assert got == pytest.approx(want, rel=1e-6)
    for expected, found in ((values, values_off), (weights, weights_off)):
        for name in expected:
            assert torch.allclose(found[name], expected[name], atol=1e-6), name
