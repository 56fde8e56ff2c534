"""Faust's private names that the partition batches stand on, and its settings that would break them."""

import inspect

import faust
from faust.transport.drivers.aiokafka import Consumer

from stream.connection import Connection
from workers.faust_batches import PartitionBatchTransport, batch_app


async def nothing() -> None: ...


def test_faust_still_calls_what_we_override() -> None:
    assert list(inspect.signature(Consumer._wait_next_records).parameters) == ["self", "timeout"]
    assert "_wait_next_records" in inspect.getsource(Consumer.getmany)
    assert "_new_transport" in inspect.getsource(faust.App.transport.fget)


def test_the_app_opens_no_port_and_makes_no_topic() -> None:
    app = batch_app("group", Connection("127.0.0.1:9092,127.0.0.1:9093"), nothing, nothing)
    assert isinstance(app.transport, PartitionBatchTransport)
    assert app.conf.web_enabled is False
    assert app.conf.topic_allow_declare is False
    assert [str(url) for url in app.conf.broker] == ["kafka://127.0.0.1:9092", "kafka://127.0.0.1:9093"]


def test_a_login_reaches_faust_with_tls() -> None:
    """FACTS.md: SASLCredentials without an SSL context would be plaintext in silence."""
    connection = Connection("127.0.0.1:9092", tls=True, username="me", password="hush")
    credentials = batch_app("group", connection, nothing, nothing).conf.broker_credentials
    assert credentials.ssl_context is not None
    assert (credentials.protocol.value, credentials.username) == ("SASL_SSL", "me")
