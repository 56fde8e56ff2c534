"""Gaps in what Faust hands on, on the real broker."""

import msgspec
import pytest

from stream.broker import LocalBroker
from stream.consumer import read_window
from stream.producer import ClickProducer, partition_of
from stream.topics import Topics
from tests.workers.service import clicks
from workers.handed import Handed, Stuck
from workers.settings import Kafka, Settings


async def test_what_was_dropped_is_read_again(broker: LocalBroker, topics: Topics) -> None:
    kafka = Kafka(bootstrap=broker.bootstrap, prefix=topics.prefix, partitions=3)
    settings = Settings(kafka=kafka)
    with ClickProducer(settings.connection, topics) as producer:
        for click in clicks(60):
            producer.send(msgspec.structs.replace(click, user_id="one"))
    records = [record for batch in read_window(settings.connection, topics.clicks.name) for record in batch]
    partition, handed = records[0].partition, Handed(settings)

    async def offsets(first: int, end: int) -> list[int]:
        return [record.offset for record in await handed.complete(partition, records[first:end])]

    assert await offsets(8, 20) == list(range(20))  # nothing is committed: from the beginning
    assert await offsets(20, 30) == list(range(20, 30))
    assert await offsets(40, 45) == list(range(30, 45))
    assert await offsets(10, 15) == list(range(10, 15))  # again, after a rebalance: as it is
    assert await offsets(45, 50) == list(range(45, 50))
    handed.forget([partition])
    assert await offsets(50, 60) == list(range(60))  # assigned anew, still nothing is committed


async def test_a_partition_that_stands_still_after_a_second_fetch_is_stuck(
    broker: LocalBroker, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.handed.STUCK_S", 0.0)
    settings = Settings(kafka=Kafka(bootstrap=broker.bootstrap, prefix=topics.prefix, partitions=3))
    with ClickProducer(settings.connection, topics) as producer:
        producer.send(clicks(1)[0])
    handed, partition = Handed(settings), partition_of(clicks(1)[0].user_id, 3)
    looks = [await handed.behind({partition: 1}) for _ in range(2)]
    assert looks == [{}, {partition: 0}]
    with pytest.raises(Stuck):
        await handed.behind({partition: 1})
