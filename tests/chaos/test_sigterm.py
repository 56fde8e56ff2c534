"""Scenario 12: a worker asked to end while clicks flow. (Open event streams: with the serving issue.)"""

import random
import time
from pathlib import Path
from statistics import median

from model.user_state import decode_state
from stream.connection import Connection
from stream.events import Artifact
from stream.producer import partition_of
from tests.chaos.harness import SEED, Fleet, Load, holds, judge, make_clicks, report
from tests.workers.service import until
from workers.settings import Settings
from workers.states import raw_states

RATE, PARTITIONS = 100, 4


def applied_to(settings: Settings) -> dict[int, int]:
    """Partition -> one past the last click in a committed state."""
    ends: dict[int, int] = {}
    for user_id, raw in raw_states(settings).items():
        partition = partition_of(user_id, PARTITIONS)
        ends[partition] = max(ends.get(partition, 0), decode_state(raw).offset + 1)
    return ends


def test_ends_in_order(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    """Nothing is read twice after a clean end: what is applied is committed."""
    times = 50 if long else 2
    draw, began = random.Random(SEED), time.monotonic()
    longest_s = 40 if long else 130  # of a start and a stop: many have their mean, a few what `until` and `stop` allow
    clicks = make_clicks(draw, longest_s * RATE * times, users=40 * times)
    seconds, codes, uneven = [], [], 0
    with Fleet(connection, tmp_path, generation, partitions=PARTITIONS) as fleet:
        with Load(fleet.settings, clicks, RATE) as load:
            for _ in range(times):
                fleet.start("a")
                until(lambda: fleet.metric("upwell_clicks_total{applied}") > 0, "clicks are applied")
                time.sleep(draw.uniform(0.2, 3))
                took, code = fleet.stop("a")
                seconds.append(took)
                codes.append(code)
                committed = {part: offset for part, offset in fleet.committed().items() if offset > 0}
                uneven += committed != applied_to(fleet.settings)
            assert load.running, "the load ended before the stops"
            load.stop()
        fleet.start("a")
        fleet.drain()
        verdict = judge(fleet.settings, clicks[: load.sent]) | {
            "stops": times,
            "exit_codes": sorted(set(map(str, codes))),
            "exit_s_median": round(median(seconds), 2),
            "exit_s_max": round(max(seconds), 2),
            "exits_over_10_s": sum(took > 10 for took in seconds),
            "committed_is_not_applied": uneven,
            "redelivered": fleet.redelivered,
        }
    report("sigterm", long, began, verdict)
    assert holds(
        verdict, {"lost": 0, "applied_twice": 0, "users_not_identical": 0, "dead_letters": 0, "redelivered": 0}
    )
    assert holds(verdict, {"exit_codes": ["0"], "committed_is_not_applied": 0})
    if long:
        assert max(seconds) < 10
