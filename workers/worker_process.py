"""The worker as a process: Faust's partition batches into `UserWorker`, acked when all of theirs is in Kafka."""

import asyncio
import os
import signal
import threading
import time
from functools import partial
from typing import Any, NoReturn

from workers import metrics, tracing
from workers.faust_batches import batch_app, execute
from workers.handed import Handed, Stuck
from workers.live import Live
from workers.partitions import Batch, Partitions
from workers.processes import (
    EX_DATA,
    EX_SOFTWARE,
    compute_in_one_thread,
    die,
    end,
    end_with_threads,
    settle,
    share_heaps,
    stop_on_signal,
)
from workers.sender import BatchSender
from workers.settings import Settings
from workers.states import OwnedStates
from workers.user_worker import TooManyBadEvents, UserWorker

# A worker joins its group when it can make lists: what it folds before is acknowledged without one. It waits no longer
# than this, for states matter more: where the store is out of reach, its clicks count as answered never.
FIRST_LOOK_S = 60.0
SECOND_LOOK_S = 5.0  # twice that is what a click waits if Faust drops the batch it ends


def run_worker(settings: Settings) -> NoReturn:
    """Run until SIGTERM or SIGINT, and end the process. Anything unexpected ends it before the commit."""
    compute_in_one_thread()
    end_with_threads()
    share_heaps()
    live = Live(settings, keep_previous=True, device=settings.worker.device)
    sender = BatchSender(settings.connection)
    stop = stop_on_signal()  # to a container's first process a signal without a handler does not come

    async def begin() -> None:
        if stop.is_set():  # asked to end before Faust listened
            os.kill(os.getpid(), signal.SIGTERM)
        await sender.start()

    async def finish() -> None:
        await partitions.stop()
        await owned.stop()
        await sender.stop()
        await asyncio.to_thread(live.stop)

    def readable(tp: Any) -> bool:
        return owned.restored(tp.partition)

    app = batch_app(settings.group, settings.connection, begin, finish, readable)
    clicks = app.topic(settings.topics.clicks.name, value_type=bytes, value_serializer="raw")

    def fenced(error: BaseException) -> None:
        if app.should_stop and not app.crashed:  # asked to end amid a rebalance, in which Faust gives nothing up
            end(0)
        die("states can be written no more, or their clicks not acknowledged", EX_SOFTWARE, error)

    owned = OwnedStates(settings.connection, settings.topics.users.name, fenced)
    worker, handed = UserWorker(settings, live, owned, sender), Handed(settings)

    @app.agent(clicks)  # type: ignore[untyped-decorator]
    async def update_users(stream: Any) -> None:
        async for event in stream.noack().events():
            await partitions.put(Batch(event, partial(stream.ack, event)), app.consumer.assignment)

    async def update(tp: Any, batches: list[Batch]) -> None:
        async def acknowledge() -> None:
            for batch in batches:
                await batch.acknowledge()

        try:
            records = [r for batch in batches for r in await handed.complete(tp.partition, batch.event.value)]
            await worker.process(tp.partition, records, acknowledge)
            high = app.consumer.highwater(tp)
        except TooManyBadEvents as error:
            die(str(error), EX_DATA)
        except Exception as error:
            die("unexpected", EX_SOFTWARE, error)
        metrics.lag_clicks.labels(str(tp.partition)).set(max(0, (high or 0) - batches[-1].event.value.next))

    partitions = Partitions(update)

    @app.timer(SECOND_LOOK_S)  # type: ignore[untyped-decorator]
    async def second_look() -> None:
        held = [tp for tp in app.consumer.assignment() if readable(tp)]
        tps = {tp.partition: tp for tp in held if partitions.idle(tp)}
        if partitions.full or (len(tps) < len(held) and not app.consumer.flow_active):
            return  # a rebalance waits for what is under way, and not for Faust
        try:
            behind = await handed.behind({partition: app.consumer.highwater(tp) or 0 for partition, tp in tps.items()})
        except Stuck as error:
            die("Faust hands no clicks on", EX_SOFTWARE, error)
        for partition, offset in behind.items():
            if tps[partition] in app.consumer.assignment():
                await app.consumer.seek(tps[partition], offset)

    @app.on_partitions_assigned.connect  # type: ignore[untyped-decorator]
    async def restore(_: Any, assigned: Any, **kwargs: Any) -> None:
        owned.restore(tp.partition for tp in assigned)

    @app.on_partitions_revoked.connect  # type: ignore[untyped-decorator]
    async def forget(_: Any, revoked: Any, **kwargs: Any) -> None:
        await partitions.forget(revoked)
        handed.forget(tp.partition for tp in revoked)
        await owned.forget(tp.partition for tp in revoked)
        for tp in revoked:
            metrics.lag_clicks.remove(str(tp.partition))  # else the lag of then stands beside its new owner's

    live.start()
    code = 0
    if first_look(live, stop):
        metrics.serve(settings.worker.metrics_port, settings.metrics_host, lambda: owned.ready)
        settle()
        code = execute(app)
    tracing.stop(settings)
    end(code)


def first_look(live: Live, stop: threading.Event) -> bool:
    """Waits for the first generation, where there is one, FIRST_LOOK_S at most; False where the process is to end."""
    deadline = time.monotonic() + FIRST_LOOK_S
    while not (stop.is_set() or live.looked.wait(0.1) or time.monotonic() > deadline):
        pass
    return not stop.is_set()
