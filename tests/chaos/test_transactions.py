"""Scenario 20, ours: producers that send in transactions, as Flink's and Kafka Connect's exactly-once sinks do."""

import random
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import kafka
import msgspec

from stream.connection import Connection
from stream.events import Artifact, Click, encode
from tests.chaos.harness import SEED, Fleet, holds, judge, make_clicks, report
from tests.workers.service import until

PAUSE_S = 0.05  # between transactions: 20 a second


@contextmanager
def transactional(fleet: Fleet, name: str) -> Iterator[Any]:
    settings = fleet.settings
    producer = kafka.KafkaProducer(
        **settings.connection.kafka_python(), transactional_id=f"{settings.topics.prefix}-{name}"
    )
    with closing(producer):
        producer.init_transactions()
        yield producer


def send(fleet: Fleet, producer: Any, clicks: Sequence[Click]) -> None:
    for click in clicks:
        producer.send(fleet.settings.topics.clicks.name, key=click.user_id.encode(), value=encode(click))
    producer.flush()


def taken_back(clicks: Sequence[Click]) -> list[Click]:
    return [msgspec.structs.replace(click, event_id=f"back-{click.event_id}") for click in clicks]


def test_transactions(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    """Two producers' transactions lie in one another, every one of the second is aborted; workers are killed meanwhile.

    What is committed counts, what is aborted never does, and what is open waits. A partition that ends with markers or
    aborted clicks has no lag.
    """
    draw, began = random.Random(SEED), time.monotonic()
    clicks, size, kills = make_clicks(draw, 20_000 if long else 600, users=60), 10, 5 if long else 1
    num = len(clicks) // size
    killed_at = {num * (1 + kill) // (kills + 1) for kill in range(kills)}
    with Fleet(connection, tmp_path, generation) as fleet:
        fleet.start("a")
        fleet.start("b")
        fleet.await_ready()
        with transactional(fleet, "kept") as kept, transactional(fleet, "aborted") as aborted:
            for number in range(num):
                part = clicks[number * size : (number + 1) * size]
                kept.begin_transaction()
                aborted.begin_transaction()
                send(fleet, kept, part[::2])
                send(fleet, aborted, taken_back(part))
                send(fleet, kept, part[1::2])
                kept.commit_transaction()
                aborted.abort_transaction()
                if number in killed_at:
                    fleet.send_signal(draw.choice("ab"), signal.SIGKILL)
                time.sleep(PAUSE_S)
            fleet.drain()
            kept.begin_transaction()
            open_ = [msgspec.structs.replace(click, event_id=f"open-{click.event_id}") for click in clicks[:40]]
            send(fleet, kept, open_)
            time.sleep(3)
            before = judge(fleet.settings, clicks)
            kept.commit_transaction()
            committed = time.monotonic()
            fleet.drain()
            drained_s = time.monotonic() - committed
        until(lambda: fleet.metric("upwell_lag_clicks") == 0, "no lag is told")
        logs = fleet.log("a") + fleet.log("b")
        verdict = judge(fleet.settings, [*clicks, *open_]) | {
            "transactions": 2 * num,
            "exits_by_themselves": sum(code != -signal.SIGKILL for _, code in fleet.exits),
            "killed": sum(code == -signal.SIGKILL for _, code in fleet.exits),
            "open_applied": before["applied_twice"],
            "fetched_again": logs.count("fetched again"),
            "read_again": logs.count("read again"),
            "drained_s": round(drained_s, 1),
        }
    report("transactions", long, began, verdict)
    assert holds(before) and holds(verdict) and verdict["exits_by_themselves"] == 0 and verdict["killed"] == kills
