"""The sandbox: only a program that reaches its end has passed, and what it tries on the way there is refused or ended.

Where something is refused the program itself says so by passing. What does not depend on the files of the machine is
tested under bubblewrap too, which root installs from Debian's package.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llm_lowrank.evaluation import sandbox
from llm_lowrank.evaluation.sandbox import Outcome, run, run_all
from tests.debian import need

BUBBLEWRAP = sandbox.bubblewrap


@pytest.fixture(autouse=True)
def plain(monkeypatch) -> None:
    """No test but those that ask for it runs programs under bubblewrap, whether it is installed or not."""
    monkeypatch.setattr(sandbox, "bubblewrap", lambda: ((), "not asked for"))


@pytest.fixture
def wrapped(plain, monkeypatch) -> None:
    """Programs run under bubblewrap."""
    need(["bwrap"], ["bubblewrap"])
    BUBBLEWRAP.cache_clear()
    if reason := BUBBLEWRAP()[1]:
        pytest.skip(reason)
    monkeypatch.setattr(sandbox, "bubblewrap", BUBBLEWRAP)


@pytest.fixture(params=["plain", "wrapped"])
def either(request) -> None:
    """Programs run in both ways."""
    request.getfixturevalue(request.param)


REFUSED = """
def refused(attempt):
    try:
        attempt()
    except PermissionError:
        return
    raise AssertionError(f"{attempt} was not refused")
"""

ENDINGS = {
    "right": ("def f(x):\n    return x + 1\nassert f(1) == 2", "passed", ""),
    "prints and threads": (
        "import threading\nt = threading.Thread(target=print, args=('hello',))\nt.start()\nt.join()",
        "passed",
        "",
    ),
    "asyncio": ("import asyncio\nasync def f():\n    return 1\nassert asyncio.run(f()) == 1", "passed", ""),
    "looks itself up": (
        "import dataclasses, sys\n@dataclasses.dataclass\nclass A:\n    x: 'int' = 1\n"
        "assert sys.modules[A.__module__].A is A and __name__ == '__main__'",
        "passed",
        "",
    ),
    "a thread that never ends": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()",
        "passed",
        "",
    ),
    "wrong": ("assert 1 + 1 == 3, 'no'", "failed", "AssertionError: no$"),
    "no Python": ("def f(:", "failed", "SyntaxError"),
    "sys.exit before the checks": ("import sys\nsys.exit(0)\nassert False", "failed", "SystemExit: 0$"),
    "os._exit before the checks": ("import os\nos._exit(0)\nassert False", "failed", "exit code 0 before its end"),
    "says that it is ready": (
        "import os\nfor fd in map(int, os.listdir('/proc/self/fd')):\n    try:\n        os.write(fd, b'ready\\n')\n"
        "    except OSError:\n        pass\nos._exit(0)",
        "failed",
        "",
    ),
    "reads": ("input()", "failed", "EOFError"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "failed", "killed by SIGSEGV"),
    "memory": ("x = []\nwhile True:\n    x.append(bytearray(2**24))", "failed", "MemoryError"),
    "floods": ("while True:\n    print('x' * 10000)", "failed", "File too large"),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_only_a_program_that_reaches_its_end_has_passed(case, either):
    code, status, message = ENDINGS[case]
    found = run(code)
    assert found.status == status and re.search(message, found.message), found
    assert len(found.message) <= sandbox.SHOWN and found.passed == (status == "passed")


@pytest.mark.parametrize(
    "code", ["while True:\n    pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(20)"]
)
def test_an_endless_program_is_killed(tmp_path, code):
    began = time.monotonic()
    found = run(
        f"import os, signal, time\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n{code}", timeout=1.5
    )
    assert found == Outcome("timed out", "killed after 1.5 s") and time.monotonic() - began < 10
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_it_starts_nothing_and_signals_nobody(either):
    """So there is no child that could outlive it."""
    ways = [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "subprocess.Popen(['/bin/true'], start_new_session=True)",
        "multiprocessing.Process(target=print).start()",
        "os.kill(os.getppid(), 0)",
        "os.kill(1, 0)",
    ]
    attempts = [f"refused(lambda: {way})" for way in ways]
    code = "\n".join(
        ["import multiprocessing, os, signal, subprocess", REFUSED, *attempts, "assert os.system('true') != 0"]
    )
    assert run(code) == Outcome("passed")
    assert run("import os\nos.kill(os.getpid(), 15)") == Outcome("failed", "killed by SIGTERM")  # itself it may


KNOCK = """
import socket
def knock():
    with socket.create_connection(("127.0.0.1", {port}), timeout=5):
        pass
def knock_local():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect({path!r})
"""


def test_it_has_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "local"))
        local.listen()
        knock = KNOCK.format(port=server.getsockname()[1], path=str(tmp_path / "local"))
        assert run(f"{knock}{REFUSED}refused(knock)\nrefused(knock_local)") == Outcome("passed")
        for listening in (server, local):
            listening.settimeout(0.2)
            with pytest.raises(TimeoutError):
                listening.accept()
        subprocess.run([sys.executable, "-c", f"{knock}\nknock()\nknock_local()"], check=True, timeout=60)
        for listening in (server, local):
            listening.accept()[0].close()


def test_other_ways_to_the_network_are_closed(either):
    calls = [
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    ]
    # io_uring_setup; socket by its x32 number
    numbers = [425] + ([41 | 0x40000000] if platform.machine() == "x86_64" else [])
    raw = f"""
libc = ctypes.CDLL(None, use_errno=True)
for number in {numbers}:
    assert libc.syscall(number, 2, 1, 0) == -1 and ctypes.get_errno() == {errno.EPERM}
"""
    assert run(
        "\n".join(["import ctypes, socket", REFUSED, *(f"refused(lambda: {call})" for call in calls), raw])
    ) == Outcome("passed")


def test_big_files_are_refused(tmp_path):
    file = tmp_path / "big"
    found = run(f"f = open({str(file)!r}, 'wb', buffering=0)\nwhile True:\n    f.write(b'0' * 2**16)")
    assert found.status == "failed" and "File too large" in found.message and file.stat().st_size == sandbox.FILE


def test_it_sees_no_environment_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = f"import os, sys\nopen({str(tmp_path / 'cwd')!r}, 'w').write(os.getcwd())\nopen('left', 'w').close()\n"
    assert run(
        code
        + f"assert 'A_SECRET' not in os.environ and {str(tmp_path)!r} not in sys.path and sys.argv == ['program.py']"
    ).passed
    assert not Path((tmp_path / "cwd").read_text()).exists()


def test_where_it_cannot_be_held_back_nothing_is_run(tmp_path, monkeypatch):
    other = (
        (sandbox.PROGRAM.read_text()).replace('"x86_64": NEW', '"vax": NEW').replace('"aarch64": NEW', '"pdp11": NEW')
    )
    (tmp_path / "sandbox.py").write_text(other)
    monkeypatch.setattr(sandbox, "PROGRAM", tmp_path / "sandbox.py")
    with pytest.raises(OSError, match=f"was not run: .*written for vax and pdp11, not for {platform.machine()}"):
        run(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


def test_several_run_at_once_and_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    meet = "import os, time\nopen({mine!r}, 'w').close()\nwhile not os.path.exists({other!r}):\n    time.sleep(0.01)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    found = run_all([meet.format(mine=a, other=b), meet.format(mine=b, other=a), "assert False", "pass"])
    assert [outcome.passed for outcome in found] == [True, True, False, True]


# Under bubblewrap


def test_a_program_reads_files_and_changes_none(tmp_path_factory, wrapped):
    here = str(sandbox.PROGRAM)  # a file of this library, which may lie in /tmp
    before = sandbox.PROGRAM.read_bytes()
    for attempt in ("os.remove(path)", "os.rename(path, path + '2')", "open(path, 'a')", "os.chmod(path, 0o777)"):
        found = run(f"import os\npath = {here!r}\nopen(path, 'rb').close()\n{attempt}")
        assert re.search("Read-only file system|Permission denied|busy|cross-device", found.message), (attempt, found)
    assert sandbox.PROGRAM.read_bytes() == before
    mine = tmp_path_factory.mktemp("mine") / "mine"
    mine.write_text("kept")
    reason = "FileNotFoundError" if str(mine).startswith("/tmp/") else "Read-only file system"
    assert reason in run(f"import os\nos.remove({str(mine)!r})").message and mine.read_text() == "kept"
    assert run("open('/etc/passwd').read()\nopen('/dev/null', 'w').write('x')") == Outcome("passed")


def test_what_a_program_writes_is_its_own_and_little(wrapped):
    folder = f"/tmp/of-{os.getpid()}"
    assert run(f"import os\nos.mkdir({folder!r})\nopen({folder!r} + '/a', 'w').write('x')\nopen('b', 'w')").passed
    assert not Path(folder).exists()
    for place in ("/dev/shm/a", "/dev/a", "/proc/a", "/a"):
        assert not run(f"open({place!r}, 'w')").passed
    if "--size" in BUBBLEWRAP()[0]:
        found = run(f"for k in range(100):\n    open(str(k), 'wb').write(b'0' * {sandbox.FILE - 1})")
        assert "No space left on device" in found.message


def test_a_program_cannot_undo_the_walls(wrapped):
    undo = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.unshare(0x10000000 | 0x20000)  # a user and a mount namespace of its own, where the kernel lets it
libc.mount(None, b"/", None, 0x20 | 0x1000, None)  # remounted, and no longer read-only
libc.umount2(b"/tmp", 2)
open("/etc/of-a-program", "w")
"""
    found = run(undo)
    assert re.search("Read-only file system|Permission denied", found.message), found
    assert not Path("/etc/of-a-program").exists()


def test_an_endless_program_is_killed_with_all_of_bubblewrap(wrapped):
    began = time.monotonic()
    found = run("while True:\n    pass", timeout=1.537)  # a number by which its processes are found
    assert found == Outcome("timed out", "killed after 1.537 s") and time.monotonic() - began < 10
    deadline = time.monotonic() + 5
    while (left := with_argument("1.537")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def with_argument(word: str) -> list[Path]:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [process] if word.encode() in process.read_bytes().split(b"\0") else []
    return found


def test_a_bubblewrap_that_is_not_there_or_does_not_work_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    BUBBLEWRAP.cache_clear()
    assert BUBBLEWRAP() == ((), "bubblewrap (bwrap) is not installed")
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    BUBBLEWRAP.cache_clear()
    reason = "bubblewrap does not work here: bwrap: No permissions to create a new namespace"
    assert BUBBLEWRAP() == ((), reason)
    monkeypatch.setattr(sandbox, "bubblewrap", BUBBLEWRAP)
    assert sandbox.describe_walls().endswith(f"may write and delete the files that you may: {reason}")
    assert run("pass") == Outcome("passed")  # as ever
    BUBBLEWRAP.cache_clear()


# The filter, read as the kernel reads it: also for the machine that this one is not.


def answer(instructions: bytes, arch: int, number: int, *arguments: int) -> int:
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *[0] * (6 - len(arguments)))
    lines, at, held = [struct.unpack_from("=HBBI", instructions, 8 * k) for k in range(len(instructions) // 8)], 0, 0
    while True:
        code, yes, no, value = lines[at]
        at += 1
        if code == 0x06:
            return value
        if code == 0x20:
            (held,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            held &= value
        else:
            at += yes if {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[code] else no


EPERM, ENOSYS = (0x50000 | number for number in (errno.EPERM, errno.ENOSYS))


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_refuses_what_it_names(machine):
    numbers, arch, pid = sandbox.NUMBERS[machine], sandbox.ARCH[machine], 4711
    instructions = sandbox.build_filter(machine, pid)
    for name, number in numbers.items():
        expected = ENOSYS if name == "clone3" else EPERM
        assert answer(instructions, arch, number) == expected, name
        assert answer(instructions, arch ^ 1, number) == sandbox.KILL
    allowed = set(range(450)) - set(numbers.values())
    assert all(answer(instructions, arch, number) == sandbox.ALLOW for number in allowed)
    assert answer(instructions, arch, numbers["clone"], 0x3D0F00) == sandbox.ALLOW  # the C library's flags of a thread
    assert answer(instructions, arch, numbers["clone"], 0x4111) == EPERM  # and of vfork
    for name in ("kill", "tgkill"):
        assert answer(instructions, arch, numbers[name], pid, 9) == sandbox.ALLOW
        assert answer(instructions, arch, numbers[name], pid + 1, 9) == EPERM
    # SOCK_STREAM | SOCK_CLOEXEC
    assert answer(instructions, arch, numbers["socketpair"], 1, 1 | 0x80000) == sandbox.ALLOW
    assert answer(instructions, arch, numbers["socketpair"], 1, 2) == EPERM
    assert (answer(instructions, arch, 0x40000000 | 41) == EPERM) == (machine == "x86_64")
