"""The Python client against the fake: typed answers, patience, refusals, updates that outlive a lost stream."""

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import msgspec
import pytest
from litestar.testing import TestClient

from stream.answers import EventIn, Guest, Status, Update
from stream.client import ApiError, Client, Unavailable, _events, _requests
from stream.ports import free_port
from tests.workers.console_fake import Fake, fake_api
from tests.workers.test_limits import Still
from workers.keys import OPEN
from workers.server import build_app
from workers.settings import Settings


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    with fake_api() as running:
        yield running


def test_answers_are_typed(fake: tuple[Fake, str]) -> None:
    with Client(fake[1]) as client:
        assert client.recommendations("a/b ü", k=3).source == "popular"
        sent = client.send(EventIn(user_id="a/b ü", item_id="i3"), EventIn(user_id="a/b ü", item_id="nowhere"))
        assert (sent.accepted, [one.index for one in sent.rejected]) == (1, [1])
        answer = client.recommendations("a/b ü", k=3, explain=True)
        assert (answer.source, len(answer.items), answer.as_of) == ("personal", 3, client.user("a/b ü").as_of)
        assert answer.items[0].because[0].title == client.user("a/b ü").history[0].title
        assert client.items("CHESS", limit=1)[0].categories == ["chess"]
        assert client.similar("i3", k=2, diversity=0.5).item_id == "i3"
        assert client.recommend(Guest(k=2, text="knights")).user_id is None
        assert client.remove_item("i/7").item_id == "i/7"
        assert client.erasure(client.forget("a/b ü").receipt).partition == 3
        assert client.user("a/b ü").clicks == 0


def test_many_clicks_go_in_requests_that_the_server_takes(fake: tuple[Fake, str]) -> None:
    api, url = fake
    clicks = [EventIn(user_id="u", item_id="nowhere" if n == 2100 else "i1", event_id=f"e{n}") for n in range(2300)]
    with Client(url) as client:
        receipt = client.send(*clicks)
        assert client.send().accepted == 0
    assert api.requests == 3
    assert (receipt.accepted, [one.index for one in receipt.rejected]) == (2299, [2100])
    assert [one.index for one in receipt.results] == [n for n in range(2300) if n != 2100]
    bodies = list(_requests([EventIn(user_id="u", item_id="i", context={"page": "x" * 50_000})] * 30))
    assert [first for first, _ in bodies] == [0, 19] and all(len(body) < 2**20 for _, body in bodies)


def test_a_busy_service_is_asked_again_and_a_click_counts_once(fake: tuple[Fake, str]) -> None:
    api, url = fake
    api.set(refusals=2)
    with Client(url) as client:
        assert client.send(EventIn(user_id="u", item_id="i1")).accepted == 1
    assert api.requests == 3
    assert len(api.attempts - {None}) == 1  # event ids in the three


def test_patience_ends(fake: tuple[Fake, str]) -> None:
    fake[0].set(refusals=99)
    with Client(fake[1], patience_s=0.5) as client, pytest.raises(Unavailable, match="Kafka did not take") as said:
        client.send(EventIn(user_id="u", item_id="i1"))
    assert said.value.status == 503
    with Client(f"http://127.0.0.1:{free_port()}", patience_s=0.5) as client, pytest.raises(Unavailable) as said:
        client.items()
    assert said.value.status == 0


def test_a_refusal_is_not_tried_again(fake: tuple[Fake, str]) -> None:
    api, url = fake
    api.set(key="secret")
    with Client(url, "wrong") as client:
        with pytest.raises(ApiError, match="missing or unknown") as said:
            client.send(EventIn(user_id="u", item_id="i1"))
        with pytest.raises(ApiError, match="missing or unknown"):
            next(client.updates("u"))
    assert (said.value.status, api.requests) == (401, 1)
    with Client(url, "secret") as client:
        assert client.items()


def test_updates_come_again_after_a_lost_stream(fake: tuple[Fake, str]) -> None:
    api, url = fake
    with Client(url) as client, Client(url) as sender:
        updates = client.updates("u")
        assert next(updates) == Status(True, "g-20261125-0731")
        sender.send(EventIn(user_id="u", item_id="i1", event_id="e-1"))
        update = next(updates)
        assert isinstance(update, Update)
        assert update.path is not None
        assert (update.path.event_id, update.source) == ("e-1", "personal")
        api.close_streams()
        states = [one.connected for one in itertools.islice(updates, 2) if isinstance(one, Status)]
        assert states == [False, True]
        assert api.last_ids[-1]  # where it left off is said to the server
        sender.send(EventIn(user_id="u", item_id="i2", event_id="e-2"))
        assert isinstance(next(updates), Update)
        updates.close()  # type: ignore[attr-defined]


def test_a_title_may_hold_what_python_calls_an_end_of_line() -> None:
    title = "tides\u2028and\x85rivers"
    sent = f"event: recommendations\r\ndata: {title}\r\nid: 7\r\n\r\n: alive\r\n\r\ndata: a\ndata: b\n\n".encode()
    pieces = (sent[at : at + 3] for at in range(0, len(sent), 3))
    answer = httpx.Response(200, content=pieces)
    assert list(_events(answer)) == [("recommendations", title, "7"), ("message", "a\nb", "")]


@pytest.mark.parametrize("status", [502, 504])
def test_a_proxy_before_a_server_that_starts_is_asked_again(status: int) -> None:
    answers = iter([httpx.Response(status), httpx.Response(200, json={"items": []})])
    with Client("http://upwell") as client:
        client._opened = httpx.Client(base_url="http://upwell", transport=httpx.MockTransport(lambda _: next(answers)))
        assert client.items() == []


@pytest.mark.parametrize("status", [301, 304])
def test_what_is_no_answer_is_refused(status: int) -> None:
    with Client("http://upwell") as client:
        moved = httpx.MockTransport(lambda _: httpx.Response(status, headers={"Location": "https://upwell"}))
        client._opened = httpx.Client(base_url="http://upwell", transport=moved)
        for call in (client.items, lambda: next(client.updates("u"))):
            with pytest.raises(ApiError) as said:
                call()
            assert said.value.status == status


@pytest.mark.parametrize(
    ("url", "key"),
    [("localhost:8080", None), ("ftp://localhost", None), ("http://upwell", "SECR\nET"), ("http://upwell", "ключ")],
)
def test_what_can_never_be_sent_is_refused_at_once_and_no_key_is_said(url: str, key: str | None) -> None:
    """For half a minute it was tried again, by `updates` for ever, and then the key stood in the caller's log."""
    with pytest.raises(ValueError, match=r"^(url|key): ") as said:
        Client(url, key)
    assert "SECR" not in str(said.value)


def test_a_key_is_taken_as_a_file_holds_it(fake: tuple[Fake, str]) -> None:
    fake[0].set(key="secret")
    with Client(fake[1], "secret\n") as client:
        assert client.items()


def test_an_id_of_dots_is_an_id_and_an_empty_one_is_none() -> None:
    """`..` asked for another path, `DELETE /v1` among them, and nobody's state was the list of all users."""
    client = Client("http://upwell")
    with TestClient(build_app(Still(Settings()), OPEN), base_url="http://127.0.0.1") as api:
        client._opened = api
        for dots in (".", "..", "..."):
            with pytest.raises(ApiError, match="nothing is known") as said:
                client.user(dots)
            assert said.value.status == 404
        for call in (client.user, client.forget, client.similar, client.recommendations, client.erasure):
            with pytest.raises(ApiError, match="an id is empty"):
                call("")


@pytest.mark.parametrize(
    ("host", "asked"), [("127.0.0.1", False), ("localhost", False), ("[::1]", False), ("upwell.example", True)]
)
def test_no_proxy_stands_before_loopback(host: str, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://proxy.example:3128")
    for scheme in ("http", "https"):
        with Client(url := f"{scheme}://{host}:8080") as client:
            way = client._http._transport_for_url(httpx.URL(url))
            assert (way is not client._http._transport) == asked


class Ports(BaseHTTPRequestHandler):
    """Names the connection that asks."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        item = {"item_id": str(self.client_address[1]), "title": "", "categories": [], "available": True}
        raw = msgspec.json.encode({"items": [item]})
        self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


FORKED = """
import os, sys
from stream.client import Client

client = Client(sys.argv[1])
before = client.items()
if child := os.fork():
    shared = os.waitpid(child, 0)[1] != 0
    sys.exit(shared or client.items() != before)
os._exit(client.items() == before)
"""


def test_a_forked_child_has_connections_of_its_own() -> None:
    """On its parent's it read the lists of other users."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ports)
    threading.Thread(target=server.serve_forever).start()
    try:
        command = [sys.executable, "-c", FORKED, f"http://127.0.0.1:{server.server_port}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr
