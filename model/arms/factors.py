"""Matrix factorisation, one step an event. Legend: B users, N items, K factors."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.sampling import Events, History, Rows

Doubles = NDArray[np.float64]


_START = 0.1  # spread of the first factors


class _Factors:
    """Users' and items' factors; both start small and random, so that a seed fixes a run."""

    batch = 1

    def __init__(self, num_items: int, width: int, seed: int) -> None:
        self._random, self._width = np.random.default_rng(seed), width
        self.items = self._random.normal(0.0, _START, (num_items, width))  # (N, K)
        self.bias = np.zeros(num_items)
        self.users: dict[int, Doubles] = {}

    def user(self, user: int) -> Doubles:
        if user not in self.users:
            self.users[user] = self._random.normal(0.0, _START, self._width)
        return self.users[user]

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> Doubles:
        nobody = np.zeros(self._width)
        queries = np.stack([self.users.get(user, nobody) for user in users.tolist()])  # (B, K)
        return np.asarray(queries @ self.items.T + self.bias)

    def learn(self, events: Events, rows: Rows) -> None:
        for user, row, weight in zip(events.users, rows.tolist(), events.weights.tolist(), strict=True):
            if weight > 0:
                self.step(self.user(user), row)  # type: ignore[arg-type]  # numbers

    def step(self, user: Doubles, row: int) -> None:
        """Moves user (K,) and item in place."""
        raise NotImplementedError


class IsgdArm(_Factors):
    """Incremental SGD on positive-only feedback, every event a 1 (Vinagre et al. 2014)."""

    def __init__(self, num_items: int, width: int = 40, rate: float = 0.05, decay: float = 0.01, seed: int = 0) -> None:
        super().__init__(num_items, width, seed)
        self._rate, self._decay = rate, decay

    def step(self, user: Doubles, row: int) -> None:
        item, error = self.items[row], 1.0 - float(user @ self.items[row])
        change = self._rate * (error * item - self._decay * user)
        item += self._rate * (error * user - self._decay * item)
        user += change


class BprArm(_Factors):
    """Bayesian personalised ranking against seen items, with item biases (Rendle et al. 2009)."""

    def __init__(
        self, num_items: int, width: int = 64, decay: float = 0.002, negatives: int = 10, seed: int = 0
    ) -> None:
        super().__init__(num_items, width, seed)
        self._rate, self._decay, self._negatives = 0.05, decay, negatives
        self._seen: list[int] = []
        self._is_seen = np.zeros(num_items, np.bool_)

    def step(self, user: Doubles, row: int) -> None:
        if not self._is_seen[row]:
            self._is_seen[row] = True
            self._seen.append(row)
        drawn = [self._seen[at] for at in (self._random.random(self._negatives) * len(self._seen)).astype(int).tolist()]
        others = np.array([other for other in drawn if other != row], np.int64)  # (M,)
        if not len(others):
            return
        item, rivals = self.items[row], self.items[others]  # (K,), (M, K) a copy
        ahead = (item - rivals) @ user + self.bias[row] - self.bias[others]
        slope = 1.0 / (1.0 + np.exp(ahead))  # (M,)
        pull, times = slope @ (item - rivals), len(others)
        np.add.at(self.items, others, -self._rate * (slope[:, None] * user + self._decay * rivals))
        np.add.at(self.bias, others, -self._rate * slope)
        item += self._rate * (slope.sum() * user - self._decay * times * item)
        self.bias[row] += self._rate * slope.sum()
        user += self._rate * (pull - self._decay * times * user)
