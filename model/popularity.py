"""Exponentially decayed event counts."""

import numpy as np
from numpy.typing import NDArray

_RESCALE = 1e30  # the inflating unit is folded back before float64 loses range


class Popularity:
    """Counts with the given half-lives (in events of the stream), updated by micro-batches in O(events).

    Instead of shrinking all counts, the unit of a new event grows; `values` divides it out.
    """

    def __init__(self, half_lives: tuple[float, ...]) -> None:
        self._growth = np.log(2) / np.asarray(half_lives)  # (H,) per event
        self._at_once = int(np.clip(np.log2(_RESCALE) * min(half_lives), 1, 1e6))  # events until it is folded
        self._unit = np.ones(len(half_lives))  # (H,)
        self._counts = np.zeros((0, len(half_lives)))  # (N, H)

    def grow(self, num_items: int) -> None:
        added = num_items - len(self._counts)
        self._counts = np.concatenate([self._counts, np.zeros((added, len(self._unit)))])

    def add(self, rows: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        """Folds events in, oldest first: the last one counts `weight`, earlier ones are already decayed."""
        for start in range(0, len(rows), self._at_once):
            self._add(rows[start : start + self._at_once], weights[start : start + self._at_once])

    def _add(self, rows: NDArray[np.int64], weights: NDArray[np.float32]) -> None:
        units = self._unit * np.exp(np.arange(1, len(rows) + 1)[:, None] * self._growth)  # (n, H)
        np.add.at(self._counts, rows, units * weights[:, None])
        self._unit = units[-1]
        if self._unit.max() > _RESCALE:
            self._counts /= self._unit
            self._unit = np.ones_like(self._unit)

    def values(self) -> NDArray[np.float64]:
        """(N, H) decayed counts now; negative events may lower them to 0, not below."""
        return np.asarray(np.maximum(self._counts / self._unit, 0.0))

    def log(self) -> NDArray[np.float32]:
        """(N, H) log(1 + count): 0 for an item nobody touched."""
        return np.log1p(self.values()).astype(np.float32)
