"""A role as a process of the chaos tests: what `upwell ROLE` runs, if wanted with one deadly point in it.

The processes are forked from one that has imported everything (multiprocessing's forkserver): an import costs 5 s of
a core, and the scenarios start hundreds. Production code knows nothing of the points: they are patched in here.
"""

import asyncio
import faulthandler
import inspect
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple, cast

from stream.connection import Connection
from tests.chaos.bugs import plant
from workers import faust_batches, handed, partitions, worker_process
from workers import states as states_module
from workers.dead_letters import DeadLetters
from workers.faust_batches import BatchApp, PartitionBatchConsumer
from workers.live import Live
from workers.logs import configure
from workers.recommender import Recommender
from workers.sender import BatchSender
from workers.settings import Settings
from workers.user_worker import UserWorker

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["__main__", "tests.chaos.worker"])


class Trap(NamedTuple):
    """The process sends itself a signal at the `nth` passing of the point."""

    point: str
    nth: int
    number: signal.Signals = signal.SIGKILL


class Place(NamedTuple):
    owner: type[Any]
    method: str
    before: bool = False
    topic: str = ""  # only calls about this one


# The way of a click, in its order; a state is stored beside the search and committed after it.
POINTS = {
    "decoded": Place(UserWorker, "_decode"),
    "applied": Place(UserWorker, "_fold"),
    "searched": Place(Recommender, "recommend"),
    "sent": Place(UserWorker, "_send"),
    "storing": Place(BatchSender, "send", before=True, topic="users"),
    "stored": Place(BatchSender, "send", topic="users"),
    "before state commit": Place(BatchSender, "commit", before=True),
    "after state commit": Place(BatchSender, "commit"),
    "before commit": Place(PartitionBatchConsumer, "_commit", before=True),
    "after commit": Place(PartitionBatchConsumer, "_commit"),
}
# That of a wish to be erased: its nulls are among the lists; its state is gone, its dead letters are not.
OF_A_WISH = {
    "told": Place(UserWorker, "_tell"),
    "letters found": Place(DeadLetters, "_of"),
}


def start(
    role: Callable[[Settings], int],
    settings: Settings,
    log: Path,
    trap: Trap | None = None,
    session_s: float | None = None,
    fault: Callable[[], None] | None = None,
) -> ForkServerProcess:
    """A started process; its log is appended to. `session_s`: another session than the worker's own.

    `fault` is called in it first: what happens to it, not in it.
    """
    process = FORKS.Process(target=_run, args=(role, settings, log, trap, session_s, fault), daemon=True)
    process.start()
    return process


def end(process: ForkServerProcess) -> tuple[float, int | None]:
    """SIGTERM: seconds until it has ended, exit code; None: it was killed after 30 s."""
    began = time.monotonic()
    process.terminate()
    process.join(30)
    seconds, code = time.monotonic() - began, process.exitcode
    process.kill()
    process.join()
    return seconds, code


def warm_up() -> None:
    """Returns when the process to fork from has imported everything: a measured start begins after it."""
    nothing = FORKS.Process(target=int)
    nothing.start()
    nothing.join()


def worker(settings: Settings) -> int:
    """What `upwell worker` runs."""
    return worker_process.run_worker(settings)


def drop_batches() -> None:
    """Every third of the fetched batches does not reach the agent; fetched again, it does."""
    fetch, seen, fetched = PartitionBatchConsumer._wait_next_records, set[tuple[Any, int]](), 0

    async def lossy(self: PartitionBatchConsumer, timeout: float) -> Any:
        nonlocal fetched
        records, active = await fetch(self, timeout)
        for tp, (batch,) in list(records.items()):
            fetched += 1
            place = tp, batch.offset
            if fetched % 3 == 0 and place not in seen:
                os.write(2, f"fault: dropped {place}\n".encode())
                del records[tp]
            seen.add(place)
        return records, active

    PartitionBatchConsumer._wait_next_records = lossy


def raise_once(raised: Path) -> None:
    """The third micro-batch cannot be folded, in the first of the processes: `raised` is then there."""
    fold, passed = UserWorker._fold, itertools.count(1)

    def raises(self: UserWorker, *arguments: Any) -> Any:
        if next(passed) == 3 and not raised.exists():
            raised.touch()
            raise RuntimeError("fault: raised")
        return fold(self, *arguments)

    UserWorker._fold = raises  # type: ignore[method-assign, assignment]


def restore_slowly(slow: Collection[int], gate: Path, stuck_s: float) -> None:
    """These partitions not before there is a file, in a read that cannot be broken off."""
    read, states, looks = states_module.read_states, cast(Any, states_module), cast(Any, handed)
    looks.STUCK_S = stuck_s

    def slowly(connection: Connection, topic: str, partition: int, given_up: threading.Event) -> Any:
        while partition in slow and not gate.exists():
            time.sleep(0.1)
        return read(connection, topic, partition, given_up)

    states.read_states = slowly


def load_for_ever() -> None:
    """The first generation is being loaded and loaded."""

    def loads(self: Live) -> None:
        os.write(2, b"fault: loads\n")
        threading.Event().wait()

    Live._serve_wanted = loads  # type: ignore[method-assign]


def asked_early() -> None:
    """SIGTERM comes when the first generation serves, and Faust does not listen yet."""
    module = cast(Any, worker_process)
    settle = module.settle

    def asked() -> None:
        settle()
        os.kill(os.getpid(), signal.SIGTERM)

    module.settle = asked


def stand_still() -> None:
    """Nothing is worked off; how many clicks have been taken from Kafka is logged. Bounds a tenth of the real ones."""
    fetch, held = PartitionBatchConsumer._wait_next_records, 0
    partitions.ROOM //= 10
    faust_batches.POLL //= 10

    async def counted(self: PartitionBatchConsumer, timeout: float) -> Any:
        nonlocal held
        records, active = await fetch(self, timeout)
        if records:
            held += sum(len(batch.value.records) for (batch,) in records.values())
            os.write(2, f"fault: holds {held}\n".encode())
        return records, active

    async def stands(*_: Any) -> None:
        await asyncio.Event().wait()

    PartitionBatchConsumer._wait_next_records = counted
    UserWorker.process = stands  # type: ignore[method-assign, assignment]


def explain(*_: Any) -> None:
    """Log where each thread is and what each asyncio task, of all loops, waits for: SIGQUIT calls it."""
    faulthandler.dump_traceback(sys.stderr)
    for task in list(asyncio.tasks._all_tasks):  # type: ignore[attr-defined]
        waits, awaited = list[str](), cast(Any, task.get_coro())
        while (frame := getattr(awaited, "cr_frame", None)) is not None:
            waits.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
            awaited = awaited.cr_await
        print(f"task {task.get_name()}:", " > ".join(waits), file=sys.stderr, flush=True)


def _run(
    role: Callable[[Settings], int],
    settings: Settings,
    log: Path,
    trap: Trap | None,
    session_s: float | None,
    fault: Callable[[], None] | None,
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGQUIT, explain)
    configure(settings.log_level, role.__name__)
    plant(os.environ.get("CHAOS_BUG", ""))
    if fault is not None:
        fault()
    if trap is not None:
        _set(trap)
    if session_s is not None:
        _shorten_session(session_s)
    sys.exit(role(settings))


def _shorten_session(session_s: float) -> None:
    module: Any = worker_process
    original = module.batch_app

    def batch_app(*arguments: Any) -> BatchApp:
        app = original(*arguments)
        app.conf.broker_session_timeout, app.conf.broker_heartbeat_interval = session_s, session_s / 3
        return cast(BatchApp, app)

    module.batch_app = batch_app


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _set(trap: Trap) -> None:
    place, passed = (POINTS | OF_A_WISH)[trap.point], 0
    original = getattr(place.owner, place.method)

    def step(arguments: tuple[Any, ...]) -> None:
        nonlocal passed
        if not place.topic or str(arguments[1]).endswith(place.topic):
            passed += 1
            if passed == trap.nth:
                os.write(2, f"trap: {trap.point}\n".encode())
                os.kill(os.getpid(), trap.number)

    def plain(*arguments: Any) -> Any:
        result = original(*arguments)
        step(arguments)
        return result

    async def awaited(*arguments: Any) -> Any:
        if place.before:
            step(arguments)
        result = await original(*arguments)
        if not place.before:
            step(arguments)
        return result

    setattr(place.owner, place.method, awaited if inspect.iscoroutinefunction(original) else plain)
