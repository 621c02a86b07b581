"""What one rank holds in memory: every engine states it in its own file, `--dry_run` prints it.

It is computed from the shapes of a model; nothing is loaded and nobody communicates.
"""

from __future__ import annotations

from dataclasses import dataclass

Amount = tuple[float, str]  # bytes, and the formula that gives them
NOTHING: Amount = (0.0, "-")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model with its adapters. A pair is (elements, bytes) of one parameter."""

    frozen: list[tuple[int, int]]
    bank: list[tuple[int, int]]
    trained: list[tuple[int, int]]
    statistics: tuple[int, int]  # bytes that the method remembers: over all ranks, and on each
    layer: int  # bytes of the largest decoder layer
    layers: int  # bytes of all of them; the rest is embeddings, the output layer and the last norm
    decoded: int  # bytes of the largest W that is made for use: a quantized one, decoded; 0 if there is none
    persistent: int  # elements up to which ZeRO-3 leaves a parameter gathered

    @property
    def parts(self) -> tuple[int, int, int]:
        """W, K, T of the formulas: the bytes of the frozen weights, of the bank and of what is trained."""
        w, k, t = (sum(nbytes for _, nbytes in part) for part in (self.frozen, self.bank, self.trained))
        return w, k, t


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a rank holds under one way to spread a model, with the formulas: a column of the table."""

    title: str  # above the column
    chosen: bool = True  # whether the engine's settings ask for this way, of those that the engine knows
    legend: str = ""  # the letters of the formulas, where they are not W, K, T or N
    notes: tuple[str, ...] = ()  # what else the settings change, printed if this way is chosen

    frozen: Amount
    bank: Amount
    adapters: Amount
    master: Amount = NOTHING
    gradients: Amount
    moments: Amount
    persistent: Amount = NOTHING
    gathered: Amount = NOTHING

    def rows(self, sizes: Sizes, world: int) -> dict[str, Amount]:
        """Return the rows of the table. Statistics and decoded weights do not depend on the engine."""
        shared, each = sizes.statistics
        return {
            "frozen weights": self.frozen,
            "bank": self.bank,
            "adapters": self.adapters,
            "adapters, master copy": self.master,
            "gradients": self.gradients,
            "moments": self.moments,
            "importance statistics": (shared / world + each, "S / N + E"),
            "small parameters, kept whole": self.persistent,
            "gathered for use, at most": self.gathered,
            "decoded for use": (sizes.decoded, "D"),
        }
