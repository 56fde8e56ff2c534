"""Does a graph find what users of this model look for? Made-up users ask it and the exact scan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Protocol

import numpy as np

from model.index import ExactIndex, HnswIndex, recall
from model.queries import Vectors
from model.sampling import History

PROBE_K = 20
MIN_RECALL = 0.95  # under it a generation is refused
GOOD_RECALL = 0.99  # the first ef that reaches it is taken; users of Online Retail had .963 where walks had .991
EF_SEARCH = (64, 128, 256, 512, 1024, 2048, 4096)
Shape = tuple[int, int]  # M, ef_construction
SHAPES: tuple[Shape, ...] = ((16, 200), (32, 400))  # the second takes twice as long to build
WIDE = 256
NOW_MS = 1_700_000_000_000  # any time will do: a model sees ages


class RecallTooLow(ValueError):
    """The graph misses too many of the exact top 20."""


class ModelLike(Protocol):
    """What a generation needs of a model."""

    @property
    def ids(self) -> Sequence[str]: ...
    def item_vectors(self) -> Vectors: ...  # (N, D)
    def user_vectors(self, histories: Sequence[History], now_ms: Sequence[int]) -> Vectors: ...  # (B, D)
    def save(self, folder: Path) -> None: ...


def best_index(
    vectors: Vectors, walks: Vectors, truth: Vectors, ef_search: Sequence[int], shapes: Sequence[Shape], threads: int
) -> tuple[HnswIndex, float]:
    """The least `ef` that recalls well, in either space and any shape, or the best of all: which one does it differs
    by model. A graph is built when no cheaper one will do; those after the first shape, where WIDE is not enough.
    """
    built: dict[tuple[Shape, bool], HnswIndex] = {}
    best: tuple[float, int, tuple[Shape, bool]] = (0.0, ef_search[0], (shapes[0], True))
    first = [(ef, graph) for ef in ef_search if ef <= WIDE for graph in product(shapes[:1], (True, False))]
    every = [(ef, graph) for ef in ef_search for graph in product(shapes, (True, False))]
    for ef, graph in dict.fromkeys(first + every):
        if graph not in built:
            (M, ef_construction), lifted = graph
            built[graph] = HnswIndex.build(
                vectors, lifted=lifted, M=M, ef_construction=ef_construction, threads=threads
            )
        built[graph].ef = ef
        share = _recall(built[graph], walks, truth)
        if share > best[0]:
            best = share, ef, graph
        if share >= GOOD_RECALL:
            break
    share, ef, graph = best
    if share < MIN_RECALL:
        raise RecallTooLow(f"recall@{PROBE_K} is {share:.4f} at ef {ef}, under {MIN_RECALL}")
    built[graph].ef = ef
    return built[graph], share


def _recall(index: HnswIndex, walks: Vectors, truth: Vectors) -> float:
    """Of queries one by one: more of them in a batch may be scanned instead, which finds all."""
    return recall(np.concatenate([index.search(one[None], PROBE_K)[1] for one in walks]), truth)


def walk(model: ModelLike, exact: ExactIndex, num: int, steps: int = 8) -> Vectors:
    """User vectors (num, D) of made-up users: real ones are personal data, and items are no likeness of them.

    Half of them start from what strangers are shown, half from any item; four times of five they take one of the
    twenty items recommended next. Sums of item vectors, in their place, once saw a recall of 0.99 where users had 0.79.
    """
    generator = np.random.default_rng(0)

    def vectors(visits: list[list[int]]) -> Vectors:
        """A visit a minute, the newest just now."""
        ages = [60_000 * np.arange(len(rows))[::-1] for rows in visits]
        ones = [np.ones(len(rows), np.float32) for rows in visits]
        pasts = zip(visits, ones, ages, strict=True)
        histories = [History(np.array(rows, np.int64), one, NOW_MS - age) for rows, one, age in pasts]
        return model.user_vectors(histories, [NOW_MS] * len(visits))

    (popular,), _ = exact.search(vectors([[]]), min(10 * PROBE_K, exact.size))
    visits = [[int(generator.choice(popular) if user % 2 else generator.integers(exact.size))] for user in range(num)]
    for _ in range(steps - 1):
        offers, _ = exact.search(vectors(visits), PROBE_K, [np.array(rows) for rows in visits])  # (num, 20)
        for rows, offer in zip(visits, offers, strict=True):
            row = int(generator.choice(offer))
            if row >= 0 and generator.random() < 0.8:
                rows.append(row)
    return vectors(visits)
