"""Other ranks and alphas for some modules: matched, exported and merged as in PEFT."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from llm_lowrank.adapters.adapter import as_pair_adapters
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.droplora import DropLoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.lora_ga import LoRAGA
from llm_lowrank.methods.pissa import PiSSA
from llm_lowrank.methods.relora import ReLoRA
from llm_lowrank.methods.srlora import SRLoRA
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.pairs import Change
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import dump, parse
from tests.tiny import Trainee, batch, llama

MODULES = ["k_proj", "o_proj", "up_proj", "down_proj"]
K, UP = "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"
CASES: list[tuple[dict[str, int], dict[str, float]]] = [  # rank_pattern, alpha_pattern
    ({}, {}),
    ({"k_proj": 2}, {}),
    ({}, {"k_proj": 3}),
    ({"k_proj": 2, "up_proj": 7}, {"up_proj": 5}),
    ({K: 2, UP: 3}, {K: 1}),  # full names
    ({"layers.1.mlp.up_proj": 3}, {"self_attn.k_proj": 9}),  # trailing parts
    ({"k_proj": 2, K: 5}, {}),  # several match: the first one counts
    ({K: 5, "k_proj": 2}, {}),
    ({"k_proj": 2}, {K: 8, "k_proj": 3}),
    ({K: 5, "k_proj": 2}, {"k_proj": 3, K: 8}),
    ({r".*_proj": 3, "k_proj": 2}, {r".*": 2}),
    ({r"(k|o)_proj": 3}, {r"(up|down)_proj": 2}),
    ({r"layers\.[01]\.mlp\..*": 3}, {r"model\.layers\.0\..*": 6}),
    ({r"^model\.layers\.1\..*": 3}, {r"^model\.layers\.0\..*k_proj": 6}),
    ({r"layers\.\d+\.self_attn\.(k|o)_proj": 2, r".*\.mlp\..*": 6}, {"down_proj": 1.5}),
    ({"layers.0.*": 3}, {"layers.0.mlp.*": 12}),
    ({r"k_proj|mlp.up_proj": 3}, {}),  # an alternative within the pattern's own group
]
ALPHAS = [None, 6.0, 2.5]


def ours(method: LoRA) -> dict[str, tuple[int, float]]:
    return {a.name: (a.rank, a.scale) for a in as_pair_adapters(attach(llama(), method, Dense()))}


def pefts(config: peft.LoraConfig) -> dict[str, tuple[int, float]]:
    model = peft.get_peft_model(llama(), config)
    layers = {
        name.removeprefix("base_model.model."): m
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}


def same(found: dict[str, tuple[int, float]], wanted: dict[str, tuple[int, float]]) -> None:
    assert found.keys() == wanted.keys() and len(found) == 8
    for name, (rank, scale) in wanted.items():
        assert found[name][0] == rank and found[name][1] == pytest.approx(scale), name


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("ranks, alphas", CASES, ids=[f"{ranks}{alphas}" for ranks, alphas in CASES])
def test_ranks_and_scales_are_pefts_own(ranks, alphas, use_rslora):
    method = LoRA(
        rank=4, alpha=6, target_modules=MODULES, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora
    )
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=MODULES, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora
    )
    same(ours(method), pefts(config))


def in_peft(ranks: dict[str, int], alphas: dict[str, float], alpha: float | None) -> peft.LoraConfig:
    """The settings of a LoRA of rank 4 in PEFT; without an alpha a module's alpha is its rank."""
    if alpha is None:
        alphas = alphas | {key: rank for key, rank in ranks.items() if key not in alphas}
    return peft.LoraConfig(
        r=4, lora_alpha=4 if alpha is None else alpha, target_modules=MODULES, rank_pattern=ranks, alpha_pattern=alphas
    )


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("ranks, alphas", CASES, ids=[f"{ranks}{alphas}" for ranks, alphas in CASES])
def test_with_and_without_an_alpha_ranks_and_scales_are_pefts_own(ranks, alphas, alpha):
    method = LoRA(rank=4, alpha=alpha, target_modules=MODULES, rank_pattern=ranks, alpha_pattern=alphas)
    same(ours(method), pefts(in_peft(ranks, alphas, alpha)))


def test_random_patterns_in_random_order_match_as_in_peft():
    draw, pieces = (
        random.Random(0),
        ["k_proj", "o_proj", ".*_proj", K, UP, r"layers\.0\..*", "mlp.*", "(up|k)_proj", ".*down.*"],
    )
    for _ in range(30):
        ranks, alphas = ({key: draw.randint(1, 9) for key in draw.sample(pieces, draw.randint(0, 5))} for _ in range(2))
        alpha = draw.choice(ALPHAS)
        method = LoRA(rank=4, alpha=alpha, target_modules=MODULES, rank_pattern=ranks, alpha_pattern=alphas)
        same(ours(method), pefts(in_peft(ranks, alphas, alpha)))


def test_without_an_alpha_the_scale_of_every_module_is_1():
    method = LoRA(rank=4, target_modules=MODULES, rank_pattern={"k_proj": 2, "mlp.*": 7})
    assert {scale for _, scale in ours(method).values()} == {1.0}


# --- what is trained, exported and merged -----------------------------------------------------------------------------

PATTERNS = dict(
    rank=4,
    alpha=6,
    target_modules=MODULES,
    rank_pattern={"layers.0.self_attn.k_proj": 2, r".*\.up_proj": 6},
    alpha_pattern={"o_proj": 3},
)
RANKS = {"k_proj": 4, "o_proj": 4, "up_proj": 6, "down_proj": 4}
METHODS = {
    "lora": LoRA(**PATTERNS),
    "lora-rslora": LoRA(**PATTERNS, use_rslora=True),
    "pissa": PiSSA(**PATTERNS, svd_cache=""),
    "relora-weight": ReLoRA(**PATTERNS, interval=1, restart_warmup=0, into="weight"),
    "relora-bank": ReLoRA(**PATTERNS, interval=1, restart_warmup=0, into="bank"),
    "dora": DoRA(**PATTERNS),
    "dora-rslora": DoRA(**PATTERNS, use_rslora=True),
    "droplora": DropLoRA(**PATTERNS, mask="step"),
    "lora_ga": LoRAGA(**PATTERNS, samples=6, svd_niter=1),
    "lora-plain": LoRA(rank=4, alpha=6, target_modules=MODULES),
    "rslora": LoRA(rank=4, alpha=6, target_modules=MODULES, use_rslora=True),
    "only ranks": LoRA(rank=4, target_modules=MODULES, rank_pattern=PATTERNS["rank_pattern"]),
}


def train(method: LoRA, steps: int = 3) -> Trainee:
    t = Trainee(method, "plain", total=steps)
    for step in range(steps):
        t.step(step)
        if step + 1 in method.schedule(steps):
            method.exchange(t.adapters, t.engine, step + 1, t.total)
    return t


@pytest.mark.parametrize("label", METHODS)
def test_trained_with_patterns_the_export_gives_the_same_logits_in_peft_and_merged(label, tmp_path):
    method = METHODS[label]
    t = train(method)
    for a in as_pair_adapters(t.adapters):
        rank = method.rank_of(a.name)
        alpha = 3 if a.name.endswith("o_proj") else 6
        if method.rank_pattern:
            assert rank == (2 if a.name == K else RANKS[a.name.rsplit(".", 1)[-1]])
        if not method.alpha_pattern:
            alpha = rank if method.alpha is None else method.alpha
        assert (a.rank, a.A.shape[0], a.B.shape[1]) == (rank, rank, rank)
        assert a.scale == pytest.approx(alpha / (rank**0.5 if method.use_rslora else rank))
        assert (0 if a.bank_A is None else len(a.bank_A)) == {"relora-bank": 2, "lora_ga": 1}.get(label, 0) * rank
    save_adapter(t.engine, t.adapters, method=method, path=tmp_path / "adapter", base_model_name_or_path="base")
    for_one_scale(t, tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    wanted = t.logits()
    assert (logits(base) - wanted).abs().max() > 0.01, "the base would have passed"
    for model in (
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
    ):
        assert (logits(model) - wanted).abs().max() <= 1e-4


def for_one_scale(t: Trainee, folder: Path) -> None:
    """Check the scale that consumers apply which know one rank and one alpha.

    vLLM: lora_alpha / r for every module. llama.cpp: lora_alpha / the rank of each tensor. Neither reads patterns or
    use_rslora.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not any(config.get(key) for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
    tensors = load_file(folder / "adapter_model.safetensors")
    for a in as_pair_adapters(t.adapters):
        down, up = (tensors[f"base_model.model.{a.name}.lora_{letter}.weight"].double() for letter in "AB")
        assert len(down) == up.shape[1] == config["r"]
        wanted = sum(exact(e) for e in a.ledger) + exact(a.change(t.engine.whole))
        for scale in (config["lora_alpha"] / config["r"], config["lora_alpha"] / len(down)):
            assert (scale * up @ down - wanted).norm() <= 1e-6 * wanted.norm()
    if not t.method.one_scale and not isinstance(t.method, PiSSA | ReLoRA | LoRAGA):
        assert config["lora_alpha"] == config["r"] == max(a.rank for a in as_pair_adapters(t.adapters))


def exact(change: Change) -> torch.Tensor:
    return change.pairs().to(dtype=torch.float64).product()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(99)).logits.float()


def test_pissa_takes_so_many_principal_pairs_of_each_module_as_its_rank_says():
    t = Trainee(replace(METHODS["pissa"], svd_exact=True), "plain")
    for a in as_pair_adapters(t.adapters):
        u, sigma, vt = torch.linalg.svd(t.original[f"{a.name}.weight"].double(), full_matrices=False)
        principal = (u[:, : a.rank] * sigma[: a.rank]) @ vt[: a.rank]
        found = a.scale * t.engine.whole(a.B).double() @ t.engine.whole(a.A).double()
        assert (found - principal).norm() <= 1e-5 * principal.norm(), a.name


# --- what is refused, and where it is set -----------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["k_prj", "q_proj", "proj", "layers.2.*", "model.layers"])
def test_a_pattern_that_matches_no_adapted_module_is_refused(setting, pattern):
    with pytest.raises(
        ValueError, match=rf"^method.{setting}: '{pattern}' matches none of the 8 adapted modules".replace("*", r"\*")
    ):
        attach(llama(), LoRA(rank=4, target_modules=MODULES, **{setting: {"k_proj": 2, pattern: 3}}), Dense())


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rank_pattern={"k_proj": 0}), r"method.rank_pattern\[k_proj\] must be at least 1, not 0"),
        (dict(alpha_pattern={"k_proj": -1.0}), r"method.alpha_pattern\[k_proj\] must be positive, not -1.0"),
        (dict(rank_pattern={"(k_proj": 2}), r"method.rank_pattern: '\(k_proj' is not a regular expression \(.*\)"),
        (
            dict(alpha_pattern={"*_proj": 2.0}),
            r"method.alpha_pattern: '\*_proj' is not a regular expression \(.*\); write \.\* for any",
        ),
    ],
)
def test_a_pattern_that_cannot_be_is_refused_with_its_name(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LoRA(rank=4, **settings)


def test_a_rank_of_a_pattern_that_is_too_large_for_its_module_is_refused():
    with pytest.raises(ValueError, match=r"k_proj: rank 15 is more than min\(m, n\) = 14 of its 14 x 42 weight"):
        attach(llama(), LoRA(rank=4, target_modules=MODULES, rank_pattern={"k_proj": 15}), Dense())


def test_srlora_refuses_rank_pattern_with_the_reason_and_takes_alpha_pattern():
    with pytest.raises(
        ValueError, match=r"^method.rank_pattern cannot be used with srlora: .* different numbers of exchanges"
    ):
        SRLoRA(rank=4, target_rank=8, rank_pattern={"k_proj": 2})
    method = SRLoRA(rank=4, target_rank=8, target_modules=MODULES, alpha_pattern={"k_proj": 8})
    assert {scale for _, scale in ours(method).values()} == {1.0, 2.0}


def test_the_command_line_and_a_recipe_can_set_them(tmp_path):
    wanted = {"rank_pattern": {"k_proj": 8, r"layers\.0\..*": 2}, "alpha_pattern": {"model.layers.0.mlp.up_proj": 2.5}}
    typed = parse(
        [
            "--method.type",
            "lora",
            "--method.rank_pattern",
            r"{k_proj: 8, layers\.0\..*: 2}",
            "--method.alpha_pattern",
            "{model.layers.0.mlp.up_proj: 2.5}",
        ]
    )
    written = Path(tmp_path) / "recipe.yaml"
    written.write_text(r"""
method:
  type: lora
  rank_pattern:
    k_proj: 8
    'layers\.0\..*': 2
  alpha_pattern: {model.layers.0.mlp.up_proj: 2.5}
""")
    for recipe in (typed, parse(["--config_path", str(written)])):
        assert isinstance(recipe.method, LoRA)
        assert {key: getattr(recipe.method, key) for key in wanted} == wanted
        assert list(recipe.method.rank_pattern) == list(wanted["rank_pattern"])  # the order counts
    again = Path(tmp_path) / "again.yaml"
    again.write_text(dump(typed))
    assert parse(["--config_path", str(again)]) == typed
    assert parse(["--config_path", str(written), "--method.rank_pattern", "{o_proj: 3}"]).method.rank_pattern == {
        "o_proj": 3
    }


@pytest.mark.parametrize("value", ["8", "{k_proj: eight}", "{k_proj: 2.5}", "[k_proj, 8]"])
def test_a_pattern_that_is_none_is_refused_on_the_command_line(value):
    with pytest.raises(RecipeError, match=r"method.rank_pattern"):
        parse(["--method.type", "lora", "--method.rank_pattern", value])
