"""Sending clicks and items. What has been sent is delivered, or the next call says that it was not."""

import threading
from types import TracebackType
from typing import Any, Self

import kafka
from kafka.partitioner.default import murmur2

from stream.connection import Connection
from stream.events import MAX_ITEM_BYTES, Click, Item, decode, decode_click, encode
from stream.topics import Topics


class DeliveryError(RuntimeError):
    """Events sent since the last flush did not arrive: send them again (a repeated event_id is harmless)."""


class BufferFull(RuntimeError):
    """The cluster takes events more slowly than they are sent; this event was not taken."""


class Producer:
    """Raw records; idempotent, acks of all replicas; usable from several threads.

    max_in_flight: events sent and not yet acknowledged; at the bound `send` waits block_s, then raises
    BufferFull. delivery_s: how long an event may try before it counts as not delivered.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        max_in_flight: int = 10_000,
        block_s: float = 5.0,
        delivery_s: float = 60.0,
    ) -> None:
        self._block_s, self._delivery_s = block_s, delivery_s
        self._max_in_flight = max_in_flight
        self._room = threading.BoundedSemaphore(max_in_flight)
        self._failures: list[BaseException] = []
        self._producer = kafka.KafkaProducer(
            **connection.kafka_python(),
            acks="all",
            enable_idempotence=True,
            linger_ms=5,  # kafka-python sends 14-21 thousand a CPU second: few, larger batches
            batch_size=128 * 1024,
            compression_type="lz4",
            max_request_size=2 * MAX_ITEM_BYTES,
            max_block_ms=int(block_s * 1000),
            delivery_timeout_ms=int(delivery_s * 1000),
            request_timeout_ms=min(30_000, int(delivery_s * 1000) - 10),
            reconnect_backoff_max_ms=1000,
            allow_auto_create_topics=False,
        )

    def flush(self) -> None:
        """Returns once all that was sent has arrived; raises DeliveryError otherwise."""
        try:
            self._producer.flush(timeout=self._delivery_s + 5)
        except kafka.errors.KafkaTimeoutError as error:
            raise DeliveryError("events are still in flight after the flush's time") from error
        self._raise_failures()

    def close(self) -> None:
        """Flushes, then closes. Raises DeliveryError."""
        try:
            self.flush()
        finally:
            self._producer.close(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send_raw(self, topic: str, key: bytes | None, raw: bytes | None) -> None:
        """Raises BufferFull, DeliveryError (of earlier records)."""
        self._raise_failures()
        if not self._room.acquire(timeout=self._block_s):
            raise BufferFull(
                f"{self._max_in_flight} events in flight, none acknowledged in {self._block_s} s; "
                "is the cluster reachable?"
            )
        try:
            future = self._producer.send(topic, raw, key)
        except BaseException:
            self._room.release()
            raise
        future.add_both(self._done)

    def _done(self, outcome: object) -> None:
        self._room.release()
        if isinstance(outcome, BaseException):
            self._failures.append(outcome)

    def _raise_failures(self) -> None:
        if self._failures:
            failures, self._failures = self._failures, []
            raise DeliveryError(f"{len(failures)} events were not delivered: {failures[0]!r}") from failures[
                0
            ]


class ClickProducer(Producer):
    """Clicks keyed by user, items keyed by item. The options are Producer's."""

    def __init__(self, connection: Connection, topics: Topics, **options: Any) -> None:
        super().__init__(connection, **options)
        self._topics = topics

    def send(self, click: Click) -> None:
        """Raises BadEvent for a click that every reader would refuse, BufferFull, DeliveryError (of earlier)."""
        raw = encode(click)
        decode_click(raw)
        self.send_raw(self._topics.clicks.name, click.user_id.encode(), raw)

    def send_item(self, item: Item) -> None:
        """Adds or replaces a catalogue item. Raises as `send` does."""
        raw = encode(item)
        decode(raw, Item)
        self.send_raw(self._topics.items.name, item.item_id.encode(), raw)

    def remove_item(self, item_id: str) -> None:
        """Takes an item out of the catalogue."""
        self.send_raw(self._topics.items.name, item_id.encode(), None)


def partition_of(key: str, num_partitions: int) -> int:
    """The partition that a key goes to, as Kafka's Java client and kafka-python hash it (murmur2)."""
    return int(murmur2(key.encode()) & 0x7FFFFFFF) % num_partitions
