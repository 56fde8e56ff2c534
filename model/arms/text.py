"""Text alone. Legend: B users, N items, E text width."""

from collections.abc import Sequence

import numpy as np

from model.config import RECENCY
from model.queries import unit
from model.sampling import Events, Floats, History, Rows


class TextArm:
    """Cosine of the centred texts with the recency-weighted mean of the user's; learns nothing."""

    batch = 1024

    def __init__(self, text: Floats) -> None:
        """text (N, E): a zero row where there is none."""
        present = np.abs(text).sum(axis=1, keepdims=True) > 0
        centred = (text - text[present[:, 0]].mean(axis=0)) * present if present.any() else text
        self._unit = unit(centred.astype(np.float32))

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> Floats:
        taste = np.zeros((len(histories), self._unit.shape[1]), np.float32)  # (B, E)
        for line, history in enumerate(histories):
            recency = np.exp(-np.arange(len(history.rows) - 1, -1, -1) / RECENCY) * history.weights
            taste[line] = recency.astype(np.float32) @ self._unit[history.rows]
        return np.asarray(taste @ self._unit.T)

    def learn(self, events: Events, rows: Rows) -> None:
        pass
