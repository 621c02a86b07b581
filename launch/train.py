"""Instruction-tune a language model:  deepspeed | torchrun | python launch/train.py [--config_path recipe.yaml] [--name value ...]

Without arguments it trains the demo. Exit codes: 0 done, 1 failed while training, 2 the recipe cannot be run as it stands,
75 stopped by SIGTERM or SIGUSR1 with a checkpoint (--resume_from_checkpoint auto goes on).
"""

import os
import sys
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the launcher starts one process per device
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
GRACE = 3.0  # seconds in which one rank says why, before a launcher ends it because another one left


def main(argv: list[str]) -> int:
    from llm_lowrank.engines.base import RankError
    from llm_lowrank.recipe import parse, validate

    try:
        recipe = parse(argv)
        validate(recipe)
        if recipe.dry_run:
            from llm_lowrank.dry_run import describe

            print(describe(recipe, WORLD)) if RANK == 0 else None
            return 0
    except (ValueError, OSError) as error:  # every rank finds the same mistake: rank 0 tells
        return refuse(str(error)) if RANK == 0 else leave()
    from llm_lowrank.train import Preempted, train

    try:
        train(recipe)
    except Preempted as stop:
        print(stop, flush=True) if RANK == 0 else None
        return STOPPED
    except RankError:  # that rank tells
        return leave()
    except (ValueError, OSError, ImportError) as error:
        return refuse(str(error) if RANK == 0 else f"rank {RANK}: {error}")
    except FloatingPointError as error:  # all ranks have the same gradient norm
        return refuse(str(error), 1) if RANK == 0 else leave(1)
    return 0


def refuse(message: str, code: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


def leave(code: int = 2) -> int:
    time.sleep(GRACE)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
