"""Batched generation, greedy or sampled, and the share of held-out questions that a model answers correctly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from llm_lowrank.data import Question, pad_id
from llm_lowrank.engines.frozen import codes_multiplied
from llm_lowrank.models.architectures import limits_of
from llm_lowrank.models.attention import with_masks
from llm_lowrank.models.compiling import eagerly
from llm_lowrank.models.stopping import stops_of


@dataclass(frozen=True)
class Report:
    """The result of held-out questions, over all ranks."""

    exact_match: float  # share of the answers that equal the expected one
    mean_score: float  # mean of the task's own score
    count: int
    samples: list[tuple[str, str, str, float]]  # (question, answer, expected answer, score) of this rank's share


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int,
    synced: bool,
    progress: bool = False,
    temperature: float = 0.0,
    stops: Sequence[str] = (),
) -> list[str]:
    """Return the model's answer to each question: the greedy one, or a sample at a temperature above 0.

    An answer is cut before the first of `stops` in it; blanks around it stay. `synced` is for parameters that are
    sharded over the ranks, where no rank may stop before the others: the call is then collective, and every rank must
    have the same number of questions.
    """
    limits = limits_of(model)
    filler = pad_id(tokenizer, limits.vocabulary)
    stops_at = stops_of(model, tokenizer)
    # sample from all tokens; transformers' default keeps the 50 most likely ones
    drawing = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    # similar lengths need little padding, and with the longest first a lack of memory shows at once
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].prompt_ids))
    answers = [""] * len(questions)
    with _evaluating(model), with_masks(model), eagerly(), codes_multiplied(model), _dense_rows(model):
        for start in tqdm(range(0, len(questions), batch_size), desc="answer", unit="batch", disable=not progress):
            batch = order[start : start + batch_size]
            prompts = [questions[index].prompt_ids for index in batch]
            longest = max(len(prompt) for prompt in prompts)
            room = max_new_tokens if limits.positions is None else min(max_new_tokens, limits.positions - longest)
            if room < 1:
                raise ValueError(
                    f"a prompt has {longest} tokens, and the model has learned {limits.positions} positions: there is "
                    "no room for an answer; give shorter prompts"
                )
            # on the left, so that all answers start at one position
            missing = [longest - len(prompt) for prompt in prompts]
            input_ids = [[filler] * gap + prompt for gap, prompt in zip(missing, prompts, strict=True)]
            attention_mask = [[0] * gap + [1] * (longest - gap) for gap in missing]
            output = model.generate(
                input_ids=torch.tensor(input_ids, device=model.device),  # (batch, longest)
                attention_mask=torch.tensor(attention_mask, device=model.device),
                max_new_tokens=room,
                **(drawing if temperature else greedy),
                stopping_criteria=StoppingCriteriaList([_Stops(tokenizer, longest, stops)] if stops else []),
                use_cache=True,  # the model's own setting is often off for training
                eos_token_id=stops_at or None,
                pad_token_id=filler,
                synced_gpus=synced,
            )
            new = output[:, longest:].tolist()
            for index, prompt, tokens in zip(batch, prompts, new, strict=True):
                answers[index] = _cut(_continuation(tokenizer, prompt, tokens), stops)
    return answers


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    questions: Sequence[Question],
    rank: int,
    world: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    batch_size: int,
    synced: bool,
) -> Report:
    """Let each rank answer its share of the questions, and report the result over all ranks. Collective.

    Shares are padded with questions that are not counted, so that all ranks generate equally often.
    """
    assert questions, "no questions"
    share = list(questions[rank::world])
    padded = share + [questions[0]] * (ceil(len(questions) / world) - len(share))
    texts = answer(
        model,
        tokenizer,
        questions=padded,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        synced=synced,
        progress=rank == 0,
    )
    answers = [text.strip() for text in texts]
    samples = [(q.text, text, q.answer, q.score(text)) for q, text in zip(share, answers, strict=False)]
    exact = sum(text == expected.strip() for _, text, expected, _ in samples)
    local = torch.tensor(
        [exact, sum(sample[3] for sample in samples), len(share)], dtype=torch.float64, device=model.device
    )
    exact, score, count = sum_over_ranks(local).tolist()
    return Report(exact / count, score / count, round(count), samples)


class _Stops(StoppingCriteria):
    """Stop an answer when it contains one of the texts.

    The prompt does not count, as it may end with half of such a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int, stops: Sequence[str]) -> None:
        self.tokenizer, self.start, self.stops = tokenizer, start, stops

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stops) for text in texts], device=input_ids.device)


def _continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """The text of the new tokens.

    Decoded without the prompt, sentencepiece tokens lose a blank at their beginning; code would lose its indentation.
    """
    before, through = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, prompt + new))
    return through[len(before) :] if through.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)


def _cut(text: str, stops: Sequence[str]) -> str:
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]


@contextmanager
def _dense_rows(model: PreTrainedModel) -> Iterator[None]:
    """Give the output layer rows that lie one behind another in memory.

    transformers hands it a slice, the last token of each prompt. In bfloat16 on CPUs torch multiplies such rows one by
    one and copies the whole matrix each time: 0.9 GB and 1.3 s for 16 prompts of SmolLM2-135M, in place of 8 MB, 7 ms.
    """
    layer = model.get_output_embeddings()
    hook = layer.register_forward_pre_hook(lambda _, inputs: tuple(rows.contiguous() for rows in inputs))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
