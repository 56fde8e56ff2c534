"""The trainer's window, without a Kafka: how much of it is held, in which order, and which click is new."""

import time
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
from kafka.errors import KafkaTimeoutError

from stream.events import Click, Erasure, Event, encode
from stream.topics import DAY_MS
from tests.records import Record
from workers import training_input
from workers.settings import Settings
from workers.settings import Trainer as TrainerSettings
from workers.training_input import Window

NOW_MS = time.time_ns() // 1_000_000
NEWEST = 1_000


def record(user_id: str, event_id: str, offset: int, partition: int = 0, ts_ms: int = NOW_MS) -> Record:
    click = Click(event_id=event_id, user_id=user_id, item_id="i", ts_ms=ts_ms)
    return Record(user_id.encode(), encode(click), offset, "clicks", partition, ts_ms + offset)


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> Callable[[Iterator[Record]], Window]:
    def made(records: Iterator[Record]) -> Window:
        monkeypatch.setattr(training_input, "read_window", lambda *_, **__: records)
        return Window(Settings(trainer=TrainerSettings(window_events=NEWEST)))

    return made


def month(partitions: int, each: int) -> Iterator[Record]:
    """One partition after the other, as Kafka may give them; their clicks arrived in turns."""
    for partition in range(partitions):
        yield from (record(f"u{partition}", f"e{partition}-{at}", at, partition) for at in range(each))


def test_of_a_long_window_the_newest_clicks_are_read_and_no_more_are_held(
    window: Callable[[Iterator[Record]], Window],
) -> None:
    read = window(month(3, 20_000))
    tracemalloc.start()
    reads = read.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    newest = [(at, partition) for at in range(20_000) for partition in range(3)][-NEWEST:]
    assert [(one.offset, one.partition) for one in reads] == newest
    assert read.offsets == dict.fromkeys(range(3), 20_000)
    assert peak < 5_000 * NEWEST  # bytes: two windows are 1.4 MB, all 60,000 clicks 40


def test_an_erasure_is_heeded_however_many_clicks_come_after_it(window: Callable[[Iterator[Record]], Window]) -> None:
    """The trainer may hold older clicks of that user."""

    wish: Event = Erasure(event_type="erase", user_id="gone", requested_ms=NOW_MS)
    first = [record("gone", "e", 0), Record(b"gone", encode(wish), 1, timestamp=NOW_MS + 1)]
    read = window(iter([*first, *(record("u", f"e{at}", at) for at in range(2, 3_000))]))
    assert len(read.read()) == NEWEST and read.erased == {"gone": 1}


def test_what_is_older_than_the_window_is_read_once_and_left_out(window: Callable[[Iterator[Record]], Window]) -> None:
    """A partition that holds nothing else, too: what has no offset is read from its beginning at every look."""
    old = [record("u", "e", 0, partition, NOW_MS - 31 * DAY_MS) for partition in (0, 1)]
    read = window(iter([*old, record("v", "e", 1)]))
    assert [(one.partition, one.offset) for one in read.read()] == [(0, 1)] and read.offsets == {0: 2, 1: 1}


def test_an_event_id_counts_once_a_user(window: Callable[[Iterator[Record]], Window]) -> None:
    """As in the users' states: a client may number its own clicks."""
    sent = [record("u", "1", 0), record("v", "1", 1), record("u", "1", 2), record("u", "2", 3)]
    reads = window(iter(sent)).read()
    assert [(one.click.user_id, one.click.event_id) for one in reads] == [("u", "1"), ("v", "1"), ("u", "2")]


def test_a_read_that_breaks_off_is_made_again(
    window: Callable[[Iterator[Record]], Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker's connection is lost in the middle: what came before it was not given to anyone."""
    clicks = [record("u", f"e{at}", at) for at in range(10)]

    def broken() -> Iterator[Record]:
        yield from clicks[:3]
        raise KafkaTimeoutError

    read = window(broken())
    with pytest.raises(KafkaTimeoutError):
        read.read()
    monkeypatch.setattr(training_input, "read_window", lambda _, __, ___, offsets: iter(clicks[offsets.get(0, 0) :]))
    assert [one.offset for one in read.read()] == [*range(10)]
