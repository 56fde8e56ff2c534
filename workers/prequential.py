"""The live test: each click is ranked before it is folded, in what would have been served just then."""

from collections import defaultdict, deque

import numpy as np

from model.user_state import digest, split
from stream.events import DEFAULT_ARM
from workers import metrics
from workers.settings import SCORED_K

K = SCORED_K
WINDOW = 5000
TRIAL_CLICKS = 2000  # after a swap, scored by both generations
TRIAL_MIN = 200
WORSE_Z = 3.0  # one false alarm in 700 looks, were all looks independent
HALF_LIFE_EVENTS = 10_000  # MODEL.md: the best of 1,000 to 20,000 on MovieLens


class DecayedPopularity:
    """Counts that halve every HALF_LIFE_EVENTS clicks: the baseline beside the served lists."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}  # digest of an item id -> place in _scores
        self._scores = np.zeros(1024)
        self._weight = 1.0  # of the next click; grows, where all others would have to shrink

    def is_hit(self, item_id: str, seen: bytes, k: int = K) -> bool:
        """Would the item stand in the top k of what the user has not seen (packed digests)? Ties count against it."""
        row = self._rows.get(digest(item_id))
        if row is None:
            return False
        above = np.count_nonzero(self._scores >= self._scores[row]) - 1
        seen_rows = [self._rows[key] for key in split(seen) if key in self._rows]
        return bool(above - np.count_nonzero(self._scores[seen_rows] >= self._scores[row]) < k)

    def learn(self, item_id: str) -> None:
        row = self._rows.setdefault(digest(item_id), len(self._rows))
        if row == len(self._scores):
            self._scores = np.concatenate([self._scores, np.zeros(row)])
        self._scores[row] += self._weight
        self._weight *= 2 ** (1 / HALF_LIFE_EVENTS)
        if self._weight > 1e100:
            self._scores /= self._weight
            self._weight = 1.0


class Recent:
    """The share of hits among the last WINDOW."""

    def __init__(self) -> None:
        self._hits: deque[bool] = deque()
        self._sum = 0

    def add(self, hit: bool) -> float:
        self._sum += hit - (self._hits.popleft() if len(self._hits) == WINDOW else False)
        self._hits.append(hit)
        return self._sum / len(self._hits)


class LiveScore:
    """Hits of the last WINDOW scored clicks as gauges, hits and clicks in all as counters; by ranking and by arm."""

    def __init__(self) -> None:
        self.popularity = DecayedPopularity()
        self._rankings: dict[str, Recent] = defaultdict(Recent)
        self._arms: dict[str, Recent] = defaultdict(Recent)

    def add(self, item_id: str, seen: bytes, served: list[str], arm: str = DEFAULT_ARM) -> None:
        """Score one click on an item that its user had not seen; `served` is the top K as it would have been."""
        hit = item_id in served[:K]
        metrics.scored_clicks.inc()
        for ranking, found in (("served", hit), ("popularity", self.popularity.is_hit(item_id, seen))):
            metrics.hits.labels(ranking).inc(found)
            metrics.hit_rate.labels(ranking).set(self._rankings[ranking].add(found))
        metrics.arm_clicks.labels(arm, "hit" if hit else "miss").inc()
        metrics.arm_hit_rate.labels(arm).set(self._arms[arm].add(hit))


class Trial:
    """The generation that serves against the one before it, on the same clicks, from the swap on.

    Only clicks that one hit and the other missed tell them apart (McNemar's test): with b of them for the old one and
    c for the new one, (b - c) / sqrt(b + c) is about standard normal while they are equally good.
    """

    def __init__(self, serving: str, previous: str) -> None:
        self.serving, self.previous = serving, previous
        self.clicks = self.only_serving = self.only_previous = self.previous_hits = 0

    def add(self, item_id: str, served: list[str], before: list[str]) -> None:
        """One click on an item that its user had not seen, with the list of either generation."""
        hit, old = item_id in served[:K], item_id in before[:K]
        self.clicks += 1
        self.previous_hits += old
        self.only_serving += hit and not old
        self.only_previous += old and not hit
        metrics.hit_rate.labels("previous").set(self.previous_hits / self.clicks)

    @property
    def over(self) -> bool:
        return self.clicks >= TRIAL_CLICKS

    @property
    def worse(self) -> bool:
        """Whether the new generation has done so much worse that the old one should serve."""
        apart = self.only_serving + self.only_previous
        return self.clicks >= TRIAL_MIN and self.only_previous - self.only_serving > WORSE_Z * apart**0.5
