"""The learner with a part removed, or told things late: what each is worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.config import PARTS, ModelConfig
from model.evaluate import Arm
from model.learner import Learner
from model.model import Model
from model.sampling import Events, History, Padded

Rows = NDArray[np.int64]
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

    state_ms: an event enters histories when its period is over; 0: at once. weights_ms: the same for learning;
    NEVER: nothing is learned after the first `warmup` events. What a user consumed is excluded at once all
    the same: that is the evaluation's own knowledge.
    """

    def __init__(self, arm: Arm, state_ms: int, weights_ms: int, warmup: int) -> None:
        self.batch, self._arm, self._state_ms, self._weights_ms = arm.batch, arm, state_ms, weights_ms
        self._left = warmup
        self._held: list[tuple[Events, Rows]] = []

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> NDArray[np.floating]:
        if self._state_ms:
            histories = [_before(h, now - now % self._state_ms) for h, now in zip(histories, now_ms, strict=True)]
        return self._arm.score(users, histories, now_ms)

    def learn(self, events: Events, rows: Rows) -> None:
        if self._left > 0 or self._weights_ms == 0:
            self._left -= len(events)
            self._arm.learn(events, rows)
        elif self._weights_ms != NEVER:
            period = int(events.ts_ms[-1]) // self._weights_ms
            if self._held and int(self._held[-1][0].ts_ms[-1]) // self._weights_ms < period:
                for late in self._held:
                    self._arm.learn(*late)
                self._held.clear()
            self._held.append((events, rows))


def _before(history: History, ts_ms: int) -> History:
    kept = history.ts_ms < ts_ms
    return History(history.rows[kept], history.weights[kept], history.ts_ms[kept])
