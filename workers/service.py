"""What the HTTP routes answer from: users' states followed from Kafka, the live generation, a producer."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from functools import lru_cache, partial
from typing import Any, TypeVar

from model.user_state import DIGEST_BYTES, EMPTY, UserState
from stream.answers import Answer, AsOf, Erased, Guest, ItemOut, Past, RankedItem, Reason, Similar, UserOut, Wishes
from stream.events import Ranked, Source
from stream.producer import ClickProducer, DeliveryError
from stream.text import clean
from workers import metrics
from workers.arms import arm_of, rules_of
from workers.erasure import ask, longest_ms
from workers.guests import TextEncoder, session
from workers.live import Live, NotReady
from workers.settings import Settings
from workers.snapshot import Query, Rules, Snapshot
from workers.tracing import tracer_of
from workers.updates import Updates
from workers.user_states import UserStates

T = TypeVar("T")
TEXTS_AT_ONCE = 8  # being encoded, in threads of their own: an encoder that stands still holds up no other request
LISTS_AT_ONCE = 1  # of the server's own to streams: at a swap all want theirs, and a request comes between any two
SENDING_THREADS = 4  # of their own: events that Kafka does not take hold up no request for a list


class Service:
    """What the routes need; one a process."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.pseudonyms = settings, settings.privacy.pseudonyms
        self.live, self.users = Live(settings, device=settings.serve.device), UserStates(settings)
        self.tracer = tracer_of(settings)
        self.updates = Updates(settings, self.live, self.users)
        self.sending = ThreadPoolExecutor(SENDING_THREADS, thread_name_prefix="sending")
        self.asking = ThreadPoolExecutor(1, thread_name_prefix="asking")  # for receipts: each may take a minute
        self.waits = asyncio.Semaphore(max(1, settings.serve.max_requests // 2))  # for states; the others are answered
        self.lists = asyncio.Semaphore(LISTS_AT_ONCE)
        self.texts = asyncio.Semaphore(TEXTS_AT_ONCE)
        self.encoding = ThreadPoolExecutor(TEXTS_AT_ONCE, thread_name_prefix="encoding")
        self._encoder = TextEncoder(settings)
        self._producer: ClickProducer | None = None
        self._opening = threading.Lock()
        self._longest_ms = lru_cache(maxsize=1)(lambda minute: longest_ms(settings))  # asked anew in the next

    async def start(self) -> None:
        self.live.start()
        self.users.start()
        self.updates.start()

    async def stop(self) -> None:
        self.updates.stop()
        self.users.stop()
        self.live.stop()
        for threads in (self.sending, self.asking, self.encoding):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._producer is not None:
            with suppress(DeliveryError):  # whoever sent the event has been told
                self._producer.close()

    @property
    def producer(self) -> ClickProducer:
        """Made at the first event: the server starts and answers while Kafka is away."""
        with self._opening:
            if self._producer is None:
                connection, topics = self.settings.connection, self.settings.topics
                self._producer = ClickProducer(
                    connection, topics, self.pseudonyms, self.tracer, block_s=2.0, delivery_s=5.0
                )
            return self._producer

    async def to_kafka(self, call: Callable[..., T], *arguments: Any) -> T:
        """In a thread of those that wait for Kafka, under the request's span. Raises what the call does."""
        run = partial(copy_context().run, call, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self.sending, run)

    def stored_id(self, user_id: str) -> str:
        """The id under which a user is known behind the edge."""
        return self.pseudonyms.of(user_id) if self.pseudonyms else user_id

    def erase(self, user_id: str) -> Erased:
        """Raises BadEvent, BufferFull, DeliveryError."""
        erased = ask(self.producer, user_id, lambda: self._longest_ms(time.monotonic() // 60))
        stored_id = self.stored_id(user_id)
        self.users.erase(stored_id, erased.offset)
        self.updates.tell_erased(stored_id, erased.offset)
        metrics.erasures.labels("asked").inc()
        return erased

    def recommend(self, user_id: str, wishes: Wishes, reached: bool = True) -> Answer:
        """reached: the state asked for is there. Raises NotReady."""
        stored_id = self.stored_id(user_id)
        state, at = self._state(stored_id), self.users.places.get(stored_id)
        arm, now_ms = arm_of(self.settings, stored_id), time.time_ns() // 1_000_000
        query = Query(state.history, state.seen, now_ms, self._rules(wishes, arm))
        snapshot, items = self._list(query, wishes)
        missing = _unknown(snapshot, query, "no event of this user is known")
        source: Source = "popular" if missing else "personal"
        return _answer(
            items,
            wishes.k,
            snapshot,
            source,
            fallback=missing,
            user_id=user_id,
            as_of=AsOf(self.users.partition(stored_id), state.offset),
            age_ms=max(0, now_ms - at.kafka_ms) if at else None,
            stale=not (reached and self.updates.connected),
            arm=arm,
        )

    def recommend_guest(self, guest: Guest) -> Answer:
        """Nothing is kept. Raises NotReady, OtherEncoder."""
        rules, missing = self._rules(guest, None), None
        if words := clean(guest.text):
            snapshot, ranked = self.live.use(
                lambda snapshot: snapshot.told(self._encoder(words, snapshot.announced.encoder), guest.k, rules)
            )
            items = self.places(ranked)
        else:
            query = session(guest, self.settings, rules)
            snapshot, items = self._list(query, guest)
            missing = _unknown(snapshot, query, "no history, item or text was given")
        source: Source = "popular" if missing else "session"
        return _answer(items, guest.k, snapshot, source, fallback=missing, user_id=None, as_of=None, age_ms=None)

    def similar(self, item_id: str, wishes: Wishes) -> Similar:
        """Raises NotReady, KeyError for an item that the generation does not know."""
        rules = self._rules(wishes, None)
        snapshot, ranked = self.live.use(lambda snapshot: snapshot.similar(item_id, wishes.k, rules))
        return Similar(item_id, self.places(ranked), snapshot.name)

    def items(self, limit: int, wanted: str) -> list[ItemOut]:
        """The first so many whose id or title has the words; looks at every item (0.3 s a million)."""
        found: list[ItemOut] = []
        wanted = wanted.casefold()
        for item in list(self.live.catalogue.items.values()):
            if len(found) == limit:
                break
            if wanted in item.title.casefold() or wanted in item.item_id.casefold():
                found.append(ItemOut(item.item_id, item.title, item.categories, item.available))
        return found

    def user(self, user_id: str) -> UserOut | None:
        """None for a user of whom nothing is known. Raises NotReady."""
        stored_id = self.stored_id(user_id)
        state = self._state(stored_id)
        if state is EMPTY:
            return None
        return UserOut(
            user_id=user_id,
            clicks=state.applied,
            seen=len(state.seen) // DIGEST_BYTES,
            history=[Past(e.item_id, self.title(e.item_id), e.weight, e.ts_ms) for e in reversed(state.history)],
            as_of=AsOf(self.users.partition(stored_id), state.offset),
            arm=arm_of(self.settings, stored_id),
        )

    def _state(self, stored_id: str) -> UserState:
        """Raises NotReady while it may still be among those that are being read: a known user is no stranger."""
        state = self.users.of(stored_id)
        if state is EMPTY and not self.users.caught_up.is_set():
            raise NotReady("the users' states are being read")
        return state

    def places(self, ranked: Sequence[Ranked]) -> list[RankedItem]:
        return [
            RankedItem(
                r.item_id,
                r.score,
                self.title(r.item_id),
                r.propensity,
                [Reason(because.item_id, self.title(because.item_id), because.share) for because in r.because],
                r.explained,
            )
            for r in ranked
        ]

    def title(self, item_id: str) -> str:
        item = self.live.catalogue.items.get(item_id)
        return item.title if item else ""

    def _list(self, query: Query, wishes: Wishes) -> tuple[Snapshot, list[RankedItem]]:
        snapshot, lists = self.live.recommend([query], wishes.k, wishes.explain)
        return snapshot, self.places(lists[0])

    def _rules(self, wishes: Wishes, arm: str | None) -> Rules:
        """What is asked for; of what is not, the arm's."""
        seed = random.getrandbits(32)
        given = rules_of(self.settings, arm, seed) if arm else Rules(seed=seed)
        return given._replace(
            categories=frozenset(wishes.categories),
            exclude=frozenset(wishes.exclude),
            exclude_seen=wishes.exclude_seen,
            available_only=wishes.available_only,
            max_age_ms=None if wishes.max_age is None else 1000 * wishes.max_age,
            diversity=given.diversity if wishes.diversity is None else wishes.diversity,
            explore=given.explore if wishes.explore is None else wishes.explore,
        )


def _unknown(snapshot: Snapshot, query: Query, nothing: str) -> str | None:
    """Why a list cannot be more than what is popular."""
    if not query.history:
        return nothing
    return None if snapshot.knows(query.history) else f"generation {snapshot.name} knows none of the items"


def _answer(items: list[RankedItem], k: int, snapshot: Snapshot, source: Source, **rest: Any) -> Answer:
    fullness = "empty" if not items else "full" if len(items) == k else "short"
    answer = Answer(items=items, generation=snapshot.name, source=source, **rest)
    metrics.answers.labels(source, fullness, answer.arm).inc()
    return answer
