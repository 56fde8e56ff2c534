"""Keyed hashes of user ids, and that no raw id leaves a producer that has a key."""

import base64
import hashlib
import hmac
import time

import pytest

from stream.connection import Connection
from stream.consumer import read_window
from stream.events import Click
from stream.producer import ClickProducer
from stream.pseudonyms import Pseudonyms
from stream.topics import Topics

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
    records = [record for batch in read_window(connection, topics.clicks.name) for record in batch]
    assert [(r.partition, r.offset) for r in records] == [sent.result(), erased]
    assert {record.key for record in records} == {pseudonyms.of("someone").encode()}
    assert all(b"someone" not in (record.value or b"someone") for record in records)
