"""Scenario 16: at half of what a worker can fold, for as long as you like: does anything grow?

    CHAOS_SOAK_MINUTES=480 make chaos ARGS="-k soak --timeout 40000"    # eight hours; one without it

The worker folds clicks and swaps once a minute, the server answers requests; each with its search processes. Users and
event ids are few, so that the states are full after the warm-up and nothing that is meant to grow does.
"""

import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from scipy.stats import theilslopes

from model.user_state import decode_state
from stream.connection import Connection
from stream.consumer import end_offsets, read_window
from stream.events import Artifact, Click, Recommendations, decode, encode
from stream.producer import ClickProducer
from tests.chaos.clients import Clients
from tests.chaos.harness import SEED, Fleet, Load, calibrate, holds, make_clicks, report
from tests.chaos.worker import start
from tests.workers.service import until
from workers.observe import scrape
from workers.server import run_server
from workers.settings import Settings
from workers.states import raw_states

MINUTES = float(os.environ.get("CHAOS_SOAK_MINUTES", "60"))
USERS, EVENT_IDS, REQUESTS = 200, 100, 20.0
SHORT_MOST_S = 300.0  # clicks a second: at 5,300 the clicks under way alone took 20 MB more in ten seconds


class Use(NamedTuple):
    """What a process and its descendants hold."""

    rss_mb: float
    descriptors: int
    threads: int


class Sample(NamedTuple):
    at: float
    worker: Use
    server: Use
    lag: int
    p50_ms: float  # click to list, of the lists sent since the sample before
    p99_ms: float


def use(pid: int) -> Use:
    process = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
        own = Use(int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(process / "fd")), int(status["Threads"]))
        children = [child for task in (process / "task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, KeyError):  # it has just ended: a search process after a swap
        return Use(0, 0, 0)
    return Use(*map(sum, zip(own, *(use(int(child)) for child in children), strict=True)))


def endless(draw: random.Random) -> Iterator[Click]:
    """Of the same users for ever: only the events are new."""
    for number in itertools.count():
        for click in make_clicks(draw, 1000, USERS, prefix := f"{number}-"):
            yield msgspec.structs.replace(click, user_id=click.user_id.removeprefix(prefix))


class Latency:
    """Of the lists sent since the last call; what it was before where none were."""

    def __init__(self, settings: Settings) -> None:
        self._connection, self._topic = settings.connection, settings.topics.recommendations.name
        self._ends = end_offsets(self._connection, self._topic)
        self._last = (float("nan"), float("nan"))

    def since(self) -> tuple[float, float]:
        ends = end_offsets(self._connection, self._topic)
        records = read_window(self._connection, self._topic, offsets=self._ends, until=ends)
        lists = [decode(record.value, Recommendations) for record in records]
        self._ends = ends
        if lists:
            p50, p99 = np.percentile([one.sent_ms - one.clicked_ms for one in lists], [50, 99])
            self._last = float(p50), float(p99)
        return self._last


def by_quarter(rows: np.ndarray) -> np.ndarray:
    """Medians (4, C) of rows (n, C) in each quarter of the time."""
    return np.array([np.median(part, axis=0) for part in np.array_split(rows, 4)]).round(1)


def growth(samples: Sequence[Sample], role: str) -> dict[str, Any]:
    """Slope of the memory (Theil and Sen: the median of all pairs, deaf to a swap's peak); medians by quarter."""
    hours = [sample.at / 3600 for sample in samples]
    uses = np.array([getattr(sample, role) for sample in samples])
    return {
        "mb_per_hour": round(float(theilslopes(uses[:, 0], hours).slope), 2),
        **dict(zip(Use._fields, by_quarter(uses).T.tolist(), strict=True)),
    }


def test_nothing_grows(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    warm_up_s, measured_s, every_s = (min(600, MINUTES * 15), MINUTES * 60, 10.0) if long else (4.0, 10.0, 0.5)
    draw, began = random.Random(SEED), time.monotonic()
    clicks, samples, swaps = endless(draw), list[Sample](), 0

    def warm() -> list[Sample]:
        return [sample for sample in samples if sample.at > warm_up_s]

    with Fleet(connection, tmp_path, generation, event_ids=EVENT_IDS) as fleet:
        settings = fleet.settings
        server = start(run_server, settings, tmp_path / "serve.log")
        fleet.start("a")
        fleet.await_ready()
        url = f"http://127.0.0.1:{settings.serve.port}/metrics"
        until(lambda: scrape(url).get("upwell_swaps_total{served}", 0) > 0, "the server serves")
        first = list(itertools.islice(clicks, 10_000 if long else 5000))
        rate = min(calibrate(fleet, first) / 2, float("inf") if long else SHORT_MOST_S)
        latency = Latency(settings)
        with (
            ClickProducer(connection, settings.topics) as announcer,
            Load(settings, clicks, rate) as load,
            Clients(settings.serve.port, REQUESTS, "k=10") as clients,
        ):
            started = time.monotonic()
            while (at := time.monotonic() - started) < warm_up_s + measured_s or len(warm()) < 8:  # seldom looks: busy
                if long and at > 60 * (swaps + 1):
                    swaps += 1
                    again = msgspec.structs.replace(generation, created_ms=swaps)
                    announcer.send_raw(settings.topics.generations.name, again.name.encode(), encode(again))
                lag = sum(fleet.lag().values())
                samples.append(Sample(at, use(fleet.pid("a")), use(server.pid or 0), lag, *latency.since()))
                time.sleep(max(0.0, started + at + every_s - time.monotonic()))
            load.stop()
        sent = len(first) + load.sent
        fleet.drain()
        swapped = [fleet.metric("upwell_swaps_total{served}"), scrape(url).get("upwell_swaps_total{served}", 0)]
        states = [decode_state(raw) for raw in raw_states(settings).values()]
        server.kill()
        server.join()
    p50_ms, p99_ms = by_quarter(np.array([(sample.p50_ms, sample.p99_ms) for sample in warm()])).T.tolist()
    verdict: dict[str, Any] = {
        "minutes": round(measured_s / 60, 1),
        "clicks": sent,
        "clicks_s": round(rate),
        "users": len(states),
        "not_applied": sent - sum(state.applied for state in states),
        "swaps": [int(count) - 1 for count in swapped],
        "worker": growth(warm(), "worker"),
        "server": growth(warm(), "server"),
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
        "lag_max": max(sample.lag for sample in warm()),
        "answers": len(clients.answers),
        "answers_failed": sum(answer.status != 200 for answer in clients.answers),
        "exits": len(fleet.exits),
    }
    report("soak", long, began, verdict)
    assert holds(verdict, {"users": USERS, "not_applied": 0, "answers_failed": 0, "exits": 0})
    for role in ("worker", "server"):
        found = verdict[role]
        grown = {name: found[name][-1] - found[name][0] for name in Use._fields}
        # In seconds only a leak of megabytes a second shows; thread pools are still filling.
        assert found["mb_per_hour"] < 1 if long else grown["rss_mb"] < 15, role
        assert grown["descriptors"] <= 2, role
        assert grown["threads"] <= (1 if long else 6), role
    if long:
        assert verdict["swaps"] == [swaps, swaps]
        assert verdict["p99_ms"][-1] <= 1.1 * verdict["p99_ms"][0]
