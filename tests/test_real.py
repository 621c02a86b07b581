"""benchmarks/real.py without a model: which tasks are chosen, which runs come next, what the tables say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from benchmarks import real
from benchmarks.quality import ROOT, Comparison, Spec

SETTING = real.Setting(real.CANDIDATES["sums"])


@pytest.mark.quick
def test_the_tasks_nearest_to_one_half_are_chosen_those_of_another_kind_first():
    known = {"sums": 0.45, "products": 0.52, "divisors": 0.81, "letters": 0.2, "word_lists": 0.7, "filters": 0.79}
    constant = dict.fromkeys(known, 0.05)
    assert real.chosen(known, constant) == ["products", "word_lists", "letters", "sums"]
    assert len(real.chosen(dict.fromkeys(real.CANDIDATES, 0.5), dict.fromkeys(real.CANDIDATES, 0.0))) == real.TAKEN


@pytest.mark.quick
def test_a_task_that_one_answer_for_all_questions_solves_as_well_is_not_chosen():
    assert real.chosen({"letters": 0.47, "divisors": 0.58}, {"letters": 0.47, "divisors": 0.3}) == ["divisors"]


@pytest.fixture
def compared(tmp_path):
    """A comparison whose runs are made by `put`."""
    settings = {name: {"name": name} for name in real.EVERY}
    return Comparison(tmp_path / "sums", SETTING, settings, settings, lambda spec: None)


def put(
    compared: Comparison,
    spec: Spec,
    exact: float,
    loss: float | None = 1.0,
    others: dict | None = None,
    device: str = "card",
) -> None:
    result = {"exact_match": exact, "loss": loss, "trainable": 1, "others": others or {}, "device": device}
    compared.folder.mkdir(exist_ok=True)
    compared.file(spec).write_text(json.dumps({"settings": compared.stamp(spec), "result": result}))


@pytest.mark.quick
def test_rates_are_tried_until_the_best_one_is_inside_and_then_seeds_are_run(compared):
    def wanted() -> list[Spec]:
        return real.wanted(compared, "lora", (0, 1), ())

    first = wanted()
    assert [spec.rate for spec in first] == [6e-4, 2e-3, 6e-3] and all(spec.tuning for spec in first)
    for spec, exact in zip(first, (0.1, 0.2, 0.3), strict=True):
        put(compared, spec, exact)
    assert wanted() == [Spec("lora", 2e-2, real.TUNING, True)]  # the best rate was the highest
    put(compared, wanted()[0], 0.0, None)  # diverged
    assert wanted() == [Spec("lora", 6e-3, 0), Spec("lora", 6e-3, 1)]
    put(compared, Spec("lora", 6e-3, 0), 0.3)
    assert wanted() == [Spec("lora", 6e-3, 1)]
    put(compared, Spec("lora", 6e-3, 1), 0.3)
    assert wanted() == [] and len(real.wanted(compared, "core", (0, 1), ())) == 3
    # rates that are named are run with the reported seeds, and no rate is tried
    assert real.wanted(compared, "lora", (0, 1), (2e-3, 6e-3)) == [Spec("lora", 2e-3, 0), Spec("lora", 2e-3, 1)]


@pytest.mark.quick
def test_rates_are_refused_where_no_run_would_be_made_at_them(capsys):
    with pytest.raises(SystemExit):
        real.main(["pilot", "--rates", "2e-3"])
    assert "--rates: only `run`" in capsys.readouterr().err


@pytest.mark.quick
def test_the_tables_say_means_and_differences_over_the_same_seeds(compared, tmp_path):
    write = {"lora": (0.4, 0.5, 0.6), "core": (0.5, 0.7, None), "core_light": (0.3, 0.3, 0.3)}
    for name, values in write.items():
        put(compared, Spec(name, 2e-3, real.TUNING, True), 0.5)
        for seed, exact in enumerate(values):
            loss = None if exact is None else 1 - exact
            others = {"code": [1.0, 1.25]} if exact else None
            device = "cpu" if (name, seed) == ("core", 1) else "card"
            put(compared, Spec(name, 2e-3, seed), exact or 0.0, loss, others, device)
    (tmp_path / "pilot.json").write_text(json.dumps({"chosen": ["sums"]}))
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- tasks -->\n<!-- /tasks -->\nb\n", encoding="utf-8")
    real.table(tmp_path, page)
    text = page.read_text(encoding="utf-8")
    assert "| LoRA | 50.0 ± 10.0 |" in text
    assert "| CORE | 40.0 ± 36.1 (-10.0) |" in text  # a run that diverged has nothing right
    assert "| CORE | 0.400 ± 0.141, 2 of 3 (-0.150) |" in text and "| CORE | 0.002 |" in text
    assert "| CORE | code 0.25 ± 0.00 |" in text
    assert "| CORE, bases of 64 samples in two passes | 30.0 ± 0.0 (-20.0) |" in text and "between random" not in text
    assert "| CORE | 1 of 3 |" in text and "| LoRA | 0 of 3 |" not in text


@pytest.mark.quick
def test_forgetting_is_measured_with_text_that_the_run_did_not_learn():
    texts = {name: real.other_texts(real.Setting(task)) for name, task in real.TASKS.items()}
    assert texts["divisors"] == ["code", "alpaca"] and texts["alpaca"] == ["code"]
    assert texts["code"] == texts["short_code"] == ["alpaca"]  # the short functions are some of `code`


class Crowded:
    """Stands in for the pool: only `room` runs at a time find memory, and those of the method `broken` fail."""

    def __init__(self, room: int, broken: str = "") -> None:
        self.room, self.broken, self.waiting = room, broken, []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, make, spec):
        future = Future()
        self.waiting.append((future, make, spec))
        return future

    def wait(self, running, return_when):
        for place, (future, make, spec) in enumerate(self.waiting):
            if spec.method == self.broken:
                future.set_exception(ValueError("broken"))
            elif place >= self.room:
                future.set_exception(torch.OutOfMemoryError("no memory"))
            else:
                make(spec)
                future.set_result(spec.name)
        self.waiting = []
        return set(running), set()


@pytest.mark.quick
def test_a_run_without_memory_is_made_again_beside_fewer_and_another_error_ends_a_method(compared, monkeypatch, capsys):
    pool = Crowded(room=2, broken="dora")
    monkeypatch.setattr(real, "pool_of", lambda jobs: pool)
    monkeypatch.setattr(real, "wait", pool.wait)
    monkeypatch.setattr(Comparison, "make", lambda one, spec: put(one, spec, 0.5 - abs(spec.rate - 2e-3)))
    real.fill([compared], ["lora", "dora", "core"], (0, 1), (), 4, math.inf)
    assert real.wanted(compared, "lora", (0, 1), ()) == real.wanted(compared, "core", (0, 1), ()) == []
    said = capsys.readouterr().out
    assert said.count("found no memory") == 2 and "from now on 2 runs at a time" in said
    assert "dora is left out: ValueError: broken" in said and len(real.wanted(compared, "dora", (0, 1), ())) == 3


SLEEPERS = """
import time
from benchmarks.quality import pool_of
if __name__ == "__main__":
    with pool_of(1) as pool:
        work = pool.submit(time.sleep, 600)
        while not work.running():
            time.sleep(0.1)
        print(*[p.pid for p in pool._processes.values()], flush=True)
        work.result()
"""


def test_a_pool_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "sleepers.py")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    worker = Path("/proc") / parent.stdout.readline().strip()
    assert worker.name.isdigit() and worker.exists()
    parent.kill()
    parent.wait()
    ended = time.monotonic() + 60
    while worker.exists() and "zombie" not in (worker / "status").read_text():
        assert time.monotonic() < ended, "the worker goes on without anybody who waits for it"
        time.sleep(0.2)
