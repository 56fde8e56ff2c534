"""The files of a Kafka node under its folder: settings, logging, and who it is (kept across restarts)."""

import errno
import json
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path

from stream.jars import BrokerError
from stream.ports import free_port

LOG4J = """\
Configuration:
  Appenders:
    Console: {name: out, PatternLayout: {pattern: "%d{ISO8601} %p %m (%c)%n"}}
  Loggers:
    Root: {level: WARN, AppenderRef: {ref: out}}
"""


def configure(folder: Path, port: int | None, cluster: str | None, settings: Mapping[str, object]) -> tuple[int, str]:
    """Writes the broker's files. Its port and cluster are the given ones, else the last run's, else new ones: a client
    or the log would miss them. The port is new, too, where another program has taken the last run's.

    settings: in the place of a lone node's. Raises BrokerError when another program has the given port.
    """
    kept = folder / "broker.json"
    last = json.loads(kept.read_text()) if kept.exists() else {}
    if port:
        require_free(port)
    else:
        try:
            require_free(port := last["port"])
        except (KeyError, BrokerError):
            port = free_port()
    cluster = cluster or last.get("cluster") or cluster_id()
    kept.write_text(json.dumps({"port": port, "cluster": cluster}))
    (folder / "log4j2.yaml").write_text(LOG4J)
    lines = (f"{key}={value}\n" for key, value in {**_settings(folder, port), **settings}.items())
    (folder / "server.properties").write_text("".join(lines))
    return port, cluster


def _settings(folder: Path, port: int) -> dict[str, object]:
    client, controller = f"127.0.0.1:{port}", f"127.0.0.1:{free_port()}"
    return {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@{controller}",
        "listeners": f"PLAINTEXT://{client},CONTROLLER://{controller}",
        "advertised.listeners": f"PLAINTEXT://{client}",
        "controller.listener.names": "CONTROLLER",
        "log.dirs": folder / "log",
        "auto.create.topics.enable": "false",
        "broker.session.timeout.ms": 3000,  # after a SIGKILL the next start waits it out; 9 s by default
        "broker.heartbeat.interval.ms": 1000,
        "group.initial.rebalance.delay.ms": 0,
        "group.min.session.timeout.ms": 1000,
        "log.cleaner.dedupe.buffer.size": 16 << 20,
        "log.cleaner.backoff.ms": 1000,
        "log.retention.check.interval.ms": 1000,
        "log.segment.delete.delay.ms": 1000,
        # One node cannot hold three copies, and its restart has fewer partitions to open.
        "offsets.topic.num.partitions": 4,
        "offsets.topic.replication.factor": 1,
        "transaction.state.log.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
    }


def require_free(port: int) -> None:
    """Raises BrokerError where something listens there, or we may not."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last run's connections do not count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BrokerError(f"port {port} is taken by another program: free it, or give another") from error
            raise BrokerError(f"port {port}: {error.strerror}: give another") from error


def cluster_id() -> str:
    """16 random bytes in URL-safe base64; Kafka's tools take a leading dash for an option."""
    return "u" + secrets.token_urlsafe(16)[1:]
