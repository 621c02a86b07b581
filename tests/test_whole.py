"""Modules that are trained as wholes: norms, the embedding and the output layer, on every engine, resumed, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from benchmarks import soak
from llm_lowrank.adapters.whole import Whole
from llm_lowrank.evaluation.subject import Subject
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.models import loss
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from llm_lowrank.run.build import build_model
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.flops import work_of
from llm_lowrank.run.memory import sizes_of
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import ranks
from tests.test_architectures import ARCHITECTURES, SIZES, VISION, answers, gap, plain_model, recipe_of, widened
from tests.test_architectures import exported as trained_and_exported
from tests.test_laws import METHODS
from tests.test_offload import CPU
from tests.test_tokens import argv
from tests.tiny import VOCABULARY, Trainee, batch, check_resumes_bitwise, check_trains_alike, llama, trains_as_peft

METHOD = LoRA(rank=3, alpha=6.0, target_modules=["q_proj", "down_proj"])
ALL = ("embed_tokens", "lm_head", "norm")
NORMS = ("input_layernorm", "post_attention_layernorm")
STEPS = 3
WIDE = pytest.mark.wide


def trainee(engine: str = "plain", dtype: str = "fp32", modules: tuple[str, ...] = ALL, **settings: object) -> Trainee:
    return Trainee(METHOD, engine, dtype, modules=modules, **settings)


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modules", [("norm",), ("lm_head", "embed_tokens"), ALL])
def test_they_train_as_pefts_modules_to_save(modules):
    t = trainee(modules=modules, tie_word_embeddings=False)
    config = LoraConfig(r=3, lora_alpha=METHOD.alpha, target_modules=METHOD.target_modules, modules_to_save=[*modules])
    theirs = get_peft_model(llama(tie_word_embeddings=False), config)
    values = {name.replace(".weight", ""): p for name, p in t.values().items()}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if ".lora_" in name:  # the same start
                at = name.removeprefix("base_model.model.").replace(".lora_", ".").replace(".default.weight", "")
                p.copy_(values[at])
    trained = {p.numel() for p in theirs.parameters() if p.requires_grad}
    assert trained == {p.numel() for p in t.model.parameters() if p.requires_grad}
    trains_as_peft(t, theirs, STEPS, 1e-2)


def test_a_shared_matrix_gets_the_gradients_of_both_ends():
    wanted = llama()
    ids = batch(0)
    logits = wanted(input_ids=ids).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for one in ("embed_tokens", "lm_head"):
        t = trainee(modules=(one,))
        assert t.model.get_input_embeddings().weight is t.model.lm_head.weight
        t.forward_backward(0)
        torch.testing.assert_close(t.model.lm_head.weight.grad, wanted.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_function_at_the_start_is_the_base_models_bit_for_bit(tied):
    base = llama("bf16", tie_word_embeddings=tied)
    with torch.no_grad():
        for norm in (m for m in base.modules() if type(m).__name__ == "LlamaRMSNorm"):
            norm.weight.add_(torch.randn_like(norm.weight) / 8)
    t = trainee("plain", "bf16", tie_word_embeddings=tied)
    for name, p in t.model.named_parameters():
        if name in base.state_dict():
            p.data.copy_(base.state_dict()[name].float() if p.requires_grad else base.state_dict()[name])
    masters = {name: p.dtype for name, p in t.model.named_parameters() if p.requires_grad}
    assert {*masters.values()} == {torch.float32} and "model.layers.0.input_layernorm.weight" in masters
    with torch.no_grad():
        assert torch.equal(t.logits(), base(input_ids=batch(99)).logits.float())


# --- on every engine --------------------------------------------------------------------------------------------------


def alike(engine: str, world: int, dtype: str, tied: bool, zero: dict | None = None) -> None:
    values = check_trains_alike(METHOD, engine, world, dtype, zero, modules=ALL, tie_word_embeddings=tied)
    assert "model.layers.1.post_attention_layernorm.weight" in values


@pytest.mark.parametrize(
    "engine, world, dtype, tied",
    [
        ("plain", 2, "fp32", True),
        pytest.param("plain", 2, "nf4", False, marks=WIDE),
        pytest.param("zero1", 2, "fp32", False, marks=WIDE),
        ("zero2", 2, "fp32", False),
        pytest.param("zero2", 3, "int8", True, marks=WIDE),
        pytest.param("zero3", 2, "int8", False, marks=WIDE),
        ("zero3", 3, "nf4", True),
        pytest.param("zero3", 3, "nf4", False, marks=WIDE),
        ("fsdp", 2, "nf4", True),
        pytest.param("fsdp", 2, "fp32", False, marks=WIDE),
    ],
)
def test_they_train_alike_on_every_engine(engine, world, dtype, tied):
    alike(engine, world, dtype, tied)


@WIDE
@pytest.mark.parametrize(
    "engine, offload",
    [
        ("zero2", {"offload_optimizer": CPU}),
        ("zero3", {"offload_optimizer": CPU, "offload_param": CPU}),
        ("fsdp", {"cpu_offload": True}),
    ],
)
def test_modules_that_lie_on_the_host_between_uses_train_alike(engine, offload):
    alike(engine, 2, "nf4", False, offload)


def checkpointed(engine: str, reentrant: bool | None) -> list[float]:
    t = trainee(engine, accumulation=2)
    if reentrant is not None:
        t.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        t.model.enable_input_require_grads()
    return [t.step(step) for step in range(2)]


@pytest.mark.parametrize(
    "engine, reentrant",
    [
        ("zero3", False),
        *(pytest.param(*case, marks=WIDE) for case in [("fsdp", False), ("zero3", True), ("plain", True)]),
    ],
)
def test_checkpointing_and_micro_batches_change_nothing(engine, reentrant):
    wanted = ranks.run(1, checkpointed, "plain", None)[0]
    for found in ranks.run(3, checkpointed, engine, reentrant):
        assert found == pytest.approx(wanted, rel=2e-6)


@pytest.mark.parametrize(
    "engine, world, dtype",
    [
        ("zero3", 3, "nf4"),
        *(pytest.param(*case, marks=WIDE) for case in [("fsdp", 2, "nf4"), ("zero2", 2, "fp32"), ("plain", 1, "bf16")]),
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(engine, world, dtype, tmp_path):
    wanted = check_resumes_bitwise(METHOD, engine, world, dtype, tmp_path, modules=ALL)
    assert any(name.startswith("model.norm.weight.") for name in wanted)


FEW = ("lora", "lora-b-rate", "srlora-bank", "rasa", "losia-weight", "sora")


@pytest.mark.parametrize("method", [m if m in FEW else pytest.param(m, marks=WIDE) for m in METHODS])
def test_every_method_trains_them_beside_its_adapters(method):
    t = Trainee(METHODS[method], "plain", modules=("embed_tokens", "norm"), total=4)
    before = {name: t.values()[name].clone() for name in ("model.norm.weight", "model.embed_tokens.weight")}
    for step in range(2):
        t.step(step)
    assert not any(torch.equal(t.values()[name], value) for name, value in before.items())


# --- loss, sizes and work ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("block", [2**25, 3 * VOCABULARY], ids=["whole", "blocks"])
def test_the_loss_in_the_layer_trains_the_layer(tied, block, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", block)
    t = trainee(tie_word_embeddings=tied)
    layer, why = loss.loss_layer(t.engine, t.model, t.wrapped)
    assert layer is t.model.lm_head and not why
    ids, found = batch(0), []
    for where in (None, layer):
        total = loss.sum_loss(t.wrapped, {"input_ids": ids}, ids, where)
        params = [p for m in t.model.modules() if isinstance(m, Whole) for p in m.parameters(recurse=False)]
        found.append((total.item(), *torch.autograd.grad(total, params)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_sizes_and_work_count_them_as_trained():
    whole, plain = (trainee(modules=m, tie_word_embeddings=False) for m in (("lm_head",), ()))
    sizes, without = (sizes_of(t.model, METHOD) for t in (whole, plain))
    matrix = VOCABULARY * 42
    assert sizes.parts[2] - without.parts[2] == 4 * matrix == without.parts[0] - sizes.parts[0]
    work, less = (work_of(t.model, recomputed=False) for t in (whole, plain))
    assert (work.output.frozen, work.output.trained, less.output.frozen, less.output.trained) == (0, matrix, matrix, 0)
    # with a trained embedding every frozen weight has something trained before it
    first = work_of(trainee(modules=("embed_tokens",), tie_word_embeddings=False).model, recomputed=False).layers
    assert first.behind == first.frozen > less.layers.behind


# --- export -----------------------------------------------------------------------------------------------------------


def exported(engine: str, tied: bool, folder: str, modules: tuple[str, ...] = ALL) -> Tensor:
    t = trainee(engine, modules=modules, tie_word_embeddings=tied)
    for step in range(STEPS):
        t.step(step)
    saved = save_adapter(
        t.engine, t.adapters, method=METHOD, path=folder, base_model_name_or_path="base", model=t.model
    )
    assert saved is None or saved.whole == len([m for m in t.model.modules() if isinstance(m, Whole)])
    return t.logits().cpu()


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("engine, world", [("plain", 1), pytest.param("zero3", 3, marks=WIDE)])
def test_peft_and_plain_transformers_answer_as_the_trained_model(engine, world, tied, tmp_path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    wanted = ranks.run(world, exported, engine, tied, str(tmp_path / "adapter"))[0]
    ids = batch(99)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {"lm_head", "model.embed_tokens", "model.norm"} < {*config["modules_to_save"]}
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        untrained = base(input_ids=ids).logits
        peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
    assert not torch.allclose(untrained, wanted, atol=1e-2)
    torch.testing.assert_close(peft, wanted, rtol=1e-4, atol=1e-5)

    merged = merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
    assert len(merged.replaced) == 5 + (1 if tied else 2) and " and " in str(merged)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*(ensure_weight_tying|tied)")
@pytest.mark.parametrize(
    "tied, settings",
    [
        (False, {"modules_to_save": ["lm_head", "norm"]}),
        (True, {"modules_to_save": ["norm"]}),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (False, {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}),
    ],
)
def test_an_adapter_that_peft_wrote_is_merged(tied, settings, tmp_path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    peft_model(tmp_path, **settings).save_pretrained(tmp_path / "adapter")
    merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), batch(99)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, theirs.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


# --- other architectures ----------------------------------------------------------------------------------------------

CHOSEN = ("gemma3_text", "gpt_neox", "phi", "cohere", "olmo")  # scaled, LayerNorms, a bias at the end, tied, without W


def ends_of(model: nn.Module) -> list[str]:
    """The full names of embedding, output layer and norms with parameters."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        name
        for name, module in model.named_modules()
        if module in ends or ("Norm" in type(module).__name__ and [*module.parameters()])
    ]


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("kind", [k if k in CHOSEN else pytest.param(k, marks=WIDE) for k in ARCHITECTURES])
def test_other_architectures_train_and_export_them(kind, tmp_path):
    untrained = plain_model(kind)
    untrained.save_pretrained(tmp_path / "base")
    ends = ends_of(untrained)
    recipe = recipe_of(tmp_path / "base", modules_to_save=ends)
    model, _ = build_model(recipe, tmp_path / "base")
    assert {name for name, m in model.named_modules() if isinstance(m, Whole)} == {*ends}
    wanted, source = trained_and_exported(tmp_path / "base", recipe, tmp_path)
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    assert gap(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), wanted) < 5e-5
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert gap(answers(PeftModel.from_pretrained(base, tmp_path / "adapter")), wanted) < 5e-5


def test_the_text_part_of_a_model_for_images_has_its_outer_names(tmp_path):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING["gemma3"](text_config=SIZES, vision_config=VISION)
    widened(AutoModelForImageTextToText.from_config(config, dtype=torch.float32)).save_pretrained(tmp_path / "base")
    recipe = recipe_of(tmp_path / "base", modules_to_save=["model.norm", "embed_tokens"])
    wanted, source = trained_and_exported(tmp_path / "base", recipe, tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "model.language_model.norm" in config["modules_to_save"]
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert gap(answers(merged), wanted) < 5e-5
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    assert gap(answers(PeftModel.from_pretrained(base, tmp_path / "adapter")), wanted) < 5e-5


def test_an_output_layer_is_adapted_or_trained_whole():
    head = LoRA(rank=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="embed_tokens shares its matrix with lm_head, which the method adapts"):
        Trainee(head, "plain", modules=("embed_tokens",))
    for method in (head, LoSiA(factor=0.25, output_factor=0.5)):
        with pytest.raises(ValueError, match=r"lm_head is adapted by the method; .*output_factor: 0"):
            Trainee(method, "plain", modules=("lm_head",), tie_word_embeddings=False)
    Trainee(head, "plain", modules=("embed_tokens",), tie_word_embeddings=False)


def peft_model(folder: Path, **settings: object) -> PeftModel:
    config = LoraConfig(**{"r": 2, "target_modules": ["up_proj"], **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 4)
    return model


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying")
@pytest.mark.parametrize(
    "modules, says",
    [
        (["embed_tokens"], "brings its own model.embed_tokens.weight, which shares its matrix with lm_head.weight"),
        (["embed_tokens", "lm_head"], "brings lm_head.weight and model.embed_tokens.weight, which differ"),
    ],
)
def test_two_values_of_a_shared_matrix_are_not_merged(modules, says, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    peft_model(tmp_path, modules_to_save=modules).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=says):
        merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# --- from a recipe to an answer ---------------------------------------------------------------------------------------

WITHOUT = {"new_tokens": "[]", "trained_tokens": "[]", "max_steps": 12, "learning_rate": 1e-2}


def test_a_run_trains_and_exports_them_and_resumes(place, tmp_path, capsys):
    settings = {**WITHOUT, "modules_to_save": "[embed_tokens, norm]", "save_steps": 6, "codec": "nf4"}
    train(parse(argv(place, tmp_path / "out", "plain", **settings)))
    said = capsys.readouterr().out
    assert "trained as wholes: " in said and "embed_tokens" in said
    assert "whole modules; vLLM serves no adapter with whole modules: serve the merged model" in said
    ids = torch.tensor([[1, 2, 3, 4]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    norm = merged.model.norm.weight
    assert not torch.equal(norm, base.model.norm.weight)
    # launch/evaluate.py asks the adapter as PEFT loads it
    subject = Subject.find(str(tmp_path / "out"), "adapter", None)
    with torch.no_grad():
        found = subject.load("float32", torch.device("cpu"))(input_ids=ids).logits
        torch.testing.assert_close(found, merged(ids).logits, rtol=1e-3, atol=1e-3)
    # other modules are another run
    again = ["--resume_from_checkpoint=auto", "--overwrite_output_dir=true"]
    with pytest.raises(RecipeError, match=r"modules_to_save: .* in the checkpoint"):
        train(parse([*argv(place, tmp_path / "out", "plain", **settings | {"modules_to_save": "[norm]"}), *again]))


@WIDE
def test_three_ranks_of_zero3_over_nf4_train_and_merge_them(place, tmp_path):
    settings = {**WITHOUT, "modules_to_save": "[embed_tokens, norm]", "codec": "nf4", "per_device_train_batch_size": 2}
    life = soak.live(argv(place, tmp_path / "out", "deepspeed", **settings), world=3)
    assert life.codes == [0, 0, 0], life.said[-3000:]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    assert not torch.equal(merged.model.norm.weight, base.model.norm.weight)


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"modules_to_save": "[nrom]"},
            r"modules_to_save: 'nrom' matches no module; did you mean 'norm'\? \(it can name",
        ),
        (
            {"modules_to_save": "[q_proj]"},
            "q_proj is adapted by the method; leave it out here, or out of",
        ),
        (
            {"modules_to_save": "[q_proj]", "method.target_modules": "[up_proj]"},
            "q_proj is a linear layer inside of the model, which can be adapted: name it in method.target_modules",
        ),
        ({"modules_to_save": "[mlp]"}, "is a LlamaMLP; norms, the embedding and the output layer"),
        (
            {"modules_to_save": "[embed_tokens]", "new_tokens": "[<yes>]"},
            "has rows that new_tokens or trained_tokens train",
        ),
        ({"modules_to_save": "[' ']"}, "modules_to_save: a name is empty or blank"),
        ({"modules_to_save": "[norm]", "weight_decay": 0.1}, "weight_decay: .*norm would be pulled towards zero"),
        (
            {"modules_to_save": "[norm]", "method.direction.type": "altlora", "optim": "sgd"},
            "modules_to_save: .*altlora needs optim: sgd, whose rate for pairs is none for a whole module",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(place, tmp_path, changes, says):
    recipe = parse(argv(place, tmp_path / "out", "plain", **{**WITHOUT, **changes}))
    with pytest.raises(ValueError, match=says):
        validate(recipe) or build_model(recipe, place / "model")
    assert not (tmp_path / "out").exists()


def test_the_kernel_of_liger_takes_no_norm_that_is_trained(place, tmp_path):
    """Where liger-kernel is not installed, the settings are refused for that before the model is built."""
    recipe = parse(argv(place, tmp_path / "out", "plain", **WITHOUT, modules_to_save="[norm]", use_liger_kernel=True))
    with pytest.raises(ValueError, match=r"Liger's kernel for norms would take the place of .*layernorm, which is"):
        build_model(recipe, place / "model")
