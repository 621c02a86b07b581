"""The weights that a run over a quantized backbone trained on, made again from its checkpoint; both merges' gaps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llm_lowrank.adapters.method import Method
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models.backbone import BACKBONE, Backbone
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.foreign import Lora
from llm_lowrank.models.merging import Merging, gaps, merge
from llm_lowrank.models.source import Source
from tests import ranks
from tests.tiny import Trainee, batch, llama

MODULES = ["k_proj", "down_proj"]  # the other linears are coded too, without an adapter
METHODS: dict[str, Method] = {
    "lora": LoRA(rank=4, target_modules=MODULES),
    "srlora": SRLoRA(rank=4, target_rank=6, alpha=6, target_modules=MODULES, svd_cache=""),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("backbone") / "base"
    llama().save_pretrained(folder)
    return str(folder)


def trained(method: str, engine: str, codec: str, checkpoint: str, out: str) -> dict:
    """A few steps; the stored weights decoded, the answers, and both gaps."""
    t = Trainee(METHODS[method], engine, codec)
    for step in range(3):
        t.step(step)
        if step == 1:
            t.method.exchange(t.adapters, t.engine, 1, t.total)
    save_adapter(t.engine, t.adapters, method=t.method, path=Path(out) / "adapter", base_model_name_or_path=checkpoint)
    if t.engine.main:
        Backbone.save(Path(out) / BACKBONE, t.model)
    frozen = {name: m for name, m in t.model.named_modules() if isinstance(m, FrozenLinear)}
    stored = {name: m.decode(*(t.engine.whole(p) for p in m.named_parts().values())) for name, m in frozen.items()}
    change = {a.name: sum((e.to(dtype=torch.float64).product() for e in a.ledger), torch.zeros(())) for a in t.adapters}
    inputs = {"input_ids": batch(5), "attention_mask": torch.ones_like(batch(5))}
    before, mergings = t.logits(), [None, None]
    if t.engine.main:
        source, lora = Source.open(checkpoint), Lora.open(Path(out) / "adapter")
        mergings = [Merging(source, lora), Merging(source, lora, backbone=Backbone.open(Path(out) / BACKBONE))]
    found = dict(zip(("original", "dequantized"), gaps(t.model, t.wrapped, inputs, mergings), strict=True))
    assert torch.equal(t.logits(), before), "measuring changed the model"
    return {"stored": stored, "change": change, "logits": before, "gaps": found}


@pytest.mark.parametrize("codec", ["nf4", "int8"])
@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero3", 2), ("fsdp", 3)])
@pytest.mark.parametrize("method", METHODS)
def test_the_dequantized_merge_is_what_was_trained(method, engine, world, codec, checkpoint, tmp_path):
    told, *others = ranks.run(world, trained, method, engine, codec, checkpoint, str(tmp_path))
    backbone, source = Backbone.open(tmp_path / BACKBONE), Source.open(checkpoint)
    assert len(backbone.modules) == 14
    for name, w in told["stored"].items():  # decode(encode(W0 + C)) again, from the checkpoint
        again = backbone.base(name, source.tensor(f"{name}.weight")).double() + told["change"].get(name, 0)
        assert torch.allclose(again, w.double(), rtol=0, atol=1e-7), name
    assert "on a GPU" not in str(merge(source, tmp_path / "adapter", tmp_path / "merged", backbone=backbone))
    assert (answers(tmp_path / "merged") - told["logits"]).abs().max() < 1e-4
    measured = told["gaps"]
    assert measured["dequantized"].logits < 1e-5 and measured["dequantized"].agreement == 1.0
    assert measured["original"].logits > 100 * measured["dequantized"].logits
    merge(source, tmp_path / "adapter", tmp_path / "original")
    wanted, found = answers(tmp_path / "original", 5), measured["original"].logits
    exact = answers(tmp_path / "merged", 5)
    # the gap is the one that the files have
    assert found == pytest.approx(float((wanted - exact).norm() / exact.norm()), rel=1e-3)
    assert all(other["gaps"] == {"original": None, "dequantized": None} for other in others)
    elsewhere = merge(source, tmp_path / "adapter", tmp_path / "moved", backbone=replace(backbone, device="cuda"))
    assert "the base was quantized on a GPU and now again on the CPU" in str(elsewhere)


def answers(folder: Path, step: int = 99) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=batch(step)).logits


def test_a_run_without_a_backbone_file_is_told_why(tmp_path):
    with pytest.raises(ValueError, match="does not exist: runs with codec nf4 or int8 write it"):
        Backbone.open(tmp_path / BACKBONE)


def test_a_damaged_backbone_file_is_refused(checkpoint, tmp_path):
    ranks.run(1, trained, "lora", "plain", "nf4", checkpoint, str(tmp_path))
    file = tmp_path / BACKBONE
    assert list(load_file(file)) == ["none"]  # LoRA takes nothing out of W
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        Backbone.open(file)
    save_file({"none": torch.zeros(1)}, file)  # somebody else's
    with pytest.raises(ValueError, match="says nothing about a codec"):
        Backbone.open(file)
