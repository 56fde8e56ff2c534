"""Wire types: round trips, and every way to be bad named by its field."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.events import (
    EVENT_TYPES,
    FUTURE_TOLERANCE_MS,
    MAX_EVENT_BYTES,
    BadEvent,
    Click,
    Item,
    ItemVector,
    decode,
    decode_click,
    decode_item,
    encode,
)

NOW_MS = 1_700_000_000_000
GOOD = {"event_id": "e", "user_id": "u", "item_id": "i", "ts_ms": NOW_MS}

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(texts, texts, texts, st.sampled_from(EVENT_TYPES), st.floats(allow_nan=False, allow_infinity=False) | st.none())
def test_clicks_survive_the_wire(event_id: str, user_id: str, item_id: str, kind: str, value: float | None) -> None:
    click = Click(
        event_id=event_id,
        user_id=user_id,
        item_id=item_id,
        event_type=kind,  # type: ignore[arg-type]
        ts_ms=NOW_MS,
        value=value,
    )
    assert decode_click(encode(click), NOW_MS) == click


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (None, "null"),
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"not json", "malformed"),
        (b"\xff\xfe\x00", "malformed"),
        (b"[1]", "Expected `object`"),
        (msgspec.json.encode(GOOD | {"item_id": 3}), "item_id: Expected `str`, got `int`"),
        (msgspec.json.encode(GOOD | {"user_id": ""}), "user_id"),
        (msgspec.json.encode(GOOD | {"user_id": "u" * 257}), "user_id"),
        (msgspec.json.encode(GOOD | {"event_type": "stare"}), "event_type"),
        (msgspec.json.encode(GOOD | {"version": 2}), "version"),
        (msgspec.json.encode(GOOD | {"ts_ms": -1}), "ts_ms"),
        (msgspec.json.encode(GOOD | {"ts_ms": 2**53}), "ts_ms: Expected"),
        (msgspec.json.encode(GOOD | {"ts_ms": NOW_MS + FUTURE_TOLERANCE_MS + 1}), "ts_ms: .* in the future"),
        (msgspec.json.encode({k: v for k, v in GOOD.items() if k != "event_id"}), "event_id"),
        (msgspec.json.encode(GOOD)[:-1] + b',"value":NaN}', "malformed"),
        (msgspec.json.encode(GOOD)[:-1] + b',"value":1e999}', "value"),
        (msgspec.json.encode(GOOD).replace(b'"u"', b'"\xff"'), "utf-8"),
        (msgspec.json.encode(GOOD).replace(b'"u"', rb'"\ud800"'), "."),
        (b" " * (MAX_EVENT_BYTES + 1), "size: 65537 bytes, at most 65536"),
        (msgspec.json.encode(GOOD)[:-1] + b',"mood":' + b"[" * 2000 + b"]" * 2000 + b"}", "recursion"),
    ],
)
def test_bad_clicks_name_their_cause(raw: bytes | None, cause: str) -> None:
    with pytest.raises(BadEvent, match=cause):
        decode_click(raw, NOW_MS)


def test_a_field_of_a_later_minor_release_is_passed_over() -> None:
    assert decode_click(msgspec.json.encode(GOOD | {"mood": "good"}), NOW_MS).user_id == "u"


def test_items_have_their_own_bounds() -> None:
    item = Item(item_id="i", title="t", text="x" * 100_000)
    assert decode(encode(item), Item) == item
    with pytest.raises(BadEvent, match="title"):
        decode(encode(Item(item_id="i", title="t" * 1001)), Item)


ITEM = Item(item_id="é", title="t")


def test_an_item_has_its_id_for_a_key() -> None:
    vector = ItemVector(item_id="é", encoder="e", text_hash="h", vector=b"")
    assert decode_item(encode(ITEM), "é".encode(), Item) == ("é", ITEM)
    assert decode_item(encode(vector), "é".encode(), ItemVector) == ("é", vector)
    assert decode_item(None, "é".encode(), Item) == ("é", None)


@pytest.mark.parametrize(
    ("raw", "key", "cause"),
    [
        (encode(ITEM), b"\xff", "key: no UTF-8"),
        (None, b"\xff", "key: no UTF-8"),
        (encode(ITEM), b"e", "key: not the item id"),
        (encode(ITEM), None, "key: not the item id"),
        (b"{", "é".encode(), "truncated"),
    ],
)
def test_a_bad_item_names_its_cause(raw: bytes | None, key: bytes | None, cause: str) -> None:
    with pytest.raises(BadEvent, match=cause):
        decode_item(raw, key, Item)
