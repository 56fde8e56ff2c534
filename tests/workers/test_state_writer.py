"""One writer a partition on the real broker: what an overtaken one still sends changes nothing."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator

import pytest

from stream.connection import Connection
from stream.consumer import read_window
from stream.topics import Topics
from workers import state_writer
from workers.state_writer import LAST, StateWriter


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """aiokafka leaves futures with an exception; Python 3.11 must not find them while it parses (SystemError)."""
    yield
    gc.collect()


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.02)


def users(connection: Connection, topics: Topics) -> list[tuple[bytes | None, bytes | None]]:
    return [(record.key, record.value) for record in read_window(connection, topics.users.name, only=[1])]


async def test_clicks_are_acknowledged_in_order_and_only_when_their_states_are_committed(
    connection: Connection, topics: Topics
) -> None:
    seen: list[tuple[str, int]] = []
    failures: list[BaseException] = []
    writer = StateWriter(connection, topics.users.name, 1, failures.append)

    async def acknowledge(name: str) -> None:
        seen.append((name, len(await asyncio.to_thread(users, connection, topics))))

    await writer.start()
    for number in range(3):
        await writer.put({b"u": b"%d" % number, b"only-%d" % number: b""})
        await writer.put({}, lambda name=f"a{number}": acknowledge(name))  # type: ignore[misc]
    assert seen == []
    await until(lambda: len(seen) == 3)
    written = users(connection, topics)
    *_, last = read_window(connection, topics.users.name, only=[1])
    assert list(last.headers) == [LAST]
    assert dict(written) == {b"u": b"2", b"only-0": b"", b"only-1": b"", b"only-2": b""}
    assert seen == [("a0", len(written)), ("a1", len(written)), ("a2", len(written))]
    await writer.put({}, lambda: acknowledge("nothing to write"))
    await until(lambda: seen[-1][0] == "nothing to write")
    await writer.stop()
    assert failures == []


async def test_an_overtaken_writer_adds_nothing_and_is_told(
    connection: Connection, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[BaseException] = []
    acknowledged: list[str] = []

    async def acknowledge() -> None:
        acknowledged.append("zombie")

    zombie = StateWriter(connection, topics.users.name, 1, failures.append)
    await zombie.start()
    await zombie.put({b"u": b"committed"})
    await until(lambda: users(connection, topics))
    with monkeypatch.context() as patch:
        patch.setattr(state_writer, "COMMIT_S", 4.0)  # its heir has so long to start, however busy the machine
        await zombie.put({b"u": b"sent, not committed when it is overtaken"}, acknowledge)
        await asyncio.sleep(0.2)
    heir = StateWriter(connection, topics.users.name, 1, failures.append)
    await heir.start()
    assert users(connection, topics) == [(b"u", b"committed")]
    await heir.put({b"u": b"of the heir"})
    await until(lambda: len(users(connection, topics)) == 2 and failures)
    assert (len(failures), acknowledged) == (1, [])
    other = StateWriter(connection, topics.users.name, 2, failures.append)
    await other.start()  # of another partition: fences nobody
    late = StateWriter(connection, topics.users.name, 1, failures.append)
    await late.start()
    await heir.put({b"u": b"begun after it was overtaken"}, acknowledge)
    await until(lambda: len(failures) == 2)
    assert acknowledged == []
    assert users(connection, topics) == [(b"u", b"committed"), (b"u", b"of the heir")]
    for writer in (zombie, heir, other, late):
        await writer.stop()


class SlowSender:
    """Kafka that takes longer than the worker: when a send returns, the next put waits already."""

    def __init__(self) -> None:
        self.commits = 0
        self.put: Callable[[], Awaitable[None]]

    async def start(self) -> None: ...

    stop = begin = start

    async def send(self, *_: object) -> None:
        await asyncio.sleep(0.01)
        await self.put()

    async def commit(self) -> None:
        self.commits += 1


async def test_what_never_waits_for_the_worker_is_committed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sender, acknowledged = SlowSender(), list[str]()
    monkeypatch.setattr(state_writer, "BatchSender", lambda *_, **__: sender)
    monkeypatch.setattr(state_writer, "COMMIT_S", 0.1)
    writer = StateWriter(Connection("nowhere:0"), "users", 1, lambda error: pytest.fail(str(error)))

    async def acknowledge() -> None:
        acknowledged.append("one")

    sender.put = lambda: writer.put({b"u": b"next"}, acknowledge)
    await writer.start()
    await sender.put()
    await until(lambda: sender.commits >= 3 and acknowledged)
    await writer.stop()
