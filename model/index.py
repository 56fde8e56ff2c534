"""Maximum inner product search: HNSW, and the exact scan that is its slow twin and its fallback.

B queries, N items, D dimensions, K results. A row is an item's position in the generation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import hnswlib
import numpy as np
from numpy.typing import NDArray

from model import hnsw_file
from model.copies import Copies
from model.queries import Excluded, Rows, Vectors, check_excluded, check_queries

# A search wider than N / EXACT_SHARE costs more than a scan, in batches of 16; the share grows with the root of the
# batch, from 4 queries (fewer read all vectors for each) to 128. `upwell bench search` prints the crossover.
EXACT_SHARE = 64
# A query is odd, and scanned, where its mean square in the columns of a scaled graph is so many times the usual one:
# users had 0.4 to 1.9, queries of text alone 43 to 330, of whose best 20 the graph of 20,000 items found .57 at ef 64.
ODD = 8.0
Progress = Callable[[int, int], None]  # done, all
_SCORES_AT_ONCE = 16_000_000  # floats of one block of the scan: 64 MB
_POINTS_AT_ONCE = 16_384  # lifted at a time: 13 MB
_LANES = 16  # floats of a register; hnswlib adds up what is beyond a multiple of it one by one: a seventh of a search
_GROUP = 16  # scores of which `_top` first takes the greatest: selection was half of a scan's time, now a tenth


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
    """The k best columns of scores (b, N), best first, equal ones by row (but at the cut: any of them)."""
    width = scores.shape[1] // _GROUP  # groups: columns that differ by a multiple of `width`
    if width <= 16 * k:
        return _sorted_top(scores, k)
    best = scores[:, : _GROUP * width].reshape(len(scores), _GROUP, width).max(axis=1)  # (b, width)
    groups = np.argpartition(best, width - k, axis=1)[:, -k:]  # (b, k): all of the k best are in them
    columns = (groups[:, None] + width * np.arange(_GROUP)[:, None]).reshape(len(scores), -1)
    rest = np.arange(_GROUP * width, scores.shape[1])
    columns = np.concatenate([columns, np.broadcast_to(rest, (len(scores), len(rest)))], axis=1)
    at, values = _sorted_top(np.take_along_axis(scores, columns, axis=1), k)
    return np.take_along_axis(columns, at, axis=1), values


def _sorted_top(scores: Vectors, k: int) -> tuple[Rows, Vectors]:
    rows = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, -k:].astype(np.int64)  # (b, k)
    values = np.take_along_axis(scores, rows, axis=1)
    order = np.lexsort((rows, -values), axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(values, order, axis=1)


class HnswIndex:
    """A sealed HNSW graph over item vectors (Malkov and Yashunin, arXiv 1603.09320) that answers by inner product.

    Either over the vectors lifted by one dimension to equal length, where L2 order is inner product order
    (Bachrach et al. 2014), or in hnswlib's "ip" space. Neither is always better; recall@20 at M = 16, ef 64 / 256:

    users of a model trained on 8,000 events   lifted       "ip"
    MovieTweetings-100k, 10,506 items          .991 / .998  .985 / .990
    Online Retail, 3,676 items                 .927 / .982  .849 / .898
    20,000 clustered items, norms lognormal(.4)  .306 / .733  .972 / .996

    A lifted graph holds the columns times `scale` (D,), and is asked for queries divided by it: no inner product
    changes, but which items are neighbours does (docs/performance.md, search). Its points are W columns wide: those D,
    zeros up to a multiple of 16, and the lift.
    """

    def __init__(
        self,
        graph: hnswlib.Index,
        vectors: Vectors,
        copies: Copies,
        ef: int,
        threads: int,
        scale: Vectors | None = None,
    ) -> None:
        self.exact = ExactIndex(vectors)
        self.size, self.dim = vectors.shape
        self.threads = threads
        self._graph, self._copies, self.scale = graph, copies, scale
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
        lifted: bool = True,
        scale: Vectors | None = None,
        M: int = 16,
        ef_construction: int = 200,
        ef: int = 128,
        seed: int = 0,
        threads: int = 1,
        progress: Progress | None = None,
    ) -> HnswIndex:
        """Graph over vectors (N, D) float32. The same seed gives the same graph where threads = 1.

        progress(done, all) is called as points enter the graph: 10^6 of them take minutes.
        """
        if vectors.ndim != 2 or not vectors.size or not np.isfinite(vectors).all():
            raise ValueError(f"vectors must be (N, D), not empty and finite, got {vectors.shape}")
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        copies = Copies(vectors)
        width = _width(vectors.shape[1], lifted)
        points = _points(vectors, copies, width, scale)
        graph = hnswlib.Index(space="l2" if lifted else "ip", dim=width)
        graph.init_index(len(copies), M=M, ef_construction=ef_construction, random_seed=seed)
        for labels in np.split(np.arange(len(copies)), range(_POINTS_AT_ONCE, len(copies), _POINTS_AT_ONCE)):
            graph.add_items(points(labels), labels, num_threads=threads)
            if progress:
                progress(int(labels[-1]) + 1, len(copies))
        return cls(graph, vectors, copies, ef, threads, scale)

    def save(self, path: Path) -> None:
        """The graph alone. Raises OSError where the file comes out short: of a full disk hnswlib says nothing."""
        self._graph.save_index(os.fspath(path))
        if not path.exists() or path.stat().st_size != self._graph.index_file_size():
            raise OSError(f"{path} could not be written whole: is the disk full?")

    @classmethod
    def load(cls, path: Path, vectors: Vectors, ef: int = 128, scale: Vectors | None = None) -> HnswIndex:
        """The graph saved for these vectors (N, D) and this scale. ValueError where it is seen to hold anything else.

        A damaged file can still crash hnswlib: compare its hash first, and load in a process that may die.
        """
        copies, lifted = Copies(vectors), hnsw_file.width(path) != vectors.shape[1]
        width = _width(vectors.shape[1], lifted)
        hnsw_file.check(path, (len(copies), width), _points(vectors, copies, width, scale), lifted)
        graph = hnswlib.Index(space="l2" if lifted else "ip", dim=width)
        graph.load_index(os.fspath(path), max_elements=len(copies))
        return cls(graph, vectors, copies, ef, 1, scale)

    def search(
        self, queries: Vectors, k: int, excluded: Sequence[Rows] | None = None, hidden: Rows | None = None
    ) -> tuple[Rows, Vectors]:
        """The k best rows (B, K) for queries (B, D) and their inner products (B, K), best first.

        `excluded` are rows that one query must not get, `hidden` (H,) rows that none must get. Fewer than k
        come back only where fewer are eligible: the rest is row -1, score -inf. ValueError on another D, NaN,
        k < 1 or an unknown row.
        """
        queries = check_queries(queries, self.dim, k)
        return self.answer(queries, k, check_excluded(excluded, hidden, len(queries), self.size))

    def answer(self, queries: Vectors, k: int, out: Excluded) -> tuple[Rows, Vectors]:
        """`search` for checked arguments."""
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        fetch = np.where(self._odd(queries), 0, self._fetch(k, out))
        for fetched in np.unique(fetch[fetch > 0]):
            chosen = np.flatnonzero(fetch == fetched)
            rows[chosen], scores[chosen] = self._approximate(queries[chosen], k, int(fetched), out.of(chosen))
        short = np.flatnonzero(rows[:, -1] < 0)
        if len(short):
            rows[short], scores[short] = self.exact.scan(queries[short], k, out.of(short))
        return rows, scores

    def search_graph(self, queries: Vectors, k: int) -> tuple[Rows, Vectors]:
        """What the graph alone finds; all -1 where it is in parts, or k exceeds the distinct vectors."""
        queries = check_queries(queries, self.dim, k)
        return self._approximate(queries, k, k, check_excluded(None, None, len(queries), self.size))

    def _fetch(self, k: int, out: Excluded) -> Rows:
        """How many results (B,) to ask for, rounded up to few widths; 0 where the scan is cheaper.

        Enough to lose all of a query's own rows, which cluster at its top, and twice the hidden ones' share.
        """
        fetch = k + out.counts
        if len(out.hidden):
            visible = max(1, self.size - len(out.hidden))
            fetch = np.minimum(fetch + len(out.hidden), 2 * fetch * self.size // visible)
        rounded = np.exp2(np.ceil(2 * np.log2(fetch)) / 2).astype(np.int64) + 1  # steps of 1.41
        share = EXACT_SHARE * (np.clip(len(fetch), 4, 128) / 16) ** 0.5
        scan = (np.maximum(fetch, self.ef) * share > self.size) | (rounded > len(self._copies))
        return np.where(scan, 0, rounded)

    def _odd(self, queries: Vectors) -> NDArray[np.bool_]:
        """Which queries (B, D) weigh what those that gave the scale hardly weighed: the graph was not made for them."""
        if self.scale is None:
            return np.zeros(len(queries), np.bool_)
        usual = self.dim / np.square(self.scale).sum()
        return np.asarray(np.square(queries / self.scale).sum(axis=1) > ODD * usual * np.square(queries).sum(axis=1))

    def _approximate(self, queries: Vectors, k: int, fetch: int, out: Excluded) -> tuple[Rows, Vectors]:
        """One hnswlib call; a query with fewer than k eligible results ends in row -1."""
        try:
            scaled = queries if self.scale is None else queries / self.scale
            points = np.pad(scaled, ((0, 0), (0, self._graph.dim - self.dim)))  # (b, W)
            found, _ = self._graph.knn_query(points, fetch, num_threads=self.threads)
        except RuntimeError:  # "Cannot return the results in a contiguous 2D array": a graph in parts
            return np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
        rows = self._copies.expand(found.astype(np.int64))  # (b, fetch)
        if len(out.flat) or len(out.hidden):
            query = self.size * np.arange(len(rows))[:, None]
            banned = np.isin(rows + query, out.flat + self.size * out.owner) | np.isin(rows, out.hidden)
            rows = np.where(banned, -1, rows)
            rows = np.take_along_axis(rows, np.argsort(banned, axis=1, kind="stable"), axis=1)  # best first still
        return self._scored(queries, rows[:, :k])

    def _scored(self, queries: Vectors, rows: Rows) -> tuple[Rows, Vectors]:
        """Rows (b, k) by their inner products, from the vectors themselves: distances have lost digits."""
        scores = np.einsum("bkd,bd->bk", self.exact.vectors[rows], queries)
        scores[rows < 0] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")
        return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _width(dim: int, lifted: bool) -> int:
    """W of the points of a graph over (N, D)."""
    return -(-(dim + 1) // _LANES) * _LANES if lifted else dim


def _points(vectors: Vectors, copies: Copies, width: int, scale: Vectors | None) -> Callable[[Rows], Vectors]:
    """What a graph holds under its labels: vectors (N, D), where W > D lifted to (N, W) of equal length."""
    zeros = width - vectors.shape[1] - 1
    if zeros < 0:
        return lambda labels: vectors[copies.first[labels]]

    def scaled(rows: Rows) -> tuple[Vectors, Vectors]:
        some = vectors[rows] if scale is None else vectors[rows] * scale
        return some, np.einsum("nd,nd->n", some, some)

    def points(labels: Rows) -> Vectors:
        some, squares = scaled(copies.first[labels])
        lift = np.sqrt(np.maximum(longest - squares, 0))
        return np.column_stack([some, np.zeros((len(some), zeros), np.float32), lift])

    blocks = np.split(copies.first, range(_POINTS_AT_ONCE, len(copies), _POINTS_AT_ONCE))
    longest = max(scaled(rows)[1].max() for rows in blocks)
    return points
