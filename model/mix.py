"""How much each part of the score counts, learned on the stream by the user's situation.

Legend: B events, C candidates, K candidates kept, F parts (config.PARTS), G situations, R = 8 rows of weights.
"""

import numpy as np
from numpy.typing import NDArray

from model.config import BUCKETS, PARTS, PAUSES, PERSONAL, SITUATIONS
from model.sampling import Padded

# Events' worth of trust in the start. Held harder: a situation's own weights, at 0, and what is the same for everyone:
# else the first hundred events of users who had the popular items turned popularity around for strangers too.
_SHARED, _OWN = 1.0, 30.0
_RESTORED = 300.0  # the same for the weights of a saved model
_START = np.zeros(len(PARTS))  # text and popularity, until events have spoken
_START[[PARTS.index("text"), PARTS.index("popular")]] = 1.0, 0.5


def _rows() -> NDArray[np.float64]:
    """(G, R) which rows add up to a situation's weights: the shared one, its history length's, its pause's."""
    lengths, pauses = np.divmod(np.arange(SITUATIONS), len(PAUSES) + 1)
    rows = [np.ones((SITUATIONS, 1)), np.eye(len(BUCKETS) + 1)[lengths], np.eye(len(PAUSES) + 1)[pauses]]
    return np.concatenate(rows, axis=1)


_ROWS = _rows()


def situation(history: Padded, now_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B,) in [0, G): bucket of the history length (0 / 1-4 / 5-19 / 20+) and of the time since its last event."""
    length = np.searchsorted(np.array(BUCKETS), history.lengths, side="right")
    pause = np.searchsorted(np.array(PAUSES), now_ms - history.ts_ms[:, -1], side="right")
    return np.asarray(length * (len(PAUSES) + 1) + np.where(length > 0, pause, len(PAUSES)))


class Mix:
    """Weights (G, F), sums of rows (R, F): each batch's loss enters as its second-order expansion at the weights
    that scored it, and the weights are the optimum of the decayed sum of these (an online Newton method).

    Against Adagrad on the same parts it has no rate to choose and follows a stream without forgetting its scale.
    """

    def __init__(self, candidates: int, half_life: float) -> None:
        self._candidates, self._decay = candidates, np.log(2) / half_life
        self._start = np.zeros((_ROWS.shape[1], len(PARTS)))
        self._start[0] = _START
        self._trust = np.full_like(self._start, _OWN)
        self._trust[0, :PERSONAL] = _SHARED
        self._values = self._start.copy()  # (R, F)
        size = self._start.size
        self._curvature: NDArray[np.float64] = np.zeros((size, size))
        self._pull: NDArray[np.float64] = np.zeros(size)

    def weights(self) -> NDArray[np.float32]:
        """(G, F)."""
        return np.asarray(_ROWS @ self._values, np.float32)

    def restore(self, weights: NDArray[np.float32]) -> None:
        """Goes on from the weights (G, F) of a saved model."""
        self._start = np.linalg.pinv(_ROWS) @ weights
        self._trust[:], self._values = _RESTORED, self._start.copy()

    def learn(
        self,
        parts: NDArray[np.float32],
        targets: NDArray[np.int64],
        excluded: NDArray[np.bool_],
        situations: NDArray[np.int64],
        stands_for: int = 1,
    ) -> NDArray[np.float64]:
        """One step on the softmax over each event's candidates; losses (n <= B,) of those that count.

        Of a stream of which every k-th event is given, each stands for k: it counts as many, and as many are forgotten.

        The candidates are the best of each part, and an event counts only if its target is one of them: adding
        the target would teach that whatever lifts an item into the best speaks against it. They do not depend on
        the weights: among the best of the weighted sum, a wrong sign of popularity confirmed itself on
        online-retail (its popular items were then never candidates).
        parts (F, B, C), targets (B,) columns, excluded (B, C) bool, situations (B,).
        """
        excluded = excluded.copy()
        excluded[np.arange(len(targets)), targets] = False
        best, barred = self._best(parts, excluded)  # (B, K)
        counts = ((best == targets[:, None]) & ~barred).any(axis=1)
        if not counts.any():
            return np.zeros(0)
        best, barred, targets, rows = best[counts], barred[counts], targets[counts], _ROWS[situations[counts]]
        chosen = np.stack([np.take_along_axis(part[counts], best, 1) for part in parts], axis=2)  # (B, K, F)
        own = parts[:, counts][:, np.arange(len(targets)), targets].T  # (B, F)
        weights = rows @ self._values
        logits = np.where(barred, -np.inf, np.einsum("bkf,bf->bk", chosen, weights))
        peak = logits.max(axis=1, keepdims=True)
        odds = np.exp(logits - peak)
        share = odds / odds.sum(axis=1, keepdims=True)  # (B, K)
        mean = np.einsum("bk,bkf->bf", share, chosen)
        spread = np.einsum("bk,bkf,bkg->bfg", share, chosen, chosen, optimize=True) - mean[:, :, None] * mean[:, None]
        self._fold(rows, spread, np.einsum("bfg,bg->bf", spread, weights) + own - mean, stands_for)
        return np.asarray(peak[:, 0] + np.log(odds.sum(axis=1)) - (own * weights).sum(axis=1))

    def _best(
        self, parts: NDArray[np.float32], excluded: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Columns (B, K) of the best of each part, and which of them are excluded or stand there twice.

        Of the parts that are the same for everyone twice as many are taken, since they are ranked once a batch.
        """
        batch, count = excluded.shape
        kept, common = min(self._candidates, count), min(2 * self._candidates, count)
        own = [np.where(excluded, np.inf, -part) for part in parts[:PERSONAL]]
        found = [np.argpartition(score, kept - 1, axis=1)[:, :kept] for score in own]
        for part in parts[PERSONAL:, 0]:
            top = np.argpartition(-part, common - 1)[:common]
            found.append(np.broadcast_to(top, (batch, common)))
        best = np.sort(np.concatenate(found, axis=1), axis=1)
        twice = np.pad(best[:, 1:] == best[:, :-1], ((0, 0), (1, 0)))
        return best, twice | np.take_along_axis(excluded, best, 1)

    def _fold(
        self, rows: NDArray[np.float64], spread: NDArray[np.float64], pull: NDArray[np.float64], stands_for: int
    ) -> None:
        """Adds the events' curvature (B, F, F) and pull (B, F) to what rows (B, R) of the weights know."""
        kept, size = float(np.exp(-self._decay * stands_for * len(rows))), self._start.size
        added = np.einsum("br,bs,bfg->rfsg", rows, rows, spread, optimize=True).reshape(size, size)
        self._curvature = kept * self._curvature + stands_for * added
        self._pull = kept * self._pull + stands_for * np.einsum("br,bf->rf", rows, pull).ravel()
        trust = self._trust.ravel()
        solved = np.linalg.solve(self._curvature + np.diag(trust), self._pull + trust * self._start.ravel())
        self._values = np.asarray(solved.reshape(self._start.shape), np.float64)
