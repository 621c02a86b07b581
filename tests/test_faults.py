"""What goes wrong in a run ends it with a word, in bounded time, and loses nothing that was saved."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import soak
from benchmarks.soak import Strike, arguments_of, live
from llm_lowrank.engines import watch as watching
from llm_lowrank.engines.watch import LOST, Life, Watch
from llm_lowrank.models import checkpoint
from llm_lowrank.models.checkpoint import newest
from llm_lowrank.run import train as loop
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.train import train
from tests import ranks
from tests.test_laws import METHODS
from tests.tiny import Trainee

PLACES = [("plain", 1), ("plain", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 2)]


# --- ranks that are lost ----------------------------------------------------------------------------------------------

KILLED = [  # one after the other in one run
    Strike("reading the data"),
    Strike("loading the model", rank=1),
    Strike("the evaluation before", rank=1),
    Strike("step", count=5),
    Strike("restoring", rank=1),
    Strike("saving", rank=1),
    Strike("saving", count=2),
    Strike("the exchange", rank=1),
    Strike("step", rank=1, count=2),
    Strike("the evaluation after", rank=1),
    Strike("the export"),
]


def test_a_rank_killed_in_any_phase_ends_the_run_which_goes_on_bitwise(place, whole, tmp_path):
    arguments = arguments_of(place, tmp_path / "out", "deepspeed")
    for strike in KILLED:
        life = live(arguments, strike=strike)
        assert life.struck, (strike, life.phases, life.said[-2000:])
        other = 1 - strike.rank
        assert life.codes[strike.rank] == -signal.SIGKILL and life.codes[other] is not None, (
            strike,
            life.codes,
            life.said[-2000:],
        )
        if life.codes[other] == 0:  # what is written last, rank 0 writes alone
            assert (strike.phase, strike.rank) == ("the export", 0)
        else:
            assert f"rank {other} lost contact with another rank in " in life.said, (strike, life.said[-2000:])
            assert "Traceback" not in life.said, life.said[-3000:]
    last = live(arguments)
    assert last.codes == [0, 0] and not [phase for phase in last.phases[0] if phase.startswith("step")]  # only exported
    assert soak.result(tmp_path / "out") == whole


def test_more_signals_than_one_save_the_same_checkpoint(place, whole, tmp_path):
    arguments = arguments_of(place, tmp_path / "out", "deepspeed", save_steps=0)
    for strike in (Strike("step", signal.SIGTERM, count=6, times=3), Strike("saving", signal.SIGUSR1, times=2)):
        life = live(arguments, strike=strike)
        if strike.phase == "step":
            assert life.codes == [75, 75] and "stopped by a signal after step 6 of 24" in life.said, life.said[-3000:]
        else:
            assert life.codes == [0, 0]  # nothing is saved without a signal, so none was sent
    assert soak.result(tmp_path / "out") == whole


def test_a_rank_killed_inside_of_an_accumulation_window_goes_on_bitwise(place, tmp_path):
    windows = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 8, "save_steps": 2}
    whole = arguments_of(place, tmp_path / "whole", "plain", **windows)
    assert live(whole).codes == [0, 0]
    arguments = arguments_of(place, tmp_path / "out", "plain", **windows)
    killed = live(arguments, strike=Strike("step", rank=1, count=4, delay=0.02))
    assert (
        killed.struck and killed.phases[1][-1] == "step 4" and not any(phase == "step 5" for phase in killed.phases[0])
    )
    assert live(arguments).codes == [0, 0]
    assert soak.result(tmp_path / "out") == soak.result(tmp_path / "whole")


def test_from_four_ranks_to_one_and_back(place, whole, tmp_path):
    """ZeRO-3 on 4, FSDP2 on 2, one process, ZeRO-3 on 4: stopped by a signal each time, the same global batch."""
    starts = [("deepspeed", 4, 1), ("fsdp", 2, 2), ("plain", 1, 4), ("deepspeed", 4, 1)]
    for engine, world, batch in starts:
        arguments = arguments_of(place, tmp_path / "out", engine, per_device_train_batch_size=batch, save_steps=0)
        life = live(arguments, world, Strike("step", signal.SIGTERM, rank=world - 1, count=5))
        assert life.codes == [75] * world, life.said[-3000:]
    assert live(arguments, world).codes == [0] * world
    losses, wanted = soak.result(tmp_path / "out")[1], whole[1]
    assert [step for step, _ in losses] == [step for step, _ in wanted]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in wanted], rel=1e-4)


def test_the_training_goes_on_while_a_checkpoint_is_written(place, tmp_path, monkeypatch):
    real = checkpoint.write_safetensors

    def slow(path: Path, tensors: dict) -> None:
        time.sleep(0.3)
        real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_safetensors", slow)
    train(recipe_of(place, tmp_path / "out", save_steps=12))
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    order = [(record["kind"], record["step"]) for record in records if record["kind"] in ("train", "save")]
    assert order.index(("save", 12)) > order.index(("train", 14))  # complete only after later steps
    first = next(record for record in records if record["kind"] == "save")
    assert first["beside"] > 1.0  # four files
    state = json.loads((tmp_path / "out/checkpoints/step-000012/state.json").read_text())
    assert state["versions"]["torch"] == torch.__version__ and set(state["versions"]) == set(checkpoint.LIBRARIES)


def test_a_signal_while_the_model_is_loaded_stops_the_run_before_the_first_step(place, tmp_path):
    life = live(
        arguments_of(place, tmp_path / "out", "deepspeed"), strike=Strike("loading the model", signal.SIGTERM, rank=1)
    )
    assert life.codes == [75, 75] and "stopped by a signal before the first step of this start" in life.said
    assert not [phase for phase in life.phases[0] if phase.startswith("step")]


def test_a_signal_while_a_checkpoint_is_written_waits_for_its_end(place, whole, tmp_path):
    arguments = arguments_of(place, tmp_path / "out", "deepspeed")
    life = live(arguments, strike=Strike("saving", signal.SIGTERM, rank=1, times=2))
    assert life.codes == [75, 75] and "stopped by a signal after step " in life.said
    assert live(arguments).codes == [0, 0]
    assert soak.result(tmp_path / "out") == whole


def test_a_rank_that_stands_still_is_named(place, tmp_path):
    arguments = arguments_of(place, tmp_path / "out", "plain", ddp_timeout=4)
    life = live(arguments, strike=Strike("step", signal.SIGSTOP, rank=1, count=4), grace=1)
    assert life.codes == [LOST, None]  # the launcher ends the one that does not answer
    here = socket.gethostname()
    assert f"error: rank 0 on {here}: nothing went on for 4 s in step " in life.said
    assert re.search(
        f"rank 1 on {here}, last heard of in [a-z0-9 ]+, does not answer: it is stopped, or its host or link", life.said
    )


class Quiet(Watch):
    """Judges only when it is asked."""

    def _judge(self) -> None:
        pass


@pytest.fixture
def watches() -> Iterator[list[Watch]]:
    store = dist.TCPStore("127.0.0.1", soak.free_ports(1)[0], is_master=True)
    three = [Quiet(rank, 3, 1.6, store) for rank in range(3)]
    yield three
    for watch in three:
        watch.close()


def verdicts(watches: list[Watch]) -> list[str | None]:
    found: list[str | None] = [None] * len(watches)

    def ask(rank: int) -> None:
        found[rank] = watches[rank]._verdict()

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(watches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_rank_that_is_behind_speaks_for_itself_and_another_one_for_the_rest(watches):
    for watch in watches:
        watch.at("reading the data")
    for watch in (watches[0], watches[2]):
        watch.at("loading the model")
        watch.call()
    first, behind, third = verdicts(watches)
    assert first is not None and behind is not None and third is None
    host = socket.gethostname()
    assert (
        first.startswith(f"rank 0 on {host}: nothing went on for 1.6 s in loading the model")
        and "--ddp_timeout" in first
    )
    assert f"rank 1 on {host}, in reading the data, is behind the others" in first and "does not answer" not in first
    assert behind.startswith(f"rank 1 on {host}: nothing went on for 1.6 s in reading the data")


def test_a_link_that_fails_between_ranks_that_wait_for_each_other_is_guessed(watches):
    for watch in watches:
        watch.at("step 3")
        watch.call()
    first, *others = verdicts(watches)
    assert (
        first is not None
        and "all ranks answer and are at the same place: a link between two of them may be down" in first
    )
    assert others == [None, None]


def test_a_rank_that_is_heard_of_late_or_not_at_all_does_not_silence_the_judge(watches):
    """The others' signs are read twice; a rank may be in the second reading only, and all but this one may be gone."""
    asked = watches[1]
    told = {rank: Life("here", "step 3", 7, 1) for rank in range(3)}
    readings = iter([{0: told[0]}, told])
    asked._everyone = lambda: next(readings)
    said = asked._verdict()
    assert said is not None and "rank 0 on here, last heard of in step 3, does not answer" in said
    readings = iter([told, told])  # its own word does not get through either
    said = asked._verdict()
    assert said is not None and "rank 1 on here" in said and "rank 2 on here" in said


def test_a_rank_whose_word_did_not_get_through_once_tells_again(watches):
    watch, store = watches[0], watches[0].store
    failed = threading.Event()

    class Failing:
        def set(self, *_: object) -> None:
            failed.set()
            raise RuntimeError("timed out")

    watch.store = Failing()
    assert failed.wait(5)
    before, watch.store = watch.reports, store
    deadline = time.monotonic() + 10
    while watches[1]._everyone()[0].reports <= before:
        assert time.monotonic() < deadline, "it told nothing any more"
        time.sleep(0.05)


def test_a_store_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "node-17")
    store = dist.TCPStore("127.0.0.1", soak.free_ports(1)[0], is_master=True)
    watch = Quiet(0, 1, 1.6, store)
    watch._everyone = lambda: (_ for _ in ()).throw(RuntimeError("gone"))
    said = watch._verdict()
    watch.close()
    assert (
        said is not None
        and "node-17, where the ranks meet, does not answer: the host or the link to it is down" in said
    )


def host_a_store(port: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, is_master=True)
    store.wait(["the end"], timedelta(seconds=100))


def test_a_watch_does_not_wait_long_for_a_store_whose_host_is_gone(monkeypatch):
    """What a soak found: rank 0 was killed while rank 1 opened its second connection."""
    port = soak.free_ports(1)[0]
    host = soak.FORK.Process(target=host_a_store, args=(port,))
    host.start()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    host.kill()
    host.join()
    monkeypatch.setattr(watching, "ANSWER", 1.0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        watching.another(store)
    assert time.monotonic() - began < 30 and store.timeout == timedelta(seconds=60)


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of 700 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a disk of a given size cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_is_full_while_saving_loses_no_checkpoint(place, whole, small_disk):
    output = small_disk / "out"
    arguments = arguments_of(place, output, "deepspeed", save_total_limit=100)
    life = live(arguments)
    assert all(life.codes) and "No space left on device" in life.said and "Traceback" not in life.said, (
        life.codes,
        life.said[-3000:],
    )
    kept = [path.name for path in sorted((output / "checkpoints").glob("step-*"))]
    assert kept and (output / "checkpoints/LATEST").read_text().strip() == kept[-1]
    assert not [path for path in output.rglob("*") if ".tmp" in path.name]  # what was half written is gone
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = live(arguments)
    assert done.codes == [0, 0] and f"resuming from {output}/checkpoints/{kept[-1]}" in done.said
    assert soak.result(output) == whole


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(place, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    life = live(arguments_of(place, small_disk / "out", "plain"))
    assert life.codes == [2, 2]
    assert f"error: output_dir: {small_disk}/out cannot be written to: Read-only file system" in life.said
    assert "loading the model" not in life.phases[0]


# --- gradients that are not finite ------------------------------------------------------------------------------------


def left_out(method: str, engine: str, broken: float) -> bool:
    """A good step, one whose loss is NaN or infinite, and a good one; whether the second left everything as it was."""
    t = Trainee(METHODS[method], engine)
    t.step(0)
    before = t.values() | t.moments() | {f"{a.name}#{k}": v.clone() for a in t.adapters for k, v in a.memory.items()}
    backward = t.engine.backward
    t.engine.backward = lambda loss: backward(loss * broken)
    t.forward_backward(1)
    assert not t.engine.finite()
    t.method.discard(t.adapters)
    rates = t.method.rates(t.adapters, 1, t.total, lambda step: 1e-2)
    assert not t.engine.step(*rates) < float("inf")
    after = t.values() | t.moments() | {f"{a.name}#{k}": v for a in t.adapters for k, v in a.memory.items()}
    same = before.keys() == after.keys() and all(torch.equal(v, before[k]) for k, v in after.items())
    t.engine.backward = backward
    t.forward_backward(2)
    assert t.engine.finite()  # nothing of it is left in the gradients
    t.method.observe(t.adapters, t.engine)
    assert t.engine.step(*rates) < float("inf")
    assert all(v.isfinite().all() for a in t.adapters for v in a.memory.values())
    assert any(not torch.equal(v, before[k]) for k, v in t.values().items())
    return same


@pytest.mark.parametrize(
    "method, broken",
    [("srlora-weight", float("nan")), ("srlora-weight", float("inf")), ("losia-weight", float("nan"))],
)
@pytest.mark.parametrize("engine, world", PLACES)
def test_a_step_whose_gradient_is_not_finite_changes_nothing(engine, world, method, broken):
    assert all(ranks.run(world, left_out, method, engine, broken))


@pytest.fixture
def broken_steps(monkeypatch) -> set[int]:
    """Training steps whose loss is NaN, 1-based."""
    steps: set[int] = set()
    real, seen = loop.training_loss, [0]

    def loss(run, model, batch):
        seen[0] += model.training
        return real(run, model, batch) * (float("nan") if model.training and seen[0] in steps else 1.0)

    monkeypatch.setattr(loop, "training_loss", loss)
    return steps


def recipe_of(place: Path, output: Path, **changes: object):
    return parse(arguments_of(place, output, "plain", resume_from_checkpoint="none", **changes))


def test_steps_are_left_out_and_counted_and_a_resumed_run_knows_it(place, tmp_path, broken_steps, capsys):
    broken_steps |= {2, 3, 7}
    train(recipe_of(place, tmp_path / "out", on_nan="skip"))
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    rows = {record["step"]: record for record in records if record["kind"] == "train"}
    assert [rows[step]["loss"] is None for step in range(1, 9)] == [False, True, True, False, False, False, True, False]
    assert [rows[step].get("skipped", 0) for step in (1, 2, 3, 6, 7, 24)] == [0, 1, 2, 2, 3, 3]
    assert "step 7: the gradient norm is nan: skipped (3 of 7 steps so far)" in capsys.readouterr().out
    wanted = soak.result(tmp_path / "out")
    state = json.loads((tmp_path / "out/checkpoints/step-000021/state.json").read_text())
    assert (state["step"], state["skipped"]) == (21, 3)
    broken_steps.clear()
    shutil.rmtree(tmp_path / "out/checkpoints/step-000024")
    train(parse(arguments_of(place, tmp_path / "out", "plain", on_nan="skip")))
    assert soak.result(tmp_path / "out") == wanted


@pytest.mark.parametrize(
    "policy, steps, message",
    [
        (
            "stop",
            {5},
            "step 5: the gradient norm is nan; lower learning_rate, look at the data, or skip such steps with --on_nan",
        ),
        (
            "skip",
            set(range(4, 24)),
            "step 13: the gradient norm is nan, as in the 9 steps before it; lower learning_rate or look at",
        ),
    ],
)
def test_gradients_that_stay_broken_end_the_run(place, tmp_path, broken_steps, policy, steps, message):
    broken_steps |= steps
    with pytest.raises(FloatingPointError, match=message):
        train(recipe_of(place, tmp_path / "out", on_nan=policy, save_steps=1))
    kept, damaged = newest(tmp_path / "out")
    assert kept is not None and kept.step - kept.skipped == min(steps) - 1 and not damaged
    if policy == "stop":  # and goes on as the message says
        train(parse(arguments_of(place, tmp_path / "out", "plain", on_nan="skip")))
        assert [step for step, _ in soak.result(tmp_path / "out")[1]] == list(range(1, soak.STEPS + 1))
