"""How far the workers are behind, as Kafka itself tells it: also when no worker says anything."""

import threading
import time
from contextlib import closing
from typing import NamedTuple

import structlog

from stream.consumer import committed_offsets, open_consumer, partitions_of
from workers import metrics
from workers.settings import Settings

log = structlog.get_logger()

INTERVAL_S = 10.0


class Progress(NamedTuple):
    """Where the worker group stands in one partition of the clicks; committed is None before its first commit."""

    committed: int | None
    end: int
    lag: int  # clicks kept and not committed


class Offsets(NamedTuple):
    clicks: dict[int, Progress]
    ends: dict[tuple[str, int], int]  # of every topic: (name, partition) -> offset of the next record


def read_offsets(settings: Settings) -> Offsets:
    """Raises KafkaError, ValueError for a topic that is missing."""
    topic = settings.topics.clicks.name
    committed = committed_offsets(settings.connection, settings.group, topic)
    with closing(open_consumer(settings.connection)) as consumer:
        ends = consumer.end_offsets(partitions_of(consumer, [topic.name for topic in settings.topics.all()]))
        first = consumer.beginning_offsets([part for part in ends if part.topic == topic])
    clicks = {
        part.partition: Progress(at := committed.get(part.partition), ends[part], ends[part] - max(at or 0, beginning))
        for part, beginning in sorted(first.items())
    }
    return Offsets(clicks, {(part.topic, part.partition): end for part, end in ends.items()})


class LagFollower(threading.Thread):
    """Keeps `upwell_group_lag_clicks` and `upwell_topic_end_offset` fresh until the process ends."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(name="lag", daemon=True)
        self._settings = settings

    def run(self) -> None:
        while True:
            try:
                offsets = read_offsets(self._settings)
                for partition, place in offsets.clicks.items():
                    metrics.group_lag_clicks.labels(str(partition)).set(place.lag)
                for (topic, partition), end in offsets.ends.items():
                    metrics.topic_end_offset.labels(topic, str(partition)).set(end)
            except Exception as error:  # whatever it is, a gauge must not end the server
                metrics.group_lag_clicks.clear()  # an old figure would look like a stalled partition,
                metrics.topic_end_offset.clear()  # or like producers that are silent
                log.warning("lag not read", reason=repr(error))
            time.sleep(INTERVAL_S)
