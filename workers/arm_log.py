"""Which list a user had before each click: the recommendations and the clicks topic, joined."""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from stream.consumer import Record, end_offsets, read_window
from stream.events import BadEvent, Click, Erasure, Recommendations, decode, decode_record
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
