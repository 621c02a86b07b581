"""What every method shares: checked settings, targets, attaching, the registry, reproducible randomness."""

from pathlib import Path

import pytest
import torch
from torch import nn

import llm_lowrank.methods
from llm_lowrank.adapters.adapter import Adapter, generator
from llm_lowrank.adapters.method import Method, attach, find_targets
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.methods.srlora import SRLoRA
from tests.tiny import batch, llama

FP32 = Dense()
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora": LoRA(rank=3),
    "rslora": LoRA(rank=3, use_rslora=True),
    "pissa": PiSSA(rank=3),
    "srlora-weight": SRLoRA(rank=3, target_rank=6),
    "srlora-bank": SRLoRA(rank=3, target_rank=6, into="bank"),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def short(names) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


# ---- the registry


def test_every_file_in_methods_is_a_registered_method():
    files = {path.stem for path in Path(llm_lowrank.methods.__file__).parent.glob("*.py")} - {"__init__"}
    known = Method.get_known_choices()
    assert files and files == set(known)
    for name, method in known.items():
        assert issubclass(method, Method) and method.__module__ == f"llm_lowrank.methods.{name}"
        assert method().target_modules == ["all-linear"]  # the defaults are valid


# ---- settings


@pytest.mark.parametrize(
    "method,settings,message",
    [
        (LoRA, dict(rank=0), "method.rank must be at least 1, not 0"),
        (PiSSA, dict(rank=-2), "method.rank must be at least 1, not -2"),
        (LoRA, dict(dropout=1.0), r"method.dropout must be in \[0, 1\), not 1.0"),
        (LoRA, dict(dropout=-0.1), r"method.dropout must be in \[0, 1\), not -0.1"),
        (LoRA, dict(alpha=0.0), "method.alpha must be positive, not 0.0"),
        (LoRA, dict(alpha=-16.0), "method.alpha must be positive, not -16.0"),
        (LoRA, dict(target_modules=[]), r"method.target_modules is empty; name modules or write \[all-linear\]"),
        (SRLoRA, dict(rank=0), "method.rank must be at least 1, not 0"),
        (SRLoRA, dict(rank=16, target_rank=8), r"method.target_rank \(8\) must be at least method.rank \(16\)"),
        (SRLoRA, dict(gamma=0.0), r"method.gamma must be in \(0, 1\], not 0.0"),
        (SRLoRA, dict(gamma=1.5), r"method.gamma must be in \(0, 1\], not 1.5"),
        (SRLoRA, dict(beta1=1.0), r"method.beta1 must be in \[0, 1\), not 1.0"),
        (SRLoRA, dict(beta2=-0.5), r"method.beta2 must be in \[0, 1\), not -0.5"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name_and_value(method, settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        method(**settings)


@pytest.mark.parametrize(
    "settings", [dict(gamma=1.0), dict(beta1=0.0, beta2=0.0), dict(rank=8, target_rank=8), dict(dropout=0.99)]
)
def test_settings_at_the_edge_of_their_range_are_accepted(settings):
    assert all(getattr(SRLoRA(**settings), key) == value for key, value in settings.items())


@pytest.mark.parametrize(
    "settings,scale",
    [
        (dict(rank=16), 1.0),
        (dict(rank=16, alpha=32.0), 2.0),
        (dict(rank=16, alpha=8.0), 0.5),
        (dict(rank=16, alpha=32.0, use_rslora=True), 8.0),  # 32 / sqrt(16)
        (dict(rank=16, use_rslora=True), 4.0),  # alpha = rank
    ],
)
def test_scale_is_alpha_over_rank_or_over_its_root(settings, scale):
    assert LoRA(**settings).scale == scale
    assert (
        attach(llama(num_hidden_layers=1), LoRA(**{**settings, "rank": 16, "target_modules": ["q_proj"]}), FP32)[
            0
        ].scale
        == scale
    )


@pytest.mark.parametrize(
    "into,dtype,bank",
    [
        ("auto", torch.float32, 0),
        ("auto", torch.bfloat16, 5),
        ("auto", torch.float16, 5),
        ("weight", torch.bfloat16, 0),
        ("bank", torch.float32, 5),
        ("auto", torch.float64, 0),
    ],
)
def test_auto_sends_frozen_pairs_into_a_weight_that_holds_them_and_into_the_bank_otherwise(into, dtype, bank):
    assert SRLoRA(rank=3, target_rank=8, into=into).bank(Dense(dtype)) == bank


# ---- targets


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_all_linear_is_every_linear_but_the_output_layer(tied):
    model = llama(tie_word_embeddings=tied)
    found = find_targets(model, ["all-linear"])
    assert short(found) == sorted(ATTENTION + MLP) and len(found) == 2 * 7
    assert all(model.get_submodule(name) is linear for name, linear in found.items())


def test_all_linear_of_a_module_that_is_no_transformers_model_is_every_linear():
    assert list(find_targets(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), ["all-linear"])) == ["0", "2"]


@pytest.mark.parametrize(
    "wanted,found",
    [
        (["q_proj"], [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]),
        # its order
        (
            ["down_proj", "v_proj"],
            [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.v_proj", "mlp.down_proj")],
        ),
        (["layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (["model.layers.0.mlp.up_proj"], ["model.layers.0.mlp.up_proj"]),
        # named twice: adapted once
        (["q_proj", "layers.0.self_attn.q_proj"], [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]),
        (["lm_head"], ["lm_head"]),  # asked for by name
    ],
)
def test_a_target_matches_whole_trailing_parts_of_the_name(wanted, found):
    assert list(find_targets(llama(tie_word_embeddings=False), wanted)) == found


@pytest.mark.parametrize(
    "wanted,unknown,hint",
    [
        (["q_prj"], "q_prj", "; did you mean 'q_proj'?"),
        (["q_proj", "gate"], "gate", ""),
        (["proj"], "proj", ""),  # half a name is none
        (["embed_tokens"], "embed_tokens", ""),  # exists, is not linear
        (["all-linear", "q_proj"], "all-linear", ""),
        (["self_attn"], "self_attn", ""),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_what_there_is(wanted, unknown, hint):
    with pytest.raises(ValueError) as caught:
        find_targets(llama(), wanted)
    message = str(caught.value)
    assert message.startswith(f"method.target_modules: {unknown!r} matches no linear module{hint}")
    assert message.endswith("(there are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj)")


def test_all_linear_of_a_model_without_one_is_refused():
    model = llama(num_hidden_layers=0)
    with pytest.raises(ValueError, match="no linear module besides its output layer"):
        find_targets(model, ["all-linear"])


def test_all_complaints_about_the_settings_of_a_method_come_at_once():
    with pytest.raises(ValueError) as caught:
        SRLoRA(target_modules=[], rank=0, dropout=1.0, gamma=2.0)
    assert str(caught.value).splitlines() == [
        "method.target_modules is empty; name modules or write [all-linear]",
        "method.rank must be at least 1, not 0",
        "method.dropout must be in [0, 1), not 1.0",
        "method.gamma must be in (0, 1], not 2.0",
    ]


# ---- attach


@every_method
def test_attach_replaces_the_targets_in_place_and_freezes_everything_else(method):
    model = llama()
    before = dict(model.named_parameters())
    adapters = attach(model, method, FP32)
    assert [a.name for a in adapters] == list(find_targets(llama(), ["all-linear"]))
    for adapter in adapters:
        assert model.get_submodule(adapter.name) is adapter and isinstance(adapter, Adapter)
        m, n = adapter.shape
        assert (adapter.A.shape, adapter.B.shape) == ((3, n), (m, 3))
        assert adapter.scale == method.scale and adapter.rank == 3 and adapter.ledger == []
        bank = method.bank(FP32)
        assert (adapter.bank_A is None) == (bank == 0)
        assert len(adapter.factors()) == (4 if bank else 2)
        assert all(not p.any() for p in adapter.factors()[2:]) and (not bank or adapter.bank_A.shape == (bank, n))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{a.name}.{n}" for a in adapters for n in ("A", "B")}
    # same names, same values
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in before.items())


@every_method
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_attaching_keeps_the_function_bitwise(method, dtype):
    # B is 0, so the products that are added are 0
    model = llama(dtype)
    with torch.no_grad():
        before = model(input_ids=batch(0)).logits
        for adapter in attach(model, method, Dense(model.dtype)):
            adapter.started()  # the pairs stay in W
        assert torch.equal(model(input_ids=batch(0)).logits, before)


def test_factors_are_float32_over_any_backbone():
    for adapter in attach(llama("bf16"), SRLoRA(rank=3, target_rank=6), Dense(torch.bfloat16)):
        assert {p.dtype for p in adapter.factors()} == {torch.float32} and len(adapter.factors()) == 4
        assert adapter.weight.dtype == torch.bfloat16


def test_a_bias_is_kept_and_frozen():
    model = nn.Sequential(nn.Linear(5, 4, bias=True))
    bias = model[0].bias.detach().clone()
    (adapter,) = attach(model, LoRA(rank=2), FP32)
    assert torch.equal(adapter.bias, bias) and not adapter.bias.requires_grad


@every_method
def test_attach_works_on_the_meta_device(method):
    with torch.device("meta"):
        model = llama()
    adapters = attach(model, method, FP32)
    assert len(adapters) == 14
    for p in model.parameters():
        assert p.device.type == "meta"
    real = {name: (p.shape, p.requires_grad) for name, p in _attached(method).named_parameters()}
    assert {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()} == real


def _attached(method: Method) -> nn.Module:
    model = llama()
    attach(model, method, FP32)
    return model


@pytest.mark.parametrize(
    "method,message",
    [
        (LoRA(rank=15), "self_attn.k_proj: rank 15 is more than min(m, n) = 14 of its 14 x 42 weight"),
        (
            PiSSA(rank=43, target_modules=["up_proj"]),
            "mlp.up_proj: rank 43 is more than min(m, n) = 42 of its 43 x 42 weight",
        ),
        (
            SRLoRA(rank=4, target_rank=15),
            "self_attn.k_proj: method.target_rank 15 is more than min(m, n) = 14 of its 14 x 42 weight",
        ),
        (
            SRLoRA(rank=4, target_rank=15, into="bank"),
            "self_attn.k_proj: method.target_rank 15 is more than min(m, n) = 14 of its 14 x 42 weight",
        ),
    ],
    ids=["lora", "pissa", "srlora-weight", "srlora-bank"],
)
def test_a_rank_that_does_not_fit_names_the_module_and_what_to_do(method, message):
    with pytest.raises(ValueError) as caught:
        attach(llama(), method, FP32)
    last = message.partition(":")[0].rpartition(".")[2]
    told = f"model.layers.0.{message}; lower it, or leave the module out: --method.exclude_modules {last}"
    assert str(caught.value) == told


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=14), PiSSA(rank=14), SRLoRA(rank=4, target_rank=14), SRLoRA(rank=4, target_rank=14, into="bank")],
    ids=["lora", "pissa", "srlora-weight", "srlora-bank"],
)
def test_a_rank_of_min_m_n_fits(method):
    assert len(attach(llama(), method, FP32)) == 14


# ---- randomness


def draw(*key) -> list[float]:
    return torch.rand(4, generator=generator(*key)).tolist()


def test_a_generator_gives_the_same_numbers_for_the_same_seed_name_and_step():
    torch.manual_seed(1)
    first = draw(3, "model.layers.0.q_proj", 7)
    torch.manual_seed(2)
    assert draw(3, "model.layers.0.q_proj", 7) == first
    assert draw(3, "model.layers.0.q_proj") == draw(3, "model.layers.0.q_proj", 0)


def test_a_generator_is_another_one_for_another_seed_name_or_step():
    keys = [(seed, name, step) for seed in (0, 1, 11) for name in ("a", "b", "a:1") for step in (0, 1, 10)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_a_generator_does_not_depend_on_the_process():
    # a constant, not what hash() of this process says: ranks, resumed runs and later versions draw the same
    assert generator(0, "model.layers.0.self_attn.q_proj", 0).initial_seed() == 3429440668267149756


def test_factors_start_as_in_the_paper_and_alike_in_every_run():
    torch.manual_seed(1)
    first = attach(llama(), LoRA(rank=3), FP32, seed=5)
    torch.manual_seed(2)
    again, other = (
        attach(llama("bf16"), LoRA(rank=3), Dense(torch.bfloat16), seed=5),
        attach(llama(), LoRA(rank=3), FP32, seed=6),
    )
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.A, b.A) and not torch.equal(a.A, c.A) and not a.B.any()
        bound = 1 / a.shape[1] ** 0.5  # kaiming_uniform with a = sqrt 5
        start = a.A.detach()
        assert 0.9 * bound < float(start.abs().max()) <= bound
        # 42 or more draws
        assert abs(float(start.mean())) < 0.2 * bound and float(start.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
    assert len({a.A.flatten()[0].item() for a in first}) == len(first)  # modules of one shape start differently
