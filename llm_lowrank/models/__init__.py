"""Loading a model into shards, its loss and its answers, checkpoints of a run, export and merging.

Nothing here knows a recipe, a command line or a particular method: these belong to the floors above. The way from rows
to tokens belongs to data/.
"""
