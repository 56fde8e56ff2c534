"""How to reach Kafka, said once for both client libraries."""

import ssl
from dataclasses import dataclass, field
from typing import Any, Literal

# Without an answer for so long a connection is given up: where a firewall has forgotten it, nothing else ends it.
# No shorter: a rebalance answers when all have joined. kafka-python's default is 30 s, Faust's 90.
REQUEST_S = 10.0

Mechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


@dataclass(frozen=True)
class Connection:
    """Bootstrap addresses and, where the cluster wants them, TLS and a login.

    Raises ValueError for a login without TLS: the password would travel in the clear.
    """

    bootstrap: str  # "host:port,host:port"
    tls: bool = False
    ca_file: str | None = None  # None: the system's authorities
    cert_file: str | None = None
    key_file: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    mechanism: Mechanism = "SCRAM-SHA-512"

    def __post_init__(self) -> None:
        if not self.bootstrap.strip():
            raise ValueError("bootstrap: at least one host:port is needed")
        if (self.username is None) != (self.password is None):
            raise ValueError("username and password belong together: one of them is missing")
        if not self.tls and (self.username or self.ca_file or self.cert_file):
            raise ValueError("tls is off, but a login or a certificate is given: set tls")

    def ssl_context(self) -> ssl.SSLContext | None:
        """None without TLS."""
        if not self.tls:
            return None
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context

    def kafka_python(self) -> dict[str, Any]:
        """Keyword arguments of kafka-python's clients, and of aiokafka's, which took their names."""
        options: dict[str, Any] = {"bootstrap_servers": [host.strip() for host in self.bootstrap.split(",")]}
        options |= {"request_timeout_ms": int(1000 * REQUEST_S)}
        if self.tls:
            options |= {"security_protocol": "SASL_SSL" if self.username else "SSL"}
            options |= {"ssl_context": self.ssl_context()}
        if self.username:
            options |= {"sasl_mechanism": self.mechanism}
            options |= {"sasl_plain_username": self.username, "sasl_plain_password": self.password}
        return options
