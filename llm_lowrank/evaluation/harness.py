"""Tasks of EleutherAI's lm-eval by their names, over the model as it lies in memory.
https://github.com/EleutherAI/lm-evaluation-harness

lm-eval is imported only if one of its tasks is asked for. Its index of some 14,000 tasks takes seconds to read; tasks
in a folder of the user's own (--include_path) are looked up without this index.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedTokenizerBase

from llm_lowrank.data.templates import with_date
from llm_lowrank.evaluation.subject import Subject
from llm_lowrank.evaluation.task import Metrics, TaskResult
from llm_lowrank.models.export import in_vllm
from llm_lowrank.models.foreign import CONFIG
from llm_lowrank.models.stopping import GENERATION
from llm_lowrank.numerics.files import read_object


@dataclass(frozen=True)
class Harness:
    """One name of lm-eval: a task, a group or a tag."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    manager: Any  # lm-eval's index of tasks
    tasks: list[Any]  # lm-eval's objects for the name: a task, a group, or the tasks of a tag
    allow_code_execution: bool
    limit: int | None
    num_fewshot: int | None
    apply_chat_template: bool
    batch_size: int
    seed: int

    def run(self, model: Any) -> TaskResult:
        """model: of transformers, or one of lm-eval's own (load_vllm)."""
        import lm_eval
        from lm_eval.api.model import LM
        from lm_eval.models.huggingface import HFLM

        if not isinstance(model, LM):
            model = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
        report = lm_eval.simple_evaluate(
            model=model,
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
        # groups have metrics and no number of questions
        counts: dict[str, Metrics] = {name: {"n": count["effective"]} for name, count in report["n-samples"].items()}
        return TaskResult({name: metrics(values) | counts.get(name, {}) for name, values in report["results"].items()})


def vllm_arguments(
    subject: Subject, tokenizer: PreTrainedTokenizerBase, dtype: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Return the arguments of lm-eval's class for vLLM. ValueError if vLLM is missing or does not serve the adapter.

    folder: gets the tokenizer, with the chat template and the date of the run, as vLLM reads it from a disk.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError("--backend vllm needs vLLM, which is not installed: pip install vllm")
    with_date(tokenizer, subject.date).save_pretrained(folder)
    arguments: dict[str, Any] = {
        "pretrained": str(subject.source.path),
        "tokenizer": str(folder),
        "dtype": dtype,
        "seed": seed,
        "batch_size": "auto",
        "tensor_parallel_size": max(1, torch.cuda.device_count()),
    }
    if (beside := subject.beside()) is not None and (beside / GENERATION).is_file():
        arguments["generation_config"] = str(beside)  # where the answers of the run end
    if subject.adapter is not None:
        served = in_vllm(read_object(subject.adapter / CONFIG))
        if not served.startswith("for vLLM"):
            raise ValueError(f"--backend vllm: {served}, --use merged")
        arguments |= {"lora_local_path": str(subject.adapter), "max_lora_rank": int(served.rpartition(" ")[2])}
    return arguments


def load_vllm(arguments: dict[str, Any]) -> Any:
    """Load a model into lm-eval's class for vLLM."""
    from lm_eval.api.registry import get_model

    return get_model("vllm")(**arguments)


def metrics(values: dict[str, Any]) -> Metrics:
    """Return lm-eval's `metric,filter` -> value without the filter `none`.

    A standard error that lm-eval did not compute is a text and left out.
    """
    return {
        key.removesuffix(",none"): value for key, value in values.items() if "," in key and not isinstance(value, str)
    }


def load_tasks(
    names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    include_path: str | None,
    allow_code_execution: bool,
    limit: int | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
    batch_size: int,
    seed: int,
) -> list[Harness]:
    """Return the tasks with their data.

    ValueError if lm-eval does not know or cannot load a task, or if a task runs generated code and may not.
    """
    if apply_chat_template and not tokenizer.chat_template:
        raise ValueError("--apply_chat_template: the tokenizer has no chat template; leave it out")
    manager = _open_index(names, include_path)
    # Tasks that say in their settings that they run generated code are refused before anything of them is imported.
    runs_code = [
        name for name in names if any(entry.get("unsafe_code") for entry in _configs(manager.task_index, name))
    ]
    if runs_code and not allow_code_execution:
        refuse_code(runs_code)
    os.environ["HF_ALLOW_CODE_EVAL"] = "1" if allow_code_execution else "0"  # the metric code_eval reads it
    tasks = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # a task's own code, the hub and a file's format may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"lm-eval cannot load the task {name}: {reason}") from error
        # Tasks written in Python say it in their class.
        if not allow_code_execution and any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            refuse_code([name])
        tasks.append(
            Harness(
                name=name,
                tokenizer=tokenizer,
                manager=manager,
                tasks=[loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values()),
                allow_code_execution=allow_code_execution,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template,
                batch_size=batch_size,
                seed=seed,
            )
        )
    return tasks


def refuse_code(names: Sequence[str]) -> NoReturn:
    """Raise the ValueError of tasks that run generated code."""
    raise ValueError(
        f"{', '.join(names)}: lm-eval runs the programs that the model writes, with your rights and the network: this "
        "project's sandbox does not hold them back. If that may happen here, best in a container, give "
        "--allow_code_execution"
    )


def _open_index(names: Sequence[str], include_path: str | None) -> Any:
    """Return an lm-eval TaskManager that knows all names. ValueError if lm-eval or one of the names is missing."""
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
        # the folder alone, which is quick, if it has everything that the names stand for
        of_folder = TaskManager(include_path=include_path, include_defaults=False)
        if all(_is_complete(of_folder.task_index, name) for name in names):
            return of_folder
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in manager.task_index]:
        near = get_close_matches(unknown[0], [*manager.all_tasks, "held_out", "human-eval"], 3)
        meant = f"; close to it: {', '.join(near)}" if near else "; `lm-eval ls tasks` lists those of lm-eval"
        raise ValueError(f"no task is named {unknown[0]!r}{meant}")
    return manager


def _configs(index: dict[str, Any], item: str | dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings of every task and group that a name, or a group's own entry, stands for. The code that the
    settings name is not imported.
    """
    if isinstance(item, dict):
        yield item
    elif item in index:
        yield index[item].cfg or {}
    for inner in _members(index, item):
        yield from _configs(index, inner)


def _members(index: dict[str, Any], item: str | dict[str, Any]) -> list[Any]:
    """Return the members of a group or a tag; a task has none."""
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


def _is_complete(index: dict[str, Any], item: str | dict[str, Any]) -> bool:
    """Return whether an index has a name and everything that the name stands for."""
    known = isinstance(item, dict) or item in index
    return known and all(_is_complete(index, inner) for inner in _members(index, item))
