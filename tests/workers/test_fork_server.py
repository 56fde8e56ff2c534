import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from workers.fork_server import Forked, ForkServer
from workers.processes import open_many


@pytest.fixture
def server() -> Iterator[ForkServer]:
    with closing(ForkServer("tests.workers.forked")) as server:
        yield server


def forked(server: ForkServer, order: str, text: str = "") -> tuple[Forked, bytes]:
    """The child of an order and all that it says before it goes."""
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    with ours:
        with theirs:
            child = server.fork(theirs, order, text)
        return child, b"".join(iter(lambda: ours.recv(1 << 16), b""))


@pytest.mark.parametrize("text", ["", "two words\nand a line", "x" * 1_000_000, "泉"])
def test_a_child_gets_its_arguments_and_its_socket(server: ForkServer, text: str) -> None:
    child, said = forked(server, "echo", text)
    assert said.decode() == text
    assert child.wait(20) == 0 == child.wait(0)


def test_how_a_child_ended_is_told(server: ForkServer, capfd: pytest.CaptureFixture[str]) -> None:
    assert [forked(server, order)[0].wait(20) for order in ("raise", "die", "echo")] == [1, -9, 0]
    assert "ValueError" in capfd.readouterr().err


def test_a_child_that_stays_is_waited_for_and_killed(server: ForkServer) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child = server.fork(theirs, "wait", "")
        with pytest.raises(TimeoutError):
            child.wait(0.1)
        child.kill()
        assert child.wait(20) == -9
        child.kill()  # of what has gone: nothing


def test_a_fork_that_fails_costs_no_child_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULL", str(full := tmp_path / "full"))  # while it is there, tests/workers/forked.py has no room
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(ForkServer("tests.workers.forked")) as server:
        child = server.fork(theirs, "wait", "")
        full.touch()
        with pytest.raises(BlockingIOError):
            server.fork(theirs, "echo", "one more")
        full.unlink()
        assert forked(server, "echo", "again")[1] == b"again"
        with pytest.raises(TimeoutError):
            child.wait(0.1)


def test_with_its_end_the_children_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, closing(ForkServer("tests.workers.forked")) as server:
        child = server.fork(theirs, "wait", "")
        server.close()
        assert child.wait(20) == -15
        assert forked(server, "echo", "again")[1] == b"again"


def test_it_starts_beside_more_descriptors_than_select_takes(server: ForkServer) -> None:
    """A server of a thousand streams has them, and its own socket comes after."""
    with ExitStack() as kept:
        kept.callback(resource.setrlimit, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
        open_many()
        for _ in range(1100):
            kept.enter_context(open(os.devnull))
        assert forked(server, "echo", "ready")[1] == b"ready"
