"""Connection: one set of names for both clients, and no password in the clear."""

import inspect

import aiokafka
import kafka
import pytest

from stream.connection import Connection

SECURE = Connection("a:1, b:2", tls=True, username="ada", password="secret")


def test_plain_needs_only_the_addresses() -> None:
    assert Connection("a:1, b:2").kafka_python() == {"bootstrap_servers": ["a:1", "b:2"], "request_timeout_ms": 10_000}


def test_options_are_known_to_both_clients() -> None:
    assert SECURE.kafka_python()["security_protocol"] == "SASL_SSL"
    for known in (kafka.KafkaConsumer.DEFAULT_CONFIG, kafka.KafkaProducer.DEFAULT_CONFIG):
        assert SECURE.kafka_python().keys() <= set(known)
    for client in (aiokafka.AIOKafkaConsumer, aiokafka.AIOKafkaProducer):
        assert SECURE.kafka_python().keys() <= set(inspect.signature(client.__init__).parameters)


def test_certificates_are_checked() -> None:
    context = SECURE.ssl_context()
    assert context is not None
    assert context.check_hostname


@pytest.mark.parametrize(
    "wrong",
    [
        {"bootstrap": " "},
        {"username": "ada", "password": "secret"},
        {"tls": True, "username": "ada"},
        {"ca_file": "ca.pem"},
    ],
)
def test_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        Connection(**({"bootstrap": "a:1"} | wrong))  # type: ignore[arg-type]


def test_the_password_is_not_shown() -> None:
    assert "secret" not in repr(SECURE)
