"""The layer that is trained beside a frozen weight, the exchange of pairs, and the hooks that a method implements.

Everything here holds for every method. Code for a single paper belongs to methods/, the sharding of parameters to
engines/.
"""
