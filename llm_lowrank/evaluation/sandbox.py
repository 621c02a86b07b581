"""Runs a Python program that a model wrote, in a process of its own that has no network, can start nothing and ends in
time.

    run(code) --stdin--> python -I sandbox.py: limits, filter, then the code --a private pipe--> "ready", then a token
    or its error

A program has passed if it reached its end: the token that comes back then is new in every run, so leaving early with
exit code 0, as sys.exit(0) or os._exit(0) do, is no pass. What holds the program back needs no privileges:

  * the kernel's filter of system calls (seccomp) refuses sockets, new processes, other programs and signals to others.
  Threads are allowed;
    there is no process to escape the kill. Where the filter cannot be installed nothing is run: an OSError.
  * limits on processor time, memory, the size of a file, open files and core dumps, and a kill at the wall-clock limit.
  There is none on
    the number of processes, which the filter refuses and which the kernel would count over everything that the user
    runs.
  * an empty environment, a working directory that is removed afterwards, no stdin, and output into a file of limited
  size.

It does not protect files: the program may read and write what the user may. docs/evaluation.md says what follows from
that.

This file is also what the process runs, so it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

TIMEOUT, MEMORY = 10.0, 1 << 30  # seconds of a program, bytes of its address space
FILE = 4 << 20  # bytes of any file that it writes, its output included
FILES = 64  # open at a time
SHOWN = 2000  # characters of its output that are kept: the last ones
PROGRAM = Path(__file__)
READY = b"ready\n"


@dataclass(frozen=True)
class Outcome:
    status: Literal["passed", "failed", "timed out"]
    message: str = ""  # why it did not pass: its error, the end of its output, or how it ended

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(code: str, timeout: float = TIMEOUT, memory: int = MEMORY) -> Outcome:
    """Runs the program to its end, or kills it after `timeout` seconds.

    OSError if it cannot be held back here: then it was not run.
    """
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, (Path(folder) / "output").open("w+b") as output:
        work = Path(folder) / "work"
        work.mkdir()
        told, tell = os.pipe()
        with os.fdopen(told, "rb") as pipe:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-X", "utf8", str(PROGRAM), str(tell), str(timeout), str(memory)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    cwd=work,
                    pass_fds=[tell],
                    start_new_session=True,
                    # numpy's threads would take all of the memory allowed
                    env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            finally:
                os.close(tell)
            late = False
            with process:
                try:
                    process.communicate(token + b"\n" + code.encode("utf-8", "surrogatepass"), timeout=timeout)
                except subprocess.TimeoutExpired:
                    late = True
                finally:
                    if process.returncode is None:
                        os.killpg(process.pid, signal.SIGKILL)
            said = pipe.read()  # it is dead and had no children: this does not wait
        output.seek(max(0, output.seek(0, os.SEEK_END) - 4 * SHOWN))
        shown = output.read().decode(errors="replace").strip()[-SHOWN:]
    if late:
        return Outcome("timed out", f"killed after {timeout:g} s")
    if not said.startswith(READY):
        reason = shown.rpartition("\n")[2] or describe_exit(process.returncode)
        raise OSError(f"generated code cannot be held back on this system, so it was not run: {reason}")
    if process.returncode == 0 and said == READY + token:
        return Outcome("passed")
    return Outcome(
        "failed",
        said.removeprefix(READY).decode(errors="replace").strip() or shown or describe_exit(process.returncode),
    )


def run_all(programs: Sequence[str], timeout: float = TIMEOUT, memory: int = MEMORY) -> list[Outcome]:
    """The same for several, as many at a time as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda code: run(code, timeout, memory), programs))


def describe_exit(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code} before its end"


# --- inside of the process --------------------------------------------------------------------------------------------


def main(tell: int, timeout: float, memory: int) -> NoReturn:
    """Holds this process back, runs the program on its stdin, and tells the token if the program reached its end."""
    token, _, code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").partition("\n")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    limit(timeout, memory)
    install(filter_of(platform.machine(), os.getpid()))
    os.write(tell, READY)
    sys.argv[:] = ["program.py"]
    sys.modules["__main__"] = module = types.ModuleType("__main__")  # dataclasses, typing and unittest look there
    try:
        exec(compile(code, "program.py", "exec"), module.__dict__)
        sys.stdout.flush()
    except BaseException as error:  # SystemExit too: the checks behind it were not made
        os.write(tell, "".join(traceback.format_exception(error, limit=-3))[-SHOWN:].encode(errors="replace"))
        os._exit(1)
    os.write(tell, token.encode())
    os._exit(0)  # what the program left to be done at exit is not waited for


def limit(timeout: float, memory: int) -> None:
    seconds = int(timeout) + 1
    for what, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard),) * 2)


# System calls by their numbers. https://github.com/torvalds/linux arch/x86/entry/syscalls/syscall_64.tbl,
# include/uapi/asm-generic/unistd.h
REFUSED = (
    "socket",
    "connect",
    "fork",
    "vfork",
    "execve",
    "execveat",
    "ptrace",
    "process_vm_readv",
    "process_vm_writev",
    "rt_sigqueueinfo",
    "rt_tgsigqueueinfo",
    "pidfd_send_signal",
    "pidfd_getfd",
    "io_uring_setup",
    "io_uring_enter",
    "io_uring_register",
)
NEW = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "clone3": 435,
    "pidfd_getfd": 438,
}
NUMBERS = {
    "x86_64": NEW
    | {
        "socket": 41,
        "connect": 42,
        "socketpair": 53,
        "clone": 56,
        "fork": 57,
        "vfork": 58,
        "execve": 59,
        "kill": 62,
        "ptrace": 101,
        "rt_sigqueueinfo": 129,
        "tkill": 200,
        "tgkill": 234,
        "rt_tgsigqueueinfo": 297,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "execveat": 322,
    },
    "aarch64": NEW
    | {
        "ptrace": 117,
        "kill": 129,
        "tkill": 130,
        "tgkill": 131,
        "rt_sigqueueinfo": 138,
        "socket": 198,
        "socketpair": 199,
        "connect": 203,
        "clone": 220,
        "execve": 221,
        "rt_tgsigqueueinfo": 240,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "execveat": 281,
    },
}
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_..., what the kernel calls them
X32 = 0x40000000  # bit of x86_64's second set of numbers
CLONE_THREAD, SOCK_STREAM, EPERM, ENOSYS = 0x10000, 1, 1, 38
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, AND, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06  # of classic BPF
NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2


def filter_of(machine: str, pid: int) -> bytes:
    """The filter as an array of struct sock_filter: u16 code, u8 jump if true, u8 jump if false (instructions to leave
    out), u32 value.
    """
    if machine not in NUMBERS:
        raise OSError(f"the filter of system calls is written for {' and '.join(NUMBERS)}, not for {machine}")
    numbers = NUMBERS[machine]

    def argument(index: int) -> int:
        return 16 + 8 * index  # offset of its low half, on a little-endian machine

    lines = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, ARCH[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]

    def refuse(name: str, *unless: tuple[int, int, int, int], error: int = EPERM) -> None:
        """`unless`: instructions whose last one leaves out one instruction, the refusal, where the call is allowed
        after all.
        """
        answers = [(RETURN, 0, 0, ERRNO | error), (RETURN, 0, 0, ALLOW)] if unless else [(RETURN, 0, 0, ERRNO | error)]
        lines.extend([(EQUAL, 0, len(unless) + len(answers), numbers[name]), *unless, *answers])

    if machine == "x86_64":
        lines.extend([(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, ERRNO | EPERM)])
    for name in REFUSED:
        if name in numbers:  # aarch64 has neither fork nor vfork
            refuse(name)
    # its flags are in memory, where a filter cannot look; the C library then calls clone
    refuse("clone3", error=ENOSYS)
    refuse("clone", (LOAD, 0, 0, argument(0)), (ANY_BIT, 1, 0, CLONE_THREAD))
    for name in ("kill", "tgkill"):
        refuse(name, (LOAD, 0, 0, argument(0)), (EQUAL, 1, 0, pid))  # raise() and abort() signal their own process
    refuse("tkill")
    # asyncio wakes itself through a pair of connected sockets; a pair of datagram sockets could send to any local
    # address
    refuse("socketpair", (LOAD, 0, 0, argument(1)), (AND, 0, 0, 0xF), (EQUAL, 1, 0, SOCK_STREAM))
    lines.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def install(instructions: bytes) -> None:
    """Filters this process from now on, for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    array = ctypes.create_string_buffer(instructions, len(instructions))
    # struct sock_fprog
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions) // 8, ctypes.addressof(array)))
    zero = ctypes.c_ulong(0)
    for what, value, pointer in (
        (PR_SET_PDEATHSIG, int(signal.SIGKILL), zero),  # if the evaluation is killed
        (PR_SET_NO_NEW_PRIVS, 1, zero),  # without it only root may filter
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)),
    ):
        if libc.prctl(what, ctypes.c_ulong(value), pointer, zero, zero):
            raise OSError(f"the kernel refuses prctl({what}): {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
