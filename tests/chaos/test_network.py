"""Beside the list: the network between a role and the broker is cut, swallows everything, or is slow."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stream.connection import Connection
from stream.consumer import end_offsets
from stream.events import Artifact, Click, Item
from stream.producer import ClickProducer
from tests.chaos.harness import SEED, SHORT_SESSION_S, Client, Fleet, Load, by_route, holds, judge, make_clicks, report
from tests.chaos.network import Proxy, broker_behind
from tests.chaos.worker import start
from tests.workers.service import Service, until
from workers.indexer import run_indexer
from workers.server import run_server
from workers.trainer import run_trainer
from workers.up import Roles

RATE = 150
USERS_FOR_S = 2  # then others come: what an overtaken worker sends late is the last record of its users
PARTITIONS = 4
MOVES_S = 30.0  # after the network is back


def passing_users(draw: random.Random, seconds: int) -> Iterator[Click]:
    for turn in range(seconds // USERS_FOR_S):
        yield from make_clicks(draw, USERS_FOR_S * RATE, users=60, name=f"n{turn}-")


class Scene:
    """Two workers, a server and its clients, each role behind a proxy, and how the figures come about."""

    def __init__(
        self, fleet: Fleet, proxies: dict[str, Proxy], service: Service, client: Client, session_s: float, slow_s: float
    ) -> None:
        self._fleet, self._proxies, self._service = fleet, proxies, service
        self._client, self._session_s, self._slow_s = client, session_s, slow_s
        self.faults: list[str] = []
        self.takeovers_s: list[float] = []
        self.moves_s: list[float] = []
        self.lag_when_slow = self.rebalances_when_slow = 0

    def run(self, fault: str, victim: str, lost: bool) -> None:
        self.faults.append(f"{fault} {victim} lost" if lost else f"{fault} {victim}")
        getattr(self, fault)(victim)
        for proxy in self._proxies.values():
            proxy.heal(lost)
        healed, accepted = time.monotonic(), len(self._client.accepted)
        time.sleep(1)  # what comes now has to move, too
        self._fleet.caught_up()
        until(lambda: len(self._client.accepted) > accepted, "events are taken again")
        self.moves_s.append(round(time.monotonic() - healed, 1))
        print(f"{time.strftime('%X')} {self.faults[-1]}: moves {self.moves_s[-1]} s after, exits {self._fleet.exits}")

    def zombie(self, victim: str) -> None:
        """The network's, not the process's: it works on, and is told of nothing."""
        hidden = time.monotonic()
        self._proxies[victim].black_hole()
        time.sleep(USERS_FOR_S)
        self._fleet.caught_up()
        self.takeovers_s.append(round(time.monotonic() - hidden, 1))
        time.sleep(max(0.0, hidden + self._session_s + 4 - time.monotonic()))

    def cut(self, victim: str) -> None:
        self._proxies[victim].cut()
        time.sleep(5)

    def all_black_holed(self, _: str) -> None:
        for proxy in self._proxies.values():
            proxy.black_hole()
        time.sleep(30)

    def all_forgotten(self, _: str) -> None:
        for proxy in self._proxies.values():
            proxy.forget()

    def all_slow(self, _: str) -> None:
        self._fleet.await_ready()
        time.sleep(5)  # a worker that was fenced a moment ago joins its group first
        before = self._restored()
        for proxy in self._proxies.values():
            proxy.slow(0.2)
        time.sleep(self._slow_s)
        self.lag_when_slow = max(self.lag_when_slow, *self._fleet.lag().values())
        self.rebalances_when_slow += self._restored() - before

    def server_black_holed(self, _: str) -> None:
        answered = self._client.lists[200], self._client.posts[503]
        self._proxies["serve"].black_hole()
        time.sleep(7)
        assert self._service.call("/v1/users/u1/recommendations?k=10")[1]["stale"], (
            "a list that nobody follows any more"
        )
        time.sleep(5)
        assert self._client.lists[200] > answered[0], "no list from memory"
        assert self._client.posts[503] > answered[1], "no event refused"

    def _restored(self) -> int:
        return sum(self._fleet.log(name).count('"states restored"') for name in ("a", "b"))


def faults(draw: random.Random, long: bool) -> list[tuple[str, str, bool]]:
    """Fault, victim, and whether its connections are lost when it ends."""
    if not long:
        kinds = ["all_slow", "zombie", "all_forgotten", "cut", "server_black_holed"]
        return [(kind, "a", kind == "server_black_holed") for kind in kinds]
    kinds = [*["zombie", "cut", "all_slow", "server_black_holed"] * 4, *["all_black_holed", "all_forgotten"] * 2]
    draw.shuffle(kinds)
    return [(kind, draw.choice("ab"), draw.random() < 0.5) for kind in kinds]


def test_networks_fail(generation: Artifact, tmp_path: Path, long: bool) -> None:
    draw, began = random.Random(SEED), time.monotonic()
    session_s = 10.0 if long else SHORT_SESSION_S
    with broker_behind(tmp_path / "kafka", ["a", "b", "serve"]) as (broker, proxies):
        routes = {name: proxy.bootstrap for name, proxy in proxies.items()}
        own_s = None if long else session_s
        direct = Connection(broker.bootstrap)
        with Fleet(direct, tmp_path, generation, partitions=PARTITIONS, session_s=own_s, routes=routes) as fleet:
            settings = fleet.settings
            service = Service(settings, Roles({}), tmp_path)
            server = start(run_server, by_route(settings, routes["serve"]), tmp_path / "serve.log")
            fleet.start("a")
            fleet.start("b")
            fleet.await_ready()
            until(lambda: service.call("/readyz")[0] == 200, "the server is ready")
            steady = passing_users(draw, 3000)
            posts = make_clicks(draw, 100_000, users=300)
            sent: list[Click] = []
            with Load(settings, kept(steady, sent), RATE) as load, Client(service, posts) as client:
                fleet.caught_up()
                time.sleep(2)
                scene = Scene(fleet, proxies, service, client, session_s, 30.0 if long else 5.0)
                for fault in faults(draw, long):
                    scene.run(*fault)
                load.stop()
            fleet.drain(120)
            sent = sent[: load.sent]
            of_all = judge(settings, sent + client.posted)
            verdict: dict[str, Any] = judge(settings, sent + client.accepted) | {
                "applied_twice": of_all["applied_twice"],
                "faults": scene.faults,
                "takeovers_s": scene.takeovers_s,
                "moves_s": scene.moves_s,
                "moves_s_max": max(scene.moves_s),
                "fenced": sum(fleet.fenced(name) for name in ("a", "b")),
                "ended_by_itself": fleet.unexpected(),
                "posted": len(client.posted),
                "posts": {str(status): count for status, count in client.posts.items()},
                "slowest_post_s": round(client.slowest_post_s, 2),
                "lists": {str(status): count for status, count in client.lists.items()},
                "slowest_list_s": round(client.slowest_list_s, 2),
                "lag_when_slow": scene.lag_when_slow,
                "rebalances_when_slow": scene.rebalances_when_slow,
                "server_alive": server.is_alive(),
            }
            server.kill()
            server.join()
    report("network", long, began, verdict)
    assert holds(verdict)
    assert holds(verdict, {"server_alive": True, "ended_by_itself": [], "rebalances_when_slow": 0})
    assert set(verdict["lists"]) == {"200"}
    assert set(verdict["posts"]) == {"202", "503"}
    assert verdict["slowest_post_s"] < settings.serve.timeout_s + 1
    assert verdict["lag_when_slow"] < 10 * RATE
    assert verdict["moves_s_max"] < (MOVES_S if long else 2 * MOVES_S)  # the short form's on a machine under load


def kept(clicks: Iterator[Click], sent: list[Click]) -> Iterator[Click]:
    for click in clicks:
        now = msgspec.structs.replace(click, ts_ms=time.time_ns() // 1_000_000)
        sent.append(now)
        yield now


def test_makers_go_on(generation: Artifact, tmp_path: Path, long: bool) -> None:
    """Trainer and indexer behind a black hole, long enough for whatever they ask for to fail, then with new
    connections only."""
    if not long:
        pytest.skip("long form only")
    draw, began = random.Random(SEED), time.monotonic()
    with broker_behind(tmp_path / "kafka", ["trainer", "indexer"]) as (broker, proxies):
        settings = Fleet(Connection(broker.bootstrap), tmp_path, generation).settings
        topics = settings.topics

        def encoded() -> int:
            return sum(end_offsets(settings.connection, topics.vectors.name).values())

        def rounds() -> int:
            return (tmp_path / "trainer.log").read_text().count('"round concluded"')

        def grows(count: Callable[[], int], before: int, what: str) -> float:
            since = time.monotonic()
            until(lambda: count() > before, what)
            return round(time.monotonic() - since, 1)

        makers = {
            name: start(role, by_route(settings, proxies[name].bootstrap), tmp_path / f"{name}.log")
            for name, role in {"trainer": run_trainer, "indexer": run_indexer}.items()
        }
        try:
            with Load(settings, make_clicks(draw, 10**5, users=60), rate=20) as load:
                grows(rounds, 0, "the trainer trains")
                black_holes = []
                for lost in (False, True):
                    for proxy in proxies.values():
                        proxy.black_hole()
                    time.sleep(45)
                    with ClickProducer(settings.connection, topics) as producer:
                        producer.send_item(Item(item_id=f"new-{lost}", title="Rivers and their mouths"))
                    before = encoded(), rounds()
                    for proxy in proxies.values():
                        proxy.heal(lost)
                    moves_s = {
                        "vector": grows(encoded, before[0], "an item is encoded"),
                        "round": grows(rounds, before[1], "training goes on"),
                    }
                    black_holes.append({"lost": lost, **moves_s})
                    print(black_holes, {name: maker.exitcode for name, maker in makers.items()})
                load.stop()
            verdict = {"black_holes": black_holes, "exits": [maker.exitcode for maker in makers.values()]}
        finally:
            for name, maker in makers.items():
                print(f"--- {name}", *(tmp_path / f"{name}.log").read_text().splitlines()[-40:], sep="\n")
                maker.kill()
                maker.join()
    report("network_makers", long, began, verdict)
    assert verdict["exits"] == [None, None]
