"""The user states of the partitions this worker owns: in memory here, in the compacted topic for good.

A partition's states are read to the end of the topic when it is assigned and forgotten when it is taken away, so that
a second assignment reads what the owner in between has written.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from functools import partial
from typing import NamedTuple

import structlog
from msgspec import Struct

from model.user_state import EMPTY, Limits, UserState, decode_state, encode_state
from stream.connection import Connection
from stream.consumer import Record, read_window
from stream.events import OFFSET_HEADER
from workers import metrics
from workers.outage import outlasting
from workers.settings import Settings
from workers.state_writer import StateWriter, Tombstone

log = structlog.get_logger()

READERS = 4  # partitions read at a time, by threads; most of a small one's time is waiting for Kafka

States = MutableMapping[str, UserState]


class PackedStates(States):
    """User id -> state, held as its record: half of the objects' memory or less, for 5 us a look at 50 clicks."""

    def __init__(self) -> None:
        self._records: dict[str, bytes] = {}

    def packed(self, user_id: str) -> bytes:
        return self._records[user_id]

    def __getitem__(self, user_id: str) -> UserState:
        return decode_state(self._records[user_id])

    def get(self, user_id: str, default: UserState = EMPTY) -> UserState:  # type: ignore[override]
        """Of a stranger the default; Mapping's own `get` costs an exception for each: 3 us."""
        raw = self._records.get(user_id)
        return default if raw is None else decode_state(raw)

    def __setitem__(self, user_id: str, state: UserState) -> None:
        self._records[user_id] = encode_state(state)

    def __delitem__(self, user_id: str) -> None:
        del self._records[user_id]

    def __contains__(self, user_id: object) -> bool:
        return user_id in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def limits_of(settings: Settings) -> Limits:
    return Limits(settings.worker.history, settings.worker.event_ids, settings.worker.seen)


def read_states(connection: Connection, topic: str, partition: int, given_up: threading.Event) -> PackedStates:
    """All states of one partition of the users topic, newest of each user by offset of its last click; `given_up`
    ends it early."""
    states = PackedStates()
    for record in read_window(connection, topic, only=[partition]):
        if given_up.is_set():
            break
        keep_newest(states, record)
    return states


def raw_states(settings: Settings) -> dict[str, bytes]:
    """The newest record of every user, as it lies in the users topic."""
    records = read_window(settings.connection, settings.topics.users.name)
    raw = {user_of(record): record.value for record in records}
    return {user_id: value for user_id, value in raw.items() if value is not None}


def user_of(record: Record) -> str:
    """The user whose state a record of the users topic is."""
    assert record.key is not None, f"{record.topic}[{record.partition}]@{record.offset} has no key"
    return record.key.decode()


def keep_newest(states: States, record: Record) -> tuple[str, UserState, UserState, int]:
    """Take one record of the users topic; an older version than the one known is passed over. User, before and after,
    and the offset of the record's own.

    Of an erased user the offset of the wish is kept: what a worker that is overtaken still sends is older than it.
    """
    user_id = user_of(record)
    if record.value is None:
        state = UserState(offset=int(dict(record.headers)[OFFSET_HEADER]))
    else:
        state = decode_state(record.value)
    before = states.get(user_id, EMPTY)
    if state.offset < before.offset:
        return user_id, before, before, state.offset
    states[user_id] = state
    return user_id, before, state, state.offset


class Sent(Struct, frozen=True, gc=False):  # one a user: docs/decisions.md
    """A list that a user has: the best items of this generation, so often renewed, at the user's newest state."""

    generation: str
    renewals: int
    item_ids: tuple[str, ...]


class Owned(NamedTuple):
    """A partition's states, the only way to write them, and the newest list of each user sent since the assignment."""

    states: PackedStates
    writer: StateWriter
    sent: dict[str, Sent]

    def record(self, user_id: str, state: UserState) -> bytes | Tombstone:
        """What goes into the users topic of this state, which is in `states` already."""
        return Tombstone(state.offset) if state.erased else self.states.packed(user_id)


class OwnedStates:
    """Pick `of(partition)` once a batch and use that object to the end: a rebalance runs at any await.

    `failed` is told when a partition can be written no more: another worker has taken it over, or Kafka is gone.
    """

    def __init__(self, connection: Connection, topic: str, failed: Callable[[BaseException], None]) -> None:
        self._connection, self._topic, self._failed = connection, topic, failed
        self._readers = asyncio.Semaphore(READERS)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._owned: dict[int, Owned] = {}
        self._assigned = False

    @property
    def ready(self) -> bool:
        """Whether partitions, or none, have been assigned, and all of them are restored. For any thread."""
        return self._assigned and len(self._owned) == len(self._tasks)

    def restore(self, partitions: Iterable[int]) -> None:
        """Begins with all of them at once, as they are assigned; returns before they are restored."""
        self._assigned = True
        for partition in partitions:
            if partition not in self._tasks:
                self._tasks[partition] = asyncio.create_task(self._restore(partition))

    def restored(self, partition: int) -> bool:
        """Whether `of` would return at once. For any thread."""
        return partition in self._owned

    async def of(self, partition: int) -> Owned:
        """Waits until the partition is restored."""
        self.restore([partition])
        await asyncio.shield(self._tasks[partition])
        self._count()
        return self._owned[partition]

    async def forget(self, partitions: Iterable[int]) -> None:
        self._assigned = False
        gone = [partition for partition in partitions if partition in self._tasks]
        tasks = [self._tasks.pop(partition) for partition in gone]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        owned = [self._owned.pop(partition) for partition in gone if partition in self._owned]
        self._count()
        await asyncio.gather(*(one.writer.stop() for one in owned))

    def _count(self) -> None:
        metrics.restored_users.set(sum(len(owned.states) for owned in self._owned.values()))

    async def stop(self) -> None:
        await self.forget(list(self._tasks))

    async def _restore(self, partition: int) -> None:
        began = time.monotonic()
        try:
            owned = self._owned[partition] = await outlasting(partial(self._take_over, partition))
        except Exception as error:  # its clicks are not even fetched: nobody would see
            self._failed(error)
            raise
        self._count()
        seconds = round(time.monotonic() - began, 2)
        log.info("states restored", partition=partition, users=len(owned.states), seconds=seconds)

    async def _take_over(self, partition: int) -> Owned:
        writer = StateWriter(self._connection, self._topic, partition, self._failed)
        fence, given_up = asyncio.create_task(writer.start()), threading.Event()
        try:
            await asyncio.shield(fence)
            async with self._readers:  # after the fence: nothing follows what is read
                states = await asyncio.to_thread(read_states, self._connection, self._topic, partition, given_up)
        except BaseException:
            given_up.set()
            await asyncio.gather(fence, return_exceptions=True)  # were it given up, it could fence the next owner
            await writer.stop()
            raise
        return Owned(states, writer, {})
