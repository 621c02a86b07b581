"""LoRA: y = W x + s B A x, W frozen, B zero at the start.  https://arxiv.org/abs/2106.09685

With use_rslora s = alpha / sqrt(rank), so that the learning does not slow down as the rank grows.  https://arxiv.org/abs/2312.03732
"""

from dataclasses import dataclass

from llm_lowrank.method import Method


@Method.register_subclass("lora")
@dataclass(frozen=True)
class LoRA(Method):
    """Train rank pairs per module; nothing is ever exchanged."""
