"""Scenario 4: the broker stopped, or killed, and started again on its log, with a worker and a server beside it."""

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.events import Artifact, Click
from tests.chaos.harness import SEED, SHORT_SESSION_S, Fleet, holds, judge, make_clicks, report
from tests.chaos.worker import start
from tests.workers.service import Service, until
from workers.server import run_server
from workers.up import Roles

RATE = 20  # posts a second


class Client:
    """Posts each event once and asks for lists, without a pause; a context manager.

    A 202 is a promise; a 503 says that the event may not have arrived, and it is not sent again here.
    """

    def __init__(self, service: Service, clicks: list[Click]) -> None:
        self._service, self._clicks = service, clicks
        self.posted: list[Click] = []
        self.accepted: list[Click] = []
        self.posts: Counter[Any] = Counter()
        self.lists: Counter[Any] = Counter()
        self.slowest_list_s = 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._post, self._ask)]

    def __enter__(self) -> "Client":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _post(self) -> None:
        for click in self._clicks:
            if self._stop.wait(1 / RATE):
                return
            fields = ("event_id", "user_id", "item_id", "event_type", "ts_ms")
            self.posted.append(click)
            status = self._call("/v1/events", {name: getattr(click, name) for name in fields})
            self.posts[status] += 1
            if status == 202:
                self.accepted.append(click)

    def _ask(self) -> None:
        while not self._stop.wait(0.1):
            began = time.monotonic()
            self.lists[self._call("/v1/users/u1/recommendations?k=10")] += 1
            self.slowest_list_s = max(self.slowest_list_s, time.monotonic() - began)

    def _call(self, path: str, body: Any = None) -> int | str:
        try:
            return self._service.call(path, body)[0]
        except OSError as error:
            return type(error).__name__


def test_broker_comes_back(generation: Artifact, tmp_path: Path, long: bool) -> None:
    draw, began = random.Random(SEED), time.monotonic()
    # How it goes, and for how long: in order, or by SIGKILL.
    outages = [(n % 2 == 0, s) for n, s in enumerate([5] * 7 + [60] * 2 + [300])] if long else [(True, 5)]
    recovered_s = []
    with LocalBroker(tmp_path / "kafka") as broker:
        connection = Connection(broker.bootstrap)
        with Fleet(connection, tmp_path, generation, session_s=None if long else SHORT_SESSION_S) as fleet:
            settings = fleet.settings
            service = Service(settings, Roles({}), tmp_path)
            server = start(run_server, settings, tmp_path / "serve.log")
            fleet.start("a")
            fleet.await_ready()
            until(lambda: service.call("/readyz")[0] == 200, "the server is ready")
            clicks = make_clicks(draw, 100_000, users=300)
            with Client(service, clicks) as client:
                time.sleep(2)
                for killed, seconds in outages:
                    if killed and broker.pid is not None:
                        os.kill(broker.pid, signal.SIGKILL)
                    else:
                        broker.stop()
                    time.sleep(seconds)
                    broker.start()
                    back, accepted = time.monotonic(), len(client.accepted)
                    until(lambda accepted=accepted: len(client.accepted) > accepted, "events are taken again", 120)  # type: ignore[misc]
                    fleet.caught_up()
                    recovered_s.append(round(time.monotonic() - back, 1))
            fleet.drain(120)
            accepted_ids = {click.event_id for click in client.accepted}
            of_all = judge(settings, client.posted)
            verdict = judge(settings, client.accepted) | {
                "applied_twice": of_all["applied_twice"],
                "outages_s": [seconds for _, seconds in outages],
                "by SIGKILL": sum(killed for killed, _ in outages),
                "recovered": len(recovered_s),
                "recovered_s_max": max(recovered_s),
                "posted": len(client.posted),
                "posts": {str(status): count for status, count in client.posts.items()},
                "refused_but_applied": len(client.posted) - of_all["lost"] - len(accepted_ids),
                "lists": {str(status): count for status, count in client.lists.items()},
                "slowest_list_s": round(client.slowest_list_s, 2),
                "worker_exits": [code for _, code in fleet.exits],
                "server_alive": server.is_alive(),
            }
            server.kill()
            server.join()
    report("broker", long, began, verdict)
    assert holds(verdict, {"lost": 0, "applied_twice": 0, "users_not_identical": 0, "dead_letters": 0})
    assert set(verdict["lists"]) == {"200"}
    assert set(verdict["posts"]) == {"202", "503"}
    assert holds(verdict, {"server_alive": True, "worker_exits": []})
