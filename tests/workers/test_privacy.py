"""What names a user, and where it may stand."""

import asyncio
import io
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import kafka
import msgspec
import pytest
import structlog
from httpx import ASGITransport, AsyncClient
from kafka.admin import ConfigResource
from litestar.testing import TestClient

from model.user_state import EMPTY, Entry, UserState, encode_state
from stream.answers import Erased
from stream.consumer import MissingTopic, read_window
from stream.events import OFFSET_HEADER, WIRE_TYPES, Click, DeadLetter, ItemVector, Ranked, Recommendations, encode
from stream.producer import ClickProducer, Producer, partition_of
from stream.topics import DAY_MS
from tests.workers.service import until
from tests.workers.test_limits import Still
from workers import metrics
from workers.arms import arm_of
from workers.bench.stage import write
from workers.dead_letters import describe, names_one
from workers.erasure import SLACK_MS, UnknownReceipt, ask, longest_ms, status, waiting_wishes
from workers.keys import OPEN
from workers.logs import configure
from workers.routes_stream import Stream
from workers.server import build_app
from workers.service import Service
from workers.settings import Arm, ConfigError, Privacy, Serve, Settings, load_settings
from workers.training_input import Window
from workers.updates import Made
from workers.user_states import At, UserStates


def test_no_wire_type_and_no_state_carries_a_user_s_vector() -> None:
    """Floats in a row, or bytes, on a topic: an item's vector, and the bytes of a dead letter."""

    def packed(kind: Any) -> bool:
        return isinstance(kind, msgspec.inspect.BytesType) or (
            isinstance(kind, msgspec.inspect.CollectionType)
            and isinstance(kind.item_type, msgspec.inspect.FloatType | msgspec.inspect.IntType)
        )

    def options(kind: Any) -> tuple[Any, ...]:
        return kind.types if isinstance(kind, msgspec.inspect.UnionType) else (kind,)

    found = set()
    for wire in (*WIRE_TYPES, UserState):
        struct = msgspec.inspect.type_info(wire)
        assert isinstance(struct, msgspec.inspect.StructType)
        found |= {(wire, field.name) for field in struct.fields if any(map(packed, options(field.type)))}
    assert found == {
        (ItemVector, "vector"), (DeadLetter, "key"), (DeadLetter, "payload"),
        (UserState, "seen"), (UserState, "event_ids"),  # digests of ids
    }  # fmt: skip


def test_a_trace_in_the_log_holds_no_locals(monkeypatch: pytest.MonkeyPatch) -> None:
    log, before = io.StringIO(), structlog.get_config()
    monkeypatch.setattr(sys, "stderr", log)
    configure("INFO", "worker")
    try:
        user_id = "someone"
        assert user_id
        raise RuntimeError("told")
    except RuntimeError as error:
        structlog.get_logger().error("unexpected", exc_info=error)
    finally:
        structlog.configure(**before)
        logging.getLogger().handlers.clear()
    line = json.loads(log.getvalue())
    assert "RuntimeError" in log.getvalue() and "someone" not in log.getvalue(), line


LETTER = DeadLetter(topic="clicks", partition=0, offset=1, cause="c", key=None, payload=None, ts_ms=0)


def test_a_list_of_dead_letters_says_nothing_to_the_terminal() -> None:
    """Whoever may write to Kafka could colour, rename or clear an operator's, or make a line look like another's."""
    shown = describe(
        3, msgspec.structs.replace(LETTER, cause="ü: \x1b[2J\r\n\u202e\x9b" + "y" * 10_000, payload=b"\x1b")
    )
    assert shown.isprintable() and shown.startswith("3  clicks[0]@1  ü: \\x1b[2J\\r\\n") and len(shown) < 300


@pytest.mark.parametrize(
    ("key", "payload", "named"),
    [
        (b"u1", None, True),
        (b"u10", b"u1 said", True),
        (b"u10", b"u10,u11,xu1,u1-2", False),
        (None, b'{"user_id":"u1","item_id":7}', True),
        (None, b'{"user_id":"u10","value":1}', False),
        (None, b'{"context":{"who":["u1"]}}', True),
        (None, b'{"user_id":"\\u00fc"}', True),
        (None, b'{"user_id":"u1","item', True),
        (None, b'{"user_id":"u10","item_id":"u1x", "value":1', False),
        (None, b"\xff u1", True),
        (None, b'{"user_id":42,"item_id":"i"}', True),
        (None, b'{"user_id":42.0,"item_id":"i"}', True),
        (None, b'{"user_id":421,"value":42,"version":42,"ts_ms":42.0}', False),
        (None, b'{"by_user":{"u1":{"item_id":"i"}}}', True),
        (None, b'{"context":{"user":42}}', True),
        (None, b"{'user_id': 'u1', 'item_id': 'i'}", True),
        (None, b'{"user_id":42,"item', True),
        (None, b"{'user_id': 'u10', 'value': 42, 'ts_ms':42", False),
        (None, b'{"user_id":"\\u00fc","item', True),
        (None, b'{"user_id":"\\u00FC","item', True),
        (None, b'{"context":{"context":"x"},"ts_ms":1}', False),
        (b"\xff", b"\xff\xfe", False),
    ],
)
def test_whose_a_dead_letter_is(key: bytes | None, payload: bytes | None, named: bool) -> None:
    assert names_one(msgspec.structs.replace(LETTER, key=key, payload=payload), {"u1", "ü", "42", "context"}) is named


def test_a_key_file_that_is_none_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content, cause in (("short", b"x", "1 bytes, at least 32"), ("none", None, "No such file")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        monkeypatch.setenv("UPWELL_PRIVACY__KEY_FILE", str(tmp_path / name))
        with pytest.raises(ConfigError, match=rf"privacy\.key_file.*{cause}"):
            load_settings()


@pytest.fixture
def click() -> Callable[[str, str], Click]:
    now_ms = time.time_ns() // 1_000_000
    return lambda event_id, user_id: Click(event_id=event_id, user_id=user_id, item_id="i", ts_ms=now_ms)


def test_the_trainer_s_window_leaves_out_what_was_before(
    settings: Settings, click: Callable[[str, str], Click]
) -> None:
    window = Window(settings)
    with ClickProducer(settings.connection, settings.topics) as producer:
        for event_id, user_id in (("e1", "u"), ("e2", "v")):
            producer.send(click(event_id, user_id))
        producer.erase("u", 0)
        producer.send(click("e3", "u"))
        producer.flush()
        assert {read.click.event_id for read in window.read()} == {"e2", "e3"}
        assert set(window.erased) == {"u"}
        producer.erase("v", 0)
        assert (window.read(), set(window.erased)) == ([], {"v"})
        producer.send(click("e4", "v"))
        producer.flush()
        assert [read.click.event_id for read in window.read()] == ["e4"] and not window.erased


def test_at_the_http_edge_an_id_becomes_a_pseudonym(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k" * 32)
    service = Still(settings.model_copy(update={"privacy": Privacy(key_file=tmp_path / "key")}))
    assert service.pseudonyms is not None
    hidden = service.pseudonyms.of("someone")
    with TestClient(build_app(service, OPEN), base_url="http://127.0.0.1") as api:
        assert api.post("/v1/events", json={"user_id": "someone", "item_id": "i"}).status_code == 202
        service.users.states[hidden] = UserState(applied=1, offset=0)
        for name in ("someone", hidden):
            assert (answer := api.get(f"/v1/users/{name}").json())["clicks"] == 1 and answer["user_id"] == name
        assert api.delete("/v1/users/someone").status_code == 202
        assert api.get("/v1/users/someone").status_code == 404
        assert "someone" not in api.get("/metrics").text
    service.producer.close()
    for topic in (settings.topics.clicks, settings.topics.recommendations):
        records = list(read_window(settings.connection, topic.name))
        assert {record.key for record in records} == {hidden.encode()}
        assert not any(b"someone" in (record.value or b"") for record in records)


async def test_behind_the_edge_a_user_is_read_by_the_pseudonym(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every list is a stranger's. No Kafka here: states, lists and the wish to be erased are laid down."""
    (tmp_path / "key").write_text("k" * 32)
    privacy, arms, serve = Privacy(key_file=tmp_path / "key"), {"half": Arm(share=0.5)}, Serve(wait_s=0.1)
    service = Still(Settings(privacy=privacy, arms=arms, serve=serve))
    settings, updates = service.settings, service.updates
    of, arm = service.stored_id, partial(arm_of, settings)
    user = next(name for name in map("someone{}".format, range(99)) if arm(name) != arm(of(name)))
    service.users.states[of(user)] = UserState((Entry("i1", 1.0, 1),), applied=1, offset=5)
    service.users.places[of(user)] = At(7, 1)
    service.users.caught_up.set()
    updates._loop, updates.connected = asyncio.get_running_loop(), True
    ranked = [Ranked("i", 1.0)]
    monkeypatch.setattr(service.live, "recommend", lambda *_: (SimpleNamespace(name="g", knows=bool), [ranked]))
    monkeypatch.setattr(Still, "producer", None)
    wish = Erased(receipt="7-9", partition=7, offset=9, requested_ms=1)
    monkeypatch.setattr("workers.service.ask", lambda *_: wish)
    events = Stream(service, user, None).events()

    async def pushed() -> Any:
        while (event := await anext(events)).event != "recommendations":
            pass
        return json.loads(cast(bytes, event.data))

    transport = ASGITransport(build_app(service, OPEN))  # type: ignore[arg-type]
    async with AsyncClient(transport=transport, base_url="http://localhost") as api, asyncio.timeout(30):
        for offset in (5, 6):
            listed = (await api.get(f"/v1/users/{user}/recommendations?min_offset={offset}")).json()
            assert (listed["source"], listed["user_id"], listed["arm"]) == ("personal", user, arm(of(user)))
            assert (listed["as_of"], listed["stale"]) == ({"partition": 7, "offset": 5}, offset == 6)
            assert listed["age_ms"] is not None
        assert (await api.get(f"/v1/users/{user}")).json()["arm"] == arm(of(user))
        assert (await pushed())["as_of"]["offset"] == 5
        made = Recommendations(
            user_id=of(user), items=ranked, generation="g", source="personal", partition=7, offset=6,
            event_id="e", clicked_ms=1, sent_ms=2,
        )  # fmt: skip
        updates._deliver(Made(made, 2, 3))
        update = await pushed()
        assert (update["user_id"], update["as_of"]["offset"]) == (user, 6)
        assert (await api.delete(f"/v1/users/{user}")).status_code == 202
        assert (await pushed())["source"] == "popular"
        assert (await api.get(f"/v1/users/{user}")).status_code == 404
    updates.close()
    await events.aclose()
    await service.stop()


async def test_a_server_forgets_before_any_worker_reads_the_wish(
    settings: Settings, click: Callable[[str, str], Click], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no worker here. What one that is behind still writes of the clicks before is passed over."""
    monkeypatch.setattr("workers.user_states.MARKED_S", 0.0)
    service, users = Service(settings), settings.topics.users.name

    async def until(true: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not true():
                await asyncio.sleep(0.02)

    def old(user_id: str) -> None:
        producer.send_raw(users, user_id.encode(), encode_state(UserState(applied=1, offset=0)))

    service.users.start()
    service.updates.start()
    with ClickProducer(settings.connection, settings.topics) as producer:
        try:
            for user_id in ("u", "v"):
                producer.send(click(user_id, user_id))
                old(user_id)
            await until(lambda: {"u", "v"} <= service.users.states.keys() and service.updates.connected)
            _, offset = await asyncio.to_thread(producer.erase, "u", 0)
            await until(lambda: service.users.of("u") is EMPTY)
            after = next(name for name in map("w{}".format, range(99)) if partition_of(name, 3) == partition_of("u", 3))
            for user_id in ("u", after):
                old(user_id)
            await until(lambda: service.users.of(after) is not EMPTY and metrics.pending_erasures._value.get() == 1)
            assert service.users.of("u") is EMPTY and service.users.of("v") is not EMPTY
            producer.send_raw(users, b"u", None, [(OFFSET_HEADER, b"%d" % offset)])  # the worker has got there
            await until(lambda: metrics.pending_erasures._value.get() == 0)
        finally:
            service.updates.stop()
            service.users.stop()


def test_a_receipt_says_where_the_erasure_stands(settings: Settings, click: Callable[[str, str], Click]) -> None:
    with ClickProducer(settings.connection, settings.topics) as producer:
        place = producer.send(click("e1", "u"))
        receipt = ask(producer, "u", lambda: longest_ms(settings))
    assert "u" not in receipt.receipt and not receipt.cleared
    found = status(settings, receipt.receipt)
    with TestClient(build_app(Still(settings), OPEN), base_url="http://127.0.0.1") as api:
        answer = api.get(f"/v1/erasures/{receipt.receipt}")
    assert (answer.status_code, answer.json()) == (200, msgspec.to_builtins(found))
    assert (found.cleared, found.gone, found.offset) == (False, False, receipt.offset)
    assert found.requested_ms and receipt.requested_ms and abs(found.requested_ms - receipt.requested_ms) < 60_000
    for one in (receipt, found):  # clicks live the longest: 30 days, and the span of a segment
        assert one.requested_ms and one.gone_by_ms == one.requested_ms + 31 * DAY_MS + SLACK_MS
    partition, offset = place.result()
    for unknown in (f"{partition}-{offset}", f"{partition}-{offset + 5}", "77-0", "x", "0-1-2", ""):
        with pytest.raises(UnknownReceipt):
            status(settings, unknown)


@pytest.mark.parametrize(
    ("topic", "setting"),
    [("clicks", {"retention.ms": "-1"}), ("users", {"max.compaction.lag.ms": str(2**63 - 1)})],
)
def test_a_receipt_promises_no_end_where_ids_are_kept_for_ever(
    settings: Settings, topic: str, setting: dict[str, str]
) -> None:
    with kafka.KafkaAdminClient(**settings.connection.kafka_python()) as admin:
        admin.alter_configs([ConfigResource("TOPIC", getattr(settings.topics, topic).name, setting)])
    until(lambda: longest_ms(settings) is None, "the broker says so")
    with ClickProducer(settings.connection, settings.topics) as producer:
        receipt = ask(producer, "u", lambda: longest_ms(settings))
    assert receipt.gone_by_ms is None and status(settings, receipt.receipt).gone_by_ms is None


def test_no_wish_is_sent_whose_receipt_cannot_be_made(settings: Settings) -> None:
    def denied() -> int:
        raise kafka.errors.TopicAuthorizationFailedError

    refused = pytest.raises(kafka.errors.TopicAuthorizationFailedError)
    with ClickProducer(settings.connection, settings.topics) as producer, refused:
        ask(producer, "u", denied)
    assert not any(read_window(settings.connection, settings.topics.clicks.name))


def test_a_server_that_starts_before_the_worker_gets_to_a_wish_knows_of_it(settings: Settings) -> None:
    """The null that makes servers forget went by before it listened."""
    topics, connection = settings.topics, settings.connection
    partition = partition_of("u", settings.kafka.partitions)
    with ClickProducer(connection, topics) as producer:
        for number in range(3):
            producer.send(Click(event_id=f"e{number}", user_id="u", item_id=f"i{number}", ts_ms=number))
        state = UserState(offset=2, applied=3, history=(Entry("i1", 1.0, 1),))
        asyncio.run(write(settings, [(topics.users.name, partition, [(b"u", encode_state(state))])]))
        producer.erase("u", time.time_ns() // 1_000_000)
    users = UserStates(settings)
    users.start()
    try:
        until(users.caught_up.is_set, "the states are read")
        assert users.of("u") is EMPTY and users.states["u"].offset == 3
    finally:
        users.stop()


def test_a_wish_is_seen_though_a_transaction_before_it_is_open(settings: Settings) -> None:
    """A shop's producer may send clicks in transactions, and leave one open for minutes."""
    connection, clicks = settings.connection, settings.topics.clicks.name
    partition = partition_of("u", settings.kafka.partitions)
    writer = kafka.KafkaProducer(**connection.kafka_python(), transactional_id=settings.topics.prefix)
    writer.init_transactions()
    writer.begin_transaction()
    try:
        writer.send(clicks, b"{}", partition=partition).get(timeout=30)
        with ClickProducer(connection, settings.topics) as producer:
            receipt = ask(producer, "u", lambda: None)
        assert status(settings, receipt.receipt).requested_ms
        assert list(waiting_wishes(settings)) == [("u", receipt.offset)]
    finally:
        writer.abort_transaction()
        writer.close()


def test_an_erasure_of_topics_that_may_not_be_described_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """kafka-python passes over the error of a topic whose settings this login may not see."""
    monkeypatch.setattr(Still, "erase", lambda *_: (_ for _ in ()).throw(MissingTopic("upwell.users")))
    with TestClient(build_app(Still(Settings()), OPEN), base_url="http://127.0.0.1") as api:
        answer = api.delete("/v1/users/u")
    assert answer.status_code == 503 and "upwell.users" in answer.json()["detail"]


def test_receipts_asked_for_while_kafka_is_away_hold_up_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits up to a minute and a half in its thread: not in one of those that answer, or that send events."""
    threads = []

    def unknown(_: Settings, receipt: str) -> None:
        threads.append(threading.current_thread().name)
        raise UnknownReceipt(receipt)

    monkeypatch.setattr("workers.routes_erasure.status", unknown)
    with TestClient(build_app(Still(Settings()), OPEN), base_url="http://127.0.0.1") as api:
        assert api.get("/v1/erasures/0-1").status_code == 404
    assert [name.partition("_")[0] for name in threads] == ["asking"]


def test_a_click_with_a_field_too_few_is_no_erasure(settings: Settings) -> None:
    producer = Producer(settings.connection)
    raw = encode(Click(event_id="e", user_id="u", item_id="i", ts_ms=1))[:-1] + b',"requested_ms":1}'
    for bad in (raw.replace(b'"item_id":"i",', b""), raw.replace(b'"event_type":"click",', b'"event_type":"erased",')):
        producer.send_raw(settings.topics.clicks.name, b"u", bad)
    producer.send_raw(settings.topics.clicks.name, b"x", b'{"event_type":"erase","user_id":"u","requested_ms":1}')
    producer.close()
    window = Window(settings)
    assert (window.read(), window.erased) == ([], {})
