"""Questions with one right answer: the held-out examples of a run, and new questions of a reasoning-gym task. The task
scores the answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_lowrank.data import Data, Example, Limits, Question, load_corpus, pad_id
from llm_lowrank.data.corpus import questions_of
from llm_lowrank.data.sources import REASONING_GYM, open_dataset
from llm_lowrank.engines.plain import Plain
from llm_lowrank.evaluation.task import Metrics, TaskResult
from llm_lowrank.models.architectures import limits_of
from llm_lowrank.models.generate import accuracy
from llm_lowrank.models.loss import loss_layer
from llm_lowrank.models.stopping import stop_at
from llm_lowrank.run.held_out import answer_room, held_out_loss
from llm_lowrank.run.recipe import parse

HELD_OUT = "held_out"


@dataclass(frozen=True)
class HeldOut:
    """The examples that a run held out: the same examples, loss and answers as in the run's own evaluations."""

    tokenizer: PreTrainedTokenizerBase
    examples: Sequence[Example]
    questions: Sequence[Question]
    batch_size: int
    ends: Sequence[int] = ()  # the tokens that end the answers of the data
    name: str = HELD_OUT

    @classmethod
    def of(
        cls,
        output: Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int | None,
        batch_size: int,
        date: str = "",
        limits: Limits | None = None,
    ) -> HeldOut:
        """Read the data again that the run in `output` was trained on. date, limits: as in load_corpus. ValueError if
        the run held nothing out.
        """
        recipe = parse(["--config_path", str(output / "recipe.yaml")])
        corpus = load_corpus(recipe.data, tokenizer, recipe.seed, date, limits)
        if not len(corpus.held_out):
            raise ValueError(f"{output}: the run held no examples out (data.held_out is 0); choose other tasks")
        examples = [corpus.held_out[index] for index in range(len(corpus.held_out))]
        return cls(tokenizer, examples[:limit], corpus.questions[:limit], batch_size, tuple(corpus.ends))

    def run(self, model: PreTrainedModel) -> TaskResult:
        engine = Plain()
        stop_at(model, self.ends)
        layer, _ = loss_layer(engine, model, model)
        filler = pad_id(self.tokenizer, limits_of(model).vocabulary)
        loss = held_out_loss(engine, model, self.examples, self.batch_size, filler, layer)
        metrics: Metrics = {"loss": loss, "n": len(self.examples)}
        if not self.questions:
            return TaskResult({self.name: metrics})
        room = answer_room(self.examples)
        scores, answers = score(model, self.tokenizer, self.questions, max_new_tokens=room, batch_size=self.batch_size)
        # with several datasets only some examples may be questions: both numbers are reported
        return TaskResult({self.name: {"questions": scores.pop("n"), **scores, **metrics}}, answers)


@dataclass(frozen=True)
class ReasoningGym:
    """Questions of the task reasoning-gym:NAME. The same seed draws other questions here than in training."""

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
        *,
        settings: dict[str, Any],
        style: str,
        system: str,
        size: int,
        seed: int,
        max_new_tokens: int,
        batch_size: int,
        date: str = "",
    ) -> ReasoningGym:
        """Generate `size` questions. settings: of the task. date: as in load_corpus. ValueError if the task or a
        setting does not exist.
        """
        drawn = random.Random(f"evaluation {seed}").getrandbits(31)
        dataset = open_dataset(name, Data(dataset=name, size=size, held_out=0, task=settings), drawn)
        rows = range(len(dataset.rows))
        questions = questions_of(dataset, rows, tokenizer=tokenizer, style=style, system=system, date=date)
        return cls(name, tokenizer, questions, max_new_tokens, batch_size)

    def run(self, model: PreTrainedModel) -> TaskResult:
        scores, answers = score(
            model,
            self.tokenizer,
            self.questions,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )
        return TaskResult({self.name: scores}, answers)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> tuple[Metrics, list[dict[str, Any]]]:
    """Ask the model. Return exact_match, mean_score and n, and a row for every answer."""
    report = accuracy(
        model,
        tokenizer,
        questions=questions,
        rank=0,
        world=1,
        sum_over_ranks=lambda local: local,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        synced=False,
    )
    answers = [dict(zip(("question", "answer", "expected", "score"), sample, strict=True)) for sample in report.samples]
    return {"exact_match": report.exact_match, "mean_score": report.mean_score, "n": report.count}, answers


def is_reasoning_gym(name: str) -> bool:
    """Return whether a task is one of reasoning-gym."""
    return name.startswith(REASONING_GYM)
