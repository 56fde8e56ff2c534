"""Reading windows and tails on the real broker, with every kind of hole a log can have."""

import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import kafka
import pytest
from kafka import TopicPartition

from stream import consumer as consumer_module
from stream.connection import Connection
from stream.consumer import MissingTopic, Record, read_window, tail
from stream.topics import Topics


@pytest.fixture
def producer(connection: Connection) -> Iterator[kafka.KafkaProducer]:
    producer = kafka.KafkaProducer(**connection.kafka_python())
    yield producer
    producer.close()


def send(producer: kafka.KafkaProducer, topic: str, values: range, partition: int = 0) -> None:
    for value in values:
        producer.send(topic, str(value).encode(), b"k", partition=partition)
    producer.flush()


def values(records: Iterable[Record]) -> list[int]:
    return sorted(int(record.value or b"-1") for record in records)


def test_a_window_by_arrival_time(connection: Connection, topics: Topics, producer: kafka.KafkaProducer) -> None:
    topic = topics.clicks.name
    assert list(read_window(connection, topic)) == []
    send(producer, topic, range(5))
    send(producer, topic, range(5, 8), partition=1)
    middle = producer.send(topic, b"8", b"k", partition=0).get(5)
    send(producer, topic, range(9, 12))
    assert values(read_window(connection, topic)) == list(range(12))
    late = values(read_window(connection, topic, since_ms=middle.timestamp))
    assert set(range(8, 12)) <= set(late)
    first = next(r.timestamp for r in read_window(connection, topic) if r.partition == 0)
    assert values(read_window(connection, topic, since_ms=first)) == list(range(12))
    assert values(read_window(connection, topic, since_ms=middle.timestamp + 60_000)) == []


def test_a_window_by_offsets(connection: Connection, topics: Topics, producer: kafka.KafkaProducer) -> None:
    topic = topics.clicks.name
    send(producer, topic, range(5))
    send(producer, topic, range(5, 8), partition=1)
    assert values(read_window(connection, topic, offsets={0: 3, 1: 1})) == [3, 4, 6, 7]
    assert values(read_window(connection, topic, offsets={0: 5})) == [5, 6, 7]
    with pytest.raises(ValueError, match=r"clicks\[1\]: offset 4 is beyond the end 3"):
        list(read_window(connection, topic, offsets={1: 4}))
    with pytest.raises(MissingTopic, match="no such topic: nowhere; `upwell topics` creates what is missing"):
        list(read_window(connection, "nowhere"))


def test_offsets_deleted_since(connection: Connection, topics: Topics, producer: kafka.KafkaProducer) -> None:
    topic = topics.clicks.name
    send(producer, topic, range(6))
    send(producer, topic, range(6, 9), partition=1)
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        admin.delete_records({TopicPartition(topic, 0): 4, TopicPartition(topic, 1): 3})
    assert values(read_window(connection, topic, offsets={0: 2, 1: 0})) == [4, 5]
    assert values(read_window(connection, topic)) == [4, 5]


def test_a_log_that_ends_without_a_record(connection: Connection, topics: Topics) -> None:
    """A commit marker and an aborted transaction behind the last record a reader may see."""
    topic = topics.users.name
    writer = kafka.KafkaProducer(**connection.kafka_python(), transactional_id=topics.prefix)
    writer.init_transactions()
    writer.begin_transaction()
    send(writer, topic, range(3))
    writer.commit_transaction()
    writer.begin_transaction()
    send(writer, topic, range(3, 6))
    writer.abort_transaction()
    writer.close()
    assert values(read_window(connection, topic)) == [0, 1, 2]


def test_a_compacted_log(connection: Connection, producer: kafka.KafkaProducer) -> None:
    """Offsets 0-99 are gone; both readers still find their way to the end."""
    topic = f"compacted-{secrets.token_hex(4)}"
    config = {"cleanup.policy": "compact", "segment.ms": "100", "delete.retention.ms": "0"}
    config |= {"min.cleanable.dirty.ratio": "0.01", "max.compaction.lag.ms": "100"}
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        admin.create_topics({topic: {"num_partitions": 1, "configs": config}}, wait_for_metadata=True)
    send(producer, topic, range(100))
    producer.send(topic, None, b"k", partition=0)  # a tombstone, the last of its key
    deadline, seen = time.monotonic() + 60, list(range(100))
    while 0 in seen and time.monotonic() < deadline:
        last = producer.send(topic, b"100", b"other").get(5)
        seen = values(read_window(connection, topic))
    assert set(seen) <= {-1, 100}
    assert last.offset > 100
    stop = threading.Event()
    assert {r.offset for batch in tail(connection, [topic], stop, stop.set) for r in batch} >= {last.offset}


def test_a_window_ends_where_it_ended_at_its_start(
    connection: Connection, topics: Topics, producer: kafka.KafkaProducer
) -> None:
    """10 MB, so that the last of several fetches brings what was sent meanwhile, too."""
    topic = topics.clicks.name
    for value in range(100):
        producer.send(topic, str(value).ljust(100_000).encode(), b"k", partition=0)
    producer.flush()
    seen: list[int] = []
    for record in read_window(connection, topic):
        seen.append(int(record.value or b"-1"))
        if len(seen) % 20 == 1:
            send(producer, topic, range(100, 150))
            send(producer, topic, range(100, 150), partition=1)
    assert seen == list(range(100))


class Stalled(SimpleNamespace):
    """A consumer of one partition that holds ten records and gives none."""

    def __init__(self) -> None:
        super().__init__(close=lambda: None, assign=lambda _: None, seek=lambda *_: None, pause=lambda *_: None)

    def partitions_for_topic(self, topic: str) -> set[int]:
        return {0}

    def end_offsets(self, partitions: list[Any]) -> dict[Any, int]:
        return dict.fromkeys(partitions, 10)

    def beginning_offsets(self, partitions: list[Any]) -> dict[Any, int]:
        return dict.fromkeys(partitions, 0)

    def poll(self, timeout_ms: int) -> dict[Any, Any]:
        return {}

    def position(self, part: TopicPartition) -> int:
        return 0


def test_a_read_that_makes_no_progress_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """kafka-python's known stalls: a role that waits for ever at its start looks alive."""
    monkeypatch.setattr(consumer_module, "STALL_S", 0.05)
    monkeypatch.setattr(consumer_module, "open_consumer", lambda *_, **__: Stalled())
    with pytest.raises(TimeoutError, match=r"no progress for 0\.05 s"):
        list(read_window(Connection("127.0.0.1:1"), "t"))


def test_a_tail_catches_up_once_and_goes_on(
    connection: Connection, topics: Topics, producer: kafka.KafkaProducer
) -> None:
    users, generations = topics.users.name, topics.generations.name
    send(producer, users, range(10))
    send(producer, users, range(10, 20), partition=1)
    stop, seen, caught_up = threading.Event(), list[int](), list[int]()

    def more() -> None:
        caught_up.append(len(seen))
        send(producer, generations, range(20, 22))

    for batch in tail(connection, [users, generations], stop, more):
        seen += [int(record.value or b"-1") for record in batch]
        if 21 in seen:
            stop.set()
    assert caught_up == [20]
    assert sorted(seen) == list(range(22))


def test_a_tail_of_empty_topics_has_caught_up(connection: Connection, topics: Topics) -> None:
    stop = threading.Event()
    assert not any(tail(connection, [topics.models.name], stop, stop.set))
    assert stop.is_set()
