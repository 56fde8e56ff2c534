"""One click's way: decode, fold, recommend, send, and only when all of it is in Kafka acknowledge.

upwell.clicks -> decode_record -> Fold.apply -> Snapshot.recommend -> upwell.users, upwell.recommendations
                      bad -> upwell.dead-letters
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import structlog

from model.user_state import EMPTY, Applied, Fold
from stream.events import BadEvent, Click, DeadLetter, Erasure, Recommendations, decode_record, encode
from stream.producer import partition_of
from stream.tracing import Header
from workers import metrics
from workers.arms import arm_of, query_of
from workers.batcher import Batcher
from workers.dead_letters import DeadLetters, dead_letter, place
from workers.live import Live
from workers.recommender import NOTHING, Before, Folded, Read, Recommended, Recommender
from workers.sender import BatchSender, Keyed
from workers.settings import Settings
from workers.state_writer import Acknowledge, Tombstone, state_record
from workers.states import Owned, OwnedStates, limits_of
from workers.tracing import ClickSpans, tracer_of

log = structlog.get_logger()

RATIO_WINDOW = 1000  # messages over which the share of bad ones is taken
RATIO_MIN = 100


class TooManyBadEvents(RuntimeError):
    """More messages are bad than `worker.dead_letter_ratio` allows: a producer or this release is broken."""


class UserWorker:
    """The work of what waits of a partition; `workers/worker_process.py` hands on Faust's events in their order."""

    def __init__(self, settings: Settings, live: Live, owned: OwnedStates, sender: BatchSender) -> None:
        self._settings, self._live, self._owned, self._sender = settings, live, owned, sender
        self._topics = settings.topics
        self._limits = limits_of(settings)
        self._letters = DeadLetters(settings, sender)
        self._recommender = Recommender(settings, live)
        self._lists = Batcher(self._recommender.recommend, "recommend")
        self._bad: deque[bool] = deque(maxlen=RATIO_WINDOW)
        self._spans = ClickSpans(tracer, self._topics.clicks.name) if (tracer := tracer_of(settings)) else None

    async def process(self, partition: int, records: Sequence[Any], acknowledge: Acknowledge) -> None:
        """Lists and dead letters are in Kafka when this returns; `acknowledge` is called when the states are too.

        Everything is folded before the first list is made: a user gets one list, however many clicks have waited.
        Raises TooManyBadEvents after the dead letters are sent.
        """
        owned, most = await self._owned.of(partition), self._settings.worker.batch_clicks
        if records:  # none where only a transaction's marker was fetched: acknowledged in its turn
            metrics.batch_clicks.observe(len(records))
        began, owed, erased = time.perf_counter(), NOTHING, set[str]()
        for at in range(0, len(records), most):
            if at:
                await asyncio.sleep(0)  # a full micro-batch takes 25 ms: the other partitions' turn
            owed = await self._take(partition, records[at : at + most], owned, owed, erased)
        traced = self._spans.traced(records) if self._spans else {}
        folded_at = recommended_at = time.perf_counter()
        answered = True
        for part in owed.parts(most):
            recommended_at, served = await self._recommend(partition, part, owned, traced)
            answered &= served
        await self._go_back()
        sent_ms = time.time() * 1000 if answered else math.inf
        metrics.click_to_recommendation_s.observe_all(np.maximum(sent_ms - np.array(owed.kafka_ms), 0.0) / 1000)
        if self._spans:
            self._spans.end(partition, traced, began, folded_at, recommended_at)
        if erased:
            acknowledge = self._letters.cleared_of(erased, acknowledge, owned.states)
        await owned.writer.put({}, acknowledge)

    async def _take(
        self, partition: int, records: Sequence[Any], owned: Owned, owed: Folded, all_erased: set[str]
    ) -> Folded:
        """A micro-batch into the states; what is owed for it and for those before it."""
        began = time.perf_counter()
        reads, erased, dead = self._decode(records, owned.states)
        folded = self._fold(owned, reads, erased, owed.num_scored)
        owned.states.update(folded.states)
        await owned.writer.put({u.encode(): owned.record(u, folded.states[u]) for u in folded.changed})
        metrics.hop_s.labels("fold").observe(time.perf_counter() - began)
        if dead or erased:
            await self._tell(partition, dead, erased)
        self._check_ratio(records, dead)
        all_erased.update(erased)
        return folded if owed is NOTHING else owed.and_then(folded, erased, owned.states)

    async def _recommend(
        self, partition: int, owed: Folded, owned: Owned, traced: Mapping[int, tuple[Header]]
    ) -> tuple[float, bool]:
        """The lists, made and sent: when they were made, by perf_counter; False where no generation serves."""
        began = time.perf_counter()
        recommended = await self._lists.ask(owed)
        recommended_at = time.perf_counter()
        await self._send(partition, owed, recommended, traced)
        owned.sent.update(recommended.sent)
        metrics.hop_s.labels("recommend").observe(recommended_at - began)
        metrics.hop_s.labels("send").observe(time.perf_counter() - recommended_at)
        return recommended_at, bool(recommended.generation)

    def _decode(
        self, records: Sequence[Any], states: Container[str]
    ) -> tuple[list[Read], dict[str, int], list[DeadLetter]]:
        """Clicks that count, the users that are erased (-> offset of the wish), and what is neither."""
        reads, erased, dead = list[Read](), dict[str, int](), list[DeadLetter]()
        for record in records:
            try:
                event = decode_record(record.value, record.key, record.timestamp)
                if event.user_id not in states:
                    self._check_partition(event.user_id, record.partition)
            except BadEvent as error:
                dead.append(dead_letter(record, str(error)))
                continue
            if isinstance(event, Erasure):
                erased[event.user_id] = record.offset
            else:
                reads.append(Read(event, record.offset, record.timestamp))
        if erased:
            reads = [read for read in reads if read.offset > erased.get(read.click.user_id, -1)]
        return reads, erased, dead

    def _check_partition(self, user_id: str, partition: int) -> None:
        """Of a user without a state here: a client that deals keys otherwise would make one user two. 2 us.

        Raises BadEvent.
        """
        right = partition_of(user_id, self._settings.kafka.partitions)
        if partition != right:
            raise BadEvent(f"key: in partition {partition}, by murmur2 it belongs in {right}: look at the partitioner")

    def _fold(self, owned: Owned, reads: Sequence[Read], erased: Mapping[str, int], num_scored: int = 0) -> Folded:
        states = owned.states
        folds = {user_id: Fold(states.get(user_id, EMPTY), self._limits) for user_id in erased}
        for user_id, offset in erased.items():
            folds[user_id].erase(offset)
            owned.sent.pop(user_id, None)
        newest: dict[str, Read] = {}
        liked: list[tuple[Click, Before | None]] = []
        to_score, num_duplicate = self._settings.worker.scored_clicks - num_scored, 0
        for read in reads:
            user_id, click = read.click.user_id, read.click
            sent = owned.sent.pop(user_id, None)  # for one click: the next one's list is another
            if (fold := folds.get(user_id)) is None:  # to look a state up is to decode it
                fold = folds[user_id] = Fold(states.get(user_id, EMPTY), self._limits)
            weight, before = self._settings.weight(click), None
            if weight > 0 and to_score > 0 and not fold.has_seen(click.item_id):  # what is seen is large: not for all
                before = Before(query_of(self._settings, click, fold.history, fold.seen, sent=False), sent)
            if not fold.apply(Applied(click, weight, read.offset)):
                num_duplicate += 1
            elif weight > 0:  # a dislike is no hit of the list that it stands in
                to_score -= before is not None
                liked.append((click, before))
            newest[user_id] = read
        num_applied = len(reads) - num_duplicate
        metrics.clicks.labels("applied").inc(num_applied)  # once a micro-batch: 2 us a click otherwise
        metrics.clicks.labels("duplicate").inc(num_duplicate)
        after = {user_id: fold.state() for user_id, fold in folds.items()}
        changed = [user_id for user_id, state in after.items() if state is not folds[user_id].before]
        for user_id in [user_id for user_id in newest if after[user_id].erased]:
            del newest[user_id]  # a click from before the wish, delivered again
        at_ms, kafka_ms = time.time_ns() // 1_000_000, [read.kafka_ms for read in reads]
        return Folded(after, changed, newest, liked, kafka_ms, at_ms)

    async def _tell(self, partition: int, dead: Sequence[DeadLetter], erased: Mapping[str, int]) -> None:
        """Dead letters, and a null for each erased user: new lists come after it."""
        nulls = [state_record((u.encode(), Tombstone(offset))) for u, offset in erased.items()]
        await asyncio.gather(
            self._sender.send(self._topics.recommendations.name, partition, nulls),
            self._sender.send(self._topics.dead_letters.name, 0, [(place(one), encode(one)) for one in dead]),
        )

    async def _send(
        self, partition: int, owed: Folded, recommended: Recommended, traced: Mapping[int, tuple[Header]]
    ) -> None:
        now_ms = time.time_ns() // 1_000_000
        answers = {u: encode(self._answer(u, owed, partition, recommended, now_ms)) for u in recommended.lists}
        records: list[Keyed] = [(u.encode(), raw, *traced.get(owed.newest[u].offset, ())) for u, raw in answers.items()]
        await self._sender.send(self._topics.recommendations.name, partition, records)

    def _answer(
        self, user_id: str, owed: Folded, partition: int, recommended: Recommended, now_ms: int
    ) -> Recommendations:
        read, state = owed.newest[user_id], owed.states[user_id]
        return Recommendations(
            user_id=user_id,
            items=recommended.lists[user_id],
            generation=recommended.generation,
            source="personal" if user_id in recommended.known else "popular",
            partition=partition,
            offset=state.offset,
            event_id=read.click.event_id,
            clicked_ms=read.kafka_ms,
            sent_ms=now_ms,
            arm=arm_of(self._settings, user_id),
            updated_ms=owed.at_ms,
        )

    async def _go_back(self) -> None:
        """Announce the generation before again where the new one has lost its trial: it is the newest then.

        Not over one that was announced meanwhile, which would never get its turn; should that turn out to be none that
        can serve, then.
        """
        if (lost := self._recommender.lost) is None:
            return
        (back, trial), serving = lost, self._live.snapshot
        replaced = serving is None or serving.name != trial.serving
        if not replaced and self._live.wanted != trial.serving:
            return
        self._recommender.lost = None
        if replaced:
            return
        metrics.rollbacks.inc()
        apart = {"only_lost": trial.only_serving, "only_back": trial.only_previous}
        log.warning("rolled back", lost=trial.serving, to=back.name, clicks=trial.clicks, **apart)
        await self._sender.send(self._topics.generations.name, 0, [(back.name.encode(), encode(back))])

    def _check_ratio(self, records: Sequence[Any], dead: Sequence[DeadLetter]) -> None:
        metrics.clicks.labels("bad").inc(len(dead))
        bad = {letter.offset for letter in dead}
        self._bad.extend(record.offset in bad for record in records)
        ratio, limit = sum(self._bad) / max(1, len(self._bad)), self._settings.worker.dead_letter_ratio
        if len(self._bad) >= RATIO_MIN and ratio > limit:
            raise TooManyBadEvents(
                f"{ratio:.0%} of the last {len(self._bad)} messages are bad, worker.dead_letter_ratio is {limit:.0%}: "
                "they are in the dead letters, and read again at each start; a start with a ratio of 1 passes them over"
            )
