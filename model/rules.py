"""How a list is chosen among candidates: diversity, exploration, and the chance of each candidate to be in it.

M candidates, best first, known by their number 0..M-1; k places; d dimensions.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlog1py, xlogy

Rows = NDArray[np.int64]
Doubles = NDArray[np.float64]


def diversify(scores: NDArray[np.floating], vectors: NDArray[np.floating], diversity: float, k: int) -> Rows:
    """(M,) candidates, the first k by maximal marginal relevance, the rest as they were.

    The next one has the most of (1 - diversity) * score - diversity * its likeness to the most alike so far
    (Carbonell and Goldstein 1998, lambda = 1 - diversity), scores (M,) scaled to 0..1 and likeness the cosine of
    vectors (M, d) of length 1. 0 leaves the order as it is.

    >>> diversify(np.array([3.0, 2.9, 1.0]), np.array([[1.0, 0], [1, 0], [0, 1]]), 0.6, 2).tolist()
    [0, 2, 1]
    """
    if diversity == 0 or len(scores) < 3:
        return np.arange(len(scores))
    relevance = (1 - diversity) * (scores - scores.min()) / max(float(np.ptp(scores)), 1e-12)
    alike = diversity * (vectors @ vectors.T)  # (M, M)
    closest = np.zeros(len(scores))
    order: list[int] = []
    left = np.ones(len(scores), bool)
    for _ in range(min(k, len(scores))):
        pick = int(np.argmax(np.where(left, relevance - closest, -np.inf)))
        closest = np.maximum(closest, alike[pick]) if order else alike[pick]
        order.append(pick)
        left[pick] = False
    return np.concatenate([np.array(order, np.int64), np.flatnonzero(left)])


def explore(order: Rows, k: int, share: float, draw: np.random.Generator) -> Rows:
    """The list (k,) after exploration of candidates in their order (M,).

    Each place is given up with chance `share`. The places given up are filled, each item equally likely, from the
    items that stood there and those behind the list: every candidate can come, and `chances` says how likely.
    """
    k = min(k, len(order))
    given_up = draw.random(k) < share
    pool = np.concatenate([order[:k][given_up], order[k:]])
    chosen = order[:k].copy()
    chosen[given_up] = draw.choice(pool, int(given_up.sum()), replace=False)
    return chosen


def chances(order: Rows, k: int, share: float) -> Doubles:
    """(M,) the exact chance of each candidate, by its number, to be in the list of `explore`; their sum is k."""
    head, tail = _chances(min(k, len(order)), len(order), share)
    found = np.empty(len(order))
    found[order[:k]], found[order[k:]] = head, tail
    return found


@lru_cache(maxsize=1024)
def _chances(k: int, size: int, share: float) -> tuple[float, float]:
    """Of an item of the first k, and of one behind them: m places of k are given up, m of m + size - k are drawn."""

    def binomial(count: int) -> Doubles:
        m = np.arange(count + 1)
        ways = gammaln(count + 1) - gammaln(m + 1) - gammaln(count - m + 1)
        return np.exp(ways + xlogy(m, share) + xlog1py(count - m, -share))

    behind, others = size - k, np.arange(k)  # `others`: places given up beside the item's own
    head = min(1.0, 1 - share + share * float(binomial(k - 1) @ ((1 + others) / (1 + others + behind))))
    m = np.arange(1, k + 1)
    tail = float(binomial(k)[1:] @ (m / (m + behind)))
    return head, tail
