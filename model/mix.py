"""How much each part of the score counts, learned on the stream by history length.

Legend: B events, C candidates, F parts (config.PARTS), G = 4 buckets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.config import BUCKETS, PARTS

_START = np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.5])  # text and popularity, until events have spoken


def bucket(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B,) bucket of each history length: 0 / 1-4 / 5-19 / 20+.

    >>> bucket(np.array([0, 1, 4, 5, 20])).tolist()
    [0, 1, 1, 2, 3]
    """
    return np.searchsorted(np.array(BUCKETS), lengths, side="right")


class Mix:
    """Weights (G, F) = one shared row + one row a bucket, both by Adagrad (Duchi et al. 2011).

    The shared row lets a bucket profit from the others while it has few events of its own.
    """

    def __init__(self, rate: float, candidates: int) -> None:
        self._rate, self._candidates = rate, candidates
        self._rows = np.zeros((1 + len(BUCKETS) + 1, len(PARTS)))  # shared row first
        self._rows[0] = _START
        self._squares = np.full_like(self._rows, 1e-6)

    def weights(self) -> NDArray[np.float32]:
        """(G, F)."""
        return np.asarray(self._rows[0] + self._rows[1:], np.float32)

    def restore(self, weights: NDArray[np.float32]) -> None:
        """Goes on from the weights (G, F) of a saved model."""
        self._rows[0] = weights.mean(axis=0)
        self._rows[1:] = weights - self._rows[0]

    def learn(
        self,
        parts: NDArray[np.float32],
        targets: NDArray[np.int64],
        excluded: NDArray[np.bool_],
        buckets: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """One step on the softmax over each event's own best candidates; losses (n <= B,) of those that count.

        An event counts only if its target is among its best: adding the target to them would teach that whatever
        lifts an item into the best speaks against it (popularity went to zero on online-retail). The likelihood
        given that the target is among the best has no such bias.
        parts (F, B, C), targets (B,) columns, excluded (B, C) bool, buckets (B,).
        """
        lines = np.arange(len(targets))
        total = np.einsum("fbc,bf->bc", parts, self.weights()[buckets])  # (B, C)
        own = total[lines, targets]
        total[excluded] = -np.inf
        total[lines, targets] = own
        kept = min(self._candidates, total.shape[1])
        best = np.argpartition(-total, kept - 1, axis=1)[:, :kept]  # (B, K)
        counts = (best == targets[:, None]).any(axis=1)
        if not counts.any():
            return np.zeros(0)
        logits = np.take_along_axis(total, best, 1)
        chosen = np.stack([np.take_along_axis(part, best, 1) for part in parts], axis=2)  # (B, K, F)
        peak = logits.max(axis=1, keepdims=True)
        odds = np.exp(logits - peak)
        share = odds / odds.sum(axis=1, keepdims=True)  # (B, K)
        gradient = np.einsum("bk,bkf->bf", share, chosen) - parts[:, lines, targets].T  # (B, F)
        self._step(gradient[counts], buckets[counts])
        losses = peak[:, 0] + np.log(odds.sum(axis=1)) - own
        return np.asarray(losses[counts], np.float64)

    def _step(self, gradient: NDArray[np.float64], buckets: NDArray[np.int64]) -> None:
        slope = np.zeros_like(self._rows)
        np.add.at(slope, buckets + 1, gradient / len(gradient))
        slope[0] = gradient.mean(axis=0)
        self._squares += slope**2
        self._rows -= self._rate * slope / np.sqrt(self._squares)
