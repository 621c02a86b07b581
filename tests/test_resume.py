"""Stopping a run as a scheduler does and going on, by the scripts that a user starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from benchmarks.soak import live
from launch import train
from llm_lowrank.models.checkpoint import later_ones
from llm_lowrank.run.checks import output_dir_conflict
from llm_lowrank.run.recipe import Recipe
from tests.test_launch import ENVIRONMENT, PYTHON, ROOT, TORCHRUN, place, recipe, records, succeed  # noqa: F401 - place is a fixture

STEPS = 60
RUN = {"max_steps": STEPS, "engine": "plain", "learning_rate": 1e-3, "report_to": "none", "save_merged": False}


def start(launcher: tuple[str, ...], arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, str(ROOT / "launch/train.py"), *arguments],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    me = psutil.Process(launcher.pid)
    commands = {p: " ".join(p.cmdline()) for p in me.children(recursive=True)}
    return [
        p for p, command in commands.items() if "launch/train.py" in command and "torch.distributed" not in command
    ] or [me]


def interrupted(launcher: tuple[str, ...], arguments: list[str], output: Path, kind: signal.Signals) -> tuple[int, str]:
    """Starts a run, sends one of its ranks a signal after its first checkpoint, and waits for the end."""
    run = start(launcher, arguments)
    latest, deadline = output / "checkpoints/LATEST", time.monotonic() + 120
    while not latest.is_file():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0][-3000:]
        time.sleep(0.05)
    ranks_of(run)[-1].send_signal(kind)
    said, _ = run.communicate(timeout=120)
    return run.returncode, said


def losses(output: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records(output, "train")}


@pytest.fixture(scope="module")
def whole(place) -> Path:  # noqa: F811
    """Never stopped."""
    output = place / "whole"
    succeed(1, recipe(place, output_dir=output, per_device_train_batch_size=4, **RUN))
    return output


def test_a_run_that_was_stopped_goes_on_bitwise(place, whole, tmp_path):  # noqa: F811 - killed ones: test_faults.py
    output = tmp_path / "out"
    settings = {**RUN, "output_dir": output, "per_device_train_batch_size": 4, "save_steps": 1}
    code, said = interrupted(PYTHON, recipe(place, **settings), output, signal.SIGTERM)
    stopped = int((output / "checkpoints/LATEST").read_text().removeprefix("step-"))
    assert (
        code == 75
        and f"stopped by a signal after step {stopped} of {STEPS}; resume with --resume_from_checkpoint auto" in said
    )
    assert 0 < stopped < STEPS
    assert f"{stopped} of {STEPS} steps are done" in succeed(
        1, recipe(place, **{**settings, "save_steps": 0}, resume_from_checkpoint="auto")
    )
    assert losses(output) == losses(whole)
    wanted, found = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (whole, output))
    assert wanted.keys() == found.keys() and all((wanted[k] == found[k]).all() for k in wanted)


def test_one_rank_of_two_is_told_and_one_process_goes_on(place, whole, tmp_path):  # noqa: F811
    output = tmp_path / "out"
    settings = {**RUN, "output_dir": output, "save_steps": 1}
    code, said = interrupted(TORCHRUN, recipe(place, **settings, per_device_train_batch_size=2), output, signal.SIGUSR1)
    assert code != 0 and "stopped by a signal after step" in said
    succeed(1, recipe(place, **settings, per_device_train_batch_size=4, resume_from_checkpoint="auto"))
    assert losses(output) == pytest.approx(losses(whole), rel=1e-3)


def test_what_cannot_be_gone_on_with_is_refused_by_name(place, tmp_path):  # noqa: F811
    output = tmp_path / "out"
    settings = {**RUN, "output_dir": output, "per_device_train_batch_size": 4, "max_steps": 6, "save_steps": 2}
    succeed(1, recipe(place, **settings))
    other = {"resume_from_checkpoint": "auto", "output_dir": output}

    def refusal(**changes: object) -> str:
        life = live(recipe(place, **{**settings, **other, **changes}), world=1)
        assert life.codes == [2]
        return life.said

    said = refusal(learning_rate=5e-3, **{"method.rank": 3})
    assert (
        "was written by another run" in said
        and "learning_rate: 0.001 in the checkpoint, 0.005 now" in said
        and "method.rank: 4 in the checkpoint, 3 now; give --method.rank 4" in said
    )
    assert "global batch: 4 in the checkpoint, 2 now" in refusal(per_device_train_batch_size=2)
    assert "is no checkpoint" in refusal(resume_from_checkpoint=tmp_path / "nowhere")
    state = json.loads((output / "checkpoints/step-000006/state.json").read_text())
    state["base"] = "another"
    (output / "checkpoints/step-000006/state.json").write_text(json.dumps(state))
    assert "the weights are not those of the checkpoint" in refusal()
    assert "resume_from_checkpoint auto" in refusal(resume_from_checkpoint="none")
    for damaged in (output / "checkpoints").glob("step-*"):
        (damaged / "trained-00000.safetensors").write_bytes(b"")
    kept = sorted(path for path in output.rglob("*") if path.is_file())
    assert "no checkpoint is whole; move them away" in refusal()
    assert sorted(path for path in output.rglob("*") if path.is_file()) == kept, (
        "nothing was cleared for a start from the beginning"
    )


def test_a_finished_run_is_not_written_over_by_a_resume(tmp_path):
    (tmp_path / "out/adapter").mkdir(parents=True)
    (tmp_path / "other/checkpoints/step-000002").mkdir(parents=True)
    for resume, said in (
        ("auto", "a finished run and no checkpoint"),
        (str(tmp_path / "other/checkpoints/step-000002"), "is not empty"),
    ):
        assert said in (
            output_dir_conflict(Recipe(output_dir=str(tmp_path / "out"), resume_from_checkpoint=resume)) or ""
        )
    (tmp_path / "out/checkpoints/step-000002").mkdir(parents=True)
    (tmp_path / "out/checkpoints/step-000004").mkdir()
    (tmp_path / "out/checkpoints/step-000004/state.json").write_text("{}")
    kept = tmp_path / "out/kept/step-000002"  # inside of the folder, and not among its checkpoints
    kept.mkdir(parents=True)
    assert [path.name for path in later_ones(tmp_path / "out", kept)] == ["step-000004"]
    assert later_ones(tmp_path / "out", tmp_path / "other/checkpoints/step-000002") == []
    (tmp_path / "out/checkpoints/step-000004/state.json").unlink()
    for resume in ("auto", str(tmp_path / "out/checkpoints/step-000002")):
        assert output_dir_conflict(Recipe(output_dir=str(tmp_path / "out"), resume_from_checkpoint=resume)) is None


def test_an_older_checkpoint_is_gone_on_from_if_the_later_ones_may_go(place, tmp_path, capsys):  # noqa: F811
    """Two runs in one folder would be mixed: a later resume would take the newest, which is the other run's."""
    output = tmp_path / "out"
    arguments = recipe(place, output_dir=output, **{**RUN, "max_steps": 6, "save_steps": 2, "save_total_limit": 3})
    assert train.main(arguments) == 0
    folders = [output / f"checkpoints/step-{step:06d}" for step in (2, 4, 6)]
    assert sorted((output / "checkpoints").glob("step-*")) == folders
    older = [*arguments, f"--resume_from_checkpoint={folders[0]}"]
    written = {folder: folder.stat().st_ino for folder in folders}
    capsys.readouterr()
    assert train.main(older) == 2
    assert "holds step-000004, step-000006, behind the step-000002 to resume from" in capsys.readouterr().err
    assert {folder: folder.stat().st_ino for folder in folders} == written
    assert train.main([*older, "--overwrite_output_dir=true"]) == 0
    again = {folder: folder.stat().st_ino for folder in folders}
    assert [again[folder] == written[folder] for folder in folders] == [True, False, False]
