"""Algebra of small symmetric matrices, r x r: the Gram matrices A A^T and B^T B of a layer's factors.

Everything is float64, and every eigendecomposition runs on the host: 0.02 ms for 16 x 16 and 0.4 ms for 64 x 64 on one
core. A GPU's eigenvectors depend on the device and its library, and ranks that hold copies must not differ.

Eigenvalues are cut relative to the largest one. A direction that is cut is one that the factor does not have: B is zero
at the start of most methods, and a factor may have a lower rank than r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CUT = 1e-12  # of the largest eigenvalue; rounding in float64 leaves r * 2e-16 of it


@dataclass(frozen=True)
class Spectrum:
    """V diag(values) V^T of a positive semidefinite matrix, the values ascending and cut to zero below CUT."""

    values: Tensor  # (r,)
    V: Tensor  # (r, r), orthonormal columns
    rank: int  # how many values were not cut

    @staticmethod
    def of(gram: Tensor) -> Spectrum:
        """Decompose a symmetric positive semidefinite matrix (r, r). The result lies on the device of `gram`.

        The host waits for the device once.
        """
        found, vectors = eigh_on_host(gram)
        kept = found > CUT * found[-1]
        return Spectrum(*in_one_copy(torch.where(kept, found, 0.0), vectors, gram.device), int(kept.sum()))

    @property
    def full_rank(self) -> bool:
        """Whether no direction was cut."""
        return self.rank == len(self.values)

    def power(self, exponent: float) -> Tensor:
        """The matrix to this power, (r, r); with a negative exponent the pseudo-inverse's: cut directions stay zero."""
        powers = torch.where(self.values > 0, self.values.clamp_min(torch.finfo(torch.float64).tiny) ** exponent, 0.0)
        return (self.V * powers) @ self.V.T

    def damped_inverse(self, damping: float) -> Tensor:
        """(M + damping I)^-1, (r, r). damping > 0."""
        return (self.V / (self.values + damping)) @ self.V.T


def eigh_on_host(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (..., r), ascending, and eigenvectors (..., r, r) of matrices (..., r, r), on the host and in
    float64. The host waits for the device once.
    """
    values, V = torch.linalg.eigh(grams.detach().to("cpu", torch.float64))
    return values, V


def in_one_copy(values: Tensor, V: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what `eigh_on_host` found on the device, for which the host need not wait."""
    both = torch.cat([values.unsqueeze(-2), V], -2)
    if device.type != "cpu":
        both = both.pin_memory().to(device, non_blocking=True)
    return both[..., 0, :], both[..., 1:, :]


def balancing(m: Tensor, n: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the S with S M S = N and its inverse, each (r, r), or None where M or N is singular.

    S = M^-1 # N = M^(-1/2) (M^(1/2) N M^(1/2))^(1/2) M^(-1/2)      the geometric mean of M^-1 and N
    """
    outer = Spectrum.of(m)
    root, inverse = outer.power(0.5), outer.power(-0.5)
    inner = Spectrum.of(root @ n @ root)
    if not (outer.full_rank and inner.full_rank):
        return None
    return inverse @ inner.power(0.5) @ inverse, root @ inner.power(-0.5) @ root


def sylvester(m: Spectrum, n: Spectrum, c: Tensor, damping: Tensor) -> Tensor:
    """Return X with M X + X N + damping X = C, (r, r). damping: a number.

    M = U diag(l) U^T,  N = V diag(k) V^T:      X = U [(U^T C V)_ij / (l_i + k_j + damping)] V^T
    """
    inside = (m.V.T @ c @ n.V) / (m.values[:, None] + n.values[None] + damping)
    return m.V @ inside @ n.V.T
