"""How good is a model: one that a run made, or the one that it started from.

    Settings --> what is evaluated (subject.py) --> tasks --> one JSON file a run (record.py), answers beside it

questions    the run's own held-out examples; questions of reasoning-gym tasks
human_eval   programs, run in the sandbox
harness      everything else, by EleutherAI's lm-eval

Everything that a user can have wrong is found before the weights are read.
"""

from llm_lowrank.evaluation.run import Settings, evaluate

__all__ = ["Settings", "evaluate"]
