"""Questions with one right answer: the run's own held-out examples, and new ones of a reasoning-gym task, scored as the
task says.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_lowrank.data import Data, Example, Question, load, pad_id
from llm_lowrank.data.corpus import questions_of
from llm_lowrank.data.sources import REASONING_GYM, read
from llm_lowrank.engines.plain import Plain
from llm_lowrank.evaluation.task import Found, Metrics
from llm_lowrank.models.generate import accuracy
from llm_lowrank.models.loss import loss_layer
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.held_out import answer_room, held_out_loss

HELD_OUT = "held_out"


@dataclass(frozen=True)
class HeldOut:
    """What the run kept out of its training: the same examples, loss and answers as in its own evaluations."""

    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]
    questions: Sequence[Question]
    batch_size: int
    name: str = HELD_OUT

    @classmethod
    def of(cls, output: Path, tokenizer: PreTrainedTokenizerBase, limit: int | None, batch_size: int) -> HeldOut:
        recipe = parse(["--config_path", str(output / "recipe.yaml")])
        corpus = load(recipe.data, tokenizer, recipe.seed)
        if not len(corpus.held_out):
            raise ValueError(f"{output}: the run held no examples out (data.held_out is 0); choose other tasks")
        examples = [corpus.held_out[index] for index in range(len(corpus.held_out))]
        return cls(tokenizer, examples[:limit], corpus.questions[:limit], batch_size)

    def run(self, model: PreTrainedModel) -> Found:
        engine = Plain()
        layer, _ = loss_layer(engine, model, model)
        loss = held_out_loss(engine, model, self.examples, self.batch_size, pad_id(self.tokenizer), layer)
        metrics: Metrics = {"loss": loss, "n": len(self.examples)}
        if not self.questions:
            return Found({self.name: metrics})
        scores, answers = score(model, self.tokenizer, self.questions, answer_room(self.examples), self.batch_size)
        # of several datasets only some ask
        return Found({self.name: {"questions": scores.pop("n"), **scores, **metrics}}, answers)


@dataclass(frozen=True)
class ReasoningGym:
    """reasoning-gym:NAME. The seed draws other questions than the same seed does in training."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    questions: Sequence[Question]
    max_new_tokens: int
    batch_size: int

    @classmethod
    def of(
        cls,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        style: str,
        system: str,
        size: int,
        seed: int,
        max_new_tokens: int,
        batch_size: int,
    ) -> ReasoningGym:
        part = read(
            name,
            Data(dataset=name, size=size, held_out=0, task=settings),
            random.Random(f"evaluation {seed}").getrandbits(31),
        )
        questions = questions_of(part, range(len(part.rows)), tokenizer, style, system)
        return cls(name, tokenizer, questions, max_new_tokens, batch_size)

    def run(self, model: PreTrainedModel) -> Found:
        scores, answers = score(model, self.tokenizer, self.questions, self.max_new_tokens, self.batch_size)
        return Found({self.name: scores}, answers)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int,
) -> tuple[Metrics, list[dict[str, Any]]]:
    report = accuracy(model, tokenizer, questions, 0, 1, lambda local: local, max_new_tokens, batch_size, synced=False)
    answers = [dict(zip(("question", "answer", "expected", "score"), sample, strict=True)) for sample in report.samples]
    return {"exact_match": report.exact_match, "mean_score": report.mean_score, "n": report.count}, answers


def is_reasoning_gym(name: str) -> bool:
    return name.startswith(REASONING_GYM)
