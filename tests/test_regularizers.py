"""Label smoothing is transformers', the noise NEFTune's, DFT its paper's; they are on in the steps of a run alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.trainer_pt_utils import LabelSmoother

from benchmarks import soak
from llm_lowrank.adapters.method import attach
from llm_lowrank.codecs import Dense
from llm_lowrank.data import IGNORE
from llm_lowrank.methods.lora import LoRA
from llm_lowrank.models.loss import sum_loss
from llm_lowrank.models.noise import noisy
from llm_lowrank.run.checks import validate
from llm_lowrank.run.command_line import RecipeError
from llm_lowrank.run.recipe import parse
from tests.test_loss import blocks_of
from tests.tiny import batch, llama

STEPS, STOP = 4, 2


def some_batch() -> tuple[Tensor, Tensor]:
    tokens = batch(5)
    return tokens, torch.where(
        torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.4, IGNORE, tokens
    )


def smoothed(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    mean = LabelSmoother(epsilon=smoothing)({"logits": logits}, labels, shift_labels=True)
    return mean * (labels[:, 1:] != IGNORE).sum()


def dft(logits: Tensor, labels: Tensor) -> Tensor:
    """Equation 9 of arXiv 2508.05629, from the whole distribution of every position."""
    trained = labels[:, 1:] != IGNORE
    p = logits[:, :-1][trained].double().softmax(-1).gather(-1, labels[:, 1:][trained][:, None])
    return -(p.detach() * p.log()).sum()


LOSSES = {  # what is asked for, and the loss from whole logits
    "nll": ({}, partial(smoothed, smoothing=0.0)),
    "smoothed": ({"smoothing": 0.1}, partial(smoothed, smoothing=0.1)),
    "very smooth": ({"smoothing": 0.7}, partial(smoothed, smoothing=0.7)),
    "dft": ({"kind": "dft"}, dft),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("modules", [["k_proj"], ["k_proj", "lm_head"]], ids=["frozen head", "adapted head"])
@pytest.mark.parametrize("rows", [None, 3, 1000], ids=["whole logits", "in blocks", "in one block"])
def test_the_loss_and_its_gradients_are_those_of_whole_logits(rows, modules, kind):
    tokens, labels = some_batch()
    settings, wanted = LOSSES[kind]
    found, gradients = [], []
    for ours in (True, False):
        model = llama(tie_word_embeddings=False)
        attach(model, LoRA(rank=4, target_modules=modules), Dense(torch.float32))
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        if ours:
            with blocks_of(rows or 1):
                loss = sum_loss(model, {"input_ids": tokens}, labels, model.lm_head if rows else None, **settings)
        else:
            loss = wanted(model(input_ids=tokens).logits, labels)
        loss.backward()
        found.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_the_noise_is_that_of_transformers_where_nothing_is_padded():
    model, tokens = llama(), batch(3)
    embedding, seen = model.get_input_embeddings(), []
    embedding.train()
    embedding.neftune_noise_alpha = 5.0
    torch.manual_seed(7)
    wanted = neftune_post_forward_hook(embedding, (tokens,), embedding(tokens).clone())
    handle = model.model.layers[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone()))
    torch.manual_seed(7)
    with noisy(model, 5.0, torch.ones_like(tokens)):
        model(input_ids=tokens)
    torch.testing.assert_close(seen[0], wanted, rtol=0, atol=1e-6)
    model(input_ids=tokens)  # behind the block there is none
    assert torch.equal(seen[1], embedding(tokens))
    with noisy(model, 0.0, None):
        model(input_ids=tokens)
    assert torch.equal(seen[2], seen[1])
    handle.remove()


def test_the_length_is_that_of_the_sample_and_padding_has_no_noise():
    model, tokens = llama(), batch(3)
    embedding, mask = model.get_input_embeddings(), torch.ones_like(batch(3))
    mask[1, 5:], mask[2, 2:] = 0, 0
    with noisy(model, 5.0, mask):
        noise = embedding(tokens) - embedding.weight[tokens]
    width = noise.shape[-1]
    for row, length in enumerate(mask.sum(1).tolist()):
        bound = 5.0 / (length * width) ** 0.5
        assert not noise[row, length:].any()
        assert 0.9 * bound < noise[row, :length].abs().max() <= bound * (1 + 1e-5)


def test_what_cannot_be_is_refused(tmp_path):
    for words, says in (
        (["--data.packing", "true", "--neftune_noise_alpha", "5"], "depends on the length of each"),
        (["--loss_type", "dft", "--label_smoothing", "0.1"], "gives it several labels"),
        (["--label_smoothing", "1"], "label_smoothing must be at least 0 and below 1"),
        (["--neftune_noise_alpha", "-1"], "neftune_noise_alpha must be at least 0"),
    ):
        with pytest.raises(RecipeError, match=says):
            validate(parse(["--engine", "plain", "--output_dir", str(tmp_path / "new"), *words]))


def losses(output: Path, kind: str) -> list[float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == kind and "loss" in record]


def run(place: Path, output: Path, engine: str, **changes: object) -> SimpleNamespace:
    both = {"label_smoothing": 0.2, "neftune_noise_alpha": 15, "max_steps": STEPS, "save_steps": STOP, **changes}
    life = soak.live(soak.arguments_of(place, output, engine, **both))
    assert life.codes == [0, 0], life.said[-3000:]
    train, held_out = (losses(output, kind) for kind in ("train", "eval"))
    weights = (output / "adapter" / "adapter_model.safetensors").read_bytes()
    return SimpleNamespace(train=train, held_out=held_out, weights=weights)


ENGINES = ["deepspeed", *(pytest.param(engine, marks=pytest.mark.wide) for engine in ("plain", "fsdp"))]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_with_both_resumes_bitwise(place, tmp_path, engine):
    whole = run(place, tmp_path / "whole", engine)
    stopped = tmp_path / f"whole/checkpoints/step-{STOP:06d}"
    resumed = run(place, tmp_path / "resumed", engine, resume_from_checkpoint=stopped)
    assert resumed.weights == whole.weights and resumed.train == whole.train[STOP:]


@pytest.mark.wide
@pytest.mark.parametrize("engine", ["deepspeed", "plain", "fsdp"])
@pytest.mark.parametrize(
    "on, off",
    [
        ({}, {"label_smoothing": 0}),
        ({}, {"neftune_noise_alpha": 0}),
        ({"label_smoothing": 0, "loss_type": "dft"}, {"label_smoothing": 0}),
    ],
    ids=["label_smoothing", "neftune_noise_alpha", "loss_type"],
)
def test_the_steps_have_it_and_the_held_out_loss_does_not(place, tmp_path, engine, on, off):
    with_both = run(place, tmp_path / "with", engine, **on)
    without = run(place, tmp_path / "without", engine, **off)
    assert with_both.held_out[0] == without.held_out[0]  # before the training
    assert all(abs(a - b) > 1e-4 for a, b in zip(with_both.train, without.train, strict=True))
