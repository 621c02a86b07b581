"""Tokens that several processes make, and tokens that are made ahead of a run: those of one process, byte by byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from llm_lowrank.data import Data, load_corpus, workers
from llm_lowrank.data.rows import FEATURES, encode_rows
from llm_lowrank.data.workers import encode_all, serve
from llm_lowrank.run.fill import main
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import tiny
from tests.test_data import CHATML, byte_tokenizer, write_jsonl
from tests.test_launch import ENVIRONMENT, ROOT

COUNT = 3 * workers.BATCH - 50  # two workers: three batches
BAD = {300: {"prompt": "q300", "completion": ""}, 550: {"prompt": 5, "completion": "a"}}
ROWS = [BAD.get(k, {"prompt": f"q{k} ü", "completion": f"{k}" * (k % 7 + 1)}) for k in range(COUNT)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Data, recipes, and a model of which config and tokenizer alone are there."""
    folder = tmp_path_factory.mktemp("workers")
    write_jsonl(folder / "data.jsonl", ROWS)
    tokenizer = byte_tokenizer(CHATML)
    model = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256)
    model.config.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    settings = {
        "model_name_or_path": str(folder / "model"),
        "data": {"dataset": str(folder / "data.jsonl"), "bad_rows": "drop", "held_out": 8, "max_length": 64},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    (folder / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "output_dir": str(folder / "out"),
                "engine": "plain",
                "method": {"type": "lora", "rank": 2},
                "max_steps": 2,
                "save_merged": False,
                "report_to": "none",
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def filled(place) -> tuple[Path, str]:
    """The cache that the command filled with two workers, and what the command said."""
    cache = place / "cache"
    done = subprocess.run(
        [sys.executable, "-m", "llm_lowrank.data", str(place / "recipe.yaml"), "--data.workers", "2"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"LLM_LOWRANK_CACHE": str(cache)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert f"{COUNT}/{COUNT}" in done.stderr  # the progress
    return cache, done.stdout


@pytest.fixture
def cached(filled, monkeypatch) -> Path:
    """The filled cache is that of this process."""
    monkeypatch.setattr("llm_lowrank.data.corpus.cache_dir", lambda: filled[0])
    return filled[0]


@pytest.fixture
def idle(monkeypatch) -> None:
    """Whoever makes tokens fails."""

    def make(*_: object) -> None:
        raise AssertionError("tokens were made again")

    monkeypatch.setattr("llm_lowrank.data.workers.encode_rows", make)
    monkeypatch.setattr("llm_lowrank.data.workers.Worker", make)


def test_two_workers_write_what_one_process_writes(place, filled, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_lowrank.data.corpus.cache_dir", lambda: tmp_path)
    settings = parse(["--config_path", str(place / "recipe.yaml")]).data
    load_corpus(settings, byte_tokenizer(CHATML), 0)
    (one,), (two,) = ((cache / "tokens").glob("*.arrow") for cache in (tmp_path, filled[0]))
    assert one.name == two.name  # one key
    assert one.read_bytes() == two.read_bytes()
    assert one.with_suffix(".json").read_bytes() == two.with_suffix(".json").read_bytes()


def test_the_command_says_what_there_is(filled):
    cache, said = filled
    (file,) = (cache / "tokens").glob("*.arrow")
    assert f"tokens: {file}" in said and f"{COUNT} rows" in said
    assert f"to train on {COUNT - 10:,} examples" in said and "held out 8" in said
    assert "dropped 2" in said and "dropped 1: the answer is empty" in said
    table = Dataset.from_file(str(file))
    assert max(table["length"][:]) < 64 and "cut to 64 tokens 0" in said


def test_the_first_bad_row_is_named_as_without_workers(place, cached, idle, capsys):
    arguments = [str(place / "recipe.yaml"), "--data.bad_rows", "refuse", "--data.workers=2"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    named = [line for line in said.splitlines() if "(the first is 0)" in line]
    assert len(named) == 2 and "row 300" in named[0] and "row 550" in named[1], said
    assert named[0].startswith("error: line 301 of ") and named[0].endswith("the answer is empty")


def test_a_run_trains_on_the_tokens_that_were_made_ahead(place, cached, idle, capsys):
    folder = place / "model"
    tokenizer = byte_tokenizer(CHATML)
    tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=256).save_pretrained(folder)
    train(parse(["--config_path", f"{place / 'recipe.yaml'},{place / 'run.yaml'}", "--data.workers", "3"]))
    assert "after training:" in capsys.readouterr().out


def test_what_the_command_refuses(place, cached, capsys):
    def refusal(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        return capsys.readouterr().err

    recipe = str(place / "recipe.yaml")
    assert "both name recipes; write them together" in refusal(recipe, f"--config_path={recipe}")
    assert "stores nothing: there is no cache to fill" in refusal(recipe, "--data.streaming")
    assert "unknown setting 'data.worker'; did you mean data.workers?" in refusal(recipe, "--data.worker", "2")
    made = ("--data.dataset", "reasoning-gym:chain_sum", "--model_name_or_path", str(place / "model"))
    assert "generated by every run anew" in refusal(*made)
    assert main(["--help"]) == 0 and "--data.workers" in capsys.readouterr().out


def test_settings_that_workers_do_not_fit():
    with pytest.raises(ValueError, match=r"data.workers=0: must be at least 1"):
        Data("a.jsonl", workers=0)
    with pytest.raises(ValueError, match=r"data.workers is for rows that become tokens before a run"):
        Data("a.jsonl", workers=2, streaming=True)
    with pytest.raises(ValueError, match=r"data.workers is for files and hub names only"):
        load_corpus(Data("reasoning-gym:chain_sum", size=8, held_out=1, workers=2), byte_tokenizer(), 0)


# Workers that fail. Each is a program of a few lines in place of a worker.

STUB = """
import os, signal, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
options = pipe.recv()
"""


def encoded(monkeypatch, stub: str, options: dict | None = None, count: int = 1000) -> list:
    monkeypatch.setattr(workers, "COMMAND", STUB + stub)
    team = []
    real = workers.Worker.__init__
    monkeypatch.setattr(workers.Worker, "__init__", lambda self: real(self) or team.append(self.process))
    try:
        return list(encode_all(iter([{"text": "a"}] * count), count, options or {}, 2))
    finally:
        assert team and all(process.poll() is not None for process in team), "a worker is left over"


@pytest.mark.parametrize(
    "stub, says",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL; it may have run out of memory: set data.work"),
        ("pipe.recv(); os._exit(3)", "ended with exit code 3; its own message stands above"),
    ],
)
def test_a_worker_that_ends_ends_the_run_with_a_message(monkeypatch, stub, says):
    with pytest.raises(ChildProcessError, match=f"data.workers: a process that turns rows into tokens {says}"):
        encoded(monkeypatch, stub)


def test_an_error_of_a_worker_is_raised_in_the_run(monkeypatch):
    with pytest.raises(ZeroDivisionError, match="in a row"):
        encoded(monkeypatch, "pipe.recv(); pipe.send(ZeroDivisionError('in a row')); time.sleep(60)")


def test_a_tokenizer_that_cannot_be_sent_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"this tokenizer cannot be given to another process .*set data.workers 1"):
        encoded(monkeypatch, "time.sleep(60)", {"tokenizer": lambda text: text})


def test_ctrl_c_ends_workers_that_do_not_answer(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without it
    press = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    press.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            encoded(monkeypatch, "time.sleep(60)")
    finally:
        press.cancel()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 30


def test_a_worker_ends_with_its_run():
    ours, theirs = Pipe()
    worker = threading.Thread(target=serve, args=(os.dup(theirs.fileno()),))
    theirs.close()
    worker.start()
    ours.send({"tokenizer": byte_tokenizer(CHATML)})
    ours.send([{"text": "a"}])
    assert isinstance(ours.recv(), TypeError)  # the options lack the format
    ours.close()
    worker.join(60)
    assert not worker.is_alive()


class Echo:
    """A worker without a process: it answers with the rows that it was given."""

    def send(self, rows: list[int]) -> None:
        assert not hasattr(self, "rows"), "a worker has two batches at a time"
        self.rows = rows

    def receive(self) -> list[int]:
        rows = self.rows
        del self.rows
        return rows


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_come_back_in_order_and_are_not_read_far_ahead(size):
    read: list[int] = []

    def numbers() -> Iterator[list[int]]:
        for number in range(40):
            read.append(number)
            yield [number]

    seen = []
    for batch in workers._dealt_out(numbers(), [Echo() for _ in range(size)]):
        seen += batch
        assert len(read) - len(seen) <= size
    assert seen == list(range(40))


def test_small_data_needs_no_worker(idle):
    with pytest.raises(AssertionError, match="tokens were made again"):
        list(encode_all(iter([{"text": "a"}]), 1, {}, 8))


def test_rows_in_batches_have_the_features_of_a_corpus():
    options = {"tokenizer": byte_tokenizer(), "format": "text", "columns": {}, "ignore": [], "group": "", "date": ""}
    options |= {"style": "plain", "train_on": "all", "system": "", "max_length": 4}
    batch = encode_rows([{"text": "abcdef"}, {"text": ""}], options)
    assert batch.schema == FEATURES.arrow_schema
    assert batch.column("truncated").to_pylist() == [True, False] and batch.column("problem")[1].as_py()
