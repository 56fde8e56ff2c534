"""Lists: of a user, of a guest, of what is like an item."""

import asyncio
import time
from contextvars import copy_context
from typing import Annotated

from litestar import get, post
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException
from litestar.params import Body, Parameter
from msgspec.structs import replace

from stream.answers import MAX_K, Answer, Guest, Similar, Wishes
from stream.events import Id
from workers.limits import refused
from workers.routes import Served, an_id, example, route
from workers.service import TEXTS_AT_ONCE, Service

POLL_S = 0.01

UserId = Annotated[Id, an_id("the user's id", "u-42")]
Asked = NamedDependency[Wishes]
ItemId = Annotated[Id, an_id("the item's id", "b7")]


async def rules(
    k: Annotated[int, Parameter(ge=1, le=MAX_K, description="items wanted", examples=example(10))] = 20,
    categories: Annotated[
        list[Id] | None, Parameter(max_items=1000, description="only items in one of these; repeat it for more")
    ] = None,
    exclude: Annotated[
        list[Id] | None, Parameter(max_items=1000, description="item ids that must not come; repeat it for more")
    ] = None,
    available_only: Annotated[bool, Parameter(description="no item whose `available` is false")] = True,
    max_age: Annotated[
        int | None, Parameter(ge=0, le=10**10, description="seconds since the item's `published_ms`, at most")
    ] = None,
    diversity: Annotated[
        float | None, Parameter(ge=0, le=1, description="0: the best items; 1: the most different")
    ] = None,
    explore: Annotated[
        float | None, Parameter(ge=0, le=1, description="share of the places that are drawn; see `propensity`")
    ] = None,
) -> Wishes:
    return Wishes(
        k=k,
        categories=categories or [],
        exclude=exclude or [],
        available_only=available_only,
        max_age=max_age,
        diversity=diversity,
        explore=explore,
    )


async def wishes(
    rules: Asked,
    exclude_seen: Annotated[bool, Parameter(description="no item that the user has had an event with")] = True,
    explain: Annotated[bool, Parameter(description="say which clicks speak for each item")] = False,
) -> Wishes:
    return replace(rules, exclude_seen=exclude_seen, explain=explain)


@get(
    "/v1/users/{user_id:str}/recommendations",
    dependencies={"rules": Provide(rules), "wishes": Provide(wishes)},
    summary="A user's list",
    description="The best items now. A user without known events gets what is popular; `fallback` says so.",
    tags=["recommendations"],
    **route("read"),
)
async def recommendations(
    service: Served,
    user_id: UserId,
    wishes: Asked,
    min_offset: Annotated[
        int | None,
        Parameter(
            ge=0,
            le=2**53,
            description="wait until the user's partition is folded up to this offset, as POST /v1/events gave it; "
            "when that takes too long, or too many wait, the answer says `stale`",
        ),
    ] = None,
) -> Answer:
    reached = min_offset is None or await _reach(service, user_id, min_offset)
    return await asyncio.to_thread(service.recommend, user_id, wishes, reached)


async def _reach(service: Service, user_id: str, offset: int) -> bool:
    stored_id, deadline = service.stored_id(user_id), time.monotonic() + service.settings.serve.wait_s
    if service.users.reached(stored_id, offset):
        return True
    if service.waits.locked():
        return False
    async with service.waits:
        while not (reached := service.users.reached(stored_id, offset)) and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
    return reached


@post(
    "/v1/recommendations",
    status_code=200,
    summary="A guest's list",
    description="From a history, items to start from, or words; nothing is kept. The first words load the encoder: 503 "
    "until it is there.",
    tags=["recommendations"],
    **route("read"),
)
async def guest_recommendations(
    service: Served,
    data: Annotated[
        Guest,
        Body(
            examples=[
                *example({"text": "rivers and tides", "k": 5}, "words"),
                *example({"history": [{"item_id": "b7", "event_type": "like"}], "diversity": 0.3}, "a session"),
                *example({"items": ["b7", "b8"]}, "items to start from"),
            ]
        ),
    ],
) -> Answer:
    if not data.text.strip():
        return await asyncio.to_thread(service.recommend_guest, data)
    if data.history or data.items or data.explain:
        raise HTTPException(status_code=400, detail="text: stands alone, without history, items and explain")
    if service.texts.locked():
        raise refused(503, f"{TEXTS_AT_ONCE} texts are being encoded", 1)
    async with service.texts:
        run = copy_context().run
        return await asyncio.get_running_loop().run_in_executor(service.encoding, run, service.recommend_guest, data)


@get(
    "/v1/items/{item_id:str}/similar",
    dependencies={"rules": Provide(rules)},
    sync_to_thread=True,
    summary="What goes with an item",
    description="Never the item itself. 404 for an item that the serving generation does not know.",
    tags=["recommendations"],
    **route("read", 404),
)
def similar(service: Served, item_id: ItemId, rules: Asked) -> Similar:
    try:
        return service.similar(item_id, rules)
    except KeyError as error:
        raise HTTPException(status_code=404, detail=f"item_id: the generation does not know {item_id}") from error
