"""Scenario 12: a worker and a server asked to end under load, event streams open."""

import random
import socket
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import httpx

from model.user_state import decode_state
from stream.connection import Connection
from stream.events import Artifact
from stream.producer import partition_of
from tests.chaos.clients import Clients
from tests.chaos.harness import NOTHING_LOST, SEED, Fleet, Load, holds, judge, make_clicks, report
from tests.chaos.worker import asked_early, end, load_for_ever, start
from tests.workers.service import Service, until
from workers.server import run_server
from workers.settings import Settings
from workers.states import raw_states
from workers.up import Roles

RATE, PARTITIONS = 100, 4
REQUESTS, WAITING, STREAMS = 20.0, 1.0, 4  # quick requests a second, such as take two seconds; streams at a time
READ_S = 0.5  # what was asked so long before the signal is under way, or answered


class Streams:
    """Readers of users' streams, opened again when they end; a context manager. `ends`: how each did."""

    def __init__(self, url: str) -> None:
        self._url, self._stop = url, threading.Event()
        self.lists, self.ends = Counter[str](), Counter[str]()
        self._threads = [threading.Thread(target=self._follow, args=(f"u{n}",), daemon=True) for n in range(STREAMS)]

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        for thread in self._threads if kind is None else []:  # else a server may run, with which alone streams end
            thread.join()

    def _follow(self, user_id: str) -> None:
        while not self._stop.wait(0.1):
            opened, end = False, "in order"
            try:  # not by http.client, whose readline takes a body that is cut for a whole one
                with httpx.stream("GET", f"{self._url}/v1/stream", params={"user": user_id}, timeout=60) as answer:
                    opened = True
                    for line in answer.iter_lines():
                        self.lists[user_id] += line == "event: recommendations"
            except httpx.TransportError as error:
                end = type(error).__name__
            self.ends[end] += opened  # else it was refused: not under way


def applied_to(settings: Settings) -> dict[int, int]:
    """Partition -> one past the last click in a committed state."""
    ends: dict[int, int] = {}
    for user_id, raw in raw_states(settings).items():
        partition = partition_of(user_id, PARTITIONS)
        ends[partition] = max(ends.get(partition, 0), decode_state(raw).offset + 1)
    return ends


def test_ends_in_order(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    """Nothing is read twice after the worker's end: what is applied is committed. What the server has begun it ends:
    lists, and streams as HTTP ends a body.
    """
    times = 50 if long else 2
    draw, began = random.Random(SEED), time.monotonic()
    longest_s = 40 if long else 200  # of a round: many have their mean, a few what `until` and `end` allow
    clicks = make_clicks(draw, longest_s * RATE * times, users=40 * times)
    seconds, codes, served, uneven = list[float](), Counter[str](), list[tuple[float, float]](), 0
    with Fleet(connection, tmp_path, generation, partitions=PARTITIONS) as fleet:
        settings, port = fleet.settings, fleet.settings.serve.port
        service = Service(settings, Roles({}), tmp_path)
        with (
            Load(settings, clicks, RATE) as load,
            Streams(service.url) as streams,
            Clients(port, REQUESTS, "k=10") as quick,
            Clients(port, WAITING, f"k=10&min_offset={10**9}") as waiting,
        ):
            for number in range(times):
                server = start(run_server, settings, tmp_path / "serve.log")
                fleet.start("a")
                until(lambda: service.call("/readyz")[0] == 200, "the server is ready")
                ready = time.monotonic()
                until(lambda: fleet.metric("upwell_clicks_total{applied}") > 0, "clicks are applied")
                time.sleep(draw.uniform(2.5, 4))
                stops = [("server", partial(end, server)), ("worker", partial(fleet.stop, "a"))]
                for role, stop in stops[:: (-1) ** number]:
                    if role == "server":
                        served.append((ready, time.monotonic()))
                    took, code = stop()
                    seconds.append(took)
                    codes[f"{role} {code}"] += 1
                    time.sleep(draw.uniform(0, 1))
                committed = {part: offset for part, offset in fleet.committed().items() if offset > 0}
                uneven += committed != applied_to(settings)
            assert load.running, "the load ended before the stops"
            load.stop()
        fleet.start("a")
        fleet.drain()
        answers, under_way = [], 0
        for ready, signalled in served:
            asked = [a for a in quick.answers + waiting.answers if ready <= a.asked <= signalled - READ_S]
            under_way += sum(answer.at + answer.ms / 1000 > signalled for answer in asked)
            answers += asked
        verdict = judge(settings, clicks[: load.sent]) | {
            "stops": codes,
            "exit_s_median": round(median(seconds), 2),
            "exit_s_max": round(max(seconds), 2),
            "exits_over_10_s": sum(took > 10 for took in seconds),
            "committed_is_not_applied": uneven,
            "redelivered": fleet.redelivered,
            "answers": len(answers),
            "under_way": under_way,
            "answers_failed": sum(answer.status != 200 for answer in answers),
            "streams": +streams.ends,
            "lists_streamed": sum(streams.lists.values()),
        }
    report("sigterm", long, began, verdict)
    assert holds(verdict, NOTHING_LOST | {"redelivered": 0, "committed_is_not_applied": 0, "answers_failed": 0})
    assert holds(verdict, {"stops": {"worker 0": times, "server -15": times}, "streams": {"in order": STREAMS * times}})
    assert under_way >= times and len(streams.lists) == STREAMS
    if long:
        assert max(seconds) < 10


def test_ends_while_it_waits_for_its_first_generation(
    connection: Connection, generation: Artifact, tmp_path: Path
) -> None:
    """In no group yet, and told to be ready by nothing: Kubernetes would end an old worker for it."""
    with Fleet(connection, tmp_path, generation, fault=load_for_ever) as fleet:
        fleet.start("a")
        until(lambda: "fault: loads" in fleet.log("a"), "it loads")
        assert not fleet.committed() and fleet.metric_of("a", "upwell_swaps_total{served}") == 0
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", fleet.port("a"))) != 0
        took_s, code = fleet.stop("a")
    assert code == 0 and took_s < 10


def test_ends_when_asked_before_faust_listens(connection: Connection, generation: Artifact, tmp_path: Path) -> None:
    with Fleet(connection, tmp_path, generation, fault=asked_early) as fleet:
        fleet.start("a")
        until(lambda: ("a", 0) in fleet.exits, "it ends in order", 30)
