"""Batches that a thread makes one step ahead are the batches of the steps, and nothing of the thread is left over."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from llm_lowrank.data import Batches, Data, Stream, StreamBatches
from llm_lowrank.run.ahead import NAME, Ahead
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests.test_data import CHATML, byte_tokenizer, examples, write_jsonl
from tests.test_launch import place, records  # noqa: F401 - place is a fixture
from tests.test_train_data import settings

CPU = torch.device("cpu")


def threads() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


def same(left, right) -> bool:
    return all(
        all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(x, y, strict=True))
        for x, y in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("ways", [{}, {"pack": 12}, {"grouped": True}])
def test_steps_ahead_are_the_steps(ways):
    batches, again = (Batches(examples(30), 2, pad_id=0, accumulation=2, seed=3, **ways) for _ in range(2))
    with Ahead(batches, 40, CPU) as ahead:
        for t in range(17, 40):  # from the middle of an epoch, as after a resume, over several epochs
            assert same(ahead.step(t), again.step(t)), t
            assert threads() == 1
    assert not threads()


def test_a_stream_is_read_as_far_as_the_steps_need(tmp_path):
    rows = [{"prompt": f"q{k}", "completion": "" if k == 30 else "a"} for k in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)

    def batches() -> StreamBatches:
        data = Data(path, streaming=True, held_out=2, bad_rows="drop")
        return StreamBatches(Stream(data, byte_tokenizer(CHATML), 3), 4, pad_id=0)

    alone, threaded = batches(), batches()
    with Ahead(threaded, 12, CPU) as ahead:
        for t in range(5, 12):
            assert same(ahead.step(t), alone.step(t)), t
    assert threaded.next == 12 and threaded.stream.dropped == alone.stream.dropped


class Failing:
    """Batches that fail from a step on."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.at, self.error = at, error

    def step(self, t: int) -> list:
        if t >= self.at:
            raise self.error
        return [t]


def test_an_error_is_raised_at_its_step():
    with Ahead(Failing(3, ValueError("row 7 is bad")), 10, CPU) as ahead:
        assert [ahead.step(t) for t in range(3)] == [[0], [1], [2]]
        with pytest.raises(ValueError, match="row 7 is bad"):
            ahead.step(3)
    assert not threads()


def test_a_step_is_made_while_the_step_before_it_runs():
    class Slow:
        def step(self, t: int) -> list:
            time.sleep(0.3)
            return [t]

    with Ahead(Slow(), 4, CPU) as ahead:
        ahead.step(0)
        waited = []
        for t in (1, 2, 3):
            time.sleep(0.6)  # the step
            began = time.monotonic()
            assert ahead.step(t) == [t]
            waited.append(time.monotonic() - began)
    assert min(waited) < 0.15, waited


def test_a_run_that_fails_takes_its_thread_with_it():
    def loop() -> None:
        with Ahead(Failing(9, ValueError()), 9, CPU) as ahead:
            ahead.step(0)
            raise RuntimeError("in the loop")

    with pytest.raises(RuntimeError, match="in the loop"):
        loop()
    assert not threads()


@pytest.mark.parametrize("pack", [0, 12])
def test_batches_of_a_cuda_device_are_pinned_there(monkeypatch, pack):
    """Where there is no such device, its functions are replaced; tests/gpu has the device itself."""
    at, pinned = [], []

    @contextmanager
    def device(chosen):
        at.append(chosen)
        yield
        at.pop()

    def pin(tensor):
        assert at == [torch.device("cuda", 1)]
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batches = Batches(examples(30), 2, pad_id=0, pack=pack)
    with Ahead(batches, 2, torch.device("cuda", 1)) as ahead:
        micros = ahead.step(0)
        ahead.step(1)
    assert same(micros, batches.step(0)) and len(pinned) == 2 * (4 if pack else 3)
    assert all(any(value is tensor for tensor in pinned) for value in micros[0] if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("changes", [{"data.packing": True, "data.max_length": 96}, {"data.streaming": True}])
def test_a_run_has_the_losses_that_it_has_without_the_thread(place, tmp_path, monkeypatch, changes):  # noqa: F811
    chosen = {"max_steps": 12, "save_steps": 5, "gradient_accumulation_steps": 2, **changes}

    def losses(output: Path) -> dict[int, float]:
        return {record["step"]: record["loss"] for record in records(output, "train")}

    ahead = tmp_path / "ahead"
    train(parse(settings(place, ahead, **chosen)))
    assert not threads()
    resumed = tmp_path / "resumed"  # from step 10, in the middle of an epoch
    step = f"--resume_from_checkpoint={ahead / 'checkpoints/step-000010'}"
    workers = {} if "data.streaming" in changes else {"data.workers": 2}  # may differ when a run resumes
    train(parse([*settings(place, resumed, **chosen, **workers), step]))
    monkeypatch.setattr("llm_lowrank.run.ahead.Ahead.step", lambda self, t: self.batches.step(t))
    alone = tmp_path / "alone"
    train(parse(settings(place, alone, **chosen)))
    assert losses(ahead) == losses(alone) and len(losses(alone)) == 12
    assert losses(resumed) == {step: loss for step, loss in losses(alone).items() if step > 10}
