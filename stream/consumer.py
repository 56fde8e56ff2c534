"""Reading topics without a consumer group: a window of the past, or everything and then whatever comes.

Progress is the consumer's position, never the last record's offset: compaction, deletion and transaction
markers leave offsets behind which there is no record.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

import kafka
from kafka import TopicPartition

from stream.connection import Connection

STALL_S = 60.0  # without one offset of progress: kafka-python's known stalls hide in one partition
MIB = 1024 * 1024


class MissingTopic(ValueError):
    """The topics have not been made, or this login may not see them."""

    def __init__(self, *names: str) -> None:
        what = ", ".join(names)
        super().__init__(f"no such topic: {what}; `upwell topics` creates what is missing, if it is not hidden from us")


class Record(Protocol):
    """What a read yields: kafka-python's ConsumerRecord."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...  # ms, when the broker took it
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...
    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...


def read_window(
    connection: Connection,
    topic: str,
    since_ms: int | None = None,
    offsets: Mapping[int, int] | None = None,
    only: Collection[int] | None = None,
    until: Mapping[int, int] | None = None,
    isolation_level: str = "read_committed",
) -> Iterator[Record]:
    """The records of `topic` up to the ends found at the start, each partition in its order.

    `only`: these partitions, all by default. `until`: an end before the present one (partition -> offset).

    Starts at `offsets` (partition -> first offset wanted; a partition not named, or whose offset has been
    deleted since, from what is left of it) or at the first record that arrived at `since_ms`; with neither,
    at the beginning. Arrival is the broker's clock: an event's own time is the caller's to check.
    Raises ValueError for an offset beyond the end (the topic is not the one the offsets are of),
    TimeoutError when a partition makes no progress for STALL_S.
    """
    with closing(open_consumer(connection, isolation_level)) as consumer:
        partitions = [part for part in partitions_of(consumer, [topic]) if only is None or part.partition in only]
        ends = {
            part: min(end, (until or {}).get(part.partition, end))
            for part, end in consumer.end_offsets(partitions).items()
        }
        starts = _starts(consumer, partitions, ends, since_ms, offsets)
        left = {part for part in partitions if starts[part] < ends[part]}
        consumer.assign(left)
        for part in left:
            consumer.seek(part, starts[part])
        stalled_at = time.monotonic() + STALL_S
        before: dict[Any, int] = {}
        while left:
            polled = consumer.poll(timeout_ms=500)
            positions = {part: consumer.position(part) for part in left}
            if positions != before:
                before, stalled_at = positions, time.monotonic() + STALL_S
            elif time.monotonic() > stalled_at:
                raise TimeoutError(f"no progress for {STALL_S} s towards {ends} from {positions}")
            done = {part for part in left if positions[part] >= ends[part]}
            consumer.pause(*done)
            left -= done
            yield from (r for part, records in polled.items() for r in records if r.offset < ends[part])


def tail(
    connection: Connection, topics: Sequence[str], stop: threading.Event, on_caught_up: Callable[[], None]
) -> Iterator[list[Record]]:
    """All records of `topics` from the beginning, then the new ones as they come, until `stop` is set.

    Yields at least every 0.2 s, an empty list where nothing has come, so that the caller can do other work.
    Calls `on_caught_up` once, when everything that was there at the start has been yielded and the caller
    has come back for more. Outlives a broker's restart. Order holds within a partition only.

    Reads uncommitted records too: a user's state is followed as it is folded, not when its transaction ends.
    """
    with closing(open_consumer(connection, isolation_level="read_uncommitted")) as consumer:
        partitions = partitions_of(consumer, topics)
        ends: dict[Any, int] | None = consumer.end_offsets(partitions)
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        while not stop.is_set():
            if ends and all(consumer.position(part) >= ends[part] for part in partitions):
                ends = None
                on_caught_up()
            polled = consumer.poll(timeout_ms=200)
            yield [record for records in polled.values() for record in records]


def end_offsets(connection: Connection, topic: str) -> dict[int, int]:
    """Partition -> the offset that its next record gets."""
    with closing(open_consumer(connection)) as consumer:
        ends = consumer.end_offsets(partitions_of(consumer, [topic]))
        return {part.partition: end for part, end in ends.items()}


def committed_offsets(connection: Connection, group: str, topic: str) -> dict[int, int]:
    """Partition -> offset that the group goes on from; without those that it has never committed.

    Waits while the broker is still electing or loading the group's coordinator, up to STALL_S.
    """
    deadline = time.monotonic() + STALL_S
    while True:
        try:
            with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
                (found,) = admin.list_group_offsets([group]).values()
        except kafka.errors.KafkaError as error:
            if not error.retriable or time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            return {part.partition: at.offset for part, at in found.items() if part.topic == topic and at.offset >= 0}


def open_consumer(connection: Connection, isolation_level: str = "read_committed") -> kafka.KafkaConsumer:
    """A consumer without a group: assign and seek it. By default aborted transactions are invisible to it."""
    return kafka.KafkaConsumer(
        **connection.kafka_python(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # where retention has overtaken the reader
        isolation_level=isolation_level,
        allow_auto_create_topics=False,
        max_poll_records=20_000,
        max_partition_fetch_bytes=4 * MIB,
        reconnect_backoff_max_ms=1000,
        metrics_sample_window_ms=2500,  # two of them are what `Subscriber.connected` looks back
    )


def partitions_of(consumer: kafka.KafkaConsumer, topics: Sequence[str]) -> list[Any]:
    """Raises MissingTopic."""
    found = {topic: consumer.partitions_for_topic(topic) for topic in topics}
    missing = [topic for topic, parts in found.items() if not parts]
    if missing:
        raise MissingTopic(*missing)
    return [TopicPartition(topic, part) for topic, parts in found.items() for part in sorted(parts)]


def _starts(
    consumer: kafka.KafkaConsumer,
    partitions: list[Any],
    ends: Mapping[Any, int],
    since_ms: int | None,
    offsets: Mapping[int, int] | None,
) -> dict[Any, int]:
    """First offset to read of each partition."""
    starts: dict[Any, int] = consumer.beginning_offsets(partitions)
    if since_ms is not None:
        hints = consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
        # No hint: nothing arrived that late, so far.
        return {part: hint.offset if hint else ends[part] for part, hint in hints.items()}
    for part, first in starts.items():
        wanted = (offsets or {}).get(part.partition, first)
        if wanted > ends[part]:
            raise ValueError(f"{part.topic}[{part.partition}]: offset {wanted} is beyond the end {ends[part]}")
        starts[part] = max(first, wanted)
    return starts
