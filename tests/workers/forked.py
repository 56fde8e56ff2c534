"""A fork server whose children say what they were asked, or end as they are told."""

import os
import signal
import socket
import sys

from workers.fork_server import serve


def work(connection: socket.socket, order: str, text: str) -> None:
    if order == "echo":
        connection.sendall(text.encode())
    elif order == "raise":
        raise ValueError(text)
    elif order == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif order == "wait":
        signal.pause()


def fork() -> int:
    if os.path.exists(os.environ.get("FULL", "")):
        raise BlockingIOError("Resource temporarily unavailable")
    return real_fork()


if __name__ == "__main__":
    real_fork, os.fork = os.fork, fork
    serve(int(sys.argv[1]), int(sys.argv[2]), work)
