"""Sending clicks and items. What has been sent is delivered, or the next call says that it was not."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import kafka
import msgspec
from kafka.partitioner.default import murmur2

from stream.closing import Closing
from stream.connection import Connection
from stream.events import MAX_ITEM_BYTES, OFFSET_HEADER, Click, Erasure, Item, decode, decode_click, encode
from stream.pseudonyms import Pseudonyms
from stream.topics import Topics
from stream.tracing import Header, sent_in_span

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

METADATA_MS = 5000
# kafka-python 3.0.12 gives its producer id up with the first batch that expires in a retry, never asks for
# another, and from then on delivers nothing and reports nothing (measured). So batches do not expire.
NEVER_MS = 2**31 - 1


class DeliveryError(RuntimeError):
    """Events sent since the last flush did not arrive: send them again (a repeated event_id is harmless)."""


class BufferFull(RuntimeError):
    """The cluster takes events more slowly than they are sent; this event was not taken."""


class Place(NamedTuple):
    """Where a record lies in its topic."""

    partition: int
    offset: int


class Producer(Closing):
    """Raw records; idempotent, acks of all replicas; usable from several threads, of the process that made it.

    max_in_flight: events sent and not yet acknowledged; at the bound `send` waits block_s, then raises
    BufferFull. delivery_s: how long `flush` waits for the acknowledgements. What is in flight is tried for as
    long as this lives: it arrives, once, when the cluster is back.
    """

    def __init__(
        self, connection: Connection, *, max_in_flight: int = 10_000, block_s: float = 5.0, delivery_s: float = 60.0
    ) -> None:
        self._block_s, self._delivery_s = block_s, delivery_s
        self._max_in_flight = max_in_flight
        self._in_flight: set[Future[Place]] = set()
        self._failures: list[BaseException] = []
        self._changed = threading.Condition()  # guards the two above
        self._pid = os.getpid()
        self._options = connection.kafka_python() | {
            "acks": "all",
            "enable_idempotence": True,
            "linger_ms": 5,  # kafka-python sends 14-21 thousand a CPU second: few, larger batches
            "batch_size": 128 * 1024,
            "compression_type": "lz4",
            "max_request_size": 2 * MAX_ITEM_BYTES,
            "max_block_ms": METADATA_MS,
            "bootstrap_timeout_ms": METADATA_MS,
            "delivery_timeout_ms": NEVER_MS,
            "reconnect_backoff_max_ms": 1000,
            "allow_auto_create_topics": False,
        }
        self._opening = threading.Lock()  # guards the next
        self._producer: kafka.KafkaProducer | None = None
        self._open()

    def flush(self) -> None:
        """Returns once all that was sent before the call has arrived; raises DeliveryError otherwise."""
        with self._changed:  # not kafka-python's flush: it returns before the callbacks, and fails on a split batch
            sent = set(self._in_flight)
            arrived = self._changed.wait_for(lambda: sent.isdisjoint(self._in_flight), timeout=self._delivery_s)
        if not arrived:
            raise DeliveryError(f"events not acknowledged in {self._delivery_s} s, still trying")
        self._raise_failures()

    def close(self) -> None:
        """Flushes, then closes. Raises DeliveryError; what is in flight then is given up with the process."""
        self.flush()
        self._abandon()

    def send_raw(
        self, topic: str, key: bytes | None, raw: bytes | None, headers: Sequence[Header] = ()
    ) -> Future[Place]:
        """Its place, once it is acknowledged. Raises BufferFull, DeliveryError (of earlier records; after a fork)."""
        if self._pid != os.getpid():  # the thread that sends is in the parent: nothing would ever leave
            raise DeliveryError("made before a fork: make a producer in each process")
        self._raise_failures()
        ticket: Future[Place] = Future()
        ticket.set_running_or_notify_cancel()  # nobody who waits for it can take it back
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._in_flight) < self._max_in_flight, self._block_s):
                raise BufferFull(
                    f"{self._max_in_flight} events in flight, none acknowledged in {self._block_s} s; "
                    "is the cluster reachable?"
                )
            self._in_flight.add(ticket)
        try:
            self._open().send(topic, raw, key, list(headers)).add_both(self._done, ticket)
        except BaseException as error:
            with self._changed:
                self._in_flight.discard(ticket)
                self._changed.notify_all()
            if isinstance(error, kafka.errors.KafkaTimeoutError):
                raise BufferFull(f"{topic}: no metadata in {METADATA_MS} ms; is the cluster reachable?") from error
            if isinstance(error, kafka.errors.KafkaError):
                raise DeliveryError(f"{topic}: not taken: {error!r}") from error
            raise
        return ticket

    def _open(self) -> kafka.KafkaProducer:
        with self._opening:
            if self._producer is None:
                self._producer = kafka.KafkaProducer(**self._options)
            return self._producer

    def _abandon(self) -> None:
        with self._opening:
            producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(kafka.errors.KafkaTimeoutError):
                producer.close(timeout=1)

    def _done(self, ticket: Future[Place], outcome: Any) -> None:
        failed = isinstance(outcome, BaseException)
        with self._changed:
            self._in_flight.discard(ticket)
            if failed:
                self._failures.append(outcome)
            self._changed.notify_all()
        ticket.set_exception(outcome) if failed else ticket.set_result(Place(outcome.partition, outcome.offset))

    def _raise_failures(self) -> None:
        with self._changed:
            failures, self._failures = self._failures, []
        if failures:
            self._abandon()  # an idempotent kafka-python producer answers all that follows with the same error
            first = failures[0]
            raise DeliveryError(f"{len(failures)} events were not delivered: {first!r}") from first


class ClickProducer(Producer):
    """Clicks keyed by user, items keyed by item. With `pseudonyms` no user id leaves as it came; with an OpenTelemetry
    `tracer` each click is sent in a span and carries its trace. More: Producer's."""

    def __init__(
        self,
        connection: Connection,
        topics: Topics,
        pseudonyms: Pseudonyms | None = None,
        tracer: Tracer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(connection, **options)
        self._topics, self._pseudonyms, self._tracer = topics, pseudonyms, tracer

    def send(self, click: Click) -> Future[Place]:
        """As send_raw. Raises BadEvent, too, for a click that every reader would refuse."""
        raw = encode(click)
        decode_click(raw)  # before the id is replaced: a pseudonym would hide one that is none
        if self._pseudonyms:
            click = msgspec.structs.replace(click, user_id=self._pseudonyms.of(click.user_id))
            raw = encode(click)
        topic, key = self._topics.clicks.name, click.user_id.encode()
        if self._tracer is None:
            return self.send_raw(topic, key, raw)
        return sent_in_span(self._tracer, topic, partial(self.send_raw, topic, key, raw))

    def erase(self, user_id: str, now_ms: int) -> Place:
        """Sends a user's wish to be erased, and waits for its place. Raises as `send` does.

        The null that follows it makes servers and subscribers forget at once: a worker that is behind gets to the wish
        later, and sends another.
        """
        wish = Erasure(event_type="erase", user_id=user_id, requested_ms=now_ms)
        decode(encode(wish), Erasure)
        if self._pseudonyms:
            wish = msgspec.structs.replace(wish, user_id=self._pseudonyms.of(user_id))
        key = wish.user_id.encode()
        sent = self.send_raw(self._topics.clicks.name, key, encode(wish))
        self.flush()
        place = sent.result()
        self.send_raw(self._topics.recommendations.name, key, None, [(OFFSET_HEADER, b"%d" % place.offset)])
        self.flush()
        return place

    def send_item(self, item: Item) -> Future[Place]:
        """Adds or replaces a catalogue item. Raises as `send` does."""
        raw = encode(item)
        decode(raw, Item)
        return self.send_raw(self._topics.items.name, item.item_id.encode(), raw)

    def remove_item(self, item_id: str) -> Future[Place]:
        """Takes an item out of the catalogue. Raises as `send_raw` does."""
        return self.send_raw(self._topics.items.name, item_id.encode(), None)


def partition_of(key: str, num_partitions: int) -> int:
    """The partition that a key goes to, as Kafka's Java client and kafka-python hash it (murmur2)."""
    return int(murmur2(key.encode()) & 0x7FFFFFFF) % num_partitions
