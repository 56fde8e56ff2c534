"""Recorded events sent again, in time order, at a chosen rate."""

import threading
import time
from collections.abc import Iterator, Sequence

import msgspec

from stream.events import Click
from stream.producer import ClickProducer


def shifted(events: Sequence[Click], last_ms: int) -> list[Click]:
    """The same events, moved in time as a whole so that the last of them happened at last_ms."""
    by = last_ms - max((event.ts_ms for event in events), default=last_ms)
    return [msgspec.structs.replace(event, ts_ms=event.ts_ms + by) for event in events]


def replay(producer: ClickProducer, events: Sequence[Click], rate: float, stop: threading.Event) -> Iterator[Click]:
    """Sends each event at its place in an even schedule of `rate` a second; yields it once sent.

    The schedule is open-loop: a slow moment is caught up, so that the rate holds and waiting is not hidden.
    """
    if rate <= 0:
        raise ValueError(f"rate: {rate} events a second, must be above 0")
    began = time.monotonic()
    for number, event in enumerate(events):
        if stop.wait(max(0.0, began + number / rate - time.monotonic())):
            return
        producer.send(event)
        yield event
