"""Scenario 2: a worker killed at each named point of its loop."""

import random
import signal
import time
from pathlib import Path

import pytest

from stream.connection import Connection
from stream.events import Artifact
from tests.chaos.harness import SEED, SHORT_SESSION_S, Fleet, Load, holds, judge, make_clicks, report
from tests.chaos.worker import POINTS, Trap
from tests.workers.service import until


@pytest.mark.timeout(900)
def test_killed_at_each_point(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    """A worker a point, which kills itself at a drawn passing of it, as do its successors; and a plain worker."""
    times, rate, longest_s = 5 if long else 1, 200, 600
    draw, began = random.Random(SEED), time.monotonic()
    clicks = make_clicks(draw, longest_s * rate, users=1000)
    session_s = None if long else SHORT_SESSION_S
    with Fleet(connection, tmp_path, generation, partitions=12, session_s=session_s) as fleet:

        def kills() -> dict[str, int]:
            return {point: fleet.log(point).count(f"trap: {point}\n") for point in POINTS}

        def ended_by_itself() -> list[tuple[str, int]]:
            return [one for one in fleet.exits if one[1] != -signal.SIGKILL]

        fleet.start("plain")
        fleet.await_ready()
        with Load(fleet.settings, clicks, rate) as load:
            for point in POINTS:
                fleet.start(point, [Trap(point, draw.randint(1, 8)) for _ in range(times)])
            until(lambda: bool(ended_by_itself()) or set(kills().values()) == {times}, "all are killed", longest_s)
            assert load.running, "the load ended before the kills"
            load.stop()
        fleet.drain()
        verdict = judge(fleet.settings, clicks[: load.sent]) | {
            "kills": kills(),
            "ended_by_itself": ended_by_itself(),
            "redelivered": fleet.redelivered,
        }
    report("points", long, began, verdict)
    assert holds(verdict)
    assert holds(verdict, {"kills": dict.fromkeys(POINTS, times), "ended_by_itself": []})
    assert verdict["redelivered"] > 0
