"""Scenario 9: a worker that starts on a users topic full of states."""

import asyncio
import random
import time
from pathlib import Path

import msgspec

from model.user_state import Applied, Fold, Limits, UserState, apply_clicks, encode_state
from stream.connection import Connection
from stream.events import Artifact, Click
from stream.producer import ClickProducer, partition_of
from tests.chaos.harness import SEED, Fleet, holds, make_clicks, read_clicks, report
from tests.chaos.test_zombie import force_compaction, kept
from tests.chaos.worker import warm_up
from tests.workers.service import until
from workers.sender import BatchSender
from workers.settings import Settings
from workers.states import raw_states

PARTITIONS, EMPTY_PARTITION = 4, 3
VERSIONS = 3  # of each state: the older ones are there to be compacted


def user_ids(count: int) -> list[str]:
    """Users of all partitions but one."""
    numbers = (f"u{number}" for number in range(10 * count))
    found = [user for user in numbers if partition_of(user, PARTITIONS) != EMPTY_PARTITION]
    return found[:count]


def grown(draw: random.Random, users: list[str]) -> dict[str, UserState]:
    """A state of 5 to 60 clicks a user. Offset -1: of clicks that are no longer in the topic."""
    pool = make_clicks(draw, 5000, users=1)
    states = {}
    for user in users:
        clicks = draw.sample(pool, draw.randint(5, 60))
        state = apply_clicks(UserState(), (Applied(click, 1.0, at) for at, click in enumerate(clicks)), Limits())
        states[user] = msgspec.structs.replace(state, offset=-1)
    return states


async def store(settings: Settings, states: dict[str, UserState]) -> None:
    """In transactions of 500 users, as a worker writes them: the log ends with the last one's marker."""
    for partition in range(PARTITIONS):
        own = [user for user in states if partition_of(user, PARTITIONS) == partition]
        sender = BatchSender(settings.connection, transactional_id=f"{settings.topics.users.name}-{partition}")
        await sender.start()
        for at in range(0, len(own), 500):
            await sender.begin()
            records = [(user.encode(), encode_state(states[user])) for user in own[at : at + 500]]
            await sender.send(settings.topics.users.name, partition, records)
            await sender.commit()
        await sender.stop()


def older(states: dict[str, UserState]) -> dict[str, UserState]:
    return {user: msgspec.structs.replace(state, applied=1) for user, state in states.items()}


def test_states_are_restored(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    """One click of each thousandth user, one of a new user in the empty partition: each state is the old one and it."""
    draw, began = random.Random(SEED), time.monotonic()
    states = grown(draw, user_ids(100_000 if long else 3000))
    newcomer = next(f"n{n}" for n in range(100) if partition_of(f"n{n}", PARTITIONS) == EMPTY_PARTITION)
    clickers = [*draw.sample(sorted(states), len(states) // 30), newcomer]
    clicks = [
        msgspec.structs.replace(click, user_id=user)
        for user, click in zip(clickers, make_clicks(draw, len(clickers), users=1, name="new-"), strict=True)
    ]
    with Fleet(connection, tmp_path, generation, partitions=PARTITIONS) as fleet:
        force_compaction(fleet.settings)
        few = dict(list(states.items())[:300])
        for version in [*[older(states)] * (VERSIONS - 1), states, few]:
            time.sleep(1.5)  # past segment.ms: the next append closes the segment, and only closed ones are compacted
            asyncio.run(store(fleet.settings, version))
        until(lambda: kept(fleet.settings) < 0.6, "older versions are compacted away", 120)
        share = kept(fleet.settings)
        with ClickProducer(connection, fleet.settings.topics) as producer:
            for click in clicks:
                producer.send(click)
        warm_up()
        started = time.monotonic()
        fleet.start("a")
        fleet.drain(120)
        seconds = time.monotonic() - started
        raw, offsets = raw_states(fleet.settings), {c.event_id: offset for _, offset, c in read_clicks(fleet.settings)}
        wanted = expected(states, clicks, offsets)
        restored = [
            line for line in map(msgspec.json.decode, fleet.json_log("a")) if line["event"] == "states restored"
        ]
        verdict = {
            "users": len(states),
            "megabytes": round(sum(len(encode_state(state)) for state in states.values()) / 1e6, 1),
            "clicks": len(clicks),
            "users_not_identical": sum(raw.get(user) != value for user, value in wanted.items()),
            "users_too_many": len(raw.keys() - states.keys() - {newcomer}),
            "restored_users": sum(line["users"] for line in restored),
            "restore_s": max((line["seconds"] for line in restored), default=0.0),  # all beside one another
            "start_to_committed_s": round(seconds, 1),
            "records_kept_share": share,
        }
    report("recovery", long, began, verdict)
    assert holds(verdict, {"users_not_identical": 0, "users_too_many": 0, "restored_users": len(states)})
    assert seconds < 60


def expected(states: dict[str, UserState], clicks: list[Click], offsets: dict[str, int]) -> dict[str, bytes]:
    """The restored states with their click, at its offset in the topic, by event id."""
    after = dict(states)
    for click in clicks:
        fold = Fold(states.get(click.user_id, UserState()), Limits())
        fold.apply(Applied(click, Settings().weight(click), offsets[click.event_id]))
        after[click.user_id] = fold.state()
    return {user: encode_state(state) for user, state in after.items()}
