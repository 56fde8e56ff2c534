"""What a search is asked, checked: hnswlib checks almost nothing and reads out of bounds.

B queries, N items, D dimensions, K results. A row is an item's position in the generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]


def unit(rows: Vectors) -> Vectors:
    """Rows (B, E) of length one; zero stays zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True).astype(np.float32)  # (B, 1)
    scaled: Vectors = rows / np.maximum(lengths, np.float32(1e-12))
    return scaled


def check_queries(queries: Vectors, dim: int, k: int) -> Vectors:
    """(B, D) float32, contiguous; ValueError on another width, NaN or k < 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise ValueError(f"queries must be (B, {dim}), got {queries.shape}")
    if not np.isfinite(queries).all():
        raise ValueError("queries must be finite")
    return np.ascontiguousarray(queries, dtype=np.float32)


class Excluded(NamedTuple):
    """The rows that queries must not get."""

    flat: Rows  # (E,) of all queries, one after the other
    counts: Rows  # (B,) how many of them belong to each query
    hidden: Rows  # (H,) excluded for every query

    def of(self, chosen: NDArray[np.int64]) -> Excluded:
        """Those of the chosen queries."""
        if not len(self.flat):
            return Excluded(self.flat, self.counts[chosen], self.hidden)
        wanted = np.repeat(np.isin(np.arange(len(self.counts)), chosen), self.counts)
        return Excluded(self.flat[wanted], self.counts[chosen], self.hidden)

    @property
    def owner(self) -> Rows:
        """(E,) the query of each row of `flat`."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


def check_excluded(excluded: Sequence[Rows] | None, hidden: Rows | None, num_queries: int, num_items: int) -> Excluded:
    """ValueError on a row that does not exist, or another number of sets than queries."""
    none = np.zeros(0, np.int64)
    sets = [none] * num_queries if excluded is None else excluded
    if len(sets) != num_queries:
        raise ValueError(f"{len(sets)} exclusion sets for {num_queries} queries")
    hidden = none if hidden is None else hidden.astype(np.int64, copy=False)
    flat = np.concatenate([none, *sets]).astype(np.int64, copy=False)
    for rows in (flat, hidden):
        if len(rows) and (rows.min() < 0 or rows.max() >= num_items):
            raise ValueError(f"excluded rows must lie in 0..{num_items - 1}, got {rows.min()}..{rows.max()}")
    return Excluded(flat, np.array([len(rows) for rows in sets], np.int64), hidden)
