"""What reading alone costs: a bare Faust agent, and aiokafka with decode. A process each, of `upwell bench ingest`.

python -m workers.bench.floors faust|aiokafka COUNT      prints "ready", then "rate" and clicks a CPU second
"""

import asyncio
import sys
import time
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer

from stream.events import decode_click
from workers.faust_batches import execute
from workers.settings import Settings, load_settings

GROUP = "floor"
DROPPED_S = 5.0  # a floor that stands still for so long has got all that it gets


class Meter:
    """CPU time of this process from the first click to the last."""

    def __init__(self, count: int) -> None:
        self._count, self._first, self._began = count, 0, 0.0
        self.seen, self._ended = 0, 0.0

    def saw(self, clicks: int) -> bool:
        """True once all have come; the rate is printed then."""
        self._ended = time.process_time()
        if not self.seen:
            self._began, self._first = self._ended, clicks
        self.seen += clicks
        if self.seen == self._count:
            self.tell()
        return self.seen == self._count

    def tell(self) -> None:
        print("rate", (self.seen - self._first) / (self._ended - self._began), flush=True)


def plain_app(settings: Settings, group: str) -> faust.App:
    """Faust as it comes, but for its web server and topics."""
    return faust.App(
        group,
        broker=f"kafka://{settings.kafka.bootstrap}",
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        consumer_auto_offset_reset="earliest",
        store="memory://",
    )


def bare_agent(settings: Settings, meter: Meter) -> int:
    """Raw values, an agent that does nothing with them."""
    app = plain_app(settings, GROUP)
    clicks = app.topic(settings.topics.clicks.name, value_type=bytes, value_serializer="raw")

    @app.agent(clicks)  # type: ignore[untyped-decorator]
    async def read(stream: Any) -> None:
        async for _ in stream:
            meter.saw(1)

    before = 0

    @app.timer(DROPPED_S)  # type: ignore[untyped-decorator]
    async def end() -> None:
        """Plain Faust drops a fetch that a rebalance meets (seen: the benchmark waited for good)."""
        nonlocal before
        if 0 < meter.seen == before:
            meter.tell()
        before = meter.seen

    print("ready", flush=True)
    return execute(app)


async def getmany(settings: Settings, meter: Meter) -> None:
    """aiokafka alone: batches, each click decoded."""
    consumer = AIOKafkaConsumer(
        settings.topics.clicks.name, **settings.connection.kafka_python(), group_id=GROUP, auto_offset_reset="earliest"
    )
    await consumer.start()
    print("ready", flush=True)
    done = False
    while not done:
        for records in (await consumer.getmany(timeout_ms=200)).values():
            for record in records:
                decode_click(record.value, record.timestamp)
            done = meter.saw(len(records))
    await consumer.stop()


def main(kind: str, count: str) -> None:
    settings, meter = load_settings(), Meter(int(count))
    if kind == "faust":
        bare_agent(settings, meter)
    else:
        asyncio.run(getmany(settings, meter))


if __name__ == "__main__":
    main(*sys.argv[1:])
