"""Scenario 2: a worker killed at each named point of its loop."""

import random
import time
from pathlib import Path

from stream.connection import Connection
from stream.events import Artifact
from tests.chaos.harness import SEED, SHORT_SESSION_S, Fleet, Load, holds, judge, make_clicks, report
from tests.chaos.worker import POINTS, Trap
from tests.workers.service import until


def test_killed_at_each_point(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    """A worker a point, which kills itself at its so-manieth passing of it, its successors too; and a plain worker."""
    times, rate = 5 if long else 1, 200
    draw, began = random.Random(SEED), time.monotonic()
    clicks = make_clicks(draw, 200 * rate, users=1000)
    session_s = None if long else SHORT_SESSION_S
    with Fleet(connection, tmp_path, generation, partitions=12, session_s=session_s) as fleet:
        fleet.start("plain")
        fleet.await_ready()
        with Load(fleet.settings, clicks, rate) as load:
            for point in POINTS:
                fleet.start(point, [Trap(point, draw.randint(1, 8)) for _ in range(times)])
            until(lambda: len(fleet.exits) == times * len(POINTS), "all are killed", 600)
            assert load.running, "the load ended before the kills"
            load.stop()
        fleet.drain()
        verdict = judge(fleet.settings, clicks[: load.sent])
        kills = {point: fleet.log(point).count(f"trap: {point}\n") for point in POINTS}
        verdict |= {"kills": kills, "redelivered": fleet.redelivered}
    report("points", long, began, verdict)
    assert holds(verdict)
    assert set(kills.values()) == {times}
