"""Dynamic low-rank adaptation of sharded language models."""

__version__ = "0.1.0"
