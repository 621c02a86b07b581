"""Between the last backward of a step and the step itself: gradients are clipped and replaced by directions.

Clipping comes first and uses the norm of the gradients, as the papers' codes do: a direction has another length, and
what an optimizer of its own returns is no gradient at all. The engine is wrapped with max_grad_norm = 0 for that
reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from llm_lowrank.adapters.adapter import Adapter
from llm_lowrank.adapters.direction import Update
from llm_lowrank.adapters.method import Method
from llm_lowrank.engines.base import Engine


def make_step(
    engine: Engine,
    method: Method,
    adapters: Sequence[Adapter],
    step: int,
    rates: Sequence[float],
    max_grad_norm: float,
) -> float:
    """Make the optimizer's step along what the method wants; return the norm of the gradients before clipping.

    step: 0-based. Collective.
    """
    if not method.directs:
        return engine.step(*rates)
    norm = redirect(engine, adapters, step, rates, max_grad_norm)
    engine.step(*rates)
    return norm


def redirect(
    engine: Engine, adapters: Sequence[Adapter], step: int, rates: Sequence[float], max_grad_norm: float
) -> float:
    """Clip the gradients of all adapters together, replace those that adapters direct; return the norm before clipping.

    step: 0-based. rates: one for each group of the optimizer. max_grad_norm: 0 for no clipping. If a gradient is not
    finite, nothing is changed, and the engine leaves the step out. Raise RuntimeError if finite gradients give a
    direction that is not. Collective: the gradients of a decoder layer travel in one buffer, its values in another.
    """
    norm = engine.gradient_norm()
    if not math.isfinite(norm):
        return norm
    factor = min(1.0, max_grad_norm / (norm + 1e-6)) if max_grad_norm else 1.0
    # what is trained beside the adapters, such as rows of the embedding, steps along its clipped gradient
    owned = {p for adapter in adapters for p in adapter.parameters(recurse=False)}
    for p in engine.params if factor < 1.0 else ():
        if p not in owned:
            engine.put_gradients([p], [gradient.mul_(factor) for gradient in engine.whole_gradients([p])])
    for _, group in groupby(adapters, key=lambda adapter: _layer(adapter.name)):
        layer = list(group)
        # one buffer for the gradients of the layer, one for the values that the adapters look at
        trained = [p for adapter in layer for p in adapter.parameters(recurse=False) if p.requires_grad]
        gradients = dict(zip(trained, engine.whole_gradients(trained), strict=True))
        looked_at = [getattr(adapter, name) for adapter in layer for name in adapter.looks_at]
        values = dict(zip(looked_at, engine.whole_masters(looked_at) if looked_at else [], strict=True))
        for gradient in gradients.values():
            gradient.mul_(factor)
        updates = [Update(step, adapter.scale, rates[adapter.group], engine.settings.weight_decay) for adapter in layer]
        seen = [{name: values[getattr(adapter, name)] for name in adapter.looks_at} for adapter in layer]
        found = [{name: gradients[getattr(adapter, name)] for name in adapter.directed} for adapter in layer]
        (kind,) = {type(adapter) for adapter in layer}  # a method makes one kind of adapters
        kind.direct_together(layer, seen, found, updates)
        for adapter, directions in zip(layer, found, strict=True):
            # engines cut spans out of the flattened tensor, and a rule may return a transposed one
            gradients |= {getattr(adapter, name): value.contiguous() for name, value in directions.items()}
        _check_finite(layer, gradients)
        engine.put_gradients(trained, [gradients[p] for p in trained])
    return norm


def _check_finite(layer: list[Adapter], gradients: dict[nn.Parameter, Tensor]) -> None:
    """Look once for the whole layer, since the host waits for the device here."""
    where = [(adapter, getattr(adapter, name)) for adapter in layer for name in adapter.directed]
    good = torch.stack([gradients[p].isfinite().all() for _, p in where])
    if not good.all():
        worst = where[int(good.logical_not().nonzero()[0])][0]
        raise RuntimeError(
            f"{worst.name}: {worst.directing} made a direction that is not finite from finite gradients; not training "
            "on. Try a lower learning_rate, another method.direction, or method.direction.type: none"
        )


def _layer(name: str) -> str:
    """The part of a module's name that names its decoder layer: up to its first number."""
    found = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else ""
