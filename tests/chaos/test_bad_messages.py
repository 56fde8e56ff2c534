"""Scenario 5: messages that can never be applied, among good ones."""

import random
import time
from pathlib import Path

from stream.connection import Connection
from stream.events import Artifact, Click, DeadLetter, encode
from stream.producer import Producer
from tests.chaos.harness import NOTHING_LOST, SEED, Fleet, holds, judge, make_clicks, report
from workers.dead_letters import read

# What is wrong with it -> the message, the cause that its dead letter names.
BAD: dict[str, tuple[bytes | None, str]] = {
    "bad JSON": (b'{"event_id": "x", "user', "truncated"),
    "wrong type": (b'{"event_id":"x","user_id":"u","item_id":7,"ts_ms":1}', "item_id"),
    "NaN": (b'{"event_id":"x","user_id":"u","item_id":"i","ts_ms":1,"value":NaN}', "malformed"),
    "1 MB": (b"x" * (1 << 20), "size"),
    "bad UTF-8": (b'{"event_id":"\xff\xfe","user_id":"u","item_id":"i","ts_ms":1}', "utf-8"),
    "null": (None, "null"),
    "far future": (b'{"event_id":"x","user_id":"u","item_id":"i","ts_ms":99999999999999}', "future"),
    "unknown version": (b'{"version":9,"event_id":"x","user_id":"u","item_id":"i","ts_ms":1}', "version"),
    "2,000 levels": (b'{"event_id":"x","user_id":"u","item_id":"i","ts_ms":1,"more":' + b"[" * 2000, "recursion"),
    "160 KB key": (b"y" * 700_000, "size"),
}
KEYS = {"160 KB key": b"u" * 160_000}


def names(letter: DeadLetter, raw: bytes | None, cause: str) -> bool:
    """Whether this is the dead letter of that message; of a large one the first part is kept."""
    whole = raw == letter.payload or (letter.truncated and (raw or b"").startswith(letter.payload or b"?"))
    return whole and cause in letter.cause.lower()


def test_bad_among_good(connection: Connection, generation: Artifact, tmp_path: Path, long: bool) -> None:
    bad, good = (1000, 99_000) if long else (80, 3920)
    draw, began = random.Random(SEED), time.monotonic()
    clicks = make_clicks(draw, good, users=good // 100)
    kinds = [*BAD] * (bad // len(BAD))
    mixed: list[Click | str] = [*clicks]
    for kind in kinds:
        mixed.insert(draw.randrange(len(mixed)), kind)
    with Fleet(connection, tmp_path, generation) as fleet:
        fleet.start("a")
        fleet.await_ready()
        producer = Producer(connection, max_in_flight=1000)
        for one in mixed:
            if isinstance(one, str):
                key, raw = KEYS.get(one, b"u"), BAD[one][0]
            else:
                key, raw = one.user_id.encode(), encode(one)
            producer.send_raw(fleet.settings.topics.clicks.name, key, raw)
        producer.close()
        fleet.drain(300)
        letters = [letter for _, letter in read(fleet.settings)]
        named = {kind: sum(names(letter, raw, cause) for letter in letters) for kind, (raw, cause) in BAD.items()}
        verdict = judge(fleet.settings, clicks) | {
            "bad": len(kinds),
            "with_cause": named,
            "places": len({(letter.partition, letter.offset) for letter in letters}),
            "restarts": len(fleet.exits),
        }
    report("bad_messages", long, began, verdict)
    assert holds(verdict, NOTHING_LOST | {"dead_letters": len(kinds), "places": len(kinds), "restarts": 0})
    assert set(named.values()) == {bad // len(BAD)}
