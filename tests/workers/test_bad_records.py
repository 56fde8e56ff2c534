"""Records that no reader can use pass every follower by, and become dead letters that fit into Kafka."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from stream.events import MAX_ID, Item, ItemVector, encode
from tests.records import Record
from workers.dead_letters import MAX_DEAD_PAYLOAD, dead_letter
from workers.guests import TextEncoder
from workers.indexer import Indexer
from workers.live import Live, NotReady
from workers.sender import MAX_RECORD_BYTES
from workers.settings import Settings

SETTINGS = Settings()
GOOD = encode(Item(item_id="i1", title="t"))
VECTOR = encode(ItemVector(item_id="i1", encoder="e", text_hash="h", vector=b""))


def indexer() -> Any:
    """What reads the topics, without an encoder and Kafka."""
    made: Any = Indexer.__new__(Indexer)
    made._topics, made._pending, made._vectors = SETTINGS.topics, {}, {}
    return made


@pytest.mark.parametrize("key", [b"\xff", b"i2", None])
@pytest.mark.parametrize("value", [GOOD, None])
def test_an_item_under_a_key_that_is_not_its_id_ends_no_reader(key: bytes | None, value: bytes | None) -> None:
    live, index, topics = Live(SETTINGS), indexer(), SETTINGS.topics
    bad = Record(key, value, topic=topics.items.name)
    good = Record(b"i1", GOOD, topic=topics.items.name)
    for record in (good, Record(b"i1", VECTOR, topic=topics.vectors.name), bad):
        live._take(record)
    live._take(bad._replace(topic=topics.vectors.name, value=value and VECTOR))
    live._take(bad._replace(topic=topics.generations.name))
    for record in (good, bad):
        index._take(record)
    assert list(live.catalogue.items) == list(live.catalogue.vectors) == list(index._pending) == ["i1"]


@pytest.mark.parametrize("payload", [b"{", b"x" * (1 << 20), None])
def test_a_dead_letter_fits_into_a_record_whatever_the_key(payload: bytes | None) -> None:
    letter = dead_letter(Record(b"k" * 500_000, payload), "cause")
    assert len(encode(letter)) <= MAX_RECORD_BYTES and letter.truncated
    assert (letter.key, letter.payload) == (b"k" * 4 * MAX_ID, payload and payload[:MAX_DEAD_PAYLOAD])


def test_a_dead_letter_of_the_largest_valid_key_is_whole() -> None:
    key = ("𝒌" * MAX_ID).encode()
    letter = dead_letter(Record(key, b"{"), "cause")
    assert (letter.key, letter.payload, letter.truncated) == (key, b"{", False)


def test_an_encoder_that_could_not_be_loaded_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ready: Any = SimpleNamespace(name="e", encode=lambda texts: np.ones((len(texts), 2), np.float32))
    loads = iter([RuntimeError("CUDA out of memory"), SafetensorError("invalid header"), TimeoutError("late"), ready])

    def load(_: TextEncoder) -> Any:
        if isinstance(loaded := next(loads), Exception):
            raise loaded
        return loaded

    monkeypatch.setattr(TextEncoder, "_load", load)
    encoder = TextEncoder(SETTINGS)
    for why in ("out of memory", "invalid header", "not there: late"):
        with pytest.raises(NotReady, match=why):
            encoder("words", "e")
    assert encoder("words", "e").shape == (2,)
