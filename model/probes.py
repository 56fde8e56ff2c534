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
EF_SEARCH = (64, 128, 256, 512, 1024)
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
    vectors: Vectors,
    walks: Vectors,
    truth: Vectors,
    ef_search: Sequence[int],
    M: int,
    ef_construction: int,
    threads: int,
) -> tuple[HnswIndex, float]:
    """The least `ef` that recalls well, in either space, or the best pair: which space is better differs by model.

    The second graph is built only where the lifted one does not do at the least `ef`.
    """
    built: dict[bool, HnswIndex] = {}
    best: tuple[float, int, bool] = (0.0, ef_search[0], True)
    for ef, lifted in product(ef_search, (True, False)):
        if lifted not in built:
            shape = {"M": M, "ef_construction": ef_construction, "threads": threads}
            built[lifted] = HnswIndex.build(vectors, lifted=lifted, **shape)
        built[lifted].ef = ef
        share = recall(built[lifted].search(walks, PROBE_K)[1], truth)
        if share > best[0]:
            best = share, ef, lifted
        if share >= GOOD_RECALL:
            break
    share, ef, lifted = best
    if share < MIN_RECALL:
        raise RecallTooLow(f"recall@{PROBE_K} is {share:.4f} at ef {ef}, under {MIN_RECALL}")
    built[lifted].ef = ef
    return built[lifted], share


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
