"""Models of many architectures, tiny and random: two steps, then the merged checkpoint in plain transformers and the
adapter in PEFT answer as the trained model does. Models that cannot be trained are refused in words that help.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from llm_lowrank.adapters.method import Method
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.models.architectures import names_of_experts
from llm_lowrank.models.coverage import coverage
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.loading import bind, load
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from llm_lowrank.numerics.optimizers import Optimization
from llm_lowrank.run.build import attention, build_model
from llm_lowrank.run.recipe import Recipe
from tests.tiny import VOCABULARY, batch, engine

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# names of older configs
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

ARCHITECTURES: dict[str, dict[str, object]] = {
    "apertus": {},
    "arcee": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {},
    "cohere2": {},
    "codegen": GPT | {"rotary_dim": 4},
    "exaone4": {},
    "falcon": {"head_dim": None},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt_bigcode": GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {},
    "gptj": GPT | {"rotary_dim": 4},
    "granite": {},
    "helium": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": {},
    "ministral": {},
    "mistral": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}


def plain_model(kind: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {**SIZES, **ARCHITECTURES.get(kind, {}), **changes}
    config = transformers.CONFIG_MAPPING[kind](**{k: v for k, v in settings.items() if v is not None})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return widened(model)


def widened(model: nn.Module) -> nn.Module:
    """Wider than the usual 0.02, so that every layer matters."""
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.15)
    return model.eval()


LORA, DORA = LoRA(rank=2), DoRA(rank=2)


def recipe_of(folder: Path, method: Method = LORA, **changes: object) -> Recipe:
    return replace(Recipe(), model_name_or_path=str(folder), method=method, **changes)


def trained(folder: Path, recipe: Recipe) -> tuple[Plain, PreTrainedModel, list, Source]:
    """Two steps of a recipe over the model of a folder."""
    source = Source.open(folder)
    model, adapters = build_model(recipe, source.path)
    tensors = source.in_model(model)
    bind(model, adapters, tensors)
    plain = engine("plain")
    load(plain, model, adapters=adapters, method=recipe.method, tensors=tensors, settings=Optimization(1e-2))
    with torch.no_grad():
        for adapter in adapters:
            if adapter.only_pairs:
                nn.init.normal_(adapter.B, std=0.05)
    model.train()
    for step in range(2):
        tokens = batch(step)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        plain.backward(loss)
        assert plain.step(*recipe.method.rates(adapters, step, 2, lambda _: 1e-2)) > 0
    return plain, model.eval(), adapters, source


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(99), use_cache=False).logits


def exported(folder: Path, recipe: Recipe, out: Path) -> tuple[Tensor, Source]:
    """The trained model's answers; the adapter is in out / adapter."""
    plain, model, adapters, source = trained(folder, recipe)
    save_adapter(
        plain,
        adapters,
        method=recipe.method,
        path=out / "adapter",
        base_model_name_or_path=source.name,
        outer_name=source.outer_name,
        model=model,
    )
    return answers(model), source


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_two_steps_and_the_exports_answer_alike(tmp_path, kind):
    untrained = plain_model(kind)
    untrained.save_pretrained(tmp_path / "base")
    wanted, source = exported(tmp_path / "base", recipe_of(tmp_path / "base"), tmp_path)
    assert gap(wanted, answers(untrained)) > 1e-3
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    assert gap(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted) < 2e-5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert gap(answers(PeftModel.from_pretrained(base, tmp_path / "adapter")), wanted) < 2e-5


# --- names on disk that are not those of the model --------------------------------------------------------------------


def test_a_renamed_output_layer_is_adapted_and_merged(tmp_path):
    """GPT-NeoX: embed_out on disk, lm_head in the model."""
    plain_model("gpt_neox", tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    assert "embed_out.weight" in Source.open(tmp_path / "base").names()
    recipe = recipe_of(tmp_path / "base", LoRA(rank=2, target_modules=["lm_head", "dense"]))
    wanted, source = exported(tmp_path / "base", recipe, tmp_path)
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(Source.open(tmp_path / "merged").names()) == sorted(source.names())
    assert gap(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted) < 2e-5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert gap(answers(PeftModel.from_pretrained(base, tmp_path / "adapter")), wanted) < 2e-5


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "head_dim": 8,
}


@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
@pytest.mark.parametrize("names", ["original", "of the model"])
def test_the_text_part_of_a_model_for_images(tmp_path, kind, names):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](text_config=SIZES, vision_config=VISION)
    whole = widened(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
    whole.save_pretrained(tmp_path / "base", save_original_format=names == "original")
    wanted, source = exported(tmp_path / "base", recipe_of(tmp_path / "base"), tmp_path)
    assert gap(wanted, answers(whole)) > 1e-3
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    assert sorted(Source.open(tmp_path / "merged").names()) == sorted(source.names())
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert gap(answers(merged), wanted) < 2e-5
    adapted = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert gap(answers(adapted), wanted) < 2e-5
    assert not any("vision" in name for name, _ in adapted.named_modules() if name.endswith("lora_A"))


def test_a_checkpoint_of_the_model_without_its_output_layer(tmp_path):
    """As the first LLaMA and GPT-2 checkpoints: names without the prefix `model.`"""
    untrained = plain_model("llama", tie_word_embeddings=True)
    untrained.model.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    assert "layers.0.mlp.up_proj.weight" in Source.open(tmp_path / "base").names()
    wanted, source = exported(tmp_path / "base", recipe_of(tmp_path / "base"), tmp_path)
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    assert gap(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted) < 2e-5


# --- mixtures of experts ----------------------------------------------------------------------------------------------

MIXTURES: dict[str, dict[str, object]] = {
    "deepseek_v3": MOE
    | {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": None,
        "n_shared_experts": 1,
    },
    "gpt_oss": MOE | {"layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": MOE,
    "mixtral": MOE,
    "olmoe": MOE | {"intermediate_size": 16},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 8},
    "qwen3_moe": MOE,
}


@pytest.fixture(scope="module", params=MIXTURES)
def mixture(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / request.param
    torch.manual_seed(0)
    model = plain_model(request.param, **MIXTURES[request.param])
    for name, p in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return folder


def test_mixtures_are_refused_as_such(mixture):
    says = r"keeps .*% of its layer weights outside of linear modules, the experts of a mixture.*allow_partial: true"
    with pytest.raises(ValueError, match=says):
        build_model(recipe_of(mixture), mixture)


def test_the_attention_of_a_mixture_is_trained_when_it_is_asked_for(tmp_path, mixture):
    excluded = {"qwen2_moe": ["shared_expert_gate"], "deepseek_v3": ["gate_proj", "up_proj", "down_proj"]}
    method = LoRA(rank=2, exclude_modules=excluded.get(mixture.name, []))
    untrained = AutoModelForCausalLM.from_pretrained(mixture)
    recipe = recipe_of(mixture, method, allow_partial=True)
    wanted, source = exported(mixture, recipe, tmp_path)
    assert gap(wanted, answers(untrained)) > 1e-4
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    assert gap(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted) < 5e-5
    assert gap(answers(PeftModel.from_pretrained(untrained, tmp_path / "adapter")), wanted) < 5e-5


def test_names_that_peft_takes_for_experts_are_told(mixture):
    """PEFT moves an adapter of mlp.shared_experts.up_proj to the experts, which have up_proj on disk."""
    model, adapters = build_model(recipe_of(mixture, LoRA(rank=1), allow_partial=True), mixture)
    found = names_of_experts(model, [adapter.name for adapter in adapters])
    shared = mixture.name in ("deepseek_v3", "qwen2_moe")
    assert found == (["down_proj", "gate_proj", "up_proj"] if shared else [])


def test_a_codec_that_reaches_too_little_is_refused_whatever_the_targets(mixture):
    method = LoRA(rank=2, target_modules=["o_proj"])
    model, _ = build_model(recipe_of(mixture, method), mixture)  # modules that are named are a choice
    covered = coverage(model)
    assert 0 < covered.adapted / covered.layers < 0.5 < covered.hidden_share
    with pytest.raises(ValueError, match="codec: nf4 leaves them unquantized"):
        build_model(recipe_of(mixture, method, codec="nf4"), mixture)
    model, _ = build_model(recipe_of(mixture, method, codec="nf4", allow_partial=True), mixture)
    line = coverage(model).describe("nf4")
    assert "adapted: " in line and "quantized: " in line and "experts" in line


# --- attention --------------------------------------------------------------------------------------------------------


def test_auto_takes_eager_where_there_is_no_other(tmp_path, monkeypatch):
    plain_model("gemma2").save_pretrained(tmp_path)
    recipe = recipe_of(tmp_path)
    monkeypatch.setattr(transformers.Gemma2PreTrainedModel, "_supports_sdpa", False)
    model, _ = build_model(recipe, tmp_path)
    assert attention(recipe, model) == ("eager", "for transformers has no sdpa for Gemma2ForCausalLM")
    says = "attn_implementation: Gemma2ForCausalLM cannot be built with sdpa; use auto or eager"
    with pytest.raises(ValueError, match=says):
        build_model(replace(recipe, attn_implementation="sdpa"), tmp_path)
    recipe = replace(recipe, attn_implementation="eager")
    assert attention(recipe, build_model(recipe, tmp_path)[0]) == ("eager", "as attn_implementation says")


def test_auto_takes_sdpa_where_the_model_has_it(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    model, _ = build_model(recipe_of(tmp_path), tmp_path)
    assert attention(recipe_of(tmp_path), model)[0] == "sdpa"


# --- a tied output layer ----------------------------------------------------------------------------------------------


def test_a_tied_output_layer_is_trained_alone(tmp_path):
    untrained = plain_model("llama", tie_word_embeddings=True)
    untrained.save_pretrained(tmp_path / "base")
    method = LoRA(rank=2, target_modules=["lm_head", "q_proj"])
    with pytest.raises(ValueError, match=r"lm_head, which shares its weight with the embedding.*save_merged: false"):
        build_model(recipe_of(tmp_path / "base", method), tmp_path / "base")
    recipe = recipe_of(tmp_path / "base", method, save_merged=False)
    wanted, source = exported(tmp_path / "base", recipe, tmp_path)
    assert "lm_head.weight" not in source.names()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    embedding = base.model.embed_tokens.weight.clone()
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert gap(answers(adapted), wanted) < 2e-5 < 1e-3 < gap(wanted, answers(untrained))
    assert torch.equal(base.model.embed_tokens.weight, embedding)


# --- outputs that the model changes in place --------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"alibi": True}, {"parallel_attn": False}])
@pytest.mark.parametrize("codec", ["dense", "int8"])
def test_an_output_may_be_changed_in_place(tmp_path, codec, changes):
    plain_model("falcon", **changes).save_pretrained(tmp_path)
    _, model, _, _ = trained(tmp_path, recipe_of(tmp_path, codec=codec))
    assert answers(model).isfinite().all()


@pytest.mark.parametrize(
    "method", [RaSA(rank=2, k=1), LoSiA(factor=0.5, output_factor=0), DORA], ids=["rasa", "losia", "dora"]
)
def test_an_output_may_be_changed_in_place_under_every_layer(tmp_path, method):
    plain_model("falcon").save_pretrained(tmp_path)
    if method is DORA:
        with pytest.raises(
            ValueError, match="dense_4h_to_h: FalconForCausalLM adds to the output of this layer in place"
        ):
            build_model(recipe_of(tmp_path, method), tmp_path)
        method = replace(method, exclude_modules=["dense_4h_to_h"])
    _, model, _, _ = trained(tmp_path, recipe_of(tmp_path, method))
    assert answers(model).isfinite().all()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_conv1d_is_refused_by_name(tmp_path):
    plain_model("gpt2", **GPT).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"GPT2LMHeadModel keeps 100.0% of its layer weights outside of linear modules"
    ):
        build_model(recipe_of(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="'c_attn' matches no linear module: it is a Conv1D, which is not supported"):
        build_model(recipe_of(tmp_path, LoRA(target_modules=["c_attn"])), tmp_path)


def test_what_is_no_causal_language_model_is_refused_in_one_line(tmp_path):
    transformers.T5Config(d_model=32, num_layers=1).save_pretrained(tmp_path)
    says = "is a model of type t5, for which transformers has no causal language model"
    with pytest.raises(ValueError, match=says) as refusal:
        build_model(recipe_of(tmp_path), tmp_path)
    assert len(str(refusal.value)) < 300


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers 5.17 stores this model as it holds it"
)
def test_a_tensor_that_would_have_to_be_computed_is_refused(tmp_path):
    layers = ["linear_attention", "full_attention"]
    config = transformers.CONFIG_MAPPING["olmo_hybrid"](**SIZES, layer_types=layers)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    source = Source.open(tmp_path)
    model, _ = build_model(recipe_of(tmp_path, LoRA(rank=1)), tmp_path)
    with pytest.raises(ValueError, match=r"conv1d.weight is stored in another form.*Concatenate.*save_original_format"):
        source.in_model(model)


# --- leaving modules out ----------------------------------------------------------------------------------------------


def test_excluded_modules_are_left_out_of_all_linear_and_of_names(tmp_path):
    plain_model("llama").save_pretrained(tmp_path)
    method = LoRA(rank=2, exclude_modules=["down_proj", "layers.1.self_attn.q_proj"])
    names = [adapter.name for adapter in build_model(recipe_of(tmp_path, method), tmp_path)[1]]
    assert len(names) == 14 - 2 - 1 and not any("down_proj" in name for name in names)
    assert "model.layers.0.self_attn.q_proj" in names and "model.layers.1.self_attn.q_proj" not in names
    says = "method.exclude_modules: 'down_prj' matches no linear module; did you mean 'down_proj'"
    with pytest.raises(ValueError, match=says):
        build_model(recipe_of(tmp_path, LoRA(exclude_modules=["down_prj"])), tmp_path)
    both = LoRA(target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(ValueError, match="exclude_modules leaves no module"):
        build_model(recipe_of(tmp_path, both), tmp_path)


def test_a_gate_of_one_row_is_named_with_what_to_do(tmp_path):
    plain_model("qwen2_moe", **MIXTURES["qwen2_moe"]).save_pretrained(tmp_path)
    says = (
        "shared_expert_gate: rank 2 is more than min.*leave the module out: --method.exclude_modules shared_expert_gate"
    )
    with pytest.raises(ValueError, match=says):
        build_model(recipe_of(tmp_path, allow_partial=True), tmp_path)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_names_the_architectures_that_are_tested():
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    listed = page.partition("2e-5):")[2].partition("| model |")[0].replace("\n", " ").split(",")
    assert sorted(name.strip() for name in listed) == sorted(ARCHITECTURES)
    tested = page.partition("a mixture of experts (tested: ")[2].partition(")")[0].split(", ")
    assert sorted(tested) == sorted(MIXTURES)
    assert f"{len(ARCHITECTURES)} architectures" in (Path(__file__).parents[1] / "README.md").read_text()
