"""Beside the list: batches that vanish between the fetch and the agent, as Faust lets them at a rebalance, and one that
cannot be worked off."""

import random
import time
from functools import partial
from pathlib import Path

from stream.connection import Connection
from stream.events import Artifact
from tests.chaos.harness import NOTHING_LOST, SEED, SHORT_SESSION_S, Fleet, Load, holds, judge, make_clicks, report
from tests.chaos.worker import drop_batches, raise_once
from workers.processes import EX_SOFTWARE


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


def test_a_batch_that_raises(connection: Connection, generation: Artifact, tmp_path: Path) -> None:
    """The worker ends before the next batch is acknowledged, which would commit past it; its successor has both."""
    clicks = make_clicks(random.Random(SEED), 600, users=60)
    fault = partial(raise_once, tmp_path / "raised")
    with Fleet(connection, tmp_path, generation, session_s=SHORT_SESSION_S, fault=fault) as fleet:
        fleet.start("a")
        fleet.await_ready()
        with Load(fleet.settings, clicks, rate=200):
            pass
        fleet.drain(60)
        verdict = judge(fleet.settings, clicks) | {"exits": fleet.exits}
    assert holds(verdict, NOTHING_LOST | {"exits": [("a", EX_SOFTWARE)]}), verdict
