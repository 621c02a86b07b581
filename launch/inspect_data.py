"""Look at the data before training: `python launch/inspect_data.py`, the same as `llm-lowrank inspect`."""

import sys
from functools import partial

from llm_lowrank.__main__ import run

main = partial(run, "inspect")

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
