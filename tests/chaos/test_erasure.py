"""Users erased while clicks flow: out of the answers at once, and after a training window out of every store."""

import concurrent.futures
import itertools
import json
import random
import secrets
import signal
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import kafka
import numpy as np
from aiokafka.record import MemoryRecords
from kafka.admin import ConfigResource

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.consumer import read_window
from stream.events import Artifact, Click, DeadLetter, ItemVector, decode, encode
from stream.producer import ClickProducer
from stream.topics import Topics
from tests.chaos.harness import SEED, SHORT_SESSION_S, Fleet, Load, fold_topic, make_clicks, report
from tests.chaos.worker import OF_A_WISH, Trap, start
from tests.workers.service import ITEMS, until
from workers.dead_letters import MAX_LETTER_BYTES, read
from workers.erasure import status
from workers.server import run_server
from workers.settings import Settings
from workers.states import raw_states
from workers.trainer import run_trainer


def test_erased_users_are_gone_from_everything(
    broker: LocalBroker, connection: Connection, generation: Artifact, tmp_path: Path, long: bool
) -> None:
    """Half of them over HTTP, half straight into Kafka. The short form lets the window pass by shortening it."""
    users, window_s, rate = (1000, 180.0, 200) if long else (40, 4.0, 40)
    began, mark, bystander = time.monotonic(), f"gone{secrets.token_hex(4)}", f"stays{secrets.token_hex(4)}"
    doomed = [f"{mark}-{number}" for number in range(users)]
    clicks = make_clicks(random.Random(SEED), 100_000 if long else 12_000, users=200, name=bystander)
    with Fleet(connection, tmp_path, generation, window_days=window_s / 86_400 if long else 1.0) as fleet:
        settings = fleet.settings
        send_vectors(settings)
        others = [start(role, settings, tmp_path / f"{role.__name__}.log") for role in (run_server, run_trainer)]
        try:
            fleet.start("a")
            fleet.await_ready()
            until(lambda: _answers(settings, "/readyz"), "the server is ready")
            with Load(settings, clicks, rate) as load:
                time.sleep(2)
                send_pending(settings, doomed)
                until(lambda: len(read(settings)) >= 3, "dead letters")
                until(lambda: in_all_topics(stores_with(mark, settings, broker, tmp_path), settings), "seen everywhere")
                asked = time.monotonic()
                receipts = erase(settings, doomed)
                seconds_to_ask = time.monotonic() - asked
                until(lambda: all(_unknown(settings, user) for user in doomed[-20:]), "the last are gone from answers")
                seconds_to_answer = time.monotonic() - asked - seconds_to_ask
                newest = {number.split("-")[0]: number for number in receipts}
                until(lambda: all(status(settings, one).cleared for one in newest.values()), "cleared")
                known = [user for user in doomed if not _unknown(settings, user)]
                untold = set(doomed) - set(tombstoned_lists(settings))
                letters = [letter for _, letter in read(settings) if mark.encode() in said(encode(letter))]
                others_before = {user for user in raw_states(settings) if user.startswith(bystander)}
                until(lambda: any(Path(settings.store).glob("*/*")), "the trainer has made a model of the window")
                if not long:
                    let_pass(settings, window_s)
                until(lambda: not stores_with(mark, settings, broker, tmp_path), "gone from every store", window_s + 60)
                seconds_to_gone = time.monotonic() - asked
                gone = [status(settings, one).gone for one in newest.values()]
                load.stop()
            intact = stores_with(bystander, settings, broker, tmp_path)
            num_models = len(list(Path(settings.store).glob("*/*")))
        finally:
            for process in others:
                process.kill()
                process.join()
        kept = raw_states(settings)
    verdict = {"erased": users, "seconds_to_ask": seconds_to_ask, "seconds_to_answer": seconds_to_answer,
               "seconds_to_gone": seconds_to_gone, "models": num_models, "bystanders": len(kept)}  # fmt: skip
    report("erasure", long, began, verdict)
    assert (known, untold, letters) == ([], set(), [])
    assert all(gone)
    assert others_before and others_before <= kept.keys() and intact
    assert not long or seconds_to_answer < 10


def test_killed_in_an_erasure(connection: Connection, generation: Artifact, tmp_path: Path) -> None:
    """By a worker that dies half-way, and by its successor, who dies later, nothing of the user is left over."""
    with Fleet(connection, tmp_path, generation, partitions=1, session_s=SHORT_SESSION_S) as fleet:
        settings = fleet.settings
        fleet.start("a", [Trap(point, 1) for point in OF_A_WISH])
        fleet.await_ready()
        with ClickProducer(connection, settings.topics) as producer:
            for click in make_clicks(random.Random(SEED), 200, users=10):
                producer.send(click)
            producer.send_raw(settings.topics.clicks.name, b"u1", b"not json")
            producer.erase("u1", time.time_ns() // 1_000_000)
        until(lambda: len(fleet.exits) == len(OF_A_WISH), "killed at each point")
        fleet.drain()
        verdict = {
            "exits": fleet.exits,
            "letters": len(read(settings)),
            "lists": tombstoned_lists(settings),
            "states_exact": raw_states(settings) == fold_topic(settings),
        }
    wanted = {"letters": 0, "lists": ["u1"], "states_exact": True, "exits": [("a", -signal.SIGKILL)] * len(OF_A_WISH)}
    assert verdict == wanted


def send_vectors(settings: Settings) -> None:
    """Text vectors, so that the trainer can train without an indexer."""
    draw = np.random.default_rng(0)
    with ClickProducer(settings.connection, settings.topics) as producer:
        for item in ITEMS:
            vector = draw.normal(size=16).astype("<f2").tobytes()
            event = ItemVector(item_id=item.item_id, encoder="e", text_hash="", vector=vector)
            producer.send_raw(settings.topics.vectors.name, item.item_id.encode(), encode(event))


def send_pending(settings: Settings, doomed: list[str]) -> None:
    """Ten clicks of each, and messages that nobody can read: keyed by one, saying one in JSON, and in no JSON."""
    now_ms = time.time_ns() // 1_000_000
    topic = settings.topics.clicks.name
    with ClickProducer(settings.connection, settings.topics) as producer:
        for number, user in itertools.product(range(10), doomed):
            item = ITEMS[(number + hash(user)) % len(ITEMS)].item_id
            producer.send(Click(event_id=f"{user}-e{number}", user_id=user, item_id=item, ts_ms=now_ms))
        producer.send_raw(topic, doomed[0].encode(), b"not json")
        producer.send_raw(topic, b"x", json.dumps({"user_id": doomed[1]}).encode())
        producer.send_raw(topic, b"x", f"event,{doomed[2]},i1".encode())


def erase(settings: Settings, doomed: list[str]) -> list[str]:
    """The receipts, in the order of the wishes."""

    def over_http(user: str) -> str:
        url = f"http://127.0.0.1:{settings.serve.port}/v1/users/{user}"
        with urllib.request.urlopen(urllib.request.Request(url, method="DELETE"), timeout=60) as answer:
            receipt = str(json.load(answer)["receipt"])
        assert _unknown(settings, user), "this server knows the user after its 202"
        return receipt

    half = len(doomed) // 2
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        receipts = list(pool.map(over_http, doomed[:half]))
    with ClickProducer(settings.connection, settings.topics) as producer:
        receipts += ["{}-{}".format(*producer.erase(user, time.time_ns() // 1_000_000)) for user in doomed[half:]]
    return sorted(receipts, key=lambda receipt: int(receipt.split("-")[1]))


def let_pass(settings: Settings, window_s: float) -> None:
    """What Kafka does in a training window, in a shorter one."""
    short = Topics(settings.kafka.prefix, settings.kafka.partitions, window_s / 86_400)
    with kafka.KafkaAdminClient(**settings.connection.kafka_python()) as admin:
        for topic in (short.clicks, short.users, short.recommendations, short.dead_letters):
            admin.alter_configs([ConfigResource("TOPIC", topic.name, configs=topic.config())])


def tombstoned_lists(settings: Settings) -> list[str]:
    """Users whose newest record in the recommendations topic is a null, after that of the wish the worker's."""
    newest, nulls = dict[str, Any](), Counter[str]()
    for record in read_window(settings.connection, settings.topics.recommendations.name):
        user = (record.key or b"").decode()
        newest[user] = record.value
        nulls[user] += record.value is None
    return [user for user, value in newest.items() if value is None and nulls[user] > 1]


def in_all_topics(places: list[str], settings: Settings) -> bool:
    """Whether what an erasure clears is among them: four topics, as they are read and as they are on disk."""
    topics = settings.topics
    cleared = (topics.clicks, topics.users, topics.recommendations, topics.dead_letters)
    marks = [mark for topic in cleared for mark in (f"{topic.name}[", f"/{topic.name}-")]
    return all(any(mark in place for place in places) for mark in marks)


def stores_with(mark: str, settings: Settings, broker: LocalBroker, folder: Path) -> list[str]:
    """Every place that holds the mark: records of all topics, files, what the processes say of themselves."""
    needle, found = mark.encode(), list[str]()
    for name in (topic.name for topic in settings.topics.all()):
        for record in read_window(settings.connection, name):
            if needle in content(record, name):
                found.append(f"{name}[{record.partition}]@{record.offset}")
    logs = broker.folder / "log"
    kept = itertools.chain(logs.glob(f"{settings.kafka.prefix}.*/*.log"), logs.glob("__*/*.log"))  # as they are on disk
    for path in itertools.chain(kept, broker.folder.glob("*.log"), folder.rglob("*")):
        try:
            if path.is_file() and needle in (segment(path) if logs in path.parents else path.read_bytes()):
                found.append(str(path))
        except FileNotFoundError:
            continue  # deleted meanwhile
    return found + ["/metrics"] * (mark in _get(settings.serve.port, "/metrics"))


def segment(path: Path) -> bytes:
    """What the records of a partition's file say, unpacked; of transactions that were aborted, too."""
    batches, found = MemoryRecords(path.read_bytes()), list[bytes]()
    while (batch := batches.next_batch()) is not None:
        found += [content(record, path.parent.name.rpartition("-")[0]) for record in batch]
    return b"\n".join(found)


def content(record: Any, topic: str) -> bytes:
    letter = said(record.value) if record.value and topic.endswith("dead-letters") else b""
    return b"".join([record.key or b"", record.value or b"", *(value for _, value in record.headers), letter])


def said(raw: bytes) -> bytes:
    """A dead letter's key and payload, which travel as base64."""
    letter = decode(raw, DeadLetter, MAX_LETTER_BYTES)
    return (letter.key or b"") + (letter.payload or b"")


def _get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
        return str(answer.read().decode())


def _answers(settings: Settings, path: str) -> bool:
    try:
        return bool(_get(settings.serve.port, path))
    except OSError:
        return False


def _unknown(settings: Settings, user: str) -> bool:
    """The server answers as for someone it has never heard of."""
    answer = json.loads(_get(settings.serve.port, f"/v1/users/{user}/recommendations"))
    return bool(answer["source"] == "popular" and answer["as_of"]["offset"] == -1)
