"""The worker as a process: Faust's partition batches into `UserWorker`, acked when all of theirs is in Kafka."""

import asyncio
from functools import partial
from typing import Any

import torch

from workers import metrics
from workers.faust_batches import batch_app, execute
from workers.handed import Handed
from workers.live import Live
from workers.processes import EX_DATA, EX_SOFTWARE, die, end_with_threads
from workers.sender import BatchSender
from workers.settings import Settings
from workers.state_writer import Acknowledge
from workers.states import OwnedStates
from workers.user_worker import TooManyBadEvents, UserWorker

SECOND_LOOK_S = 5.0  # twice that is what a click waits if Faust drops the batch it ends


def run_worker(settings: Settings) -> int:
    """Run until SIGTERM or SIGINT; the exit code. Anything unexpected ends the process before the commit."""
    torch.set_num_threads(1)
    end_with_threads()
    live, sender = Live(settings, keep_previous=True), BatchSender(settings.connection)

    async def finish() -> None:
        await owned.stop()
        await sender.stop()
        await asyncio.to_thread(live.stop)

    app = batch_app(settings.worker.group, settings.connection, sender.start, finish)
    clicks = app.topic(settings.topics.clicks.name, value_type=bytes, value_serializer="raw")

    def fenced(error: BaseException) -> None:
        die("states can be written no more: another worker has taken over, or Kafka is gone", EX_SOFTWARE, error)

    owned = OwnedStates(settings.connection, settings.topics.users.name, fenced)
    worker, handed = UserWorker(settings, live, owned, sender), Handed(settings)

    @app.agent(clicks)  # type: ignore[untyped-decorator]
    async def update_users(stream: Any) -> None:
        async for event in stream.noack().events():
            tp = event.message.tp
            if tp in app.consumer.assignment():  # else taken away while it waited in the queue: its new owner reads it
                await update(tp, event.value, partial(stream.ack, event))
            handed.under_way = not stream.channel.queue.empty()

    async def update(tp: Any, batch: list[Any], acknowledge: Acknowledge) -> None:
        try:
            await worker.process(tp.partition, await handed.complete(tp.partition, batch), acknowledge)
        except TooManyBadEvents as error:
            die(str(error), EX_DATA)
        except Exception as error:
            die("unexpected", EX_SOFTWARE, error)
        high = app.consumer.highwater(tp)
        metrics.lag_clicks.labels(str(tp.partition)).set(max(0, (high or 0) - batch[-1].offset - 1))

    @app.timer(SECOND_LOOK_S)  # type: ignore[untyped-decorator]
    async def second_look() -> None:
        if handed.under_way:
            return
        tps = {tp.partition: tp for tp in app.consumer.assignment() if tp.topic == settings.topics.clicks.name}
        behind = await handed.behind({partition: app.consumer.highwater(tp) or 0 for partition, tp in tps.items()})
        for partition, offset in behind.items():
            await app.consumer.seek(tps[partition], offset)

    @app.on_partitions_revoked.connect  # type: ignore[untyped-decorator]
    async def forget(_: Any, revoked: Any, **kwargs: Any) -> None:
        handed.forget(tp.partition for tp in revoked)
        await owned.forget(tp.partition for tp in revoked)

    metrics.serve(settings.worker.metrics_port)
    live.start()
    return execute(app)
