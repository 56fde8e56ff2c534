"""What `upwell demo --check` claims. The claims on state are shown from topics and file, not from the service."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from model.user_state import EMPTY, Applied, apply_clicks, decode_state, digest, encode_state, split
from stream.events import Click
from stream.producer import partition_of
from workers.settings import Settings
from workers.states import limits_of


def fold_offline(events: Sequence[Click], settings: Settings) -> dict[str, bytes]:
    """The users' states that these events must lead to, sent once each in this order to empty topics."""
    offsets: Counter[int] = Counter()
    clicks: dict[str, list[Applied]] = defaultdict(list)
    for click in events:
        partition = partition_of(click.user_id, settings.kafka.partitions)
        clicks[click.user_id].append(Applied(click, settings.weight(click), offsets[partition]))
        offsets[partition] += 1
    limits = limits_of(settings)
    return {user_id: encode_state(apply_clicks(EMPTY, own, limits)) for user_id, own in clicks.items()}


def count_applied(events: Sequence[Click], states: Mapping[str, bytes]) -> int:
    """Events whose id stands exactly once in their user's state; raises nothing: what is missing is not counted."""
    ids = {user_id: Counter(split(decode_state(raw).event_ids)) for user_id, raw in states.items()}
    return sum(ids.get(click.user_id, Counter())[digest(click.event_id)] == 1 for click in events)


def summarise(events: Sequence[Click], states: Mapping[str, bytes], settings: Settings) -> dict[str, Any]:
    """What the final states say of the events sent."""
    return {
        "events": len(events),
        "applied": count_applied(events, states),
        "state_identical": states == fold_offline(events, settings),
    }


def failures(summary: Mapping[str, Any], wanted: int, states: Mapping[str, bytes], restarts: int) -> list[str]:
    """What of the promises does not hold; empty when all do. `restarts`: of roles that had ended by themselves."""
    applied = sum(decode_state(raw).applied for raw in states.values())
    claims = {
        f"{wanted} events were to be sent": summary["events"] == wanted,
        "every event's id stands once in the final state": summary["applied"] == summary["events"],
        f"the states count {applied} applied clicks": applied == summary["events"],
        "no dead letters": summary["dead_letters"] == 0,
        "at least 3 generations served": summary["generations"] >= 3,
        "at least 2 swaps under load": summary["swaps"] >= 2,
        f"no role fell: {restarts} restarts": restarts == 0,
        f"asked once a second or more: {summary['requests']} requests": summary["requests"] >= summary["seconds"],
        "no failed request": summary["failed_requests"] == 0,
        "no empty answer": summary["empty_requests"] == 0,
        "live HR@10 at least twice decayed popularity's": summary["hr10"] >= 2 * summary["hr10_popularity"] > 0,
        "final state identical to the offline fold": summary["state_identical"],
    }
    return [claim for claim, holds in claims.items() if not holds]
