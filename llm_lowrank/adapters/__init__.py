"""What is trained beside a frozen weight, the exchange that moves pairs, and the hooks that a method fills in.

Everything here holds for every method. What is peculiar to one paper belongs to methods/, how a parameter is sharded to
engines/.
"""
