"""Lists as they are made: the recommendations topic, followed in one thread, handed to the streams that are open.

A stream keeps one list, the newest: a reader that is slow misses lists and holds no memory.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import msgspec
import structlog

from stream.consumer import Record
from stream.events import OFFSET_HEADER, BadEvent, Recommendations, decode
from stream.subscriber import Subscriber
from stream.tracing import traceparent
from workers.live import Live
from workers.settings import Settings
from workers.user_states import UserStates

log = structlog.get_logger()

NEWEST_LISTS = 1000
WATCH_S = 0.25


class Made(NamedTuple):
    """A list, when Kafka took it and when this server read it."""

    answer: Recommendations
    published_ms: int
    seen_ms: int
    traceparent: str | None = None


class _Times(msgspec.Struct):
    clicked_ms: int
    sent_ms: int


class Mailbox:
    """What a stream has not sent yet. Belongs to the event loop."""

    def __init__(self) -> None:
        self.newest: Made | None = None
        self.erased = -1  # offset of the user's wish to be erased
        self.wake = asyncio.Event()


class Updates:
    """`start` belongs to the event loop that the streams run on."""

    def __init__(self, settings: Settings, live: Live, users: UserStates) -> None:
        self._settings, self._live, self._users = settings, live, users
        self._boxes: dict[str, set[Mailbox]] = {}
        self._latency_ms: deque[int] = deque(maxlen=NEWEST_LISTS)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="updates", daemon=True)
        self._decode = msgspec.json.Decoder(_Times).decode
        self.connected = False
        self.num_open = 0
        self.closed = False

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watch = self._loop.create_task(self._tell_of_changes())
        self._thread.start()

    def close(self) -> None:
        """Ends every open stream at once."""
        self.closed = True
        self._wake_all()

    def stop(self) -> None:
        self.close()
        self._watch.cancel()
        self._stop.set()
        self._thread.join()

    @property
    def generation(self) -> str | None:
        snapshot = self._live.snapshot
        return snapshot.name if snapshot else None

    @property
    def latencies_ms(self) -> list[int]:
        """From Kafka's stamp of a click to the worker's of the list, of the newest lists."""
        return list(self._latency_ms)

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of `serve.max_streams`."""
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    @contextmanager
    def mailbox(self, user_id: str) -> Iterator[Mailbox]:
        box = Mailbox()
        self._boxes.setdefault(user_id, set()).add(box)
        try:
            yield box
        finally:
            self._boxes[user_id].discard(box)
            if not self._boxes[user_id]:
                del self._boxes[user_id]

    def _follow(self) -> None:
        with Subscriber(self._settings.connection, self._settings.topics) as subscriber:
            while not self._stop.is_set():
                records = subscriber.records(0.2)
                self.connected, seen_ms = subscriber.connected, time.time_ns() // 1_000_000
                for record in records:
                    self._take(record, seen_ms)

    def _take(self, record: Record, seen_ms: int) -> None:
        try:
            user_id = (record.key or b"").decode()
            if record.value is None:
                self._erase(user_id, int(dict(record.headers).get(OFFSET_HEADER, -1)))
                return
            times = self._decode(record.value)
            self._latency_ms.append(times.sent_ms - times.clicked_ms)
            if user_id in self._boxes and self._users.caught_up.is_set():  # by then it knows who is erased
                answer = decode(record.value, Recommendations)
                if self._users.erased_after(user_id, answer.offset):
                    return  # of a worker that is behind; the stream was opened after the wish and never heard of it
                trace = (traceparent(record.headers) or b"").decode() or None
                made = Made(answer, record.timestamp, seen_ms, trace)
                self._loop.call_soon_threadsafe(self._deliver, made)
        except (BadEvent, msgspec.DecodeError, ValueError) as error:
            log.warning("list passed over", cause=str(error))

    def _deliver(self, made: Made) -> None:
        for box in self._boxes.get(made.answer.user_id, ()):
            if box.newest is None or made.answer.offset >= box.newest.answer.offset:
                box.newest = made
            box.wake.set()

    def _erase(self, user_id: str, offset: int) -> None:
        """The wish is in Kafka: no list from the old state any more, however long the worker takes to get to it."""
        self._users.erase(user_id, offset)
        self.tell_erased(user_id, offset)

    def tell_erased(self, user_id: str, offset: int) -> None:
        """Streams of the user forget what is older than the wish that stands at this offset of the clicks."""
        self._loop.call_soon_threadsafe(self._deliver_erasure, user_id, offset)

    def _deliver_erasure(self, user_id: str, offset: int) -> None:
        for box in self._boxes.get(user_id, ()):
            box.erased = max(box.erased, offset)
            box.wake.set()

    async def _tell_of_changes(self) -> None:
        before = None
        while True:
            now = self.connected, self.generation, self._users.caught_up.is_set()
            if now != before:
                before = now
                self._wake_all()
            await asyncio.sleep(WATCH_S)

    def _wake_all(self) -> None:
        for boxes in self._boxes.values():
            for box in boxes:
                box.wake.set()
