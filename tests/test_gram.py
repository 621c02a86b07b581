"""Algebra of Gram matrices against the equations that define it, solved in other ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_lowrank.numerics.gram import Spectrum, balancing, sylvester

pytestmark = pytest.mark.quick

R = 5


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(seed: int, rank: int = R, condition: float = 1.0) -> Tensor:
    """Positive semidefinite, of this rank; its singular values are spread over condition^2."""
    factor = random(R, 40, seed=seed) * torch.logspace(0, -2, R, base=condition, dtype=torch.float64)[:, None]
    factor[rank:] = factor[0]  # the rows that are left repeat the first one
    return factor @ factor.T


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - wanted).norm() / wanted.norm()) <= tolerance


def test_powers_multiply():
    m = gram(1, condition=10)
    spectrum = Spectrum.of(m)
    assert spectrum.full_rank
    close(spectrum.power(1), m)
    close(spectrum.power(0.5) @ spectrum.power(0.5), m)
    close(spectrum.power(-0.5) @ m @ spectrum.power(-0.5), torch.eye(R, dtype=torch.float64), 1e-8)
    close(
        spectrum.damped_inverse(0.3) @ (m + 0.3 * torch.eye(R, dtype=torch.float64)), torch.eye(R, dtype=torch.float64)
    )


def test_what_a_factor_lacks_stays_zero_in_every_power():
    m = gram(2, rank=3)
    spectrum = Spectrum.of(m)
    assert not spectrum.full_rank and int((spectrum.values > 0).sum()) == 3
    close(spectrum.power(-1), torch.linalg.pinv(m, hermitian=True, rtol=1e-9), 1e-8)
    nothing = Spectrum.of(torch.zeros(R, R, dtype=torch.float64))
    assert not nothing.full_rank and not nothing.power(-0.5).any() and not nothing.power(0.5).any()


def test_what_is_not_finite_is_not_made_finite():
    m = gram(1)
    m[0, 1] = m[1, 0] = float("nan")
    with pytest.raises(RuntimeError):  # what torch.linalg.eigh says of it
        Spectrum.of(m)


def test_the_balancing_matrix_solves_its_equation_and_is_the_geometric_mean():
    m, n = gram(3, condition=5), gram(4, condition=5)
    S, inverse = balancing(m, n)
    close(S @ m @ S, n)
    close(S @ inverse, torch.eye(R, dtype=torch.float64))
    close(S, S.T)
    assert (torch.linalg.eigvalsh(S) > 0).all()  # of the solutions of S M S = N only one is positive
    # the geometric mean in its other form, M^-1 (M N)^(1/2), with the root from a general eigenvector basis
    values, vectors = torch.linalg.eig(m @ n)
    root = (vectors * values.sqrt()) @ torch.linalg.inv(vectors)
    close(S, (torch.linalg.inv(m).to(root.dtype) @ root).real, 1e-8)


@pytest.mark.parametrize("lacking", ["m", "n"])
def test_there_is_no_balance_for_a_singular_matrix(lacking):
    whole, part = gram(5), gram(6, rank=2)
    assert balancing(*((part, whole) if lacking == "m" else (whole, part))) is None
    assert balancing(whole, torch.zeros_like(whole)) is None


def test_sylvester_solves_its_equation():
    m, n, c = gram(7), gram(8), random(R, R, seed=9)
    x = sylvester(Spectrum.of(m), Spectrum.of(n), c, damping=torch.tensor(0.1, dtype=torch.float64))
    close(m @ x + x @ n + 0.1 * x, c)
