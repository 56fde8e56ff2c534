"""All users' states, as the server follows them."""

import threading
import time
from collections import OrderedDict

import structlog
from kafka.errors import KafkaError
from msgspec import Struct

from model.user_state import EMPTY, UserState
from stream.consumer import Record, tail
from stream.producer import partition_of
from workers import metrics
from workers.erasure import waiting_wishes
from workers.settings import Settings
from workers.state_writer import LAST
from workers.states import PackedStates, keep_newest

log = structlog.get_logger()

MARKED_S = 600.0  # a worker that has been overtaken is fenced long before


class At(Struct, frozen=True, gc=False):
    """Where a user's newest state lies, and when Kafka took it."""

    partition: int
    kafka_ms: int


class UserStates:
    """Followed from the compacted topic in a thread.

    A user is forgotten here as soon as the wish is in Kafka: no older state is taken up any more.
    """

    def __init__(self, settings: Settings) -> None:
        self.states = PackedStates()
        self.places: dict[str, At] = {}
        self.progress: dict[int, int] = {}  # partition -> offset of the clicks up to which all states are read
        self.applied = 0
        self.caught_up = threading.Event()
        self._erasing: set[str] = set()  # asked for, not yet seen in the topic
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

    def of(self, user_id: str) -> UserState:
        """EMPTY for a stranger and for who is erased."""
        state = self.states.get(user_id, EMPTY)
        return EMPTY if state.erased else state

    def partition(self, user_id: str) -> int:
        at = self.places.get(user_id)
        return at.partition if at else partition_of(user_id, self._settings.kafka.partitions)

    def reached(self, user_id: str, offset: int) -> bool:
        """Whether the clicks of the user's partition are folded up to this offset."""
        own = self.states.get(user_id, EMPTY).offset
        return max(own, self.progress.get(self.partition(user_id), -1)) >= offset

    def erased_after(self, user_id: str, offset: int) -> bool:
        """Whether what was made of the clicks up to this offset is of before the user's erasure."""
        state = self.states.get(user_id, EMPTY)
        return state.erased and offset < state.offset

    def erase(self, user_id: str, offset: int) -> None:
        """Forgets a user up to this offset of the clicks, ahead of the topic's null, which is awaited."""
        with self._changing:
            if offset > self.states.get(user_id, EMPTY).offset:
                if not self.reached(user_id, offset):  # else a worker was given it again: no state follows
                    self._erasing.add(user_id)
                self.states[user_id] = UserState(offset=offset)
                self._forget(user_id)

    def _follow(self) -> None:
        topic, ahead = self._settings.topics.users.name, dict[int, int]()
        for records in tail(self._settings.connection, [topic], self._stop, self._caught_up):
            progress: dict[int, int] = {}
            with self._changing:
                for record in records:
                    ahead[record.partition] = max(ahead.get(record.partition, -1), self._take(record))
                    if LAST in record.headers:
                        progress[record.partition] = ahead[record.partition]
                self._drop_marks()
                metrics.pending_erasures.set(len(self._erasing))
            self.progress |= progress  # once all states of the read are there

    def _caught_up(self) -> None:
        """With the wishes that no worker has got to: their nulls went by before this server listened."""
        try:
            for user_id, offset in waiting_wishes(self._settings):
                self.erase(user_id, offset)
        except (KafkaError, TimeoutError, ValueError) as error:
            log.warning("waiting erasures not read", reason=repr(error))
        self.caught_up.set()

    def _take(self, record: Record) -> int:
        """How far the worker was: a wish that is known ahead of its null says nothing of that."""
        user_id, before, after, offset = keep_newest(self.states, record)
        self.applied += max(0, after.applied - before.applied)
        if offset >= after.offset and (record.value is None or not after.erased):
            self._erasing.discard(user_id)
        if after.erased:
            self._forget(user_id)
        else:
            self.places[user_id] = At(record.partition, record.timestamp)
        return offset

    def _forget(self, user_id: str) -> None:
        self.places.pop(user_id, None)
        self._erased[user_id] = time.monotonic()
        self._erased.move_to_end(user_id)

    def _drop_marks(self) -> None:
        """Of whom was erased a while ago, the mark that keeps older states out."""
        while self._erased and next(iter(self._erased.values())) < time.monotonic() - MARKED_S:
            user_id, _ = self._erased.popitem(last=False)
            if self.states.get(user_id, EMPTY).erased and user_id not in self._erasing:
                del self.states[user_id]
