"""The learner with a part removed, or told things late: what each is worth."""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from model.config import PARTS, ModelConfig
from model.evaluate import Arm
from model.learner import Learner
from model.model import Model
from model.sampling import Events, History, Padded, Rows

NEVER = -1


class Without(Learner):
    """A learner one of whose learned parts (config.PARTS) always scores 0, so that its mix weight stays 0."""

    def __init__(self, part: str, config: ModelConfig, seed: int = 0) -> None:
        self._part = PARTS.index(part)
        super().__init__(config, seed)

    def _scores(self, view: Model, history: Padded, ts_ms: Rows, candidates: Rows) -> NDArray[np.float32]:
        scores = super()._scores(view, history, ts_ms, candidates)  # (F, B, C)
        scores[self._part] = 0.0
        return scores


class Delayed:
    """An arm whose user state and weights move on only with the clock: at multiples of a period.

    state_ms: an event enters histories when its period is over; 0: at once. weights_ms: the same for learning, but
    for events of the very batch that is scored; NEVER: nothing is learned after the first `warmup` events. What a user
    consumed is excluded at once all the same: that is the evaluation's own knowledge.
    """

    def __init__(self, arm: Arm, state_ms: int, weights_ms: int, warmup: int) -> None:
        self.batch, self._arm, self._state_ms, self._weights_ms = arm.batch, arm, state_ms, weights_ms
        self._left = warmup
        self._held: deque[tuple[Events, Rows]] = deque()  # each of one period

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> NDArray[np.floating]:
        if self._state_ms:
            histories = [_before(h, now - now % self._state_ms) for h, now in zip(histories, now_ms, strict=True)]
        if self._weights_ms <= 0:
            return self._arm.score(users, histories, now_ms)
        scores = []
        for span in self._periods(now_ms):
            self._tell(now_ms[span.start])
            scores.append(self._arm.score(users[span], histories[span], now_ms[span]))
        return np.concatenate(scores)

    def learn(self, events: Events, rows: Rows) -> None:
        if self._left > 0 or self._weights_ms == 0:
            self._left -= len(events)
            self._arm.learn(events, rows)
        elif self._weights_ms != NEVER:
            self._held += [(events.slice(s.start, s.stop), rows[s]) for s in self._periods(events.ts_ms)]

    def _tell(self, now_ms: int) -> None:
        """The arm learns what was held of the periods that are over."""
        while self._held and self._held[0][0].ts_ms[0] < now_ms - now_ms % self._weights_ms:
            self._arm.learn(*self._held.popleft())

    def _periods(self, ts_ms: Sequence[int] | Rows) -> list[slice]:
        """Where each period's part of these stamps lies."""
        cuts = np.flatnonzero(np.diff(np.asarray(ts_ms) // self._weights_ms)) + 1
        return [slice(start, stop) for start, stop in pairwise([0, *cuts.tolist(), len(ts_ms)])]


def _before(history: History, ts_ms: int) -> History:
    kept = history.ts_ms < ts_ms
    return History(history.rows[kept], history.weights[kept], history.ts_ms[kept])
