"""Tasks of EleutherAI's lm-eval by their names, over the model as it lies in memory.
https://github.com/EleutherAI/lm-evaluation-harness

It is imported only when one of its tasks is asked for. Its index of some 14,000 tasks takes seconds to read; a task of
one's own (--include_path) is looked for without it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_lowrank.evaluation.task import Found, Metrics


@dataclass(frozen=True)
class Harness:
    name: str
    tokenizer: PreTrainedTokenizerBase
    manager: Any  # lm-eval's index of tasks
    tasks: list[Any]  # what lm-eval made of the name: a task, a group, the tasks of a tag
    allow_code_execution: bool
    limit: int | None
    num_fewshot: int | None
    apply_chat_template: bool
    batch_size: int
    seed: int

    def run(self, model: PreTrainedModel) -> Found:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size),
            tasks=self.tasks,
            task_manager=self.manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            apply_chat_template=self.apply_chat_template,
            confirm_run_unsafe_code=self.allow_code_execution,
            log_samples=False,
            random_seed=self.seed,
            numpy_random_seed=self.seed,
            torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
        )
        # of groups: none
        asked: dict[str, Metrics] = {name: {"n": count["effective"]} for name, count in found["n-samples"].items()}
        return Found({name: metrics(values) | asked.get(name, {}) for name, values in found["results"].items()})


def metrics(values: dict[str, Any]) -> Metrics:
    """lm-eval writes `metric,filter`; the filter none is left out.

    Standard errors that it did not compute are words.
    """
    return {
        key.removesuffix(",none"): value for key, value in values.items() if "," in key and not isinstance(value, str)
    }


def prepare(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    include_path: str | None,
    allow_code_execution: bool,
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
    batch_size: int,
    seed: int,
) -> list[Harness]:
    """The tasks with their data.

    ValueError for what the harness does not know or cannot load, and for code that may not run.
    """
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError("--apply_chat_template: the tokenizer has no chat template; leave it out")
    manager = _manager(names, include_path)
    runs_code = [
        name for name in names if any(entry.get("unsafe_code") for entry in _configs(manager.task_index, name))
    ]
    if runs_code and not allow_code_execution:
        refuse_code(runs_code)
    os.environ["HF_ALLOW_CODE_EVAL"] = "1" if allow_code_execution else "0"  # the metric code_eval asks for it
    found = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # of whatever kind a task's own code, the hub or a file's format raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"lm-eval cannot load the task {name}: {reason}") from error
        if not allow_code_execution and any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            refuse_code([name])
        tasks = [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
        options = (allow_code_execution, limit, num_fewshot, apply_chat_template, batch_size, seed)
        found.append(Harness(name, tokenizer, manager, tasks, *options))
    return found


def refuse_code(names: Sequence[str]) -> None:
    raise ValueError(
        f"{', '.join(names)}: lm-eval runs the programs that the model writes, with your rights and the network: this "
        "project's sandbox "
        "does not hold them back. If that may happen here, best in a container, give --allow_code_execution"
    )


def _manager(names: Sequence[str], include_path: str | None) -> Any:
    """lm-eval's index of tasks, in which all of the names are."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f'{", ".join(names)}: not tasks of this project; those of lm-eval need pip install "llm-lowrank[eval]"'
        )
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if include_path is not None:
        if not Path(include_path).expanduser().is_dir():
            raise ValueError(f"--include_path: {include_path} is not a folder; give one with task files (.yaml)")
        include_path = str(Path(include_path).expanduser())
        own = TaskManager(include_path=include_path, include_defaults=False)
        if all(_complete(own.task_index, name) for name in names):
            return own
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in manager.task_index]:
        near = get_close_matches(unknown[0], [*manager.all_tasks, "held_out", "human-eval"], 3)
        meant = f"; close to it: {', '.join(near)}" if near else "; `lm-eval ls tasks` lists those of lm-eval"
        raise ValueError(f"no task is named {unknown[0]!r}{meant}")
    return manager


def _configs(index: dict[str, Any], item: str | dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of every task and group that a name, or a group's own entry, stands for; the code that they name is
    not imported.
    """
    if isinstance(item, dict):
        yield item
    elif item in index:
        yield index[item].cfg or {}
    for inner in _members(index, item):
        yield from _configs(index, inner)


def _members(index: dict[str, Any], item: str | dict[str, Any]) -> list[Any]:
    """What a group or a tag is made of."""
    if isinstance(item, str):
        entry = index.get(item)
        if entry is None or entry.kind.name not in ("GROUP", "TAG"):
            return []
        if entry.kind.name == "TAG":
            return sorted(entry.tags)
        item = entry.cfg
    assert isinstance(item, dict)
    inner = item.get("task") or []
    return [inner] if isinstance(inner, str) else inner


def _complete(index: dict[str, Any], item: str | dict[str, Any]) -> bool:
    """Whether a name and all that it stands for are there."""
    return (isinstance(item, dict) or item in index) and all(_complete(index, inner) for inner in _members(index, item))
