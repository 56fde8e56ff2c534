"""The API of the running service: what it takes, what it answers, what it streams, and that nothing makes it fall."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from litestar.response.sse import ServerSentEventMessage

from model.user_state import UserState
from stream.answers import Answer, AsOf
from stream.consumer import read_window
from stream.events import OFFSET_HEADER, Ranked, Recommendations, decode, decode_click, encode
from stream.producer import ClickProducer, partition_of
from tests.workers.service import ITEMS, PARTITIONS, Service, until
from workers import routes_stream
from workers.live import NotReady
from workers.routes_stream import Stream
from workers.service import Service as Answers
from workers.settings import Settings
from workers.updates import Made


class Events:
    """A reader of /v1/stream: (event, id, data), one after the other; ends with the stream."""

    def __init__(self, service: Service, user_id: str, last_id: str | None) -> None:
        self._connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=60)
        headers = {"Last-Event-ID": last_id} if last_id else {}
        self._connection.request("GET", f"/v1/stream?user={user_id}", headers=headers)
        self.answer = self._connection.getresponse()

    def __iter__(self) -> Iterator[tuple[str, str | None, Any]]:
        fields: dict[str, str] = {}
        while line := self.answer.readline():
            name, _, value = line.decode().rstrip("\r\n").partition(": ")
            if name and value:
                fields[name] = value
            elif not name and "event" in fields:
                yield fields["event"], fields.get("id"), json.loads(fields["data"])
                fields = {}

    def lists(self) -> Iterator[tuple[str | None, Any]]:
        return ((event_id, data) for event, event_id, data in self if event == "recommendations")

    def close(self) -> None:
        self._connection.close()


@contextmanager
def opened(service: Service, user_id: str, last_id: str | None = None) -> Iterator[Events]:
    events = Events(service, user_id, last_id)
    try:
        yield events
    finally:
        events.close()


def post(service: Service, *events: Any) -> Any:
    status, receipt = service.call("/v1/events", list(events))
    assert status == 202, receipt
    return receipt


def get(service: Service, path: str) -> Any:
    status, answer = service.call(path)
    assert status == 200, answer
    return answer


def test_good_entries_are_taken_and_bad_ones_named(service: Service) -> None:
    good = [{"user_id": f"mixed-{n}", "item_id": "i1", "event_id": f"mixed-{n}"} for n in range(5)]
    bad = [{"user_id": "u"}, 7, {"user_id": "u", "item_id": "i", "ts_ms": 10**14}, {"user_id": "", "item_id": "i"}]
    receipt = post(service, good[0], bad[0], good[1], bad[1], bad[2], *good[2:], bad[3])
    assert receipt["accepted"] == 5
    assert [one["index"] for one in receipt["rejected"]] == [1, 3, 4, 8]
    causes = [one["cause"] for one in receipt["rejected"]]
    for cause, word in zip(causes, ("item_id", "object", "future", "user_id"), strict=True):
        assert word in cause
    topic, connection = service.settings.topics.clicks.name, service.settings.connection
    lying = {(record.partition, record.offset): record.value for record in read_window(connection, topic)}
    assert [one["index"] for one in receipt["results"]] == [0, 2, 5, 6, 7]
    for one in receipt["results"]:
        click = decode_click(lying[one["partition"], one["offset"]])
        assert (click.event_id, one["partition"]) == (one["event_id"], partition_of(click.user_id, PARTITIONS))
    status, answer = service.call("/v1/events", bad)
    assert (status, len(answer["extra"]["rejected"])) == (400, 4)
    assert service.call("/v1/events", [])[0] == 400
    assert service.call("/v1/events", [good[0]] * 1001)[0] == 413
    status, receipt = service.call("/v1/items", [msgspec.to_builtins(ITEMS[0]), {"item_id": "x"}])
    assert (status, receipt["results"][0]["item_id"], receipt["rejected"][0]["index"]) == (202, "i0", 1)


def test_what_was_posted_can_be_waited_for(service: Service) -> None:
    """And what never comes makes the answer stale."""
    (result,) = post(service, {"user_id": "waiting", "item_id": "i1"})["results"]
    offset, answer = result["offset"], {}

    def fresh() -> bool:
        """A busy machine takes longer than serve.wait_s."""
        nonlocal answer
        answer = get(service, f"/v1/users/waiting/recommendations?min_offset={offset}")
        return not answer["stale"]

    until(fresh, "the click is folded")
    assert answer["as_of"] == {"partition": result["partition"], "offset": offset}
    assert "i1" not in [item["item_id"] for item in answer["items"]]
    assert (answer["source"], answer["fallback"]) == ("personal", None)
    assert 0 <= answer["age_ms"] < 600_000
    assert get(service, f"/v1/users/waiting/recommendations?min_offset={offset + 10**6}")["stale"]


def test_rules_reach_the_list(service: Service) -> None:
    base = "/v1/users/nobody/recommendations?k=100"
    shelf = ITEMS[3].categories[0].replace(" ", "%20")
    assert len(get(service, f"{base}&categories={shelf}")["items"]) == 20
    first, second = (item["item_id"] for item in get(service, base)["items"][:2])
    without = {item["item_id"] for item in get(service, f"{base}&exclude={first}&exclude={second}")["items"]}
    assert len(without) == 100 and not {first, second} & without
    assert get(service, f"{base}&max_age=60")["items"] == []
    post(service, {"user_id": "rules", "item_id": "i9", "event_type": "like"})
    until(lambda: get(service, "/v1/users/rules/recommendations")["source"] == "personal", "the click is folded")
    mine = "/v1/users/rules/recommendations?k=150"
    assert "i9" not in [item["item_id"] for item in get(service, mine)["items"]]
    assert "i9" in [item["item_id"] for item in get(service, f"{mine}&exclude_seen=false")["items"]]
    explored = get(service, f"{mine}&k=10&explore=0.5".replace("k=150&", ""))["items"]
    assert any(item["propensity"] < 1 for item in explored)
    reasons = [item["because"] for item in get(service, f"{mine}&explain=true")["items"]]
    assert any(because and because[0]["item_id"] == "i9" and because[0]["title"] for because in reasons)


def test_guests_leave_nothing_behind(service: Service) -> None:
    def ask(**body: Any) -> Any:
        status, answer = service.call("/v1/recommendations", body)
        assert status == 200, answer
        assert answer["user_id"] is answer["as_of"] is None
        return answer

    users = get(service, "/v1/figures")["events_total"]
    session = ask(history=[{"item_id": "i3"}, {"item_id": "i9", "event_type": "like"}], k=30, explain=True)
    assert session["source"] == "session" and session["fallback"] is None
    assert not {"i3", "i9"} & {item["item_id"] for item in session["items"]}
    assert any(item["because"] for item in session["items"])
    seeds = ask(items=["i3", "i9"], k=10)
    assert seeds["source"] == "session" and len(seeds["items"]) == 10
    chess = {"text": "a film about playing chess", "k": 8}
    until(lambda: service.call("/v1/recommendations", chess)[0] == 200, "the encoder is loaded")
    words = ask(**chess)
    assert words["source"] == "session"
    by_chess = sum("chess" in item["title"] for item in words["items"])
    by_nothing = sum("chess" in item["title"] for item in ask(k=8)["items"])
    assert by_chess >= 4 and by_chess > by_nothing
    assert ask()["fallback"] == "no history, item or text was given"
    assert "knows none" in ask(items=["nowhere"])["fallback"]
    assert service.call("/v1/recommendations", {"text": "x", "explain": True})[0] == 400
    assert get(service, "/v1/figures")["events_total"] == users


def test_head_is_get_without_its_body(service: Service) -> None:
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=10)
    for path, status in [("/livez", 200), ("/v1/items?limit=1", 200), ("/v1/items?limit=x", 400), ("/nowhere", 404)]:
        answers = []
        for method in ("GET", "HEAD"):
            connection.request(method, path)
            answer = connection.getresponse()
            answers.append((answer.status, answer.headers["Content-Type"], answer.headers["Content-Length"]))
            assert bool(answer.read()) == (method == "GET")
        assert answers[0] == answers[1] and answers[0][0] == status
    connection.request("HEAD", "/v1/stream?user=nobody")  # it would have no end
    assert connection.getresponse().status == 405
    connection.close()


def test_looking(service: Service) -> None:
    found = get(service, "/v1/items?q=CHESS,%20part%203&limit=5")["items"]
    assert [item["title"] for item in found] == ["chess, part 3"] and found[0]["available"]
    assert len(get(service, "/v1/items?limit=7")["items"]) == 7
    like = get(service, "/v1/items/i3/similar?k=12")
    assert len(like["items"]) == 12 and "i3" not in [item["item_id"] for item in like["items"]]
    assert service.call("/v1/items/nowhere/similar")[0] == 404
    post(service, {"user_id": "looked at", "item_id": "i4", "event_type": "dislike"})
    until(lambda: service.call("/v1/users/looked%20at")[0] == 200, "the state is known")
    state = get(service, "/v1/users/looked%20at")
    assert (state["clicks"], state["seen"], state["history"][0]["weight"]) == (1, 1, -1.5)
    assert state["history"][0]["title"] == ITEMS[4].title
    assert service.call("/v1/users/unheard-of")[0] == 404
    figures = get(service, "/v1/figures")
    assert figures["generation"]["items"] >= len(ITEMS) and figures["generation"]["swaps"] >= 1
    assert figures["click_to_recommendation_ms"]["p50"] <= figures["click_to_recommendation_ms"]["p99"]
    assert figures["events_total"] >= 1


def test_a_click_is_pushed_with_its_way(service: Service) -> None:
    with opened(service, "streamed") as events:
        assert events.answer.headers["Content-Type"].startswith("text/event-stream")
        assert events.answer.headers["X-Accel-Buffering"] == "no"
        everything = iter(events)
        event, _, status = next(everything)
        assert (event, status["connected"]) == ("status", True)
        event, _, first = next(everything)
        assert (event, first["path"], first["source"]) == ("recommendations", None, "popular")
        (result,) = post(service, {"user_id": "streamed", "item_id": first["items"][0]["item_id"]})["results"]
        last_id, pushed = next((i, data) for i, data in events.lists() if data["path"])
        path = pushed["path"]
        assert (path["event_id"], path["partition"], path["offset"]) == tuple(
            result[name] for name in ("event_id", "partition", "offset")
        )
        stamps = [path[f"{name}_ms"] for name in ("clicked", "updated", "sent", "published", "seen", "pushed")]
        assert stamps == sorted(stamps)
        topic, connection = service.settings.topics.recommendations.name, service.settings.connection
        lists = (record for record in read_window(connection, topic) if record.key == b"streamed")
        assert path["published_ms"] in [record.timestamp for record in lists]
        assert result["offset"] == pushed["as_of"]["offset"]
        assert first["items"][0]["item_id"] not in [item["item_id"] for item in pushed["items"]]
    with opened(service, "streamed", last_id) as events:
        post(service, {"user_id": "streamed", "item_id": "i50"})
        assert next(events.lists())[0] != last_id  # a swap in between makes another list of the same offset


async def data_of(events: AsyncIterator[ServerSentEventMessage]) -> Any:
    return json.loads(cast(bytes, (await anext(events)).data))


def list_at(offset: int) -> bytes:
    return encode(
        Recommendations(
            user_id="u", items=[Ranked("i", 1.0)], generation="g", source="personal", partition=0, offset=offset,
            event_id=f"e{offset}", clicked_ms=1, sent_ms=2,
        )
    )  # fmt: skip


async def test_a_slow_reader_gets_the_newest_list_and_holds_no_other() -> None:
    service = Answers(Settings())
    events = Stream(service, "u", None).events()
    await anext(events)
    assert (await anext(events)).event == "status"
    made = [decode(list_at(offset), Recommendations) for offset in range(100)]
    for one in [*made[1:], made[50]]:  # in the end, of a worker that has been overtaken
        service.updates._deliver(Made(one, 2, 3))
    (boxes,) = service.updates._boxes.values()
    assert [box.newest.answer.offset for box in boxes if box.newest] == [99]
    pushed = await anext(events)
    assert isinstance(pushed.data, bytes) and pushed.event == "recommendations"
    assert json.loads(pushed.data)["as_of"]["offset"] == 99
    service.updates._deliver(Made(made[0], 2, 3))  # older: read again after a restart of the worker
    waiting = asyncio.ensure_future(anext(events, None))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    service.updates.close()
    assert await waiting is None
    assert not service.updates._boxes


async def test_a_swap_takes_no_list_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's list comes some ms before the state that it was made from, in another topic."""
    monkeypatch.setattr(routes_stream, "BEHIND_S", 0.01)
    service, generation, at = Answers(Settings()), "g", 9

    def recommend(*_: Any) -> Answer:
        as_of = AsOf(0, at)
        return Answer(user_id="u", items=[], generation=generation, source="personal", as_of=as_of, age_ms=0)

    monkeypatch.setattr(service, "recommend", recommend)
    monkeypatch.setattr(type(service.updates), "generation", property(lambda _: generation))
    events = (event async for event in Stream(service, "u", None).events() if event.id)
    assert (await anext(events)).id == "g:0:9"
    service.updates._deliver(Made(decode(list_at(10), Recommendations), 2, 3))
    generation = "h"
    assert (await anext(events)).id == "g:0:10"
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    at = 10
    service.users.states["u"] = UserState(applied=1, offset=10)
    assert (await waiting).id == "h:0:10"
    service.updates.close()


async def test_a_stream_that_opened_too_early_gets_its_list_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the next click of the user alone would bring one."""
    service, ready = Answers(Settings()), False

    def recommend(user_id: str, _: Any) -> Answer:
        if not ready:
            raise NotReady("the users' states are being read")
        return Answer(user_id=user_id, items=[], generation="g", source="personal", fallback=None, as_of=None, age_ms=0)

    monkeypatch.setattr(service, "recommend", recommend)
    events = Stream(service, "u", None).events()
    await anext(events)
    assert (await anext(events)).event == "status"
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0.1)
    ready = True
    watch = asyncio.create_task(service.updates._tell_of_changes())
    assert (await waiting).event == "recommendations"
    watch.cancel()
    service.updates.close()


async def test_streams_that_all_want_their_list_take_one_thread_of_those_that_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At a swap requests waited behind the lists of a thousand streams."""
    service, running, most = Answers(Settings()), 0, 0

    def recommend(*_: Any) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1

    monkeypatch.setattr(service, "recommend", recommend)
    await asyncio.gather(*(Stream(service, "u", None)._own() for _ in range(8)))
    assert most == 1


async def test_a_quiet_stream_says_its_status_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """To EventSource a comment is silence, and a dead connection is, too."""
    monkeypatch.setattr(routes_stream, "HEARTBEAT_S", 0.01)
    events = Stream(Answers(Settings()), "u", None).events()
    await anext(events)
    assert [(await anext(events)).event for _ in range(3)] == ["status"] * 3


@pytest.mark.parametrize(("last_id", "sent"), [("g:3:7", False), ("g:3:6", True), ("f:3:7", True), (None, True)])
async def test_who_comes_back_gets_nothing_twice(last_id: str, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_stream, "HEARTBEAT_S", 0.01)
    service, at = Answers(Settings()), AsOf(3, 7)
    own = Answer(user_id="u", items=[], generation="g", source="personal", fallback=None, as_of=at, age_ms=0)
    monkeypatch.setattr(service, "recommend", lambda *_: own)
    events = Stream(service, "u", last_id).events()
    await anext(events)
    assert [(await anext(events)).event for _ in range(2)] == ["status", "recommendations" if sent else "status"]


async def test_an_erased_user_s_stream_forgets_at_once_and_shows_nothing_older() -> None:
    """No generation here: the list is empty, and says why."""
    service = Answers(Settings())
    updates, states = service.updates, service.users.states
    updates._loop = asyncio.get_running_loop()
    service.users.caught_up.set()
    events = Stream(service, "u", None).events()
    await anext(events)
    await anext(events)
    states["u"] = UserState(applied=1, offset=5)

    def read(*records: tuple[bytes | None, int]) -> None:
        for value, offset in records:
            headers = [] if value else [(OFFSET_HEADER, b"%d" % offset)]
            updates._take(SimpleNamespace(key=b"u", value=value, headers=headers, timestamp=2), 3)

    read((list_at(5), 5))
    assert (await data_of(events))["items"]
    read((list_at(6), 6), (None, 7))  # the null is read before the state's, with a list that nobody has got yet
    assert states["u"] == UserState(offset=7)
    erased = await data_of(events)
    assert (erased["items"], erased["source"], erased["fallback"]) == ([], "popular", "the user is erased")
    read((None, 7), (list_at(6), 6), (list_at(9), 9))  # again, of a worker that was overtaken, and of a click since
    after = await data_of(events)
    assert (after["as_of"]["offset"], bool(after["items"])) == (9, True)
    late = Stream(service, "u", None).events()  # opened after the wish: it has heard of none
    await anext(late)
    await anext(late)
    told = asyncio.ensure_future(data_of(late))
    read((list_at(6), 6))
    await asyncio.sleep(0.1)
    assert not told.done()
    read((list_at(8), 8))
    assert (await told)["as_of"]["offset"] == 8
    read((None, 7))
    waiting = asyncio.ensure_future(anext(events, None))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    updates.close()
    assert await waiting is None and await anext(late, None) is None


def test_an_erasure_empties_the_open_stream(service: Service) -> None:
    """The wish goes straight into Kafka: the server hears of it by the null alone."""
    with opened(service, "forgetful") as events:
        lists = events.lists()
        next(lists)
        post(service, {"user_id": "forgetful", "item_id": "i7"})
        assert next(data for _, data in lists if data["path"])["source"] == "personal"
        with ClickProducer(service.settings.connection, service.settings.topics) as producer:
            producer.erase("forgetful", time.time_ns() // 1_000_000)
        after = next(data for _, data in lists if data["source"] == "popular")
    assert (after["as_of"]["offset"], after["path"], len(after["items"])) == (-1, None, service.settings.worker.k)
    assert "i7" in [item["item_id"] for item in get(service, "/v1/users/forgetful/recommendations?k=200")["items"]]


def test_sigterm_ends_open_streams_at_once(service: Service) -> None:
    with opened(service, "u1") as one, opened(service, "u2") as two:
        next(one.lists()), next(two.lists())
        pid, began = service.roles.pids["serve"], time.monotonic()
        os.kill(pid, signal.SIGTERM)
        for events in (one, two):
            assert [event for event, _, _ in events if event != "status"] == []
        assert time.monotonic() - began < 5  # else uvicorn's patience ended them
    until(lambda: service.roles.pids["serve"] != pid, "the server is started again")
    assert "graceful shutdown exceeded" not in service.log("serve")


EXAMPLES = int(os.environ.get("API_EXAMPLES", "20"))


@pytest.mark.timeout(600 + 4 * EXAMPLES)
def test_no_case_that_the_schema_allows_or_forbids_makes_a_server_error(service: Service) -> None:
    """Some 1,300 cases; docs/operations.md has the command of the long form."""
    words = {"text": "rivers"}
    until(lambda: service.call("/v1/recommendations", words)[0] == 200, "the encoder is loaded: a 503 until then")
    command = [
        os.path.join(os.path.dirname(sys.executable), "schemathesis"), "run", f"{service.url}/schema/openapi.json",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--exclude-path", "/v1/stream", "--phases", "examples,coverage,fuzzing", "--max-examples", str(EXAMPLES),
        "--suppress-health-check", "all", "--generation-deterministic", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500 + 4 * EXAMPLES)
    print(done.stdout[-1500:])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
