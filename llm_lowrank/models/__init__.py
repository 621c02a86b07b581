"""A model on its way in and out: from a checkpoint to shards, the loss, answers, checkpoints of a run, export and
merging.

Nothing here knows a recipe, a command line or a particular method; those stand above. How rows become tokens is
data/'s.
"""
