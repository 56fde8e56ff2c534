"""Maximum inner product search: HNSW, and the exact scan that is its slow twin and its fallback.

B queries, N items, D dimensions, K results. A row is an item's position in the generation.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import hnswlib
import numpy as np
from numpy.typing import NDArray

from model.copies import Copies

Vectors = NDArray[np.float32]
Rows = NDArray[np.int64]

# A fetch wider than N/32 is scanned exactly. Measured (N = 50,000, D = 130, one core): HNSW takes 0.46 ms a
# query for 1,000 results, 2.3 ms for 5,000, 5.5 ms for 12,500; the scan 1.9 ms, or 0.4 ms in batches of 16.
EXACT_SHARE = 32
_SCORES_AT_ONCE = 16_000_000  # floats of one block of the scan: 64 MB
_HEADER = struct.Struct("<6Q")  # the first fields of hnswlib 0.8.0's file


def check_queries(queries: Vectors, dim: int, k: int) -> Vectors:
    """(B, D) float32, contiguous; ValueError on another width, NaN or k < 1: hnswlib checks none of them."""
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


def recall(found: Vectors, exact: Vectors) -> float:
    """Share of found scores (B, K) that reach the last exact one (B, K): equal scores are equally right."""
    margin = 1e-5 * np.abs(exact, where=np.isfinite(exact), out=np.ones_like(exact)).max(initial=1e-12)
    return float((found >= exact[:, -1:] - margin).mean())


class ExactIndex:
    """Scores every item. O(N D) a query, and always right."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors  # (N, D), may be memory-mapped
        self.size, self.dim = vectors.shape

    def search(
        self, queries: Vectors, k: int, excluded: Sequence[Rows] | None = None, hidden: Rows | None = None
    ) -> tuple[Rows, Vectors]:
        """As `HnswIndex.search`, exactly."""
        queries = check_queries(queries, self.dim, k)
        return self.scan(queries, k, check_excluded(excluded, hidden, len(queries), self.size))

    def scan(self, queries: Vectors, k: int, excluded: Excluded) -> tuple[Rows, Vectors]:
        """`search` for checked arguments."""
        rows = np.full((len(queries), k), -1, np.int64)
        best = np.full((len(queries), k), -np.inf, np.float32)
        step = max(1, _SCORES_AT_ONCE // self.size)
        for start in range(0, len(queries), step):
            block = np.arange(start, min(start + step, len(queries)))
            out = excluded.of(block)
            scores = queries[block] @ self.vectors.T  # (b, N)
            scores[out.owner, out.flat] = -np.inf
            scores[:, out.hidden] = -np.inf
            found, values = _top(scores, min(k, self.size))
            rows[block, : found.shape[1]], best[block, : found.shape[1]] = found, values
        return np.where(np.isneginf(best), -1, rows), best


def _top(scores: Vectors, k: int) -> tuple[Rows, Vectors]:
    """The k best columns of scores (b, N), best first, ties by row."""
    rows = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:].astype(np.int64)  # (b, k)
    values = np.take_along_axis(scores, rows, axis=1)
    order = np.lexsort((rows, -values), axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(values, order, axis=1)


class HnswIndex:
    """A sealed HNSW graph over item vectors (Malkov and Yashunin, arXiv 1603.09320), in inner product space.

    hnswlib's "ip" space beats the reduction to L2 by one more dimension (Bachrach et al. 2014) wherever norms
    differ. Recall@20 at N = 20,000, D = 130, 200 clusters, M = 16, ef 128 / 512: norms lognormal(0.15)
    ip .974/.998, L2 .855/.996; lognormal(0.4) ip .993/.998, L2 .511/.898; unit tower + factors of varying
    norm + popularity ip .988/.999, L2 .847/.939. Only near-unit norms turn it round: .958/.996 to 1.0/1.0.
    """

    def __init__(self, graph: hnswlib.Index, vectors: Vectors, copies: Copies, ef: int, threads: int) -> None:
        self.exact = ExactIndex(vectors)
        self.size, self.dim = vectors.shape
        self.threads = threads
        self._graph, self._copies = graph, copies
        self.ef = ef

    @property
    def ef(self) -> int:
        """Width of the search: more is slower and finds more."""
        return int(self._graph.ef)

    @ef.setter
    def ef(self, ef: int) -> None:
        self._graph.set_ef(ef)

    @classmethod
    def build(
        cls,
        vectors: Vectors,
        *,
        M: int = 16,
        ef_construction: int = 200,
        ef: int = 128,
        seed: int = 0,
        threads: int = 1,
    ) -> HnswIndex:
        """Graph over vectors (N, D) float32. The same seed gives the same graph where threads = 1."""
        if vectors.ndim != 2 or not vectors.size or not np.isfinite(vectors).all():
            raise ValueError(f"vectors must be (N, D), not empty and finite, got {vectors.shape}")
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        copies = Copies(vectors)
        graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
        graph.init_index(len(copies), M=M, ef_construction=ef_construction, random_seed=seed)
        graph.add_items(vectors[copies.first], np.arange(len(copies)), num_threads=threads)
        return cls(graph, vectors, copies, ef, threads)

    def save(self, path: Path) -> None:
        self._graph.save_index(os.fspath(path))

    @classmethod
    def load(cls, path: Path, vectors: Vectors, ef: int = 128, threads: int = 1) -> HnswIndex:
        """The graph saved for these vectors (N, D). ValueError where its header tells of another N or D.

        hnswlib crashes on a damaged file: check its hash first, and load in a process that may die.
        """
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            raise ValueError(f"{path.name}: {len(header)} bytes are no HNSW file")
        _, _, count, _, label_at, vector_at = _HEADER.unpack(header)
        copies = Copies(vectors)
        expected, stored = (len(copies), vectors.shape[1]), (count, (label_at - vector_at) // vectors.itemsize)
        if stored != expected:
            raise ValueError(f"{path.name}: holds {stored} instead of {expected} distinct vectors")
        graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
        graph.load_index(os.fspath(path), max_elements=len(copies))
        return cls(graph, vectors, copies, ef, threads)

    def search(
        self, queries: Vectors, k: int, excluded: Sequence[Rows] | None = None, hidden: Rows | None = None
    ) -> tuple[Rows, Vectors]:
        """The k best rows (B, K) for queries (B, D) and their inner products (B, K), best first.

        `excluded` are rows that one query must not get, `hidden` (H,) rows that none must get. Fewer than k
        come back only where fewer are eligible: the rest is row -1, score -inf. ValueError on another D, NaN,
        k < 1 or an unknown row.
        """
        queries = check_queries(queries, self.dim, k)
        out = check_excluded(excluded, hidden, len(queries), self.size)
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        fetch = self._fetch(k, out)
        for fetched in np.unique(fetch[fetch > 0]):
            chosen = np.flatnonzero(fetch == fetched)
            rows[chosen], scores[chosen] = self._approximate(queries[chosen], k, int(fetched), out.of(chosen))
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short):
            rows[short], scores[short] = self.exact.scan(queries[short], k, out.of(short))
        return rows, scores

    def _fetch(self, k: int, out: Excluded) -> Rows:
        """How many results (B,) to ask for, rounded up to few widths; 0 where the scan is cheaper.

        Enough to lose all of a query's own rows, which cluster at its top, and twice the hidden ones' share.
        """
        fetch = k + out.counts
        if len(out.hidden):
            visible = max(1, self.size - len(out.hidden))
            fetch = np.minimum(fetch + len(out.hidden), 2 * fetch * self.size // visible)
        rounded = np.exp2(np.ceil(2 * np.log2(fetch)) / 2).astype(np.int64) + 1  # steps of 1.41
        scan = (fetch * EXACT_SHARE > self.size) | (rounded > len(self._copies))
        return np.where(scan, 0, rounded)

    def _approximate(self, queries: Vectors, k: int, fetch: int, out: Excluded) -> tuple[Rows, Vectors]:
        """One hnswlib call; a query with fewer than k eligible results ends in row -1."""
        try:
            found, distance = self._graph.knn_query(queries, fetch, num_threads=self.threads)
        except RuntimeError:  # "Cannot return the results in a contiguous 2D array": a graph in parts
            return np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        rows, scores = self._copies.expand(found.astype(np.int64), 1.0 - distance)  # (b, fetch)
        if len(out.flat) or len(out.hidden):
            query = self.size * np.arange(len(rows))[:, None]
            banned = np.isin(rows + query, out.flat + self.size * out.owner) | np.isin(rows, out.hidden)
            rows, scores = np.where(banned, -1, rows), np.where(banned, -np.inf, scores)
            keep = np.argsort(banned, axis=1, kind="stable")  # best first still
            rows, scores = np.take_along_axis(rows, keep, axis=1), np.take_along_axis(scores, keep, axis=1)
        return rows[:, :k], scores[:, :k]
