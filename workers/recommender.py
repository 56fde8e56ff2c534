"""Lists for the users that clicks have touched, and the live test of the lists that they had before.

Folded micro-batches -> Snapshot.recommend -> Recommended; a new generation that does worse than the one before -> lost
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import NamedTuple

from model.sampling import History
from model.user_state import UserState
from stream.events import Artifact, Click, Ranked
from workers.arms import arm_of, query_of
from workers.live import Live, NotReady
from workers.prequential import K, LiveScore, Trial, hide_trial
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
    """What a user's list was to be made from just before a click, and that list where it has been sent."""

    query: Query
    sent: Sent | None


class Folded(NamedTuple):
    """Micro-batches of a partition in its states; lists are owed to the users of `newest`."""

    states: Mapping[str, UserState]  # of every touched user, new versions
    changed: list[str]  # users whose state moved: redelivered clicks leave it as it was
    newest: dict[str, Read]  # of every user with a click
    liked: list[tuple[Click, Before | None]]  # new clicks of positive weight; None: not to be scored
    kafka_ms: list[int]  # of every click
    at_ms: int

    @property
    def num_scored(self) -> int:
        return sum(before is not None for _, before in self.liked)

    def and_then(self, later: "Folded", erased: Collection[str], states: Mapping[str, UserState]) -> "Folded":
        """With the next micro-batch, in which `erased` were forgotten. `states`: packed, a tenth of the memory.

        Takes it in in place: with copies a backlog of n micro-batches would cost n times as much.
        """
        if erased:
            self.liked[:] = [one for one in self.liked if one[0].user_id not in erased]
        for user_id in erased:
            self.newest.pop(user_id, None)
        self.newest.update(later.newest)
        self.liked.extend(later.liked)
        self.kafka_ms.extend(later.kafka_ms)
        return self._replace(states=states, changed=[], at_ms=later.at_ms)

    def parts(self, most: int) -> Iterator["Folded"]:
        """Of at most so many users; what is scored goes with the first."""
        users = list(self.newest)
        for at in range(0, len(users), most):
            newest = {user_id: self.newest[user_id] for user_id in users[at : at + most]}
            yield self._replace(newest=newest, liked=[] if at else self.liked)


NOTHING = Folded({}, [], {}, [], [], 0)


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
        self._trial: Trial | None = None
        self.lost: tuple[Artifact, Trial] | None = None  # the generation to go back to, and why

    def recommend(self, together: Sequence[Folded]) -> list[Recommended]:
        """Of micro-batches of several partitions, scored clicks and touched users, in one embedding pass and search."""
        settings, liked = self._settings, [one for folded in together for one in folded.liked]
        touched = [
            (folded.states[user_id], read.click) for folded in together for user_id, read in folded.newest.items()
        ]
        after = [query_of(settings, click, state.history, state.seen, sent=True) for state, click in touched]
        previous = self._live.previous
        before = [before for _, before in liked if before is not None]
        try:
            ranked = partial(self._ranked, before, after, previous is not None)
            snapshot, (served, histories, lists) = self._live.use(ranked)
        except NotReady:
            return [Recommended("", {}, {}, set())] * len(together)
        self._test(liked, served)
        self._try(snapshot, previous, liked, served)
        k = settings.worker.k
        fresh = iter(snapshot.explain(after, histories, [ranked[:k] for ranked in lists], settings.worker.explained))
        sent = (Sent(snapshot.name, snapshot.renewals, top(ranked)) for ranked in lists)
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
        self, before: Sequence[Before], after: Sequence[Query], on_trial: bool, snapshot: Snapshot
    ) -> tuple[list[Top], list[History], list[list[Ranked]]]:
        """What stood before the scored clicks, searched for only where no list of this generation was sent; histories
        and new lists.

        A user's next click is nearly always scored in the list sent after the one before: that halves the searches.
        """
        known = [_known(one, snapshot, on_trial) for one in before]
        queries = [*(one.query for one, item_ids in zip(before, known, strict=True) if item_ids is None), *after]
        histories = snapshot.histories(queries)
        lists = iter(snapshot.ranked(queries, histories, max(self._settings.worker.k, K)))
        served = [top(next(lists)) if item_ids is None else item_ids for item_ids in known]
        return served, histories[len(queries) - len(after) :], list(lists)

    def _test(self, liked: Sequence[tuple[Click, Before | None]], served: Sequence[Top]) -> None:
        lists = iter(served)
        for click, before in liked:
            if before is not None:
                arm = arm_of(self._settings, click.user_id)
                self._score.add(click.item_id, before.query.seen, next(lists), arm)
            self._score.popularity.learn(click.item_id)

    def _try(
        self,
        serving: Snapshot,
        previous: Snapshot | None,
        liked: Sequence[tuple[Click, Before | None]],
        served: Sequence[Top],
    ) -> None:
        """After a swap: the same clicks by the generation before, until the trial is over or the new one has lost."""
        if previous is None:
            self._trial = None
            hide_trial()
            return
        if not served:
            return
        asked = [(click.item_id, before.query) for click, before in liked if before is not None]
        try:
            old_lists = previous.recommend([query for _, query in asked], max(self._settings.worker.k, K))
        except SearchProcessDied:
            return  # released, or replaced by the next swap
        if self._trial is None or (self._trial.serving, self._trial.previous) != (serving.name, previous.name):
            self._trial = Trial(serving.name, previous.name)
        for (item_id, _), new, old in zip(asked, served, old_lists, strict=True):
            self._trial.add(item_id, new, top(old))
        if self._trial.worse:
            self.lost = previous.announced, self._trial
        if self._trial.worse or self._trial.over:
            self._live.release_previous()


def _known(before: Before, snapshot: Snapshot, on_trial: bool) -> Top | None:
    """The list, where it need not be searched for. On trial that of other items does not do: the generation before is
    asked over the items of now, and would win the clicks on what has come since."""
    if stranger(before.query):
        return snapshot.strangers
    sent = before.sent
    if sent is None or sent.generation != snapshot.name or (on_trial and sent.renewals != snapshot.renewals):
        return None
    return sent.item_ids
