"""Arms that count: popularity, transitions, co-visitation. Legend: B users, N items, T history."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.config import RECENCY
from model.popularity import Popularity
from model.sampling import Events, Floats, History, Rows

MOST_ITEMS = 30_000  # of a dense (N, N) float32 matrix: 3.6 GB
BACKOFF = 1e-6  # popularity's share where an arm knows nothing: below any difference that a count makes


class PopularityArm:
    """Most popular items; decayed with a finite half-life (events)."""

    batch = 1

    def __init__(self, num_items: int, half_life: float = float("inf")) -> None:
        self._popularity = Popularity((half_life,))
        self._popularity.grow(num_items)

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> NDArray[np.float64]:
        values = self._popularity.values()[:, 0]
        return np.broadcast_to(values, (len(histories), len(values)))

    def learn(self, events: Events, rows: Rows) -> None:
        self._popularity.add(rows, events.weights)


class CovisitationArm:
    """Exact decayed co-visitation, unfactorised: the recency-weighted rows of the user's recent items.

    The same counts and damping as model/covisitation.py, updated event by event in a dense (N, N) matrix.
    Raises ValueError above MOST_ITEMS items.
    """

    batch = 1

    def __init__(
        self, num_items: int, half_life: float = 50_000.0, length: int = 50, damping: tuple[float, float] = (0.3, 0.5)
    ) -> None:
        if num_items > MOST_ITEMS:
            raise ValueError(f"an exact item-item matrix takes {MOST_ITEMS} items at most, not {num_items}")
        self._counts = np.zeros((num_items, num_items), np.float32)  # in units of `_unit`
        self._length, self._damping, self._growth, self._unit = length, damping, np.log(2) / half_life, 1.0
        self._popularity = Popularity((half_life,))
        self._popularity.grow(num_items)
        self._past: dict[object, list[tuple[int, float]]] = defaultdict(list)

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> Floats:
        touched = self._popularity.values()[:, 0]
        left, right = (touched + 1.0) ** -self._damping[0], (touched + 10.0) ** -self._damping[1]
        popular = BACKOFF * touched / max(touched.max(), 1.0)
        out = np.empty((len(histories), len(touched)), np.float32)
        for line, history in enumerate(histories):
            rows = history.rows[-self._length :]
            age = np.arange(len(rows) - 1, -1, -1)
            recency = np.exp(-age / RECENCY) * history.weights[-self._length :] * left[rows] / self._unit
            out[line] = (recency.astype(np.float32) @ self._counts[rows]) * right + popular
        return out

    def learn(self, events: Events, rows: Rows) -> None:
        self._popularity.add(rows, events.weights)
        for user, row, weight in zip(events.users, rows.tolist(), events.weights.tolist(), strict=True):
            self._unit *= float(np.exp(self._growth))
            past = self._past[user]
            if past:
                self._pair(row, weight, past)
            past.append((row, weight))
            del past[: -self._length]
        if self._unit > 1e12:  # float32 keeps its range
            self._counts /= self._unit
            self._unit = 1.0

    def _pair(self, row: int, weight: float, past: list[tuple[int, float]]) -> None:
        older = np.array([entry[0] for entry in past], np.int64)
        strengths = np.array([entry[1] for entry in past])
        nearness = np.exp(-np.arange(len(past) - 1, -1, -1) / 8.0)
        amount = (nearness * strengths * weight * self._unit * (older != row)).astype(np.float32)
        np.add.at(self._counts[row], older, amount)
        np.add.at(self._counts[:, row], older, amount)


def markov_arm(num_items: int) -> CovisitationArm:
    """Transitions from the last item only, in both directions: first-order Markov."""
    return CovisitationArm(num_items, float("inf"), length=1, damping=(0.0, 0.0))
