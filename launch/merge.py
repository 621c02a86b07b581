"""Merge an adapter into its base model: `python launch/merge.py`, the same as `llm-lowrank merge`."""

import sys
from functools import partial

from llm_lowrank.__main__ import run

main = partial(run, "merge")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
