"""One click's way: decode, fold, recommend, send, and only when all of it is in Kafka acknowledge.

upwell.clicks -> decode_click -> Fold.apply -> Snapshot.recommend -> upwell.users, upwell.recommendations
                      bad -> upwell.dead-letters
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import structlog

from model.user_state import DIGEST_BYTES, EMPTY, Applied, Entry, Fold, Limits, encode_state
from stream.events import Artifact, BadEvent, Click, DeadLetter, Ranked, Recommendations, decode_click, encode
from workers import metrics
from workers.live import Live, NotReady
from workers.prequential import K, LiveScore, Trial
from workers.search import SearchProcessDied
from workers.sender import BatchSender
from workers.settings import Settings
from workers.snapshot import Query, Snapshot
from workers.state_writer import Acknowledge
from workers.states import Owned, OwnedStates, States

log = structlog.get_logger()

RATIO_WINDOW = 1000  # messages over which the share of bad ones is taken
RATIO_MIN = 100
MAX_DEAD_PAYLOAD = 512 * 1024  # base64 and the other fields must fit one record


class TooManyBadEvents(RuntimeError):
    """More messages are bad than `worker.dead_letter_ratio` allows: a producer or this release is broken."""


class Read(NamedTuple):
    """A decoded click and the record it came in."""

    click: Click
    offset: int
    kafka_ms: int


class Before(NamedTuple):
    """An applied click and, where it is to be scored, its user just before it."""

    click: Click
    history: Sequence[Entry] | None
    num_seen: int


class Folded(NamedTuple):
    states: States  # of every touched user, new versions
    changed: list[str]  # users whose state moved: redelivered clicks leave it as it was
    newest: dict[str, Read]
    applied: list[Before]


class UserWorker:
    """The work of one fetched partition batch; `workers/worker_process.py` hands on Faust's events in their order."""

    def __init__(self, settings: Settings, live: Live, owned: OwnedStates, sender: BatchSender) -> None:
        self._settings, self._live, self._owned, self._sender = settings, live, owned, sender
        self._topics = settings.topics
        self._limits = Limits(settings.worker.history, settings.worker.event_ids)
        self._score = LiveScore()
        self._trial: Trial | None = None
        self._lost: Artifact | None = None  # the generation to go back to
        self._bad: deque[bool] = deque(maxlen=RATIO_WINDOW)

    async def process(self, partition: int, records: Sequence[Any], acknowledge: Acknowledge) -> None:
        """Lists and dead letters are in Kafka when this returns; `acknowledge` is called when the states are too.

        Raises TooManyBadEvents after the dead letters are sent.
        """
        owned = await self._owned.of(partition)
        for at in range(0, len(records), self._settings.worker.batch_clicks):
            await self._micro_batch(partition, records[at : at + self._settings.worker.batch_clicks], owned)
        await owned.writer.put({}, acknowledge)

    async def _micro_batch(self, partition: int, records: Sequence[Any], owned: Owned) -> None:
        metrics.batch_clicks.observe(len(records))
        began = time.perf_counter()
        reads, dead = self._decode(records)
        folded = self._fold(owned.states, reads)
        owned.states.update(folded.states)
        await owned.writer.put({u.encode(): encode_state(folded.states[u]) for u in folded.changed})
        folded_at = time.perf_counter()
        generation, lists = await asyncio.to_thread(self._recommend, folded)
        recommended_at = time.perf_counter()
        await self._send(partition, folded, generation, lists, dead)
        await self._go_back()
        sent_ms = time.time() * 1000
        for read in reads:
            metrics.click_to_recommendation_s.observe(max(0.0, sent_ms - read.kafka_ms) / 1000)
        metrics.hop_s.labels("fold").observe(folded_at - began)
        metrics.hop_s.labels("recommend").observe(recommended_at - folded_at)
        metrics.hop_s.labels("send").observe(time.perf_counter() - recommended_at)
        self._check_ratio(len(reads), len(dead))

    def _decode(self, records: Sequence[Any]) -> tuple[list[Read], list[DeadLetter]]:
        reads, dead = [], []
        for record in records:
            try:
                click = decode_click(record.value, record.timestamp)
                if record.key != click.user_id.encode():
                    raise BadEvent(f"key: {record.key!r} is not the user id: this user's order would be lost")
                reads.append(Read(click, record.offset, record.timestamp))
            except BadEvent as error:
                dead.append(dead_letter(record, str(error)))
        return reads, dead

    def _fold(self, states: States, reads: Sequence[Read]) -> Folded:
        folds: dict[str, Fold] = {}
        newest: dict[str, Read] = {}
        applied: list[Before] = []
        to_score, num_duplicate = self._settings.worker.scored_clicks, 0
        for read in reads:
            user_id, click = read.click.user_id, read.click
            fold = folds.setdefault(user_id, Fold(states.get(user_id, EMPTY), self._limits))
            weighed = Applied(click, self._settings.weight(click), read.offset)
            new = fold.is_new(weighed)
            if new:
                scored = to_score > 0 and not fold.has_seen(click.item_id)
                to_score -= scored
                applied.append(Before(click, tuple(fold.history) if scored else None, fold.num_seen))
            num_duplicate += not new
            fold.apply(weighed)
            newest[user_id] = read
        metrics.clicks.labels("applied").inc(len(applied))  # once a micro-batch: 2 us a click otherwise
        metrics.clicks.labels("duplicate").inc(num_duplicate)
        after = {user_id: fold.state() for user_id, fold in folds.items()}
        changed = [user_id for user_id, state in after.items() if state is not folds[user_id].before]
        return Folded(after, changed, newest, applied)

    def _recommend(self, folded: Folded) -> tuple[str, dict[str, list[Ranked]]]:
        """Scored clicks and touched users in one embedding pass and one search -> generation, list a user."""
        before = [
            Query(b.history, folded.states[b.click.user_id].seen[: b.num_seen * DIGEST_BYTES], b.click.ts_ms)
            for b in folded.applied
            if b.history is not None
        ]
        after = [
            Query(state.history, state.seen, folded.newest[user_id].click.ts_ms)
            for user_id, state in folded.states.items()
        ]
        k = self._settings.worker.k
        try:
            snapshot, lists = self._live.recommend(before + after, max(k, K))
        except NotReady:
            return "", {}
        self._test(folded.applied, before, lists)
        self._try(snapshot, before, folded.applied, lists)
        fresh = lists[len(before) :]
        return snapshot.name, {u: ranked[:k] for u, ranked in zip(folded.states, fresh, strict=True)}

    def _test(self, applied: Sequence[Before], before: Sequence[Query], lists: Sequence[list[Ranked]]) -> None:
        answers = iter(zip(before, lists, strict=False))
        for click, history, _ in applied:
            if history is not None:
                query, ranked = next(answers)
                self._score.add(click.item_id, query.seen, [place.item_id for place in ranked])
            self._score.popularity.learn(click.item_id)

    def _try(
        self, serving: Snapshot, before: Sequence[Query], applied: Sequence[Before], lists: Sequence[list[Ranked]]
    ) -> None:
        """After a swap: the same clicks by the generation before, until the trial is over or the new one has lost."""
        previous = self._live.previous
        if previous is None or not before:
            return
        if self._trial is None or (self._trial.serving, self._trial.previous) != (serving.name, previous.name):
            self._trial = Trial(serving.name, previous.name)
        try:
            old_lists = previous.recommend(before, K)
        except SearchProcessDied:
            return  # released, or replaced by the next swap
        scored = [item.click.item_id for item in applied if item.history is not None]
        for item_id, new, old in zip(scored, lists, old_lists, strict=False):
            self._trial.add(item_id, [place.item_id for place in new], [place.item_id for place in old])
        if self._trial.worse:
            self._lost = previous.announced
        if self._trial.worse or self._trial.over:
            self._live.release_previous()

    async def _send(
        self,
        partition: int,
        folded: Folded,
        generation: str,
        lists: dict[str, list[Ranked]],
        dead: list[DeadLetter],
    ) -> None:
        """Lists and dead letters together."""
        topics, now_ms = self._topics, time.time_ns() // 1_000_000
        answers = [
            (u.encode(), encode(_answer(u, folded, partition, generation, ranked, now_ms)))
            for u, ranked in lists.items()
        ]
        letters = [(letter.key, encode(letter)) for letter in dead]
        await asyncio.gather(
            self._sender.send(topics.recommendations.name, partition, answers),
            self._sender.send(topics.dead_letters.name, 0, letters),
        )

    async def _go_back(self) -> None:
        """Announce the generation before again where the new one has lost its trial: it is the newest then."""
        if self._lost is not None:
            back, self._lost = self._lost, None
            metrics.rollbacks.inc()
            log.warning("rolled back", to=back.name, trial=vars(self._trial))
            record = (back.name.encode(), encode(back))
            await self._sender.send(self._topics.generations.name, 0, [record])

    def _check_ratio(self, good: int, bad: int) -> None:
        metrics.clicks.labels("bad").inc(bad)
        self._bad.extend([False] * good + [True] * bad)
        ratio, limit = sum(self._bad) / max(1, len(self._bad)), self._settings.worker.dead_letter_ratio
        if len(self._bad) >= RATIO_MIN and ratio > limit:
            raise TooManyBadEvents(
                f"{ratio:.0%} of the last {len(self._bad)} messages are bad, worker.dead_letter_ratio is {limit:.0%}"
            )


def dead_letter(record: Any, cause: str) -> DeadLetter:
    """A consumed record as a dead letter; of an oversized payload the first part is kept."""
    return DeadLetter(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        cause=cause,
        key=record.key,
        payload=None if record.value is None else record.value[:MAX_DEAD_PAYLOAD],
        truncated=record.value is not None and len(record.value) > MAX_DEAD_PAYLOAD,
        ts_ms=record.timestamp,
    )


def _answer(
    user_id: str, folded: Folded, partition: int, generation: str, ranked: list[Ranked], now_ms: int
) -> Recommendations:
    read, state = folded.newest[user_id], folded.states[user_id]
    return Recommendations(
        user_id=user_id,
        items=ranked,
        generation=generation,
        source="personal" if state.history else "popular",
        partition=partition,
        offset=state.offset,
        event_id=read.click.event_id,
        clicked_ms=read.kafka_ms,
        sent_ms=now_ms,
    )
