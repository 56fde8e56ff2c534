"""What the HTTP routes answer from: users' states followed from Kafka, the live generation, a producer."""

import threading
import time
from collections import OrderedDict

import msgspec

from model.user_state import EMPTY, UserState
from stream.consumer import tail
from stream.producer import ClickProducer
from workers import metrics
from workers.live import Live
from workers.settings import Settings
from workers.snapshot import Query
from workers.states import States, keep_newest, user_of

RECENT_USERS = 50


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
    """All users' states, followed from the compacted topic in a thread."""

    def __init__(self, settings: Settings) -> None:
        self.states: States = {}
        self.partitions: dict[str, int] = {}
        self.recent: OrderedDict[str, None] = OrderedDict()  # newest last
        self.caught_up = threading.Event()
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
                user_id = user_of(record)
                keep_newest(self.states, user_id, record.value)
                self.partitions[user_id] = record.partition
                self.recent[user_id] = None
                self.recent.move_to_end(user_id)
            while len(self.recent) > RECENT_USERS:
                self.recent.popitem(last=False)


class Service:
    """What the routes need; one a process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
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
            self._producer = ClickProducer(self.settings.connection, self.settings.topics, block_s=2.0, delivery_s=5.0)
        return self._producer

    def title(self, item_id: str) -> str:
        item = self.live.catalogue.items.get(item_id)
        return item.title if item else ""

    def recommend(self, user_id: str, k: int) -> RecommendationsOut:
        """Raises NotReady."""
        state = self.users.states.get(user_id, EMPTY)
        query = Query(state.history, state.seen, time.time_ns() // 1_000_000)
        snapshot, lists = self.live.recommend([query], k)
        items = [RankedItem(place.item_id, place.score, self.title(place.item_id)) for place in lists[0]]
        source = "personal" if state.history else "popular"
        fullness = "empty" if not items else "full" if len(items) == k else "short"
        metrics.answers.labels(source, fullness).inc()
        as_of = AsOf(self.users.partitions.get(user_id, -1), state.offset)
        return RecommendationsOut(user_id, items, snapshot.name, source, as_of)

    def history(self, state: UserState) -> list[RankedItem]:
        return [RankedItem(e.item_id, e.weight, self.title(e.item_id)) for e in reversed(state.history)]
