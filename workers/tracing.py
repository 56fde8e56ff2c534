"""OpenTelemetry spans from the request to the list, where the setting `tracing` is on; else nothing of it is loaded.

Exported by OTLP over HTTP; endpoint, sampler and the rest are the environment's, as OpenTelemetry names them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from structlog.typing import Processor

from stream.tracing import TRACEPARENT, Header, messaging, traceparent
from workers.settings import ConfigError, Settings

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Middleware, Receive, Scope, Send
    from opentelemetry.trace import Tracer

HOPS = ("fold", "recommend", "send")


def start(settings: Settings, role: str) -> list[Processor]:
    """Starts the exporter, where tracing is on; what the logs have to add then. Raises ConfigError."""
    if not settings.tracing:
        return []
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(f"tracing (UPWELL_TRACING): needs the extra upwell[tracing]: {error}") from error
    provider = TracerProvider(resource=Resource.create({"service.name": f"upwell-{role}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return [_add_trace]


def stop(settings: Settings) -> None:
    """Sends what waits. Else the interpreter's exit does it, which a process that ends by a signal does not have."""
    if not settings.tracing:
        return
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider

    if isinstance(provider := trace.get_tracer_provider(), TracerProvider):
        provider.shutdown()


def _add_trace(_: Any, __: str, event: Any) -> Any:
    """Of the active span, into a log line."""
    from opentelemetry.trace import get_current_span

    span = get_current_span().get_span_context()
    return {**event, "trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"} if span.is_valid else event


def tracer_of(settings: Settings) -> Tracer | None:
    if not settings.tracing:
        return None
    from opentelemetry.trace import get_tracer

    return get_tracer("upwell")


class ClickSpans:
    """A worker's spans: for each click that brings a sampled trace one, with its hops, in that trace.

    They are made once the lists are in Kafka, of moments that are measured anyway. A click without a trace costs a
    look at its headers, a sampled one four spans.
    """

    def __init__(self, tracer: Tracer, topic: str) -> None:
        self._tracer, self._topic = tracer, topic

    @staticmethod
    def traced(records: Sequence[Any]) -> dict[int, tuple[Header]]:
        """Offset -> header of the list that answers the click, of the clicks that bring a trace."""
        found = {record.offset: traceparent(record.headers) for record in records}
        return {offset: ((TRACEPARENT, value),) for offset, value in found.items() if value}

    def end(self, partition: int, traced: Mapping[int, tuple[Header]], *moments_s: float) -> None:
        """moments_s: by perf_counter, when the batch began, was folded, had its last lists; now they are sent."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        epoch_ns = time.time_ns() - time.perf_counter_ns()
        moments = [epoch_ns + int(1e9 * moment) for moment in (*moments_s, time.perf_counter())]
        for offset, ((_, value),) in traced.items():
            place = {"destination.partition.id": str(partition), "kafka.offset": offset}
            span = self._tracer.start_span(
                f"process {self._topic}",
                TraceContextTextMapPropagator().extract({TRACEPARENT: value.decode()}),
                SpanKind.CONSUMER,
                messaging("process", self._topic, **place),
                start_time=moments[0],
            )
            if span.is_recording():
                inside = set_span_in_context(span)
                for hop, begin, end in zip(HOPS, moments, moments[1:], strict=False):
                    self._tracer.start_span(hop, inside, start_time=begin).end(end)
            span.end(moments[-1])


def request_spans(tracer: Tracer | None) -> list[Middleware]:
    """A span a request, in the caller's trace where it sends one; named by the route: the path holds user ids."""
    if tracer is None:
        return []
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    def spanned(app: ASGIApp) -> ASGIApp:
        async def middleware(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["route_handler"].opt.get("stream") or not scope["route_handler"].opt.get("scope"):
                await app(scope, receive, send)  # a stream has no end; probes and pages are not worth a span
                return
            route, method = scope["path_template"], str(scope.get("method"))
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            context = TraceContextTextMapPropagator().extract(headers)
            about = {"http.request.method": method, "http.route": route}
            with tracer.start_as_current_span(
                f"{method} {route}", context, SpanKind.SERVER, about, record_exception=False
            ) as span:

                async def watch(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        span.set_attribute("http.response.status_code", message["status"])
                        if message["status"] >= 500:
                            span.set_status(StatusCode.ERROR)
                    await send(message)

                await app(scope, receive, watch)

        return middleware

    return [spanned]
