"""Arithmetic on tensors and on numbers: pairs, singular pairs, importance, the fused linear, schedules.

Pure functions and small frozen classes: no process group, no model, no file but a cache of singular pairs. Whatever
needs to know how a weight is stored or spread over ranks belongs to codecs/ or engines/.
"""
