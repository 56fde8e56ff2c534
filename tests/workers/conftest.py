"""The whole service as processes on the suite's broker: started once, small catalogue, short rounds."""

from collections.abc import Iterator

import pytest

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.producer import Producer
from tests.workers.service import Collector, Service, collecting, running


@pytest.fixture
def service(service_once: Service) -> Service:
    """The service, alive and ready before each test whatever the test before did to it."""
    service_once.await_ready()
    return service_once


@pytest.fixture
def closed_producers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What trainers and indexers open that are made and never run."""
    opened: list[Producer] = []

    def open_(connection: Connection) -> Producer:
        opened.append(Producer(connection))
        return opened[-1]

    for role in ("trainer", "indexer"):
        monkeypatch.setattr(f"workers.{role}.Producer", open_)
    yield
    for producer in opened:
        producer.close()


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def service_once(
    broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    traced = {"UPWELL_TRACING": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with running(broker, folder, folder / "artifacts", **traced) as service:
        yield service
