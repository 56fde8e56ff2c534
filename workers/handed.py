"""What Faust hands on is checked for gaps, and what it has dropped is read again.

A batch that is fetched while a rebalance begins can vanish between the fetch and the agent's queue (seen: 52 clicks in
a row, `_drain_messages` goes on after `suspend_flow`). The next batch of the partition would be acknowledged past it.
A dropped batch that nothing follows is found by a second look at partitions that stand still. Folding is idempotent, so
to hand a click on twice is harmless, and to hand it on never is not.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import structlog

from stream.consumer import Record, committed_offsets, read_window
from workers.faust_batches import Fetched
from workers.outage import in_thread
from workers.settings import Settings

log = structlog.get_logger()

STUCK_S = 60.0  # longer than any rebalance seen, under load, too


class Stuck(RuntimeError):
    """Clicks are there, they were fetched again, and still none comes: Faust hands nothing on any more."""


class Handed:
    """How far each partition has been handed on since it was assigned."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._next: dict[int, int] = {}  # partition -> offset after the last one handed on
        self._looked: dict[int, tuple[int, int]] = {}  # partition -> that and the end, at the last look
        self._again: dict[int, tuple[int, float]] = {}  # partition -> from where it was last fetched again, and when
        self._rebalances = 0

    async def complete(self, partition: int, fetched: Fetched) -> Sequence[Any]:
        """The records of a batch, before them those that are missing since the last one or since the commit.

        The first batch after an assignment costs a look at the committed offset (0.1 s), a gap one more read.
        """
        records, next_ = fetched.records, self._next.get(partition)
        if next_ is None:
            next_ = (await in_thread(self._committed)).get(partition, 0)
        if next_ < fetched.first:
            missing = await in_thread(self._between, partition, next_, fetched.first)
            if missing:
                log.warning("dropped batch read again", partition=partition, first=next_, clicks=len(missing))
            records = [*missing, *records]
        self._next[partition] = max(next_, fetched.next)
        return records

    async def behind(self, ends: Mapping[int, int]) -> dict[int, int]:
        """Partition -> offset to fetch from again, once for each; call it now and then.

        `ends`: of what is committed, in those partitions of which no batch is under way.

        It is behind where it has not moved since the last call and stands below the end that it had then. Raises
        Stuck where it still is STUCK_S later, unless all that is there is a transaction's marker.
        """
        if any(partition not in self._next and end for partition, end in ends.items()):
            rebalances = self._rebalances
            committed = await in_thread(self._committed)
            if rebalances != self._rebalances:
                return {}  # these partitions were forgotten meanwhile
            self._next = {partition: committed.get(partition, 0) for partition in ends} | self._next
        looked, self._looked = self._looked, {p: (self._next.get(p, 0), end) for p, end in ends.items()}
        behind = {}
        for partition, (at, _) in self._looked.items():
            before, end = looked.get(partition, (-1, 0))
            if before != at or at >= end:
                continue
            fetched, when = self._again.get(partition, (-1, 0.0))
            if fetched != at:
                log.warning("nothing came of what was fetched: fetched again", partition=partition, first=at, end=end)
                behind[partition], self._again[partition] = at, (at, time.monotonic())
            elif time.monotonic() - when > STUCK_S and len(await in_thread(self._between, partition, at, end)):
                raise Stuck(f"partition {partition} stands at {at} of {end}")
        return behind

    def forget(self, partitions: Iterable[int]) -> None:
        self._rebalances += 1
        for partition in partitions:
            for known in (self._next, self._looked, self._again):
                known.pop(partition, None)

    def _committed(self) -> dict[int, int]:
        topic = self._settings.topics.clicks.name
        return committed_offsets(self._settings.connection, self._settings.group, topic)

    def _between(self, partition: int, first: int, end: int) -> list[Record]:
        topic = self._settings.topics.clicks.name
        window = read_window(
            self._settings.connection, topic, offsets={partition: first}, only=[partition], until={partition: end}
        )
        return list(window)
