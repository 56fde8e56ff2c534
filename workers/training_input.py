"""What the trainer reads: the window of clicks, and the text vectors of the newest encoder."""

import threading
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from model.sampling import Events
from model.user_state import digest
from stream.consumer import Record, read_window, tail
from stream.events import BadEvent, Click, Erasure, ItemVector, decode_item, decode_record
from stream.topics import DAY_MS
from workers.settings import Settings

log = structlog.get_logger()

REMEMBERED_IDS = 1_000_000


class Read(NamedTuple):
    click: Click
    partition: int
    offset: int


Arrived = tuple[int, int, int, Click | Erasure]  # Kafka's stamp, partition, offset
_arrival = itemgetter(0, 1, 2)


class Window:
    """The clicks since `trainer.window_days` ago, each once, in the order in which Kafka took them: the newest
    `trainer.window_events` of a read.

    A user's clicks before an erasure are left out; `erased` names the users of the last read whose clicks of the
    reads before it are to be forgotten, too.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._topic = settings, settings.topics.clicks.name
        self._since_ms = int(time.time() * 1000 - settings.trainer.window_days * DAY_MS)
        self.offsets: dict[int, int] = {}  # partition -> next offset to read
        self.erased: dict[str, int] = {}  # user -> offset
        self._ids: dict[bytes, None] = {}

    def read(self) -> list[Read]:
        """What has come since the last call, up to now. Raises as `read_window`: the next call reads it again."""
        self.erased, reads = {}, list[Read]()
        for _, partition, offset, event in self._newest():
            if isinstance(event, Erasure):
                self.erased[event.user_id] = offset
            elif self._is_new(digest(f"{event.user_id}\0{event.event_id}")):  # once a user, as in the states
                reads.append(Read(event, partition, offset))
        return [read for read in reads if read.offset > self.erased.get(read.click.user_id, -1)]

    def _newest(self) -> list[Arrived]:
        """The newest clicks and every erasure, in order. At most twice the window is held: a month may be 100 of it."""
        most, clicks, erasures = self._settings.trainer.window_events, list[Arrived](), list[Arrived]()
        since_ms, offsets = None if self.offsets else self._since_ms, dict(self.offsets)
        for record in read_window(self._settings.connection, self._topic, since_ms, dict(self.offsets)):
            offsets[record.partition] = max(record.offset + 1, offsets.get(record.partition, 0))
            if record.timestamp < self._since_ms:
                continue
            try:
                event = decode_record(record.value, record.key, record.timestamp)
            except BadEvent:
                continue  # the worker sends it to the dead letters
            kept = erasures if isinstance(event, Erasure) else clicks  # an old click may wait in the trainer for it
            kept.append((record.timestamp, record.partition, record.offset, event))
            if len(clicks) > 2 * most:
                clicks = sorted(clicks, key=_arrival)[-most:]
        self.offsets = offsets
        return sorted([*sorted(clicks, key=_arrival)[-most:], *erasures], key=_arrival)

    def _is_new(self, event: bytes) -> bool:
        new = event not in self._ids
        self._ids[event] = None
        if len(self._ids) > REMEMBERED_IDS:
            del self._ids[next(iter(self._ids))]
        return new


def events_of(clicks: Sequence[Click], weight: Callable[[Click], float]) -> Events:
    """As the learner takes them."""
    return Events(
        [click.user_id for click in clicks],
        [click.item_id for click in clicks],
        np.array([weight(click) for click in clicks], np.float32),
        np.array([click.ts_ms for click in clicks], np.int64),
    )


class EncoderChanged(RuntimeError):
    """The items have got vectors of another encoder: this process ends, its successor trains anew on them."""


class Texts(threading.Thread):
    """Follows the text vectors of the newest encoder."""

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        super().__init__(name="texts", daemon=True)
        self.caught_up = threading.Event()
        self._settings, self._stop_event = settings, stop
        self._newest = (0, "")  # Kafka's stamp and encoder of the newest vector
        self._new: dict[str, ItemVector | None] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        topic = self._settings.topics.vectors.name
        for records in tail(self._settings.connection, [topic], self._stop_event, self.caught_up.set):
            for record in records:
                self._take(record)

    def _take(self, record: Record) -> None:
        try:
            item_id, vector = decode_item(record.value, record.key, ItemVector)
        except BadEvent as error:  # a later release's: the thread must not end over it
            log.warning("record passed over", topic=record.topic, offset=record.offset, cause=str(error))
            return
        with self._lock:
            if vector is not None:
                self._newest = max(self._newest, (record.timestamp, vector.encoder))
            self._new[item_id] = vector

    @property
    def encoder(self) -> str:
        return self._newest[1]

    def take(self) -> tuple[str, dict[str, NDArray[np.float32]], set[str]]:
        """The encoder, the vectors (E,) that have come since the last call, and the items removed since."""
        with self._lock:
            new, self._new = self._new, {}
            encoder = self.encoder
        texts = {
            item_id: np.frombuffer(vector.vector, "<f2").astype(np.float32)
            for item_id, vector in new.items()
            if vector is not None and vector.encoder == encoder
        }
        return encoder, texts, {item_id for item_id, vector in new.items() if vector is None}
