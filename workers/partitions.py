"""Partitions beside each other, the batches of each in their order, all that wait at once.

A click that is fetched alone is a batch of its own. Worked off one by one, each would wait for the sends of the one
before it, whatever its partition: at 200 clicks a second the worker fell behind for good.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from workers.state_writer import Acknowledge

ROOM = 40_000  # clicks of a KiB taken from Faust before no more are, some 40 MB: the more, the fewer lists of a backlog


class Batch(NamedTuple):
    """A Faust event whose value is a `Fetched`, and how to acknowledge it."""

    event: Any
    acknowledge: Acknowledge

    @property
    def room(self) -> int:
        """What it takes of ROOM: 40,000 clicks of 64 KiB would be 2.6 GB."""
        return max(len(self.event.value.records), int(self.event.message.serialized_value_size) // 1024)


class Partitions:
    """`work` gets a topic partition and the batches of it that wait: the more, the longer the ones before took.

    It ends the process where it cannot go on: what it raises is lost.
    """

    def __init__(self, work: Callable[[Any, list[Batch]], Awaitable[None]]) -> None:
        self._work = work
        self._taken = 0  # of ROOM, by what waits or is worked on
        self._released = asyncio.Event()
        self._waiting: defaultdict[Any, deque[Batch]] = defaultdict(deque)
        self._tasks: dict[Any, asyncio.Task[None]] = {}
        self._newest = WeakValueDictionary[Any, Any]()  # message of each; once it is acked, those before it are, too

    @property
    def full(self) -> bool:
        """Faust may hold batches that could not be put yet."""
        return self._taken >= ROOM

    def idle(self, tp: Any) -> bool:
        """Nothing of this partition waits, is worked on or still to be acknowledged."""
        newest = self._newest.get(tp)
        return tp not in self._tasks and (newest is None or newest.acked)

    async def put(self, batch: Batch, assigned: Callable[[], Iterable[Any]]) -> None:
        """Waits for room; a batch whose partition has been taken away until then is its new owner's to read."""
        while self.full:
            self._released.clear()
            await self._released.wait()
        self._taken += batch.room
        tp = batch.event.message.tp
        if tp not in assigned():
            self._drop(batch)
            return
        self._waiting[tp].append(batch)
        self._newest[tp] = batch.event.message
        if tp not in self._tasks:
            self._tasks[tp] = asyncio.create_task(self._run(tp))

    async def forget(self, tps: Iterable[Any]) -> None:
        """What waits and what is under way is given up."""
        tasks = [self._tasks.pop(tp) for tp in tps if tp in self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self) -> None:
        await self.forget(list(self._tasks))

    async def _run(self, tp: Any) -> None:
        waiting, batches = self._waiting[tp], list[Batch]()
        try:
            while waiting:
                batches = list(waiting)
                waiting.clear()
                await self._work(tp, batches)
                self._release(batches)
            del self._tasks[tp]
        except asyncio.CancelledError:
            self._drop(*batches, *waiting)
            waiting.clear()
            raise

    def _drop(self, *batches: Batch) -> None:
        for batch in batches:
            batch.event.message.acked = True  # without a commit; else Faust's next rebalance waits for it, for good
        self._release(batches)

    def _release(self, batches: Sequence[Batch]) -> None:
        self._taken -= sum(batch.room for batch in batches)
        self._released.set()
