"""Kronecker products as low-rank pairs: their singular values are the products of those of their two small factors."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from adapters_store.base_spec import LOKR_FACTORS, tensor_name
from adapters_store.manifest import LoRADelta

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Factor:
    """A matrix as the product of u [rows, r], diag(s) [r], and vt [r, columns]."""

    u: Matrix
    s: Matrix
    vt: Matrix

    @classmethod
    def whole(cls, *parts: Matrix) -> Factor:
        """Of a matrix, or of the product of a [rows, r] and a [r, columns], as they are: s is 1."""
        if len(parts) == 2 and parts[0].shape[1] > min(len(parts[0]), parts[1].shape[1]):
            parts = (parts[0] @ parts[1],)
        if len(parts) == 1:
            rows, columns = parts[0].shape
            parts = (np.eye(rows), parts[0]) if rows <= columns else (parts[0], np.eye(columns))
        return cls(parts[0], np.ones(len(parts[1])), parts[1])

    @classmethod
    def decomposed(cls, *parts: Matrix) -> Factor:
        """Of the same by its singular values, the largest first; a product is never made."""
        if len(parts) == 1:
            return cls(*np.linalg.svd(parts[0], full_matrices=False))
        (left, inner_left), (right, inner_right) = np.linalg.qr(parts[0]), np.linalg.qr(parts[1].T)
        u, s, vt = np.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
        return cls(left @ u, s, vt @ right.T)


@dataclass(frozen=True)
class KroneckerProduct:
    """kron(first, second) of two factors; where they are decomposed, its largest triplets are its best approximation.

    Everything is fp64, so that whoever cuts it keeps the same triplets, but for equal singular values, where either
    choice has the same error.
    """

    first: Factor
    second: Factor

    @classmethod
    def read(
        cls, tensor: Callable[[str], Matrix], names: Container[str], layer: int, delta: LoRADelta
    ) -> KroneckerProduct:
        """LoKr's of one linear from a file's tensors, decomposed where `delta` has fewer ranks than the product.

        A factor is a tensor, or two of them, "_a" times "_b".
        """
        factor = Factor.whole if delta.rank == delta.exact_rank else Factor.decomposed
        factors = []
        for name in (tensor_name(layer, delta.linear, name) for name in LOKR_FACTORS):
            parts = [name] if name in names else [f"{name}_a", f"{name}_b"]
            factors.append(factor(*map(tensor, parts)))
        return cls(*factors)

    def pair(self, rank: int) -> tuple[Matrix, Matrix]:
        """The `rank` largest triplets as A [rank, in] and B [out, rank], each with the roots of their values."""
        kept = self._order[:rank]
        i, j = np.divmod(kept, len(self.second.s))
        roots = np.sqrt(self._values[kept])[:, None, None]
        rows = roots * self.first.vt[i][:, :, None] * self.second.vt[j][:, None, :]
        columns = roots * self.first.u.T[i][:, :, None] * self.second.u.T[j][:, None, :]
        return rows.reshape(len(kept), -1), columns.reshape(len(kept), -1).T

    def error(self, rank: int) -> float:
        """Of `pair(rank)`: the Frobenius norm of what it lacks over that of the whole."""
        squares = self._values[self._order] ** 2
        total = squares.sum()
        return float(np.sqrt(squares[rank:].sum() / total)) if total > 0 else 0.0

    @cached_property
    def _values(self) -> Matrix:
        return np.outer(self.first.s, self.second.s).ravel()

    @cached_property
    def _order(self) -> npt.NDArray[np.intp]:
        return np.argsort(-self._values, kind="stable")
