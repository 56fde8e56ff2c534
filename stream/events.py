"""What is said on the topics: frozen wire types, JSON by msgspec, one version number each.

A reader accepts the versions it knows and refuses the rest; unknown fields of a known version are
ignored, so that a producer may add one before its readers know it.

    BadEvent(ValueError)   a message that can never be applied -> dead-letter topic, never retried
"""

import math
import re
import time
from typing import Annotated, Any, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta, Struct

VERSION = 1
OFFSET_HEADER = "offset"  # of a null in a user's place (erased): where the wish stands in the clicks
DEFAULT_ARM = "default"  # whoever is in no arm of the A/B test
MAX_EVENT_BYTES = 64 * 1024  # an event is a few hundred bytes; 64 KiB leaves room for context
MAX_ITEM_BYTES = 1024 * 1024
FUTURE_TOLERANCE_MS = 10 * 60 * 1000  # clocks of producers differ; ten minutes ahead is a broken clock

EventType = Literal[
    "view", "click", "like", "cart", "purchase", "play", "complete", "rate", "share",
    "dislike", "hide", "skip", "return",
]  # fmt: skip
EVENT_TYPES: tuple[str, ...] = get_args(EventType)
Source = Literal["personal", "session", "popular"]  # of a list: Recommendations says what each means

MAX_ID = 256
Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID)]
Version = Annotated[int, Meta(ge=1, le=VERSION)]
Milliseconds = Annotated[int, Meta(ge=0, lt=2**53, description="milliseconds since the epoch, UTC")]


class BadEvent(ValueError):
    """A message that cannot be applied, now or later; its text is the dead letter's cause."""


class Event(Struct, frozen=True, kw_only=True):
    """What all wire types share."""

    version: Version = VERSION


class Click(Event, frozen=True, kw_only=True):
    """Who did what to which item, when, how strongly. Keyed by user: one user, one partition, one order."""

    event_id: Id
    user_id: Id
    item_id: Id
    event_type: EventType = "click"
    ts_ms: Milliseconds
    value: float | None = None
    context: dict[str, str] = {}


class Item(Event, frozen=True, kw_only=True):
    """One thing that can be recommended. Keyed by item, compacted; a null value removes the item."""

    item_id: Id
    title: Annotated[str, Meta(max_length=1000)]
    text: str = ""
    categories: list[str] = []
    attributes: dict[str, str] = {}
    published_ms: Milliseconds | None = None
    available: bool = True


class ItemVector(Event, frozen=True, kw_only=True):
    """The text vector of one item, made by the indexer. Keyed by item, compacted."""

    item_id: Id
    encoder: str
    text_hash: str
    vector: bytes  # float16, little-endian, E values; unit norm, or zeros for an item without text


class Because(Struct, frozen=True, gc=False):  # as Ranked: a micro-batch makes 20,000 and more
    """A click that speaks for a recommended item."""

    item_id: str
    share: float  # of what the user's clicks say for the item through co-visitation and text; see Ranked.explained


class Ranked(Struct, frozen=True, omit_defaults=True, gc=False):
    """One place in a list of recommendations."""

    item_id: str
    score: float
    propensity: float = 1.0  # the chance with which the item was in this list: below 1 where the list explores
    because: list[Because] = []
    explained: float = 0.0  # part of what speaks for the item that the shares divide; the rest: tower, popularity
    under: dict[str, float] = {}  # other arm of the A/B test -> the chance with which it would have shown the item


class Recommendations(Event, frozen=True, kw_only=True):
    """Fresh recommendations for one user. Keyed by user.

    source: what the list rests on. "personal": the kept history of the user; "session": a history that came with the
    request and is not kept (a guest's clicks, seed items, a text), over HTTP only; "popular": nothing, for a user
    without history or with clicks on unknown items alone.

    Of two lists of a user the one of the larger offset is the newer: a worker whose partitions another has taken over
    meanwhile may still send one that it had made before, behind its successor's.
    """

    user_id: Id
    items: list[Ranked]
    generation: str
    source: Source
    partition: int  # as_of: the last click folded in, so that a reader can ask for "at least offset X"
    offset: int
    event_id: str  # the newest click behind this list
    clicked_ms: int  # when Kafka took that click (record timestamp)
    sent_ms: int
    arm: str = DEFAULT_ARM  # of the A/B test
    updated_ms: int | None = None  # when the worker had folded that click into the state that the vector is made from


class Artifact(Event, frozen=True, kw_only=True):
    """Published files: a trained model (trainer -> indexer) or a generation (indexer -> worker, serve)."""

    name: str
    url: str
    manifest_sha256: str
    created_ms: Milliseconds
    encoder: str  # of the text vectors that it stands on: those of another one mean nothing to it
    metrics: dict[str, float] = {}
    offsets: dict[int, int] = {}  # partition of the clicks -> first offset that it was not trained on
    parent: str | None = None


class DeadLetter(Event, frozen=True, kw_only=True):
    """A message that could not be applied: where it was, why, and its own bytes, to be replayed."""

    topic: str
    partition: int
    offset: int
    cause: str
    key: bytes | None
    payload: bytes | None
    truncated: bool = False  # only the first part of an oversized key or payload is kept: it cannot be replayed
    ts_ms: Milliseconds


class Erasure(Event, frozen=True, kw_only=True):
    """A user's wish to be forgotten, in the topic of the clicks: what the user did before it counts for nothing."""

    event_type: Literal["erase"]  # required: no malformed click may pass for an erasure
    user_id: Id
    requested_ms: Milliseconds


WIRE_TYPES: tuple[type[Event], ...] = (
    Click, Item, ItemVector, Recommendations, Artifact, DeadLetter, Erasure,
)  # fmt: skip

T = TypeVar("T", bound=Event)
ItemT = TypeVar("ItemT", Item, ItemVector)
_encoder = msgspec.json.Encoder()
_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {kind: msgspec.json.Decoder(kind) for kind in WIRE_TYPES}


def encode(event: Event) -> bytes:
    """JSON bytes of an event; bytes fields travel as base64."""
    return _encoder.encode(event)


def decode(raw: bytes | None, kind: type[T], max_bytes: int = MAX_ITEM_BYTES) -> T:
    """Raises BadEvent naming what is wrong: size, UTF-8, JSON (its depth, too), field or version."""
    if raw is None:
        raise BadEvent("null: no message")
    if len(raw) > max_bytes:
        raise BadEvent(f"size: {len(raw)} bytes, at most {max_bytes}")
    try:
        event: T = _decoders[kind].decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadEvent(cause(str(error))) from error
    return event


def decode_click(raw: bytes | None, now_ms: int | None = None) -> Click:
    """Raises BadEvent also for a stamp over FUTURE_TOLERANCE_MS ahead and for a value that is not finite.

    A reader gives Kafka's stamp of the record as now: a click that was refused once is refused at every replay,
    on the day that its producer took it for, too.
    """
    click = decode(raw, Click, MAX_EVENT_BYTES)
    if click.value is not None and not math.isfinite(click.value):
        raise BadEvent(f"value: {click.value} is not a finite number")
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    if click.ts_ms > now_ms + FUTURE_TOLERANCE_MS:
        raise BadEvent(f"ts_ms: {click.ts_ms - now_ms} ms in the future, at most {FUTURE_TOLERANCE_MS}")
    return click


def decode_record(raw: bytes | None, key: bytes | None, now_ms: int | None = None) -> Click | Erasure:
    """A record of the clicks topic; every reader of the topic goes through here. Raises BadEvent as `decode_click`
    does, and for a key that is not the user id: this user's order would be lost.
    """
    event: Click | Erasure
    try:
        event = decode_click(raw, now_ms)
    except BadEvent as error:
        try:
            event = decode(raw, Erasure, MAX_EVENT_BYTES)
        except BadEvent:
            raise error from None
    if key != event.user_id.encode():
        raise BadEvent("key: not the user id: this user's order would be lost")
    return event


def decode_item(raw: bytes | None, key: bytes | None, kind: type[ItemT]) -> tuple[str, ItemT | None]:
    """A record of the items or the vectors topic: the item's id, and None where a null removes it. Raises BadEvent as
    `decode` does, and for a key that is not the item id: neither a new version nor a null would replace this one.
    """
    try:
        item_id = (key or b"").decode()
    except UnicodeDecodeError as error:
        raise BadEvent("key: no UTF-8") from error
    if raw is None:
        return item_id, None
    item = decode(raw, kind)
    if item.item_id != item_id:
        raise BadEvent("key: not the item id")
    return item_id, item


_PATH = re.compile(r" - at `\$(?:\.)?([^`]*)`$")


def cause(message: str) -> str:
    """msgspec's message with the field first: "item_id: Expected `str`, got `int`"."""
    found = _PATH.search(message)
    if not found:
        return message
    return f"{found.group(1) or 'message'}: {message[: found.start()]}"
