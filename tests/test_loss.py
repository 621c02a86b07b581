"""The loss made in the output layer is that of whole logits, and its gradients too, on every engine; where it would not
be, it is seen.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks import soak
from llm_lowrank.adapters.method import Method, attach
from llm_lowrank.codecs import Dense, Nf4
from llm_lowrank.data import IGNORE
from llm_lowrank.engines.frozen import FrozenLinear
from llm_lowrank.engines.plain import Plain
from llm_lowrank.methods.dora import DoRA
from llm_lowrank.methods.droplora import DropLoRA
from llm_lowrank.methods.flat_lora import FlatLoRA
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.methods.lora_ga import LoRAGA
from llm_lowrank.methods.losia import LoSiA
from llm_lowrank.methods.rasa import RaSA
from llm_lowrank.models import loss
from llm_lowrank.models.loss import loss_layer, sum_loss
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import ranks
from tests.tiny import VOCABULARY, Trainee, batch, llama

MODULES = ["k_proj", "down_proj"]
HEAD = dict(rank=4, target_modules=[*MODULES, "lm_head"])
ROWS = 3  # of logits at a time
METHODS: dict[str, Method] = {
    "frozen": LoRA(rank=4, target_modules=MODULES),
    "lora": LoRA(**HEAD),
    "dora": DoRA(**HEAD),
    "droplora": DropLoRA(**HEAD, mask="step"),
    "flat_lora": FlatLoRA(**HEAD, sigma=0.5),
    "lora_ga": LoRAGA(**HEAD, samples=6, svd_niter=1),
    "losia": LoSiA(factor=0.5, output_factor=0.5, period=1, rewarm_steps=2, target_modules=MODULES),
    "losia-whole-gradients": LoSiA(factor=0.5, output_factor=0.5, period=1, target_modules=MODULES, pro=False),
}


@contextmanager
def blocks_of(rows: int) -> Iterator[list[int]]:
    """Yields the rows of logits that were made at a time."""
    made: list[int] = []
    block, nll = loss.BLOCK, loss.nll
    loss.BLOCK, loss.nll = (
        rows * VOCABULARY + 1,
        lambda logits, labels, smoothing=0.0: [made.append(len(logits)), nll(logits, labels, smoothing)][1],
    )
    try:
        yield made
    finally:
        loss.BLOCK, loss.nll = block, nll


def some_labels(tokens: Tensor, seed: int = 0) -> Tensor:
    """Two of three are not trained; one sample has none, one has its first token, which nothing predicts."""
    dropped = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < 2 / 3
    dropped[0], dropped[1, 0], dropped[-1, -1] = True, False, False
    return torch.where(dropped, IGNORE, tokens)


def adapted(method: Method, **changes: object) -> transformers.PreTrainedModel:
    model = llama(tie_word_embeddings=False, **changes)
    adapters = attach(model, method, Dense(torch.float32))
    random = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if p.requires_grad and name.endswith(".B"):  # zero at the start, and A would have no gradient
            nn.init.normal_(p, std=0.1, generator=random)
    for adapter in adapters:
        if isinstance(method, DoRA):
            for p in (adapter.magnitude, adapter.norms):
                p.data.copy_(adapter.weight.norm(dim=1))
        adapter.started()
    method.batch(adapters, 0, list(range(6)))
    return model


def both(model: nn.Module, tokens: Tensor, labels: Tensor) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients: from whole logits, and in the output layer in blocks of ROWS."""
    found = []
    for layer in (None, model.get_output_embeddings()):
        with blocks_of(ROWS):
            value = sum_loss(model, {"input_ids": tokens}, labels, layer)
            (value * 0.37).backward()  # not a power of two
        found.append((float(value.detach()), {k: p.grad for k, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    return found


def same(wanted: tuple[float, dict[str, Tensor]], found: tuple[float, dict[str, Tensor]], bound: float = 1e-5) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=bound)
    assert found[1].keys() == wanted[1].keys() and wanted[1]
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= bound * gradient.norm(), name


# --- one process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_value_and_gradients_are_those_of_whole_logits(method, checkpointed):
    model = adapted(METHODS[method]).train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = batch(0)
    wanted, found = both(model, tokens, some_labels(tokens))
    assert wanted[0] > 1 and any("lm_head" in name for name in wanted[1]) == (method != "frozen")
    same(wanted, found)


def test_what_losia_records_is_the_gradient_of_the_scaled_loss():
    model = adapted(METHODS["losia"]).train()
    head, tokens = model.get_output_embeddings(), batch(0)
    head.record = head.record_gradient
    told = []
    for layer in (None, head):
        head.dense = None
        with blocks_of(ROWS):
            (sum_loss(model, {"input_ids": tokens}, some_labels(tokens), layer) * 0.37).backward()
        told.append(head.dense)
    assert told[0].abs().max() > 0.01 and torch.allclose(told[1], told[0], rtol=1e-4, atol=1e-6)


def test_a_tied_layer_and_one_with_codes_and_a_bias():
    tokens = batch(0)
    tied = llama()
    attach(tied, METHODS["frozen"], Dense(torch.float32))
    same(*both(tied, tokens, some_labels(tokens)))
    coded = adapted(METHODS["frozen"])
    linear = nn.Linear(42, VOCABULARY)
    coded.set_output_embeddings(FrozenLinear(linear, Nf4()))
    same(*both(coded, tokens, some_labels(tokens)))


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_logits_are_made_of_trained_positions_only_and_a_block_at_a_time(method):
    model, tokens = adapted(METHODS[method]), batch(0)
    labels = some_labels(tokens)
    trained = int((labels[:, 1:] != IGNORE).sum())
    assert ROWS < trained < tokens.numel() / 2 and trained % ROWS
    for grad in (True, False):
        with blocks_of(ROWS) as made, torch.set_grad_enabled(grad):
            sum_loss(model, {"input_ids": tokens}, labels, model.get_output_embeddings())
        assert max(made) == ROWS and sum(made) == trained
        with blocks_of(trained) as made, torch.set_grad_enabled(grad):
            value = sum_loss(model, {"input_ids": tokens}, labels, model.get_output_embeddings())
        assert made == [trained]
    with blocks_of(trained) as made:  # one block: nothing is computed again
        sum_loss(model, {"input_ids": tokens}, labels, model.get_output_embeddings()).backward()
    assert made == [trained]
    with torch.no_grad():
        assert float(value) == pytest.approx(float(sum_loss(model, {"input_ids": tokens}, labels, None)), rel=1e-6)


def test_only_what_is_trained_on_the_layer_makes_it_compute_a_block_twice():
    for method, times in (("frozen", 1), ("lora", 2)):
        model, tokens = adapted(METHODS[method]), batch(0)
        labels = some_labels(tokens)
        with blocks_of(ROWS) as made:
            sum_loss(model, {"input_ids": tokens}, labels, model.get_output_embeddings()).backward()
        assert sum(made) == times * int((labels[:, 1:] != IGNORE).sum())


@pytest.mark.parametrize("method", ["frozen", "lora", "losia"])
def test_a_batch_without_a_trained_position_has_a_loss_of_zero_and_gradients_of_zero(method):
    model, tokens = adapted(METHODS[method]), batch(0)
    labels = torch.full_like(tokens, IGNORE)
    labels[:, 0] = 5  # nothing is before it
    wanted, found = both(model, tokens, labels)
    assert wanted[0] == found[0] == 0 and wanted[1].keys() == found[1].keys()
    assert all(not gradient.any() for gradient in found[1].values())


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_bfloat16_is_as_near_to_float32_as_whole_logits_are(method):
    tokens = batch(0)
    labels = some_labels(tokens)
    exact = both(adapted(METHODS[method]), tokens, labels)[0]
    model = adapted(METHODS[method])
    for p in model.parameters():
        p.data = p.data if p.requires_grad else p.data.bfloat16()
    wanted, found = both(model, tokens, labels)

    def far(other: tuple[float, dict[str, Tensor]]) -> list[float]:
        return [
            abs(other[0] - exact[0]) / exact[0],
            *(float((other[1][k] - g).norm() / g.norm()) for k, g in exact[1].items()),
        ]

    assert far(wanted)[0] > 0 and all(
        mine <= 1.3 * theirs + 1e-3 for mine, theirs in zip(far(found), far(wanted), strict=True)
    )


@pytest.mark.parametrize("method", ["frozen", "lora"])
def test_autocast(method):
    model, tokens = adapted(METHODS[method]), batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        # the gradient is rounded to bfloat16 in other places
        same(*both(model, tokens, some_labels(tokens)), bound=3e-2)


def test_the_model_answers_with_logits_again_afterwards():
    model, tokens = adapted(METHODS["lora"]), batch(0)
    before = model(input_ids=tokens).logits
    sum_loss(model, {"input_ids": tokens}, tokens, model.get_output_embeddings())
    with pytest.raises(AssertionError):  # labels of another batch
        sum_loss(model, {"input_ids": tokens}, tokens[1:], model.get_output_embeddings())
    assert torch.equal(model(input_ids=tokens).logits, before)


# --- models in which it would be wrong --------------------------------------------------------------------------------

SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=12,
    pad_token_id=0,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, good", [("Gemma2", False), ("Granite", False), ("Cohere", False), ("Qwen2", True), ("Mistral", True)]
)
def test_a_model_that_changes_logits_after_the_layer_is_noticed(family, good, dtype):
    extra = {"logits_scaling": 1.01} if family == "Granite" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    layer, reason = loss_layer(Plain(), model, model)
    assert (layer is model.get_output_embeddings()) if good else layer is None
    assert reason == ("" if good else f"{family}ForCausalLM changes logits after its output layer")


def test_a_loss_that_is_not_that_of_the_logits_is_noticed(monkeypatch):
    model, right = llama(), loss._answer
    monkeypatch.setattr(loss, "_answer", lambda *args: right(*args) * 1.001)
    assert loss_layer(Plain(), model, model) == (
        None,
        "the loss made in the output layer is 1e-03 away from that of the logits",
    )


@pytest.mark.parametrize("mask, good", [("token", False), ("sample", False), ("step", True)])
def test_a_mask_that_is_drawn_by_position_needs_whole_logits(mask, good):
    model = adapted(DropLoRA(**HEAD, mask=mask))
    layer, reason = loss_layer(Plain(), model, model)
    assert (layer is not None) == good and ("where in the batch" in reason) != good
    model = adapted(DropLoRA(rank=4, target_modules=MODULES, mask=mask))
    assert loss_layer(Plain(), model, model)[0] is model.lm_head


def test_looking_leaves_the_model_and_the_random_numbers_as_they_were():
    model = adapted(LoRA(**HEAD, dropout=0.5))
    for training in (True, False):
        model.train(training)
        state = torch.random.get_rng_state()
        assert loss_layer(Plain(), model, model)[0] is model.lm_head
        assert torch.equal(torch.random.get_rng_state(), state) and model.lm_head.training == training
    assert not model.lm_head._forward_hooks and "forward" not in vars(model.lm_head)


def test_dropout_is_the_same_when_a_block_is_computed_again():
    """Of two equal seeds: the gradient of the blocks' loss by finite differences is the one that backward gave."""
    model, tokens = adapted(LoRA(**HEAD, dropout=0.5)).train(), batch(0)
    head = model.lm_head

    def value() -> Tensor:
        torch.manual_seed(3)
        with blocks_of(ROWS):
            return sum_loss(model, {"input_ids": tokens}, some_labels(tokens), head)

    value().backward()
    gradient, step = head.B.grad, 1e-2
    ahead = gradient / gradient.norm()
    sides = []
    for sign in (1, -1):
        head.B.data.add_(ahead, alpha=sign * step)
        sides.append(float(value().detach()))
        head.B.data.sub_(ahead, alpha=sign * step)
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(float(gradient.norm()), rel=1e-2)


# --- engines ----------------------------------------------------------------------------------------------------------

SHARED = RaSA(**HEAD, k=1)


def trained(method: Method, engine_name: str, blocks: bool) -> dict[str, object]:
    """Two steps of two micro-batches, of which rank 0's first trains nothing: losses, gradients, what the method
    remembers.
    """
    t = Trainee(method, engine_name, samples=8, accumulation=2, tie_word_embeddings=False)
    if blocks:
        t.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer, reason = loss_layer(t.engine, t.model, t.wrapped)
    assert layer is t.model.get_output_embeddings() and not reason
    t.model.train()
    found: dict[str, object] = {}
    with blocks_of(ROWS) as made:
        for step in range(2):
            tokens = batch(step, 8)
            labels = some_labels(tokens, step)
            labels[: 8 // 2 // t.engine.world] = IGNORE
            shares = [whole.view(2, t.engine.world, -1, 8)[:, t.engine.rank] for whole in (tokens, labels)]
            numbers = torch.arange(8).view(2, t.engine.world, -1)[:, t.engine.rank].tolist()
            total = torch.zeros(())
            for ids, wanted, samples in zip(*shares, numbers, strict=True):
                t.method.batch(t.adapters, step, samples)
                value = sum_loss(t.wrapped, {"input_ids": ids}, wanted, layer if blocks else None) / 29
                t.engine.backward(value)
                total += value.detach()
            t.method.observe(t.adapters, t.engine)
            found[f"loss {step}"] = t.engine.sum(total)
            found |= {f"gradient {i} {step}": t.engine.gradient(p).clone() for i, p in enumerate(t.engine.params)}
            found |= {f"{a.name} mean {step}": a.memory["mean"].clone() for a in t.adapters if "mean" in a.memory}
            t.engine.step(*t.method.rates(t.adapters, step, 10, lambda step: 1e-2))
        with torch.no_grad():
            t.model.eval()
            tokens = batch(9, 4)
            found["held out"] = sum_loss(
                t.wrapped, {"input_ids": tokens}, some_labels(tokens), layer if blocks else None
            )
    assert not blocks or max(made) == ROWS
    return found | t.values()


def compared(method: Method, engine_name: str) -> list[str]:
    """What is not the same to rounding."""
    whole, blocks = (trained(method, engine_name, blocks) for blocks in (False, True))
    assert whole.keys() == blocks.keys() and any("gradient" in name for name in whole) and float(whole["loss 1"]) > 0.1
    return [name for name, value in whole.items() if not torch.allclose(blocks[name], value, rtol=1e-4, atol=2e-6)]


CELLS = [
    *(
        (method, *place)
        for method in ("frozen", "lora", "losia")
        for place in (("plain", 2), ("zero3", 2), ("fsdp", 2))
    ),
    ("losia", "plain", 1),
    ("lora", "zero2", 2),
    ("rasa", "zero3", 2),
]


@pytest.mark.parametrize("method, engine_name, world", CELLS)
def test_training_is_the_same_as_with_whole_logits(method, engine_name, world):
    assert ranks.run(world, compared, METHODS.get(method, SHARED), engine_name) == [[]] * world


# --- a whole run ------------------------------------------------------------------------------------------------------


def run(place: Path, output: Path, **changes: object) -> list[tuple[str, int, float]]:
    """Every loss that a short run has reported."""
    settings = {
        "max_steps": 3,
        "save_steps": 0,
        "eval_steps": 1,
        "method.type": "lora",
        "resume_from_checkpoint": "none",
        **changes,
    }
    argv = soak.arguments_of(place, output, "plain", **settings)
    train(parse([word for word in argv if not word.startswith(("--method.target_rank", "--method.svd_cache"))]))
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(record["kind"], record["step"], record["loss"]) for record in records if "loss" in record]


def test_a_run_trains_and_evaluates_by_blocks_where_the_model_allows_it_and_says_where_not(
    place, tmp_path, capsys, monkeypatch
):
    with blocks_of(ROWS) as made:  # fits three rows of 67 words; this model has 257
        by_blocks = run(place, tmp_path / "blocks")
    said = capsys.readouterr().out
    assert "attention: sdpa, for flash_attention_2 needs " in said and "whole logits" not in said
    assert set(made) <= {0, 1, 7}  # 7: the look at whole logits before the run

    base = transformers.AutoConfig.from_pretrained(place / "model")
    shape = dict(
        vocab_size=base.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    granite = transformers.GraniteForCausalLM(transformers.GraniteConfig(**shape, logits_scaling=2.0))
    shutil.copytree(place / "model", tmp_path / "granite")
    granite.save_pretrained(tmp_path / "granite")
    run(place, tmp_path / "scaled", model_name_or_path=tmp_path / "granite")
    assert (
        "the loss is made from whole logits: GraniteForCausalLM changes logits after its output layer"
        in capsys.readouterr().out
    )

    monkeypatch.setattr("llm_lowrank.run.proofs.loss_layer", lambda *_: (None, ""))
    whole = run(place, tmp_path / "whole")
    assert len(whole) >= 7 and [row[:2] for row in by_blocks] == [row[:2] for row in whole]
    assert [row[2] for row in by_blocks] == pytest.approx([row[2] for row in whole], rel=1e-5)
