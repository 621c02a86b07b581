"""Answers in words: greedy batched generation, and how many of the held-out questions a model answers right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Question, pad_id


@dataclass(frozen=True)
class Report:
    exact_match: float  # share of the answers that equal the expected one
    mean_score: float  # mean of the task's own score
    count: int
    samples: list[tuple[str, str, str, float]]  # (question, answer, expected, score) of this rank's share


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int,
    synced: bool,
    progress: bool = False,
) -> list[str]:
    """The most likely answer to each question. Collective when synced (parameters sharded over the ranks: no rank may stop
    before the others), and then every rank must bring equally many questions.
    """
    filler = pad_id(tokenizer)
    answers: list[str] = []
    with _evaluating(model):
        for start in tqdm(range(0, len(questions), batch_size), desc="answer", unit="batch", disable=not progress):
            prompts = [question.prompt_ids for question in questions[start : start + batch_size]]
            longest = max(len(prompt) for prompt in prompts)
            missing = [longest - len(prompt) for prompt in prompts]  # on the left, so that all answers start at one position
            input_ids = [[filler] * gap + prompt for gap, prompt in zip(missing, prompts, strict=True)]
            attention_mask = [[0] * gap + [1] * (longest - gap) for gap in missing]
            output = model.generate(
                input_ids=torch.tensor(input_ids, device=model.device),  # (batch, longest)
                attention_mask=torch.tensor(attention_mask, device=model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,  # the model's own setting is often off for training
                eos_token_id=_ends(model, tokenizer),
                pad_token_id=filler,
                synced_gpus=synced,
            )
            answers += tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return [text.strip() for text in answers]


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rank: int,
    world: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    batch_size: int,
    synced: bool,
) -> Report:
    """Each rank answers its share; shares are filled up with questions that are not counted, so all ranks generate equally
    often. Collective.
    """
    assert questions, "no questions"
    mine = list(questions[rank::world])
    filled = mine + [questions[0]] * (ceil(len(questions) / world) - len(mine))
    answers = answer(model, tokenizer, filled, max_new_tokens, batch_size, synced, progress=rank == 0)
    samples = [(q.text, text, q.answer, q.score(text)) for q, text in zip(mine, answers, strict=False)]
    exact = sum(text == expected.strip() for _, text, expected, _ in samples)
    local = torch.tensor([exact, sum(sample[3] for sample in samples), len(mine)], dtype=torch.float64, device=model.device)
    exact, score, count = sum_over_ranks(local).tolist()
    return Report(exact / count, score / count, round(count), samples)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """Every token that ends an answer: the generation config's, and the one that training put after the answers."""
    known = model.generation_config.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
    return sorted(ends) or None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
