"""Bugs to plant: each scenario has been seen red on one, as `CHAOS_BUG=NAME pytest tests/chaos/...` shows again.

They are patched into the worker processes alone; what judges them is whole.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from model.user_state import Applied, Fold
from workers.sender import BatchSender
from workers.user_worker import UserWorker


def ack_first() -> None:
    """A batch is acked, and can be committed, before its work is done."""
    process, tail = UserWorker.process, asyncio.Event()
    tail.set()

    async def later(self: UserWorker, partition: int, records: Any) -> None:
        nonlocal tail
        before, tail = tail, asyncio.Event()
        done = tail

        async def work() -> None:
            await before.wait()
            await asyncio.sleep(1)
            await process(self, partition, records)
            done.set()

        tasks.append(asyncio.create_task(work()))

    tasks: list[Any] = []
    UserWorker.process = later  # type: ignore[method-assign]


def state_not_awaited() -> None:
    """The state is on its way when the batch is acked."""
    send, tasks = BatchSender.send, []

    async def unawaited(self: BatchSender, topic: str, partition: int, records: Any) -> None:
        async def slow() -> None:
            await asyncio.sleep(2)
            await send(self, topic, partition, records)

        if topic.endswith("users"):
            tasks.append(asyncio.create_task(slow()))
        else:
            await send(self, topic, partition, records)

    BatchSender.send = unawaited  # type: ignore[method-assign]


def redelivered_applied() -> None:
    """A click read again is folded again."""
    Fold.is_new = lambda self, click: True  # type: ignore[method-assign]


def repeated_applied() -> None:
    """An event sent twice is folded twice."""

    def by_offset(self: Fold, click: Applied) -> bool:
        return click.offset > self.offset

    Fold.is_new = by_offset  # type: ignore[method-assign]


def dead_letter_dropped() -> None:
    """Bad messages vanish."""
    decode = UserWorker._decode
    UserWorker._decode = lambda self, records: (decode(self, records)[0], [])  # type: ignore[method-assign]


BUGS: dict[str, Callable[[], None]] = {
    bug.__name__: bug
    for bug in (ack_first, state_not_awaited, redelivered_applied, repeated_applied, dead_letter_dropped)
}


def plant(name: str) -> None:
    """Nothing for an empty name."""
    if name:
        BUGS[name]()
