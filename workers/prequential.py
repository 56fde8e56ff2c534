"""The live test: each click is ranked before it is folded, in what would have been served just then."""

import math
from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import compress

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
FORGOTTEN = 2.0**-20  # of a click; dropped every 20 half-lives: some 400,000 items are kept at most


class DecayedPopularity:
    """Counts that halve every HALF_LIFE_EVENTS clicks: the baseline beside the served lists."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}  # digest of an item id -> place in _scores
        self._scores = np.zeros(1024)
        self._weight = 1.0  # of the next click; grows, where all others would have to shrink

    def place(self, item_id: str, seen: bytes) -> int | None:
        """Place from 0 of the item among those the user has not seen (packed digests); ties count against it.

        None: nobody has clicked on it yet, or not for so long that it is forgotten.
        """
        row = self._rows.get(digest(item_id))
        if row is None:
            return None
        above = np.count_nonzero(self._scores >= self._scores[row]) - 1
        seen_rows = [self._rows[key] for key in split(seen) if key in self._rows]
        return int(above - np.count_nonzero(self._scores[seen_rows] >= self._scores[row]))

    def learn(self, item_id: str) -> None:
        row = self._rows.setdefault(digest(item_id), len(self._rows))
        if row == len(self._scores):
            self._scores = np.concatenate([self._scores, np.zeros(row)])
        self._scores[row] += self._weight
        self._weight *= 2 ** (1 / HALF_LIFE_EVENTS)
        if self._weight > 1 / FORGOTTEN:
            self._rescale()

    def _rescale(self) -> None:
        """Without it the weight would overflow, and an id clicked once would be compared for ever."""
        scores = self._scores[: len(self._rows)] / self._weight
        kept = scores >= FORGOTTEN
        self._rows = {key: row for row, key in enumerate(compress(self._rows, kept))}
        self._scores, self._weight = scores[kept], 1.0


class Recent:
    """Hits and gains (NDCG of one relevant item) of the last WINDOW scored clicks in one ranking."""

    def __init__(self) -> None:
        self._gains: deque[float] = deque()
        self._hits, self._sum = 0, 0.0  # running: adding up 5,000 a click would cost 0.3 ms

    def add(self, place: int | None) -> bool:
        """Whether it is a hit. place: from 0, of the clicked item; None where the ranking does not hold it."""
        gain = 1 / math.log2(place + 2) if place is not None and place < K else 0.0
        old = self._gains.popleft() if len(self._gains) == WINDOW else 0.0
        self._gains.append(gain)
        self._hits += (gain > 0) - (old > 0)
        self._sum += gain - old
        return gain > 0

    @property
    def hit_rate(self) -> float:
        return self._hits / len(self._gains)

    @property
    def ndcg(self) -> float:
        return self._sum / len(self._gains)


class Ranking(Recent):
    """One that has gauges."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def add(self, place: int | None) -> bool:
        hit = super().add(place)
        metrics.hit_rate.labels(self._name).set(self.hit_rate)
        metrics.live_ndcg.labels(self._name).set(self.ndcg)
        return hit


def _place(item_id: str, ranked: Sequence[str]) -> int | None:
    return ranked.index(item_id) if item_id in ranked else None


class LiveScore:
    """HR@K and NDCG@K of what was served and of decayed popularity, on the same clicks; hits by arm."""

    def __init__(self) -> None:
        self.popularity = DecayedPopularity()
        self._served, self._popular = Ranking("served"), Ranking("popularity")
        self._arms: dict[str, Recent] = defaultdict(Recent)

    def add(self, item_id: str, seen: bytes, served: Sequence[str], arm: str = DEFAULT_ARM) -> None:
        """Score one click on an item that its user had not seen; `served` is the list as it would have been."""
        place = _place(item_id, served)
        metrics.scored_clicks.inc()
        metrics.hits.labels("served").inc(self._served.add(place))
        metrics.hits.labels("popularity").inc(self._popular.add(self.popularity.place(item_id, seen)))
        own = self._arms[arm]
        metrics.arm_clicks.labels(arm, "hit" if own.add(place) else "miss").inc()
        metrics.arm_hit_rate.labels(arm).set(own.hit_rate)


TRIAL = ("trial", "previous")  # rankings: the generation that serves and the one before it


def hide_trial() -> None:
    """Its gauges would stand still."""
    for ranking in TRIAL:
        metrics.hit_rate.remove(ranking)
        metrics.live_ndcg.remove(ranking)


class Trial:
    """The generation that serves against the one before it, on the same clicks, from the swap on.

    Only clicks that one hit and the other missed tell them apart (McNemar's test): with b of them for the old one and
    c for the new one, (b - c) / sqrt(b + c) is about standard normal while they are equally good.
    """

    def __init__(self, serving: str, previous: str) -> None:
        self.serving, self.previous = serving, previous
        self.clicks = self.only_serving = self.only_previous = 0
        self._new, self._old = map(Ranking, TRIAL)

    def add(self, item_id: str, served: Sequence[str], before: Sequence[str]) -> None:
        """One click on an item that its user had not seen, with the list of either generation."""
        new, old = self._new.add(_place(item_id, served)), self._old.add(_place(item_id, before))
        self.clicks += 1
        self.only_serving += new and not old
        self.only_previous += old and not new

    @property
    def over(self) -> bool:
        return self.clicks >= TRIAL_CLICKS

    @property
    def worse(self) -> bool:
        """Whether the new generation has done so much worse that the old one should serve."""
        apart = self.only_serving + self.only_previous
        return self.clicks >= TRIAL_MIN and self.only_previous - self.only_serving > WORSE_Z * apart**0.5
