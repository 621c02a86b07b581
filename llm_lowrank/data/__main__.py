"""`python -m llm_lowrank.data RECIPE`: make the tokens of a run ahead of it. See llm_lowrank/run/fill.py."""

import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as in launch/train.py

if __name__ == "__main__":
    from llm_lowrank.run.fill import main

    sys.exit(main(sys.argv[1:]))
