"""The command `llm-lowrank train`: a run as a process.

Without arguments the demo is trained. Exit codes: 0 done; 1 failed while training; 2 the recipe cannot be run, or a
file cannot be read or written; 69 another rank was lost or stood still; 75 stopped by SIGTERM or SIGUSR1 with a
checkpoint (--resume_from_checkpoint auto resumes).
"""

import os
import sys
import time
from pathlib import Path

from llm_lowrank.engines.base import LostContact, RankError
from llm_lowrank.engines.watch import LOST
from llm_lowrank.run.checks import validate
from llm_lowrank.run.dry_run import describe
from llm_lowrank.run.recipe import parse
from llm_lowrank.run.signals import Preempted
from llm_lowrank.run.train import train

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
GRACE = 3.0  # seconds in which rank 0 prints the reason before the launcher ends it because another rank left


def main(argv: list[str]) -> int:
    """Train as a command line says; return the exit code."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        recipe = parse(argv)
        validate(recipe)
        if recipe.dry_run:
            if rank == 0:
                print(describe(recipe, world))
            return 0
    except (ValueError, OSError) as error:  # every rank finds the same mistake: rank 0 prints it
        return refuse(str(error)) if rank == 0 else leave()
    try:
        train(recipe)
    except Preempted as stop:
        return report_stop(str(stop)) if rank == 0 else leave(STOPPED)
    except RankError:  # another rank failed and prints its error
        return leave()
    except LostContact as error:  # the launcher names the rank that is gone
        return refuse(str(error), LOST)
    except (ValueError, OSError, ImportError) as error:
        return refuse(str(error) if rank == 0 else f"rank {rank}: {error}")
    except FloatingPointError as error:  # all ranks have the same gradient norm
        return refuse(str(error), 1) if rank == 0 else leave(1)
    return 0


def refuse(message: str, code: int = 2) -> int:
    """Print an error and return the exit code."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def report_stop(message: str) -> int:
    """Print where the run stopped and return the exit code."""
    print(message, flush=True)
    # the exit code of torchrun is 1: a script that sees no other code looks for this file
    if note := os.environ.get("LLM_LOWRANK_STOPPED"):
        Path(note).write_text(f"{message}\n")
    return STOPPED


def leave(code: int = 2) -> int:
    """Return the exit code after rank 0 has had time to print the reason."""
    time.sleep(GRACE)
    return code
