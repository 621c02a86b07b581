"""Evaluate a model: `python launch/evaluate.py`, the same as `llm-lowrank evaluate`."""

import sys
from functools import partial

from llm_lowrank.__main__ import run

main = partial(run, "evaluate")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
