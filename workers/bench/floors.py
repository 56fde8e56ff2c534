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


class Meter:
    """CPU time of this process from the first click to the last."""

    def __init__(self, count: int) -> None:
        self._count, self._seen, self._began, self._first = count, 0, 0.0, 0

    def saw(self, clicks: int) -> bool:
        """True once all have come; the rate is printed then."""
        if not self._seen:
            self._began, self._first = time.process_time(), clicks
        self._seen += clicks
        if self._seen < self._count:
            return False
        print("rate", (self._seen - self._first) / (time.process_time() - self._began), flush=True)
        return True


def own_group(settings: Settings) -> str:
    """Each run's own: in that of the one before, whose member Kafka may still count, another assignor is refused for
    good (seen: Faust after aiokafka, InconsistentGroupProtocol, and the benchmark waited for ever).
    """
    return f"floor-{settings.kafka.prefix}"


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
    app = plain_app(settings, own_group(settings))
    clicks = app.topic(settings.topics.clicks.name, value_type=bytes, value_serializer="raw")

    @app.agent(clicks)  # type: ignore[untyped-decorator]
    async def read(stream: Any) -> None:
        async for _ in stream:
            meter.saw(1)

    print("ready", flush=True)
    return execute(app)


async def getmany(settings: Settings, meter: Meter) -> None:
    """aiokafka alone: batches, each click decoded."""
    consumer = AIOKafkaConsumer(
        settings.topics.clicks.name,
        **settings.connection.kafka_python(),
        group_id=own_group(settings),
        auto_offset_reset="earliest",
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
