"""RaSA against its equations (https://arxiv.org/abs/2503.12576), each written again here, densely and in float64.

One statement of the paper's code has no test: that two adapters coexist on a model. Here a model carries one method.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig, GPTJConfig, LlamaConfig, PreTrainedModel, Qwen2Config

from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.engines.base import Engine
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.rasa import Pool, RaSA, RaSALayer
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from tests import ranks
from tests.tiny import CODECS, DTYPES, Trainee, batch, llama

L, R, K = 3, 4, 1
MODULES = ["k_proj", "up_proj"]  # 14 x 42 and 43 x 42, L times each
METHOD = RaSA(rank=R, alpha=6, k=K, target_modules=MODULES)
SIZES = pytest.mark.parametrize("k", [0, 1, R], ids=["k0", "k1", "kr"])


def adapted(
    method: RaSA | LoRA = METHOD, dtype: str = "fp32", fill: bool = False, **changes: object
) -> tuple[PreTrainedModel, list]:
    """A tiny LLaMA under a method, without an engine; `fill`: as if it had been trained."""
    model = llama(dtype, **{"num_hidden_layers": L, **changes})
    adapters = attach(model, method, CODECS[dtype])
    if fill:
        torch.manual_seed(1)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.5)
    return model.eval(), adapters


def change(layer: RaSALayer) -> Tensor:
    """[B_i | B_S] diag(d_i, e_i) [A_i; A_S]."""
    sides = [(layer.A, layer.B, layer.d)] if layer.rank > layer.pooled else []
    sides += [(layer.pool.A, layer.pool.B, layer.e)] if layer.pooled else []
    a, b, d = (torch.cat([side[i].detach().double() for side in sides], dim) for i, dim in ((0, 0), (1, 1), (2, 0)))
    return b @ torch.diag(d) @ a


def layer_map(layer: RaSALayer) -> Tensor:
    with torch.no_grad():
        return layer(torch.eye(layer.shape[1], dtype=torch.float64)).T


def loss_of(model: nn.Module) -> Tensor:
    return model(input_ids=batch(0)).logits.float().square().mean()


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def pool_of(model: nn.Module, name: str) -> Pool:
    return model.rasa_pools[f"{name}_pool"]


# --- 1: the start -----------------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_at_the_start_the_change_is_zero_and_the_function_is_the_frozen_models_bitwise(dtype, k):
    model, adapters = adapted(replace(METHOD, k=k), dtype)
    with torch.no_grad():
        found = model(input_ids=batch(99)).logits
        frozen, _ = adapted(LoRA(rank=R, target_modules=MODULES), dtype)
        assert torch.equal(found, frozen(input_ids=batch(99)).logits)
        if dtype in ("fp32", "bf16"):
            assert torch.equal(found, llama(dtype, num_hidden_layers=L)(input_ids=batch(99)).logits)
    assert not any(change(a).any() for a in adapters)
    for a in adapters:
        for factor in ([a.A] if k < R else []) + ([a.pool.A] if k else []):
            bound = a.shape[1] ** -0.5
            assert 0.8 * bound < factor.abs().max() <= bound and factor.std() > 0.4 * bound


# --- 2: what is left without a pool -----------------------------------------------------------------------------------


def test_without_a_pool_it_is_lora_in_forward_and_in_gradients():
    ours, layers = adapted(replace(METHOD, k=0), fill=True)
    theirs, others = adapted(LoRA(rank=R, alpha=6, target_modules=MODULES))
    for a, b in zip(layers, others, strict=True):
        nn.init.constant_(a.d, 6 / R)
        b.A.data, b.B.data = a.A.data.clone(), a.B.data.clone()
    assert not len(ours.rasa_pools)
    assert all(torch.equal(a.d, torch.full((R,), 6 / R)) for a in adapted(replace(METHOD, k=0))[1])  # as it starts
    assert relative(loss_of(ours), loss_of(theirs)) < 1e-6
    loss_of(ours).backward()
    loss_of(theirs).backward()
    for a, b in zip(layers, others, strict=True):
        assert relative(a.A.grad, b.A.grad) < 1e-5 and relative(a.B.grad, b.B.grad) < 1e-5


def test_a_pool_that_no_layer_uses_leaves_lora_of_rank_r_minus_k():
    ours, layers = adapted(fill=True)
    theirs, others = adapted(LoRA(rank=R - K, alpha=2 * (R - K), target_modules=MODULES))
    for a, b in zip(layers, others, strict=True):
        nn.init.constant_(a.d, 2.0), nn.init.zeros_(a.e)
        b.A.data, b.B.data = a.A.data.clone(), a.B.data.clone()
    with torch.no_grad():
        assert relative(ours(input_ids=batch(99)).logits, theirs(input_ids=batch(99)).logits) < 1e-6


# --- 3: LoRA is in it -------------------------------------------------------------------------------------------------


def test_every_lora_of_rank_r_can_be_written_as_rasa_of_rank_r():
    """Block i of the pool holds the k pairs that layer i gave up; the other blocks weigh nothing in layer i."""
    model, adapters = adapted()
    model.double()
    for name, (m, n) in {"k_proj": (14, 42), "up_proj": (43, 42)}.items():
        layers, pool = [a for a in adapters if a.name.endswith(name)], pool_of(model, name)
        lora = [(torch.randn(m, R, dtype=torch.float64), torch.randn(R, n, dtype=torch.float64)) for _ in layers]
        for i, (layer, (b, a)) in enumerate(zip(layers, lora, strict=True)):
            block = slice(i * K, (i + 1) * K)
            layer.A.data, layer.B.data = a[K:], b[:, K:]
            pool.A.data[block], pool.B.data[:, block] = a[:K], b[:, :K]
            layer.d.data.fill_(1), layer.e.data.zero_()[block].fill_(1)
        for layer, (b, a) in zip(layers, lora, strict=True):
            assert (layer_map(layer) - layer.weight.double() - b @ a).abs().max() <= 1e-12


# --- 4: gradients -----------------------------------------------------------------------------------------------------


def untied(adapters: list[RaSALayer]) -> None:
    """Gives every layer a pool of its own with the same values."""
    for layer in adapters:
        copy = Pool("copy", [layer] * (len(layer.pool.A) // layer.pooled))
        copy.load_state_dict(layer.pool.state_dict())
        layer.borrows, layer.first = (copy,), True


@pytest.mark.parametrize("k", [1, R], ids=["k1", "kr"])
def test_the_gradient_of_the_pool_is_the_sum_over_layers_with_copies_of_their_own(k):
    shared, layers = adapted(replace(METHOD, k=k), fill=True)
    apart, others = adapted(replace(METHOD, k=k), fill=True)
    untied(others)
    loss_of(shared).backward()
    loss_of(apart).backward()
    for name in MODULES:
        for letter in "AB":
            copies = [getattr(a.pool, letter).grad for a in others if a.name.endswith(name)]
            assert len(copies) == L and relative(getattr(pool_of(shared, name), letter).grad, sum(copies)) < 1e-6
    for a, b in zip(layers, others, strict=True):
        assert relative(a.e.grad, b.e.grad) < 1e-6


def test_the_forward_of_a_layer_is_the_equation_and_its_gradients_are_autograds():
    _, adapters = adapted(fill=True)
    for layer in adapters:
        x, g = torch.randn(5, layer.shape[1], requires_grad=True), torch.randn(5, layer.shape[0])
        inputs = [x, layer.A, layer.B, layer.d, layer.pool.A, layer.pool.B, layer.e]
        naive = (
            x @ layer.weight.T + (x @ layer.A.T * layer.d) @ layer.B.T + (x @ layer.pool.A.T * layer.e) @ layer.pool.B.T
        )
        assert relative(layer(x), naive) < 1e-6
        for found, wanted in zip(
            torch.autograd.grad(layer(x), inputs, g), torch.autograd.grad(naive, inputs, g), strict=True
        ):
            assert relative(found, wanted) < 1e-5


def test_dropout_is_on_the_input_of_both_products_and_off_in_eval():
    _, (layer, *_) = adapted(replace(METHOD, dropout=0.5), fill=True)
    x = torch.randn(6, 42)
    assert relative(layer.eval()(x), x @ (layer.weight + change(layer).float()).T) < 1e-5
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    assert relative(found, x @ layer.weight.T + nn.functional.dropout(x, 0.5) @ change(layer).float().T) < 1e-5


# --- 5: one Parameter -------------------------------------------------------------------------------------------------


def test_each_pool_is_one_parameter_for_model_state_dict_and_all_layers():
    model, adapters = adapted()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False) if "pool" in name]
    assert sorted(names) == [f"rasa_pools.{module}_pool.{letter}" for module in MODULES for letter in "AB"]
    assert sorted(key for key in model.state_dict() if "pool" in key) == sorted(names)
    for module in MODULES:
        assert len({id(a.pool.A) for a in adapters if a.name.endswith(module)}) == 1
    assert pool_of(model, "k_proj").A.shape == (L * K, 42) and pool_of(model, "k_proj").B.shape == (14, L * K)


def test_saved_and_loaded_it_gives_the_same_answers():
    model, _ = adapted(fill=True)
    other, _ = adapted()
    with torch.no_grad():
        assert relative(other(input_ids=batch(99)).logits, model(input_ids=batch(99)).logits) > 0.1
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(input_ids=batch(99)).logits, model(input_ids=batch(99)).logits)


CHECKPOINTING = {"none": None, "non-reentrant": False, "reentrant": True}


def whole_gradient(engine: Engine, p: nn.Parameter, shape: torch.Size) -> Tensor:
    whole, mine = torch.zeros(shape.numel()), engine.gradient(p)
    start = engine.span(p).start
    whole[start : start + mine.numel()] = mine
    return engine.sum(whole).view(shape)


def trained(method: RaSA, engine: str, checkpointing: str = "none", dtype: str = "fp32", accumulation: int = 2) -> dict:
    t = Trainee(method, engine, dtype, accumulation=accumulation, samples=12, num_hidden_layers=L)
    if CHECKPOINTING[checkpointing] is not None:
        t.model.enable_input_require_grads()  # without it the reentrant kind gives no gradients at all
        t.model.activation_checkpointing_enable({"use_reentrant": CHECKPOINTING[checkpointing]})
    shapes = {name: value.shape for name, value in t.values().items()}
    told: dict = {"losses": [], "norms": [], "gradients": []}
    for step in range(3):
        told["losses"].append(float(t.engine.sum(torch.tensor(t.forward_backward(step)))))
        named = dict(t.model.named_parameters())
        told["gradients"].append({name: whole_gradient(t.engine, named[name], shape) for name, shape in shapes.items()})
        told["norms"].append(t.engine.step(1e-2))
    return told | {"values": t.values(), "logits": t.logits()}


@functools.cache
def one_process(k: int) -> dict:
    return ranks.run(1, trained, replace(METHOD, k=k), "plain", accumulation=1)[0]


def assert_same_run(found: dict, wanted: dict) -> None:
    """Measured: 3e-7 of losses and norms, 4e-6 of gradients."""
    assert found["losses"] == pytest.approx(wanted["losses"], rel=2e-6) and min(wanted["norms"]) > 0
    for before, after in zip(found["gradients"], wanted["gradients"], strict=True):
        assert before.keys() == after.keys()
        for name, gradient in after.items():
            assert (before[name] - gradient).norm() <= 2e-5 * gradient.norm(), name
    for told in (found, wanted):  # a pool counts once
        squares = [sum(float(g.double().square().sum()) for g in gradients.values()) for gradients in told["gradients"]]
        assert told["norms"] == pytest.approx([square**0.5 for square in squares], rel=1e-5)
    for name, value in wanted["values"].items():
        assert relative(found["values"][name], value) <= 2e-5, name


@pytest.mark.parametrize("checkpointing", list(CHECKPOINTING))
@pytest.mark.parametrize(
    "engine, world", [("plain", 1), ("plain", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]
)
def test_every_engine_with_either_checkpointing_trains_as_one_process_without(engine, world, checkpointing):
    for told in ranks.run(world, trained, METHOD, engine, checkpointing):
        assert_same_run(told, one_process(K))


@pytest.mark.parametrize("k", [0, R], ids=["k0", "kr"])
@pytest.mark.parametrize("engine, world", [("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)])
def test_without_a_pool_or_with_nothing_else_engines_train_as_one_process(engine, world, k):
    for told in ranks.run(world, trained, replace(METHOD, k=k), engine):
        assert_same_run(told, one_process(k))


def test_a_reentrant_layer_without_the_first_one_is_noticed_in_the_next_forward():
    _model, adapters = adapted(fill=True)
    later, x = adapters[2], torch.randn(2, 42, requires_grad=True)
    assert later.pool is adapters[0].pool and adapters[0].first and not later.first
    torch.utils.checkpoint.checkpoint(later, x, use_reentrant=True).sum().backward()
    assert later.pool.A.grad is None
    with pytest.raises(RuntimeError, match="checkpoint all layers or none"):
        later(x)


def once_in_the_optimizer(engine: str) -> tuple[int, int]:
    t = Trainee(METHOD, engine, num_hidden_layers=L)
    optimizer = t.engine.optimizer if engine in ("plain", "fsdp") else t.engine.zero
    groups = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "fp16_groups", None)
    listed = (
        [p for group in groups for p in group]
        if groups
        else [p for group in optimizer.param_groups for p in group["params"]]
    )
    return len(listed), len({id(p) for p in listed})


@pytest.mark.parametrize("engine", ["plain", "zero2", "zero3", "fsdp"])
def test_each_pool_is_in_the_optimizer_once(engine):
    # A, B, d, e of 2 L layers; A, B of 2 pools
    assert ranks.run(1, once_in_the_optimizer, engine)[0] == (2 * L * 4 + 2 * 2,) * 2


# --- 6: how many parameters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, count", [(8, 20_980_256), (16, 41_960_512), (32, 83_921_024)])
def test_parameters_of_llama_3_1_8b_are_the_papers(rank, count):
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    attach(model, RaSA(rank=rank), Dense(torch.bfloat16))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert len(model.rasa_pools) == 7 and pool_of(model, "v_proj").B.shape == (1024, 32 * rank // 8)


@SIZES
def test_parameters_are_loras_and_the_weights_of_the_pairs(k):
    model, _ = adapted(replace(METHOD, k=k))
    wanted = sum(R * (m + n) * L + L * (R - k + L * k) for m, n in ((14, 42), (43, 42)))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == wanted
    assert all(p.numel() for p in model.parameters())


# --- 7: the change ----------------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("dtype", ["fp32", "nf4", "int8"])
def test_w_plus_the_change_is_the_forward_and_the_change_has_rank_r_minus_k_plus_l_k(dtype, k):
    _, adapters = adapted(replace(METHOD, k=k), dtype, fill=True)
    for layer in adapters:
        pairs = layer.change(lambda p: p.detach().clone())
        assert len(pairs) == R - k + L * k and relative(pairs.product(), change(layer)) < 1e-6
        w = layer.decode(*layer.parts()).double()
        assert relative(layer_map(layer), w + change(layer)) < 1e-6
        values = torch.linalg.svdvals(change(layer))
        assert values[len(pairs) - 1] > 1e-6 * values[0] and (values[len(pairs) :] < 1e-12 * values[0]).all()


def test_the_exported_lora_and_the_merged_model_are_the_forward(tmp_path):
    t = Trainee(METHOD, "plain", num_hidden_layers=L)
    llama(num_hidden_layers=L).save_pretrained(tmp_path / "base")
    for step in range(3):
        t.step(step)
    saved = save_adapter(t.engine, t.adapters, method=METHOD, path=tmp_path / "adapter", base_model_name_or_path="base")
    assert saved is not None and saved.rank == R - K + L * K
    exported, maps = load_file(tmp_path / "adapter" / "adapter_model.safetensors"), t.probe()[1]
    for a in t.adapters:
        b, a_ = (exported[f"base_model.model.{a.name}.lora_{letter}.weight"].double() for letter in "BA")
        assert relative(t.original[f"{a.name}.weight"].double() + b @ a_, maps[a.name]) <= 1e-6
    merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=batch(99)).logits
    assert (merged - t.logits()).abs().max() <= 1e-4


# --- 8: d and e -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, d_init, d, e",
    [
        (1, "paper", 3 / 3, 3 / 3),
        (2, "paper", 3 / 2, 3 / 6),
        (0, "paper", 6 / 4, None),
        (R, "paper", None, 6 / 12),
        (1, "lora", 6 / 4, 6 / 4),
        (0, "lora", 6 / 4, None),
        (R, "lora", None, 6 / 4),
    ],
)
def test_the_weights_start_at_half_of_alpha_over_their_number_or_at_loras_scale(k, d_init, d, e):
    _, adapters = adapted(replace(METHOD, k=k, d_init=d_init))
    for a in adapters:
        named = dict(a.named_parameters())
        for letter, number, value in (("d", R - k, d), ("e", L * k, e)):
            assert (letter in named) == (value is not None)
            if value is not None:
                assert torch.equal(named[letter], torch.full((number,), value))


def test_alpha_is_the_rank_by_default_and_a_pattern_changes_it():
    _, adapters = adapted(replace(METHOD, alpha=None, alpha_pattern={"layers.1.mlp.up_proj": 9.0}))
    for a in adapters:
        alpha = 9 if a.name == "model.layers.1.mlp.up_proj" else R
        assert a.d.tolist() == pytest.approx([alpha / 2 / 3] * 3) and a.e.tolist() == pytest.approx([alpha / 2 / 3] * 3)


def test_weights_scaled_by_c_scale_the_change_by_c():
    _, adapters = adapted(fill=True)
    before = [layer_map(a) - a.weight.double() for a in adapters]
    for a in adapters:
        a.d.data.mul_(1.5), a.e.data.mul_(1.5)
    for a, was in zip(adapters, before, strict=True):
        assert relative(layer_map(a) - a.weight.double(), 1.5 * was) < 1e-5


def test_k_is_an_eighth_of_the_rank_by_default_and_at_least_one():
    assert [RaSA(rank=rank).pooled_pairs(rank) for rank in (1, 4, 8, 15, 16, 32)] == [1, 1, 1, 1, 2, 4]


# --- 9: what shares a pool --------------------------------------------------------------------------------------------


def test_layers_of_unequal_shapes_have_pools_of_their_own():
    model = llama(num_hidden_layers=4)
    model.model.layers[1].mlp.up_proj = nn.Linear(42, 29, bias=False)
    attach(model, METHOD, Dense())
    sizes = {name: (len(pool.A), len(pool.B)) for name, pool in model.rasa_pools.items()}
    assert sizes == {"k_proj_pool": (4, 14), "up_proj_pool": (3, 43), "up_proj_pool2": (1, 29)}


def test_only_adapted_layers_count_and_grouped_keys_have_their_own_width():
    every = RaSA(rank=R, k=K, target_modules=["q_proj", "layers.0.self_attn.k_proj", "layers.2.self_attn.k_proj"])
    model, adapters = adapted(every)
    assert {name: tuple(pool.B.shape) for name, pool in model.rasa_pools.items()} == {
        "q_proj_pool": (42, 3),
        "k_proj_pool": (14, 2),
    }
    assert [len(a.e) for a in adapters if a.name.endswith("k_proj")] == [2, 2]


FAMILIES = {
    "gptj": (GPTJConfig(n_embd=24, n_layer=3, n_head=2, rotary_dim=4, vocab_size=67), ["q_proj", "fc_in"]),
    "falcon": (
        FalconConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=67),
        ["query_key_value", "dense"],
    ),
    "qwen2": (
        Qwen2Config(
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=67,
        ),
        ["k_proj", "up_proj"],
    ),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_layers_of_any_naming_share_and_biases_stay(family):
    config, targets = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
        wanted = model(input_ids=batch(99)).logits
        adapters = attach(model, RaSA(rank=2, target_modules=targets), Dense())
        assert torch.equal(model(input_ids=batch(99)).logits, wanted)
    assert sorted(model.rasa_pools) == sorted(f"{target}_pool" for target in targets)
    assert all(len(a.e) == 3 for a in adapters) and len(adapters) == 6
    loss_of(model).backward()
    assert all(pool.B.grad.any() for pool in model.rasa_pools.values())


# --- what is refused --------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be_are_refused():
    for settings, message in (
        ({"use_rslora": True}, "method.use_rslora cannot be used with rasa"),
        ({"k": -1}, r"method.k must be from 0 \(no pool\) to method.rank = 4"),
        ({"k": 5}, r"method.k must be from 0 \(no pool\) to method.rank = 4 .*, not 5"),
        ({"k": 3, "rank_pattern": {"k_proj": 2}}, r"to method.rank_pattern\[k_proj\] = 2"),
        ({"rank": 0}, "method.rank must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(METHOD, **settings)


def test_ranks_may_differ_between_pools_but_not_in_one():
    _model, adapters = adapted(replace(METHOD, k=None, rank=4, rank_pattern={"up_proj": 16}))
    assert {a.name.rpartition(".")[2]: (len(a.A), len(a.e)) for a in adapters} == {"k_proj": (3, 3), "up_proj": (14, 6)}
    with pytest.raises(
        ValueError,
        match=r"layers.0.mlp.up_proj has rank 4 and model.layers.1.mlp.up_proj rank 8, but they share a pool",
    ):
        adapted(replace(METHOD, rank_pattern={"layers.1.mlp.up_proj": 8}))
