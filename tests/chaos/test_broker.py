"""Scenario 4: the broker stopped, or killed, and started again on its log, with a worker and a server beside it."""

import os
import random
import signal
import time
from pathlib import Path

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.events import Artifact
from tests.chaos.harness import SEED, SHORT_SESSION_S, Client, Fleet, holds, judge, make_clicks, report
from tests.chaos.worker import start
from tests.workers.service import Service, until
from workers.server import run_server
from workers.up import Roles


def test_broker_comes_back(generation: Artifact, tmp_path: Path, long: bool) -> None:
    draw, began = random.Random(SEED), time.monotonic()
    # How it goes, and for how long: in order, or by SIGKILL.
    outages = [(n % 2 == 0, s) for n, s in enumerate([5] * 7 + [60] * 2 + [300])] if long else [(True, 5)]
    recovered_s, lists_a_second = [], []
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
                    before = client.lists[200]
                    time.sleep(seconds)
                    lists_a_second.append((client.lists[200] - before) / seconds)
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
                "lists_a_second_min": round(min(lists_a_second), 1),
                "slowest_list_s": round(client.slowest_list_s, 2),
                "worker_exits": [code for _, code in fleet.exits],
                "server_alive": server.is_alive(),
            }
            server.kill()
            server.join()
    report("broker", long, began, verdict)
    assert holds(verdict)
    assert set(verdict["lists"]) == {"200"}
    assert verdict["lists_a_second_min"] >= 1 and verdict["slowest_list_s"] < 5  # one that waits for Kafka waits longer
    assert set(verdict["posts"]) == {"202", "503"}
    assert holds(verdict, {"server_alive": True, "worker_exits": []})
