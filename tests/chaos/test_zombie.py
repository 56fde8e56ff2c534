"""Scenario 3b: a worker frozen past its session, woken after another has taken its partitions over."""

import random
import signal
import time
from pathlib import Path

import kafka
from kafka.admin import ConfigResource

from stream.connection import Connection
from stream.consumer import end_offsets, read_window
from stream.events import Artifact
from tests.chaos.harness import NOTHING_LOST, SEED, SHORT_SESSION_S, Fleet, Load, holds, judge, make_clicks, report
from tests.chaos.worker import Trap
from tests.workers.service import until
from workers.settings import Settings

RATE = 150


def force_compaction(settings: Settings) -> None:
    """Of the users topic, within seconds (FACTS.md)."""
    wanted = {"min.cleanable.dirty.ratio": "0.01", "segment.ms": "1000", "max.compaction.lag.ms": "1000"}
    with kafka.KafkaAdminClient(**settings.connection.kafka_python()) as admin:
        admin.alter_configs([ConfigResource("TOPIC", settings.topics.users.name, wanted)])


def kept(settings: Settings) -> float:
    """The share of the offsets of the users topic that still hold a committed record."""
    name = settings.topics.users.name
    records = list(read_window(settings.connection, name))
    return round(len(records) / max(1, sum(end_offsets(settings.connection, name).values())), 3)


def test_frozen_past_its_session(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    """The victim freezes itself with a state computed and not sent, or is frozen at random; its users click no more
    after the takeover, so what it still sends would be the last record of theirs: the one that compaction keeps.

    The short form, one freeze, shows that nothing it sends changes a state; the long one, that it is fenced and ends.
    """
    rounds = 20 if long else 1
    draw, began = random.Random(SEED), time.monotonic()
    by_itself = [number % 2 == 0 for number in range(rounds)]
    sent, takeovers = [], []
    with Fleet(connection, tmp_path, generation, session_s=None if long else SHORT_SESSION_S) as fleet:
        force_compaction(fleet.settings)
        fleet.start("other")
        fleet.await_ready()
        fleet.start("victim", trap() if by_itself[0] else [])
        for number in range(rounds):
            clicks = make_clicks(draw, 60 * RATE, users=60, name=f"r{number}-")
            with Load(fleet.settings, clicks, RATE) as load:
                if number:
                    time.sleep(1)
                    wake(fleet, dies=by_itself[number - 1], next_dies=by_itself[number])
                if not by_itself[number]:
                    until(lambda: fleet.metric_of("victim", "upwell_restored_users") > 0, "the victim owns partitions")
                    time.sleep(draw.uniform(0.5, 2))
                    fleet.send_signal("victim", signal.SIGSTOP)
                until(lambda: fleet.frozen("victim"), "the victim is frozen")
                frozen_at = time.monotonic()
                time.sleep(0.5)
                load.stop()
            sent += clicks[: load.sent]
            fleet.drain()
            takeovers.append(round(time.monotonic() - frozen_at, 1))
        wake(fleet, dies=by_itself[-1], next_dies=False)
        time.sleep(3)
        fleet.drain()
        verdict = judge(fleet.settings, sent) | {
            "freezes": rounds,
            "between computing and sending": sum(by_itself),
            "fenced": fleet.fenced("victim"),
            "takeover_s_max": max(takeovers),
            "ended_by_itself": fleet.unexpected(),
            "redelivered": fleet.redelivered,
            "records_kept_share": kept(fleet.settings),
        }
    report("zombie", long, began, verdict)
    assert holds(verdict, NOTHING_LOST | {"ended_by_itself": []})
    assert verdict["fenced"] >= sum(by_itself) or not long  # one that hears from the group first gives its state up


def trap() -> list[Trap]:
    return [Trap("storing", 3, signal.SIGSTOP)]


def wake(fleet: Fleet, dies: bool, next_dies: bool) -> None:
    """SIGCONT. A worker with a state on its way is fenced and ends, and is started again; an idle one goes on."""
    ended = len(fleet.exits)
    fleet.traps["victim"] = iter(trap() if next_dies else [])
    fleet.send_signal("victim", signal.SIGCONT)
    deadline = time.monotonic() + (15 if dies else 5)
    while len(fleet.exits) == ended and time.monotonic() < deadline:
        time.sleep(0.1)
    if len(fleet.exits) == ended and next_dies:
        fleet.send_signal("victim", signal.SIGKILL)  # its successor has the next trap
