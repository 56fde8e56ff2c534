"""Scenario 3: workers 1 -> 3 -> 1 while clicks flow."""

import random
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from stream.connection import Connection
from stream.events import Artifact
from tests.chaos.harness import SEED, SHORT_SESSION_S, Fleet, Load, holds, judge, make_clicks, report
from tests.chaos.worker import restore_slowly
from tests.workers.service import until

RATE, PARTITIONS = 150, 6


class Watch:
    """Each partition's lag and commits, about once a second; a context manager."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet, self._done = fleet, threading.Event()
        self.samples: list[tuple[float, dict[int, int], dict[int, int]]] = []  # time, committed, lag
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(1.0):
            committed = self._fleet.committed()
            self.samples.append((time.monotonic(), committed, self._fleet.lag()))

    def longest_s(self, stands: bool) -> float:
        """The longest time in which a partition with a lag was not committed, or in which its lag never fell."""
        longest = 0.0
        for partition in range(PARTITIONS):
            since = before = None
            for at, committed, lag in self.samples:
                place = committed.get(partition, 0) if stands else -lag[partition]
                moved = before is None or place > before or lag[partition] == 0
                since = at if moved or since is None else since
                longest, before = max(longest, at - since), place
        return round(longest, 1)


def test_one_three_one(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    times = 20 if long else 1
    draw, began = random.Random(SEED), time.monotonic()
    longest_s = 60 if long else 200  # of a round: many have their mean
    clicks = make_clicks(draw, longest_s * RATE * times, users=60 * times)
    session_s, codes = None if long else SHORT_SESSION_S, set[int | None]()
    with Fleet(connection, tmp_path, generation, partitions=PARTITIONS, session_s=session_s) as fleet:
        fleet.start("a")
        fleet.await_ready()
        with Load(fleet.settings, clicks, RATE) as load, Watch(fleet) as watch:
            for _ in range(times):
                for name in ("b", "c"):
                    fleet.start(name)
                for name in ("a", "b", "c"):
                    until(lambda name=name: fleet.metric_of(name, "upwell_restored_users") > 0, f"{name} owns some")  # type: ignore[misc]
                time.sleep(draw.uniform(1, 4))
                codes |= {fleet.stop(name)[1] for name in ("b", "c")}
                time.sleep(draw.uniform(1, 4))
            assert load.running, "the load ended before the rounds"
            load.stop()
        fleet.drain()
        verdict = judge(fleet.settings, clicks[: load.sent]) | {
            "times": times,
            "standstill_s_max": watch.longest_s(stands=True),
            "lag_grows_s_max": watch.longest_s(stands=False),
            "redelivered": fleet.redelivered,
            "unexpected_exits": len(fleet.exits),
            "exit_codes": sorted(map(str, codes)),
        }
    report("scaling", long, began, verdict)
    assert holds(verdict)
    assert holds(verdict, {"unexpected_exits": 0, "exit_codes": ["0"]})
    if long:  # one round on a machine that others use says little of its speed
        assert verdict["standstill_s_max"] < 30
        assert verdict["lag_grows_s_max"] < 60


def test_a_long_restore_holds_up_nobody(
    connection: Connection, generation: Artifact, tmp_path: Path, long: bool
) -> None:
    """Meanwhile the other partitions are worked off, a worker joins, and one that is asked to end does: all three with
    clicks waiting for what is being restored, in which none of it stands.
    """
    stuck_s, more_s = (60.0, 90.0) if long else (3.0, 10.0)
    quick, slow = range(PARTITIONS // 2), range(PARTITIONS // 2, PARTITIONS)
    clicks, began = make_clicks(random.Random(SEED), 300 * RATE, users=60), time.monotonic()
    fault = partial(restore_slowly, slow, tmp_path / "gate", stuck_s)
    with Fleet(connection, tmp_path, generation, partitions=PARTITIONS, fault=fault) as fleet:

        def restoring() -> bool:
            return not any(fleet.committed().get(partition, 0) for partition in slow)

        fleet.start("a")
        fleet.await_ready()
        with Load(fleet.settings, clicks, RATE) as load:
            until(lambda: all(fleet.committed().get(partition, 0) for partition in quick), "some are worked off")
            assert restoring() and not fleet.ready("a")
            fleet.start("b")
            until(lambda: fleet.metric_of("b", "upwell_restored_users") > 0, "b owns some")
            assert restoring()
            time.sleep(more_s)
            fleet.start("c")
            until(lambda: fleet.metric_of("c", "upwell_restored_users") > 0, "c owns some")
            assert restoring()
            took_s, code = fleet.stop("c")
            load.stop()
        (tmp_path / "gate").touch()
        fleet.drain()
        assert fleet.ready("a") and fleet.ready("b")
        fenced = sum(fleet.log(name).count("states can be written no more") for name in "abc")
        verdict = judge(fleet.settings, clicks[: load.sent]) | {
            "exits": len(fleet.exits),
            "exit_code": code,
            "exit_s": round(took_s, 1),
            "fenced": fenced,
        }
    report("slow_restore", long, began, verdict)
    assert holds(verdict) and holds(verdict, {"exits": 0, "exit_code": 0, "fenced": 0})
    assert took_s < 10
