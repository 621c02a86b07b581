"""ResLoRA's block shortcut (https://arxiv.org/abs/2402.18039) against its equation, with dense weights and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.reslora import BlockLayer, ResLoRA
from tests import ranks
from tests.tiny import Trainee, batch, llama, trains_as_peft

L, R = 4, 3
MODULES = ["k_proj", "down_proj"]  # 14 x 42 and 42 x 43, L times each


def method(previous: int, **settings: object) -> ResLoRA:
    return ResLoRA(rank=R, alpha=6, target_modules=MODULES, previous=previous, **settings)  # s = 2


def attached(settings: ResLoRA, **changes: object) -> list[BlockLayer]:
    return attach(llama(**{"num_hidden_layers": L, **changes}), settings, Dense(torch.float32))


def number(layer: BlockLayer) -> int:
    """Of its decoder layer."""
    return int(layer.name.split(".")[2])


class Sum(nn.Module):
    """W + 2 (the sum of B A over blocks), as a parametrization of a plain linear. Layers share the parameters."""

    def __init__(self, blocks: list[nn.ParameterList]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, W: Tensor) -> Tensor:
        return W + 2 * sum(b @ a for a, b in self.blocks)


@pytest.mark.parametrize("previous", [1, 2, -1])
def test_it_trains_as_dense_sums_over_the_layers_before(previous):
    t, theirs = Trainee(method(previous), "plain", num_hidden_layers=L), llama(num_hidden_layers=L)
    theirs.requires_grad_(False)
    for name in MODULES:
        blocks = []
        for adapter in (a for a in t.adapters if a.name.endswith(name)):
            own = adapter.blocks[0]
            blocks.append(nn.ParameterList([own.A.detach().clone(), own.B.detach().clone()]))
            used = blocks[-previous - 1 :] if previous >= 0 else blocks
            assert len(adapter.change(lambda p: p.detach())) == R * len(used)
            parametrize.register_parametrization(theirs.get_submodule(adapter.name), "weight", Sum(used))
    trains_as_peft(t, theirs, 3, 1e-2)
    for adapter in t.adapters:
        change = theirs.get_submodule(adapter.name).weight - t.original[f"{adapter.name}.weight"]
        torch.testing.assert_close(adapter.change(lambda p: p.detach()).product(), change, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(theirs(input_ids=batch(99)).logits, t.logits(), rtol=0, atol=1e-4)


def test_without_layers_before_it_is_lora_bitwise():
    ours = Trainee(method(0, b_rate=4.0), "plain", num_hidden_layers=L)
    lora = Trainee(LoRA(rank=R, alpha=6, b_rate=4.0, target_modules=MODULES), "plain", num_hidden_layers=L)
    for step in range(3):
        assert ours.step(step) == lora.step(step)
    for a, b in zip(ours.adapters, lora.adapters, strict=True):
        (block,) = a.blocks
        assert torch.equal(block.A, b.A) and torch.equal(block.B, b.B) and b.B.any()


def test_a_layer_borrows_the_blocks_that_it_uses_and_no_other():
    adapters = attached(method(1, exclude_modules=["layers.1.mlp.down_proj"]))
    by_name = {a.name: a for a in adapters}
    used = {a.name: [(by_name[b.name].shape, number(by_name[b.name])) for b in a.blocks] for a in adapters}
    for a in adapters:
        i = number(a)
        before = [] if i == 0 else [0 if i == 2 and a.name.endswith("down_proj") else i - 1]  # over the one left out
        assert used[a.name] == [(a.shape, i), *((a.shape, j) for j in before)]
        assert not any(p.requires_grad for p in a.parameters(recurse=False))
    trained = sum(p.numel() for a in adapters for p in a.blocks[0].parameters())
    assert trained == R * (4 * (14 + 42) + 3 * (42 + 43))  # LoRA's


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_equation_and_its_gradients(dropout):
    for layer in attached(method(2, dropout=dropout)):
        for block in layer.blocks:
            block.A.data.normal_(), block.B.data.normal_()
        x, g = torch.randn(5, layer.shape[1], requires_grad=True), torch.randn(5, layer.shape[0])
        torch.manual_seed(1)
        read = nn.functional.dropout(x, dropout)
        wanted = x @ layer.weight.T + 2 * sum(read @ block.A.T @ block.B.T for block in layer.blocks)
        torch.manual_seed(1)
        found = layer.train()(x)
        inputs = [x, *(p for block in layer.blocks for p in (block.A, block.B))]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        mine, theirs = (torch.autograd.grad(y, inputs, g) for y in (found, wanted))
        for ours, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def trained(engine: str, reentrant: bool) -> tuple[list[float], dict[str, Tensor]]:
    t = Trainee(method(1), engine, num_hidden_layers=3)
    if reentrant:
        t.model.gradient_checkpointing_enable({"use_reentrant": True})
        t.model.enable_input_require_grads()
    losses = [t.step(step) for step in range(3)]
    return losses, t.values()


CELLS = [
    (*way, reentrant) for way in (("zero2", 2), ("zero3", 3), ("fsdp", 2), ("plain", 2)) for reentrant in (True, False)
]


@pytest.mark.parametrize(
    "engine, world, reentrant", [CELLS[0], *(pytest.param(*cell, marks=pytest.mark.wide) for cell in CELLS[1:])]
)
def test_blocks_of_several_layers_train_as_on_one_process(engine, world, reentrant):
    """Reentrant checkpointing goes backward through each layer on its own."""
    wanted_losses, wanted = trained("plain", False)
    for losses, values in ranks.run(world, trained, engine, reentrant):
        assert losses == pytest.approx(wanted_losses, rel=2e-6)
        for name, value in wanted.items():
            torch.testing.assert_close(values[name], value, rtol=1e-3, atol=1e-5)


def test_settings_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"method\.previous must be -1 \(all layers before\) or at least 0, not -2"):
        ResLoRA(previous=-2)
    patterns = dict(alpha_pattern={"layers.1.mlp.down_proj": 3})
    with pytest.raises(ValueError, match=r"0.mlp.down_proj has the scale 2 and .*1.mlp.down_proj the scale 1, but"):
        attached(method(1, **patterns))
    attached(method(0, **patterns))
    ranked = attached(ResLoRA(rank=R, rank_pattern={"layers.1.mlp.down_proj": 2}, target_modules=MODULES))
    assert {len(a.change(lambda p: p.detach())) for a in ranked if a.name.endswith("down_proj")} == {3, 5, 6}
