"""Run a Python program that a model wrote, in a process of its own that has no network, can start no other process and
ends in time.

    run(code) --stdin--> [bwrap] python -I sandbox.py: limits, filter, then the code
                             --a private pipe--> "ready", then a token or the program's error

A program has passed if it reached its end. The token that it then sends is new in every run, so a program that leaves
early with exit code 0, by sys.exit(0) or os._exit(0), has not passed. The program is held back without privileges:

  * The kernel's filter of system calls (seccomp) refuses sockets, new processes, other programs and signals to others.
    Threads are allowed; no process can escape the kill. Where the filter cannot be installed, nothing is run and
    OSError is raised.
  * There are limits on processor time, memory, the size of a file, open files and core dumps, and a kill at the
    wall-clock limit. There is no limit on the number of processes: the filter refuses new ones, and the kernel would
    count all processes of the user.
  * The environment is empty, the working directory is removed afterwards, stdin is empty, and the output goes into a
    file of limited size.

  * Where bubblewrap (bwrap) is installed and the kernel lets it work, the program sees the files of this machine
    read-only, a /tmp of its own, no other process and no network device. Otherwise nothing protects the files: the
    program may write whatever the user may. docs/evaluation.md says what follows from that.
    https://github.com/containers/bubblewrap

The process runs this file too, so it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import secrets
import shutil
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
from functools import cache
from pathlib import Path
from typing import Literal, NoReturn

TIMEOUT, MEMORY = 10.0, 1 << 30  # seconds of a program, bytes of its address space
FILE = 4 << 20  # bytes of any file that a program writes, its output included
FILES = 64  # files that a program has open at a time
SHOWN = 2000  # characters of the end of the output that are kept
SCRATCH = 64 << 20  # bytes of a program's own /tmp under bubblewrap
PROGRAM = Path(__file__)
READY = b"ready\n"


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: Literal["passed", "failed", "timed out"]
    message: str = ""  # its error, the end of its output, or how it ended; empty if it passed

    @property
    def passed(self) -> bool:
        return self.status == "passed"


def run(code: str, timeout: float = TIMEOUT, memory: int = MEMORY) -> Outcome:
    """Run a program to its end, or kill it after `timeout` seconds. memory: bytes of its address space.

    OSError if this system cannot hold the program back; the program was not run then.
    """
    token = secrets.token_hex(16).encode()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, (Path(folder) / "output").open("w+b") as output:
        work = Path(folder) / "work"
        work.mkdir()
        # the pipe by which the process reports; the program's own output goes into the file
        read_end, write_end = os.pipe()
        with os.fdopen(read_end, "rb") as pipe:
            try:
                process = subprocess.Popen(
                    [
                        *(wall := bubblewrap()[0]),
                        *(sys.executable, "-I", "-X", "utf8", str(PROGRAM), str(write_end), str(timeout), str(memory)),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    cwd=work,
                    pass_fds=[write_end],
                    start_new_session=True,
                    # numpy's threads would take all of the memory allowed
                    env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                )
            finally:
                os.close(write_end)
            # wait for the end, and kill the process with its threads in any other case
            late = False
            with process:
                try:
                    process.communicate(token + b"\n" + code.encode("utf-8", "surrogatepass"), timeout=timeout)
                except subprocess.TimeoutExpired:
                    late = True
                finally:
                    if process.returncode is None:
                        os.killpg(process.pid, signal.SIGKILL)
            # This does not wait: the process is dead, bwrap's children die with it, and the program had none.
            report = pipe.read()
        output.seek(max(0, output.seek(0, os.SEEK_END) - 4 * SHOWN))
        shown = output.read().decode(errors="replace").strip()[-SHOWN:]
    if late:
        return Outcome("timed out", f"killed after {timeout:g} s")
    code_of_exit = process.returncode
    if wall and code_of_exit > 128:  # so bwrap says that a signal ended the program
        code_of_exit = 128 - code_of_exit
    # Without READY the process failed before the program began: its limits or its filter could not be installed.
    if not report.startswith(READY):
        reason = shown.rpartition("\n")[2] or describe_exit(code_of_exit)
        raise OSError(f"generated code cannot be held back on this system, so it was not run: {reason}")
    if code_of_exit == 0 and report == READY + token:
        return Outcome("passed")
    return Outcome(
        "failed",
        report.removeprefix(READY).decode(errors="replace").strip() or shown or describe_exit(code_of_exit),
    )


@cache
def bubblewrap() -> tuple[tuple[str, ...], str]:
    """Return the words before the command of a program that make bubblewrap run it, and why there are none: "" if there
    are. It is found out once in a process, by running Python that way.
    """
    if (program := shutil.which("bwrap")) is None:
        return (), "bubblewrap (bwrap) is not installed"
    said = subprocess.run([program, "--help"], capture_output=True, text=True)
    # Python and this file may lie in /tmp, which the program does not see otherwise.
    ours = [str(path) for path in (sys.prefix, sys.base_prefix, PROGRAM) if Path(path).is_relative_to("/tmp")]
    command = (
        *(program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *("--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
        *(("--size", str(SCRATCH)) if "--size" in said.stdout + said.stderr else ()),  # since version 0.7
        *("--tmpfs", "/tmp"),
        *(word for path in ours for word in ("--ro-bind", path, path)),
        *("--dir", "/tmp/work", "--chdir", "/tmp/work", "--"),
    )
    tried = subprocess.run([*command, sys.executable, "-I", "-c", ""], capture_output=True, text=True)
    if tried.returncode:
        reason = tried.stderr.strip().rpartition("\n")[2] or f"it leaves with {tried.returncode}"
        return (), f"bubblewrap does not work here: {reason}"
    return command, ""


def describe_walls() -> str:
    """Say what keeps programs from the files of this machine."""
    _, missing = bubblewrap()
    if missing:
        return f"warning: generated programs may write and delete the files that you may: {missing}"
    return "generated programs run under bubblewrap: read-only files, no network, a /tmp of their own"


def run_all(programs: Sequence[str], timeout: float = TIMEOUT, memory: int = MEMORY) -> list[Outcome]:
    """Run several programs, as many at a time as there are processors. Return the outcomes in the same order."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda code: run(code, timeout, memory), programs))


def describe_exit(code: int) -> str:
    """Say how a process ended that sent no error."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code} before its end"


# --- inside of the process --------------------------------------------------------------------------------------------


def main(write_end: int, timeout: float, memory: int) -> NoReturn:
    """Hold this process back, run the program on its stdin, and send the token if the program reached its end."""
    # The first line is the token. The program gets an empty stdin, where it cannot read the token again.
    token, _, code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").partition("\n")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    set_limits(timeout, memory)
    install_filter(build_filter(platform.machine(), os.getpid()))
    os.write(write_end, READY)
    sys.argv[:] = ["program.py"]
    sys.modules["__main__"] = module = types.ModuleType("__main__")  # dataclasses, typing and unittest look there
    try:
        exec(compile(code, "program.py", "exec"), module.__dict__)
        sys.stdout.flush()
    except BaseException as error:  # SystemExit too: the program's checks were not reached
        os.write(write_end, "".join(traceback.format_exception(error, limit=-3))[-SHOWN:].encode(errors="replace"))
        os._exit(1)
    os.write(write_end, token.encode())
    os._exit(0)  # the program's threads and exit handlers are not waited for


def set_limits(timeout: float, memory: int) -> None:
    """Limit this process, as far as its hard limits allow, to processor seconds, bytes of memory and files."""
    seconds = int(timeout) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILE),
        (resource.RLIMIT_NOFILE, FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most, most) if hard == resource.RLIM_INFINITY else (min(most, hard),) * 2)


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
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # the kernel's AUDIT_ARCH_X86_64 and AUDIT_ARCH_AARCH64
X32 = 0x40000000  # bit of x86_64's second set of numbers
CLONE_THREAD, SOCK_STREAM, EPERM, ENOSYS = 0x10000, 1, 1, 38
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, AND, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06  # of classic BPF
NUMBER, ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2


def build_filter(machine: str, pid: int) -> bytes:
    """Return the filter of system calls for this kind of machine and this process. OSError for other machines.

    The filter is an array of struct sock_filter: u16 code, u8 jump if true, u8 jump if false, u32 value. A jump counts
    the instructions that are left out. Of each call the filter sees struct seccomp_data: the number of the call, the
    architecture and the arguments.
    """
    if machine not in NUMBERS:
        raise OSError(f"the filter of system calls is written for {' and '.join(NUMBERS)}, not for {machine}")
    numbers = NUMBERS[machine]

    def argument(index: int) -> int:
        return 16 + 8 * index  # offset of its low half, on a little-endian machine

    # Numbers mean other calls on another architecture: such a call kills. Then the number is loaded and compared.
    lines = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, ARCH[machine]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]

    def refuse(name: str, *unless: tuple[int, int, int, int], error: int = EPERM) -> None:
        """Add the instructions that refuse a call.

        unless: instructions that look at an argument. The last one jumps over the refusal where the call is allowed
        after all. The accumulator does not hold the number then: such a block has to answer, not fall through.
        """
        answers = [(RETURN, 0, 0, ERRNO | error), (RETURN, 0, 0, ALLOW)] if unless else [(RETURN, 0, 0, ERRNO | error)]
        lines.extend([(EQUAL, 0, len(unless) + len(answers), numbers[name]), *unless, *answers])

    # the second set of numbers of x86_64 is refused as a whole
    if machine == "x86_64":
        lines.extend([(AT_LEAST, 0, 1, X32), (RETURN, 0, 0, ERRNO | EPERM)])
    for name in REFUSED:
        if name in numbers:  # aarch64 has neither fork nor vfork
            refuse(name)
    # The flags of clone3 are in memory, where a filter cannot look. The C library then calls clone, which is allowed
    # for threads.
    refuse("clone3", error=ENOSYS)
    refuse("clone", (LOAD, 0, 0, argument(0)), (ANY_BIT, 1, 0, CLONE_THREAD))
    # raise() and abort() signal their own process
    for name in ("kill", "tgkill"):
        refuse(name, (LOAD, 0, 0, argument(0)), (EQUAL, 1, 0, pid))
    refuse("tkill")
    # asyncio wakes itself through a pair of connected sockets; a pair of datagram sockets could send to any local
    # address
    refuse("socketpair", (LOAD, 0, 0, argument(1)), (AND, 0, 0, 0xF), (EQUAL, 1, 0, SOCK_STREAM))
    # every other call is allowed
    lines.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


def install_filter(instructions: bytes) -> None:
    """Filter the system calls of this process from now on, for good. OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    array = ctypes.create_string_buffer(instructions, len(instructions))
    # struct sock_fprog
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions) // 8, ctypes.addressof(array)))
    zero = ctypes.c_ulong(0)
    for option, value, pointer in (
        (PR_SET_PDEATHSIG, int(signal.SIGKILL), zero),  # if the evaluation is killed, this process is killed too
        (PR_SET_NO_NEW_PRIVS, 1, zero),  # without it only root may filter
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program)),
    ):
        if libc.prctl(option, ctypes.c_ulong(value), pointer, zero, zero):
            raise OSError(f"the kernel refuses prctl({option}): {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]))
