"""LoSiA and LoSiA-Pro (https://arxiv.org/abs/2507.04487): every sentence of its list of tests, and each fault of the
published code.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Codec, Dense
from llm_lowrank.engines.plain import Plain
from llm_lowrank.engines.weight import Weight
from llm_lowrank.methods.losia import LoSiA, Subnet, localize, top
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.pairs import Block
from tests import ranks
from tests.ranks import caught
from tests.tiny import CODECS, Trainee, batch, llama

M, N = 9, 12
TARGETS = ["k_proj", "up_proj", "down_proj"]
METHOD = LoSiA(factor=0.5, output_factor=0, period=2, target_modules=TARGETS)
UNTIED = dict(tie_word_embeddings=False)


def layer(
    pro: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    live: int = 0,
    size: tuple[int, int] = (4, 5),
) -> Subnet:
    torch.manual_seed(0)
    subnet = Subnet(
        "layers.0.x",
        nn.Linear(N, M, bias=bias, dtype=dtype),
        codec=Dense(dtype),
        seed=3,
        size=size,
        live=live,
        pro=pro,
    )
    subnet.S = nn.Parameter(torch.randn(size, dtype=dtype))
    if live:  # one block is filled
        subnet.bank_S = nn.Parameter(torch.zeros(live * size[0], size[1], dtype=dtype), requires_grad=False)
        subnet.bank_S[: size[0]] = torch.randn(size, dtype=dtype)
        subnet.memory["live_rows"] = torch.tensor([[0, 2, 5, 8]])
        subnet.memory["live_columns"] = torch.tensor([[1, 2, 3, 7, 11]])
    return subnet


def whole(subnet: Subnet) -> Tensor:
    """W with S and the live blocks in it, densely."""
    w = subnet.weight.clone()
    w[subnet.memory["rows"][:, None], subnet.memory["columns"]] += subnet.S
    for at, rows, columns in subnet.places():
        w[rows[:, None], columns] += subnet.bank_S[at]
    return w


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(*shape, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
    )


def trainee(method: LoSiA = METHOD, engine: str = "plain", dtype: str = "fp32", **settings) -> Trainee:
    return Trainee(method, engine, dtype, total=20, **settings)


def advance(t: Trainee, steps: range) -> list[float]:
    """Steps with the method's own schedule."""
    losses, moves = [], t.method.schedule(t.total, t.adapters)
    for step in steps:
        losses.append(t.step(step))
        if step + 1 in moves:
            t.method.exchange(t.adapters, t.engine, step + 1, t.total)
    return losses


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [0, 2])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pro", [False, True])
def test_value_and_gradients_equal_dense_autograd_with_bias_and_2d_and_3d_inputs(pro, bias, shape, live):
    subnet, x = layer(pro, bias, live=live), inputs(*shape)
    wanted = nn.functional.linear(x, whole(subnet), subnet.bias)
    torch.testing.assert_close(subnet(x), wanted, rtol=1e-12, atol=1e-12)
    g = torch.randn(wanted.shape, dtype=torch.float64)
    gradients = (torch.autograd.grad(y, (x, subnet.S), g) for y in (subnet(x), wanted))
    for found, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)


def test_rows_alone_of_an_output_layer():
    subnet, x = layer(size=(4, N)), inputs(2, 3)
    assert torch.equal(subnet.memory["columns"], torch.arange(N))
    g = torch.randn(2, 3, M, dtype=torch.float64)
    gradients = (
        torch.autograd.grad(y, (x, subnet.S), g)
        for y in (subnet(x), nn.functional.linear(x, whole(subnet), subnet.bias))
    )
    for found, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pro", [False, True])
def test_under_checkpointing(pro, reentrant):
    subnet, x = layer(pro), inputs(2, 3)
    subnet.record = subnet.record_gradient
    y = checkpoint(subnet, x, use_reentrant=reentrant)
    y.square().sum().backward()
    other, z = layer(pro), inputs(2, 3)
    other.record = other.record_gradient
    other(z).square().sum().backward()
    assert torch.equal(subnet.S.grad, other.S.grad) and torch.equal(x.grad, z.grad)
    assert torch.equal(subnet.dense, other.dense), "recorded once, though the forward ran twice"


def test_under_autocast_and_in_bf16():
    subnet, x = layer(dtype=torch.float32, live=2), inputs(2, 3, dtype=torch.float32)
    exact = nn.functional.linear(x, whole(subnet), subnet.bias)
    wanted = torch.autograd.grad(exact.sum(), (x, subnet.S))
    with torch.autocast("cpu", torch.bfloat16):
        y = subnet(x)
    assert y.dtype == torch.bfloat16 and (y - exact).norm() < 0.02 * exact.norm()
    found = torch.autograd.grad(y.float().sum(), (x, subnet.S))
    subnet.codec, subnet.weight.data, subnet.bias.data = (
        Dense(torch.bfloat16),
        subnet.weight.bfloat16(),
        subnet.bias.bfloat16(),
    )
    half = inputs(2, 3, dtype=torch.bfloat16)
    z = subnet(half)
    assert z.dtype == torch.bfloat16
    for a, b, true in zip(found, torch.autograd.grad(z.float().sum(), (half, subnet.S)), wanted, strict=True):
        assert (a - true).norm() < 0.02 * true.norm() and (b - true).norm() < 0.02 * true.norm()
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize("pro", [False, True])
def test_the_dense_gradient_is_recorded_in_a_slot_only_and_summed_over_micro_batches(pro):
    subnet = layer(pro)
    subnet(inputs(5)).sum().backward()
    assert subnet.dense is None
    subnet.record = subnet.record_gradient
    wanted = 0
    for shape in ((5,), (2, 3)):
        x = inputs(*shape)
        w = whole(subnet).detach().requires_grad_()
        wanted = wanted + torch.autograd.grad(nn.functional.linear(x, w, subnet.bias).square().sum(), w)[0]
        subnet(x).square().sum().backward()
    torch.testing.assert_close(subnet.dense, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)
    subnet.eval()(inputs(3)).sum().backward()
    torch.testing.assert_close(subnet.dense, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)


def test_pro_keeps_the_chosen_columns_of_x_and_no_gradient_of_the_size_of_w():
    subnet, x = layer(), inputs(7)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        subnet(x)
    passed = {t.data_ptr() for t in (subnet.S, subnet.weight, subnet.bias, *subnet.memory.values())}
    own = [t for t in kept if t.data_ptr() not in passed]
    assert [tuple(t.shape) for t in own] == [(7, 5)]
    subnet(x).sum().backward()
    assert subnet.weight.grad is None and subnet.S.grad.shape == (4, 5)


# --- choosing ---------------------------------------------------------------------------------------------------------


def three_choices(q: np.ndarray, p: int, c: int) -> list[float]:
    """What the three greedy strategies reach, written out."""

    def best(scores: np.ndarray, k: int) -> np.ndarray:
        return np.argsort(-scores, kind="stable")[:k]

    rows, columns = best(q.sum(1), p), best(q.sum(0), c)
    columns_of_rows, rows_of_columns = best(q[rows].sum(0), c), best(q[:, columns].sum(1), p)
    return [
        float(q[np.ix_(*pair)].sum()) for pair in ((rows, columns), (rows, columns_of_rows), (rows_of_columns, columns))
    ]


def everything(w: Tensor) -> Weight:
    return Weight.everything(tuple(w.shape), Dense(w.dtype), {"weight": w}, torch.device("cpu"))


def test_the_chosen_sum_is_the_largest_of_three_greedy_choices():
    winners = set()
    for seed in range(60):
        q = torch.rand(8, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(4)
        rows, columns = localize(q, everything(q), (2, 3))
        sums = three_choices(q.numpy(), 2, 3)
        assert float(q[rows[:, None], columns].sum()) == pytest.approx(max(sums), rel=1e-12)
        assert len(set(rows.tolist())) == 2 and len(set(columns.tolist())) == 3
        assert rows.tolist() == sorted(rows.tolist()) and columns.tolist() == sorted(columns.tolist())
        winners.add(sums.index(max(sums)))
    assert winners == {1, 2} or winners == {0, 1, 2}, "rows first and columns first both win somewhere"


def test_of_equal_scores_the_first_is_taken():
    assert top(torch.tensor([1.0, 3.0, 3.0, 3.0, 0.0]), 2).tolist() == [1, 2]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_between_two_moves_everything_outside_of_the_subnet_is_bitwise_the_same_and_inside_it_moves():
    t = trainee()
    advance(t, range(2))  # the first layer has moved
    before, places = t.probe()[1], {a.name: (a.memory["rows"], a.memory["columns"]) for a in t.adapters}
    stored = {a.name: t.engine.weight(a).read().clone() for a in t.adapters}
    t.step(2), t.step(3)
    for name, after in t.probe()[1].items():
        rows, columns = places[name]
        inside = torch.zeros(after.shape, dtype=torch.bool)
        inside[rows[:, None], columns] = True
        assert torch.equal(after[~inside], before[name][~inside])
        assert (after[inside] != before[name][inside]).float().mean() > 0.9
    assert all(torch.equal(t.engine.weight(a).read(), stored[a.name]) for a in t.adapters), (
        "S is beside W until the layer moves"
    )


def test_layers_move_at_id_plus_1_t_plus_j_n_t_and_a_move_changes_no_weight():
    t, moved = trainee(num_hidden_layers=3), {}
    for step in range(15):
        t.step(step)
        holding = {a.group for a in t.adapters if "mean" in a.memory}
        assert holding == {METHOD.owner(step, 3)}, "one layer records at a time"
        if step + 1 in METHOD.schedule(20, t.adapters):
            before, places = t.probe(), {a.name: a.memory["rows"] for a in t.adapters}
            t.method.exchange(t.adapters, t.engine, step + 1, t.total)
            after = t.probe()
            assert (after[0] - before[0]).abs().max() < 1e-5
            for a in t.adapters:
                assert (after[1][a.name] - before[1][a.name]).norm() <= 1e-6 * before[1][a.name].norm()
                if not torch.equal(places[a.name], a.memory["rows"]):
                    moved.setdefault(a.group, set()).add(step + 1)
                m, n = a.shape
                for key, size, total in (("rows", m // 2, m), ("columns", n // 2, n)):
                    at = a.memory[key]
                    assert len(at) == size and at.unique().numel() == size and 0 <= at.min() and at.max() < total
    assert moved == {
        group: {(group + 1) * 2 + j * 6 for j in range(3) if (group + 1) * 2 + j * 6 <= 14} for group in range(3)
    }


def importances(engine: str, kind: str, accumulation: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Whole mean and spread of the owner's modules after one step."""
    t = trainee(replace(METHOD, importance=kind), engine, accumulation=accumulation)
    t.forward_backward(0)
    t.method.observe(t.adapters, t.engine)
    found = {}
    for a in t.adapters:
        if a.group == 0:
            part = t.engine.part(a)
            for key in ("mean", "spread"):
                block = torch.zeros(a.shape)
                block[part.rows] = a.memory[key]
                found[a.name, key] = part.sum(block)
    return found


@pytest.mark.parametrize(
    "engine, world, accumulation, kind",
    [
        ("plain", 1, 3, "mix"),
        ("plain", 2, 1, "first"),
        ("zero2", 2, 3, "second"),
        ("zero3", 3, 2, "mix"),
        ("fsdp", 2, 1, "mix"),
    ],
)
def test_importance_is_that_of_the_exact_dense_gradient_of_the_global_batch(engine, world, accumulation, kind):
    model = llama()
    model.requires_grad_(True)
    tokens = batch(0)
    logits = model(input_ids=tokens).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    told = ranks.run(world, importances, engine, kind, accumulation)[0]
    assert len(told) == 2 * len(TARGETS)
    for (name, key), found in told.items():
        w = model.get_submodule(name).weight
        wg = (w * w.grad).detach()
        now = {"mix": (wg - wg**2 / 2).abs(), "first": wg.abs(), "second": wg**2}[kind]
        wanted = 0.15 * now if key == "mean" else 0.15 * (now - 0.15 * now).abs()
        assert (found - wanted).norm() <= 1e-4 * wanted.norm(), (name, key)


def test_pro_and_dense_trajectories_are_equal_from_the_first_step():
    runs = [trainee(replace(METHOD, pro=pro)) for pro in (True, False)]
    losses = [advance(t, range(6)) for t in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(*(t.adapters for t in runs), strict=True):
        assert torch.equal(a.memory["rows"], b.memory["rows"]) and torch.equal(a.memory["columns"], b.memory["columns"])
        assert (a.S - b.S).norm() <= 1e-3 * b.S.norm()


def test_the_whole_weight_without_moves_is_adamw_on_those_matrices():
    method = LoSiA(factor=1.0, output_factor=1.0, period=100, target_modules=TARGETS)
    t = trainee(method, **UNTIED)
    model = llama(**UNTIED).requires_grad_(False)
    trained = [
        p.requires_grad_()
        for n, p in model.named_parameters()
        if any(target in n for target in TARGETS) or n == "lm_head.weight"
    ]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(5):
        loss = t.step(step)
        tokens = batch(step)
        wanted = nn.functional.cross_entropy(
            model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
        wanted.backward()
        optimizer.step(), optimizer.zero_grad()
    for name, found in t.probe()[1].items():
        assert (found - model.get_submodule(name).weight).norm() <= 1e-3 * found.norm()


def test_the_rate_of_every_group_is_its_closed_form():
    t = trainee(replace(METHOD, period=4, rewarm_steps=3), num_hidden_layers=2)
    curve = [0.1 * (1 - step / 20) for step in range(20)]
    found = np.array([t.method.rates(t.adapters, step, 20, lambda s: curve[s]) for step in range(20)])
    wanted = np.array([curve, curve]).T
    for group, moves in ((0, (4, 12)), (1, (8, 16))):
        for t0 in moves:
            wanted[t0 : t0 + 3, group] *= [1 / 3, 2 / 3, 1]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    whole_slot = replace(METHOD, period=4).rates(t.adapters, 5, 20, lambda s: 1.0)
    assert whole_slot == [0.5, 1.0] and replace(METHOD, period=4, rewarm_steps=0).rates(
        t.adapters, 5, 20, lambda s: 1.0
    ) == [1.0, 1.0]


class Constant(nn.Module):
    """A model whose gradient is 1 for every entry, always: the sum of W's entries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8, bias=False)])

    def forward(self) -> Tensor:
        return self.layers[0](torch.ones(1, 8)).sum()


@pytest.mark.parametrize("moments, bound", [("seeded", 1.01), ("zeroed", 7.0)])
def test_with_a_constant_gradient_no_update_after_a_move_is_larger_than_the_rate(moments, bound):
    method = LoSiA(factor=0.5, output_factor=0, period=400, rewarm_steps=0, moments=moments, target_modules=["0"])
    torch.manual_seed(0)
    model, engine = Constant(), Plain()
    adapters = attach(model, method, Dense(), 0)
    engine._optimize(model, engine_settings())
    engine.ddp = None
    method.start(adapters, engine)
    adapters[0].started()
    largest = 0.0
    for step in range(450):
        method.batch(adapters, step, [0])
        engine.backward(model())
        method.observe(adapters, engine)
        before = adapters[0].S.detach().clone()
        engine.step(1e-3)
        if step >= 400:
            largest = max(largest, float((adapters[0].S.detach() - before).abs().max()) / 1e-3)
        if step + 1 == 400:
            method.exchange(adapters, engine, 400, 450)
            assert not adapters[0].S.any()
    assert 0.9 < largest <= bound and (moments == "seeded" or largest > 3), "zeroed moments show what the rule is for"


def engine_settings():
    from llm_lowrank.engines.base import Optimization

    return Optimization(1e-3)


def moments_after_a_move(engine: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    t = trainee(engine=engine)
    t.step(0), t.step(1)
    before = {a.name: t.engine.slot(a.S) for a in t.adapters}
    t.method.exchange(t.adapters, t.engine, 2, t.total)
    found = []
    for a in t.adapters:
        slot = t.engine.slot(a.S)
        if a.group:
            assert torch.equal(slot.value, before[a.name].value)
            assert all(torch.equal(v, before[a.name].moments[k]) for k, v in slot.moments.items())
        else:
            found.append(
                (
                    slot.value,
                    slot.moments["exp_avg"],
                    slot.moments["exp_avg_sq"] / before[a.name].moments["exp_avg_sq"].mean(),
                )
            )
    return found


@pytest.mark.parametrize("engine, world", [("plain", 1), ("zero1", 2), ("zero2", 3), ("zero3", 2), ("fsdp", 2)])
def test_a_move_starts_the_moments_anew_and_leaves_those_of_other_layers(engine, world):
    for value, mean, square in ranks.run(world, moments_after_a_move, engine)[0]:
        assert not value.any() and not mean.any()
        torch.testing.assert_close(square, torch.ones_like(square))


def lived(
    engine: str, accumulation: int, max_grad_norm: float
) -> tuple[list[float], dict[str, Tensor], dict[str, Tensor]]:
    t = trainee(engine=engine, accumulation=accumulation, max_grad_norm=max_grad_norm)
    losses = advance(t, range(6))
    return losses, t.probe()[1], {f"{a.name}.{k}": a.memory[k] for a in t.adapters for k in ("rows", "columns")}


@pytest.mark.parametrize(
    "engine, world, accumulation, max_grad_norm",
    [("plain", 1, 3, 0.05), ("plain", 2, 1, 0.0), ("zero1", 2, 1, 0.05), ("zero3", 2, 3, 0.05), ("fsdp", 3, 2, 0.05)],
)
def test_accumulation_ranks_and_clipping_give_what_one_process_gives(engine, world, accumulation, max_grad_norm):
    losses, maps, places = ranks.run(1, lived, "plain", 1, max_grad_norm)[0]
    told = ranks.run(world, lived, engine, accumulation, max_grad_norm)
    for found, others, at in told:
        assert found == pytest.approx(losses, rel=1e-5)
        assert all(torch.equal(where, places[key]) for key, where in at.items()), (
            "every rank is at the same rows and columns"
        )
        assert all((others[name] - wanted).norm() <= 1e-4 * wanted.norm() for name, wanted in maps.items())


def test_clipping_changes_something():
    assert ranks.run(1, lived, "plain", 1, 0.0)[0][0] != pytest.approx(
        ranks.run(1, lived, "plain", 1, 0.05)[0][0], rel=1e-6
    )


# --- the output layer, others, limits ---------------------------------------------------------------------------------


def test_of_the_output_layer_rows_move_and_the_others_stay():
    t = trainee(LoSiA(factor=0.5, output_factor=0.25, period=2, target_modules=TARGETS), **UNTIED)
    output = next(a for a in t.adapters if a.name == "lm_head")
    assert output.size == (67 // 4, 42) and output.group == 0 and {a.group for a in t.adapters} == {0, 1, 2}
    before = t.probe()[1]["lm_head"]
    t.step(0), t.step(1)
    after = t.probe()[1]["lm_head"]
    inside = torch.zeros(67, dtype=torch.bool)
    inside[output.memory["rows"]] = True
    assert torch.equal(after[~inside], before[~inside]) and (after[inside] != before[inside]).any(1).all()
    t.method.exchange(t.adapters, t.engine, 2, t.total)
    assert t.engine.weight(output).read().shape == (67, 42) and len(output.ledger) == 1


def test_over_a_coded_backbone_the_output_layer_is_dense():
    t = trainee(LoSiA(factor=0.5, output_factor=0.25, period=2, target_modules=TARGETS), dtype="nf4", **UNTIED)
    kinds = {a.name: (a.codec, a.live) for a in t.adapters}
    assert kinds.pop("lm_head") == (Dense(torch.float32), 0) and all(
        kind == (CODECS["nf4"], 4) for kind in kinds.values()
    )
    assert advance(t, range(6))[-1] < 5


def test_a_tied_output_layer_is_refused():
    with pytest.raises(ValueError, match=r"lm_head shares its weight with the embeddings.*set method.output_factor: 0"):
        attach(llama(), LoSiA(factor=0.5), Dense())


def test_an_output_layer_that_is_named_and_not_trained_is_refused():
    with pytest.raises(
        ValueError, match=r"names lm_head, the output layer, of which method.output_factor: 0 trains nothing"
    ):
        attach(llama(**UNTIED), LoSiA(factor=0.5, output_factor=0, target_modules=["k_proj", "lm_head"]), Dense())
    with pytest.raises(
        ValueError, match=r"lm_head: method.output_factor 0.001 of its 67 x 42 weight is less than one row"
    ):
        attach(llama(**UNTIED), LoSiA(factor=0.5, output_factor=0.001), Dense())


def test_the_number_of_trained_parameters_and_what_else_stays():
    t = trainee(LoSiA(factor=0.3, output_factor=0.25, period=2), **UNTIED)
    others = {n: p.detach().clone() for n, p in t.model.named_parameters() if "norm" in n or "embed" in n}
    trained = sum(p.numel() for p in t.model.parameters() if p.requires_grad)
    assert (
        trained
        == sum(int(0.3 * a.shape[0]) * int(0.3 * a.shape[1]) for a in t.adapters if a.name != "lm_head")
        + int(0.25 * 67) * 42
    )
    advance(t, range(4))
    assert others and all(torch.equal(dict(t.model.named_parameters())[n], p) for n, p in others.items())


def test_llama_2_7b_has_the_papers_count():
    d, f, layers, vocabulary = 4096, 11008, 32, 32000
    shapes = 4 * [(d, d)] + 2 * [(f, d)] + [(d, f)]
    method = LoSiA()
    with torch.device("meta"):
        sizes = [
            method.build(f"layers.0.{i}", nn.Linear(n, m, bias=False), Dense(), 0).size
            for i, (m, n) in enumerate(shapes)
        ]
        output = method.build("lm_head", nn.Linear(d, vocabulary, bias=False), Dense(), 0).size
    assert layers * sum(p * q for p, q in sizes) == 101_187_584 and output[0] * output[1] == 16_384_000


def test_a_bank_that_would_overflow_is_refused_before_the_run():
    t = trainee(replace(METHOD, into="bank", max_live_blocks=2))
    # 5 moves of the first layer: 2, 6, 10, 14, 18
    assert METHOD.schedule(20, trainee().adapters) == tuple(range(2, 20, 2))
    with pytest.raises(
        ValueError, match=r"moves 5 times in 20 steps.*room for 2.*period to 4 or more, or method.max_live_blocks to 5"
    ):
        t.method.schedule(20, t.adapters)
    assert replace(t.method, period=4).schedule(20, t.adapters) == (4, 8, 12, 16)
    for steps in (37, 100, 101, 105):  # what the refusal names is the least that is taken
        with pytest.raises(ValueError) as refused:
            t.method.schedule(steps, t.adapters)
        period = int(str(refused.value).partition("method.period to ")[2].partition(" ")[0])
        assert replace(t.method, period=period).schedule(steps, t.adapters)
        with pytest.raises(ValueError, match=r"raise method.period"):
            replace(t.method, period=period - 1).schedule(steps, t.adapters)


@pytest.mark.parametrize("codec", [CODECS["nf4"], CODECS["int8"]], ids=["nf4", "int8"])
def test_into_a_coded_weight_is_refused(codec: Codec):
    with pytest.raises(ValueError, match=r"into: weight cannot be used with codec: .*set method.into: bank"):
        LoSiA(into="weight").build("layers.0.x", nn.Linear(64, 64), codec, 0)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(factor=0.0), "method.factor must be above 0"),
        (dict(factor=1.5), "method.factor"),
        (dict(output_factor=-1), "output_factor"),
        (dict(period=0), "method.period must be at least 1"),
        (dict(beta1=1.0), r"method.beta1 must be in \[0, 1\)"),
        (dict(rewarm_steps=-2), "method.rewarm_steps"),
        (dict(max_live_blocks=0), "method.max_live_blocks"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoSiA(**settings)


def test_a_subnet_without_a_row_is_refused():
    with pytest.raises(
        ValueError, match=r"layers.0.x: method.factor 0.01 of its 12 x 64 weight is less than one row or column"
    ):
        LoSiA(factor=0.01).build("layers.0.x", nn.Linear(64, 12), Dense(), 0)


def test_an_importance_that_is_not_finite_ends_the_run():
    t = trainee()
    t.step(0), t.step(1)
    t.adapters[0].memory["mean"][0, 0] = torch.nan
    assert "importance is not finite" in caught(
        lambda: t.method.exchange(t.adapters, t.engine, 2, t.total), RuntimeError
    )


def test_what_rounding_took_of_a_bf16_block_is_told():
    t = trainee(dtype="bf16")
    t.step(0), t.step(1)
    event = t.method.exchange(t.adapters, t.engine, 2, t.total)
    assert event.into == "weight" and 1e-4 < event.lost < 0.5
    t = trainee(replace(METHOD, into="bank", period=3), dtype="bf16")
    advance(t, range(2)), t.step(2)
    event = t.method.exchange(t.adapters, t.engine, 3, t.total)
    assert event.into == "bank" and event.lost == 0


def test_a_block_and_its_pairs_are_the_same_change():
    for p, q in ((2, 3), (3, 2), (3, 3)):
        block = Block(torch.tensor([1, 4, 6])[:p], torch.tensor([0, 2, 3])[:q], torch.randn(p, q), (7, 5))
        assert torch.allclose(block.pairs().product(), block.product()) and len(block.pairs()) == min(p, q)
        assert int(block.product().count_nonzero()) == p * q


def test_an_export_that_was_cut_down_says_so_and_the_merge_has_all(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    source = Source.open(str(tmp_path / "base"))
    runs = {rank: trainee(replace(METHOD, export_rank=rank)) for rank in (4, 40)}
    for rank, t in runs.items():
        advance(t, range(6))
        saved = save_adapter(
            t.engine,
            t.adapters,
            method=t.method,
            path=tmp_path / f"adapter-{rank}",
            base_model_name_or_path=str(tmp_path / "base"),
        )
        assert saved is not None and ("CUT DOWN" in str(saved)) == (rank == 4) and (saved.error > 0.05) == (rank == 4)
        merge(source, tmp_path / f"adapter-{rank}", tmp_path / f"merged-{rank}")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{rank}")
        with torch.no_grad():
            through_peft = peft.PeftModel.from_pretrained(base, tmp_path / f"adapter-{rank}")(
                input_ids=batch(99)
            ).logits
            assert (merged(input_ids=batch(99)).logits - t.logits()).abs().max() < 1e-4, (
                "the merged model has all of it"
            )
        far = float((through_peft - t.logits()).abs().max())
        assert far > 1e-2 if rank == 4 else far < 1e-4
        if rank == 4:
            weights = tmp_path / "adapter-4/adapter_model.safetensors"
            whole = weights.read_bytes()
            save_file({k: v * 2 for k, v in load_file(weights).items()}, weights)  # as PEFT would, over ours
            with pytest.raises(
                ValueError, match=r"untruncated.safetensors belongs to another adapter_model.safetensors"
            ):
                merge(source, tmp_path / "adapter-4", tmp_path / "stale")
            weights.write_bytes(whole)
        if rank == 4:  # the best of its rank: what an independent SVD drops
            change = {a.name: t.probe()[1][a.name] - llama().get_submodule(a.name).weight.double() for a in t.adapters}
            sigma = [torch.linalg.svdvals(c) for c in change.values()]
            assert saved.error == pytest.approx(max(float(s[4:].norm() / s.norm()) for s in sigma), rel=1e-3)
