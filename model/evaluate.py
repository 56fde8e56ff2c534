"""Predict first, learn after: any arm over a stream.

Legend: n events, B events scored at once, N items.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from model.learner import Learner
from model.outcome import COLD, Outcome, auc, best, expected_ranks
from model.sampling import Events, Floats, History, Rows

Mode = Literal["line", "strict"]
HISTORY = 50  # newest events of a user that an arm is shown
MOST_CELLS = 16_000_000  # scores ranked at once, 20 bytes each: where stamps are days, thousands of events are


class Arm(Protocol):
    """What can be evaluated. `batch`: events scored between two calls of learn, at least 1."""

    batch: int

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> NDArray[np.floating]:
        """(B, N) higher is better; users (B,) by number, rows as in the `items` given to `replayed`."""

    def learn(self, events: Events, rows: Rows) -> None:
        """Events just predicted, their users by number; rows (n,) are their items' rows."""


@dataclass(frozen=True)
class _Question:
    """A positive event, and what is known before it."""

    position: int
    user: int
    row: int
    history: History
    consumed: Rows  # by the user
    cold: NDArray[np.bool_] | None  # (N,) the items as cold as its own; None when that is not cold
    earlier: int  # positive events of the item


@dataclass
class _State:
    """What the evaluation itself knows: exact histories, consumed items, events of every item."""

    touched: Rows  # (N,) positive events so far
    rows: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    weights: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    stamps: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    consumed: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))

    def question(self, position: int, user: int, row: int, length: int) -> _Question:
        """About the event at `position`; of the user's history its newest `length` events."""
        rows, weights, stamps = (column[user][-length:] for column in (self.rows, self.weights, self.stamps))
        consumed = np.fromiter(self.consumed[user], np.int64, len(self.consumed[user]))
        history = History.of(rows, weights, stamps)
        return _Question(position, user, row, history, consumed, self._as_cold(row), int(self.touched[row]))

    def add(self, user: int, row: int, weight: float, ts_ms: int) -> None:
        self.rows[user].append(row)
        self.weights[user].append(weight)
        self.stamps[user].append(ts_ms)
        if weight > 0:
            self.consumed[user].add(row)
            self.touched[row] += 1

    def _as_cold(self, row: int) -> NDArray[np.bool_] | None:
        if self.touched[row] >= COLD:
            return None
        touched = self.touched
        return touched == 0 if touched[row] == 0 else (touched > 0) & (touched < COLD)


def replayed(arm: Arm, events: Events, items: Sequence[str], mode: Mode, length: int = HISTORY) -> Outcome:
    """Scores every positive event before it is learned from, among the items seen so far.

    "line": a user's history holds every event above it in the stream. "strict": events that share a stamp
    are all scored before any is learned from or enters a history. `length`: events a history holds at most.
    Cold items are ranked among all of `items` that are as cold, those that nobody has touched included.
    Raises FloatingPointError when a score is NaN or +inf, ValueError when no event was positive.
    """
    row_of = {item: row for row, item in enumerate(items)}
    rows = np.array([row_of[item] for item in events.items], np.int64)
    number = {user: at for at, user in enumerate(dict.fromkeys(events.users))}
    events = Events([number[user] for user in events.users], events.items, events.weights, events.ts_ms)
    order = np.arange(len(rows)) if mode == "line" else np.asarray(events.ts_ms)
    replay = _Replay(arm, events, rows, order, len(items), length)
    for start, stop in _batches(order, arm.batch):
        replay.score(start, stop)
        arm.learn(events.slice(start, stop), rows[start:stop])
    return replay.outcome()


def _batches(order: Rows, batch: int) -> Iterator[tuple[int, int]]:
    """Spans of at least `batch` events that do not cut a run of equal `order`."""
    start = 0
    while start < len(order):
        stop = min(start + batch, len(order))
        while stop < len(order) and order[stop] == order[stop - 1]:
            stop += 1
        yield start, stop
        start = stop


class _Replay:
    def __init__(self, arm: Arm, events: Events, rows: Rows, order: Rows, num_items: int, length: int) -> None:
        self._arm, self._events, self._rows, self._order, self._length = arm, events, rows, order, length
        self._users: Sequence[int] = events.users  # type: ignore[assignment]  # numbers, since `replayed`
        self._state = _State(np.zeros(num_items, np.int64))
        positive = events.weights > 0
        self._first = np.full(num_items, np.iinfo(np.int64).max)  # (N,) when each item was first seen
        np.minimum.at(self._first, rows[positive], order[positive])
        self._found: list[Outcome] = []

    def score(self, start: int, stop: int) -> None:
        """Ranks of a span's positive events; the state then holds its events too."""
        asked, waiting = list[_Question](), start  # from `waiting` on, the state knows nothing
        for position in range(start, stop):
            while self._order[waiting] < self._order[position]:
                self._admit(waiting)
                waiting += 1
            if self._events.weights[position] > 0:
                user, row = int(self._users[position]), int(self._rows[position])
                asked.append(self._state.question(position, user, row, self._length))
        for position in range(waiting, stop):
            self._admit(position)
        size = max(1, MOST_CELLS // len(self._first))
        self._found += [self._ranked(asked[at : at + size]) for at in range(0, len(asked), size)]

    def _admit(self, position: int) -> None:
        events = self._events
        at = (int(self._rows[position]), float(events.weights[position]), int(events.ts_ms[position]))
        self._state.add(self._users[position], *at)

    def _ranked(self, asked: list[_Question]) -> Outcome:
        users, chosen, targets, lengths, earlier = np.array(
            [(one.user, one.position, one.row, len(one.history.rows), one.earlier) for one in asked], np.int64
        ).T
        scores = self._arm.score(users, [one.history for one in asked], self._events.ts_ms[chosen].tolist())  # (B, N)
        if not (scores < np.inf).all():  # nor NaN, which would rank before the first; -inf rules an item out
            raise FloatingPointError(f"a score is NaN or infinite at event {chosen[0]}")
        allowed = self._first[None, :] < self._order[chosen][:, None]  # (B, N)
        open_ranks = expected_ranks(scores, targets, allowed)
        for line, one in enumerate(asked):
            allowed[line, one.consumed] = False
        aucs = [
            float("nan") if one.cold is None else auc(own, one.row, one.cold)
            for own, one in zip(scores, asked, strict=True)
        ]
        return Outcome(
            ranks=expected_ranks(scores, targets, allowed),
            users=users,
            position=chosen,
            histories=lengths,
            open_ranks=open_ranks,
            repeat=np.array([one.row in one.consumed for one in asked], np.bool_),
            earlier=earlier,
            auc=np.array(aucs),
            top=best(scores, allowed),
        )

    def outcome(self) -> Outcome:
        if not self._found:
            raise ValueError("no event has a positive weight: nothing to predict")
        names = [field.name for field in fields(Outcome)]
        return Outcome(**{name: np.concatenate([getattr(part, name) for part in self._found]) for name in names})


class LearnerArm:
    """The learner, scoring by inner products: counts and mix every `batch` events (or stamp), where the counting
    rivals learn after every one; towers and factors every micro-batch."""

    batch = 16  # popularity of half-life 125 loses 4 % of its NDCG@10 on beauty at 64, 1 % at 16, none at 8

    def __init__(self, learner: Learner) -> None:
        self._learner, self._waiting = learner, np.zeros(0, np.int64)
        self._model = learner.model()
        self._items = self._model.item_vectors()

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> Floats:
        scores: Floats = self._model.user_vectors(histories, now_ms) @ self._items.T
        return scores

    def learn(self, events: Events, rows: Rows) -> None:
        size, learner, stepped = self._learner.config.micro_batch, self._learner, False
        for start in range(0, len(events), size):
            self._waiting = np.append(self._waiting, learner.observe(events.slice(start, start + size)))
            while len(self._waiting) >= size:
                learner.learn_observed(self._waiting[:size])
                self._waiting, stepped = self._waiting[size:], True
        if stepped:
            self._model = learner.model()
            self._items = self._model.item_vectors()
        else:
            self._model = learner.recounted(self._model)
            popularity = self._model.arrays["popularity"]  # (N, F - 3), the last columns of an item's vector
            self._items[:, -popularity.shape[1] :] = popularity  # a copy of all cost .2 ms an event, 12,000 items
