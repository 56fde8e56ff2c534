"""Histories, events, and the bounded log from which training windows are drawn.

Legend: B batch, T history length (newest last, padded on the left with row -1).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Past = tuple[int, float, int]  # row, weight, ts_ms of one event


@dataclass(frozen=True)
class History:
    """One user's past as the model sees it, oldest first; unknown items are left out by the caller."""

    rows: Rows  # (T,) item rows in the model's id table
    weights: Floats  # (T,) strength: 1.0 normal, negative = dislike
    ts_ms: Rows  # (T,)

    @classmethod
    def of(cls, rows: ArrayLike = (), weights: ArrayLike = (), ts_ms: ArrayLike = ()) -> History:
        """From plain numbers; without any a stranger's."""
        return cls(np.array(rows, np.int64), np.array(weights, np.float32), np.array(ts_ms, np.int64))


@dataclass(frozen=True)
class Events:
    """Time-ordered columns. Raises ValueError when lengths differ or a weight is not finite."""

    users: Sequence[Hashable]  # (n,)
    items: Sequence[str]  # (n,) item ids
    weights: Floats  # (n,)
    ts_ms: Rows  # (n,)

    def __post_init__(self) -> None:
        lengths = {len(self.users), len(self.items), len(self.weights), len(self.ts_ms)}
        if len(lengths) != 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")
        if not np.isfinite(self.weights).all():
            raise ValueError("a weight is not finite")

    def __len__(self) -> int:
        return len(self.users)

    def slice(self, start: int, stop: int) -> Events:
        part = slice(start, stop)
        return Events(self.users[part], self.items[part], self.weights[part], self.ts_ms[part])


@dataclass(frozen=True)
class Padded:
    """Histories of equal length: newest last, row -1 where there is none."""

    rows: Rows  # (B, T)
    weights: Floats  # (B, T)
    ts_ms: Rows  # (B, T)
    goals: Floats  # (B, T) how much each event counts as something to predict; 0 outside training

    @property
    def lengths(self) -> Rows:
        """(B,) how many events each history holds."""
        return np.asarray((self.rows >= 0).sum(axis=1), dtype=np.int64)

    @property
    def disliked(self) -> bool:
        """Whether any event has a negative weight; known without a look at the device."""
        return bool((self.weights < 0).any())

    def columns(self) -> tuple[Rows, Floats, Rows, Floats]:
        return self.rows, self.weights, self.ts_ms, self.goals

    def part(self, lines: slice | NDArray[np.bool_]) -> Padded:
        """These histories alone; views of a slice."""
        return Padded(self.rows[lines], self.weights[lines], self.ts_ms[lines], self.goals[lines])

    def take(self, source: Rows) -> Padded:
        """Column `source[b, t]` of line b at (b, t); nothing where it is negative."""
        held, source = source >= 0, np.maximum(source, 0)
        columns = (self.weights, self.ts_ms, self.goals)
        weights, ts_ms, goals = (np.take_along_axis(c, source, 1) * held.astype(c.dtype) for c in columns)
        return Padded(np.where(held, np.take_along_axis(self.rows, source, 1), -1), weights, ts_ms, goals)


def pad(histories: Sequence[History], length: int) -> Padded:
    """The newest `length` events of each history, padded on the left to the longest: (B, T >= 1)."""
    width = max([1, *(min(len(h.rows), length) for h in histories)])
    shape = (len(histories), width)
    zeros = np.zeros(shape, np.float32)
    out = Padded(np.full(shape, -1, np.int64), zeros.copy(), np.zeros(shape, np.int64), zeros)
    for line, history in enumerate(histories):
        kept = min(len(history.rows), length)
        if kept:
            out.rows[line, -kept:] = history.rows[-kept:]
            out.weights[line, -kept:] = history.weights[-kept:]
            out.ts_ms[line, -kept:] = history.ts_ms[-kept:]
    return out


class EventLog:
    """The newest `capacity` events in a ring, each pointing to its user's previous one.

    Events are numbered from 0 and keep their number; `start` is the oldest one still held. With
    `exclude_seen`, only the first positive event of a user on an item is something to predict.

    Each time the ring has turned, users without an event in it are forgotten: who comes back is a stranger. Kept of all
    users ever, `consumed` would grow for as long as the process lives.
    """

    def __init__(self, capacity: int, exclude_seen: bool) -> None:
        self.capacity, self.exclude_seen, self.count = capacity, exclude_seen, 0
        self.user_index: dict[Hashable, int] = {}
        self.consumed: list[set[int]] = []  # per user, exact: items with a positive event
        self._last: list[int] = []  # per user, number of the newest event
        self._free: list[int] = []  # indices of nobody, to be given away again
        self._whole = {name: np.zeros(0, np.int64) for name in ("user", "row", "ts", "previous")}
        self._real = {name: np.zeros(0, np.float32) for name in ("weight", "goal")}

    @property
    def start(self) -> int:
        return max(0, self.count - self.capacity)

    def append(self, users: Sequence[Hashable], rows: Rows, weights: Floats, ts_ms: Rows) -> Rows:
        """Adds at most `capacity` events and returns their numbers (n,)."""
        assert len(rows) <= self.capacity, f"{len(rows)} events into a log of {self.capacity}"
        numbers = np.arange(self.count, self.count + len(rows))
        self._reserve(min(self.capacity, self.count + len(rows)))
        slots = numbers % self.capacity
        indices = np.array([self._index(user) for user in users], np.int64)
        for slot, number, index in zip(slots.tolist(), numbers.tolist(), indices.tolist(), strict=True):
            self._whole["previous"][slot], self._last[index] = self._last[index], number
        self._whole["user"][slots], self._whole["row"][slots], self._whole["ts"][slots] = indices, rows, ts_ms
        self._real["weight"][slots], self._real["goal"][slots] = weights, self._goals(indices, rows, weights)
        turns = self.count // self.capacity
        self.count += len(rows)
        if self.count // self.capacity > turns:
            self._release([user for user, index in self.user_index.items() if self._last[index] < self.start])
        return numbers

    def _index(self, user: Hashable) -> int:
        index = self.user_index.get(user)
        if index is None:
            if not self._free:
                self._free.append(len(self._last))
                self._last.append(-1)
                self.consumed.append(set())
            index = self.user_index[user] = self._free.pop()
        return index

    def _goals(self, indices: Rows, rows: Rows, weights: Floats) -> Floats:
        goals = np.maximum(weights, np.float32(0))
        for position, (index, row) in enumerate(zip(indices.tolist(), rows.tolist(), strict=True)):
            seen = self.consumed[index]
            if goals[position] > 0 and row in seen and self.exclude_seen:
                goals[position] = 0
            elif goals[position] > 0:
                seen.add(row)
        return goals

    def forget(self, users: Collection[Hashable]) -> None:
        """Empties the places of these users' events; who comes back is a stranger."""
        indices = self._release(users)
        places = np.isin(self._whole["user"], indices)
        for name, column in self._whole.items():
            column[places] = 0 if name in ("row", "ts") else -1
        for real in self._real.values():
            real[places] = 0

    def _release(self, users: Collection[Hashable]) -> list[int]:
        """The indices that these users had: other users get them, so that no event of theirs may stay in the ring."""
        indices = sorted(self.user_index.pop(user) for user in users if user in self.user_index)  # a set has no order
        for index in indices:
            self._last[index], self.consumed[index] = -1, set()
        self._free += indices
        return indices

    def users(self, numbers: Rows) -> Rows:
        """(B,) user index of each event, -1 of one forgotten."""
        return self._whole["user"][numbers % self.capacity]

    def past(self, user: Hashable, length: int) -> tuple[list[Past], set[int]]:
        """The user's newest events, oldest first, and the rows consumed; empty for a stranger."""
        index = self.user_index.get(user)
        if index is None:
            return [], set()
        window = self.ending_at(np.array([self._last[index]]), length)
        columns = zip(window.rows[0].tolist(), window.weights[0].tolist(), window.ts_ms[0].tolist(), strict=True)
        return [event for event in columns if event[0] >= 0], set(self.consumed[index])

    def consumers(self, num_items: int) -> tuple[Rows, Rows]:
        """(N,) users known who have consumed each item, and (N,) those of them who have consumed another one too."""
        counts = np.array([len(taken) for taken in self.consumed], np.int64)  # (users,)
        rows = np.fromiter(itertools.chain.from_iterable(self.consumed), np.int64, counts.sum())
        busy = np.repeat(counts > 1, counts)
        return np.bincount(rows, minlength=num_items), np.bincount(rows[busy], minlength=num_items)

    def before(self, numbers: Rows, length: int, same_stamp: bool = True) -> Padded:
        """What each event's user did before it, (B, length); without its own stamp unless `same_stamp`."""
        stamps, newest = self._whole["ts"], self._previous(numbers)
        own = stamps[numbers % self.capacity]  # (B,)
        while not same_stamp:
            level = (newest >= self.start) & (stamps[np.maximum(newest, 0) % self.capacity] >= own)
            if not level.any():
                break
            newest = np.where(level, self._previous(newest), newest)
        return self.ending_at(newest, length)

    def ending_at(self, numbers: Rows, length: int) -> Padded:
        """Each event with the `length` - 1 events of its user before it: (B, length), the event last."""
        chain = np.full((len(numbers), length), -1, np.int64)
        current = np.asarray(numbers, np.int64)
        for column in range(length - 1, -1, -1):
            current = np.where(current >= self.start, current, -1)
            chain[:, column] = current
            current = self._previous(current)
        held, slots = chain >= 0, np.maximum(chain, 0) % self.capacity
        weights, goals = (self._real[name][slots] * held.astype(np.float32) for name in ("weight", "goal"))
        rows = np.where(held, self._whole["row"][slots], -1)
        return Padded(rows, weights, self._whole["ts"][slots] * held, goals)

    def _previous(self, numbers: Rows) -> Rows:
        """(B,) the event of the same user before each, held or not; -1 for none."""
        return np.where(numbers >= self.start, self._whole["previous"][np.maximum(numbers, 0) % self.capacity], -1)

    def consumed_mask(self, users: Rows, columns: Rows, num_candidates: int) -> NDArray[np.bool_]:
        """(B, C) what each user has consumed and must not be recommended; columns (N,) are -1 for no candidate."""
        mask = np.zeros((len(users), num_candidates + 1), np.bool_)  # the last column takes the -1
        if self.exclude_seen:
            for line, user in enumerate(users.tolist()):
                consumed = self.consumed[user]
                mask[line, columns[np.fromiter(consumed, np.int64, len(consumed))]] = True
        return mask[:, :-1]

    def _reserve(self, size: int) -> None:
        held = len(self._real["weight"])
        if size > held:
            grown = min(self.capacity, max(size, 2 * held, 1024))
            self._whole = {name: np.resize(column, grown) for name, column in self._whole.items()}
            self._real = {name: np.resize(column, grown) for name, column in self._real.items()}


def shuffle_ties(window: Padded, generator: np.random.Generator) -> Padded:
    """Events of one stamp in random order: their order in the log says nothing about the user."""
    jitter = generator.random(window.rows.shape)
    stamps = np.where(window.rows >= 0, window.ts_ms, np.iinfo(np.int64).min)
    return window.take(np.lexsort((jitter, stamps), axis=1))
