"""Keyed hashes of user ids, and that no raw id leaves a producer that has a key."""

import base64
import hashlib
import hmac
import time

import pytest

from model.user_state import EMPTY, Applied, Limits, UserState, apply_clicks
from stream.connection import Connection
from stream.consumer import read_window
from stream.events import Click, decode_click
from stream.producer import ClickProducer
from stream.pseudonyms import Pseudonyms
from stream.topics import Topics, ensure

KEY = b"0123456789abcdef" * 2


def test_it_is_hmac_sha_256_with_the_key_s_name_in_front() -> None:
    key_id, _, digest = Pseudonyms(KEY).of("ü").partition(".")
    assert base64.urlsafe_b64decode(digest + "=") == hmac.new(KEY, "ü".encode(), hashlib.sha256).digest()
    assert key_id == Pseudonyms(KEY).key_id != Pseudonyms(KEY + b"x").key_id
    assert Pseudonyms(KEY).of("u") != Pseudonyms(KEY).of("v") != Pseudonyms(KEY + b"x").of("v")


def test_a_pseudonym_stays_and_another_key_s_does_not() -> None:
    ours, theirs = Pseudonyms(KEY), Pseudonyms(KEY + b"x")
    assert ours.of(ours.of("u")) == ours.of("u")
    assert ours.of(theirs.of("u")) != theirs.of("u")
    assert ours.of(f"{ours.key_id}.u") != f"{ours.key_id}.u"


def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="a key of 31 bytes, at least 32"):
        Pseudonyms(KEY[:-1])


def test_no_raw_id_leaves_a_producer(connection: Connection, topics: Topics) -> None:
    pseudonyms, now_ms = Pseudonyms(KEY), time.time_ns() // 1_000_000
    with ClickProducer(connection, topics, pseudonyms) as producer:
        sent = producer.send(Click(event_id="e", user_id="someone", item_id="i", ts_ms=now_ms))
        erased = producer.erase("someone", now_ms)
    records = list(read_window(connection, topics.clicks.name))
    assert [(r.partition, r.offset) for r in records] == [sent.result(), erased]
    assert {record.key for record in records} == {pseudonyms.of("someone").encode()}
    assert all(b"someone" not in (record.value or b"someone") for record in records)


def test_a_key_is_changed_by_a_replay(connection: Connection, topics: Topics) -> None:
    """From where the ids are: under the new key the same states, in topics where nothing of the old key stands."""
    now_ms = time.time_ns() // 1_000_000
    users, renewed = [f"u{number}" for number in range(5)], Topics(f"{topics.prefix}-renewed", partitions=3)
    ensure(renewed, connection)
    clicks = [Click(event_id=f"e{n % 35}", user_id=users[n % 5], item_id=f"i{n % 7}", ts_ms=now_ms) for n in range(40)]

    def sent(pseudonyms: Pseudonyms, to: Topics) -> dict[str, UserState]:
        with ClickProducer(connection, to, pseudonyms) as producer:
            for click in clicks:
                producer.send(click)
        found: dict[str, UserState] = {}
        for record in read_window(connection, to.clicks.name):
            click = decode_click(record.value)
            applied = [Applied(click, 1.0, record.offset)]
            found[click.user_id] = apply_clicks(found.get(click.user_id, EMPTY), applied, Limits())
        return found

    old, new = Pseudonyms(KEY), Pseudonyms(KEY + b"x")
    before, after = sent(old, topics), sent(new, renewed)
    assert before.keys() == {old.of(user) for user in users} and after.keys() == {new.of(user) for user in users}
    for user in users:
        was, now = before[old.of(user)], after[new.of(user)]
        assert (was.history, was.seen, was.event_ids, was.applied) == (now.history, now.seen, now.event_ids, 7)
