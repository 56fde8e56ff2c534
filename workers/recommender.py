"""Lists for the users that clicks have touched, and the live test of the lists that they had before.

Folded micro-batches -> Snapshot.recommend -> Recommended; a new generation that does worse than the one before -> lost
"""

from collections.abc import Sequence
from functools import partial
from itertools import compress
from typing import NamedTuple

from model.sampling import History
from model.user_state import Entry, UserState
from stream.events import Artifact, Click, Ranked
from workers.arms import arm_of, query_of
from workers.live import Live, NotReady
from workers.prequential import K, LiveScore, Trial
from workers.search import SearchProcessDied
from workers.settings import Settings
from workers.snapshot import PLAIN, Query, Snapshot
from workers.states import Sent


class Read(NamedTuple):
    """A decoded click and the record it came in."""

    click: Click
    offset: int
    kafka_ms: int


class Before(NamedTuple):
    """An applied click and, where it is to be scored, its user just before it."""

    click: Click
    history: Sequence[Entry] | None
    seen: bytes  # packed digests of the user's items, where it is to be scored
    sent: Sent | None  # the list of that moment, where it is known


class Folded(NamedTuple):
    states: dict[str, UserState]  # of every touched user, new versions
    changed: list[str]  # users whose state moved: redelivered clicks leave it as it was
    newest: dict[str, Read]  # of every user with a click
    applied: list[Before]
    at_ms: int


class Recommended(NamedTuple):
    generation: str
    lists: dict[str, list[Ranked]]  # of every touched user; none before the first generation serves
    sent: dict[str, Sent]  # their best, for the live test
    known: set[str]  # users of whose clicks the generation knows at least one


Top = tuple[str, ...]  # the first K item ids of a list


def top(ranked: Sequence[Ranked]) -> Top:
    return tuple(place.item_id for place in ranked[:K])


def stranger(query: Query) -> bool:
    """Whether all who ask so get the same list."""
    return not query.history and query.rules == PLAIN


class Recommender:
    """`recommend` is called by one thread at a time."""

    def __init__(self, settings: Settings, live: Live) -> None:
        self._settings, self._live = settings, live
        self._score = LiveScore()
        self._strangers: Sent | None = None
        self.trial: Trial | None = None
        self.lost: Artifact | None = None  # the generation to go back to

    def recommend(self, together: Sequence[Folded]) -> list[Recommended]:
        """Of micro-batches of several partitions, scored clicks and touched users, in one embedding pass and search."""
        settings, applied = self._settings, [before for folded in together for before in folded.applied]
        scored = [
            (query_of(settings, b.click, b.history, b.seen, sent=False), b.sent)
            for folded in together
            for b in folded.applied
            if b.history is not None
        ]
        touched = [
            (folded.states[user_id], read.click) for folded in together for user_id, read in folded.newest.items()
        ]
        after = [query_of(settings, click, state.history, state.seen, sent=True) for state, click in touched]
        try:
            snapshot, (served, histories, lists) = self._live.use(partial(self._ranked, scored, after))
        except NotReady:
            return [Recommended("", {}, {}, set())] * len(together)
        before = [query for query, _ in scored]
        self._test(applied, before, served)
        self._try(snapshot, before, applied, served)
        k = settings.worker.k
        fresh = iter(snapshot.explain(after, histories, [ranked[:k] for ranked in lists], settings.worker.explained))
        sent = (Sent(snapshot.name, top(ranked)) for ranked in lists)
        known = (len(history.rows) > 0 for history in histories)
        return [
            Recommended(
                snapshot.name,
                dict(zip(folded.newest, fresh, strict=False)),
                dict(zip(folded.newest, sent, strict=False)),
                set(compress(folded.newest, known)),
            )
            for folded in together
        ]

    def _ranked(
        self, scored: Sequence[tuple[Query, Sent | None]], after: Sequence[Query], snapshot: Snapshot
    ) -> tuple[list[Top], list[History], list[list[Ranked]]]:
        """What stood before the scored clicks, searched for only where no list of this generation was sent; histories
        and new lists.

        A user's next click is nearly always scored in the list sent after the one before: that halves the searches.
        """
        known = [self._known(query, sent, snapshot) for query, sent in scored]
        unknown = [query for (query, _), item_ids in zip(scored, known, strict=True) if item_ids is None]
        queries = [*unknown, *after]
        histories = snapshot.histories(queries)
        lists = iter(snapshot.ranked(queries, histories, max(self._settings.worker.k, K)))
        before = [top(next(lists)) if item_ids is None else item_ids for item_ids in known]
        for (query, _), item_ids in zip(scored, before, strict=True):
            if stranger(query):
                self._strangers = Sent(snapshot.name, item_ids)
        return before, histories[len(unknown) :], list(lists)

    def _known(self, query: Query, sent: Sent | None, snapshot: Snapshot) -> Top | None:
        if stranger(query):
            sent = self._strangers
        return sent.item_ids if sent and sent.generation == snapshot.name else None

    def _test(self, applied: Sequence[Before], before: Sequence[Query], served: Sequence[Top]) -> None:
        answers = iter(zip(before, served, strict=True))
        for item in applied:
            item_id = item.click.item_id
            if item.history is not None:
                query, item_ids = next(answers)
                self._score.add(item_id, query.seen, item_ids, arm_of(self._settings, item.click.user_id))
            self._score.popularity.learn(item_id)

    def _try(
        self, serving: Snapshot, before: Sequence[Query], applied: Sequence[Before], served: Sequence[Top]
    ) -> None:
        """After a swap: the same clicks by the generation before, until the trial is over or the new one has lost."""
        previous = self._live.previous
        if previous is None or not before:
            return
        if self.trial is None or (self.trial.serving, self.trial.previous) != (serving.name, previous.name):
            self.trial = Trial(serving.name, previous.name)
        try:
            old_lists = previous.recommend(before, max(self._settings.worker.k, K))
        except SearchProcessDied:
            return  # released, or replaced by the next swap
        scored = [item.click.item_id for item in applied if item.history is not None]
        for item_id, new, old in zip(scored, served, old_lists, strict=True):
            self.trial.add(item_id, new, top(old))
        if self.trial.worse:
            self.lost = previous.announced
        if self.trial.worse or self.trial.over:
            self._live.release_previous()
