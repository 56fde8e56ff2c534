"""The click's trace in Kafka's headers: W3C trace context, https://www.w3.org/TR/trace-context/.

OpenTelemetry (the extra `tracing`) is imported where a tracer is given, and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

Header = tuple[str, bytes]
T = TypeVar("T")

TRACEPARENT = "traceparent"
_VALID = re.compile(rb"[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}").fullmatch


def traceparent(headers: Iterable[Header]) -> bytes | None:
    """The trace that a record belongs to; None also for a header that is none."""
    return next((value for name, value in headers if name == TRACEPARENT and value and _VALID(value)), None)


def sent_in_span(tracer: Tracer, topic: str, send: Callable[[list[Header]], Future[T]]) -> Future[T]:
    """`send` in a span of the active trace, or of a new one: from the call until Kafka has the record."""
    from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    span = tracer.start_span(f"send {topic}", kind=SpanKind.PRODUCER, attributes=messaging("send", topic))
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))

    def end(error: BaseException | None) -> None:
        if error is not None:
            span.set_status(StatusCode.ERROR, type(error).__name__)
        span.end()

    try:
        sent = send([(name, value.encode()) for name, value in carrier.items()])
    except BaseException as error:
        end(error)
        raise
    sent.add_done_callback(lambda done: end(done.exception()))
    return sent


def messaging(operation: str, topic: str, **more: Any) -> dict[str, Any]:
    """Attributes by OpenTelemetry's conventions for messaging; no key: it is a user's id."""
    named = {"system": "kafka", "operation.type": operation, "destination.name": topic} | more
    return {f"messaging.{name}": value for name, value in named.items()}
