"""Scenario 15: TLS and SASL on a real Kafka. One setting opens both client libraries, what is wrong ends the start."""

import gc
import os
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import kafka
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from kafka.admin import ScramMechanism, UserScramCredentialUpsertion

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.ports import free_port
from stream.producer import ClickProducer
from stream.topics import ensure
from tests.workers.service import clicks, until
from workers.bench.stage import environment
from workers.check import count_applied
from workers.preflight import check_access
from workers.settings import ConfigError, Kafka, Serve, Settings
from workers.states import raw_states

PASSWORD = "secret"


class SecureBroker(LocalBroker):
    """Beside the open listener, which the broker itself uses, two with TLS and a login: SECURE and EXPIRED."""

    def __init__(self, folder: Path, certificates: dict[str, trustme.LeafCert]) -> None:
        super().__init__(folder)
        self.certificates = certificates
        self.at = {name: f"127.0.0.1:{free_port()}" for name in certificates}

    def _format(self, java: list[str], cluster: str) -> None:
        own = ",".join(f"{name}://{address}" for name, address in self.at.items())
        path = self.folder / "server.properties"
        lines = path.read_text().replace("listeners=PLAINTEXT", f"listeners={own},PLAINTEXT").splitlines()
        protocols = [f"{name}:SASL_SSL" for name in self.at] + ["PLAINTEXT:PLAINTEXT", "CONTROLLER:PLAINTEXT"]
        lines.append(f"listener.security.protocol.map={','.join(protocols)}")
        modules = "org.apache.kafka.common.security"
        for name, certificate in self.certificates.items():
            pem = self.folder / f"{name}.pem"
            pem.write_bytes(pkcs8(certificate) + b"".join(part.bytes() for part in certificate.cert_chain_pems))
            lines += [
                f"listener.name.{name.lower()}.{setting}"
                for setting in (
                    f"ssl.keystore.location={pem}",
                    "ssl.keystore.type=PEM",
                    "sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512",
                    f"scram-sha-512.sasl.jaas.config={modules}.scram.ScramLoginModule required;",
                    f'plain.sasl.jaas.config={modules}.plain.PlainLoginModule required user_me="{PASSWORD}";',
                )
            ]
        path.write_text("\n".join(lines) + "\n")
        super()._format(java, cluster)


def pkcs8(certificate: trustme.LeafCert) -> bytes:
    """The key in the only form that Kafka reads from PEM."""
    key = serialization.load_pem_private_key(certificate.private_key_pem.bytes(), None)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SecureBroker, Path]]:
    folder, authority = tmp_path_factory.mktemp("secure"), trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
    past = datetime(2020, 1, 1, tzinfo=UTC), datetime(2021, 1, 1, tzinfo=UTC)
    certificates = {
        "SECURE": authority.issue_cert("127.0.0.1"),
        "EXPIRED": authority.issue_cert("127.0.0.1", not_before=past[0], not_after=past[1]),
    }
    with SecureBroker(folder / "kafka", certificates) as broker:
        with kafka.KafkaAdminClient(bootstrap_servers=broker.bootstrap) as admin:
            credential = UserScramCredentialUpsertion("me", ScramMechanism.SCRAM_SHA_512, PASSWORD)
            admin.alter_user_scram_credentials([credential])
        yield broker, folder


def right(broker: SecureBroker, folder: Path) -> Kafka:
    address, authority = broker.at["SECURE"], str(folder / "ca.pem")
    return Kafka(
        bootstrap=address, partitions=2, tls=True, ca_file=authority, username="me", password=PASSWORD, prefix="tls"
    )


def variables(section: Kafka, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UPWELL_")}
    serve = Serve(port=free_port())
    settings = Settings(kafka=section, artifacts=str(folder / "artifacts"), cache=folder / "cache", serve=serve)
    return kept | environment(settings)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_one_setting_for_faust_and_kafka_python(secure: tuple[SecureBroker, Path], mechanism: str) -> None:
    """A click sent by kafka-python is folded by the Faust worker, over TLS and with a login."""
    broker, folder = secure
    section = right(broker, folder).model_copy(update={"mechanism": mechanism, "prefix": f"tls-{mechanism}"})
    settings, sent = Settings(kafka=section), clicks(20)
    ensure(settings.topics, settings.connection)
    with ClickProducer(settings.connection, settings.topics) as producer:
        for click in sent:
            producer.send(click)
    command = [sys.executable, "-m", "workers.cli", "worker"]
    worker = subprocess.Popen(command, env=variables(section, folder), stderr=subprocess.DEVNULL)
    try:
        until(lambda: count_applied(sent, raw_states(settings)) == 20, "all clicks are applied")
    finally:
        worker.terminate()
        assert worker.wait(20) == 0


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ({"ca_file": "other.pem"}, "certificate verify failed"),
        ({"ca_file": "nowhere.pem"}, "No such file"),
        ({"bootstrap": "EXPIRED"}, "certificate has expired"),
        ({"password": "wrong"}, "Authentication failed"),
        ({"username": "nobody"}, "Authentication failed"),
        ({"bootstrap": "PLAINTEXT"}, "speaks no TLS"),
        ({"tls": False, "username": None, "password": None, "ca_file": None}, "wants TLS"),
    ],
)
def test_what_is_wrong_is_said(secure: tuple[SecureBroker, Path], wrong: dict[str, object], cause: str) -> None:
    broker, folder = secure
    addresses = broker.at | {"PLAINTEXT": broker.bootstrap}
    update = {k: addresses.get(str(v), str(folder / str(v)) if k == "ca_file" and v else v) for k, v in wrong.items()}
    with pytest.raises(ConfigError, match=cause) as refused:
        check_access(right(broker, folder).model_copy(update=update).connection)
    assert len(str(refused.value).splitlines()) == 1
    del refused
    gc.collect()  # a connection left open is an error here, and not in whatever test comes next


@pytest.mark.parametrize("role", ["worker", "trainer", "indexer", "serve"])
def test_no_role_starts_with_a_wrong_password(secure: tuple[SecureBroker, Path], role: str) -> None:
    section = right(*secure).model_copy(update={"password": "wrong"})
    command = [sys.executable, "-m", "workers.cli", role]
    done = subprocess.run(command, env=variables(section, secure[1]), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    head, line = done.stderr.splitlines()
    assert head == "configuration:"
    assert line.startswith("kafka.username, kafka.password")


def test_a_broker_that_is_away_is_no_bad_configuration() -> None:
    assert not check_access(Kafka(bootstrap=f"127.0.0.1:{free_port()}").connection)


def test_one_address_that_is_no_kafka_is_passed_over_while_another_answers(
    broker: LocalBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of three brokers in a bad state ended every role, with a code after which nobody starts it again."""
    monkeypatch.setattr("workers.preflight.ANSWER_S", 1.0)
    with socketserver.TCPServer(
        ("127.0.0.1", 0), socketserver.BaseRequestHandler
    ) as closing:  # what it takes it closes
        threading.Thread(target=closing.serve_forever, args=(0.05,), daemon=True).start()
        bad = f"127.0.0.1:{closing.server_address[1]}"
        try:
            assert check_access(Connection(f"{bad},{broker.bootstrap}"))
            with pytest.raises(ConfigError, match=f"kafka.tls: {bad} closes the connection"):
                check_access(Connection(f"{bad},127.0.0.1:{free_port()}"))
        finally:
            closing.shutdown()
