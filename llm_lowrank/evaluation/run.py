"""From the settings of an evaluation to the record of its results."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from llm_lowrank.data.templates import reads_clock, with_date
from llm_lowrank.engines.plain import Plain
from llm_lowrank.evaluation import harness, record, sandbox
from llm_lowrank.evaluation.human_eval import HUMAN_EVAL, HumanEval
from llm_lowrank.evaluation.mbpp import MBPP, Mbpp
from llm_lowrank.evaluation.questions import HELD_OUT, HeldOut, ReasoningGym, is_reasoning_gym
from llm_lowrank.evaluation.subject import Subject, Use
from llm_lowrank.evaluation.task import Task, TaskResult
from llm_lowrank.numerics.files import check_writable

SAMPLES = 5  # answers that are printed
Kind = Literal["held_out", "reasoning-gym", "human-eval", "mbpp", "lm-eval"]


@dataclass(frozen=True)
class Settings:
    """The options of llm-lowrank evaluate, which explains each of them. ValueError with all complaints at once."""

    checkpoint: str
    tasks: tuple[str, ...] = ()  # empty: held_out
    output: str | None = None
    use: Use | None = None
    model_name_or_path: str | None = None
    dtype: str = "auto"
    batch_size: int = 16
    max_new_tokens: int = 256
    limit: int | None = None
    seed: int = 0
    prompt_style: str = "auto"
    size: int = 100
    task_settings: dict[str, Any] = field(default_factory=dict)
    samples: int = 1
    pass_at: tuple[int, ...] = (1,)
    temperature: float = 0.0
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    include_path: str | None = None
    allow_code_execution: bool = False
    sandbox: Literal["auto", "bubblewrap"] = "auto"
    backend: Literal["hf", "vllm"] = "hf"

    def __post_init__(self) -> None:
        errors = []
        least = {
            "batch_size": 1,
            "max_new_tokens": 1,
            "limit": 1,
            "size": 1,
            "samples": 1,
            "num_fewshot": 0,
            "seed": 0,
            "temperature": 0,
        }
        for name, value in least.items():
            if (given := getattr(self, name)) is not None and not value <= given < float("inf"):
                errors.append(f"--{name} {given}: must be at least {value}")
        if len(set(self.tasks)) < len(self.tasks):
            errors.append(f"--tasks {','.join(self.tasks)}: names a task twice")
        if not all(self.tasks):
            errors.append(f"--tasks {','.join(self.tasks)}: has an empty name")
        kinds = {kind_of(task) for task in self.tasks or (HELD_OUT,)}
        defaults = {
            known.name: known.default if known.default_factory is MISSING else known.default_factory()
            for known in fields(self)
        }
        for name, users in USERS.items():
            if getattr(self, name) != defaults[name] and not kinds & set(users):
                errors.append(f"--{name} is for {' and '.join(users)} tasks; none of these is asked for, leave it out")
        if self.samples > 1 and not self.temperature:
            errors.append(
                f"--samples {self.samples}: greedy programs are all the same; give a --temperature above 0, such as 0.8"
            )
        for k in self.pass_at:
            if not 1 <= k <= self.samples:
                errors.append(f"--pass_at {k}: must be between 1 and --samples, which is {self.samples}")
        for task in self.tasks:
            if kind_of(task) in CODING and not self.allow_code_execution:
                errors.append(
                    f"{task} runs programs that the model writes, on this machine; --allow_code_execution lets it. "
                    "They have no network, limited time and memory, but may read the files that you may, and change "
                    "them where bubblewrap does not work: see docs/evaluation.md"
                )
        if self.backend == "vllm":
            if others := [task for task in self.tasks or (HELD_OUT,) if kind_of(task) != "lm-eval"]:
                errors.append(
                    f"--backend vllm is for tasks of lm-eval alone; {', '.join(others)} cannot be asked with it"
                )
            if self.batch_size != defaults["batch_size"]:
                errors.append(f"--batch_size {self.batch_size}: vLLM makes its own batches; leave it out")
        if errors:
            raise ValueError("\n".join(errors))


CODING: tuple[Kind, ...] = ("human-eval", "mbpp")
USERS: dict[str, tuple[Kind, ...]] = {  # options that only some kinds of tasks read
    **dict.fromkeys(("size", "task_settings"), ("reasoning-gym",)),
    **dict.fromkeys(("samples", "pass_at", "temperature", "sandbox"), CODING),
    **dict.fromkeys(("num_fewshot", "apply_chat_template", "include_path", "backend"), ("lm-eval",)),
    **dict.fromkeys(("max_new_tokens", "prompt_style"), ("reasoning-gym", *CODING)),
    "limit": ("held_out", *CODING, "lm-eval"),
    "allow_code_execution": (*CODING, "lm-eval"),
}


def kind_of(task: str) -> Kind:
    """Return which kind of task a name is; a name that is none of this project's is one of lm-eval's."""
    if task in (HELD_OUT, HUMAN_EVAL):
        return task  # type: ignore[return-value]
    if task.startswith(MBPP):
        return "mbpp"
    return "reasoning-gym" if is_reasoning_gym(task) else "lm-eval"


def evaluate(settings: Settings) -> Path:
    """Evaluate a model, print the results and write the record. Return the record's path.

    ValueError or OSError, before the weights are read, if the evaluation cannot be done as asked.
    """
    subject = Subject.find(settings.checkpoint, settings.use, settings.model_name_or_path)
    names = settings.tasks or (HELD_OUT,)
    if HELD_OUT in names and subject.output is None:
        raise ValueError(
            f"{HELD_OUT} needs the output_dir of a run, and {settings.checkpoint} has no recipe.yaml; choose other "
            "--tasks"
        )
    path = record.new_path(settings.output, subject.output, names)
    check_writable(path.parent)
    tokenizer = subject.tokenizer()
    tasks = prepare_tasks(settings, subject, names, tokenizer)
    described = subject.describe()
    if reads_clock(tokenizer):
        described["date"] = subject.date
        print(f"the chat template writes the date: {subject.date}", flush=True)
    if any(kind_of(name) in CODING for name in names):
        print(sandbox.describe_walls(), flush=True)
    device = Plain().device
    with tempfile.TemporaryDirectory() as folder:
        if settings.backend == "vllm":
            arguments = harness.vllm_arguments(subject, tokenizer, settings.dtype, settings.seed, Path(folder))
            model: Any = harness.load_vllm(arguments)
        else:
            model = subject.load(settings.dtype, device)
        file = record.Record(path, asdict(settings), checkpoint=described, train_info=subject.settings(), device=device)
        for task in tasks:
            print(f"{task.name} ...", flush=True)
            torch.manual_seed(settings.seed)
            result = task.run(model)
            for line in [
                *describe_answers(result),
                *(f"written: {written}" for written in file.add(task.name, result)),
            ]:
                print(line, flush=True)
    print(file.table())
    return path


def prepare_tasks(
    settings: Settings, subject: Subject, names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Task]:
    """Return the tasks in the order of `names`, each ready to run. ValueError or OSError if one cannot be run."""
    # the model of a run is asked with the prompt style and the system prompt that it was trained with
    data = subject.settings().get("data", {})
    style = data.get("prompt_style", "auto") if settings.prompt_style == "auto" else settings.prompt_style
    system = data.get("system", "")
    s = settings
    tasks: dict[str, Task] = {}
    for name in names:
        if name == HELD_OUT:
            assert subject.output is not None
            tasks[name] = HeldOut.of(
                subject.output,
                tokenizer,
                limit=s.limit,
                batch_size=s.batch_size,
                date=subject.date,
                limits=subject.limits,
            )
        elif kind_of(name) in CODING:
            if s.sandbox == "bubblewrap" and (missing := sandbox.bubblewrap()[1]):
                raise ValueError(f"--sandbox bubblewrap: {missing}; install it, or leave the option out")
            asked: dict[str, Any] = {
                "system": system,
                "limit": s.limit,
                "samples": s.samples,
                "pass_at": s.pass_at,
                "temperature": s.temperature,
                "max_new_tokens": s.max_new_tokens,
                "batch_size": s.batch_size,
                "date": subject.date,
            }
            coding = HumanEval.of if name == HUMAN_EVAL else partial(Mbpp.of, name)
            tasks[name] = coding(tokenizer, style, **asked)
        elif is_reasoning_gym(name):
            tasks[name] = ReasoningGym.of(
                name,
                tokenizer,
                settings=s.task_settings,
                style=style,
                system=system,
                size=s.size,
                seed=s.seed,
                max_new_tokens=s.max_new_tokens,
                batch_size=s.batch_size,
                date=subject.date,
            )
    # lm-eval's tasks are loaded together: its index is read once
    if others := [name for name in names if name not in tasks]:
        of_harness = harness.load_tasks(
            others,
            with_date(tokenizer, subject.date),
            include_path=s.include_path,
            allow_code_execution=s.allow_code_execution,
            limit=s.limit,
            num_fewshot=s.num_fewshot,
            apply_chat_template=s.apply_chat_template,
            batch_size=s.batch_size,
            seed=s.seed,
        )
        tasks |= {task.name: task for task in of_harness}
    return [tasks[name] for name in names]


def describe_answers(result: TaskResult) -> list[str]:
    """Return the first answers as lines to print."""
    return [
        f"  {row['question']!r}\n    answered {row['answer']!r}, expected {row['expected']!r}, score {row['score']:g}"
        if "question" in row
        else f"  {row['task_id']}: {row['status']} {row['message'].rpartition(chr(10))[2]}".rstrip()
        for row in result.answers[:SAMPLES]
    ]
