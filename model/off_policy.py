"""What other policies would have earned, from the lists that an exploring one has shown.

n scored clicks, each with the list that its user had before it. A hit is a click on an item of the list. Everything
here takes a click to depend on the item being shown, not on what stood beside it.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.outcome import bootstrap

Doubles = NDArray[np.float64]


class Estimate(NamedTuple):
    """A hit rate and its 95 % interval over users (bootstrap: a user's clicks are no independent trials)."""

    value: float
    low: float
    high: float


def hit_rate(hits: Doubles, users: NDArray[np.int64]) -> Estimate:
    """Of the policy that showed the lists: hits (n,) 0 or 1, users (n,) a number a user; at least one."""
    return _ratio(hits, np.ones(len(hits)), users)


def ips(hits: Doubles, ratios: Doubles, users: NDArray[np.int64]) -> Estimate:
    """Inverse propensity scoring: each hit counts as often as the other policy would have shown the item.

    ratios (n,): chance of the clicked item in the other policy's list, over its chance in this one; any number where
    there is no hit. Unbiased where this policy may show whatever the other one shows (Horvitz and Thompson 1952).
    """
    return _ratio(hits * ratios, np.ones(len(hits)), users)


def snips(hits: Doubles, ratios: Doubles, sizes: Doubles, users: NDArray[np.int64]) -> Estimate:
    """The same, divided by what the ratios average to (Swaminathan and Joachims 2015, equation 11), which is 1 in the
    long run: a little bias for much less variance. sizes (n,): mean ratio of the items of each list."""
    return _ratio(hits * ratios, sizes, users)


def _ratio(over: Doubles, under: Doubles, users: NDArray[np.int64]) -> Estimate:
    total = float(under.sum())
    return Estimate(float(over.sum()) / total if total else 0.0, *bootstrap(over, users, under=under))
