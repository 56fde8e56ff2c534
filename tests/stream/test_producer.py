"""The producer on the real broker: order, validation, and failures that are told."""

import os
import secrets
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.consumer import Record, read_window
from stream.events import BadEvent, Click, Item, decode, decode_click
from stream.producer import BufferFull, ClickProducer, DeliveryError
from stream.topics import Topic, Topics, ensure


def click(number: int, user: str = "u", **context: str) -> Click:
    return Click(event_id=f"e{number}", user_id=user, item_id="i", ts_ms=number, context=context)


def records(connection: Connection, topic: Topic) -> list[Record]:
    return list(read_window(connection, topic.name))


@contextmanager
def frozen(broker: LocalBroker) -> Iterator[None]:
    """The broker does not answer inside this block, and goes on after it."""
    assert broker.pid
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def test_one_user_one_partition_one_order(connection: Connection, topics: Topics) -> None:
    sent = [click(n, f"user-{n % 17}") for n in range(2000)]
    with ClickProducer(connection, topics) as producer:
        for event in sent:
            producer.send(event)
    partitions, orders = defaultdict(set), defaultdict(list)
    for record in records(connection, topics.clicks):
        event = decode_click(record.value)
        assert record.key == event.user_id.encode()
        partitions[event.user_id].add(record.partition)
        orders[event.user_id].append(event)
    assert all(len(found) == 1 for found in partitions.values())
    assert len(set.union(*partitions.values())) == topics.clicks.partitions
    assert orders == {f"user-{u}": sent[u::17] for u in range(17)}


def test_items_and_their_removal(connection: Connection, topics: Topics) -> None:
    item = Item(item_id="a", title="Ä", text="t" * 1000)
    with ClickProducer(connection, topics) as producer:
        producer.send_item(item)
        producer.remove_item("a")
    added, removed = records(connection, topics.items)
    assert (added.key, decode(added.value, Item)) == (b"a", item)
    assert (removed.key, removed.value) == (b"a", None)


def test_a_forked_child_is_told(connection: Connection, topics: Topics, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that sends has stayed with the parent: there a click waited for ever, without a word."""
    with ClickProducer(connection, topics) as producer:
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: -1)
            with pytest.raises(DeliveryError, match="fork"):
                producer.send(click(1))
        producer.send(click(2))
    assert len(records(connection, topics.clicks)) == 1


def test_bad_events_are_refused_before_they_are_sent(connection: Connection, topics: Topics) -> None:
    with ClickProducer(connection, topics) as producer:
        for bad in (click(1, note="x" * 70_000), click(1, user=""), click(2**52)):
            with pytest.raises(BadEvent):
                producer.send(bad)
        with pytest.raises(BadEvent, match="size"):
            producer.send_item(Item(item_id="a", title="", text="x" * 2**20))
    assert records(connection, topics.clicks) == records(connection, topics.items) == []


def test_an_event_the_broker_refuses_is_told_once(connection: Connection) -> None:
    topics = Topics(f"t{secrets.token_hex(4)}", partitions=1)
    topics.clicks = replace(topics.clicks, max_message_bytes=600)
    ensure(topics, connection)
    with ClickProducer(connection, topics) as producer:
        producer.send(click(1, note=secrets.token_hex(1000)))
        with pytest.raises(DeliveryError, match=r"1 events were not delivered: .*TooLarge"):
            producer.flush()
        producer.send(click(2))
    assert [decode_click(r.value).event_id for r in records(connection, topics.clicks)] == ["e2"]


def test_an_outage_is_told_and_then_made_good(broker: LocalBroker, connection: Connection, topics: Topics) -> None:
    with ClickProducer(connection, topics, delivery_s=1.0) as producer:
        producer.send(click(1)).result(20)  # delivery_s is for the outage alone
        with frozen(broker):
            producer.send(click(2))
            with pytest.raises(DeliveryError, match=r"not acknowledged in 1\.0 s"):
                producer.flush()
        producer.send(click(3)).result(20)
    arrived = [decode_click(r.value).event_id for r in records(connection, topics.clicks)]
    assert arrived == ["e1", "e2", "e3"]


def test_a_full_buffer_is_told_and_drains(broker: LocalBroker, connection: Connection, topics: Topics) -> None:
    with ClickProducer(connection, topics, max_in_flight=3, block_s=0.1) as producer:
        producer.send(click(0))
        producer.flush()
        with frozen(broker):
            for number in (1, 2, 3):
                producer.send(click(number))
            with pytest.raises(BufferFull, match="3 events in flight"):
                producer.send(click(4))
        producer.flush()
        producer.send(click(5))
    assert len(records(connection, topics.clicks)) == 5


def test_a_sent_event_says_where_it_lies(broker: LocalBroker, connection: Connection, topics: Topics) -> None:
    with ClickProducer(connection, topics) as producer:
        places = {f"e{n}": producer.send(click(n, f"user-{n % 7}")) for n in range(100)}
        item = producer.send_item(Item(item_id="a", title="A"))
        producer.flush()
        with frozen(broker):
            late = producer.send(click(100))
            assert not late.cancel() and not late.done()
        late.result(20)
    found = {decode_click(r.value).event_id: (r.partition, r.offset) for r in records(connection, topics.clicks)}
    assert found == {event_id: place.result(0) for event_id, place in places.items()} | {"e100": late.result(0)}
    assert [(r.partition, r.offset) for r in records(connection, topics.items)] == [item.result(0)]
