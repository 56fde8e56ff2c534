"""The one writer of a partition of the users topic: it fences the one before it (KIP-98; why: docs/decisions.md)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from stream.connection import Connection
from stream.events import OFFSET_HEADER
from workers.sender import BatchSender, Keyed

COMMIT_S = 0.5  # a clean stop waits for it; 8 partitions make 16 transactions a second
TIMEOUT_MS = 600_000  # an outage of the broker must not cost the transaction; a killed worker's ends with its successor
WAITING = 8  # micro-batches ahead of Kafka before the worker waits: 1,000 users of 4 KB in each, in each partition

Acknowledge = Callable[[], Awaitable[None]]


class Tombstone(NamedTuple):
    """In the place of the state of an erased user: a null record, whose header OFFSET_HEADER says where the wish stood.

    Without it a click from before the wish, delivered again after a crash, would bring the user back for a moment.
    """

    offset: int


LAST = ("last", b"")  # header of the record behind which nothing that was folded before it is still to come
States = Mapping[bytes, bytes | Tombstone]


class StateWriter:
    """`put` states and acknowledgements in their order; `failed` is told once why no more can be written."""

    def __init__(
        self, connection: Connection, topic: str, partition: int, failed: Callable[[BaseException], None]
    ) -> None:
        self._topic, self._partition, self._failed = topic, partition, failed
        self._sender = BatchSender(connection, transactional_id=f"{topic}-{partition}", timeout_ms=TIMEOUT_MS)
        self._waiting: asyncio.Queue[tuple[States, Acknowledge | None]] = asyncio.Queue(WAITING)
        self._committed: asyncio.Queue[Acknowledge] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """When this returns, no other writer of the partition can add anything, and nothing of theirs is open."""
        await self._sender.start()
        self._tasks = [asyncio.create_task(self._for_ever(step)) for step in (self._transaction, self._acknowledge)]

    async def put(self, states: States, acknowledge: Acknowledge | None = None) -> None:
        """User id -> encoded state; `acknowledge` is called when these and all before them are committed."""
        await self._waiting.put((states, acknowledge))

    async def stop(self) -> None:
        """Leaves what is not committed to the next writer, whose start aborts it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._sender.stop()

    async def _for_ever(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            while True:
                await step()
        except Exception as error:
            self._failed(error)

    async def _transaction(self) -> None:
        loop, ends, begun = asyncio.get_running_loop(), None, False
        acknowledgements: list[Acknowledge] = []
        while (ends is None or loop.time() < ends) and (taken := await self._take(ends)):  # over, even where more waits
            states, more = taken
            ends = ends or loop.time() + COMMIT_S
            acknowledgements += more
            if states and not begun:
                await self._sender.begin()
                begun = True
            records = [*map(state_record, states.items())]
            if records:
                records[-1] = (*records[-1], LAST)
            await self._sender.send(self._topic, self._partition, records)
        if begun:
            await self._sender.commit()
        for acknowledge in acknowledgements:
            self._committed.put_nowait(acknowledge)

    async def _acknowledge(self) -> None:
        """In their order, beside the next transaction: an erasure looks through the dead letters first."""
        await (await self._committed.get())()

    async def _take(self, ends: float | None) -> tuple[dict[bytes, bytes | Tombstone], list[Acknowledge]] | None:
        """All that waits, at least one put, of each user the newest state; None where nothing comes until `ends`."""
        try:
            async with asyncio.timeout_at(ends):
                puts = [await self._waiting.get()]
        except TimeoutError:
            return None
        while not self._waiting.empty():
            puts.append(self._waiting.get_nowait())
        states = {user: state for put, _ in puts for user, state in put.items()}
        return states, [acknowledge for _, acknowledge in puts if acknowledge is not None]


def state_record(state: tuple[bytes, bytes | Tombstone]) -> Keyed:
    """Of the users topic, and as a null of the recommendations topic, too."""
    key, value = state
    return (key, None, (OFFSET_HEADER, b"%d" % value.offset)) if isinstance(value, Tombstone) else (key, value)
