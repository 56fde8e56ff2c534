"""Batches on the real broker: everything arrives, in order, however it is cut."""

import asyncio
import time
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.cluster import ClusterMetadata
from aiokafka.errors import KafkaConnectionError, KafkaTimeoutError, UnknownTopicOrPartitionError
from aiokafka.protocol.coordination import FindCoordinatorRequest

from stream.connection import Connection
from stream.consumer import read_window
from stream.topics import Topics
from workers.sender import MAX_RECORD_BYTES, BatchSender


async def test_more_than_a_batch_arrives_in_order(connection: Connection, topics: Topics) -> None:
    records = [(f"k{number}".encode(), number.to_bytes(4, "big") * 25_000) for number in range(40)]  # 4 MB
    sender = BatchSender(connection)
    await sender.start()
    try:
        await sender.send(topics.users.name, 1, records)
        await sender.send(topics.users.name, 1, [])
        await sender.send(topics.users.name, 1, [(b"gone", None)])
        with pytest.raises(ValueError, match=f"at most {MAX_RECORD_BYTES}"):
            await sender.send(topics.users.name, 1, [(b"k", b"x" * (MAX_RECORD_BYTES + 1))])
    finally:
        await sender.stop()
    found = list(read_window(connection, topics.users.name))
    assert [(record.key, record.value) for record in found] == [*records, (b"gone", None)]
    assert {record.partition for record in found} == {1}


async def test_a_connection_that_ends_under_the_question_for_the_coordinator_ends_nothing(
    connection: Connection, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that stops takes one more request of each connection."""
    send, asked = AIOKafkaClient.send, 0

    async def ended(self: AIOKafkaClient, node: int, request: Any, **rest: Any) -> Any:
        nonlocal asked
        if isinstance(request, FindCoordinatorRequest):
            asked += 1
            if asked == 1:
                raise KafkaConnectionError("Connection at localhost closed") from asyncio.IncompleteReadError(b"", 4)
        return await send(self, node, request, **rest)

    monkeypatch.setattr(AIOKafkaClient, "send", ended)
    sender = BatchSender(connection, transactional_id=f"{topics.users.name}-1")
    await sender.start()
    try:
        await sender.begin()
        await sender.send(topics.users.name, 1, [(b"k", b"v")])
        await sender.commit()
    finally:
        await sender.stop()
    assert asked > 1
    assert len(list(read_window(connection, topics.users.name))) == 1


async def arrived(connection: Connection, topics: Topics) -> list[tuple[bytes | None, bytes | None]]:
    """What is in Kafka when a sender says that its one record is."""
    sender = BatchSender(connection)
    await sender.start()
    try:
        await sender.send(topics.users.name, 1, [(b"k", b"v")])
    finally:
        await sender.stop()
    return [(record.key, record.value) for record in read_window(connection, topics.users.name)]


async def test_a_batch_that_is_not_taken_is_sent_all_the_same(
    connection: Connection, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is away at a producer's first batch: no answer tells it of the topic."""
    send, refusals = AIOKafkaProducer.send_batch, [KafkaTimeoutError(), UnknownTopicOrPartitionError()]

    async def refused(*arguments: Any, **rest: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return await send(*arguments, **rest)

    monkeypatch.setattr(AIOKafkaProducer, "send_batch", refused)
    assert await arrived(connection, topics) == [(b"k", b"v")]


async def test_those_who_send_to_one_partition_at_once_wait_in_turn(
    connection: Connection, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all partitions' dead letters do: aiokafka would count what each waits several times over, and give up."""
    send, asking, most = AIOKafkaProducer.send_batch, 0, 0

    async def counted(*arguments: Any, **rest: Any) -> Any:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        try:
            await asyncio.sleep(0.01)
            return await send(*arguments, **rest)
        finally:
            asking -= 1

    monkeypatch.setattr(AIOKafkaProducer, "send_batch", counted)
    sender = BatchSender(connection)
    await sender.start()
    try:
        await asyncio.gather(*(sender.send(topics.users.name, 1, [(b"k%d" % number, b"v")]) for number in range(9)))
    finally:
        await sender.stop()
    assert most == 1
    assert len(list(read_window(connection, topics.users.name))) == 9


async def test_a_batch_waits_for_a_leader_however_long(
    connection: Connection, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that stops in order says that nobody leads its partitions any more."""
    lead, leaderless_until = ClusterMetadata.leader_for_partition, time.monotonic() + 3
    monkeypatch.setattr("stream.connection.REQUEST_S", 1.0)
    monkeypatch.setattr(
        ClusterMetadata,
        "leader_for_partition",
        lambda self, partition: -1 if time.monotonic() < leaderless_until else lead(self, partition),
    )
    assert await arrived(connection, topics) == [(b"k", b"v")]
    assert time.monotonic() > leaderless_until
