"""What the tests of the running service share: a small catalogue, clicks that can be learned, and a client."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from typer.testing import CliRunner, Result

from stream.broker import LocalBroker
from stream.events import Artifact, Click, Item
from stream.ports import free_port
from stream.producer import ClickProducer
from stream.topics import ensure
from workers.announcements import read_announcements
from workers.cli import app
from workers.observe import scrape
from workers.settings import Settings, load_settings
from workers.states import raw_states
from workers.up import Roles

THEMES = ("space opera", "baking bread", "sailing", "chess", "jazz piano", "alpine climbing")
ITEMS = [
    Item(item_id=f"i{number}", title=f"{THEMES[number % 6]}, part {number // 6}", categories=[THEMES[number % 6]])
    for number in range(120)
]
PARTITIONS = 4
DEADLINE_S = 90.0  # never waited out unless something is broken


def clicks(count: int, users: int = 40, first: int = 0, name: str = "") -> list[Click]:
    """Users who walk through one shelf of 20 items each, which no text tells: what comes next has to be learned.

    `name` makes users and events of their own.
    """
    now_ms = time.time_ns() // 1_000_000
    return [
        Click(
            event_id=f"{name}e{number}",
            user_id=f"{name}u{number % users}",
            item_id=f"i{20 * ((number % users) % 6) + (number // users + 3 * (number % users)) % 20}",
            ts_ms=now_ms + number,
        )
        for number in range(first, first + count)
    ]


def until(true: Callable[[], bool], what: str, timeout_s: float = DEADLINE_S) -> None:
    """Waits for something that another process does; fails by naming it."""
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.1)


class Service:
    def __init__(self, settings: Settings, roles: Roles, logs: Path) -> None:
        self.settings, self.roles, self.logs = settings, roles, logs
        self.url = f"http://127.0.0.1:{settings.serve.port}"

    def call(
        self,
        path: str,
        body: Any = None,
        headers: dict[str, str] = {},  # noqa: B006
        method: str | None = None,
    ) -> tuple[int, Any]:
        """Status (0: no answer) and JSON (or text) of a request; a body makes it a POST, bytes go as they are."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data=data, headers={"Content-Type": "application/json"} | headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                status, raw = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, raw = error.code, error.read()
        except urllib.error.URLError as error:
            status, raw = 0, str(error).encode()  # nobody listens: the server starts
        try:
            return status, json.loads(raw)
        except ValueError:
            return status, raw.decode()

    def metric(self, name: str, role: str = "worker") -> float:
        return scrape(f"http://{self.exporters[role]}/metrics").get(name, 0.0)

    @property
    def exporters(self) -> dict[str, str]:
        """HOST:PORT of each role's metrics."""
        s = self.settings
        ports = {role: getattr(s, role).metrics_port for role in ("worker", "trainer", "indexer")}
        return {role: f"127.0.0.1:{port}" for role, port in (ports | {"serve": s.serve.port}).items()}

    def send(self, events: list[Click]) -> None:
        with ClickProducer(self.settings.connection, self.settings.topics) as producer:
            for event in events:
                producer.send(event)

    def states(self) -> dict[str, bytes]:
        return raw_states(self.settings)

    def log(self, role: str) -> str:
        return (self.logs / f"{role}.log").read_text()

    def await_ready(self) -> None:
        until(lambda: self.metric("upwell_swaps_total{served}") > 0, "the worker serves a generation")
        until(lambda: self.call("/readyz")[0] == 200, "the server is ready")

    def serves(self, generation: Artifact) -> bool:
        """In the worker and in the server."""
        serving = f"upwell_generation_info{{{generation.name}}}"
        return self.metric(serving) == self.metric(serving, "serve") == 1

    @contextmanager
    def makers_stopped(self) -> Iterator[Artifact]:
        """Trainer and indexer stand still: no generation comes meanwhile. The newest one, which serves."""
        makers = [self.roles.pids[role] for role in ("trainer", "indexer")]
        for maker in makers:
            os.kill(maker, signal.SIGSTOP)
        try:
            newest = read_announcements(self.settings).wanted()[0]
            until(lambda: self.serves(newest), "the newest serves")
            yield newest
        finally:
            for maker in makers:
                os.kill(maker, signal.SIGCONT)


class Collector:
    """What an OpenTelemetry collector is sent: (service, span)."""

    def __init__(self) -> None:
        self.url = ""
        self.spans: list[tuple[str, Span]] = []

    def of(self, trace_id: str) -> dict[str, tuple[str, Span]]:
        return {span.name: (service, span) for service, span in self.spans if span.trace_id.hex() == trace_id}

    def take(self, raw: bytes) -> None:
        for of_resource in ExportTraceServiceRequest.FromString(raw).resource_spans:
            (service,) = (a.value.string_value for a in of_resource.resource.attributes if a.key == "service.name")
            self.spans += [(service, span) for scope in of_resource.scope_spans for span in scope.spans]


@contextmanager
def collecting() -> Iterator[Collector]:
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
        collector.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def running(broker: LocalBroker, folder: Path, artifacts: Path, **more: str) -> Iterator[Service]:
    """All roles on fresh topics with the small catalogue; their settings are in the environment meanwhile."""
    environment = {
        "UPWELL_KAFKA__BOOTSTRAP": broker.bootstrap,
        "UPWELL_KAFKA__PREFIX": f"s{secrets.token_hex(4)}",
        "UPWELL_KAFKA__PARTITIONS": str(PARTITIONS),
        "UPWELL_ARTIFACTS": str(artifacts),
        "UPWELL_CACHE": str(folder / "cache"),
        "UPWELL_SERVE__PORT": str(free_port()),
        "UPWELL_WORKER__METRICS_PORT": str(free_port()),
        "UPWELL_TRAINER__METRICS_PORT": str(free_port()),
        "UPWELL_INDEXER__METRICS_PORT": str(free_port()),
        "UPWELL_WORKER__DEAD_LETTER_RATIO": "0.9",
        "UPWELL_TRAINER__ROUND_S": "1",
        "UPWELL_TRAINER__MIN_EVENTS": "100",
        "UPWELL_TRAINER__HOLDOUT": "40",
    }
    environment |= more
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        settings = load_settings()
        ensure(settings.topics, settings.connection)
        with ClickProducer(settings.connection, settings.topics) as producer:
            for item in ITEMS:
                producer.send_item(item)
        with Roles(environment, folder) as roles:
            yield Service(settings, roles, folder)


def upwell_here(settings: Settings, *arguments: str, **more: Any) -> Result:
    """A command in this process with these settings, and without logging, which it would set up for good."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.command.settings_for", lambda role, reach_kafka=True: settings)
        return CliRunner().invoke(app, arguments, **more)


def upwell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a process, which costs three seconds, with the settings of the environment."""
    command = [sys.executable, "-m", "workers.cli", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=60)
