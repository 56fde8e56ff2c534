"""One click, one trace: from the request over producer and worker to the list, by OTLP, as processes."""

import json
import os
import secrets
import subprocess
import sys
from contextlib import suppress
from types import SimpleNamespace
from urllib.request import urlopen

import msgspec
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pytest import raises

from stream.answers import Update
from stream.client import Client
from stream.connection import Connection
from stream.consumer import end_offsets, read_window
from stream.ports import free_port
from stream.producer import BufferFull, ClickProducer
from stream.topics import Topics
from stream.tracing import TRACEPARENT, traceparent
from tests.workers.service import ITEMS, Collector, Service, clicks, collecting, until
from workers import tracing
from workers.bench.stage import environment
from workers.settings import ConfigError, Serve, Settings


def test_one_click_is_one_trace(service: Service, collector: Collector) -> None:
    topics, user = service.settings.topics, f"user {secrets.token_hex(8)}"
    caller = {"traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"}
    trace_id, click = caller["traceparent"].split("-")[1], {"user_id": user, "item_id": ITEMS[0].item_id}
    before = end_offsets(service.settings.connection, topics.recommendations.name)
    with Client(service.url) as client:
        updates = client.updates(user)
        next(update for update in updates if isinstance(update, Update))  # a stranger's list: the stream is open
        assert service.call("/v1/events", click, caller)[0] == 202
        shown = next(update.path for update in updates if isinstance(update, Update) and update.path)
    others = [msgspec.structs.replace(click, user_id=f"{user} {click.user_id}") for click in clicks(5)]
    service.send(others)  # without a trace
    names = ["POST /v1/events", f"send {topics.clicks.name}", f"process {topics.clicks.name}", *tracing.HOPS]
    until(lambda: len(collector.of(trace_id)) == len(names), "all spans are exported")

    def headers() -> dict[str, bytes | None]:
        lists = read_window(service.settings.connection, topics.recommendations.name, offsets=before)
        found = {(record.key or b"").decode(): traceparent(record.headers) for record in lists}
        return {name: value for name, value in found.items() if name.startswith(user)}

    until(lambda: len(headers()) == 6, "all lists are there")
    answered = headers()
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
    assert shown.traceparent == (answered.pop(user) or b"").decode()
    assert shown.traceparent.startswith(f"00-{trace_id}-{send.span_id.hex()}-")
    assert set(answered.values()) == {None}  # clicks without a trace, lists without one
    assert user not in str(collector.spans)


def test_a_server_that_a_signal_ends_sends_its_last_spans(settings: Settings, topics: Topics) -> None:
    port = free_port()
    with collecting() as collector:
        settings = settings.model_copy(update={"serve": Serve(port=port), "tracing": True})
        exporting = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
        own = {name: value for name, value in os.environ.items() if not name.startswith(("UPWELL_", "OTEL_"))}
        command = [sys.executable, "-m", "workers.cli", "serve"]
        with subprocess.Popen(command, env=own | exporting | environment(settings)) as server:
            try:

                def asked() -> bool:
                    with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/v1/items", timeout=20):
                        return True
                    return False

                until(asked, "it answers")
                server.terminate()
                server.wait(30)
            finally:
                server.kill()
    assert [span.name for _, span in collector.spans] == ["GET /v1/items"]


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
    (record,) = read_window(connection, topics.clicks.name)
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
