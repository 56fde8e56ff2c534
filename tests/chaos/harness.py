"""What the chaos scenarios share: workers of one group on fresh topics, a paced stream of known clicks, the verdict."""

import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import secrets
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from model.user_state import EMPTY, Applied, Fold, decode_state, digest, encode_state, split
from stream.connection import Connection
from stream.consumer import committed_offsets, end_offsets, read_window
from stream.events import (
    EVENT_TYPES,
    Artifact,
    BadEvent,
    Click,
    Erasure,
    Recommendations,
    decode,
    decode_record,
    encode,
)
from stream.ports import free_port
from stream.producer import ClickProducer
from stream.topics import ensure
from tests.chaos.worker import Trap, end, start, worker
from tests.workers.service import ITEMS, Service, until
from workers.observe import scrape
from workers.processes import EX_SOFTWARE
from workers.settings import Kafka, Serve, Settings, Trainer, Worker
from workers.states import limits_of, raw_states
from workers.up import HOPELESS

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("CHAOS_SEED", "6"))
# When the run starts: the checkout may move on under a long one.
COMMIT = subprocess.run(
    ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
).stdout.strip()
POSTS = 20  # a second, of a Client
SHORT_SESSION_S = 4.0  # of the short forms; the long ones have the worker's own 10 s
NO_KAFKA = 'Error: KafkaConnectionError("Unable to bootstrap'  # of Faust, which does not begin without
NO_KAFKA_FOR_A_THREAD = '"exc_value": "KafkaTimeoutError: Unable to bootstrap'  # nor do the readers


def make_clicks(draw: random.Random, count: int, users: int, name: str = "") -> list[Click]:
    """Known clicks. Times differ by less than the users' turns, so some arrive late."""
    first_ms = time.time_ns() // 1_000_000 - count - 60_000
    return [
        Click(
            event_id=f"{name}e{number}",
            user_id=f"{name}u{draw.randrange(users)}",
            item_id=draw.choice(ITEMS).item_id,
            event_type=draw.choice(EVENT_TYPES),  # type: ignore[arg-type]
            ts_ms=first_ms + number + draw.randrange(2000),
        )
        for number in range(count)
    ]


class Load:
    """Sends clicks at a rate from a thread; a context manager that ends when all are sent and acknowledged.

    `stop` ends it early: the clicks sent are the first `sent` ones.
    """

    def __init__(self, settings: Settings, clicks: Iterable[Click], rate: float) -> None:
        self._settings, self._clicks, self._rate = settings, clicks, rate
        self.sent = 0
        self.failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send, name="load", daemon=True)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stop.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self.stop()
        else:
            self._thread.join()
            if self.failure:
                raise self.failure

    def _send(self) -> None:
        began = time.monotonic()
        try:
            with ClickProducer(self._settings.connection, self._settings.topics) as producer:
                for click in self._clicks:
                    if self._stop.is_set():
                        break
                    if (ahead := self.sent / self._rate - (time.monotonic() - began)) > 0.02:
                        time.sleep(ahead)
                    producer.send(click)
                    self.sent += 1
        except BaseException as failure:
            self.failure = failure


class Client:
    """Posts each event once and asks for lists, without a pause; a context manager.

    A 202 is a promise; a 503 says that the event may not have arrived, and it is not sent again here.
    """

    def __init__(self, service: Service, clicks: list[Click], posters: int = 1) -> None:
        """posters: threads that share the rate, so that an event that waits for Kafka holds up no other."""
        self._service, self._clicks, self._pause_s = service, iter(clicks), posters / POSTS
        self.posted: list[Click] = []
        self.accepted: list[Click] = []
        self.statuses: list[int | str] = []  # of the posts
        self.lists: Counter[Any] = Counter()
        self.slowest_list_s = self.slowest_post_s = 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (*[self._post] * posters, self._ask)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def posts(self) -> Counter[int | str]:
        return Counter(self.statuses)

    def _post(self) -> None:
        for click in self._clicks:
            if self._stop.wait(self._pause_s):
                return
            fields = ("event_id", "user_id", "item_id", "event_type", "ts_ms")
            self.posted.append(click)
            began = time.monotonic()
            status = self._call("/v1/events", {name: getattr(click, name) for name in fields})
            self.slowest_post_s = max(self.slowest_post_s, time.monotonic() - began)
            self.statuses.append(status)
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


def by_route(settings: Settings, bootstrap: str | None) -> Settings:
    """The same cluster, reached by another address; None: by the settings' own."""
    kafka = settings.kafka.model_copy(update={"bootstrap": bootstrap or settings.kafka.bootstrap})
    return settings.model_copy(update={"kafka": kafka})


class Fleet:
    """Workers of one group on fresh topics, started again when they fall, as an orchestrator would; a context manager.

    session_s: None is the product's own, for which a dead worker's partitions wait. fault: called in each worker first.
    The rest are worker settings.
    exits: name and exit code of every worker that ended without being told to (a kill is that, too).
    traps: of a worker's successors, by name. routes: a worker's own way to the broker, by name.
    """

    def __init__(
        self,
        connection: Connection,
        folder: Path,
        generation: Artifact,
        *,
        partitions: int = 4,
        replicas: int | None = None,
        session_s: float | None = None,
        window_days: float = 30.0,
        fault: Callable[[], None] | None = None,
        routes: Mapping[str, str] = {},
        **settings: Any,
    ) -> None:
        name = f"c{secrets.token_hex(4)}"
        self.settings = Settings(
            kafka=Kafka(bootstrap=connection.bootstrap, prefix=name, partitions=partitions, replicas=replicas),
            worker=Worker(**settings),
            trainer=Trainer(window_days=window_days, min_events=100, holdout=20, round_s=1.0),
            serve=Serve(port=free_port()),
            cache=folder / "cache",
            artifacts=str(folder / "artifacts"),
        )
        self.folder, self._session_s, self._fault, self._routes = folder, session_s, fault, routes
        self.exits: list[tuple[str, int]] = []
        self._duplicates = 0.0
        self._processes: dict[str, Any] = {}
        self.traps: dict[str, Iterator[Trap]] = {}
        self._ports: dict[str, int] = {}
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._restart_fallen, name="fleet", daemon=True)
        ensure(self.settings.topics, connection)
        with ClickProducer(connection, self.settings.topics) as producer:
            for item in ITEMS:
                producer.send_item(item)
            producer.send_raw(self.settings.topics.generations.name, generation.name.encode(), encode(generation))

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopping.set()
        self._watch.join()
        if kind is not None:
            self._explain()
        for process in self._processes.values():
            process.kill()
            process.join()

    def _explain(self) -> None:
        """Print the ends of all logs, and of what still runs where each of its threads and tasks is."""
        for name in self._processes:
            self.send_signal(name, signal.SIGQUIT)
        time.sleep(2)
        for name in self._processes:
            print(f"--- {name}", *self.log(name).splitlines()[-400:], sep="\n")

    def start(self, name: str, traps: Iterable[Trap] = ()) -> None:
        """A worker with the first trap set in it, its successor with the second, and so on; then plain ones."""
        with self._lock:
            self.traps[name] = iter(traps)
            self._start(name)

    def _start(self, name: str) -> None:
        with self._lock:
            trap = next(self.traps[name], None)
            port = self._ports[name] = free_port()
            own = self.settings.worker.model_copy(update={"metrics_port": port})
            settings = by_route(self.settings, self._routes.get(name)).model_copy(update={"worker": own})
            log = self.folder / f"{name}.log"
            log.touch()  # to be read before the process has opened it
            self._processes[name] = start(worker, settings, log, trap, self._session_s, self._fault)

    def send_signal(self, name: str, number: signal.Signals) -> None:
        """SIGKILL, SIGSTOP, SIGCONT."""
        with self._lock:
            if number == signal.SIGKILL:
                self._duplicates += self.metric_of(name, "upwell_clicks_total{duplicate}")
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself a moment ago
                os.kill(self._processes[name].pid, number)

    def stop(self, name: str) -> tuple[float, int | None]:
        """SIGTERM: seconds until it has ended, exit code."""
        with self._lock:
            process = self._processes.pop(name)
            self._duplicates += self.metric_of(name, "upwell_clicks_total{duplicate}")
        return end(process)

    def fenced(self, name: str) -> int:
        """How often it was ended since another had its partition to write."""
        return sum('"exc_type": "ProducerFenced"' in line for line in self.json_log(name))

    def unexpected(self) -> list[tuple[str, int]]:
        """Of `exits` those that no kill, no other writer of its partition and no start without Kafka explains."""
        known = Counter[tuple[str, int]]()
        for name in self._processes:
            known[name, EX_SOFTWARE] = self.fenced(name) + self.log(name).count(NO_KAFKA_FOR_A_THREAD)
            known[name, 1] = self.log(name).count(NO_KAFKA)
        ended = Counter(one for one in self.exits if one[1] != -signal.SIGKILL)
        return list((ended - known).elements())

    def ready(self, name: str) -> bool:
        """What a rolling update asks before it ends the next one."""
        return httpx.get(f"http://127.0.0.1:{self._ports[name]}/readyz", trust_env=False).status_code == 200

    def port(self, name: str) -> int:
        """Of its metrics."""
        return self._ports[name]

    def pid(self, name: str) -> int:
        return int(self._processes[name].pid)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def json_log(self, name: str) -> list[str]:
        """The lines of a worker's own log, without what the libraries print."""
        return [line for line in self.log(name).splitlines() if line.startswith("{")]

    def frozen(self, name: str) -> bool:
        """Stopped by SIGSTOP, its own or ours."""
        with contextlib.suppress(OSError):  # ended, its successor not started yet
            stat = Path(f"/proc/{self.pid(name)}/stat").read_text()
            return stat.rpartition(")")[2].split()[0] == "T"
        return False

    def metric_of(self, name: str, metric: str) -> float:
        return scrape(f"http://127.0.0.1:{self._ports[name]}/metrics").get(metric, 0.0)

    def metric(self, metric: str) -> float:
        """Sum over the workers that run."""
        return sum(self.metric_of(name, metric) for name in list(self._processes))

    @property
    def redelivered(self) -> int:
        """Clicks that a worker read and found applied: a lower bound, a killed worker takes its last count with it."""
        return int(self._duplicates + self.metric("upwell_clicks_total{duplicate}"))

    def await_ready(self) -> None:
        """Until every worker serves the generation; it may still be joining its group."""
        names = list(self._processes)
        until(lambda: all(self.metric_of(name, "upwell_swaps_total{served}") for name in names), "a generation serves")

    def committed(self) -> dict[int, int]:
        """Partition of the clicks -> offset that the group goes on from."""
        return committed_offsets(self.settings.connection, self.settings.group, self.settings.topics.clicks.name)

    def lag(self) -> dict[int, int]:
        """Partition -> clicks not yet committed."""
        done = self.committed()
        ends = end_offsets(self.settings.connection, self.settings.topics.clicks.name)
        return {partition: end - max(0, done.get(partition, 0)) for partition, end in ends.items()}

    def drain(self, timeout_s: float = 90.0) -> None:
        """Until all clicks are committed."""
        deadline = time.monotonic() + timeout_s
        while any((lag := self.lag()).values()):
            assert time.monotonic() < deadline, f"not committed in {timeout_s:.0f} s: {lag}"
            time.sleep(0.2)

    def caught_up(self, timeout_s: float = 90.0) -> None:
        """Until everything that stands in the clicks topic now is committed, whatever comes after it."""
        ends = end_offsets(self.settings.connection, self.settings.topics.clicks.name)
        done = self.committed
        until(lambda: all(done().get(p, 0) >= end for p, end in ends.items()), "committed up to now", timeout_s)

    def _restart_fallen(self) -> None:
        while not self._stopping.wait(0.1):
            with self._lock:
                fallen = [name for name, process in self._processes.items() if process.exitcode is not None]
                for name in fallen:
                    self.exits.append((name, self._processes[name].exitcode))
                    if self._processes[name].exitcode not in HOPELESS:
                        self._start(name)


def calibrate(fleet: Fleet, clicks: Sequence[Click]) -> float:
    """Clicks a second that a worker, the only one, works off of these as fast as it can, sent to committed.

    A tenth of them go before, while the worker joins its group and grows warm.
    """
    before = len(clicks) // 10
    with Load(fleet.settings, clicks[:before], rate=1e9):
        pass
    fleet.drain()
    began = time.monotonic()
    with Load(fleet.settings, clicks[before:], rate=1e9):
        pass
    fleet.drain()
    return (len(clicks) - before) / (time.monotonic() - began)


def read_events(settings: Settings) -> Iterator[tuple[int, int, Click | Erasure]]:
    """Partition, offset and event of all good messages of the clicks topic."""
    for record in read_window(settings.connection, settings.topics.clicks.name):
        with contextlib.suppress(BadEvent):
            yield record.partition, record.offset, decode_record(record.value, record.key, record.timestamp)


def read_clicks(settings: Settings) -> Iterator[tuple[int, int, Click]]:
    return ((place, offset, event) for place, offset, event in read_events(settings) if isinstance(event, Click))


def read_lists(settings: Settings) -> Iterator[Recommendations]:
    """All that were sent and are still there, but the nulls of erased users."""
    for record in read_window(settings.connection, settings.topics.recommendations.name):
        if record.value is not None:
            yield decode(record.value, Recommendations)


def fold_topic(settings: Settings) -> dict[str, bytes]:
    """The states of a clean run: the clicks topic folded one by one in its order; none of an erased user."""
    limits, folds = limits_of(settings), dict[str, Fold]()
    for _, offset, event in read_events(settings):
        fold = folds.setdefault(event.user_id, Fold(EMPTY, limits))
        if isinstance(event, Erasure):
            fold.erase(offset)
        else:
            fold.apply(Applied(event, settings.weight(event), offset))
    states = {user_id: fold.state() for user_id, fold in folds.items()}
    return {user_id: encode_state(state) for user_id, state in states.items() if not state.erased}


def judge(settings: Settings, clicks: Sequence[Click]) -> dict[str, Any]:
    """What the topics say of the clicks sent, each with an id of its own. Users have fewer than `event_ids` each."""
    raw = raw_states(settings)
    states = {user_id: decode_state(value) for user_id, value in raw.items()}
    ids = {user_id: Counter(split(state.event_ids)) for user_id, state in states.items()}
    missing = {c.event_id for c in clicks if not ids.get(c.user_id, Counter())[digest(c.event_id)]}
    found = len(clicks) - len(missing)
    clean = fold_topic(settings)
    answered = {(answer.user_id, answer.offset) for answer in read_lists(settings) if answer.items}
    return {
        "clicks": len(clicks),
        "lost": len(missing),
        **({"lost_places": places(settings, missing)} if missing else {}),
        "applied_twice": sum(state.applied for state in states.values()) - found,
        "users": len(states),
        "users_not_identical": sum(raw.get(user) != clean.get(user) for user in raw.keys() | clean.keys()),
        "users_behind": sum((user, state.offset) not in answered for user, state in states.items()),
        "dead_letters": sum(end_offsets(settings.connection, settings.topics.dead_letters.name).values()),
    }


def places(settings: Settings, event_ids: Collection[str]) -> dict[int, list[int]]:
    """Where these events stand in the clicks topic: partition -> first and last offset, and how many."""
    found: dict[int, list[int]] = {}
    for partition, offset, click in read_clicks(settings):
        if click.event_id in event_ids:
            first, _, count = found.get(partition, [offset, 0, 0])
            found[partition] = [first, offset, count + 1]
    return found


NOTHING_LOST = {"lost": 0, "applied_twice": 0, "users_not_identical": 0, "users_behind": 0, "dead_letters": 0}


def holds(verdict: Mapping[str, Any], wanted: Mapping[str, Any] = NOTHING_LOST) -> bool:
    return all(verdict[name] == value for name, value in wanted.items())


def report(name: str, long: bool, began: float, counts: Mapping[str, Any]) -> None:
    """One JSON line; in the long form also out/chaos/NAME.json."""
    jars = (ROOT / "stream/jgo.toml").read_text()
    kafka_version = re.search(r"kafka_2\.13:([\d.]+)", jars)
    versions = {
        package: importlib.metadata.version(package) for package in ("faust-streaming", "aiokafka", "kafka-python")
    }
    line = json.dumps(
        {
            "scenario": name,
            "form": "long" if long else "short",
            "seed": SEED,
            **counts,
            "seconds": round(time.monotonic() - began, 1),
            "commit": COMMIT,
            "versions": {"kafka": kafka_version and kafka_version[1], "python": platform.python_version(), **versions},
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "load_average": os.getloadavg()[1],
        }
    )
    print(line)
    if long:
        folder = ROOT / "out" / "chaos"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(line + "\n")
