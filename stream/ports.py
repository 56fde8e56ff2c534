"""A free TCP port for a process of ours."""

import contextlib
import secrets
import socket

PORTS = range(20000, 32768)  # below the range of outgoing ports: no client can sit on a server's port


def free_port() -> int:
    """A TCP port that nobody listens on, of those that no outgoing connection is given; a server may still take it."""
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
