"""How good a model is, before or after a run trained it. What trains or loads a model is not in here.

    Settings --> the model to evaluate (subject.py) --> tasks --> a JSON file with the results (record.py)

questions    the held-out examples of a run; questions of reasoning-gym tasks
human_eval   programs, which run in the sandbox
mbpp         the same for MBPP
harness      all other tasks, by EleutherAI's lm-eval

Whatever a user can have wrong is reported before the weights are read.
"""

from llm_lowrank.evaluation.run import Settings, evaluate

__all__ = ["Settings", "evaluate"]
