"""Records of a micro-batch to Kafka in aiokafka batches: 166,000 a second and more, where `send` makes 40,000."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, KafkaTimeoutError, NodeNotReadyError, UnknownTopicOrPartitionError

from stream.connection import Connection
from stream.tracing import Header

log = structlog.get_logger()

MAX_BATCH_BYTES = 900_000  # under the topics' limit, before compression
MAX_RECORD_BYTES = MAX_BATCH_BYTES - 1_000  # key and framing on top

Keyed = tuple[bytes | None, bytes | None, *tuple[Header, ...]]


def retriable(lookup: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """aiokafka's producer is lost for good when the connection ends under its question for the coordinator: it tries
    again only for three of the errors that pass (aiokafka 0.14, `Sender._find_coordinator`; like its issue #1151)."""

    async def look_up(*arguments: Any) -> Any:
        try:
            return await lookup(*arguments)
        except KafkaError as error:
            if error.retriable:
                raise NodeNotReadyError(str(error)) from error
            raise

    return look_up


async def queued(producer: AIOKafkaProducer, batch: Any, topic: str, partition: int) -> Awaitable[Any]:
    """A batch taken by the producer. Where Kafka does not answer for a request's time, aiokafka has not heard of the
    topic yet, or has no room, and has taken nothing: that passes, in other connections. aiokafka 0.14 keeps the one in
    which its question for the topics stays without an answer (`AIOKafkaClient._metadata_update`), and asks in it again.
    """
    while True:
        try:
            future: Awaitable[Any] = await producer.send_batch(batch, topic, partition=partition)
        except (UnknownTopicOrPartitionError, KafkaTimeoutError) as error:
            log.warning("batch not taken, tried again", topic=topic, partition=partition, reason=repr(error))
            for connection in list(producer.client._conns.values()):
                connection.close()
        else:
            return future


class BatchSender:
    """Idempotent, acknowledged by all replicas; `send` returns when Kafka has everything.

    With a transactional_id its `start` fences the sender before it of that id, and sends stand between `begin` and
    `commit`; Kafka aborts a transaction that is open for longer than timeout_ms.
    """

    def __init__(self, connection: Connection, transactional_id: str | None = None, timeout_ms: int = 60_000) -> None:
        self._connection, self._transactional_id, self._timeout_ms = connection, transactional_id, timeout_ms
        self._producer: AIOKafkaProducer | None = None
        # One batch of a partition waits for room at a time: aiokafka 0.14 takes from the others' patience again and
        # again what they have waited (`add_batch`), and each that lost it closed the connections (`queued`).
        self._turns = defaultdict[tuple[str, int], asyncio.Lock](asyncio.Lock)

    async def start(self) -> None:
        self._producer = AIOKafkaProducer(
            **self._connection.kafka_python(),
            acks="all",
            enable_idempotence=True,
            transactional_id=self._transactional_id,
            transaction_timeout_ms=self._timeout_ms,
            compression_type="zstd",  # a third of the time of aiokafka's lz4, which is at level 9, and smaller
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=MAX_BATCH_BYTES + 100_000,
        )
        self._producer.client.coordinator_lookup = retriable(self._producer.client.coordinator_lookup)
        # Else a batch without a leader for a request's time is given up, which ends the worker: in an outage, too.
        self._producer._message_accumulator._batch_ttl = math.inf
        await self._producer.start()

    async def stop(self) -> None:
        if self._producer is not None:
            await self._producer.stop()

    async def begin(self) -> None:
        assert self._producer is not None, "begin before start"
        await self._producer.begin_transaction()

    async def commit(self) -> None:
        assert self._producer is not None, "commit before start"
        await self._producer.commit_transaction()

    async def send(self, topic: str, partition: int, records: Iterable[Keyed]) -> None:
        """Raises ValueError for a record over MAX_RECORD_BYTES, KafkaError when Kafka refuses a batch."""
        assert self._producer is not None, "send before start"
        producer, sent = self._producer, list[Awaitable[Any]]()

        async def queue() -> None:
            async with self._turns[topic, partition]:
                sent.append(await queued(producer, batch, topic, partition))

        batch = producer.create_batch()
        for key, value, *headers in records:
            if len(value or b"") > MAX_RECORD_BYTES:  # the first record of a batch is taken at any size
                raise ValueError(f"{topic}: a record of {len(value or b'')} bytes, at most {MAX_RECORD_BYTES}")
            if batch.append(key=key, value=value, timestamp=None, headers=headers) is None:
                await queue()
                batch = producer.create_batch()
                batch.append(key=key, value=value, timestamp=None, headers=headers)
        if batch.record_count():
            await queue()
        await asyncio.gather(*sent)
