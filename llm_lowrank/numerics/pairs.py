"""Pairs: columns of B with rows of A, the currency of every dynamic low-rank method.

    delta = B A = sum_k B[:, k] A[k, :]          B (m, k), A (k, n)

A pair is the unit that a method trains, freezes, adds to W or starts afresh. Nothing here knows about models or ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """k pairs, the factors of the product B A."""

    B: Tensor  # (m, k)
    A: Tensor  # (k, n)

    def __post_init__(self) -> None:
        assert self.B.ndim == self.A.ndim == 2 and self.B.shape[1] == self.A.shape[0], (self.B.shape, self.A.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return self.B.shape[0], self.A.shape[1]

    def __len__(self) -> int:
        return self.A.shape[0]

    def take(self, index: Tensor | slice) -> Pairs:
        """The pairs at `index`: copies for a tensor of indices, views for a slice."""
        return Pairs(self.B[:, index], self.A[index])

    def put_(self, index: Tensor, fresh: Pairs) -> None:
        """Overwrite the pairs at `index` with as many fresh ones."""
        assert len(index) == len(fresh), (len(index), len(fresh))
        self.B[:, index], self.A[index] = fresh.B, fresh.A

    def scaled(self, s: float) -> Pairs:
        """Pairs whose product is s B A: B is multiplied by s, A stays."""
        return Pairs(self.B * s, self.A)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pairs:
        return Pairs(self.B.to(device, dtype), self.A.to(device, dtype))

    def product(self) -> Tensor:
        """B A, (m, n)."""
        return self.B @ self.A

    def norm(self) -> float:
        """|B A| (Frobenius) without forming it: |B A|^2 = <B^T B, A A^T>. Exact to |B| |A| times 1e-8."""
        b, a = self.B.double(), self.A.double()
        return math.sqrt(max(float(((b.T @ b) * (a @ a.T)).sum()), 0.0))

    def singular_values(self) -> Tensor:
        """The singular values of B A, descending, (k,) float64, without forming the product.

            s^2 = eig(R^T A A^T R),  R R^T = B^T B

        Values below 1e-8 of the largest one are rounding.
        """
        b, a = self.B.double(), self.A.double()
        values, V = torch.linalg.eigh(b.T @ b)  # (k,), (k, k)
        root = V * values.clamp_min(0).sqrt()
        return torch.linalg.eigvalsh(root.T @ (a @ a.T) @ root).clamp_min(0).sqrt().flip(0)

    # ---- as a change of W

    def pairs(self) -> Pairs:
        """The pairs themselves; a Block is converted here."""
        return self

    def of_rows(self, rows: slice) -> Tensor:
        """The product's rows `rows`, (rows, n)."""
        return self.B[rows] @ self.A

    @property
    def entries(self) -> int:
        """Elements of W that may change."""
        return self.B.shape[0] * self.A.shape[1]

    @staticmethod
    def cat(parts: list[Pairs]) -> Pairs:
        """Pairs whose product is the sum of the products of `parts`."""
        return Pairs(torch.cat([p.B for p in parts], 1), torch.cat([p.A for p in parts], 0))

    def compress(self, tol: float = 1e-7, most: int | None = None) -> tuple[Pairs, float]:
        """Return the fewest pairs with this product, at most `most`, and the Frobenius norm of the dropped part.

            B = Q_B R_B,  A^T = Q_A R_A,  R_B R_A^T = U S V^T   =>   B A = (Q_B U sqrt(S)) (sqrt(S) V^T Q_A^T)

        Singular values up to tol * S[0] are dropped: 1e-7 is below the rounding of a float32 product. Values within
        the rounding error of this computation are dropped too, so that a sum that cancels has no pairs. The
        computation runs in float64 and never forms the (m, n) product. The new factors are balanced and have the
        dtypes of B and A.
        """
        if len(self) == 0:
            return self, 0.0
        q_b, r_b = torch.linalg.qr(self.B.double())
        q_a, r_a = torch.linalg.qr(self.A.double().T)
        u, s, vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        rounding = len(self) * torch.finfo(s.dtype).eps * r_b.norm() * r_a.norm()
        rank = int(((s > tol * s[0]) & (s > rounding)).sum())  # 0 for a zero product
        rank = rank if most is None else min(rank, most)
        root = s[:rank].sqrt()
        small = Pairs(
            ((q_b @ u[:, :rank]) * root).to(self.B.dtype), (root[:, None] * (vt[:rank] @ q_a.T)).to(self.A.dtype)
        )
        return small, float(s[rank:].norm())


@dataclass(frozen=True)
class Block:
    """A change of the entries of W at rows X and columns Y: E_X values E_Y^T, E the columns of the identity."""

    rows: Tensor  # X, (p,)
    columns: Tensor  # Y, (q,)
    values: Tensor  # (p, q)
    shape: tuple[int, int]  # of W

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Block:
        return Block(self.rows.to(device), self.columns.to(device), self.values.to(device, dtype), self.shape)

    def product(self) -> Tensor:
        """The change as a dense matrix, (m, n)."""
        return self.of_rows(slice(0, self.shape[0]))

    def of_rows(self, rows: slice) -> Tensor:
        """The product's rows `rows`, (rows, n)."""
        inside = (self.rows >= rows.start) & (self.rows < rows.stop)
        count = rows.stop - rows.start
        # rows outside go to one more row: to select those inside, a host would wait for the device
        at = torch.where(inside, self.rows - rows.start, count)
        product_rows = self.values.new_zeros(count + 1, self.shape[1])
        product_rows[at[:, None], self.columns] = self.values
        return product_rows[:count]

    @property
    def entries(self) -> int:
        """Elements of W that may change."""
        return self.values.numel()

    def pairs(self) -> Pairs:
        """min(p, q) pairs with the same product."""
        m, n = self.shape
        p, q = self.values.shape
        # the shorter side becomes the pairs: the values go into one factor, the other one only says where they lie
        b, a = self.values.new_zeros(m, min(p, q)), self.values.new_zeros(min(p, q), n)
        if q <= p:
            b[self.rows], a[torch.arange(q), self.columns] = self.values, 1.0
        else:
            b[self.rows, torch.arange(p)], a[:, self.columns] = 1.0, self.values
        return Pairs(b, a)


Change = Pairs | Block
