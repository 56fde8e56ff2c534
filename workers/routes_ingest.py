"""Events and items in: each entry is in Kafka, with its place, or rejected with its cause."""

import asyncio
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from litestar import delete, post
from litestar.exceptions import HTTPException
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody
from litestar.params import RawBody

from stream.answers import Delivered, EventIn, ItemIn, Receipt, Rejected
from stream.events import BadEvent, Click, Item, cause
from stream.producer import Place
from workers.routes import Served, asking_kafka, example, route
from workers.routes_recommend import ItemId
from workers.service import Service

DELIVERY_S = 5.0
E = TypeVar("E", Click, Item)
Sent = list[tuple[int, Click | Item, Future[Place]]]


def _taking(kind: type[msgspec.Struct], *examples: Any) -> type[Operation]:
    """What OpenAPI says of a body of one or many: the routes read the bytes, entry by entry."""
    (one,) = msgspec.json.schema(kind)["$defs"].values()
    schema: Any = {"anyOf": [one, {"type": "array", "items": one, "minItems": 1}]}
    shown = {f"example {number}": example(value)[0] for number, value in enumerate(examples, 1)}

    @dataclass
    class Taking(Operation):
        def __post_init__(self) -> None:
            media = OpenAPIMediaType(schema=schema, examples=dict(shown))
            self.request_body = RequestBody({"application/json": media}, required=True)

    return Taking


def _entries(raw: bytes, at_most: int) -> list[msgspec.Raw]:
    """One object, or the entries of a list. Raises HTTPException 400 for what is neither, 413 for too many."""
    if not raw.strip():
        raise HTTPException(status_code=400, detail="body: empty")
    try:
        entries = msgspec.json.decode(raw, type=list[msgspec.Raw]) if raw.lstrip()[:1] == b"[" else [msgspec.Raw(raw)]
    except (msgspec.DecodeError, RecursionError) as error:
        raise HTTPException(status_code=400, detail=f"body: {error}") from error
    if not entries:
        raise HTTPException(status_code=400, detail="body: no entry")
    if len(entries) > at_most:
        raise HTTPException(status_code=413, detail=f"body: {len(entries)} entries, serve.max_batch is {at_most}")
    return entries


def _click(entry: msgspec.Raw) -> Click:
    given = msgspec.json.decode(entry, type=EventIn)
    return Click(
        event_id=given.event_id or uuid.uuid4().hex,
        user_id=given.user_id,
        item_id=given.item_id,
        event_type=given.event_type,
        ts_ms=time.time_ns() // 1_000_000 if given.ts_ms is None else given.ts_ms,
        value=given.value,
        context=given.context,
    )


def _item(entry: msgspec.Raw) -> Item:
    return msgspec.json.decode(entry, type=ItemIn)


def _send(
    entries: list[msgspec.Raw], read: Callable[[msgspec.Raw], E], send: Callable[[E], Future[Place]]
) -> tuple[Sent, list[Rejected]]:
    sent: Sent = []
    rejected = []
    for index, entry in enumerate(entries):
        try:
            event = read(entry)
            sent.append((index, event, send(event)))
        except (BadEvent, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            rejected.append(Rejected(index, cause(str(error))))
    return sent, rejected


async def _deliver(
    service: Service, raw: bytes, read: Callable[[msgspec.Raw], E], send: Callable[[E], Future[Place]]
) -> Receipt:
    """What is accepted is in Kafka when this returns; a 503 says that it may not be: send it again."""
    entries = _entries(raw, service.settings.serve.max_batch)
    with asking_kafka("did not take the events"):
        sent, rejected = await service.to_kafka(_send, entries, read, send)
        if not sent:
            extra = {"rejected": msgspec.to_builtins(rejected)}
            raise HTTPException(status_code=400, detail=rejected[0].cause, extra=extra)
        waiting = asyncio.gather(*(asyncio.wrap_future(place) for _, _, place in sent))
        places = await asyncio.wait_for(waiting, DELIVERY_S)
    results = [_delivered(index, event, place) for (index, event, _), place in zip(sent, places, strict=True)]
    return Receipt(len(sent), rejected, results)


def _delivered(index: int, event: Click | Item, place: Place) -> Delivered:
    ids = {"event_id": event.event_id} if isinstance(event, Click) else {"item_id": event.item_id}
    return Delivered(index, place.partition, place.offset, **ids)


TAKEN = (
    "One object or a list. 202 once Kafka has all that is accepted, each with its place; entries that no reader "
    "could use are rejected with the cause, and where all are, the answer is 400. After a 503 send them again: "
)


@post(
    "/v1/events",
    status_code=202,
    summary="Events in",
    description=TAKEN + "an event sent again under its own `event_id` counts once.",
    operation_class=_taking(
        EventIn,
        {"user_id": "u-42", "item_id": "b7", "event_type": "like"},
        [{"event_id": "c-1", "user_id": "u-42", "item_id": "b7"}, {"user_id": "u-43", "item_id": "b8"}],
    ),
    tags=["ingest"],
    **route("ingest", 413),
)
async def post_events(service: Served, body: RawBody) -> Receipt:
    return await _deliver(service, body, _click, lambda click: service.producer.send(click))


@post(
    "/v1/items",
    status_code=202,
    summary="Items in",
    description=TAKEN + "the newest version of an item wins.",
    operation_class=_taking(ItemIn, {"item_id": "b8", "title": "Rivers and their mouths", "categories": ["science"]}),
    tags=["ingest"],
    **route("ingest", 413),
)
async def post_items(service: Served, body: RawBody) -> Receipt:
    return await _deliver(service, body, _item, lambda item: service.producer.send_item(item))


@delete(
    "/v1/items/{item_id:str}",
    status_code=202,
    summary="An item out",
    description="It leaves every list in a moment; what users did with it stays in their states. 202 once Kafka "
    "has the wish, known or not. After a 503 send it again: twice is harmless.",
    tags=["ingest"],
    **route("ingest"),
)
async def remove_item(service: Served, item_id: ItemId) -> Delivered:
    with asking_kafka("did not take the removal"):
        sent = await service.to_kafka(lambda: service.producer.remove_item(item_id))
        place = await asyncio.wait_for(asyncio.wrap_future(sent), DELIVERY_S)
    return Delivered(0, place.partition, place.offset, item_id=item_id)
