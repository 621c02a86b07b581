"""Singular pairs of a matrix of which only products are available.

Randomized subspace iteration (Halko, Martinsson, Tropp 2011, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1):

    Q = qr(W X),  X random (n, p),   then niter times   Q = qr(W qr(W^T Q)),   finally  svd(Q^T W)

A sharded W is therefore never gathered: each product moves p (m + n) numbers instead of m n. Many matrices can be
decomposed side by side, so that a product of all of them may be one pass over data (randomized_triplets).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llm_lowrank.numerics.files import sha256, write_safetensors

OVERSAMPLE = 8  # extra random directions; Halko et al. recommend 5 to 10
Many = Callable[[list[Tensor]], list[Tensor]]  # one product with each of many matrices
ALGORITHM = 1  # to be raised when a change here changes results, so that cached pairs are not mistaken for new ones


class Products(Protocol):
    """A matrix W (m, n) that can be multiplied. Both products may be collective."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def matmul(self, x: Tensor) -> Tensor: ...  # W x    (n, k) -> (m, k)
    def rmatmul(self, y: Tensor) -> Tensor: ...  # W^T y  (m, k) -> (n, k)


class Matrix(NamedTuple):
    """The products of a matrix in memory."""

    w: Tensor  # (m, n)

    @property
    def shape(self) -> tuple[int, int]:
        return self.w.shape[0], self.w.shape[1]

    def matmul(self, x: Tensor) -> Tensor:
        return self.w @ x

    def rmatmul(self, y: Tensor) -> Tensor:
        return self.w.T @ y


class Triplets(NamedTuple):
    """W ~ U diag(S) V^T with S descending."""

    U: Tensor  # (m, k)
    S: Tensor  # (k,)
    V: Tensor  # (n, k)


def effective_rank(values: Tensor) -> float:
    """exp(-sum_i p_i ln p_i), p_i = s_i / sum s: from 1 for one direction to k for k equal ones; 0 for a zero matrix.

    values: all singular values s, (k,). Roy and Vetterli, EUSIPCO 2007, https://ieeexplore.ieee.org/document/7098875
    """
    total = float(values.sum())
    return float(torch.special.entr(values / total).sum().exp()) if total else 0.0


def top_triplets(
    w: Products, k: int, *, niter: int = 4, exact: bool = False, seed: int = 0, device: torch.device | str = "cpu"
) -> Triplets:
    """Return the k largest singular triplets of W in float32.

    The same seed gives the same triplets on every machine that multiplies alike. With `exact` the product of W with
    the identity is decomposed: min(m, n) columns travel and one whole W is held. The same path is taken when
    k + OVERSAMPLE reaches min(m, n), where the iteration would save nothing. The signs are chosen so that the largest
    entry of each column of U is positive. Raise ValueError when k > min(m, n), as W has no more directions.
    """
    m, n = w.shape
    if not 0 < k <= min(m, n):
        raise ValueError(
            f"{k} singular directions asked of a {m} x {n} matrix, which has {min(m, n)}; lower rank or target_rank"
        )
    p = min(k + OVERSAMPLE, m, n)
    # exact: one product with the identity, on the shorter side of W
    if exact or p == min(m, n):
        full = w.matmul(torch.eye(n, device=device)) if n <= m else w.rmatmul(torch.eye(m, device=device)).T  # (m, n)
        u, s, vt = torch.linalg.svd(full, full_matrices=False)
    # randomized
    else:
        noise = torch.randn(n, p, generator=torch.Generator().manual_seed(seed)).to(device)
        return randomized_triplets(
            lambda x: [w.matmul(x[0])], lambda y: [w.rmatmul(y[0])], noise=[noise], counts=[k], niter=niter
        )[0]
    return _triplets(u, s, vt, k)


def randomized_triplets(
    matmul: Many, rmatmul: Many, *, noise: list[Tensor], counts: Sequence[int], niter: int
) -> list[Triplets]:
    """Return the counts[i] largest singular triplets of W_i (m_i, n_i), of many matrices side by side.

    noise: random X_i (n_i, p_i) with p_i >= counts[i]. matmul: X_i (n_i, p_i) -> W_i X_i (m_i, p_i). rmatmul: Y_i (m_i,
    p_i) -> W_i^T Y_i (n_i, p_i). Both are called niter + 1 times, in turn. The signs are chosen as in top_triplets.
    """
    # p columns that span nearly the space of the k largest, then the small SVD of W in that space
    q = _bases(matmul(noise))
    for _ in range(niter):
        q = _bases(matmul(_bases(rmatmul(q))))
    found = []
    for basis, core, k in zip(q, rmatmul(q), counts, strict=True):
        u, s, vt = torch.linalg.svd(core.T, full_matrices=False)
        found.append(_triplets(basis @ u, s, vt, k))
    return found


def _bases(spans: list[Tensor]) -> list[Tensor]:
    """Orthonormal bases of the columns of each."""
    return [torch.linalg.qr(span)[0] for span in spans]


def _triplets(u: Tensor, s: Tensor, vt: Tensor, k: int) -> Triplets:
    """The k largest triplets, with signs."""
    u, s, v = u[:, :k], s[:k], vt[:k].T
    # an SVD leaves the sign of every direction open
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # (1, k)
    return Triplets((u * sign).contiguous(), s.contiguous(), (v * sign).contiguous())


def cached_triplets(
    w: Tensor, k: int, *, niter: int, exact: bool, seed: int, cache: Path | None, device: torch.device | str = "cpu"
) -> Triplets:
    """Return top_triplets of a matrix in memory, computed on `device` and stored in the folder `cache` (None: nowhere).

    The key is the content of W (SHA-256) with k, niter, exact, seed and the kind of device: a changed checkpoint never
    hits an old entry.
    """

    def compute() -> Triplets:
        matrix = Matrix(w.to(device, torch.float32))
        return top_triplets(matrix, k, niter=niter, exact=exact, seed=seed, device=device)

    if cache is None:
        return compute()
    settings = f"{ALGORITHM}-{w.dtype}-{tuple(w.shape)}-{k}-{niter}-{exact}-{seed}"
    if (kind := torch.device(device).type) != "cpu":  # which rounds in another way
        settings += f"-{kind}"
    file = cache / f"{sha256(w)[:32]}-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.safetensors"
    try:
        factors = load_file(file)
        return Triplets(factors["U"], factors["S"], factors["V"])
    except (FileNotFoundError, SafetensorError, KeyError):  # absent or damaged: compute and write anew
        triplets = compute()
        cache.mkdir(parents=True, exist_ok=True)
        write_safetensors(file, triplets._asdict(), {"settings": settings})
        return triplets
