"""What must hold of any bytes that a topic may hold."""

import math

import msgspec

from model.user_state import EMPTY, Applied, Limits, apply_clicks, decode_state, encode_state
from stream.events import WIRE_TYPES, Artifact, BadEvent, Click, DeadLetter, Event, Item, decode, decode_click, encode
from workers.settings import DEFAULT_WEIGHTS, VALUE_BOUNDS, strength

NOW_MS = 1_700_000_000_000
HEAVIEST = 2 * max(map(abs, DEFAULT_WEIGHTS.values()))
assert max(map(abs, VALUE_BOUNDS)) == 2

CLICK = Click(
    event_id="e", user_id="ü", item_id="i", event_type="play", ts_ms=NOW_MS, value=0.5, context={"page": "home"}
)
GOOD: tuple[Event, ...] = (
    CLICK,
    Item(item_id="i", title="t\n", categories=["c"], attributes={"a": "b"}, published_ms=1, available=False),
    Artifact(name="g", url="s3://b", manifest_sha256="0", created_ms=1, encoder="", metrics={"m": 0.5}, offsets={0: 1}),
    DeadLetter(topic="t", partition=0, offset=1, cause="c", key=b"k", payload=b"\xff", ts_ms=1),
)  # fmt: skip
STATE = apply_clicks(EMPTY, [Applied(CLICK, 1.0, 7)], Limits())


def corpus() -> list[bytes]:
    """Good messages, to be mutated."""
    return [*map(encode, GOOD), encode_state(STATE)]


def check(raw: bytes) -> None:
    """Refused by name, or a value that survives the wire; a click can be weighed and folded too."""
    for kind in WIRE_TYPES:
        try:
            event = decode(raw, kind)
        except BadEvent as error:
            assert str(error)
        else:
            assert decode(encode(event), kind) == event or b"null" in encode(event), raw  # NaN travels as null
    try:
        click = decode_click(raw, NOW_MS)
    except BadEvent:
        pass
    else:
        weight = strength(click)
        assert math.isfinite(weight) and abs(weight) <= HEAVIEST, raw
        state = apply_clicks(STATE, [Applied(click, weight, 8)], Limits())
        assert decode_state(encode_state(state)) == state, raw
        assert state.offset == 8 and state.applied in (1, 2), raw
    try:
        state = decode_state(raw)
    except msgspec.DecodeError:
        return
    assert encode_state(decode_state(encode_state(state))) == encode_state(state), raw
