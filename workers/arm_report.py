"""Which list a user had before each click (the recommendations and the clicks topic, joined), and the hit rates of the
arms that this makes, measured and estimated, as lines of text."""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from model.off_policy import Estimate, hit_rate, ips, snips
from stream.consumer import Record, end_offsets, read_window
from stream.events import BadEvent, Click, Erasure, Recommendations, decode, decode_record
from workers.arms import all_arms
from workers.settings import Settings


class Scored(NamedTuple):
    """A click on an item that its user had not clicked before, held against the list before it."""

    arm: str
    user_id: str
    hit: bool  # the item stood in the list as it was sent, all of its places
    ratios: Mapping[str, float]  # other arm -> chance of the item in its list over that in this one, where hit
    sizes: Mapping[str, float]  # other arm -> mean of this over the list; empty for an arm that does not explore


def read_scored(settings: Settings, since_ms: int) -> Iterator[Scored]:
    """Partition by partition: a user's clicks and lists are in the same one. A bad message is passed over."""
    topics = settings.topics
    for partition in sorted(end_offsets(settings.connection, topics.clicks.name)):
        clicks, lists = (
            read_window(settings.connection, topic.name, since_ms, only=[partition])
            for topic in (topics.clicks, topics.recommendations)
        )
        yield from score(settings, clicks, lists)


def score(settings: Settings, clicks: Iterable[Record], lists: Iterable[Record]) -> Iterator[Scored]:
    """Of one partition, each in its order. By Kafka's stamps: what stands in the topic before the click is seen."""
    latest: dict[str, Recommendations] = {}
    clicked: dict[str, set[str]] = defaultdict(set)
    recommendations = settings.topics.recommendations.name
    for record in heapq.merge(clicks, lists, key=lambda record: record.timestamp):  # on a tie the click comes first
        try:
            if record.topic == recommendations:
                answer = decode(record.value, Recommendations)
                latest[answer.user_id] = answer
                continue
            event = decode_record(record.value, record.key, record.timestamp)
        except BadEvent:
            continue
        if isinstance(event, Erasure):
            latest.pop(event.user_id, None)
            clicked.pop(event.user_id, None)
            continue
        before = latest.get(event.user_id)
        new = event.item_id not in clicked[event.user_id]
        clicked[event.user_id].add(event.item_id)
        if new and before is not None and before.offset < record.offset and settings.weight(event) > 0:
            yield _scored(event, before)


def _scored(click: Click, before: Recommendations) -> Scored:
    ratios = {place.item_id: {arm: p / place.propensity for arm, p in place.under.items()} for place in before.items}
    arms = before.items[0].under if before.items else {}
    sizes = {arm: sum(found[arm] for found in ratios.values()) / len(ratios) for arm in arms}
    hit = click.item_id in ratios
    return Scored(before.arm, click.user_id, hit, ratios.get(click.item_id, {}), sizes)


def lines(settings: Settings, since_ms: int) -> Iterator[str]:
    """The report on what the topics hold since then, by Kafka's clock."""
    return table(read_scored(settings, since_ms), all_arms(settings))


def table(scored: Iterable[Scored], configured: Iterable[str]) -> Iterator[str]:
    """One line an arm, those configured and those found; below it, from its lists if it explores, one an other arm."""
    found: dict[str, list[Scored]] = defaultdict(list)
    for click in scored:
        found[click.arm].append(click)
    yield f"{'arm':20} {'clicks':>8} {'users':>7}  hit rate (95 % interval over users)"
    for arm in sorted({*found, *configured}):
        clicks = found.get(arm, [])
        if not clicks:
            yield f"{arm:20} {0:8} {0:7}  -"
            continue
        hits = np.array([click.hit for click in clicks], np.float64)
        _, users = np.unique([click.user_id for click in clicks], return_inverse=True)
        yield f"{arm:20} {len(clicks):8} {users.max() + 1:7}  {_said(hit_rate(hits, users))}"
        yield from _others(clicks, hits, users)


def _others(clicks: Sequence[Scored], hits: np.ndarray, users: np.ndarray) -> Iterator[str]:
    for other in sorted({name for click in clicks for name in click.sizes}):
        logged = np.array([other in click.sizes for click in clicks])
        ratios = np.array([click.ratios.get(other, 0.0) for click in clicks])[logged]
        sizes = np.array([click.sizes.get(other, 0.0) for click in clicks])[logged]
        estimates = ips(hits[logged], ratios, users[logged]), snips(hits[logged], ratios, sizes, users[logged])
        yield f"  {other + ', estimated':35}    IPS {_said(estimates[0])}   SNIPS {_said(estimates[1])}"


def _said(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
