"""New tokens and trained rows: one parameter of rows beside frozen matrices, on every engine, resumed and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import soak
from llm_lowrank.adapters.tokens import TrainedTokens
from llm_lowrank.evaluation.subject import Subject
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models import loss
from llm_lowrank.models.export import save_adapter
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from llm_lowrank.models.vocabulary import token_rows
from llm_lowrank.run.build import build_model
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import ranks
from tests.test_data import write_jsonl
from tests.test_laws import METHODS
from tests.test_offload import CPU
from tests.tiny import VOCABULARY, Trainee, batch, check_resumes_bitwise, check_trains_alike, llama

METHOD = LoRA(rank=3, target_modules=["q_proj", "down_proj"])
# two old tokens, a spare row of the matrix that starts anew, and three tokens beyond it
TOKENS = TrainedTokens(
    VOCABULARY,
    {5: "five", 30: "thirty", 66: "<spare>", 67: "<a>", 68: "<b>", 69: "<c>"},
    frozenset({66, 67, 68, 69}),
    {68: [1, 2]},
)
STEPS = 3


def trainee(engine: str = "plain", dtype: str = "fp32", **settings: object) -> Trainee:
    return Trainee(METHOD, engine, dtype, tokens=TOKENS, **settings)


def resized(tied: bool) -> nn.Module:
    """The model with matrices of 70 rows, as a naive program would make it, that starts as the trained rows do."""
    model = llama(tie_word_embeddings=tied)
    matrices = (
        [model.get_input_embeddings().weight]
        if tied
        else [p.weight for p in (model.get_input_embeddings(), model.lm_head)]
    )
    starts = [start(w.detach()) for w in matrices]
    model.resize_token_embeddings(TOKENS.size, mean_resizing=False)
    with torch.no_grad():
        for layer, rows in zip(
            (model.get_input_embeddings(), model.lm_head), starts if len(starts) == 2 else starts * 2, strict=True
        ):
            layer.weight[list(TOKENS.names)] = rows
    return model


def start(w: Tensor) -> Tensor:
    mean = w.double().mean(0)
    return torch.stack([w[5].double(), w[30].double(), mean, mean, w[[1, 2]].double().mean(0), mean]).float()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_rows_train_as_those_of_resized_matrices(tied):
    t = trainee(tie_word_embeddings=tied)
    theirs = resized(tied)
    torch.testing.assert_close(t.logits(), theirs(input_ids=batch(99, vocabulary=70)).logits, rtol=1e-5, atol=1e-6)
    before = {k: v.clone() for k, v in t.model.state_dict().items() if "token_rows" not in k and "lora" not in k}
    # the same step by autograd over whole matrices, with gradients of the rows alone
    found = t.forward_backward(0)
    ids = batch(0, vocabulary=70)
    logits = theirs(input_ids=ids).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    rows = token_rows(t.model)
    torch.testing.assert_close(
        rows.embedding.grad, theirs.get_input_embeddings().weight.grad[list(TOKENS.names)], rtol=1e-4, atol=1e-7
    )
    assert (rows.output is None) is tied
    if not tied:
        torch.testing.assert_close(
            rows.output.grad, theirs.lm_head.weight.grad[list(TOKENS.names)], rtol=1e-4, atol=1e-7
        )
    t.update(0)
    for k in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(t.model.state_dict()[k], before[k]), "the base's bytes change never"


@pytest.mark.parametrize(
    "engine, world, dtype, tied",
    [
        ("plain", 2, "fp32", True),
        pytest.param("zero1", 2, "fp32", False, marks=pytest.mark.wide),
        pytest.param("zero2", 3, "fp32", False, marks=pytest.mark.wide),
        pytest.param("zero3", 2, "int8", False, marks=pytest.mark.wide),
        pytest.param("zero3", 3, "nf4", True, marks=pytest.mark.wide),
        ("zero3", 3, "nf4", False),
        ("fsdp", 2, "nf4", True),
        pytest.param("fsdp", 2, "fp32", False, marks=pytest.mark.wide),
    ],
)
def test_the_rows_train_alike_on_every_engine(engine, world, dtype, tied):
    values = check_trains_alike(METHOD, engine, world, dtype, tokens=TOKENS, tie_word_embeddings=tied)
    assert {"token_rows.embedding"} <= values.keys()


@pytest.mark.parametrize(
    "engine, offload",
    [
        ("zero2", {"offload_optimizer": CPU}),
        ("zero3", {"offload_optimizer": CPU, "offload_param": CPU}),
        ("fsdp", {"cpu_offload": True}),
    ],
)
def test_rows_that_lie_on_the_host_between_uses_train_alike(engine, offload):
    check_trains_alike(METHOD, engine, 2, "nf4", offload, tokens=TOKENS, tie_word_embeddings=False)


@pytest.mark.wide
def test_few_rows_of_many_ranks_and_micro_batches():
    """One row on three ranks, two of which hold nothing of it, under both kinds of checkpointing."""
    wanted, _ = ranks.run(1, one_row, "plain", None)[0]
    for engine, reentrant in (("zero3", None), ("zero3", False), ("fsdp", False), ("zero3", True)):
        for found, row in ranks.run(3, one_row, engine, reentrant):
            assert found == pytest.approx(wanted, rel=2e-6), (engine, reentrant)
            assert row.shape == (1, 42)


def one_row(engine: str, reentrant: bool | None) -> tuple[list[float], Tensor]:
    tokens = TrainedTokens(VOCABULARY, {7: "seven"}, frozenset())
    t = Trainee(METHOD, engine, tokens=tokens, accumulation=2)
    if reentrant is not None:
        t.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        t.model.enable_input_require_grads()
    return [t.step(step) for step in range(2)], t.values()["token_rows.embedding"]


# --- the loss inside of the output layer ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("block", [2**25, 3 * 70], ids=["whole", "blocks"])
def test_the_loss_in_the_layer_knows_the_rows(tied, block, monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", block)
    t = trainee(tie_word_embeddings=tied)
    layer, why = loss.loss_layer(t.engine, t.model, t.wrapped)
    assert layer is t.model.lm_head and not why
    ids, found = batch(0, vocabulary=70), []
    for where in (None, layer):
        total = loss.sum_loss(t.wrapped, {"input_ids": ids}, ids, where)
        found.append((total.item(), *torch.autograd.grad(total, list(token_rows(t.model).parameters()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


# --- resume -----------------------------------------------------------------------------------------------------------


WIDE = pytest.mark.wide
RESUMED = [
    ("zero3", 3, "nf4"),
    *(pytest.param(*case, marks=WIDE) for case in [("fsdp", 2, "nf4"), ("zero2", 2, "fp32")]),
]


@pytest.mark.parametrize("engine, world, dtype", RESUMED)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(engine, world, dtype, tmp_path):
    wanted = check_resumes_bitwise(METHOD, engine, world, dtype, tmp_path, tokens=TOKENS)
    assert any(name.startswith("token_rows.embedding.") for name in wanted)


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("engine, world", [("plain", 1), pytest.param("zero3", 3, marks=pytest.mark.wide)])
def test_peft_and_plain_transformers_answer_as_the_trained_model(engine, world, tied, tmp_path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    wanted = ranks.run(world, exported, engine, tied, str(tmp_path / "adapter"))[0]
    ids = batch(99, vocabulary=70)

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {
        layer: [5, 30, 66, 67, 68, 69] for layer in ("embed_tokens", "lm_head")[: 1 if tied else 2]
    }
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    with torch.no_grad():
        peft = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(peft, wanted, rtol=1e-4, atol=1e-5)

    merged = merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
    assert len(merged.lost) == 4
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == len(model.lm_head.weight) == 70
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-4, atol=1e-5)


def exported(engine: str, tied: bool, folder: str) -> Tensor:
    t = trainee(engine, tie_word_embeddings=tied)
    for step in range(STEPS):
        t.step(step)
    save_adapter(t.engine, t.adapters, method=METHOD, path=folder, base_model_name_or_path="base", model=t.model)
    return t.logits().cpu()


@pytest.mark.parametrize("tied, tokens", [(True, [1, 2]), (False, {"embed_tokens": [2, 1], "lm_head": [3]})])
def test_an_adapter_that_peft_wrote_is_merged(tied, tokens, tmp_path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["up_proj"], trainable_token_indices=tokens)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 4)
    model.save_pretrained(tmp_path / "adapter")
    merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), batch(99)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_base_that_stores_a_tied_output_layer_too_gets_the_rows_in_both(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    exported("plain", True, str(tmp_path / "adapter"))
    merge(Source.open(str(tmp_path / "base")), tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert (
        torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
        and len(merged["lm_head.weight"]) == 70
    )


# --- every method -----------------------------------------------------------------------------------------------------


FEW = ("lora", "lora-b-rate", "srlora-bank", "rasa", "losia-weight", "sora")


@pytest.mark.parametrize("method", [m if m in FEW else pytest.param(m, marks=pytest.mark.wide) for m in METHODS])
def test_every_method_trains_rows_beside_its_adapters(method):
    t = Trainee(METHODS[method], "plain", tokens=TOKENS, total=4)
    before = t.values()["token_rows.embedding"].clone()
    for step in range(2):
        t.step(step)
    assert not torch.equal(t.values()["token_rows.embedding"], before)


# --- from a recipe to an answer ---------------------------------------------------------------------------------------

PLAN = {
    "method.type": "lora",
    "max_steps": 30,
    "learning_rate": 5e-2,
    "warmup_steps": 0,
    "per_device_train_batch_size": 6,
    "new_tokens": "[<yes>, <no>]",
    "trained_tokens": "[k]",
    "report_to": "none",
    "save_merged": True,
}


def argv(folder: Path, output: Path, engine: str, **changes: object) -> list[str]:
    rows = [{"prompt": f"{i} ok?", "completion": f"{'<yes>' if i % 2 else '<no>'}{i}"} for i in range(60)]
    write_jsonl(folder / "tokens.jsonl", rows)
    chosen = {**PLAN, "data.dataset": folder / "tokens.jsonl", **changes}
    kept = soak.arguments_of(folder, output, engine, **chosen)
    return [a for a in kept if not a.startswith(("--method.target_rank", "--method.svd_cache"))]


def answer(folder: Path, prompt: str) -> str:
    """What plain transformers answers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=1, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :])


def test_a_run_teaches_a_new_token_and_the_merged_model_answers_with_it(place, tmp_path, capsys):
    train(parse(argv(place, tmp_path / "out", "plain", save_steps=20)))
    said = capsys.readouterr().out
    size = len(AutoTokenizer.from_pretrained(place / "model"))
    assert "tokens: 2 new, which start as the mean of all rows: <yes> <no>; 1 trained: k" in said
    assert f"a merged model has {size + 2} rows, the base {size}" in said and "in no example" not in said
    assert "rows of 3 tokens; vLLM serves no adapter with rows of tokens: serve the merged model" in said
    assert answer(tmp_path / "out" / "merged", "7 ok?") in ("<yes>", "<no>")
    # PEFT's own class adds the rows by itself, for the tokenizer lies in the folder
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    ids = torch.tensor([[1, 2, size, 3, size + 1]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(ids).logits, rtol=1e-3, atol=1e-4)
    # launch/evaluate.py asks the adapter with its own tokenizer
    subject = Subject.find(str(tmp_path / "out"), "adapter", None)
    assert subject.limits.vocabulary == size + 2 and subject.tokenizer().tokenize("<yes>") == ["<yes>"]
    with torch.no_grad():
        found = subject.load("float32", torch.device("cpu"))(input_ids=ids).logits
    torch.testing.assert_close(found, merged(ids).logits, rtol=1e-3, atol=1e-4)
    # another set of tokens is another run
    again = ["--resume_from_checkpoint=auto", "--overwrite_output_dir=true"]
    with pytest.raises(RecipeError, match=r"new_tokens: .* in the checkpoint"):
        train(parse([*argv(place, tmp_path / "out", "plain", save_steps=20, new_tokens="[<yes>]"), *again]))


def test_a_token_that_no_example_has_is_named(place, tmp_path, capsys):
    changes = {"new_tokens": "[<yes>, <yea>]", "max_steps": 1, "save_merged": False}
    train(parse(argv(place, tmp_path / "out", "plain", **changes)))
    assert "tokens: <yea>: in no example of the data" in capsys.readouterr().out


@pytest.mark.wide
def test_three_ranks_of_zero3_over_nf4_teach_a_new_token(place, tmp_path):
    arguments = argv(place, tmp_path / "out", "deepspeed", codec="nf4", per_device_train_batch_size=2)
    life = soak.live(arguments, world=3)
    assert life.codes == [0, 0, 0], life.said[-3000:]
    assert answer(tmp_path / "out" / "merged", "7 ok?") in ("<yes>", "<no>")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"new_tokens": "[q]"}, "new_tokens: 'q' is a token of this tokenizer already, number .*trained_tokens"),
        (
            {"trained_tokens": "[<maybe>]"},
            "trained_tokens: '<maybe>' is no token of this tokenizer, which cuts it into",
        ),
        ({"method.target_modules": "[lm_head]"}, "the method adapts lm_head, the output layer, whose rows they train"),
        ({"trained_tokens": "[<yes>]"}, "new_tokens, trained_tokens: '<yes>' is named twice"),
        ({"trained_tokens": "['']"}, "a token is empty or blank"),
        (
            {"new_tokens": "[]", "new_tokens_start": "pieces"},
            "new_tokens_start says how new_tokens begin, and there are",
        ),
        (
            {"method.direction.type": "altlora", "optim": "sgd"},
            "altlora needs optim: sgd, whose rate for pairs is none",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(place, tmp_path, changes, says):
    recipe = parse(argv(place, tmp_path / "out", "plain", **changes))
    with pytest.raises(ValueError, match=says):
        validate(recipe) or train(recipe)


def test_pieces_start_a_new_token_at_the_mean_of_what_its_text_was(place):
    recipe = parse([*argv(place, place / "none", "plain", new_tokens_start="pieces"), "--save_merged=false"])
    model, _ = build_model(recipe, place / "model")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokens = token_rows(model).tokens
    assert list(tokens.pieces.values()) == [tokenizer("<yes>")["input_ids"], tokenizer("<no>")["input_ids"]]
    assert "the mean of the rows of their old pieces" in tokens.describe()
