"""One real broker for the whole suite, and fresh topics for each test."""

import os

# As in the roles, and before torch is imported: on a busy machine two threads spin for one another, 300 s for 60.
os.environ["OMP_NUM_THREADS"] = "1"

import secrets
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.topics import Topics, ensure
from workers.settings import Kafka, Settings


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.register_profile("upwell", deadline=None)  # a busy machine is no finding
    hypothesis.settings.load_profile("upwell")


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBroker]:
    with LocalBroker(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture(scope="session")
def connection(broker: LocalBroker) -> Connection:
    return Connection(broker.bootstrap)


@pytest.fixture
def topics(connection: Connection) -> Topics:
    topics = Topics(f"t{secrets.token_hex(4)}", partitions=3)
    ensure(topics, connection)
    return topics


@pytest.fixture
def settings(broker: LocalBroker, topics: Topics, tmp_path: Path) -> Settings:
    """Of this test's own topics, group and folders."""
    return Settings(
        kafka=Kafka(bootstrap=broker.bootstrap, prefix=topics.prefix, partitions=3),
        artifacts=str(tmp_path),
        cache=tmp_path / "cache",
    )
