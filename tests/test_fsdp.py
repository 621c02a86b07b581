"""FSDP2's own hazards. What every engine owes is in test_engines.py and test_laws.py."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm_lowrank.codecs import Nf4
from llm_lowrank.engines.base import Optimization
from llm_lowrank.engines.fsdp import FSDP, Sharding, decoder_layers
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.srlora import SRLoRA
from tests import ranks
from tests.tiny import Trainee, llama

MODULES = ["k_proj", "up_proj"]  # 14 x 42 and 43 x 42
BANKED = SRLoRA(rank=4, target_rank=7, target_modules=MODULES, svd_cache="", into="bank")


# --- what is gathered is what was stored ------------------------------------------------------------------------------


def seen_in_forward() -> dict[str, tuple[torch.dtype, bool]]:
    """dtype of every parameter inside a forward, and whether its bytes are those of the shards put together."""
    t = Trainee(BANKED, "fsdp", "bf16", codec=Nf4(torch.bfloat16))
    adapter = t.adapters[0]
    stored = {name: t.engine.whole(p) for name, p in adapter.named_parameters()}
    seen: dict[str, tuple[torch.dtype, bool]] = {}

    def look(module: nn.Module, _args: object) -> None:
        for name, p in module.named_parameters():
            assert not isinstance(p, DTensor)
            same = torch.equal(p.detach().contiguous().view(torch.uint8), stored[name].contiguous().view(torch.uint8))
            seen[name] = (p.dtype, same)

    hook = adapter.register_forward_pre_hook(look)
    t.forward_backward(0)
    hook.remove()
    return seen


def test_bank_and_codes_are_gathered_bitwise_under_a_bfloat16_forward():
    for seen in ranks.run(2, seen_in_forward):
        assert all(same for _, same in seen.values()), seen
        kinds = {name: dtype for name, (dtype, _) in seen.items()}
        assert kinds == {
            "codes": torch.uint8,
            "scales": torch.uint8,
            "A": torch.float32,
            "B": torch.float32,
            "bank_A": torch.float32,
            "bank_B": torch.float32,
        }


# --- edits ------------------------------------------------------------------------------------------------------------


def writes() -> dict[str, float]:
    """Whether a write to one row of A reaches what is gathered: by index into the DTensor, and through the engine."""
    t = Trainee(LoRA(rank=4, target_modules=MODULES), "fsdp")
    a = t.adapters[0].A
    before = t.engine.whole(a)
    with torch.no_grad():
        a[1].zero_()
    by_index = t.engine.whole(a)
    with t.engine.edit(a) as (slot,):
        slot.value[1] = 0.0
    now = t.engine.whole(a)
    return {
        name: float(value[1].abs().max()) for name, value in (("was", before), ("by index", by_index), ("by edit", now))
    }


def test_writing_to_a_dtensor_by_index_is_lost_and_an_edit_is_not():
    for found in ranks.run(2, writes):
        assert found["by index"] == found["was"] > 0, "torch now writes through: edits could be simpler"
        assert found["by edit"] == 0


def after_evaluation(reshard: bool) -> bool:
    """A forward without a backward leaves nothing gathered, so that an edit after it is seen by the next."""
    t = Trainee(LoRA(rank=4, target_modules=MODULES), "fsdp", zero={"reshard_after_forward": reshard})
    before = t.logits()
    assert all(isinstance(p, DTensor) for p in t.model.parameters())
    b = t.adapters[0].B
    with t.engine.edit(b) as (slot,):
        slot.value.normal_(generator=torch.Generator().manual_seed(0))
    return not torch.equal(t.logits(), before)


@pytest.mark.parametrize("reshard", [True, False])
def test_an_edit_after_an_evaluation_is_seen(reshard):
    assert all(ranks.run(2, after_evaluation, reshard))


# --- who holds what ---------------------------------------------------------------------------------------------------


def runs(shard_size: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    t = Trainee(LoRA(rank=4, target_modules=MODULES), "fsdp", samples=12, zero={"shard_size": shard_size})
    t.step(0)
    found = {}
    for name, p in t.model.named_parameters():
        if p.requires_grad:
            local = t.engine.span(p)
            assert local.value.numel() == local.moments["exp_avg"].numel()
            found[name] = (tuple(p.shape), local.start, local.value.numel())
    return found


@pytest.mark.parametrize("world, shard_size", [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 2)])
def test_local_runs_cover_a_parameter_exactly_once(world, shard_size):
    told = ranks.run(world, runs, shard_size)
    for name, (shape, _, _) in told[0].items():
        spans = sorted((start, start + numel) for _, start, numel in (found[name] for found in told) if numel)
        assert spans[0][0] == 0 and spans[-1][1] == torch.Size(shape).numel(), name
        assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(spans)), (name, spans)


def switched(engine_name: str, sharding: dict[str, int], codec: str) -> tuple[list[float], dict[str, Tensor], int]:
    """Steps with a swap into the bank in between; what all of it came to, and the elements that this rank read."""
    t = Trainee(BANKED, engine_name, codec, samples=8, zero=sharding)
    losses = []
    for step in range(4):
        losses.append(t.step(step))
        if step == 1:
            t.method.exchange(t.adapters, t.engine, 1, t.total)
    return losses, t.values(), t.checkpoint.elements


@pytest.mark.parametrize("codec", ["fp32", "nf4"])
def test_two_replicas_of_two_shards_train_as_one_process(codec):
    """A mesh that really has two dimensions."""
    ((wanted, values, elements),) = ranks.run(1, switched, "plain", {}, codec)
    for losses, found, mine in ranks.run(4, switched, "fsdp", {"shard_size": 2}, codec):
        assert losses == pytest.approx(wanted, rel=2e-6)
        assert all(torch.allclose(found[name], value, rtol=0, atol=1e-5) for name, value in values.items())
        assert mine < 0.6 * elements  # half of the model, not a quarter


# --- shared parameters ------------------------------------------------------------------------------------------------


class Pool(nn.Module):
    """What layers share has one owner, outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(6, 6) / 4)


class Layer(nn.Module):
    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6, bias=False)
        self.owner = (pool,)  # in a tuple: not a module of this one

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x) + x @ self.owner[0].A.T)


class Stack(nn.Module):
    """Two layers that share a trainable pool, as the layers of RaSA do."""

    _no_split_modules: ClassVar = {"Layer"}

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pool = Pool()
        self.layers = nn.ModuleList(Layer(self.pool) for _ in range(2))
        for layer in self.layers:
            layer.linear.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def pooled(engine_name: str) -> tuple[list[float], Tensor, int]:
    values = Stack().state_dict()
    model = Stack().to("meta")
    engine = FSDP(Sharding()) if engine_name == "fsdp" else None
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    if engine is None:
        model = Stack()
        optimizer = torch.optim.AdamW([model.pool.A], lr=1e-2, weight_decay=0.0)
    else:
        wrapped = engine.wrap(
            model, Optimization(1e-2), lambda name, _, rows: {k: values[f"{name}.{k}"][r] for k, r in rows.items()}
        )
        x = x.view(engine.world, -1, 6)[engine.rank]
    losses = []
    for _ in range(3):
        if engine is None:
            loss = model(x).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        else:
            loss = wrapped(x).square().sum()
            engine.backward(loss)
            engine.step(1e-2)
            losses.append(float(engine.sum(loss.detach().clone())))
    if engine is None:
        return losses, model.pool.A.detach(), 1
    return losses, engine.whole(model.pool.A), len(engine.params)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_parameter_that_layers_share_is_trained_once_by_the_root(world):
    wanted, pool, _ = pooled("none")
    for losses, found, count in ranks.run(world, pooled, "fsdp"):
        assert losses == pytest.approx(wanted, rel=1e-5) and losses[-1] < losses[0]
        assert torch.allclose(found, pool, atol=1e-6) and count == 1


def registered_twice() -> str:
    model = Stack().to("meta")
    for layer in model.layers:
        layer.pool = model.pool
    try:
        FSDP(Sharding()).wrap(model, Optimization(1e-2), lambda *_: {})
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def test_a_parameter_registered_in_two_layers_is_refused():
    for message in ranks.run(2, registered_twice):
        assert "pool.A is registered in several decoder layers" in message


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"fsdp.shard_size \(3\) does not divide the 8 ranks"):
        Sharding(shard_size=3).shards(8)
    with pytest.raises(ValueError, match="at least 0"):
        Sharding(shard_size=-1)
    assert (Sharding().shards(8), Sharding(shard_size=4).shards(8)) == (8, 4)


def test_a_model_whose_decoder_layers_are_not_named_is_refused():
    with pytest.raises(ValueError, match="cannot tell the decoder layers of Linear"):
        decoder_layers(nn.Linear(2, 2))
    assert len(decoder_layers(llama())) == 2
