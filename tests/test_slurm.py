"""The scripts in launch/slurm under a real SLURM: to the end, stopped and requeued, cancelled, failed, as a sweep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.soak import live
from tests.slurm import Slurm, cluster, processes, until
from tests.test_launch import ENVIRONMENT, ROOT, place, recipe  # noqa: F401 - place is a fixture
from tests.test_resume import RUN, losses

pytestmark = pytest.mark.timeout(600)  # a job that is requeued starts torch eight times
STEPS = 40
LAUNCHERS = {
    "torchrun": {**RUN, "max_steps": STEPS},
    "deepspeed": {**RUN, "max_steps": STEPS, "engine": "deepspeed", "deepspeed": ROOT / "ds_configs/zero2.json"},
}
OPTIONS = ("--parsable", "--gpus-per-node", 0)  # there are none here
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    with cluster(tmp_path_factory.mktemp("slurm"), GLOO_SOCKET_IFNAME="lo", **ENVIRONMENT) as started:
        yield started


def submit(slurm: Slurm, place: Path, name: str, launcher: str, nodes: int = 2, **changes: object) -> str:  # noqa: F811
    """The number of a job with one rank on each node; place/name is its output_dir, place/name.log its log."""
    options = (*OPTIONS, "--nodes", nodes, "--job-name", name, "--output", f"{place}/%x.log")
    arguments = recipe(place, output_dir=place / name, **LAUNCHERS[launcher], **changes)
    return slurm(
        "sbatch",
        *options,
        "launch/slurm/train.sbatch",
        *arguments,
        cwd=ROOT,
        LAUNCHER=launcher,
        RANK_LOGS=place / "ranks",
    )


def reached(slurm: Slurm, job: str, log: Path, *states: str) -> dict[str, str]:
    """What SLURM knows of the job once it is in one of the states."""

    def says() -> str:
        return f"{slurm.job(job)}\n{log.read_text()[-4000:] if log.exists() else 'no log'}"

    until(lambda: slurm.job(job)["JobState"] in states, 200, says)
    return slurm.job(job)


def first_checkpoint(slurm: Slurm, job: str, output: Path) -> None:
    """Waits for it. The job goes on."""
    log, latest = output.with_suffix(".log"), output / "checkpoints/LATEST"

    def there() -> bool:
        return latest.is_file() or slurm.job(job)["JobState"] in ENDED

    until(there, 200, log.read_text)
    assert latest.is_file(), log.read_text()[-4000:]


def adapter(output: Path) -> bytes:
    return (output / "adapter/adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(place) -> Path:  # noqa: F811
    """What two ranks without SLURM left, never stopped."""
    output = place / "whole"
    life = live(recipe(place, output_dir=output, **LAUNCHERS["torchrun"]))
    assert life.codes == [0, 0], life.said[-3000:]
    return output


@pytest.mark.parametrize(
    "launcher", [name if name == "deepspeed" else pytest.param(name, marks=pytest.mark.wide) for name in LAUNCHERS]
)
def test_a_stopped_job_is_requeued_and_ends_as_if_it_had_not_been(launcher, whole, slurm, place):  # noqa: F811
    output = place / f"stopped-{launcher}"
    log = output.with_suffix(".log")
    job = submit(slurm, place, output.name, launcher, save_steps=2)
    first_checkpoint(slurm, job, output)
    # to the ranks, as --signal does before the end of the time, or to every process of the job
    slurm("scancel", "--signal", "USR1", *(["--full"] if launcher == "deepspeed" else []), job)
    assert reached(slurm, job, log, "PENDING", *ENDED)["JobState"] == "PENDING", log.read_text()[-4000:]
    stopped = int((output / "checkpoints/LATEST").read_text().removeprefix("step-"))
    assert 0 < stopped < STEPS and not (output / "adapter").exists()
    # not after the two minutes that SLURM waits, but not in the same second either: a node would take the job for the
    # one that was ended
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+2")
    done = reached(slurm, job, log, *ENDED)
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), log.read_text()[-4000:]
    said = "\n".join(file.read_text() for file in (place / "ranks" / job).rglob("*.log"))
    assert (
        f"stopped by a signal after step {stopped} of {STEPS}" in said
        and f"{stopped} of {STEPS} steps are done" in said
    )
    if launcher == "torchrun":
        ranks = {node: (place / "ranks" / job).glob(f"node-{node}-start-1/**/stdout.log") for node in range(2)}
        # rank 0 is the one that talks
        assert ["2 rank(s)" in file.read_text() for node in ranks for file in ranks[node]] == [True, False]
        assert losses(output) == losses(whole) and adapter(output) == adapter(whole)
    else:  # another engine than that of `whole`
        assert losses(output) == pytest.approx(losses(whole), rel=1e-3)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, place):  # noqa: F811
    output = place / "cancelled"
    job = submit(slurm, place, output.name, "torchrun", nodes=1, save_steps=2)
    first_checkpoint(slurm, job, output)
    second = submit(slurm, place, output.name, "torchrun", nodes=1)  # of the same name, with a node free
    until(lambda: slurm.job(second)["Reason"] == "Dependency", 20, lambda: str(slurm.job(second)))
    assert (slurm.job(second)["JobState"], slurm.job(job)["JobState"]) == ("PENDING", "RUNNING")
    slurm("scancel", second)
    slurm("scancel", job)
    done = reached(slurm, job, output.with_suffix(".log"), "PENDING", *ENDED)
    assert (done["JobState"], done["Restarts"]) == ("CANCELLED", "0")
    assert "stopped by a signal after step" in (place / "ranks" / job / "stopped").read_text()


def test_a_sweep_trains_every_line_and_a_line_that_fails_is_not_requeued(slurm, place):  # noqa: F811
    (place / "sweep.txt").write_text("--method.rank 3 --learning_rate 2e-3\n--lora_r 8")
    options = (*OPTIONS, "--cpus-per-task", 1, "--array", "1-2", "--output", f"{place}/sweep-%a.log")
    arguments = recipe(place, **{**RUN, "max_steps": 4})
    job = slurm(
        "sbatch",
        *options,
        "launch/slurm/sweep.sbatch",
        place / "sweep.txt",
        *arguments,
        cwd=ROOT,
        SWEEP_DIR=place / "sweep",
        RANK_LOGS=place / "ranks",
    )
    logs = {n: place / f"sweep-{n}.log" for n in (1, 2)}
    done = {n: reached(slurm, f"{job}_{n}", log, *ENDED) for n, log in logs.items()}
    assert [d["JobState"] for d in done.values()] == ["COMPLETED", "FAILED"]
    assert {d["Restarts"] for d in done.values()} == {"0"}
    made = yaml.safe_load((place / "sweep/1/recipe.yaml").read_text())
    assert (made["method"]["rank"], made["learning_rate"], made["max_steps"]) == (3, 2e-3, 4) and adapter(
        place / "sweep/1"
    )
    assert logs[2].read_text().count("unknown setting 'lora_r'") == 1 and not (place / "sweep/2").exists()


def test_jobs_leave_no_process(slurm, place):  # noqa: F811
    until(lambda: not processes(place), 20, lambda: str(processes(place)))
