"""Programs that tests need beside Python: there, or installed from Debian's packages, or the test is skipped with the
reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

import pytest

LIMIT = 120  # seconds of one apt-get


def need(programs: Sequence[str], packages: Sequence[str], path: str | None = None) -> None:
    """As root they are installed from the packages; otherwise, and where that fails, the test is skipped."""
    if all(shutil.which(program, path=path) for program in programs):
        return
    names = " ".join(packages)
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip(f"{', '.join(programs)} not installed; on Debian: apt-get install {names}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (("update",), ("install", "-y", "--no-install-recommends", *packages)):
        try:
            done = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"apt-get did not install {names} in {LIMIT} seconds")
        if done.returncode:
            pytest.skip(f"apt-get could not install {names}: {done.stderr[-300:]}")
