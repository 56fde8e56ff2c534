"""Scenario 1: workers killed at random while clicks flow."""

import random
import signal
import time
from pathlib import Path

from stream.connection import Connection
from stream.events import Artifact
from tests.chaos.harness import SEED, SHORT_SESSION_S, Fleet, Load, holds, judge, make_clicks, report

NAMES = ("a", "b")


def test_killed_at_random(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    """Two workers, each kill one of them; its successor starts at once, its partitions come back after the session."""
    kills, count, pause_s = (50, 100_000, (5.0, 15.0)) if long else (3, 5000, (1.0, 4.0))
    draw, began = random.Random(SEED), time.monotonic()
    clicks = make_clicks(draw, count, users=count // 100)
    rate = count / (kills * sum(pause_s) / 2)
    with Fleet(connection, tmp_path, generation, session_s=None if long else SHORT_SESSION_S) as fleet:
        for name in NAMES:
            fleet.start(name)
        fleet.await_ready()
        with Load(fleet.settings, clicks, rate):
            for _ in range(kills):
                time.sleep(draw.uniform(*pause_s))
                fleet.send_signal(draw.choice(NAMES), signal.SIGKILL)
        fleet.drain()
        verdict = judge(fleet.settings, clicks) | {"kills": kills, "redelivered": fleet.redelivered}
    report("sigkill", long, began, verdict)
    assert holds(verdict)
    assert not [one for one in fleet.exits if one[1] != -signal.SIGKILL]  # says how, where one ended by itself
    assert len(fleet.exits) == kills
