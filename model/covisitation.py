"""Decayed, distance-weighted item-item counts, exact and sparse, and their factorisation.

Legend: N items, R rank. Counts are symmetric; a pair is kept once, as (smaller row, larger row).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from model.sampling import Floats, Padded

_DENSE_ITEMS = 4096  # below it a dense product is faster than a sparse one: these counts fill up
_RESCALE = 1e30
_OVERSAMPLED = 8  # extra columns of the subspace iteration (Halko et al. 2011, section 4.2)


@dataclass(frozen=True)
class Factors:
    """`left[i] @ right[j]` approximates the damped co-visitation of j after i; both (N, R) float32."""

    left: NDArray[np.float32]
    right: NDArray[np.float32]


class Covisitation:
    """Counts pairs (older, newer) of one user's history with weight exp(-distance / 8) times both strengths.

    A negative event lowers its pairs. New pairs wait in a buffer and are merged when the counts are read.
    """

    def __init__(self, half_life: float, max_pairs: int) -> None:
        self._growth, self._unit, self._max_pairs = np.log(2) / half_life, 1.0, max_pairs
        self._items = 0
        self._counts = sparse.csr_array((0, 0), dtype=np.float64)
        self._buffer: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
        self._basis: NDArray[np.float32] | None = None  # (N, R + 8) right subspace, the next start

    def grow(self, num_items: int) -> None:
        self._items = num_items

    def add(self, rows: NDArray[np.int64], weights: NDArray[np.float32], before: Padded) -> None:
        """Folds n events in, each with what its user did before it (n, T)."""
        if not len(rows):
            return
        units = self._unit * np.exp(np.arange(1, len(rows) + 1) * self._growth)  # (n,)
        length = before.rows.shape[1]
        nearness = np.exp(-np.arange(length - 1, -1, -1) / 8.0)  # (T,)
        amount = before.weights * nearness * (weights * units)[:, None]  # (n, T)
        newer = np.broadcast_to(rows[:, None], amount.shape)
        keep = (before.rows >= 0) & (before.rows != newer)
        older, newer = before.rows[keep], newer[keep]
        self._buffer.append((np.minimum(older, newer), np.maximum(older, newer), amount[keep]))
        self._unit = float(units[-1])
        if self._unit > _RESCALE:
            self._merge()
            self._counts = self._scaled_counts()
            self._unit = 1.0

    def counts(self) -> sparse.csr_array:
        """(N, N) symmetric decayed counts now."""
        self._merge()
        upper = self._scaled_counts()
        return sparse.csr_array(upper + upper.T)

    def damped(self, touched: NDArray[np.float64]) -> sparse.csr_array:
        """C / (n_row + 1)^.3 / (n_column + 10)^.5 for `touched` (N,) decayed event counts of the items."""
        left, right = (touched + 1.0) ** -0.3, (touched + 10.0) ** -0.5
        return sparse.csr_array(sparse.diags_array(left) @ self.counts() @ sparse.diags_array(right))

    def factorise(self, touched: NDArray[np.float64], rank: int, seed: int) -> Factors:
        """Truncated SVD of `damped` by subspace iteration from the last basis (a random one at first).

        Costs three products of the matrix with R + 8 columns. `right` has a mean square row norm of 1 over
        the items with counts, so that the mix weight keeps its meaning while the counts grow.
        """
        matrix = self.damped(touched).astype(np.float32)
        dense = matrix.toarray() if self._items <= _DENSE_ITEMS else matrix
        basis = self._start(min(rank + _OVERSAMPLED, self._items), seed)  # (N, R + 8)
        for _ in range(2):
            basis = _orthonormal(dense.T @ _orthonormal(dense @ basis))
        self._basis = basis
        left, values, turn = _thin_svd(dense @ basis)
        root = np.sqrt(values[:rank])
        return _scaled(left[:, :rank] * root, (basis @ turn)[:, :rank] * root, rank)

    def _start(self, columns: int, seed: int) -> NDArray[np.float32]:
        fresh = np.random.default_rng(seed).standard_normal((self._items, columns)).astype(np.float32)
        if self._basis is not None and self._basis.shape[1] == columns:
            known = len(self._basis)
            fresh *= 1e-3  # keeps a start for new items and directions lost to rank deficiency
            fresh[:known] += self._basis
        return fresh

    def _scaled_counts(self) -> sparse.csr_array:
        scaled = self._counts.copy()
        scaled.data /= self._unit
        return scaled

    def _merge(self) -> None:
        shape = (self._items, self._items)
        grown = np.pad(self._counts.indptr, (0, self._items - self._counts.shape[0]), mode="edge")
        self._counts = sparse.csr_array((self._counts.data, self._counts.indices, grown), shape=shape)
        if not self._buffer:
            return
        older, newer, amount = (np.concatenate(column) for column in zip(*self._buffer, strict=True))
        self._buffer = []
        added = sparse.coo_array((amount, (older, newer)), shape=shape).tocsr()
        self._counts = _pruned(sparse.csr_array(self._counts + added), self._max_pairs)


def _thin_svd(tall: Floats) -> tuple[Floats, Floats, Floats]:
    """left (N, K), values (K,) falling, turn (K, K): tall (N, K) = left * values @ turn.T, from the eigenvectors of the
    K x K Gram matrix, in float64 since it squares the condition. At 100,000 rows LAPACK's QR and SVD, which are
    made of matrix-vector products, took four fifths of a refresh."""
    wide = tall.astype(np.float64)
    squares, turn = np.linalg.eigh(wide.T @ wide)
    squares, turn = squares[::-1], turn[:, ::-1]
    values = np.sqrt(np.maximum(squares, max(squares[0], 1e-30) * 1e-14))
    left = wide @ (turn / values)
    return left.astype(np.float32), values.astype(np.float32), turn.astype(np.float32)


def _orthonormal(tall: Floats) -> Floats:
    """Orthonormal columns (N, K) of the same span; nearly zero where the rank ends."""
    return _thin_svd(tall)[0]


def _scaled(left: NDArray[np.float32], right: NDArray[np.float32], rank: int) -> Factors:
    known = np.square(right).sum(axis=1) > 0
    scale = np.sqrt(np.square(right[known]).sum(axis=1).mean()) if known.any() else 1.0
    scale = scale if scale > 1e-12 else 1.0
    missing = ((0, 0), (0, rank - right.shape[1]))  # fewer items than the rank
    return Factors(np.pad(left * scale, missing).astype(np.float32), np.pad(right / scale, missing).astype(np.float32))


def _pruned(counts: sparse.csr_array, max_pairs: int) -> sparse.csr_array:
    """The `max_pairs` largest counts: what decayed away is forgotten."""
    if counts.nnz <= max_pairs:
        return counts
    smallest = np.partition(np.abs(counts.data), counts.nnz - max_pairs)[counts.nnz - max_pairs]
    counts.data[np.abs(counts.data) < smallest] = 0.0
    counts.eliminate_zeros()
    return counts
