"""HTTP: recommendations on request, events and items in, health, metrics, and a first page.

State is read from the compacted users topic, so every replica answers for every user. Lists are made at
the request, from the newest state that Kafka has shown.
"""

import time
import uuid
from pathlib import Path
from typing import Annotated, Any

import kafka
import msgspec
import torch
import uvicorn
from litestar import Litestar, MediaType, Response, get, post
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.openapi import OpenAPIConfig
from litestar.params import Parameter
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from model.user_state import EMPTY
from stream.events import BadEvent, Click, EventType, Id, Item, Milliseconds
from stream.producer import BufferFull, DeliveryError
from workers import metrics
from workers.lag import LagFollower
from workers.live import NotReady
from workers.processes import end_with_threads
from workers.service import RecentUser, RecommendationsOut, Service
from workers.settings import Settings

PAGE = Path(__file__).with_name("page.html")


class EventIn(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A click as it comes over HTTP. Give `event_id` yourself to make sending it again harmless."""

    user_id: Id
    item_id: Id
    event_type: EventType = "click"
    event_id: Id | None = None
    ts_ms: Milliseconds | None = None
    value: float | None = None
    context: dict[str, str] = {}


class Accepted(msgspec.Struct):
    accepted: int


def _many(raw: bytes, kind: Any) -> list[Any]:
    """One object or a list of them. Raises HTTPException 400 naming the field."""
    try:
        return (
            list(msgspec.json.decode(raw, type=list[kind]))
            if raw.lstrip()[:1] == b"["
            else [msgspec.json.decode(raw, type=kind)]
        )
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HTTPException(status_code=400, detail=str(error)) from error


def _delivered(service: Service, events: list[Click] | list[Item]) -> Accepted:
    """All of them are in Kafka when this returns; a 503 says that they may not be: send them again."""
    try:
        for event in events:
            service.producer.send(event) if isinstance(event, Click) else service.producer.send_item(event)
        service.producer.flush()
    except BadEvent as error:
        raise HTTPException(status_code=400, detail=str(error)) from error
    except (DeliveryError, BufferFull, kafka.errors.KafkaError) as error:
        raise HTTPException(
            status_code=503, detail=f"Kafka did not take the events: {error}", headers={"Retry-After": "2"}
        ) from error
    return Accepted(len(events))


@get("/v1/users/{user_id:str}/recommendations", sync_to_thread=True)
def recommendations(
    service: Service, user_id: str, k: Annotated[int, Parameter(ge=1, le=200)] = 20
) -> RecommendationsOut:
    """The user's k best items now, never one already seen; a user without history gets what is popular."""
    try:
        return service.recommend(user_id, k)
    except NotReady as error:
        raise HTTPException(status_code=503, detail=str(error), headers={"Retry-After": "1"}) from error


@get("/v1/users", sync_to_thread=False)
def recent_users(service: Service) -> list[RecentUser]:
    """The users whose state moved last, newest first, for the page."""
    users = list(reversed(service.users.recent))
    known = [(user_id, service.users.states.get(user_id, EMPTY)) for user_id in users]
    return [RecentUser(user_id, state.applied, service.history(state)[:10]) for user_id, state in known]


@post("/v1/events", sync_to_thread=True, status_code=202)
def post_events(service: Service, body: bytes) -> Accepted:
    """One event or a list of them; 202 once Kafka has them all."""
    now_ms = time.time_ns() // 1_000_000
    clicks = [
        Click(
            event_id=event.event_id or uuid.uuid4().hex,
            user_id=event.user_id,
            item_id=event.item_id,
            event_type=event.event_type,
            ts_ms=now_ms if event.ts_ms is None else event.ts_ms,
            value=event.value,
            context=event.context,
        )
        for event in _many(body, EventIn)
    ]
    return _delivered(service, clicks)


@post("/v1/items", sync_to_thread=True, status_code=202)
def post_items(service: Service, body: bytes) -> Accepted:
    """One item or a list of them, added or replaced; 202 once Kafka has them all."""
    return _delivered(service, _many(body, Item))


@get("/livez", sync_to_thread=False, media_type=MediaType.TEXT)
def livez() -> str:
    return "alive"


@get("/readyz", sync_to_thread=False, media_type=MediaType.TEXT)
def readyz(service: Service) -> Response[str]:
    """200 once a generation is loaded and the users' states are caught up; 503 says which is missing."""
    missing = [
        name
        for name, there in {
            "generation": service.live.snapshot is not None,
            "items": service.live.caught_up.is_set(),
            "states": service.users.caught_up.is_set(),
        }.items()
        if not there
    ]
    return Response(f"waiting for {', '.join(missing)}" if missing else "ready", status_code=503 if missing else 200)


@get("/metrics", sync_to_thread=False)
def prometheus() -> Response[bytes]:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@get("/", media_type=MediaType.HTML, sync_to_thread=False)
def page() -> Response[str]:
    """One user's list as it moves."""
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
    return Response(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": policy})


def _measured(app: ASGIApp) -> ASGIApp:
    """Counts and times requests by route template: a path holds user ids."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.perf_counter(), 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, watch)
        finally:
            route = scope.get("path_template") or "unknown"
            metrics.requests.labels(route, str(status)).inc()
            metrics.request_s.labels(route).observe(time.perf_counter() - began)

    return middleware


def build_app(service: Service) -> Litestar:
    async def provide() -> Service:
        return service

    return Litestar(
        [recommendations, recent_users, post_events, post_items, livez, readyz, prometheus, page],
        dependencies={"service": Provide(provide)},
        middleware=[_measured],
        request_max_body_size=service.settings.serve.max_body_bytes,
        openapi_config=OpenAPIConfig(title="Upwell", version="1"),
        on_startup=[service.start],
        on_shutdown=[service.stop],
        logging_config=None,
    )


def run_server(settings: Settings) -> int:
    torch.set_num_threads(1)
    end_with_threads()
    LagFollower(settings).start()
    config = uvicorn.Config(
        build_app(Service(settings)),
        host=settings.serve.host,
        port=settings.serve.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    uvicorn.Server(config).run()
    return 0
