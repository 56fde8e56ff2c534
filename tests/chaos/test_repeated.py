"""Scenario 10: every event sent three times, out of order."""

import random
import time
from pathlib import Path

import msgspec

from model.user_state import EMPTY, Applied, apply_clicks, decode_state, encode_state
from stream.connection import Connection
from stream.events import Artifact, Click
from stream.producer import ClickProducer
from tests.chaos.harness import SEED, Fleet, holds, judge, make_clicks, read_clicks, report
from workers.settings import Settings
from workers.states import limits_of, raw_states

WINDOW_S, RATE = 60, 20  # of the events' own clock: each copy comes up to a minute late


def fold_first_ones(settings: Settings) -> dict[str, bytes]:
    """States of the first copy of each event alone, moved to the offset of the user's last record."""
    clicks: dict[str, dict[str, Applied]] = {}
    last: dict[str, int] = {}
    for _, offset, click in read_clicks(settings):
        copy = Applied(click, settings.weight(click), offset)
        clicks.setdefault(click.user_id, {}).setdefault(click.event_id, copy)
        last[click.user_id] = offset
    states = {user: apply_clicks(EMPTY, own.values(), limits_of(settings)) for user, own in clicks.items()}
    return {user: encode_state(msgspec.structs.replace(state, offset=last[user])) for user, state in states.items()}


def test_three_times_each(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    draw, began = random.Random(SEED), time.monotonic()
    clicks = make_clicks(draw, 30_000 if long else 2000, users=300 if long else 20)
    copies: list[tuple[float, Click]] = [
        (number / RATE + draw.uniform(0, WINDOW_S), click) for number, click in enumerate(clicks) for _ in range(3)
    ]
    with Fleet(connection, tmp_path, generation) as fleet:
        for name in ("a", "b"):
            fleet.start(name)
        fleet.await_ready()
        with ClickProducer(connection, fleet.settings.topics, max_in_flight=1000) as producer:
            for _, click in sorted(copies, key=lambda copy: copy[0]):
                producer.send(click)
        fleet.drain()
        states, once = raw_states(fleet.settings), fold_first_ones(fleet.settings)
        verdict = judge(fleet.settings, clicks) | {
            "sent": len(copies),
            "users_not_as_if_once": sum(states.get(user) != once[user] for user in once),
            "ended_by_itself": fleet.unexpected(),
            "applied": sum(decode_state(raw).applied for raw in states.values()),
        }
    report("repeated", long, began, verdict)
    assert holds(verdict)
    assert holds(verdict, {"users_not_as_if_once": 0, "applied": len(clicks), "ended_by_itself": []})
