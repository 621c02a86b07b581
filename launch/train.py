"""Instruction-tune a model: `deepspeed | torchrun | python launch/train.py`, the same as `llm-lowrank train`."""

import sys
from functools import partial

from llm_lowrank.__main__ import run

main = partial(run, "train")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
