"""HTTP: the app out of its routes, and uvicorn around it.

State is read from the compacted users topic, so every replica answers for every user. Lists are made at
the request, from the newest state that Kafka has shown.
"""

import asyncio
import logging
import socket
from functools import partial
from importlib.metadata import version
from typing import Any

import structlog
import uvicorn
from litestar import Litestar, Router
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.exceptions import HTTPException, ValidationException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme
from litestar.types import Message, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from workers import routes_erasure, routes_ingest, routes_ops, routes_read, routes_recommend, routes_stream, tracing
from workers.keys import Keys, load_keys
from workers.lag import LagFollower
from workers.limits import Gate, heads, ids_in_paths, measured
from workers.live import NotReady
from workers.processes import compute_in_one_thread, end_with_threads, open_many, settle, share_heaps
from workers.routes import invalid, nested, not_ready, problem, readable, too_large
from workers.service import Service
from workers.settings import Settings

log = structlog.get_logger()

REQUEST_S = 10.0

ROUTES: list[Any] = [
    routes_recommend.recommendations,
    routes_recommend.guest_recommendations,
    routes_recommend.similar,
    routes_stream.stream,
    routes_stream.ticket,
    routes_read.items,
    routes_read.user,
    routes_erasure.erase_user,
    routes_erasure.erasure,
    routes_ingest.post_events,
    routes_ingest.post_items,
    routes_ingest.remove_item,
    routes_ops.livez,
    routes_ops.readyz,
    routes_ops.prometheus,
    routes_ops.figures,
    routes_ops.page,
    routes_ops.console,
]
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
ABOUT = (
    "Fresh recommendations from a live stream of clicks. Beyond loopback every call needs a key: "
    "`Authorization: Bearer KEY`; the scope is said at each route. Errors say in `detail` what is wrong, by name."
)


async def harden(message: Message, _: Scope) -> None:
    """Every answer carries the security headers; a route's own wins."""
    if message["type"] == "http.response.start":
        there = {name.lower() for name, _ in message["headers"]}
        new = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in there]
        message["headers"] = [*message["headers"], *new]


async def tell(error: Exception, scope: Scope) -> None:
    """A bug is logged with its trace, under the route: the path and the query hold user ids."""
    if not isinstance(error, (HTTPException, NotReady)):
        log.error("request failed", route=scope.get("path_template"), exc_info=error)


def build_app(service: Service, keys: Keys) -> Litestar:
    async def provide() -> Service:
        return service

    serve = service.settings.serve
    scheme = SecurityScheme(type="http", scheme="bearer", description="a key of `upwell keys new`")
    app = Litestar(
        ROUTES,
        dependencies={"service": Provide(provide)},
        middleware=[*tracing.request_spans(service.tracer), measured, Gate(serve, keys)],
        before_request=readable,
        before_send=[harden],
        after_exception=[tell],
        exception_handlers={
            HTTPException: problem,
            ValidationException: invalid,
            RequestEntityTooLarge: partial(too_large, serve.max_body_bytes),
            NotReady: not_ready,
            RecursionError: nested,
        },
        request_max_body_size=serve.max_body_bytes,
        cors_config=CORSConfig(allow_origins=serve.cors_origins) if serve.cors_origins else None,
        openapi_config=OpenAPIConfig(
            title="Upwell",
            version=version("upwell"),
            description=ABOUT,
            use_handler_docstrings=True,
            components=Components(security_schemes={"key": scheme}),
            # Not Litestar's pages: they load scripts from elsewhere.
            render_plugins=[JsonRenderPlugin(path=["/openapi.json", "/"])],
            openapi_router=Router("/schema", route_handlers=[], opt={"scope": None}, include_in_schema=False),
        ),
        on_startup=[service.start],
        on_shutdown=[service.stop, partial(tracing.stop, service.settings)],  # uvicorn ends by the signal again
        logging_config=None,
    )
    app.asgi_handler = heads(ids_in_paths(app.asgi_handler))
    return app


class Impatient(H11Protocol):
    """Closes a connection on which for REQUEST_S no request has begun, whole headers that is; uvicorn's own patience
    begins after an answer, and ends with the next byte."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._look(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._next_look.cancel()
        super().connection_lost(exc)

    def _look(self, before: object) -> None:
        """before: the last request, where it was answered a look ago."""
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.cycle is before:
            self.transport.close()
            return
        self._next_look = self.loop.call_later(REQUEST_S, self._look, self.cycle if answered else self)


class Server(uvicorn.Server):
    """uvicorn waits for open answers; streams have no end but this one."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.updates.close()
        await super().shutdown(sockets)


def configured(service: Service, keys: Keys) -> uvicorn.Config:
    serve = service.settings.serve
    return uvicorn.Config(
        build_app(service, keys),
        host=serve.host,
        port=serve.port,
        http=Impatient,
        ssl_certfile=serve.cert_file,
        ssl_keyfile=serve.key_file,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=5,
    )


def run_server(settings: Settings) -> int:
    """Until a signal. Raises ConfigError as `load_keys`."""
    serve = settings.serve
    keys = load_keys(serve)
    compute_in_one_thread()
    end_with_threads()
    share_heaps()
    open_many()
    if keys.required and serve.cert_file is None:
        log.warning("keys travel in the clear: set serve.cert_file, or put a proxy that speaks TLS in front")
    service = Service(settings)
    LagFollower(settings).start()
    # A stream is cut off by returning; Gate has said so.
    logging.getLogger("uvicorn.error").addFilter(lambda line: "without completing response" not in line.getMessage())
    settle()
    Server(configured(service, keys), service).run()
    return 0
