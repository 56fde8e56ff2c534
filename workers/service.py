"""What the HTTP routes answer from: users' states followed from Kafka, the live generation, a producer."""

import threading
import time
from collections import OrderedDict
from functools import cached_property

import msgspec

from model.user_state import EMPTY, UserState
from stream.consumer import Record, tail
from stream.producer import ClickProducer
from workers import metrics
from workers.erasure import Receipt, ask, longest_ms
from workers.live import Live
from workers.settings import Settings
from workers.snapshot import Query
from workers.states import States, keep_newest

RECENT_USERS = 50
MARKED_S = 600.0  # a worker that has been overtaken is fenced long before


class RankedItem(msgspec.Struct):
    item_id: str
    score: float
    title: str


class AsOf(msgspec.Struct):
    """The newest click behind an answer: its place in the clicks topic (offset -1: none)."""

    partition: int
    offset: int


class RecommendationsOut(msgspec.Struct):
    user_id: str
    items: list[RankedItem]
    generation: str
    source: str
    as_of: AsOf


class RecentUser(msgspec.Struct):
    user_id: str
    clicks: int
    history: list[RankedItem]  # newest first; score is the event's weight


class UserStates:
    """All users' states, followed from the compacted topic in a thread.

    A user is forgotten here as soon as the wish is in Kafka: no older state is taken up any more.
    """

    def __init__(self, settings: Settings) -> None:
        self.states: States = {}
        self.partitions: dict[str, int] = {}
        self.recent: OrderedDict[str, None] = OrderedDict()  # newest last
        self.caught_up = threading.Event()
        self._erasing: set[str] = set()  # asked for here, not yet seen in the topic
        self._erased: OrderedDict[str, float] = OrderedDict()  # user -> when, newest last
        self._changing = threading.Lock()  # of what is above: requests that erase run beside the thread
        self._stop = threading.Event()
        self._settings = settings
        self._thread = threading.Thread(target=self._follow, name="states", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        topic = self._settings.topics.users.name
        for records in tail(self._settings.connection, [topic], self._stop, self.caught_up.set):
            for record in records:
                self._take(record)
            while len(self.recent) > RECENT_USERS:
                self.recent.popitem(last=False)
            self._drop_marks()

    def of(self, user_id: str) -> UserState:
        """EMPTY for a stranger and for who is erased."""
        state = self.states.get(user_id, EMPTY)
        return EMPTY if state.erased else state

    def erase(self, user_id: str, offset: int) -> None:
        """Forgets a user up to this offset of the clicks, ahead of the worker."""
        with self._changing:
            if offset > self.states.get(user_id, EMPTY).offset:
                self.states[user_id] = UserState(offset=offset)
                self._erasing.add(user_id)
                self._forget(user_id)
                metrics.pending_erasures.set(len(self._erasing))

    def _take(self, record: Record) -> None:
        with self._changing:
            user_id = keep_newest(self.states, record)
            erased = self.states[user_id].erased
            if record.value is None or not erased:
                self._erasing.discard(user_id)
            if erased:
                self._forget(user_id)
            else:
                self.partitions[user_id] = record.partition
                self.recent[user_id] = None
                self.recent.move_to_end(user_id)
            metrics.pending_erasures.set(len(self._erasing))

    def _forget(self, user_id: str) -> None:
        self.partitions.pop(user_id, None)
        self.recent.pop(user_id, None)
        self._erased[user_id] = time.monotonic()
        self._erased.move_to_end(user_id)

    def _drop_marks(self) -> None:
        """Of whom was erased a while ago, the mark that keeps older states out."""
        with self._changing:
            while self._erased and next(iter(self._erased.values())) < time.monotonic() - MARKED_S:
                user_id, _ = self._erased.popitem(last=False)
                if self.states.get(user_id, EMPTY).erased and user_id not in self._erasing:
                    del self.states[user_id]


class Service:
    """What the routes need; one a process."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.pseudonyms = settings, settings.privacy.pseudonyms
        self.live, self.users = Live(settings), UserStates(settings)
        self._producer: ClickProducer | None = None

    def start(self) -> None:
        self.live.start()
        self.users.start()

    def stop(self) -> None:
        self.users.stop()
        self.live.stop()
        if self._producer is not None:
            self._producer.close()

    @property
    def producer(self) -> ClickProducer:
        """Made at the first event: the server starts and answers while Kafka is away."""
        if self._producer is None:
            self._producer = ClickProducer(
                self.settings.connection, self.settings.topics, self.pseudonyms, block_s=2.0, delivery_s=5.0
            )
        return self._producer

    @cached_property
    def _longest_ms(self) -> int:
        return longest_ms(self.settings)

    def stored_id(self, user_id: str) -> str:
        """The id under which a user is known behind the edge."""
        return self.pseudonyms.of(user_id) if self.pseudonyms else user_id

    def erase(self, user_id: str) -> Receipt:
        """Raises BadEvent, BufferFull, DeliveryError."""
        receipt = ask(self.producer, user_id, self._longest_ms)
        self.users.erase(self.stored_id(user_id), receipt.offset)
        metrics.erasures.labels("asked").inc()
        return receipt

    def title(self, item_id: str) -> str:
        item = self.live.catalogue.items.get(item_id)
        return item.title if item else ""

    def recommend(self, user_id: str, k: int) -> RecommendationsOut:
        """Raises NotReady."""
        stored_id = self.stored_id(user_id)
        state = self.users.of(stored_id)
        query = Query(state.history, state.seen, time.time_ns() // 1_000_000)
        snapshot, lists = self.live.recommend([query], k)
        items = [RankedItem(place.item_id, place.score, self.title(place.item_id)) for place in lists[0]]
        source = "personal" if state.history else "popular"
        fullness = "empty" if not items else "full" if len(items) == k else "short"
        metrics.answers.labels(source, fullness).inc()
        as_of = AsOf(self.users.partitions.get(stored_id, -1), state.offset)
        return RecommendationsOut(user_id, items, snapshot.name, source, as_of)

    def history(self, state: UserState) -> list[RankedItem]:
        return [RankedItem(e.item_id, e.weight, self.title(e.item_id)) for e in reversed(state.history)]
