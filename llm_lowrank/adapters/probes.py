"""Products with the gradient of W, which is never formed, from factors of zeros beside the trained pairs.

    G = dL/dW (m, n)

    y = ... + s C (X^T x)      X (n, k) given, C = 0 (m, k)       dL/dC = s G X
    y = ... + s Y (D x)        Y (m, k) given, D = 0 (k, n)       dL/dD = s Y^T G

C and D change nothing, as they are zero. They are leaves of autograd and no parameters: no engine shards them, no
optimizer steps them, and they are gone when they have been read. So the products can be had on every engine and with
every codec, for k (m + 2 n) or k (n + 2 m) numbers. Their gradients add up over micro-batches as those of parameters
do, and `read` adds them up over ranks.

The singular directions of G need a few passes over the same samples (https://arxiv.org/abs/0909.4061, see
numerics/spectrum.py): each product of G is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_lowrank.adapters.adapter import Adapter, generator
from llm_lowrank.engines.base import Engine
from llm_lowrank.numerics.functional import Product
from llm_lowrank.numerics.spectrum import Triplets, randomized_triplets


@dataclass
class Probe:
    """A product of G that the coming backwards make."""

    adapter: Adapter
    product: Product  # beside the trained ones
    leaf: Tensor  # the factor of zeros, whose gradient is read


def probe_columns(adapter: Adapter, x: Tensor) -> Probe:
    """Place a probe for G X: x (n, k) on the engine's device, the same on every rank. Local."""
    leaf = torch.zeros(adapter.shape[0], x.shape[1], device=x.device, requires_grad=True)  # (m, k)
    return _placed(Probe(adapter, Product(x.T, leaf), leaf))


def probe_rows(adapter: Adapter, y: Tensor) -> Probe:
    """Place a probe for G^T Y: y (m, k) on the engine's device, the same on every rank. Local."""
    leaf = torch.zeros(y.shape[1], adapter.shape[1], device=y.device, requires_grad=True)  # (k, n)
    return _placed(Probe(adapter, Product(leaf, y), leaf))


def _placed(probe: Probe) -> Probe:
    assert getattr(probe.adapter, "magnitude", None) is None, (
        f"{probe.adapter.name}: beside trained row lengths there is no probe"
    )
    probe.adapter.probes.append(probe.product)
    return probe


def read(engine: Engine, probes: Sequence[Probe]) -> list[Tensor]:
    """Return G X (m, k) or G^T Y (n, k) of each probe, in float32, and take the probes away. Collective.

    G is the gradient of the loss whose shares the engine has gone backward through since the probe was placed: over all
    micro-batches and ranks.
    """
    found = []
    for probe in probes:
        adapter, leaf = probe.adapter, probe.leaf
        adapter.probes = [product for product in adapter.probes if product is not probe.product]
        mine = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        total = engine.sum(mine).div_(adapter.scale * engine.loss_scale)
        found.append(total if leaf is probe.product.B else total.T)
        leaf.grad = None
    return found


def top_directions(
    adapters: Sequence[Adapter],
    engine: Engine,
    backward: Callable[[], None],
    counts: Sequence[int],
    *,
    columns: Sequence[int],
    niter: int,
) -> list[Triplets]:
    """Return the counts[i] largest singular triplets of G of every adapter, the same on every rank. Collective.

    backward: goes forward and backward through the samples, as in Method.calibrate; it is called 2 niter + 2 times.
    columns: how many columns a product with each G has, at least its count; those beyond min(m, n) are left out. Raise
    ValueError if a gradient is not finite.
    """

    def products(place: Callable[[Adapter, Tensor], Probe], factors: list[Tensor]) -> list[Tensor]:
        # ranks may round a decomposition differently: all take that of rank 0
        factors = engine.broadcast(lambda: factors)
        probes = [place(adapter, factor) for adapter, factor in zip(adapters, factors, strict=True)]
        backward()
        found = read(engine, probes)
        for adapter, product in zip(adapters, found, strict=True):
            if not product.isfinite().all():
                raise ValueError(
                    f"{adapter.name}: the gradient of the calibration samples is not finite; find the sample that "
                    "makes it so, or set dtype: float32"
                )
        return found

    noise = []
    for adapter, width in zip(adapters, columns, strict=True):
        m, n = adapter.shape
        random = generator(adapter.seed, f"{adapter.name} probe")
        with torch.device("cpu"):
            noise.append(torch.randn(n, min(width, m, n), generator=random).to(engine.device))
    found = randomized_triplets(
        partial(products, probe_columns), partial(products, probe_rows), noise=noise, counts=counts, niter=niter
    )
    flat = engine.broadcast(lambda: [t for triplets in found for t in triplets])
    return [Triplets(*flat[i : i + 3]) for i in range(0, len(flat), 3)]


def probe_bytes(adapters: Sequence[Adapter], columns: Sequence[int]) -> int:
    """The bytes on every rank while top_directions goes backward: a given factor, a leaf and the leaf's gradient."""
    sizes = [(*adapter.shape, min(width, *adapter.shape)) for adapter, width in zip(adapters, columns, strict=True)]
    return sum(4 * k * (m + n + max(m, n)) for m, n, k in sizes)
