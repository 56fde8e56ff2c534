"""Taking partitions over on the real broker: all at once, each fenced before it is read."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any
from unittest.mock import Mock

import aiokafka.errors
import pytest
from kafka.errors import KafkaConnectionError

from model.user_state import UserState, encode_state
from stream.connection import Connection
from stream.topics import Topics
from tests.records import Record
from workers import outage
from workers import states as states_module
from workers.state_writer import StateWriter, Tombstone
from workers.states import OwnedStates, States, read_states

PARTITIONS = range(3)


def state(offset: int) -> bytes:
    return encode_state(UserState(offset=offset, applied=offset))


@pytest.fixture
async def owned(connection: Connection, topics: Topics) -> AsyncIterator[Callable[[], OwnedStates]]:
    """Makes workers' states; one that another has overtaken is told so, and that is all here."""
    made: list[OwnedStates] = []

    def make() -> OwnedStates:
        made.append(OwnedStates(connection, topics.users.name, failed=lambda error: None))
        return made[-1]

    yield make
    await asyncio.gather(*(one.stop() for one in made))
    gc.collect()  # aiokafka leaves futures with an exception


async def test_assigned_partitions_are_read_beside_one_another(
    owned: Callable[[], OwnedStates], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_read = threading.Barrier(len(PARTITIONS))

    def read(*arguments: Any) -> States:
        all_read.wait(20)  # BrokenBarrierError, were they read one after another
        return read_states(*arguments)

    monkeypatch.setattr(states_module, "read_states", read)
    worker = owned()
    worker.restore(PARTITIONS)
    assert [(await worker.of(partition)).states for partition in PARTITIONS] == [{}, {}, {}]


async def test_a_broker_that_goes_away_while_states_are_read_ends_no_worker(
    owned: Callable[[], OwnedStates], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be one of three, and the worker would be restarted into the same."""
    monkeypatch.setattr(outage, "RETRY_S", 0.0)
    results = [KafkaConnectionError("reset by peer"), TimeoutError("no progress"), dict[str, UserState]()]
    monkeypatch.setattr(states_module, "read_states", Mock(side_effect=results))
    start, fences = StateWriter.start, list[StateWriter]()

    async def away_at_first(self: StateWriter) -> None:
        fences.append(self)
        if len(fences) == 1:
            raise aiokafka.errors.KafkaConnectionError
        await start(self)

    monkeypatch.setattr(StateWriter, "start", away_at_first)
    assert (await owned().of(1)).states == {}
    assert len(fences) == 4


async def test_what_cannot_be_restored_ends_the_worker(
    connection: Connection, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched of it, so nobody would wait for it and see."""
    monkeypatch.setattr(states_module, "read_states", Mock(side_effect=ValueError("damaged")))
    told = list[BaseException]()
    owned = OwnedStates(connection, topics.users.name, told.append)
    owned.restore([1])
    with pytest.raises(ValueError, match="damaged"):
        await owned.of(1)
    assert [str(error) for error in told] == ["damaged"] and not owned.restored(1)
    await owned.stop()


async def test_what_the_owner_before_wrote_last_is_read(
    owned: Callable[[], OwnedStates], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes on while its successor is about to fence it, and after that it is too late."""
    before = (await owned().of(1)).writer
    committed = 0

    async def write() -> None:
        nonlocal committed
        for offset in range(1, 1000):
            done = asyncio.Event()

            async def acknowledge(done: asyncio.Event = done) -> None:
                done.set()

            await before.put({b"u": state(offset)}, acknowledge)
            await done.wait()
            committed = offset

    start = StateWriter.start

    async def late(self: StateWriter) -> None:
        await asyncio.sleep(2)
        await start(self)

    monkeypatch.setattr(StateWriter, "start", late)
    writing = asyncio.create_task(write())
    successor = owned()
    successor.restore(PARTITIONS)
    states = (await successor.of(1)).states
    await asyncio.sleep(1.5)
    writing.cancel()
    assert 0 < committed == states["u"].offset


async def test_a_partition_taken_away_while_it_is_restored_is_read_anew(owned: Callable[[], OwnedStates]) -> None:
    worker, other = owned(), owned()
    for pause_s in (0.0, 0.02, 0.1):
        worker.restore(PARTITIONS)
        await asyncio.sleep(pause_s)
        await worker.forget(PARTITIONS)
    written = asyncio.Event()

    async def acknowledge() -> None:
        written.set()

    await (await other.of(2)).writer.put({b"u": state(7)}, acknowledge)
    await asyncio.wait_for(written.wait(), 20)  # nobody that gave the partition up has fenced this one
    await other.forget(PARTITIONS)
    assert (await worker.of(2)).states["u"].offset == 7


async def test_a_restore_that_is_given_up_reads_no_further(
    owned: Callable[[], OwnedStates], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rebalance would leave threads that read millions of states, until none is free."""
    begun, ended = threading.Event(), threading.Event()

    def read_window(*_: Any, **__: Any) -> Iterator[Record]:
        try:
            for offset in range(2000):
                yield Record(b"u", state(offset), offset)
                begun.set()
                time.sleep(0.01)
        finally:
            ended.set()

    monkeypatch.setattr(states_module, "read_window", read_window)
    worker = owned()
    worker.restore([1])
    assert await asyncio.to_thread(begun.wait, 20)
    await worker.forget([1])
    assert await asyncio.to_thread(ended.wait, 5)


async def test_an_erased_user_s_null_says_up_to_where(owned: Callable[[], OwnedStates]) -> None:
    """A click from before the wish, delivered again, must not bring the user back."""
    before, written = owned(), asyncio.Event()

    async def acknowledge() -> None:
        written.set()

    writer = (await before.of(0)).writer
    await writer.put({b"u": state(7)})
    await writer.put({b"u": Tombstone(9)}, acknowledge)
    await asyncio.wait_for(written.wait(), 20)
    assert (await owned().of(0)).states["u"] == UserState(offset=9)
