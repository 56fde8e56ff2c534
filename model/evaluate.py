"""Predict first, learn after: rank metrics of any arm over a stream.

Legend: n events, B events scored at once, N items.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from model.covisitation import Covisitation
from model.learner import Learner
from model.popularity import Popularity
from model.sampling import Events, History, pad

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Mode = Literal["line", "strict"]


class Arm(Protocol):
    """What can be evaluated. `batch`: events scored between two calls of learn, at least 1."""

    batch: int

    def score(self, histories: Sequence[History], now_ms: Sequence[int]) -> NDArray[np.floating]:
        """(B, N) higher is better; rows as in the `items` given to `prequential`."""

    def learn(self, events: Events, rows: Rows) -> None:
        """Events just predicted; rows (n,) are their items' rows."""


@dataclass(frozen=True)
class Ranks:
    """Each predicted event's expected rank among the candidates, from 1; inf when it is not one of them."""

    ranks: NDArray[np.float64]  # (n,) ties count half
    users: Rows  # (n,) a number a user
    position: Rows  # (n,) in the stream
    histories: Rows  # (n,) history lengths

    def metrics(self) -> dict[str, float]:
        """Mean HR@10, HR@20, NDCG@10 (one relevant item: 1 / log2(1 + rank)) and MRR; 0 without events."""
        return {name: float(value.mean()) if len(value) else 0.0 for name, value in self.gains().items()}

    def gains(self) -> dict[str, NDArray[np.float64]]:
        ranks = self.ranks
        hit, discount = ranks <= 10, 1.0 / np.log2(1.0 + np.minimum(ranks, 1e18))
        return {
            "hr@10": hit.astype(np.float64),
            "hr@20": (ranks <= 20).astype(np.float64),
            "ndcg@10": np.where(hit, discount, 0.0),
            "mrr": 1.0 / ranks,
        }

    def after(self, position: int) -> Ranks:
        """Only the events at or after a position of the stream."""
        kept = self.position >= position
        return Ranks(self.ranks[kept], self.users[kept], self.position[kept], self.histories[kept])

    def interval(self, metric: str, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
        """95 % interval of a metric's mean by resampling users with all their events (Efron 1979)."""
        return bootstrap(self.gains()[metric], self.users, draws, seed)


def bootstrap(
    values: NDArray[np.float64], users: NDArray[np.int64], draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of mean(values) over resampled users; give differences (n,) for a paired comparison."""
    _, user = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(user, values), np.bincount(user)  # (U,)
    picks = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), draws)
    low, high = np.quantile((picks @ sums) / (picks @ counts), [0.025, 0.975])
    return float(low), float(high)


def expected_ranks(scores: NDArray[np.floating], targets: Rows, allowed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(B,) 1 + candidates above the target + half of those equal to it; inf where it is not allowed."""
    own = scores[np.arange(len(targets)), targets][:, None]  # (B, 1)
    above = ((scores > own) & allowed).sum(axis=1)
    equal = ((scores == own) & allowed).sum(axis=1) - 1
    ranks = 1.0 + above + equal / 2.0
    return np.where(allowed[np.arange(len(targets)), targets], ranks, np.inf)


@dataclass
class _Users:
    """What the evaluation itself knows of every user: exact histories and consumed items."""

    rows: dict[Hashable, list[int]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[Hashable, list[float]] = field(default_factory=lambda: defaultdict(list))
    stamps: dict[Hashable, list[int]] = field(default_factory=lambda: defaultdict(list))
    consumed: dict[Hashable, set[int]] = field(default_factory=lambda: defaultdict(set))

    def history(self, user: Hashable, length: int) -> History:
        columns = (self.rows[user][-length:], self.weights[user][-length:], self.stamps[user][-length:])
        rows, weights, stamps = columns
        return History(np.array(rows, np.int64), np.array(weights, np.float32), np.array(stamps, np.int64))

    def add(self, user: Hashable, row: int, weight: float, ts_ms: int) -> None:
        self.rows[user].append(row)
        self.weights[user].append(weight)
        self.stamps[user].append(ts_ms)
        if weight > 0:
            self.consumed[user].add(row)


def prequential(
    arm: Arm, events: Events, items: Sequence[str], mode: Mode, exclude_seen: bool = True, length: int = 50
) -> Ranks:
    """Scores every positive event before it is learned from, among the items seen so far.

    "line": a user's history holds every event above it in the stream. "strict": events that share a stamp
    are all scored before any is learned from or enters a history. With `exclude_seen` the user's consumed
    items are no candidates and events on them are not scored. `length`: events a history holds at most.
    """
    row_of = {item: row for row, item in enumerate(items)}
    rows = np.array([row_of[item] for item in events.items], np.int64)
    order = np.arange(len(rows)) if mode == "line" else np.asarray(events.ts_ms)
    first = np.full(len(items), np.iinfo(np.int64).max)  # (N,) when each item was first seen
    np.minimum.at(first, rows[events.weights > 0], order[events.weights > 0])
    users, found = _Users(), []
    for start, stop in _batches(order, arm.batch):
        found.append(_score(arm, events, rows, order, first, users, (start, stop), exclude_seen, length))
        arm.learn(events.slice(start, stop), rows[start:stop])
    ranks, positions, lengths = (np.concatenate(column) for column in zip(*found, strict=True))
    index = {user: number for number, user in enumerate(dict.fromkeys(events.users))}
    number = np.array([index[events.users[p]] for p in positions], np.int64)
    return Ranks(ranks, number, positions, lengths)


def _batches(order: Rows, batch: int) -> Iterator[tuple[int, int]]:
    """Spans of at least `batch` events that do not cut a run of equal `order`."""
    start = 0
    while start < len(order):
        stop = min(start + batch, len(order))
        while stop < len(order) and order[stop] == order[stop - 1]:
            stop += 1
        yield start, stop
        start = stop


def _score(
    arm: Arm,
    events: Events,
    rows: Rows,
    order: Rows,
    first: Rows,
    users: _Users,
    span: tuple[int, int],
    exclude_seen: bool,
    length: int,
) -> tuple[NDArray[np.float64], Rows, Rows]:
    """Ranks, positions and history lengths of a span; `users` then holds its events too."""
    positions, histories, barred = [], [], []
    waiting = span[0]  # events from here on are not in `users` yet
    for position in range(*span):
        while order[waiting] < order[position]:
            _admit(users, events, rows, waiting)
            waiting += 1
        user, row = events.users[position], int(rows[position])
        if events.weights[position] > 0 and not (exclude_seen and row in users.consumed[user]):
            positions.append(position)
            histories.append(users.history(user, length))
            barred.append(list(users.consumed[user]) if exclude_seen else [])
    for position in range(waiting, span[1]):
        _admit(users, events, rows, position)
    chosen = np.array(positions, np.int64)
    if not positions:
        return np.zeros(0), chosen, chosen
    allowed = first[None, :] < order[chosen][:, None]  # (B, N)
    for line, consumed in enumerate(barred):
        allowed[line, consumed] = False
    scores = arm.score(histories, events.ts_ms[chosen].tolist())
    lengths = np.array([len(history.rows) for history in histories], np.int64)
    return expected_ranks(scores, rows[chosen], allowed), chosen, lengths


def _admit(users: _Users, events: Events, rows: Rows, position: int) -> None:
    at = (int(rows[position]), float(events.weights[position]), int(events.ts_ms[position]))
    users.add(events.users[position], *at)


class LearnerArm:
    """The learner as it is served: vectors of its newest snapshot, inner products."""

    def __init__(self, learner: Learner) -> None:
        self.batch, self._learner, self._model = learner.config.micro_batch, learner, learner.model()

    def score(self, histories: Sequence[History], now_ms: Sequence[int]) -> Floats:
        scores: Floats = self._model.user_vectors(histories, now_ms) @ self._model.item_vectors().T
        return scores

    def learn(self, events: Events, rows: Rows) -> None:
        self._learner.learn(events)
        self._model = self._learner.model()


class PopularityArm:
    """Most popular items; decayed with a finite half-life (events)."""

    batch = 1

    def __init__(self, num_items: int, half_life: float = float("inf")) -> None:
        self._popularity = Popularity((half_life,))
        self._popularity.grow(num_items)

    def score(self, histories: Sequence[History], now_ms: Sequence[int]) -> NDArray[np.float64]:
        values = self._popularity.values()[:, 0]
        return np.broadcast_to(values, (len(histories), len(values)))

    def learn(self, events: Events, rows: Rows) -> None:
        self._popularity.add(rows, events.weights)


class CovisitationArm:
    """Exact decayed co-visitation, unfactorised: the recency-weighted rows of the user's recent items."""

    def __init__(self, num_items: int, half_life: float = 50_000.0, batch: int = 64) -> None:
        self.batch, self._users = batch, _Users()
        self._covisitation = Covisitation(half_life, 20_000_000)
        self._touched = Popularity((half_life,))
        self._covisitation.grow(num_items)
        self._touched.grow(num_items)

    def score(self, histories: Sequence[History], now_ms: Sequence[int]) -> Floats:
        damped, out = self._covisitation.damped(self._touched.values()[:, 0]), []
        for history in histories:
            recency = np.exp(-np.arange(len(history.rows) - 1, -1, -1) / 5.0) * history.weights
            out.append(recency @ damped[history.rows])
        return np.array(out, np.float32)

    def learn(self, events: Events, rows: Rows) -> None:
        self._touched.add(rows, events.weights)
        past = []
        for position in range(len(events)):
            past.append(self._users.history(events.users[position], 50))
            _admit(self._users, events, rows, position)
        before = pad(past, 50)
        self._covisitation.add(rows, events.weights, before)
