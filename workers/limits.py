"""Who may call, how often, and for how long: one middleware before every route."""

import asyncio
import math
import re
import time
from collections import OrderedDict
from contextlib import AsyncExitStack
from typing import Any, cast
from urllib.parse import unquote

import structlog
from litestar.connection import Request
from litestar.datastructures import Headers
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp, HTTPReceiveMessage, Message, Receive, Scope, Send

from workers import metrics
from workers.keys import Key, Keys
from workers.settings import Serve

log = structlog.get_logger()

MAX_CALLERS = 10_000  # whose buckets are kept; who is forgotten starts with a full one
# Lone surrogates: no path that came as bytes is decoded to one, so what an id holds is never taken for them.
SLASH = "\ud800"  # stands in a path for the slash of an id (%2F) until the route is found
EMPTY = "\ud801"  # stands in a path for an id without a character: the routes take two slashes for one
_SLASHES = re.compile(r"%2F", re.IGNORECASE)
_EMPTY = re.compile(r"(?<=[^/]/)(?=/)")
_LOOPBACK = re.compile(r"(localhost|[\w-]+\.localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)


class Buckets:
    """A token bucket a caller: `rate` tokens a second, `burst` at most."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, when; the longest silent first

    def wait_s(self, caller: str, now_s: float) -> float:
        """Takes a token: 0; or, where there is none, how long until there is one."""
        if not self._rate:
            return 0.0
        tokens, before = self._left.pop(caller, (float(self._burst), now_s))
        tokens = min(self._burst, tokens + (now_s - before) * self._rate)
        taken = tokens >= 1
        self._left[caller] = (tokens - taken, now_s)
        if len(self._left) > MAX_CALLERS:
            self._left.popitem(last=False)
        return 0.0 if taken else (1 - tokens) / self._rate


def refused(status: int, detail: str, retry_s: float) -> HTTPException:
    headers = {"Retry-After": str(max(1, math.ceil(retry_s)))}
    return HTTPException(status_code=status, detail=detail, headers=headers)


class Gate:
    """A route names the scope it needs in its `opt`; one that names none is closed, `None` is open to everyone.

    `stream` in the opt: no end to the answer, but to each write of it, and a ticket does for a key. What its handler
    pushes on the state's `closing` is called at the end, however it comes: else a stream that is cut off keeps its slot
    until a full collection.
    Raises HTTPException 401, 403, 408, 429, 503.
    """

    def __init__(self, serve: Serve, keys: Keys) -> None:
        self._serve, self._keys = serve, keys
        self._buckets = Buckets(serve.rate, serve.burst)
        self._running = 0

    def __call__(self, app: ASGIApp) -> ASGIApp:
        async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
            opt = scope["route_handler"].opt
            scope["path_params"] = {
                name: value.replace(SLASH, "/").replace(EMPTY, "") if isinstance(value, str) else value
                for name, value in scope["path_params"].items()
            }
            if opt.get("scope", "") is not None:
                self._admit(scope, opt.get("scope", ""))
            if opt.get("stream"):
                await self._streamed(app, scope, receive, send)
                return
            if opt.get("scope") not in (None, "metrics") and self._running >= self._serve.max_requests:
                raise refused(503, f"{self._running} requests are being answered", 1)
            self._running += 1
            try:
                await self._timed(app, scope, receive, send)
            finally:
                self._running -= 1

        return middleware

    def _admit(self, scope: Scope, needed: str) -> None:
        scope["auth"] = key = self._key(scope)
        client = scope.get("client")
        caller = key.name if key else f"address {client[0] if client else ''}"
        if needed == "metrics":
            caller = f"scraper {caller}"  # a bucket of its own: alerts have to see who empties the other
        if wait_s := self._buckets.wait_s(caller, time.monotonic()):
            raise refused(429, f"more than {self._serve.rate:g} requests a second", wait_s)
        if not self._keys.required:
            self._refuse_foreign_pages(Request[Any, Any, Any](scope).headers)
            return
        if key is None:
            detail = "a valid key is needed: Authorization: Bearer KEY"
            raise HTTPException(status_code=401, detail=detail, headers={"WWW-Authenticate": "Bearer"})
        if needed not in key.scopes:
            raise HTTPException(status_code=403, detail=f"this key has no scope {needed}")

    def _refuse_foreign_pages(self, headers: Headers) -> None:
        """Without keys a page of any site that this machine's browser shows could write, and read by DNS rebinding."""
        host, site = headers.get("host", "localhost"), headers.get("sec-fetch-site", "none")
        if not _LOOPBACK.fullmatch(host):
            raise HTTPException(status_code=403, detail=f"without keys only loopback is answered, not {host}")
        if site == "cross-site" and headers.get("origin") not in self._serve.cors_origins:
            raise HTTPException(status_code=403, detail="without keys no other site's page is answered")

    def _key(self, scope: Scope) -> Key | None:
        if not self._keys.required:
            return None
        asked = Request[Any, Any, Any](scope)
        query = asked.query_params
        if scope["route_handler"].opt.get("stream") and query.get("ticket"):
            users = query.getall("user", [])
            return self._keys.redeem(query["ticket"], users[0], time.time()) if len(users) == 1 else None
        return self._keys.find(asked.headers.get("authorization", ""))

    async def _timed(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        read = started = False

        async def reading() -> HTTPReceiveMessage:
            nonlocal read
            message: HTTPReceiveMessage = await receive()  # type: ignore[assignment]  # no WebSocket comes here
            read = message["type"] != "http.request" or not message["more_body"]
            return message

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self._serve.timeout_s):
                await app(scope, reading, sending)
        except TimeoutError as error:
            if started:
                raise  # the connection is closed: nothing can be said any more
            what = ("an answer", 503) if read or scope.get("method") != "POST" else ("the whole body", 408)
            raise refused(what[1], f"not {what[0]} within {self._serve.timeout_s:g} s", 1) from error

    async def _streamed(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        cut = False

        async def patient(message: Message) -> None:
            nonlocal cut
            try:
                async with asyncio.timeout(self._serve.timeout_s):
                    await send(message)
            except TimeoutError:
                cut = True
                raise

        try:
            async with AsyncExitStack() as scope["state"]["closing"]:
                await app(scope, receive, patient)
        except Exception:
            if not cut:
                raise
            log.warning("stream cut off", reason=f"its reader took nothing for {self._serve.timeout_s:g} s")


def ids_in_paths(app: ASGIApp) -> ASGIApp:
    """Before the routes: an id may hold a slash, as %2F, and ASGI's `path` no longer tells it from the path's own. An
    empty id gets a sign, too: else the routes would take the word after it for the id."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope.get("raw_path", b"").partition(b"?")[0].decode(errors="replace")
        if _SLASHES.search(raw):
            scope["path"] = SLASH.join(map(unquote, _SLASHES.split(raw)))
        scope["path"] = _EMPTY.sub(EMPTY, scope["path"])
        await app(scope, receive, send)

    return middleware


def heads(app: ASGIApp) -> ASGIApp:
    """HEAD is answered as GET (RFC 9110, 9.3.2), without the body, which uvicorn leaves out; a stream's has no end."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "HEAD" and scope["path"] != "/v1/stream":
            scope = cast(Scope, {**scope, "method": "GET"})
        await app(scope, receive, send)

    return middleware


def measured(app: ASGIApp) -> ASGIApp:
    """Counts and times requests by route template: a path holds user ids. 499: the client left amid its body."""

    async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
        began, status, started, left = time.perf_counter(), 500, False, False

        async def hear() -> Any:
            nonlocal left
            message = await receive()
            left |= message["type"] == "http.disconnect" and not started
            return message

        async def watch(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
            await send(message)

        try:
            await app(scope, hear, watch)
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            route = scope.get("path_template") or "unknown"
            metrics.requests.labels(route, "499" if left else str(status)).inc()
            if not scope["route_handler"].opt.get("stream"):
                metrics.request_s.labels(route).observe(time.perf_counter() - began)

    return middleware
