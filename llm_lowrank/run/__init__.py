"""One training run: its recipe and command line, the loop, and what the loop prints, measures, saves and plans.

This is the only place that reads a Recipe. What could serve another training loop belongs to a room below.
"""

from pathlib import Path

ROOM = Path(__file__).parent
# the folder of ds_configs/ and recipes/: the root of a checkout, and in a wheel this room (pyproject.toml)
SHIPPED = ROOM if (ROOM / "ds_configs").is_dir() else ROOM.parents[1]
