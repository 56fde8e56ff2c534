"""Click due -> list read by a subscriber, open loop: at 50, 200 and 1,000 a second and at shares of the capacity.

The peer is the weekend script (workers/bench/weekend.py) at the same rates, in turn with ours. Capacity is the
greatest rate that the worker keeps up with; a burst would say more, for it makes one list of many clicks. Hops: due to
Kafka's stamp, stamp to the worker's send, send to the subscriber; the worker's own part of it by its hop metrics, and
its CPU time a click.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import msgspec
import numpy as np

from model.config import ModelConfig
from stream.events import Click
from workers.bench import data
from workers.bench.harness import Options, alternate
from workers.bench.probe import Seen, drive
from workers.bench.stage import announce, await_worker, said, stage, worker_metrics
from workers.settings import Settings

RATES, SHARES = (50, 200, 1000), (0.5, 0.7, 0.9)
USERS = 5_000
KEPT_UP_MS = 500
HOPS_AT = 200  # a second


class Clicks:
    """As many new clicks as are asked for: one sent twice would be dropped. `first`: where their numbers begin."""

    def __init__(self, first: int = 0) -> None:
        self._taken = first

    def take(self, count: int) -> list[Click]:
        self._taken += 1
        raws = data.clicks(count, USERS, 500, seed=self._taken)
        return [msgspec.json.decode(raw, type=Click) for _, raw in raws]


def percentiles(seen: Sequence[Seen]) -> dict[str, float]:
    """Milliseconds from due to read."""
    p50, p95, p99, most = np.percentile([one.read - one.due for one in seen], (50, 95, 99, 100))
    return {"p50": p50, "p95": p95, "p99": p99, "max": most}


def kept_up(seen: Sequence[Seen]) -> bool:
    """Whether no queue grew while these were sent: the last quarter of a queue that grows waits for seconds."""
    last = sorted(seen, key=lambda one: one.due)[-len(seen) // 4 :]
    return float(np.median([one.read - one.due for one in last])) < KEPT_UP_MS


def hops(seen: Sequence[Seen]) -> dict[str, float | str]:
    """Median milliseconds of each part of the way; the stamps are whole milliseconds."""
    steps = {
        "due to Kafka's stamp": [one.clicked - one.due for one in seen],
        "Kafka's stamp to send": [one.sent - one.clicked for one in seen],
        "send to subscriber": [one.read - one.sent for one in seen],
    }
    return {f"hop_ms {name}": float(np.median(took)) for name, took in steps.items()}


def inside(before: dict[str, float], after: dict[str, float]) -> dict[str, float | str]:
    """Mean milliseconds of a micro-batch in each of the worker's hops, its clicks, and CPU milliseconds a click."""
    gained = {name: value - before.get(name, 0.0) for name, value in after.items()}
    batches = gained["upwell_batch_clicks_count"]
    mean = {
        f"hop_ms in the worker, {hop}": 1000 * gained[f"upwell_hop_seconds_sum{{{hop}}}"] / batches
        for hop in ("fold", "recommend", "send")
    }
    clicks = gained["upwell_batch_clicks_sum"]
    cpu = {
        "cpu_ms a click": 1000 * gained["process_cpu_seconds_total"] / clicks,
        "clicks a micro-batch": clicks / batches,
    }
    return {**mean, **cpu}


class Table:
    """Runs at one rate after the other, ours and the peer's in turn."""

    def __init__(self, options: Options, sides: dict[str, Settings]) -> None:
        self._options, self._sides, self._clicks = options, sides, Clicks()
        self.ratios: dict[str, float] = {}
        self.values: dict[str, float | str] = {}

    def capacity(self) -> float:
        """The greatest of the rates 100, 141, 200, ... a second that ours keeps up with."""
        rate, seconds = 100.0, 0.5 if self._options.quick else 5
        while kept_up(drive(self._sides["ours"], self._clicks.take(int(seconds * rate)), rate)):
            rate *= 2**0.5
        self.values["capacity_per_s"] = rate / 2**0.5
        return rate / 2**0.5

    def measure(self, rate: float, name: str, sides: Sequence[str]) -> None:
        """Medians over the rounds of each percentile, and of the ratios between the sides."""
        count = self._options.scaled(max(500, int(10 * rate)), 50)
        rounds: dict[str, list[list[Seen]]] = {side: [] for side in sides}

        before = worker_metrics(self._sides["ours"])

        def once(side: str) -> float:
            rounds[side].append(drive(self._sides[side], self._clicks.take(count), rate))
            return percentiles(rounds[side][-1])["p50"]

        alternate({side: partial(once, side) for side in sides}, self._options.rounds)
        table = {side: [percentiles(seen) for seen in seens] for side, seens in rounds.items()}
        for side, lines in table.items():
            for share in lines[0]:
                self.values[f"{name} {side} {share}_ms"] = float(np.median([line[share] for line in lines]))
        for side in sides[1:]:
            for share in ("p50", "p99"):
                pairs = zip(table[sides[0]], table[side], strict=True)
                ratio = float(np.median([one[share] / other[share] for one, other in pairs]))
                self.ratios[f"{share} {sides[0]} / {side}, {name}"] = ratio
        if rate == HOPS_AT:
            self.values |= hops([one for seen in rounds["ours"] for one in seen])
            self.values |= inside(before, worker_metrics(self._sides["ours"]))


def work(options: Options) -> tuple[dict[str, float], dict[str, float | str]]:
    num_items = 500 if options.quick else 50_000
    config = data.SMALL if options.quick else ModelConfig()
    model = data.made_up_model(num_items, config, 200 if options.quick else 2_000)
    with stage() as set_up, ExitStack() as running:
        sides = {"ours": set_up.fresh(), "weekend": set_up.fresh()}
        announce(sides["ours"], data.items(num_items), data.generation(set_up.folder / "g1", model))
        running.enter_context(set_up.running(sides["ours"], "workers.cli", "worker"))
        weekend = ("workers.bench.weekend", str(num_items), str(config.text_dim))
        said(running.enter_context(set_up.running(sides["weekend"], *weekend)), "ready")
        await_worker(sides["ours"], serves=True)
        warm, table = Clicks(first=1000), Table(options, sides)
        for settings in sides.values():  # groups are joined, states read; the broker's JVM compiles for half a minute
            drive(settings, warm.take(options.scaled(4_000, 100)), HOPS_AT)
        for rate in RATES[1:2] if options.quick else RATES:
            table.measure(rate, f"{rate} a second", list(sides))
        most = table.capacity()
        for share in SHARES[:1] if options.quick else SHARES:
            table.measure(share * most, f"{share:.0%} of capacity", ["ours"])
    return table.ratios, table.values | {"items": float(num_items)}
