"""What the routes share: what OpenAPI says of each, and how failures become answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kafka
from litestar.connection import Request
from litestar.di import NamedDependency
from litestar.exceptions import HTTPException, ValidationException
from litestar.exceptions.http_exceptions import RequestEntityTooLarge
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example
from litestar.params import Parameter
from litestar.response import Response

from stream.answers import Problem
from stream.consumer import MissingTopic
from stream.events import MAX_ID
from stream.producer import BufferFull, DeliveryError
from workers.keys import Scope
from workers.limits import refused
from workers.live import NotReady
from workers.service import Service

Served = NamedDependency[Service]

PROBLEMS = {
    400: "a value is wrong; `detail` names it",
    401: "no valid key",
    403: "the key lacks the scope",
    429: "too many requests of this key or address; Retry-After says when",
    503: "not ready, or overloaded; Retry-After says when",
}


def route(scope: Scope | None, *also: int, **opt: Any) -> dict[str, Any]:
    """Keyword arguments of a route that needs this scope, or none; `also`: statuses beside the usual ones."""
    usual = (400, 401, 403, 429, 503) if scope else ()
    said = {status: PROBLEMS.get(status, "see `detail`") for status in (*usual, *also)}
    responses = {s: ResponseSpec(Problem, generate_examples=False, description=what) for s, what in said.items()}
    security = [{"key": [scope]}] if scope else None
    return {"opt": {"scope": scope, **opt}, "security": security, "responses": responses}


def an_id(description: str, value: str) -> Any:
    """Of an id in a path or query: Litestar passes over what msgspec's own Meta says there."""
    return Parameter(min_length=1, max_length=MAX_ID, description=description, examples=example(value))


def example(value: Any, summary: str = "") -> list[Example]:
    return [Example(summary=summary or None, value=value)]


async def readable(request: Request[Any, Any, Any]) -> None:
    """A misspelt parameter must not pass in silence. Raises HTTPException 400 naming one that OpenAPI does not, or a
    coding of the body: unpacked, its size is anybody's guess.
    """
    if (coding := request.headers.get("content-encoding", "identity")) != "identity":
        raise HTTPException(status_code=400, detail=f"Content-Encoding: {coding} is not read, send the body as it is")
    if not request.query_params or not request.route_handler.opt.get("scope"):
        return
    paths = request.app.openapi_schema.paths or {}
    listed = getattr(paths[request.scope["path_template"]], request.method.lower()).parameters or ()
    names = [parameter.name for parameter in listed if parameter.param_in == "query"]
    for name in request.query_params:
        if name not in names:
            there = ", ".join(names) or "none"
            raise HTTPException(status_code=400, detail=f"{name}: no such parameter; there are: {there}")


@contextmanager
def asking_kafka(in_vain: str) -> Iterator[None]:
    """What Kafka does not do, or may not have done, is a 503 that says so and asks for the same again."""
    try:
        yield
    except (DeliveryError, BufferFull, MissingTopic, kafka.errors.KafkaError, TimeoutError) as error:
        raise refused(503, f"Kafka {in_vain}: {error or 'no answer in time'}", 2) from error


def invalid(_: Request[Any, Any, Any], error: ValidationException) -> Response[Problem]:
    """400 naming the parameter or field."""
    extra = error.extra if isinstance(error.extra, list) else []
    causes = [_cause(**one) if isinstance(one, dict) else str(one) for one in extra]
    return Response(Problem(400, "; ".join(causes) or error.detail), status_code=400)


def _cause(message: str = "", key: str = "data", **_: Any) -> str:
    """Litestar calls the body `data`, and says no more than that of one that is not there."""
    return f"{'body' if key == 'data' else key}: {'missing' if message == repr(key) else message}"


def problem(_: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    """JSON on every route: Litestar's own has the type of the answer that the route would have given."""
    extra = error.extra if isinstance(error.extra, dict) else None
    content = Problem(error.status_code, error.detail, extra)
    return Response(content, status_code=error.status_code, headers=error.headers)


def too_large(max_bytes: int, _: Request[Any, Any, Any], __: RequestEntityTooLarge) -> Response[Problem]:
    return Response(Problem(413, f"body: serve.max_body_bytes is {max_bytes}"), status_code=413)


def not_ready(_: Request[Any, Any, Any], error: NotReady) -> Response[Problem]:
    return Response(Problem(503, str(error)), status_code=503, headers={"Retry-After": str(error.retry_s)})


def nested(_: Request[Any, Any, Any], error: RecursionError) -> Response[Problem]:
    """What msgspec raises for a body of a thousand levels."""
    return Response(Problem(400, "body: nested too deeply"), status_code=400)
