"""Two hosts and the link between them: network namespaces with a veth pair, one rank in each, started by torchrun and
by deepspeed.

Needs root, for the namespaces; what belongs to them goes with them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import soak
from tests.debian import need
from tests.test_launch import DEEPSPEED, ENVIRONMENT, ROOT

PORT = 29771
BOUND = 90.0  # seconds after the cut in which everything has ended; ddp_timeout is 8 of them
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--master_port={PORT}"]


class Hosts:
    """lowrank-0 and lowrank-1, each with its name, an address and one end of the link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"lowrank-{i}" for i in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]
        lines = ["127.0.0.1 localhost", *map(" ".join, zip(self.addresses, self.names, strict=True))]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        self.remove()
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "link0",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "link1",
            "netns",
            self.names[1],
        )
        for i, name in enumerate(self.names):
            ip("-n", name, "addr", "add", f"{self.addresses[i]}/24", "dev", f"link{i}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"link{i}", "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def link(self, state: str) -> None:
        ip("-n", self.names[0], "link", "set", "link0", state)

    def start(self, i: int, command: list[str]) -> subprocess.Popen[str]:
        """On host i, in a process group of its own; what it says goes to a file."""
        environment = os.environ | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": f"link{i}"}
        named = f'mount --bind {self.folder}/hosts /etc/hosts && hostname {self.names[i]} && exec "$@"'
        isolated = ["ip", "netns", "exec", self.names[i], "unshare", "--uts", "--mount", "sh", "-c", named, "sh"]
        with self.log(i).open("w") as log:
            return subprocess.Popen(
                [*isolated, *command], cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def log(self, i: int) -> Path:
        return self.folder / f"log-{i}"

    def said(self, i: int) -> str:
        return self.log(i).read_text(errors="replace")


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip())


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Hosts]:
    need(["ip"], ["iproute2"])
    try:
        made = Hosts(tmp_path_factory.mktemp("hosts"))
    except OSError as error:
        pytest.skip(f"two hosts need network namespaces, which cannot be made here: {error}")
    yield made
    made.remove()


def launcher(kind: str, hosts: Hosts, i: int) -> list[str]:
    if kind == "torchrun":
        return [*TORCHRUN, f"--node_rank={i}", f"--master_addr={hosts.addresses[0]}"]
    (hosts.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    place = ["--hostfile", str(hosts.folder / "hostfile"), "--no_ssh", "--node_rank", str(i)]
    return [DEEPSPEED[0], *place, "--master_addr", hosts.addresses[0], "--master_port", str(PORT)]


def start(kind: str, hosts: Hosts, arguments: list[str]) -> list[subprocess.Popen[str]]:
    return [hosts.start(i, [*launcher(kind, hosts, i), str(ROOT / "launch/train.py"), *arguments]) for i in range(2)]


def ended(runs: list[subprocess.Popen[str]], seconds: float) -> list[int | None]:
    """Exit codes; None: had to be killed."""
    deadline = time.monotonic() + seconds
    codes: list[int | None] = []
    for run in runs:
        try:
            codes.append(run.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            codes.append(None)
            os.killpg(run.pid, 9)
            run.wait()
    return codes


@pytest.mark.parametrize("kind", [pytest.param("torchrun", marks=pytest.mark.wide), "deepspeed"])
def test_a_link_that_is_cut_ends_the_run_with_a_word_and_it_goes_on_when_the_link_is_back(
    hosts, place, whole, tmp_path, kind
):
    output = tmp_path / "out"
    arguments = soak.arguments_of(place, output, "deepspeed", ddp_timeout=8)
    runs = start(kind, hosts, arguments)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints/LATEST").is_file():
        assert time.monotonic() < deadline and all(run.poll() is None for run in runs), (
            hosts.said(0)[-2000:] + hosts.said(1)[-2000:]
        )
        time.sleep(0.02)
    hosts.link("down")
    try:
        codes = ended(runs, BOUND)
    finally:
        hosts.link("up")
    assert None not in codes and 0 not in codes, (codes, hosts.said(0)[-2000:], hosts.said(1)[-2000:])
    first, second = ([line for line in hosts.said(i).splitlines() if "error: rank" in line][-1] for i in range(2))
    assert f"rank 0 on {hosts.names[0]}: nothing went on for 8 s in " in first
    assert f"rank 1 on {hosts.names[1]}" in first and "its host or link is down" in first
    assert f"rank 1 on {hosts.names[1]}: nothing went on for 8 s in " in second
    assert "where the ranks meet, does not answer: the host or the link to it is down" in second
    assert ended(start(kind, hosts, arguments), 150) == [0, 0], hosts.said(0)[-2000:] + hosts.said(1)[-2000:]
    assert soak.result(output) == whole
