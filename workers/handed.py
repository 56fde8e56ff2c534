"""What Faust hands on is checked for gaps, and what it has dropped is read again.

A batch that is fetched while a rebalance begins can vanish between the fetch and the agent's queue (seen: 52 clicks in
a row, `_drain_messages` goes on after `suspend_flow`). The next batch of the partition would be acknowledged past it.
Folding is idempotent, so to hand a click on twice is harmless, and to hand it on never is not.
"""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any

import structlog

from stream.consumer import Record, committed_offsets, read_window
from workers.settings import Settings

log = structlog.get_logger()


class Handed:
    """How far each partition has been handed on since it was assigned."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._next: dict[int, int] = {}  # partition -> offset after the last one handed on

    async def complete(self, partition: int, records: Sequence[Any]) -> Sequence[Any]:
        """The records of a batch, before them those that are missing since the last one or since the commit.

        The first batch after an assignment costs a look at the committed offset (0.1 s), a gap one more read; a
        producer's transaction marker looks like a gap.
        """
        first, next_ = records[0].offset, self._next.get(partition)
        if next_ is None:
            next_ = await asyncio.to_thread(self._committed, partition)
        if next_ < first:
            missing = await asyncio.to_thread(self._between, partition, next_, first)
            if missing:
                log.warning("dropped batch read again", partition=partition, first=next_, clicks=len(missing))
            records = [*missing, *records]
        self._next[partition] = max(next_, records[-1].offset + 1)
        return records

    def forget(self, partitions: Iterable[int]) -> None:
        for partition in partitions:
            self._next.pop(partition, None)

    def _committed(self, partition: int) -> int:
        topic = self._settings.topics.clicks.name
        return committed_offsets(self._settings.connection, self._settings.worker.group, topic).get(partition, 0)

    def _between(self, partition: int, first: int, end: int) -> list[Record]:
        topic = self._settings.topics.clicks.name
        batches = read_window(
            self._settings.connection, topic, offsets={partition: first}, only=[partition], until={partition: end}
        )
        return [record for batch in batches for record in batch]
