"""Scenario 19, ours: batches that vanish between the fetch and the agent, as Faust lets them at a rebalance."""

import random
import time
from pathlib import Path

from stream.connection import Connection
from stream.events import Artifact
from tests.chaos.harness import SEED, Fleet, Load, holds, judge, make_clicks, report
from tests.chaos.worker import drop_batches


def test_dropped_batches(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    """Every third fetched batch is dropped, in the end the last of a partition, too."""
    count, began = 20_000 if long else 600, time.monotonic()
    clicks = make_clicks(random.Random(SEED), count, users=60)
    with Fleet(connection, tmp_path, generation, fault=drop_batches) as fleet:
        fleet.start("a")
        fleet.await_ready()
        with Load(fleet.settings, clicks, rate=200):
            pass
        fleet.drain(60)
        verdict = judge(fleet.settings, clicks) | {
            "exits": len(fleet.exits),
            "dropped": fleet.log("a").count("fault: dropped"),
            "found_behind": fleet.log("a").count("fetched again"),
        }
    report("dropped", long, began, verdict)
    assert holds(verdict) and verdict["exits"] == 0
    assert verdict["dropped"] > 10 and verdict["found_behind"]
