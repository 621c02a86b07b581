"""LoRA+: B learns b_rate times faster than A, on every engine and under every method with pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import PairAdapter, PairSettings
from llm_lowrank.adapters.method import Method
from llm_lowrank.codecs import Codec
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.models import checkpoint
from llm_lowrank.numerics.functional import Product
from llm_lowrank.numerics.pairs import Pairs
from tests import ranks
from tests.tiny import Trainee, batch, llama

MODULES = ["k_proj", "up_proj"]
RATIO, RATE = 8.0, 1e-3
BLOCKS = 2  # of Block-LoRA: the sum of two equal numbers is exact
PAIRS = dict(rank=3, alpha=6, target_modules=MODULES)
ENGINES = pytest.mark.parametrize(
    "engine, world", [("plain", 1), ("plain", 2), ("zero1", 2), ("zero2", 3), ("zero3", 2), ("fsdp", 2)]
)


def first_step(method: Method, engine: str) -> dict[str, float]:
    """How far the entries of every parameter moved that moved at all: AdamW's first step is the rate itself."""
    t = Trainee(method, engine)
    before = t.values()
    t.step(0, RATE)
    after = t.values()
    return {name: float((after[name] - value).abs().max()) for name, value in before.items()}


@ENGINES
@pytest.mark.parametrize("kind", [LoRA, DoRA, RaSA], ids=lambda kind: kind.__name__)
def test_the_first_step_moves_b_by_the_ratio_times_the_rate(engine, world, kind):
    moved = ranks.run(world, first_step, kind(**PAIRS, b_rate=RATIO), engine)[0]
    assert {name.rpartition(".")[2] for name in moved} >= {"A", "B"}
    for name, distance in moved.items():
        letter = name.rpartition(".")[2]
        if letter == "B" or (letter == "magnitude" and distance):
            assert distance == pytest.approx(RATIO * RATE, rel=1e-2), name
        elif letter == "A":
            assert distance <= RATE * 1.01, name


def test_a_ratio_of_one_is_lora_bitwise():
    found = []
    for method in (LoRA(**PAIRS), LoRA(**PAIRS, b_rate=1.0)):
        t = Trainee(method, "plain", optimization={"weight_decay": 0.1})
        for step in range(3):
            t.step(step)
        found.append(t.values())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


class BlockAdapter(PairAdapter):
    """Block-LoRA (https://arxiv.org/abs/2501.16720): all blocks of rows of A are one, and each has its own B."""

    trains = "A"

    def __init__(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> None:
        super().__init__(name, linear, codec, settings)
        self.blocks = self.factor(BLOCKS, self.shape[0], self.rank)

    def initial(self, pairs: Pairs | None = None) -> dict[str, Tensor]:
        return super().initial(pairs) | {"blocks": torch.zeros(self.blocks.shape, device="cpu")}

    def products(self, x: Tensor) -> list[Product]:
        return [Product(self.A, self.blocks.sum(0))]


@dataclass(frozen=True)
class BlockLoRA(LoRA):
    def layer(self, name: str, linear: nn.Linear, codec: Codec, settings: PairSettings) -> PairAdapter:
        return BlockAdapter(name, linear, codec, settings)


def test_block_lora_is_lora_of_fewer_pairs_with_a_ratio_bitwise():
    """k blocks start equal and get equal gradients, so that they stay equal, and their sum moves k times as far."""
    # 14 x 8 and 42 x 8 elements fill vectors of 16: AdamW's kernel rounds what is left over in another way
    pairs = dict(rank=8, target_modules=["k_proj", "o_proj"])
    block, plus = (Trainee(method, "plain") for method in (BlockLoRA(**pairs), LoRA(**pairs, b_rate=float(BLOCKS))))
    for step in range(20):
        assert block.step(step, RATE) == plus.step(step, RATE)
    wanted = plus.values()
    for adapter in block.adapters:
        assert all(torch.equal(b, adapter.blocks[0]) for b in adapter.blocks) and adapter.blocks.any()
        assert torch.equal(adapter.A, wanted[f"{adapter.name}.A"])
        assert torch.equal(adapter.blocks.sum(0), wanted[f"{adapter.name}.B"])


def test_a_few_steps_are_those_of_peft():
    t = Trainee(LoRA(**PAIRS, b_rate=RATIO), "plain", optimization={"weight_decay": 0.1})
    model = peft.get_peft_model(
        llama("fp32"), peft.LoraConfig(r=3, lora_alpha=6, target_modules=MODULES, lora_dropout=0.0)
    )
    theirs = dict(model.named_parameters())

    def of(name: str) -> Tensor:
        module, _, letter = name.rpartition(".")
        return theirs[f"base_model.model.{module}.lora_{letter}.default.weight"].detach()

    with torch.no_grad():
        for name, value in t.values().items():
            of(name).copy_(value)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=0.1
    )
    model.train()
    for step in range(5):
        t.step(step, RATE)
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in t.values().items():
        assert float((value - of(name)).norm() / of(name).norm()) <= 1e-5, name


def interrupted(engine: str, folder: str) -> None:
    t = Trainee(LoRA(**PAIRS, b_rate=RATIO), engine)
    t.step(0)
    t.save(Path(folder), 1)


def resumed(engine: str, folder: str) -> dict[str, Tensor]:
    found = checkpoint.newest(Path(folder))[0]
    t = Trainee(LoRA(**PAIRS, b_rate=RATIO), engine, resume_from=found)
    t.step(1)
    return t.values()


def uninterrupted() -> dict[str, Tensor]:
    t = Trainee(LoRA(**PAIRS, b_rate=RATIO), "plain")
    for step in range(2):
        t.step(step)
    return t.values()


@pytest.mark.parametrize("first, second", [("zero2", "fsdp"), ("fsdp", "zero3"), ("zero3", "plain")])
def test_a_resume_on_another_engine_keeps_both_rates(tmp_path, first, second):
    ranks.run(2, interrupted, first, str(tmp_path))
    wanted = ranks.run(1, uninterrupted)[0]
    for values in ranks.run(2, resumed, second, str(tmp_path)):
        for name, value in wanted.items():
            assert float((values[name] - value).norm() / value.norm()) <= 1e-4, name


def test_relora_lowers_both_rates_after_an_exchange():
    method = ReLoRA(**PAIRS, interval=10, restart_warmup=4, b_rate=RATIO)
    assert method.rates([], 9, 100, lambda step: RATE) == [RATE, RATIO * RATE]
    assert method.rates([], 10, 100, lambda step: RATE) == [RATE / 4, RATIO * RATE / 4]


def test_the_log_shows_the_rate_of_the_recipe():
    method = LoRA(**PAIRS, b_rate=RATIO)
    assert method.logged_rate(method.rates([], 0, 10, lambda step: RATE)) == RATE


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(ValueError, match=r"method\.b_rate must be above 0"):
        LoRA(b_rate=ratio)
