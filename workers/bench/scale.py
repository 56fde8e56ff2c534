"""What a click costs as users, items, partitions and workers grow, and what a user and an item cost in memory.

Users: decode, fold and encode of clicks in this process over that many states. Items: search in batches of 64 in a
search process. Partitions and workers: the fold path on Kafka; workers share two cores here, so it is CPU time a click
that is compared, not wall time.
"""

import itertools
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil

from model.model import Model
from model.user_state import EMPTY, Applied, Fold, Limits, encode_state
from stream.datasets import Dataset
from stream.events import decode_click
from workers.bench import data
from workers.bench.harness import Options, alternate, cpu_s, cpu_seconds, medians, ratio, rss_mib
from workers.bench.stage import Keyed, clicks_per_cpu_s, stage
from workers.prequential import K
from workers.search import SearchProcess
from workers.states import Owned, PackedStates, Sent, States

LIMITS = Limits()
HELD = 5  # clicks of each user before the measured ones
TOGETHER = 1_000  # of these, before the states are set back: of a few users the histories would grow and grow
CLICKS_HELD = (5, 50, 200, 1_000)
KIB = 1024


def fold(states: States, clicks: Keyed, first: int) -> None:
    """Decode, fold and encode, a click at a time."""
    for offset, (_, raw) in enumerate(clicks, first):
        click = decode_click(raw)
        folding = Fold(states.get(click.user_id, EMPTY), LIMITS)
        folding.apply(Applied(click, 1.0, offset))
        states[click.user_id] = folding.state()


def with_users(count: int, options: Options, held: int = HELD) -> tuple[Callable[[], float], float]:
    """Clicks a CPU second over the states of `count` users with `held` clicks each, and bytes a user in the worker:
    of states, and of lists that have been sent.
    """
    ids = [f"item-{number:07d}" for number in range(50_000)]
    before, owned = psutil.Process().memory_info().rss, Owned(PackedStates(), cast(Any, None), {})
    for turn in range(held):
        for start in range(0, count, 10_000):
            batch = data.clicks(min(10_000, count - start), 0, 50_000, seed=turn, first_user=start)
            fold(owned.states, batch, turn * count + start)
    for number in range(count):
        at = number % (len(ids) - K)
        owned.sent[f"user-{number:07d}"] = Sent("g20260101T000000-000", 0, tuple(ids[at : at + K]))
    user_bytes = (psutil.Process().memory_info().rss - before) / count
    turns, part, records = itertools.count(held), min(count, TOGETHER), dict(owned.states._records)

    def run() -> float:
        turn, spent_s = next(turns), 0.0  # its clicks are new: a known event id is not folded
        clicks = data.clicks(options.scaled(20_000, 2_000), count, 50_000, seed=turn)
        for at in range(0, len(clicks), part):
            owned.states._records = dict(records)
            spent_s += cpu_seconds(partial(fold, owned.states, clicks[at : at + part], turn * 10_000_000 + at))
        return len(clicks) / spent_s

    return run, user_bytes


def record_bytes(count: int) -> float:
    """Of the state of a user with so many clicks, as it lies in the users topic and in every server."""
    states = PackedStates()
    fold(states, data.clicks(count, 1, 50_000), 0)
    return float(len(encode_state(states["user-0000000"])))


def with_items(stack: ExitStack, count: int, model: Model, dataset: Dataset) -> tuple[Callable[[], float], float]:
    """Queries a CPU second of a search process over `count` items, and its bytes an item."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="upwell-bench-"))) / "g"
    artifact, queries = data.generation(folder, data.Grown(model, count)), data.users_of(model, dataset, 64)
    search = stack.enter_context(SearchProcess(folder, artifact.manifest_sha256))

    def run() -> float:
        before = cpu_s(search.pid)
        for _ in range(50):
            search.search(queries, 20)
        return 50 * len(queries) / (cpu_s(search.pid) - before)

    run()
    return run, rss_mib(search.pid) * KIB * KIB / count


def work(options: Options) -> tuple[dict[str, float], dict[str, float | str]]:
    users = (1_000, 3_000) if options.quick else (1_000, 10_000, 100_000, 1_000_000)
    items = (500, 2_000) if options.quick else (10_000, 100_000)
    values: dict[str, float | str] = {f"record_bytes {count} clicks": record_bytes(count) for count in CLICKS_HELD}
    ratios: dict[str, float] = {}

    def compare(what: str, contenders: Mapping[int, Callable[[], float]], rounds: int) -> None:
        """Each against the smallest."""
        runs = alternate({str(size): contender for size, contender in contenders.items()}, rounds)
        first, *rest = runs
        values.update({f"per_cpu_s {what} {size}": figure for size, figure in medians(runs).items()})
        ratios.update({f"{what} {size} / {first}": ratio(runs, size, first) for size in rest})

    folding = {}
    for count in users:
        folding[count], values[f"bytes_a_user {count}"] = with_users(count, options)
    many = 3_000 if options.quick else 30_000
    values[f"bytes_a_user {many}, 50 clicks each"] = with_users(many, options, 50)[1]
    compare("clicks, users", folding, options.rounds)
    folding.clear()
    model, dataset = data.trained(500 if options.quick else 5_000)
    with ExitStack() as stack:
        searching = {}
        for count in items:
            searching[count], values[f"bytes_an_item {count}"] = with_items(stack, count, model, dataset)
        compare("queries, items", searching, options.rounds)
    clicks = data.clicks(options.scaled(100_000, 2_000), 100_000, 50_000)
    if options.quick:
        return ratios, values
    with stage() as set_up:
        split = {count: partial(clicks_per_cpu_s, set_up, clicks, partitions=count) for count in (1, 8, 64)}
        compare("clicks, partitions", split, options.rounds)
        shared = {count: partial(clicks_per_cpu_s, set_up, clicks, workers=count) for count in (1, 2, 4)}
        compare("clicks, workers", shared, options.rounds)
    return ratios, values
