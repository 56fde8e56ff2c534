"""The broker as a process: it comes back as the same one, belongs to one folder, and dies with its parent."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import kafka
import pytest

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.consumer import Record, tail
from stream.jars import BrokerError
from stream.kraft import configure, require_free
from stream.topics import Topics, ensure

DEADLINE_S = 60  # never waited out unless something is broken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Formatted by the first test, resumed by the next."""
    return tmp_path_factory.mktemp("own")


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(pid, 0)
            time.sleep(0.05)
            continue
        return
    raise AssertionError(f"process {pid} lives on")


def next_value(following: Iterator[list[Record]]) -> bytes | None:
    return next(record.value for batch in following for record in batch)


def test_the_same_broker_after_a_stop_and_after_a_kill(folder: Path) -> None:
    broker = LocalBroker(folder)
    topics = Topics("t", partitions=1)
    seen, stop = list[bytes | None](), threading.Event()
    with broker:
        address, connection = broker.bootstrap, Connection(broker.bootstrap)
        assert os.getsid(broker.pid or 0) != os.getsid(0)  # a terminal's Ctrl-C is not for it
        ensure(topics, connection)
        producer = kafka.KafkaProducer(**connection.kafka_python(), reconnect_backoff_max_ms=500)
        producer.send(topics.users.name, b"first", b"k").get(10)
        following = tail(connection, [topics.users.name], stop, lambda: None)
        seen.append(next_value(following))

        first = broker.pid or 0
        broker.stop()
        wait_until_gone(first)
        broker.start()
        assert broker.bootstrap == address
        producer.send(topics.users.name, b"after a stop", b"k").get(30)
        seen.append(next_value(following))

        os.kill(broker.pid or 0, signal.SIGKILL)
        wait_until_gone(broker.pid or 0)
        broker.start()
        producer.send(topics.users.name, b"after a kill", b"k").get(30)
        seen.append(next_value(following))
        producer.close()
        stop.set()
        assert not list(following)
    assert seen == [b"first", b"after a stop", b"after a kill"]
    assert not broker.running


def test_kill_9_of_the_parent_ends_the_broker(folder: Path) -> None:
    started = f"b = LocalBroker(Path({str(folder)!r})); b.start(); print(b.pid, flush=True); time.sleep(600)"
    code = f"import time; from pathlib import Path; from stream.broker import LocalBroker; {started}"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout as out:
        java = int(out.readline().split()[-1])
    os.kill(java, 0)
    parent.kill()
    parent.wait()
    wait_until_gone(java)


def test_a_killed_guard_takes_the_broker_along(folder: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("PR_SET_PDEATHSIG is Linux's")
    broker = LocalBroker(folder)  # waits, if need be, for the last one's guard to end
    with broker:
        java = broker.pid or 0
        guard = os.getsid(java)
        os.kill(guard, signal.SIGKILL)
        wait_until_gone(java)


def test_one_folder_one_broker(broker: LocalBroker) -> None:
    with pytest.raises(BrokerError, match=f"in use by the broker of process {os.getpid()}"):
        LocalBroker(broker.folder).start()
    assert broker.running


def test_a_taken_port_is_named(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=f"port {port} is taken"):
            LocalBroker(folder, port=port).start()


def test_a_port_that_is_not_ours_to_open_is_not_called_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("socket.socket.bind", bind)
    with pytest.raises(BrokerError, match="port 80: Permission denied"):
        require_free(80)


def test_a_kept_port_that_another_program_has_taken_is_given_up(tmp_path: Path) -> None:
    """Nobody had asked for it, and nothing but deleting the folder helped."""
    port, cluster = configure(tmp_path, None, None, {})
    assert configure(tmp_path, None, None, {}) == (port, cluster)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert configure(tmp_path, None, None, {})[0] != port


def test_a_failed_start_shows_the_log_and_leaves_nothing(folder: Path) -> None:
    broker = LocalBroker(folder, java=["-Xmx1k"])
    with pytest.raises(BrokerError, match=r"did not come up:(.|\n)*Too small maximum heap"):
        broker.start()
    assert not broker.running


def test_a_home_without_jars_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="no jars under libs/"):
        LocalBroker(tmp_path / "data", home=tmp_path).start()
