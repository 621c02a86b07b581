"""The loss of a batch, and what a run knows about the held-out examples: their loss and its own answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from llm_lowrank.data import Batches, Example, MicroBatch
from llm_lowrank.engines.base import Engine
from llm_lowrank.models.attention import joins_rows
from llm_lowrank.models.generate import accuracy
from llm_lowrank.models.loss import LossType, sum_loss
from llm_lowrank.models.noise import noisy
from llm_lowrank.run.metrics import Metrics
from llm_lowrank.run.prepare import Run

LOGGED = 8  # answers that metrics.jsonl gets from each evaluation


def batch_loss(
    model: nn.Module,
    batch: MicroBatch,
    device: torch.device,
    layer: nn.Module | None = None,
    flat: bool = False,
    smoothing: float = 0.0,
    kind: LossType = "nll",
) -> Tensor:
    """Negative log-likelihood of the trained tokens, summed, so that shares of a global batch add up to its mean.

    layer, smoothing, kind: see models/loss.py. flat: see models/packing.py.
    """
    return sum_loss(model, batch.inputs(device, flat), batch.targets(flat), layer, smoothing, kind)


def training_loss(run: Run, model: nn.Module, batch: MicroBatch) -> Tensor:
    """The summed loss of a batch that is trained on: of the recipe's loss_type, with its smoothing and its noise."""
    recipe, device, flat = run.recipe, run.engine.device, joins_rows(run.model)
    with noisy(run.model, recipe.neftune_noise_alpha, batch.attention_mask):
        return batch_loss(model, batch, device, run.loss_layer, flat, recipe.label_smoothing, recipe.loss_type)


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation on the held-out examples gave."""

    loss: float | None  # mean over the trained tokens of the held-out examples; None without any
    exact_match: float | None = None
    count: int = 0
    samples: tuple[tuple[str, str, str, float], ...] = ()  # (question, answer, expected, score)

    def __str__(self) -> str:
        loss = "no held-out examples" if self.loss is None else f"held-out loss {self.loss:.4f}"
        if self.exact_match is None:
            return loss
        return f"{loss}, exact match {self.exact_match:.1%} of {self.count} held-out questions"


def held_out_loss(
    engine: Engine,
    model: nn.Module,
    examples: Sequence[Example],
    batch_size: int,
    filler: int,
    layer: nn.Module | None = None,
) -> float:
    """Return the mean loss over the trained tokens of the examples. layer: see models/loss.py. Collective."""
    batches = Batches(examples, batch_size, pad_id=filler, rank=engine.rank, world=engine.world)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    model.eval()
    with torch.no_grad():
        for t in tqdm(range(batches.total_steps), desc="evaluate", unit="batch", leave=False, disable=not engine.main):
            for micro in batches.step(t):
                total += batch_loss(model, micro, engine.device, layer)
    return float(engine.sum(total)) / int(batches.trained.sum())


def answer_room(examples: Sequence[Example]) -> int:
    """The number of tokens that an answer may have: no answer in the data has more."""
    return max(example.trained for example in examples) + 4


def evaluate(run: Run, model: nn.Module, step: int, metrics: Metrics, kept: bool = False) -> Evaluation:
    """Return the loss on the held-out examples and, if the data has questions, the answers to them. Collective.

    model: the wrapped one. Both results are written to `metrics` under `step`. kept: the model is what it was after
    run.best.step, an earlier one, and the results are of another kind.
    """
    kind, state = ("kept", run.best.step) if kept else ("eval", step)
    examples, engine, batch_size = run.corpus.held_out, run.engine, run.recipe.per_device_eval_batch_size
    if not len(examples):
        return Evaluation(None)
    loss = held_out_loss(engine, model, examples, batch_size, run.batches.pad_id, run.loss_layer)
    evaluation = Evaluation(loss)
    if run.corpus.questions:
        report = accuracy(
            run.model,
            run.tokenizer,
            questions=run.corpus.questions,
            rank=engine.rank,
            world=engine.world,
            sum_over_ranks=engine.sum,
            max_new_tokens=answer_room(examples),
            batch_size=batch_size,
            synced=engine.shards_parameters and engine.world > 1,
        )
        evaluation = Evaluation(loss, report.exact_match, report.count, tuple(report.samples))
        metrics.write(kind, step, exact_match=report.exact_match, mean_score=report.mean_score)
        metrics.write("samples", state, answers=report.samples[:LOGGED])
    model.train()
    metrics.write(kind, step, loss=loss)
    return evaluation
