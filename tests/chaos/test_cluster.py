"""Beside the list: three brokers, one after the other killed or stopped under load, at last two of them at once."""

import random
import signal
import time
from pathlib import Path

from stream.events import Artifact
from stream.topics import describe
from tests.chaos.cluster import NODES, Cluster
from tests.chaos.harness import SEED, SHORT_SESSION_S, Client, Fleet, Load, holds, judge, make_clicks, report
from tests.chaos.worker import start
from tests.workers.service import Service, until
from workers.server import run_server
from workers.up import Roles

RATE = 50  # clicks a second, beside those that are posted
OFFICES = ("group coordinator", "leader of clicks", "transaction coordinator", "leader of users", "controller")
WAITED_S = 120.0
MEANWHILE = 20  # events accepted while a broker is away, at least


def test_one_broker_after_the_other(generation: Artifact, tmp_path: Path, long: bool) -> None:
    """While one is away everything goes on: what is accepted meanwhile is applied before it is back. Without two of
    three nothing is accepted, and lists are answered from memory."""
    draw, began = random.Random(SEED), time.monotonic()
    rounds, seconds, alone_s = (12, 15, 30) if long else (1, 2, 7)
    offices, applied_s, back_s, taken_s, applied_meanwhile, not_applied = [], [], [], [], 0, 0
    with (
        Cluster(tmp_path) as cluster,
        Fleet(
            cluster.connection, tmp_path, generation, replicas=3, session_s=None if long else SHORT_SESSION_S
        ) as fleet,
    ):
        settings = fleet.settings
        service = Service(settings, Roles({}), tmp_path)
        server = start(run_server, settings, tmp_path / "serve.log")
        for name in ("a", "b"):
            fleet.start(name)
        fleet.await_ready()
        until(lambda: service.call("/readyz")[0] == 200, "the server is ready")
        faults = [fault for found in describe(settings.topics, cluster.connection) for fault in found.faults()]
        assert not faults
        sent, posted = (make_clicks(draw, 100_000, users=300, name=name) for name in ("s", ""))
        with Client(service, posted, posters=8) as client, Load(settings, sent, RATE) as load:
            until(lambda: len(client.accepted) > 0 and load.sent > 0, "events are taken")
            fleet.caught_up()
            for number in range(rounds):
                offices.append(OFFICES[number % len(OFFICES)])
                until(cluster.whole, "all replicas are in sync", WAITED_S)
                victim = cluster.offices(settings)[offices[-1]]
                end = cluster.kill if number % 2 == 0 else cluster.stop
                end(victim)
                away, before = time.monotonic(), len(client.accepted)
                if number % 3 == 2:
                    fleet.send_signal("b", signal.SIGKILL)  # its successor starts with two of three brokers
                until(lambda before=before: len(client.accepted) > before, "events are taken by two of three", WAITED_S)  # type: ignore[misc]
                taken_s.append(round(time.monotonic() - away, 1))
                time.sleep(seconds)
                until(lambda before=before: len(client.accepted) >= before + MEANWHILE, "events flow", WAITED_S)  # type: ignore[misc]
                meanwhile, asked = client.accepted[before:], time.monotonic()
                fleet.caught_up(WAITED_S)
                applied_s.append(round(time.monotonic() - asked, 1))
                applied_meanwhile += len(meanwhile)
                not_applied += judge(settings, meanwhile)["lost"]
                down = [victim]
                if number == rounds - 1:
                    left = cluster.leader(settings.topics.clicks.name)  # who could take events, were one enough
                    down.append(next(node for node in NODES if node not in (victim, left)))
                    cluster.kill(down[-1])
                    time.sleep(1)  # what was acknowledged before the kill is answered
                    accepted, refused, answered = len(client.accepted), client.posts[503], client.lists[200]
                    time.sleep(alone_s)
                    accepted_alone, refused_alone = len(client.accepted) - accepted, client.posts[503] - refused
                    lists_alone = client.lists[200] - answered
                cluster.start(*down)
                back, accepted = time.monotonic(), len(client.accepted)
                until(lambda before=accepted: len(client.accepted) > before, "events are taken again", WAITED_S)  # type: ignore[misc]
                fleet.caught_up(WAITED_S)
                back_s.append(round(time.monotonic() - back, 1))
            load.stop()
        fleet.drain(WAITED_S)
        until(cluster.whole, "all replicas are in sync", WAITED_S)
        accepted_clicks = [*sent[: load.sent], *client.accepted]
        of_all = judge(settings, [*sent[: load.sent], *client.posted])
        verdict = judge(settings, accepted_clicks) | {
            "applied_twice": of_all["applied_twice"],
            "outages": len(offices),
            "of the": offices,
            "by SIGKILL": len(offices[::2]),
            "applied_while_one_was_away": applied_meanwhile,
            "not_applied_while_one_was_away": not_applied,
            "taken_again_s": sorted(taken_s),
            "applied_s_max": max(applied_s),
            "caught_up_after_return_s_max": max(back_s),
            "accepted_without_two": accepted_alone,
            "refused_without_two": refused_alone,
            "lists_without_two": lists_alone,
            "posts": {str(status): count for status, count in client.posts.items()},
            "lists": {str(status): count for status, count in client.lists.items()},
            "slowest_list_s": round(client.slowest_list_s, 2),
            "workers_killed": fleet.exits.count(("b", -signal.SIGKILL)),
            "worker_exits": [code for _, code in fleet.exits if code != -signal.SIGKILL],
            "server_alive": server.is_alive(),
        }
        server.kill()
        server.join()
    report("cluster", long, began, verdict)
    assert holds(verdict)
    assert set(verdict["lists"]) == {"200"}
    assert verdict["lists_without_two"] >= alone_s > verdict["slowest_list_s"]
    assert set(verdict["posts"]) == {"202", "503"}
    assert verdict["applied_while_one_was_away"] >= rounds * MEANWHILE and verdict["refused_without_two"] > 0
    assert holds(verdict, {"not_applied_while_one_was_away": 0, "accepted_without_two": 0})
    assert holds(verdict, {"server_alive": True, "worker_exits": []})
