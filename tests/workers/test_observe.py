"""What the demo and the console see of the roles."""

import socket
import threading

import pytest

from workers.observe import scrape


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.0 200 OK\r\nContent-Length: 900\r\n\r\nupwell 1\n",
        b"HTTP/1.0 200 OK\r\n\r\n<html>\n<body x>\n",
        b"HTTP/1.0 200 OK\r\n\r\n\xff",
    ],
)
def test_an_exporter_that_ends_amid_its_answer_or_is_none_says_nothing(said: bytes) -> None:
    """A worker that is killed meanwhile, or another program on its port: the console's figures were a 500."""

    def answer() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(said)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        thread.start()
        assert scrape(f"http://127.0.0.1:{server.getsockname()[1]}/metrics") == {}
        thread.join()
