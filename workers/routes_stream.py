"""Server-sent events: a user's list as it changes."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import msgspec
from litestar import get, post
from litestar.connection import Request
from litestar.params import HeaderParameter, Parameter
from litestar.response import ServerSentEvent
from litestar.response.sse import ServerSentEventMessage

from stream.answers import Answer, AsOf, Path, Status, Ticket, Update, Wishes
from stream.events import Recommendations
from workers.keys import TICKET_S, Key
from workers.limits import refused
from workers.live import NotReady
from workers.routes import Served, route
from workers.routes_recommend import UserId
from workers.service import Service
from workers.updates import Made

HEARTBEAT_S = 15.0
BEHIND_S = 1.0  # a state comes some ms after the worker's list of it
RECONNECT_MS = 1000


class Stream:
    """One open stream. An event's id names generation and offset: who comes back with it gets nothing twice."""

    def __init__(self, service: Service, user_id: str, last_id: str | None) -> None:
        self._service, self._user_id, self._last_id = service, user_id, last_id
        self._stored_id = service.stored_id(user_id)
        self._wishes = Wishes(k=service.settings.worker.k, explain=True)
        self._status: Status | None = None
        self._sent_to = -1  # newest offset behind a list that was sent
        self._owed = False  # its own list could not be made yet

    async def events(self) -> AsyncGenerator[ServerSentEventMessage, None]:
        """Ends when the server does."""
        updates = self._service.updates
        with updates.mailbox(self._stored_id) as box:
            yield ServerSentEventMessage(data=None, retry=RECONNECT_MS, comment="upwell")
            while not updates.closed:
                box.wake.clear()
                (made, box.newest), (erased, box.erased) = (box.newest, None), (box.erased, -1)
                if erased > self._sent_to:
                    self._sent_to = erased
                    yield self._update(await self._own() or self._empty(), None)
                if made and made.answer.offset >= self._sent_to:
                    yield self._update(self._answer_of(made.answer), made)
                async for event in self._changes():
                    yield event
                try:
                    async with asyncio.timeout(BEHIND_S if self._owed and self._behind else HEARTBEAT_S):
                        await box.wake.wait()
                except TimeoutError:
                    yield self._said()  # a comment would do for proxies, but EventSource hides those from its page

    async def _changes(self) -> AsyncIterator[ServerSentEventMessage]:
        """The status where it is another, and with another generation, or once it can be made, its list."""
        updates, before = self._service.updates, self._status
        self._status = status = Status(updates.connected, updates.generation)
        if status != before:
            yield self._said()
        if self._owed or before is None or before.generation != status.generation:
            answer = await self._own()
            self._owed = answer is None
            if answer and _id(answer) != self._last_id:
                yield self._update(answer, None)

    def _said(self) -> ServerSentEventMessage:
        return ServerSentEventMessage(event="status", data=msgspec.json.encode(self._status))

    @property
    def _behind(self) -> bool:
        """Whether the state here is older than the list that was sent: the server's own would take a click back."""
        return not self._service.users.reached(self._stored_id, self._sent_to)

    async def _own(self) -> Answer | None:
        """The server's list, from the state it knows; None while it can make none that is new enough."""
        if self._behind:
            return None
        try:
            async with self._service.lists:
                return await asyncio.to_thread(self._service.recommend, self._user_id, self._wishes)
        except NotReady:
            return None

    def _update(self, answer: Answer, made: Made | None) -> ServerSentEventMessage:
        self._last_id = _id(answer)
        if answer.as_of:
            self._sent_to = max(self._sent_to, answer.as_of.offset)
        update = Update(**msgspec.structs.asdict(answer), path=_path(made) if made else None)
        return ServerSentEventMessage(event="recommendations", id=self._last_id, data=msgspec.json.encode(update))

    def _empty(self) -> Answer:
        """Of who is erased, where not even what is popular can be said."""
        user_id, generation, why = self._user_id, self._service.updates.generation or "", "the user is erased"
        return Answer(
            user_id=user_id, items=[], generation=generation, source="popular", fallback=why, as_of=None, age_ms=None
        )

    def _answer_of(self, made: Recommendations) -> Answer:
        """The worker's list."""
        return Answer(
            user_id=self._user_id,
            items=self._service.places(made.items),
            generation=made.generation,
            source=made.source,
            fallback=None if made.source == "personal" else "no event of this user is of a known item",
            as_of=AsOf(made.partition, made.offset),
            age_ms=max(0, _now_ms() - made.clicked_ms),
            arm=made.arm,
        )


def _id(answer: Answer) -> str:
    at = answer.as_of
    return f"{answer.generation}:{at.partition}:{at.offset}" if at else answer.generation


def _path(made: Made) -> Path:
    of = made.answer
    moments = of.clicked_ms, of.sent_ms, made.published_ms, made.seen_ms, _now_ms(), of.updated_ms
    return Path(of.event_id, of.partition, of.offset, *moments, made.traceparent)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@get(
    "/v1/stream",
    summary="A user's list as it changes",
    description="text/event-stream. Events: `recommendations` (an Update: the list and, where a click made it, the "
    "click's path), `status` (connected, generation), which also comes whenever there was nothing to say for 15 s. "
    "A slow reader gets the newest list and none of those between.",
    media_type="text/event-stream",
    tags=["recommendations"],
    **route("read", stream=True),
)
async def stream(
    request: Request[None, Key | None, Any],
    service: Served,
    user: UserId,
    last_event_id: Annotated[
        str | None, HeaderParameter(name="Last-Event-ID", description="of the last event received: browsers send it")
    ] = None,
    ticket: Annotated[str, Parameter(description="instead of a key: of `POST /v1/stream/tickets`")] = "",  # for Gate
) -> ServerSentEvent:
    if service.updates.num_open >= service.settings.serve.max_streams:
        raise refused(503, f"{service.updates.num_open} streams are open", 5)
    closing, events = request.scope["state"]["closing"], Stream(service, user, last_event_id).events()
    closing.enter_context(service.updates.place())  # not as the events begin: those who come at once would all find one
    closing.push_async_callback(events.aclose)
    return ServerSentEvent(events)


@post(
    "/v1/stream/tickets",
    summary="A ticket for a user's stream",
    description="For `EventSource`, which sends no header, and for pages that must not hold a key: their server asks "
    "for a ticket and hands it on. It opens this user's stream and nothing else.",
    status_code=200,
    tags=["recommendations"],
    **route("read"),
)
async def ticket(request: Request[None, Key | None, Any], user: UserId) -> Ticket:
    until_s = int(time.time()) + TICKET_S
    return Ticket(request.auth.ticket(user, until_s) if request.auth else "", 1000 * until_s)
