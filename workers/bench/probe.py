"""An open-loop client: clicks at their appointed times whatever comes back, and how long each list took to be read.

A click waits from the time it was due, not from when it was sent: a client that falls behind, or waits for answers,
would hide what its users wait for (coordinated omission).
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from stream.events import Click, encode
from stream.producer import partition_of
from workers.settings import Settings

PATIENCE_S = 30.0


class Seen(NamedTuple):
    """One click's way: wall times in milliseconds; the middle two are NaN where the answer does not name them."""

    due: float
    clicked: float
    sent: float
    read: float


class Answer(msgspec.Struct):
    """What ours and the peer's lists have in common."""

    user_id: str
    event_id: str
    items: list[msgspec.Raw]
    clicked_ms: float = float("nan")
    sent_ms: float = float("nan")


def drive(settings: Settings, clicks: Sequence[Click], per_s: float) -> list[Seen]:
    """Sends the clicks, `per_s` a second. Raises TimeoutError when a list is still missing PATIENCE_S later."""
    return asyncio.run(_drive(settings, clicks, per_s))


async def _drive(settings: Settings, clicks: Sequence[Click], per_s: float) -> list[Seen]:
    topics, partitions = settings.topics, settings.kafka.partitions
    consumer = AIOKafkaConsumer(**settings.connection.kafka_python(), auto_offset_reset="latest")
    producer = AIOKafkaProducer(**settings.connection.kafka_python(), acks="all", enable_idempotence=True)
    await asyncio.gather(consumer.start(), producer.start())
    consumer.assign([TopicPartition(topics.recommendations.name, number) for number in range(partitions)])
    await consumer.seek_to_end()
    waiting: dict[str, deque[tuple[str, float]]] = {}
    reading = asyncio.create_task(read_lists(consumer, waiting, len(clicks)))
    began = time.time()
    for number, click in enumerate(clicks):
        due = began + number / per_s
        if (pause := due - time.time()) > 0:
            await asyncio.sleep(pause)
        waiting.setdefault(click.user_id, deque()).append((click.event_id, 1000 * due))
        partition = partition_of(click.user_id, partitions)
        await producer.send(topics.clicks.name, encode(click), click.user_id.encode(), partition)
    try:
        async with asyncio.timeout(PATIENCE_S + len(clicks) / 100):
            return await reading
    finally:
        reading.cancel()
        await asyncio.gather(consumer.stop(), producer.stop())


async def read_lists(consumer: Any, waiting: dict[str, deque[tuple[str, float]]], count: int) -> list[Seen]:
    """A list answers the click that it names and those of its user before it."""
    decoder, seen = msgspec.json.Decoder(Answer), list[Seen]()
    while len(seen) < count:
        for records in (await consumer.getmany(timeout_ms=1000)).values():
            read = 1000 * time.time()
            for answer in (decoder.decode(record.value) for record in records):
                line = waiting.get(answer.user_id, deque())
                if not answer.items or all(event_id != answer.event_id for event_id, _ in line):
                    continue  # answered before: a list that was sent again
                while line:
                    event_id, due = line.popleft()
                    seen.append(Seen(due, answer.clicked_ms, answer.sent_ms, read))
                    if event_id == answer.event_id:
                        break
    return seen
