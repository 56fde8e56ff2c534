"""What a micro-batch keeps, and what stops the worker, without Kafka."""

from typing import Any, cast

import pytest

from model.user_state import digest
from stream.events import Click, encode
from stream.producer import partition_of
from tests.records import Record
from workers.settings import Kafka, Settings, Worker
from workers.states import Owned
from workers.user_worker import RATIO_MIN, RATIO_WINDOW, TooManyBadEvents, UserWorker


def records(good: list[bool]) -> list[Record]:
    clicks = (Click(event_id=f"e{at}", user_id="u", item_id=f"i{at}", ts_ms=0) for at in range(len(good)))
    pairs = zip(clicks, good, strict=True)
    return [Record(b"u", encode(click) if fine else b"{", at) for at, (click, fine) in enumerate(pairs)]


def made(**worker: Any) -> UserWorker:
    return UserWorker(Settings(worker=Worker(**worker), kafka=Kafka(partitions=1)), *(cast(Any, None),) * 3)


def test_what_a_user_had_seen_is_kept_of_scored_clicks_alone() -> None:
    """A copy of it with each click would be the square of a micro-batch."""
    worker = made(scored_clicks=2, seen=1)
    reads, erased, _ = worker._decode(records([True] * 4), {})
    liked = worker._fold(Owned(cast(Any, {}), cast(Any, None), {}), reads, erased).liked
    assert [before and before.query.seen for _, before in liked] == [b"", digest("i0"), None, None]


def test_a_user_whose_clicks_come_into_another_partition_is_refused_not_split() -> None:
    """librdkafka deals keys by CRC32: beside what HTTP takes, one user would have two states."""
    worker = UserWorker(Settings(kafka=Kafka(partitions=8)), *(cast(Any, None),) * 3)
    here = [record._replace(partition=partition_of("u", 8)) for record in records([True])]
    there = [record._replace(partition=(partition_of("u", 8) + 1) % 8) for record in here]
    assert [len(found) for found in worker._decode(here, {})] == [1, 0, 0]
    reads, _, (letter,) = worker._decode(there, {})
    assert not reads and "murmur2" in letter.cause
    assert len(worker._decode(there, {"u"})[0]) == 1  # whose state is here from before


@pytest.mark.parametrize("batch", [RATIO_MIN, RATIO_WINDOW, 3 * RATIO_WINDOW])
def test_the_share_of_bad_messages_is_of_the_newest_in_their_order_whatever_the_batch(batch: int) -> None:
    def work_off(good: list[bool]) -> None:
        for at in range(0, len(good), batch):
            part = records(good)[at : at + batch]
            worker._check_ratio(part, worker._decode(part, {})[2])

    worker = made(dead_letter_ratio=0.5)
    work_off([at % 3 > 0 for at in range(3 * RATIO_WINDOW)])
    with pytest.raises(TooManyBadEvents, match="of the last 1000 messages"):
        work_off([False] * 3 * RATIO_WINDOW)
