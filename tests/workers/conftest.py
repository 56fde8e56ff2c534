"""The whole service as processes on the suite's broker: started once, small catalogue, short rounds."""

import secrets
from collections.abc import Iterator

import pytest

from stream.broker import LocalBroker
from stream.producer import ClickProducer
from stream.topics import ensure
from tests.workers.service import ITEMS, PARTITIONS, Service, free_port, until
from workers.settings import load_settings
from workers.up import Roles


@pytest.fixture
def service(service_once: Service) -> Service:
    """The service, alive and ready before each test whatever the test before did to it."""
    until(lambda: service_once.metric("upwell_swaps_total{served}") > 0, "the worker serves a generation")
    until(lambda: service_once.call("/readyz")[0] == 200, "the server is ready")
    return service_once


@pytest.fixture(scope="session")
def service_once(broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    environment = {
        "UPWELL_KAFKA__BOOTSTRAP": broker.bootstrap,
        "UPWELL_KAFKA__PREFIX": f"s{secrets.token_hex(4)}",
        "UPWELL_KAFKA__PARTITIONS": str(PARTITIONS),
        "UPWELL_ARTIFACTS": str(folder / "artifacts"),
        "UPWELL_CACHE": str(folder / "cache"),
        "UPWELL_SERVE__PORT": str(free_port()),
        "UPWELL_WORKER__METRICS_PORT": str(free_port()),
        "UPWELL_WORKER__DEAD_LETTER_RATIO": "0.9",
        "UPWELL_TRAINER__ROUND_S": "1",
        "UPWELL_TRAINER__MIN_EVENTS": "100",
        "UPWELL_TRAINER__HOLDOUT": "40",
    }
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
