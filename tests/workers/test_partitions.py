"""Order within a partition, independence between them, and what becomes of what is given up."""

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from workers import partitions as partitions_module
from workers.batcher import Batcher
from workers.faust_batches import Fetched
from workers.partitions import Batch, Partitions


class Message(SimpleNamespace):
    """As Faust's: it can be referred to weakly."""


class Work:
    """Notes what it gets; each partition goes on when its gate is open."""

    def __init__(self) -> None:
        self.got: list[tuple[str, list[int]]] = []
        self.gates = {tp: asyncio.Event() for tp in "ab"}
        self.partitions = Partitions(self)
        self.assigned = set("ab")

    async def __call__(self, tp: str, batches: list[Batch]) -> None:
        self.got.append((tp, [record for batch in batches for record in batch.event.value.records]))
        await self.gates[tp].wait()
        for batch in batches:
            await batch.acknowledge()

    async def put(self, tp: str, *records: int, num_bytes: int = 0) -> Any:
        message = Message(tp=tp, acked=False, serialized_value_size=num_bytes)

        async def acknowledge() -> None:
            message.acked = True

        event = SimpleNamespace(message=message, value=Fetched(0, 0, list(records)))
        await self.partitions.put(Batch(event, acknowledge), lambda: self.assigned)
        await asyncio.sleep(0)
        return message


async def until_idle(work: Work, tp: str) -> None:
    async with asyncio.timeout(5):
        while not work.partitions.idle(tp):
            await asyncio.sleep(0)


async def test_what_waits_is_worked_off_at_once_in_its_order_and_beside_the_other_partition() -> None:
    work = Work()
    for first in range(0, 8, 2):
        await work.put("a", first, first + 1)
    await work.put("b", 100)
    assert work.got == [("a", [0, 1]), ("b", [100])]  # b does not wait for a
    work.gates["b"].set()
    await until_idle(work, "b")
    assert not work.partitions.idle("a")
    work.gates["a"].set()
    await until_idle(work, "a")
    assert work.got[2:] == [("a", [2, 3, 4, 5, 6, 7])]


async def test_a_partition_whose_batch_is_not_acknowledged_is_not_idle() -> None:
    """It may look through the dead letters of an erased user for minutes: no reason to fetch again, or to give up."""
    work = Work()
    work.gates["a"].set()
    message = await work.put("a", 0)
    await until_idle(work, "a")
    message.acked = False
    assert not work.partitions.idle("a")


async def test_room_for_a_part_of_what_is_too_much_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Faust has fetched stays with Faust: the bound on memory holds while a slow partition holds on to its own."""
    monkeypatch.setattr(partitions_module, "ROOM", 3)
    work = Work()
    await work.put("b", 100)
    await work.put("a", 0, 1, 2, 3)
    late = asyncio.create_task(work.put("a", 4))
    await asyncio.sleep(0)
    work.gates["b"].set()
    await until_idle(work, "b")
    for _ in range(5):
        await asyncio.sleep(0)
    assert work.partitions.full and not late.done()
    work.gates["a"].set()
    await late
    await until_idle(work, "a")
    assert work.got[-1] == ("a", [4]) and not work.partitions.full


async def test_a_few_large_clicks_take_the_room_of_many() -> None:
    work = Work()
    for record in range(624):
        await work.put("a", record, num_bytes=64 * 1024)
    assert not work.partitions.full
    await work.put("b", 624, num_bytes=64 * 1024)
    assert work.partitions.full  # at 625, some 40 MB
    for gate in work.gates.values():
        gate.set()
    await until_idle(work, "a")
    assert not work.partitions.full


async def test_a_partition_taken_away_leaves_nothing_that_a_rebalance_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(partitions_module, "ROOM", 3)
    work = Work()
    under_way, waiting = await work.put("a", 0), await work.put("a", 1)
    other = await work.put("b", 100)
    assert work.partitions.full
    late = asyncio.create_task(work.put("a", 2))  # waits for room
    await asyncio.sleep(0)
    work.assigned.discard("a")
    await work.partitions.forget(["a"])
    messages = [under_way, waiting, await late]
    assert [message.acked for message in messages] == [True] * 3 and not other.acked
    assert work.partitions.idle("a") and not work.partitions.idle("b") and not work.partitions.full
    work.assigned.add("a")
    work.gates["a"].set()
    for record in (3, 4, 5):
        await work.put("a", record)
    await until_idle(work, "a")
    assert [records for tp, records in work.got if tp == "a"] == [[0], [3], [4], [5]]  # room for all, none of the old
    await work.partitions.stop()
    assert other.acked


class Doubling:
    """Doubles numbers, one call for each time that it is told to go on; 0 is refused."""

    def __init__(self) -> None:
        self.calls: list[Sequence[int]] = []
        self.go_on = threading.Semaphore(0)
        self.batcher = Batcher[int, int](self, "doubling")

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.calls.append(numbers)
        assert self.go_on.acquire(timeout=30)
        if 0 in numbers:
            raise ZeroDivisionError
        return [2 * number for number in numbers]

    async def asked(self, *numbers: int) -> list[asyncio.Task[int]]:
        tasks = [asyncio.create_task(self.batcher.ask(number)) for number in numbers]
        await asyncio.sleep(0.01)
        return tasks


async def test_what_comes_during_a_call_is_asked_together_in_the_next() -> None:
    doubling = Doubling()
    tasks = [*await doubling.asked(1), *await doubling.asked(2, 3)]
    doubling.go_on.release(2)
    assert await asyncio.gather(*tasks) == [2, 4, 6]
    assert doubling.calls == [[1], [2, 3]]
    tasks = await doubling.asked(0, 5)
    doubling.go_on.release(3)
    failed, other = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(failed, ZeroDivisionError) and (other == 10 or isinstance(other, ZeroDivisionError))
    assert await doubling.batcher.ask(6) == 12


async def test_who_is_cancelled_does_not_take_the_others_along() -> None:
    doubling = Doubling()
    first, leads, follows = *await doubling.asked(1), *await doubling.asked(2), *await doubling.asked(3)
    doubling.go_on.release()
    assert await first == 2
    async with asyncio.timeout(30):
        while len(doubling.calls) < 2:
            await asyncio.sleep(0.01)
    leads.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leads
    doubling.go_on.release()
    assert await follows == 6
    assert doubling.calls == [[1], [2, 3]]
