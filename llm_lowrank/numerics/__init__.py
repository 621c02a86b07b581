"""Arithmetic on tensors and on numbers: pairs, singular pairs, importance, the fused linear, schedules. In files.py is
how every room writes a file, so that it is whole or not there.

Pure functions and small frozen classes: no process group, no model, no format of a file. Whatever needs to know how a
weight is stored or spread over ranks belongs to codecs/ or engines/.
"""
