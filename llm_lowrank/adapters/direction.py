"""What the optimizer steps along in the place of the gradients of A and B.

A direction is the rule of one paper: it looks at both factors of a layer and at both gradients, and returns what the
optimizer gets instead. A field of every method with pairs names it, so that a rule goes with every start and every
exchange. The rules are in methods/directions/, one paper, one file.

    G = dL/dW      g_A = s B^T G  (r, n)      g_B = s G A^T  (m, r)      G is never formed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import draccus
from torch import Tensor

from llm_lowrank.numerics.pairs import Pairs


@dataclass(frozen=True)
class Update:
    """The step for which a direction is wanted."""

    step: int  # 0-based
    scale: float  # s of the layer
    rate: float  # the learning rate of the layer's pairs
    weight_decay: float  # decoupled: the optimizer takes rate * weight_decay of every value


def wrong_decays(settings: object, section: str, *names: str) -> list[str]:
    """A sentence for each of these settings of a section that is no weight of the past in a mean."""
    values = {name: getattr(settings, name) for name in names}
    return [f"{section}.{k} must be in [0, 1), not {v}" for k, v in values.items() if not 0 <= v < 1]


@dataclass(frozen=True)
class Direction(draccus.ChoiceRegistry):
    """The rule that turns the two gradients of a layer into what the optimizer steps along.

    A rule sees one layer and does not communicate. What it returns depends on its arguments alone. It draws no random
    numbers, and it leaves what is not finite as it is, so that a bad gradient is seen. It works in float64, and its
    eigenvalues, of r x r matrices, come from numerics.gram, which takes them on the host: equal inputs give equal bits
    on every rank.
    """

    own_step: ClassVar[bool] = False
    """Whether the rule is an optimizer of its own, which `optim: sgd` only carries out."""
    survives_exchange: ClassVar[bool] = True
    """Whether pairs may be exchanged: the rule remembers nothing, or `rebase` renews what it remembers."""

    def __post_init__(self) -> None:
        if complaints := self.complaints():
            raise ValueError("\n".join(complaints))

    def complaints(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        return []

    def wrong_decays(self, *names: str) -> list[str]:
        """A sentence for each of these settings that is no weight of the past in a mean."""
        return wrong_decays(self, "method.direction", *names)

    def wrong_warmup(self, warmup: int) -> list[str]:
        """A sentence if the rule cannot begin after so many steps."""
        return [] if warmup >= 0 else [f"method.direction.warmup must be at least 0, not {warmup}"]

    def wrong_eps(self, eps: float) -> list[str]:
        """A sentence if this cannot keep a denominator above 0."""
        return [] if eps > 0 else [f"method.direction.eps must be above 0, not {eps:g}"]

    def remembered(self, rank: int, m: int, n: int) -> int:
        """The bytes that the rule remembers of a layer, on every rank."""
        return 0

    def direct(self, pairs: Pairs, gradients: Pairs, memory: dict[str, Tensor], update: Update) -> Pairs:
        """Return what the optimizer gets in the place of g_A and g_B. Local.

        pairs: A (r, n) and B (m, r), float64. gradients: g_A and g_B in the same places, clipped, float64.
        memory: what the rule remembers of the layer, changed in place; a checkpoint saves it.
        """
        raise NotImplementedError

    def rebase(self, before: Pairs, after: Pairs, memory: dict[str, Tensor]) -> None:
        """Renew what the rule remembers after an exchange put the pairs `after` in the place of `before`. Local."""


@Direction.register_subclass("none")
@dataclass(frozen=True)
class Gradient(Direction):
    """The gradients themselves, as in LoRA."""


GRADIENT = Gradient()
