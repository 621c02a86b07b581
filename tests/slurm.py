"""A real SLURM on the loopback interface: a controller and two nodes, n1 and n2, which are both this host."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.soak import free_ports
from tests.debian import need

ROOT = Path(__file__).parents[1]
# of a user whose virtual environment is active
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")
CONFIGURATION = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=10
SchedulerParameters=sched_interval=1
SlurmctldPort={ports[0]}
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    folder: Path
    environment: dict[str, str]  # of its commands, which its jobs get too

    def __call__(self, *command: object, cwd: Path | None = None, **environment: object) -> str:
        """What a command of SLURM says."""
        words, extra = [str(word) for word in command], {name: str(value) for name, value in environment.items()}
        done = subprocess.run(words, cwd=cwd, env=self.environment | extra, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def job(self, number: int | str) -> dict[str, str]:
        """What SLURM knows of a job or of a member of an array."""
        return dict(
            word.split("=", 1) for word in self("scontrol", "--oneliner", "show", "job", number).split() if "=" in word
        )


def until(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what()}"
        time.sleep(0.1)


@contextmanager
def cluster(folder: Path, **environment: str) -> Iterator[Slurm]:
    """SLURM with its state, keys and logs in `folder`. When it is left, nothing of it runs any more."""
    need(PROGRAMS, ("slurm-wlm", "munge"), PATH)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    user = pwd.getpwuid(os.geteuid()).pw_name
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, user=user, ports=free_ports(3)))
    slurm = Slurm(folder, {**os.environ, **environment, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")})
    keeper = subprocess.Popen(
        (sys.executable, "-m", "tests.slurm", folder),
        cwd=ROOT,
        env=slurm.environment,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        idle = ("sinfo", "--noheader", "--states", "idle", "--format", "%D")
        until(lambda: answer(slurm, *idle) == str(len(NODES)), 30, lambda: said(folder))
        yield slurm
    finally:
        keeper.communicate(timeout=60)
    assert keeper.returncode == 0 and not processes(folder)


def keep(slurm: Slurm) -> None:
    """Runs the daemons until its input ends, which it does in whatever way the tests end: a pytest that is killed
    cannot stop anything.
    """
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    # --force: pytest's folders are closed to other users, who need nothing here
    munge = (
        "munged",
        "--foreground",
        "--force",
        *(f"--{option}={slurm.folder}/munge.{name}" for option, name in files.items()),
    )
    daemons = [daemon(slurm, "munge", *munge)]
    try:
        until((slurm.folder / "munge.socket").exists, 20, lambda: said(slurm.folder))
        daemons.append(daemon(slurm, "controller", "slurmctld", "-D"))
        daemons += [daemon(slurm, node, "slurmd", "-D", "-N", node) for node in NODES]
        sys.stdin.read()
    finally:
        answer(slurm, "scancel", "--user", str(os.geteuid()))
        deadline = time.monotonic() + 20
        while answer(slurm, "squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in daemons:
            process.terminate()
        psutil.wait_procs([psutil.Process(process.pid) for process in daemons], timeout=10)
        left = processes(slurm.folder)  # of a job that did not end when it was told to
        for p in left:
            p.kill()
        psutil.wait_procs(left, timeout=10)


def daemon(slurm: Slurm, name: str, *command: str) -> subprocess.Popen[bytes]:
    with (slurm.folder / f"{name}.out").open("wb") as log:
        return subprocess.Popen(command, cwd=slurm.folder, env=slurm.environment, stdout=log, stderr=subprocess.STDOUT)


def answer(slurm: Slurm, *command: str) -> str:
    """What a command says to a SLURM that may not be up."""
    try:
        return subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=10).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""


def processes(folder: Path) -> list[psutil.Process]:
    """The other ones that carry the folder in their command or environment, or were started in it: a step's daemon
    hides both.
    """
    found = []
    for p in psutil.process_iter():
        try:
            if p.pid != os.getpid() and str(folder) in " ".join((*p.cmdline(), *p.environ().values(), p.cwd())):
                found.append(p)
        except psutil.Error:
            continue
    return found


def said(folder: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in sorted(folder.glob("*.out")))


if __name__ == "__main__":
    keep(Slurm(Path(sys.argv[1]), dict(os.environ)))
