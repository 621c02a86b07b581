"""One training run: its recipe and command line, the loop, and what the loop prints, measures, saves and plans.

This is the only place that reads a Recipe. What could serve another training loop belongs to a room below.
"""
