"""What the ranks of the tests are forked from: a process that has imported everything once (tests/conftest.py).

Imports make half a million objects that stay. DeepSpeed collects garbage whenever it builds an optimizer, and a
collection goes through all of them, which was a quarter of a short life under ZeRO-3. Frozen objects are left out.
"""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed asks once, while it is imported

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import deepspeed  # noqa: F401
import peft  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

from llm_lowrank.run import train  # noqa: F401
from tests import tiny  # noqa: F401

gc.collect()
gc.freeze()
