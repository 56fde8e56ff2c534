"""Gaps in what Faust hands on, on the real broker; when it is fetched again or given up, without one."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import msgspec
import pytest
from kafka.errors import KafkaTimeoutError, TopicAuthorizationFailedError

from stream.consumer import read_window
from stream.producer import ClickProducer, partition_of
from stream.topics import Topics
from tests.workers.service import clicks
from workers.faust_batches import Fetched
from workers.handed import Handed, Stuck
from workers.settings import Settings


def fetched(records: list[Any]) -> Fetched:
    return Fetched(records[0].offset, records[-1].offset + 1, records)


async def test_what_was_dropped_is_read_again(settings: Settings, topics: Topics) -> None:
    with ClickProducer(settings.connection, topics) as producer:
        for click in clicks(60):
            producer.send(msgspec.structs.replace(click, user_id="one"))
    records = list(read_window(settings.connection, topics.clicks.name))
    partition, handed = records[0].partition, Handed(settings)

    async def offsets(first: int, end: int) -> list[int]:
        return [record.offset for record in await handed.complete(partition, fetched(records[first:end]))]

    assert await offsets(8, 20) == list(range(20))  # nothing is committed: from the beginning
    assert await offsets(20, 30) == list(range(20, 30))
    assert await offsets(40, 45) == list(range(30, 45))
    assert await offsets(10, 15) == list(range(10, 15))  # again, after a rebalance: as it is
    assert await offsets(45, 50) == list(range(45, 50))
    handed.forget([partition])
    assert await offsets(50, 60) == list(range(60))  # assigned anew, still nothing is committed


async def test_a_partition_that_stands_still_after_a_second_fetch_is_stuck(
    settings: Settings, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.handed.STUCK_S", 0.0)
    with ClickProducer(settings.connection, topics) as producer:
        producer.send(clicks(1)[0])
    handed, partition = Handed(settings), partition_of(clicks(1)[0].user_id, 3)
    looks = [await handed.behind({partition: 1}) for _ in range(2)]
    assert looks == [{}, {partition: 0}]
    with pytest.raises(Stuck):
        await handed.behind({partition: 1})


async def test_what_was_forgotten_meanwhile_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebalance during the look: the place of then would make all clicks since look like a gap, hours later."""
    handed = Handed(Settings())

    def rebalance() -> dict[int, int]:
        handed.forget([3])
        return {3: 100}

    monkeypatch.setattr(handed, "_committed", rebalance)
    assert await handed.behind({3: 200}) == {}
    assert not handed._next


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kafka has committed 5 of partition 0 and nothing of 1; `there` is what a read of a gap finds."""
    made: Any = Handed(Settings())
    made.there = []
    monkeypatch.setattr(made, "_committed", lambda: {0: 5})
    monkeypatch.setattr(made, "_between", lambda *_: made.there)
    monkeypatch.setattr("workers.handed.STUCK_S", 0.0)
    return made


async def hand(handed: Any, partition: int, *offsets: int) -> list[int]:
    records = [SimpleNamespace(offset=offset) for offset in offsets]
    return [record.offset for record in await handed.complete(partition, fetched(records))]


async def test_only_what_stands_still_below_its_end_is_fetched_again(handed: Any) -> None:
    assert await hand(handed, 0, 5, 6, 7) == [5, 6, 7]
    assert await handed.behind({0: 20}) == {}  # the first look
    await hand(handed, 0, 8)
    assert await handed.behind({0: 20}) == {}  # it has moved
    assert await handed.behind({0: 20, 1: 4}) == {0: 9}  # and stands; what is committed of 0 is no news
    assert await handed.behind({0: 20, 1: 4}) == {1: 0}  # once for each
    await hand(handed, 0, *range(9, 20))
    assert await handed.behind({0: 20}) == await handed.behind({0: 20}) == {}  # at its end


async def test_a_gap_without_a_click_is_no_reason_to_give_up(handed: Any) -> None:
    """A transaction's marker: the partition stands below its end for good."""
    for _ in range(4):
        await handed.behind({0: 6})
    handed.there = [SimpleNamespace(offset=5)]
    with pytest.raises(Stuck):
        await handed.behind({0: 6})


async def test_kafka_away_for_a_while_is_waited_for(handed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.outage.RETRY_S", 0.0)
    monkeypatch.setattr(handed, "_committed", Mock(side_effect=[KafkaTimeoutError("away"), {0: 5}]))
    found = [TimeoutError("no progress"), [SimpleNamespace(offset=5)]]
    monkeypatch.setattr(handed, "_between", Mock(side_effect=found))
    assert await hand(handed, 0, 6) == [5, 6]
    monkeypatch.setattr(handed, "_committed", Mock(side_effect=TopicAuthorizationFailedError("not yours")))
    with pytest.raises(TopicAuthorizationFailedError):
        await hand(handed, 1, 6)


async def test_what_a_fetch_has_passed_over_is_no_gap(handed: Any) -> None:
    """Markers of a producer's transactions: each would cost a read of its own."""
    handed.there = [SimpleNamespace(offset=7)]
    record = SimpleNamespace(offset=8)
    assert await handed.complete(0, Fetched(5, 6, [])) == []
    assert await handed.complete(0, Fetched(6, 10, [record])) == [record]
    assert await handed.complete(0, Fetched(12, 13, [])) == handed.there  # and what was not fetched is one


async def test_of_a_partition_that_was_away_nothing_is_remembered(handed: Any) -> None:
    for _ in range(2):
        await handed.behind({0: 6})
    handed.there = [SimpleNamespace(offset=5)]
    handed.forget([0])
    assert [await handed.behind({0: 6}) for _ in range(2)] == [{}, {0: 5}]
