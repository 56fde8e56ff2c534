"""One click, one trace: from the request over producer and worker to the list, by OTLP, as processes."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pytest import raises

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.consumer import read_window
from stream.producer import BufferFull, ClickProducer
from stream.topics import Topics
from stream.tracing import TRACEPARENT, traceparent
from tests.workers.service import ITEMS, clicks, running, until
from workers import tracing
from workers.settings import ConfigError, Settings


class Collector:
    """What an OpenTelemetry collector is sent: (service, span)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []

    def of(self, trace_id: str) -> dict[str, tuple[str, Span]]:
        return {span.name: (service, span) for service, span in self.spans if span.trace_id.hex() == trace_id}

    def take(self, raw: bytes) -> None:
        for of_resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            (service,) = (a.value.string_value for a in of_resource.resource.attributes if a.key == "service.name")
            self.spans += [(service, span) for scope in of_resource.scope_spans for span in scope.spans]


@contextmanager
def collecting() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.take(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield collector, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_one_click_is_one_trace(broker: LocalBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as (collector, endpoint):
        monkeypatch.setenv("UPWELL_TRACING", "true")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with running(broker, tmp_path, tmp_path / "artifacts") as service:
            until(lambda: service.metric("upwell_swaps_total{served}") > 0, "the worker serves")
            until(lambda: service.call("/readyz")[0] == 200, "the server is ready")
            caller = {"traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"}
            trace_id, click = caller["traceparent"].split("-")[1], {"user_id": "known", "item_id": ITEMS[0].item_id}
            assert service.call("/v1/events", click, caller)[0] == 202
            service.send(clicks(5))  # without a trace
            names = ["POST /v1/events", f"send {service.settings.topics.clicks.name}"]
            names += [f"process {service.settings.topics.clicks.name}", *tracing.HOPS]
            until(lambda: len(collector.of(trace_id)) == len(names), "all spans are exported")
            lists = read_window(service.settings.connection, service.settings.topics.recommendations.name)
            headers = {r.key: traceparent(r.headers) for records in lists for r in records}
    found = collector.of(trace_id)
    assert set(found) == set(names)
    (request, send, process), hops = ([found[name][1] for name in part] for part in (names[:3], names[3:]))
    assert request.parent_span_id.hex() == caller["traceparent"].split("-")[2]
    assert send.parent_span_id == request.span_id and process.parent_span_id == send.span_id
    assert {hop.parent_span_id for hop in hops} == {process.span_id}
    ends = [process.start_time_unix_nano, *(hop.end_time_unix_nano for hop in hops)]
    assert [hop.start_time_unix_nano for hop in hops] == ends[:3] and ends == sorted(ends)
    assert ends[3] == process.end_time_unix_nano
    assert [found[name][0] for name in names] == ["upwell-serve"] * 2 + ["upwell-worker"] * 4
    assert (headers.pop(b"known") or b"").decode().startswith(f"00-{trace_id}-{send.span_id.hex()}-")
    assert len(headers) == 5 and set(headers.values()) == {None}  # clicks without a trace, lists without one
    assert not [span for _, span in collector.spans if span.name.startswith("process") and span != process]
    assert "known" not in str(collector.spans)  # no user in a span


def test_the_producer_says_what_failed(connection: Connection, topics: Topics) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("shop")
    with ClickProducer(connection, topics, tracer=tracer) as good, tracer.start_as_current_span("checkout") as checkout:
        good.send(clicks(1)[0])
    with ClickProducer(connection, topics, tracer=tracer, max_in_flight=0, block_s=0.01) as full, raises(BufferFull):
        full.send(clicks(1)[0])
    _, sent, failed = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
    assert sent.context and sent.context.trace_id == checkout.get_span_context().trace_id
    assert sent.status.is_ok and failed.status.status_code is StatusCode.ERROR
    (record,) = (r for records in read_window(connection, topics.clicks.name) for r in records)
    carried = f"00-{sent.context.trace_id:032x}-{sent.context.span_id:016x}-"  # and flags
    assert (traceparent(record.headers) or b"").decode().startswith(carried)


@pytest.mark.parametrize("header", [b"", b"nonsense", b"00-" + b"0" * 32 + b"-" + b"1" * 16 + b"-01", b"\xff" * 55])
def test_a_header_that_is_no_trace_is_passed_over(header: bytes) -> None:
    record = SimpleNamespace(offset=3, headers=[("other", b"x"), (TRACEPARENT, header)])
    assert tracing.ClickSpans.traced([record]) == {}


def test_logs_name_the_trace_and_off_loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    script = """if True:
        import sys
        from workers import logs, tracing
        from workers.settings import Settings
        import structlog
        on = sys.argv[1] == "on"
        logs.configure("INFO", "serve", *tracing.start(Settings(tracing=on), "serve"))
        if on:
            with tracing.tracer_of(Settings(tracing=True)).start_as_current_span("x") as span:
                structlog.get_logger().info("inside")
            print(f"{span.get_span_context().trace_id:032x}")
        else:
            import workers.user_worker, workers.service
        structlog.get_logger().info("outside")
        print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
    """
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")  # nobody listens: a role goes on, and ends
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    for state in ("on", "off"):
        command = [sys.executable, "-c", script, state]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        if state == "on":
            inside, outside = lines
            assert inside["trace_id"] == done.stdout.splitlines()[0] and "trace_id" not in outside
        else:
            assert done.stdout.splitlines() == ["[]"]


def test_without_the_extra_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with raises(ConfigError, match=r"UPWELL_TRACING.*upwell\[tracing\]"):
        tracing.start(Settings(tracing=True), "worker")
