"""`upwell demo`: the whole service on a real event stream, watched; with `--check`, judged.

broker, indexer, trainer, worker, serve  <-  replay of the events in time order
subscriber, HTTP requests, metrics       ->  live table, or one JSON summary
"""

import fcntl
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kafka.errors import KafkaError
from msgspec.structs import replace
from rich.console import Console
from rich.live import Live as Screen
from rich.table import Table

from stream.broker import LocalBroker, require_unused
from stream.consumer import end_offsets
from stream.datasets import Dataset, load_dataset
from stream.jars import BrokerError
from stream.kraft import require_free
from stream.ports import free_port
from stream.producer import ClickProducer
from stream.replay import replay, shifted
from stream.topics import delete, ensure
from workers.check import failures, summarise
from workers.logs import configure
from workers.observe import Observer, num_committed
from workers.processes import stop_on_signal
from workers.settings import Settings, load_settings
from workers.states import raw_states
from workers.up import NO_LOGIN, Roles

FOLDER = Path("data/demo")
READY_S = 180.0
DRAIN_S = 120.0
REDRAW_S = 0.5


@dataclass(frozen=True)
class DemoOptions:
    check: bool
    stream: str
    events: int | None
    rate: float
    port: int
    broker: str | None
    kafka_home: Path | None


def run_demo(options: DemoOptions) -> int:
    """Exit code 0, or 1 when a promise of --check does not hold, is not judged, or the service does not come up.

    Raises BrokerError where another demo runs, or its port is taken: it would be another service that is judged.
    """
    began, console, stop = time.monotonic(), Console(stderr=options.check), stop_on_signal()
    dataset = load_dataset(options.stream)
    require_unused(FOLDER / "kafka")
    if options.port:
        require_free(options.port)
    with ExitStack() as stack:
        stack.enter_context(_own_folder())
        shutil.rmtree(FOLDER, ignore_errors=True)
        console.print(f"starting Kafka and the roles; their logs: {FOLDER / 'logs'}")
        broker = LocalBroker(FOLDER / "kafka", home=options.kafka_home)
        bootstrap = options.broker or stack.enter_context(broker).bootstrap
        settings = _settings(bootstrap, options.port, local=options.broker is None)
        ensure(settings.topics, settings.connection)
        if options.broker:
            stack.callback(_clear, settings, console)
        with ClickProducer(settings.connection, settings.topics) as producer:
            for item in dataset.items:
                producer.send_item(item)
        roles = stack.enter_context(Roles({}, FOLDER / "logs"))
        console.print(f"{len(dataset.items):,} items sent; waiting for the first generation")
        observer = Observer(settings)
        if not observer.await_ready(READY_S, stop):
            console.print("" if stop.is_set() else f"not ready within {READY_S:.0f} s: see the logs")
            return 0 if stop.is_set() and not options.check else 1
        stack.enter_context(observer)
        demo = Demo(settings, dataset, options, observer, stop)
        demo.run(console)
        if options.check and not stop.is_set():
            return demo.judge(began, roles.restarts)
        if not stop.is_set():
            console.print(f"all events are sent; {observer.url} stays up until Ctrl-C")
            stop.wait()
    return int(options.check)  # not judged


@contextmanager
def _own_folder() -> Iterator[None]:
    """Raises BrokerError where another demo has it: one on a Kafka that is not local keeps no broker's lock in it."""
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{FOLDER}.lock", "w") as lock:  # beside it: the folder is emptied
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BrokerError(f"{FOLDER} is in use by another demo") from None
        yield


def _clear(settings: Settings, console: Console) -> None:
    """Nobody else has use for this demo's topics."""
    try:
        delete(settings.topics, settings.connection)
    except KafkaError as error:
        console.print(f"the topics {settings.topics.prefix}.* are left in {settings.kafka.bootstrap}: {error!r}")


def _settings(bootstrap: str, port: int, *, local: bool) -> Settings:
    """The settings of the demo, which its roles inherit by environment. Whatever would reach into an installation that
    the caller's variables mean (its topics, group, store) or collide with it on this machine is the demo's own, and so
    is how it is asked: over loopback, without keys. local: its Kafka is its own, too.
    """
    name = f"demo-{int(time.time())}"
    os.environ |= (NO_LOGIN if local else {}) | {
        "UPWELL_KAFKA__BOOTSTRAP": bootstrap,
        "UPWELL_KAFKA__PREFIX": name,
        "UPWELL_WORKER__GROUP": name,
        "UPWELL_ARTIFACTS": str(FOLDER / "artifacts"),
        "UPWELL_METRICS_HOST": "127.0.0.1",
        "UPWELL_SERVE__HOST": "127.0.0.1",
        **{f"UPWELL_SERVE__{name}": "null" for name in ("KEYS_FILE", "CERT_FILE", "KEY_FILE")},
        "UPWELL_SERVE__PORT": str(port or free_port()),
        **{f"UPWELL_{role}__METRICS_PORT": str(free_port()) for role in ("WORKER", "TRAINER", "INDEXER")},
    }
    settings = load_settings()
    configure(settings.log_level, "demo")
    return settings


class Demo:
    """The replay, and what is shown and said of it."""

    def __init__(
        self, settings: Settings, dataset: Dataset, options: DemoOptions, observer: Observer, stop: threading.Event
    ) -> None:
        self.settings, self.observer, self.stop, self.rate = settings, observer, stop, options.rate
        self.title = f"Upwell · {dataset.name} · {observer.url}"
        events = shifted(dataset.events, time.time_ns() // 1_000_000)[: options.events]
        hide = settings.privacy.pseudonyms
        # Under the ids that stand in the topics: the run is judged by them.
        self.events = [replace(event, user_id=hide.of(event.user_id)) for event in events] if hide else events
        self.sent = 0

    def run(self, console: Console) -> None:
        """Send all events, with the table drawn beside; then wait until they are committed."""
        drawn = 0.0
        with Screen(self.table(), console=console, auto_refresh=False, transient=False) as screen:
            with ClickProducer(self.settings.connection, self.settings.topics) as producer:
                for click in replay(producer, self.events, self.rate, self.stop):
                    self.sent += 1
                    self.observer.user_id = click.user_id
                    if time.monotonic() - drawn > REDRAW_S:
                        drawn = time.monotonic()
                        screen.update(self.table(), refresh=True)
            deadline = time.monotonic() + DRAIN_S
            while num_committed(self.settings) < self.sent and time.monotonic() < deadline:
                screen.update(self.table(), refresh=True)
                if self.stop.wait(REDRAW_S):
                    return
            screen.update(self.table(), refresh=True)

    def table(self) -> Table:
        seen = self.observer
        p50, p99 = seen.latency_ms(newest=1000)
        served, popular, scored = seen.hit_rates()
        table = Table(title=self.title, show_header=False, min_width=64)
        table.add_row("events in / applied", f"{self.sent:,} / {seen.num_applied():,} of {len(self.events):,}")
        table.add_row("clicks a second", f"{seen.clicks_a_second(self.sent):,.0f}")
        table.add_row("click to recommendation p50 / p99", f"{p50:,.0f} / {p99:,.0f} ms")
        table.add_row("generation", f"{seen.num_generations()}  ({seen.generation})")
        table.add_row("live HR@10 / decayed popularity", f"{served:.3f} / {popular:.3f} of {scored:,}")
        asked = f"{seen.requests:,}, {seen.failed_requests}, {seen.empty_requests}"
        table.add_row("requests, failed, empty", asked)
        return table

    def judge(self, began: float, restarts: int) -> int:
        """Print the summary as the last line; what does not hold goes to stderr."""
        settings, seen = self.settings, self.observer
        states = raw_states(settings)
        (hr10, hr10_popularity, _), (p50, p99) = seen.hit_rates(), seen.latency_ms()
        summary = summarise(self.events[: self.sent], states, settings) | {
            "dead_letters": sum(end_offsets(settings.connection, settings.topics.dead_letters.name).values()),
            "generations": len(seen.generations),
            "swaps": seen.num_generations() - 1,
            "requests": seen.requests,
            "failed_requests": seen.failed_requests,
            "empty_requests": seen.empty_requests,
            "hr10": round(hr10, 4),
            "hr10_popularity": round(hr10_popularity, 4),
            "click_to_recommendation_ms": {"p50": round(p50, 1), "p99": round(p99, 1)},
            "broker": settings.kafka.bootstrap,
            "seconds": round(time.monotonic() - began, 1),
        }
        broken = failures(summary, len(self.events), states, restarts)
        for claim in broken:
            print(f"does not hold: {claim}", file=sys.stderr)
        print(json.dumps(summary), flush=True)
        return 1 if broken else 0
