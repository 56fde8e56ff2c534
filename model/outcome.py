"""What a replay of a stream found, event by event, and the figures made of it.

Legend: n events, B events scored at once, N items.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
Doubles = NDArray[np.float64]
DRAWS = 1000  # of users, for an interval
COLD = 5  # an item with fewer earlier events is cold


@dataclass(frozen=True)
class Ranks:
    """Each predicted event's expected rank among the candidates, from 1; inf when it is not one of them."""

    ranks: Doubles  # (n,) ties count half
    users: Rows  # (n,) a number a user
    position: Rows  # (n,) in the stream
    histories: Rows  # (n,) history lengths

    def metrics(self) -> dict[str, float]:
        """Mean HR@10, HR@20, NDCG@10 (one relevant item: 1 / log2(1 + rank)) and MRR; 0 without events."""
        return {name: float(value.mean()) if len(value) else 0.0 for name, value in self.gains().items()}

    def gains(self) -> dict[str, Doubles]:
        ranks = self.ranks
        hit, discount = ranks <= 10, 1.0 / np.log2(1.0 + np.minimum(ranks, 1e18))
        return {
            "hr@10": hit.astype(np.float64),
            "hr@20": (ranks <= 20).astype(np.float64),
            "ndcg@10": np.where(hit, discount, 0.0),
            "mrr": 1.0 / ranks,
        }

    def where(self, kept: NDArray[np.bool_]) -> Self:
        """Only the events of a mask (n,)."""
        return type(self)(**{field.name: getattr(self, field.name)[kept] for field in fields(self)})

    def after(self, position: int) -> Self:
        """Only the events at or after a position of the stream."""
        return self.where(self.position >= position)


@dataclass(frozen=True)
class Outcome(Ranks):
    """Every positive event. `ranks` are among the items that the user has not consumed, inf for a repeat."""

    open_ranks: Doubles  # (n,) among all items seen so far, consumed ones too
    repeat: NDArray[np.bool_]  # (n,) the user had consumed the item before
    earlier: Rows  # (n,) positive events of the item before this one
    auc: Doubles  # (n,) of a cold item among items as cold as it (none / 1 to 4 events); NaN for the others
    top: Rows  # (n, 10) the rows that would have been shown, -1 where there are fewer candidates

    def new(self) -> Outcome:
        """The events on items that the user had not consumed: what the main figures count."""
        return self.where(~self.repeat)

    def open(self) -> Ranks:
        """All events, repeats too, with consumed items as candidates."""
        return Ranks(self.open_ranks, self.users, self.position, self.histories)


def bootstrap(values: Doubles, users: Rows, under: Doubles | None = None) -> tuple[float, float]:
    """95 % interval of mean(values) over resampled users (Efron 1979); give differences (n,) for a paired comparison.

    Of sum(values) / sum(under) where `under` (n,) is given. (0, 0) without events.
    """
    if not len(users):
        return 0.0, 0.0
    _, user = np.unique(users, return_inverse=True)
    sums, counts = np.bincount(user, values), np.bincount(user, under)  # (U,)
    draw, even = np.random.default_rng(0), np.full(len(sums), 1 / len(sums))
    picks = (draw.multinomial(len(sums), even) for _ in range(DRAWS))  # one by one: users may be a million
    low, high = np.quantile([float(pick @ sums) / max(float(pick @ counts), 1e-12) for pick in picks], [0.025, 0.975])
    return float(low), float(high)


def expected_ranks(scores: NDArray[np.floating], targets: Rows, allowed: NDArray[np.bool_]) -> Doubles:
    """(B,) 1 + candidates above the target + half of those equal to it; inf where it is not allowed."""
    own = scores[np.arange(len(targets)), targets][:, None]  # (B, 1)
    above = ((scores > own) & allowed).sum(axis=1)
    equal = ((scores == own) & allowed).sum(axis=1) - 1
    ranks = 1.0 + above + equal / 2.0
    return np.where(allowed[np.arange(len(targets)), targets], ranks, np.inf)


def best(scores: NDArray[np.floating], allowed: NDArray[np.bool_], k: int = 10) -> Rows:
    """(B, k) rows of the highest allowed scores, in no order; -1 where there are fewer."""
    masked = np.where(allowed, scores, -np.inf)  # (B, N)
    kept = min(k, masked.shape[1])
    rows = np.argpartition(-masked, kept - 1, axis=1)[:, :kept]
    rows = np.where(np.take_along_axis(masked, rows, 1) > -np.inf, rows, -1)
    return np.pad(rows, ((0, 0), (0, k - kept)), constant_values=-1)


def auc(scores: NDArray[np.floating], target: int, rivals: NDArray[np.bool_]) -> float:
    """Share of the rivals (N,), the target left out, below the target's score; ties count half. NaN without any."""
    own, others = scores[target], scores[rivals & (np.arange(len(scores)) != target)]
    return float(((others < own).sum() + (others == own).sum() / 2) / len(others)) if len(others) else float("nan")


def spread(top: Rows, touched: Rows) -> dict[str, float]:
    """Of what was shown, top (n, 10) with -1 for nothing; touched (N,) events of each item in the whole stream.

    coverage: share of the touched items ever shown. gini: of how often each was shown, 0 even, 1 all on one.
    novelty: mean -log2 of the shown items' share of the events, in bits.
    """
    shown = np.bincount(top[top >= 0], minlength=len(touched))[touched > 0].astype(np.float64)
    surprise = -np.log2(touched[touched > 0] / touched.sum())
    times, count = np.sort(shown), len(shown)
    gini = float((2 * np.arange(1, count + 1) - count - 1) @ times / (count * max(times.sum(), 1.0)))
    novelty = float(shown @ surprise / max(shown.sum(), 1.0))
    return {"coverage": float((shown > 0).mean()), "gini": gini, "novelty": novelty}
