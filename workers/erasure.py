"""Erasing users: the wish goes into the topic of the clicks, in one order with what the user did.

DELETE /v1/users/ID, upwell erase -> upwell.clicks -> worker: null in upwell.users, null in upwell.recommendations,
nulls in upwell.dead-letters, then the commit                     -> trainer: out of the window
The receipt is the wish's place, which names nobody: what has become of it is read from Kafka, and nothing is kept.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import kafka
from kafka import TopicPartition
from kafka.admin import ConfigResource

from stream.answers import Erased
from stream.connection import Connection
from stream.consumer import MissingTopic, committed_offsets, open_consumer, read_window
from stream.events import BadEvent, Erasure, decode_record
from stream.producer import ClickProducer
from workers.settings import Settings

UNCOMMITTED = "read_uncommitted"  # a wish is in no transaction: it does not wait for a click's that is open before it
FOR_EVER_MS = 10 * 365 * 24 * 60 * 60 * 1000  # a topic compacted without max.compaction.lag.ms has 2^63 - 1 there
SLACK_MS = 10 * 60 * 1000  # Kafka looks for what to delete every 5 minutes, and deletes a minute later


class UnknownReceipt(ValueError):
    """No erasure stands there."""


def ask(producer: ClickProducer, user_id: str, longest_ms: Callable[[], int | None]) -> Erased:
    """The wish is in Kafka when this returns. Raises BadEvent, BufferFull, DeliveryError as `ClickProducer.send`."""
    now_ms, span_ms = time.time_ns() // 1_000_000, longest_ms()  # first: what it raises must not follow a wish
    partition, offset = producer.erase(user_id, now_ms)
    return Erased(
        receipt=f"{partition}-{offset}",
        partition=partition,
        offset=offset,
        requested_ms=now_ms,
        gone_by_ms=None if span_ms is None else now_ms + span_ms,
    )


def status(settings: Settings, receipt: str) -> Erased:
    """What has become of an erasure. Raises UnknownReceipt."""
    connection, topic = settings.connection, settings.topics.clicks.name
    if not re.fullmatch(r"\d{1,9}-\d{1,18}", receipt):
        raise UnknownReceipt(f"{receipt}: not PARTITION-OFFSET")
    partition, offset = map(int, receipt.split("-"))
    with closing(open_consumer(connection, UNCOMMITTED)) as consumer:
        part = TopicPartition(topic, partition)
        if partition not in (consumer.partitions_for_topic(topic) or ()):
            raise UnknownReceipt(f"{receipt}: no partition {partition}")
        first, end = consumer.beginning_offsets([part])[part], consumer.end_offsets([part])[part]
    if offset >= end:
        raise UnknownReceipt(f"{receipt}: nothing stands there yet")
    cleared = committed_offsets(connection, settings.group, topic).get(partition, 0) > offset
    found = Erased(receipt=receipt, partition=partition, offset=offset, requested_ms=None, cleared=cleared)
    if offset < first:
        found.gone = True
        return found
    found.requested_ms = _asked_ms(connection, topic, partition, offset)
    span_ms = longest_ms(settings)
    found.gone_by_ms = None if span_ms is None else found.requested_ms + span_ms
    return found


def waiting_wishes(settings: Settings) -> Iterator[tuple[str, int]]:
    """User and offset of each wish that the workers have not committed. Raises KafkaError, TimeoutError, ValueError."""
    topic, connection = settings.topics.clicks.name, settings.connection
    committed = committed_offsets(connection, settings.group, topic)
    for record in read_window(connection, topic, offsets=committed, isolation_level=UNCOMMITTED):
        if b'"erase"' not in (record.value or b""):  # to decode all of a long lag would take minutes
            continue
        with suppress(BadEvent):
            if isinstance(event := decode_record(record.value, record.key, record.timestamp), Erasure):
                yield event.user_id, record.offset


def _asked_ms(connection: Connection, topic: str, partition: int, offset: int) -> int:
    """Kafka's stamp of the wish."""
    place, until = {partition: offset}, {partition: offset + 1}
    for record in read_window(connection, topic, None, place, [partition], until, UNCOMMITTED):
        try:
            if isinstance(decode_record(record.value, record.key, record.timestamp), Erasure):
                return record.timestamp
        except BadEvent:
            break
    raise UnknownReceipt(f"{partition}-{offset}: no erasure stands there")


def longest_ms(settings: Settings) -> int | None:
    """How long Kafka may hold a user's id after the erasure: the longest of the topics that hold ids, as they are set.

    Of a topic with retention: that, and a segment's span. Of a compacted one: until the segment closes, until it is
    compacted, as long as tombstones are kept, and until the next compaction. None: for ever, by a retention of -1 or
    a span above FOR_EVER_MS. Raises MissingTopic.
    """
    spans, topics = [SLACK_MS], settings.topics
    names = [topic.name for topic in (topics.clicks, topics.users, topics.recommendations, topics.dead_letters)]
    with kafka.KafkaAdminClient(**settings.connection.kafka_python()) as admin:
        resources = [ConfigResource("TOPIC", name) for name in names]
        configs = admin.describe_configs(resources, config_filter="all")["topic"]
    if missing := [name for name in names if not configs[name]]:
        raise MissingTopic(*missing)
    for name in names:
        config = {key: int(configs[name][key]["value"]) for key in ("retention.ms", "segment.ms",
                  "max.compaction.lag.ms", "delete.retention.ms")}  # fmt: skip
        if "delete" in configs[name]["cleanup.policy"]["value"]:
            if config["retention.ms"] < 0:
                return None
            spans.append(config["retention.ms"] + config["segment.ms"] + SLACK_MS)
        else:
            lag_ms = config["max.compaction.lag.ms"]
            spans.append(min(lag_ms, config["segment.ms"]) + 2 * lag_ms + config["delete.retention.ms"] + SLACK_MS)
    return span_ms if (span_ms := max(spans)) < FOR_EVER_MS else None
