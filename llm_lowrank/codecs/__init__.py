"""How a frozen weight is stored: one file per codec."""

from llm_lowrank.codecs.base import Codec
from llm_lowrank.codecs.dense import Dense

__all__ = ["Codec", "Dense"]
