"""Keys, rates and bounds of the API, on the real app without Kafka behind it."""

import asyncio
import gc
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
import structlog
import trustme
from httpx import ASGITransport, AsyncClient, ConnectError
from httpx import Client as HttpxClient
from litestar import Litestar, get
from litestar.testing import TestClient

from model.user_state import EMPTY, UserState, encode_state
from stream.answers import Answer, Erased, RankedItem, Wishes
from stream.events import OFFSET_HEADER
from stream.ports import free_port
from stream.producer import BufferFull, DeliveryError, Place
from tests.workers.service import until, upwell
from workers import metrics
from workers.bench.stage import environment
from workers.guests import OtherEncoder
from workers.keys import OPEN, SCOPES, TICKET_S, Key, Keys, _parsed, load_keys, new_key
from workers.limits import Buckets, Gate
from workers.routes import route
from workers.server import ROUTES, Server, build_app, configured
from workers.service import Service
from workers.settings import ConfigError, Kafka, Serve, Settings
from workers.state_writer import LAST
from workers.user_states import UserStates

NEEDED = {
    ("GET", "/v1/users/u1/recommendations"): "read",
    ("POST", "/v1/recommendations"): "read",
    ("GET", "/v1/items/i1/similar"): "read",
    ("GET", "/v1/stream?user=u1"): "read",
    ("POST", "/v1/stream/tickets?user=u1"): "read",
    ("GET", "/v1/items"): "read",
    ("GET", "/v1/figures"): "read",
    ("GET", "/v1/users/u1"): "admin",
    ("DELETE", "/v1/users/" + "u" * 257): "admin",
    ("GET", "/v1/erasures/unknown"): "admin",
    ("POST", "/v1/events"): "ingest",
    ("POST", "/v1/items"): "ingest",
    ("DELETE", "/v1/items/" + "i" * 257): "ingest",
    ("GET", "/metrics"): "metrics",
}


class Still(Service):
    """Nothing is followed, no event goes anywhere, and a stream ends as soon as it is opened."""

    async def start(self) -> None:
        self.updates._loop = asyncio.get_running_loop()
        self.updates.close()
        self.users.caught_up.set()

    async def stop(self) -> None:
        for threads in (self.sending, self.asking, self.encoding):
            threads.shutdown()


@contextmanager
def client(keys: Keys, **serve: Any) -> Iterator[TestClient[Litestar]]:
    app = build_app(Still(Settings(serve=Serve(**serve))), keys)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def of() -> dict[str, str]:
    return {scope: new_key(scope, [scope])[0] for scope in SCOPES}


@pytest.fixture
def file(of: dict[str, str], tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    lines = [f"{scope} {scope} {sha256(key.encode()).hexdigest()}" for scope, key in of.items()]
    path.write_text("# name scopes hash\n" + "\n".join(lines) + "\n")
    return path


def test_each_route_wants_its_scope_and_no_other(of: dict[str, str], file: Path) -> None:
    assert len(NEEDED) == len([one for one in ROUTES if one.opt["scope"]])
    with client(load_keys(Serve(keys_file=file))) as api:
        for (method, path), needed in NEEDED.items():
            assert (answer := api.request(method, path)).status_code == 401, path
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            for wrong in ("Bearer x", "Basic " + of[needed], of[needed], "Bearer " + of[needed] + "x"):
                assert api.request(method, path, headers={"Authorization": wrong}).status_code == 401, path
            for scope, key in of.items():
                status = api.request(method, path, headers={"Authorization": f"Bearer {key}"}).status_code
                assert (status == 403) == (scope != needed) and status != 401, (path, scope)
        assert api.get("/livez").status_code == 200
        assert api.get("/schema/openapi.json").status_code == 200
        assert api.get("/").status_code == 200


def test_a_ticket_opens_one_user_s_stream_for_a_minute_and_nothing_else(
    of: dict[str, str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TICKET_S == 60
    keys = load_keys(Serve(keys_file=file))
    with client(keys) as api, client(keys) as another, client(OPEN) as open_to_all:
        key = {"Authorization": f"Bearer {of['read']}"}
        made = api.post("/v1/stream/tickets?user=u 1", headers=key).json()
        ticket, now = made["ticket"], time.time()
        assert 0 < made["until_ms"] / 1000 - now <= TICKET_S

        def status(user: str = "u 1", ticket: str = ticket, path: str = "/v1/stream", server: Any = api) -> int:
            return int(server.get(path, params={"user": user, "ticket": ticket}).status_code)

        assert status() == status(server=another) == 200
        assert api.get("/v1/stream?user=u&ticket=", headers=key).status_code == 200
        assert status(user="u 2") == 401
        assert api.get("/v1/stream", params={"user": ["u 1", "u 2"], "ticket": ticket}).status_code == 401
        assert api.get("/v1/stream", params={"user": ["u 2", "u 1"], "ticket": ticket}).status_code == 401
        name, until, mac = ticket.rsplit(".", 2)
        for forged in ("", "x", f"metrics.{until}.{mac}", f"{name}.{int(until) + 1}.{mac}", ticket[:-1] + "é"):
            assert status(ticket=forged) == 401, forged
        for path in ("/v1/items", "/v1/users/u 1", "/v1/users/u 1/recommendations", "/metrics"):
            assert status(path=path) == 401, path
        unread = Key("metrics", frozenset(["metrics"]), sha256(of["metrics"].encode()).digest())
        assert status(ticket=unread.ticket("u 1", int(until))) == 403
        file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("read ")))
        with client(load_keys(Serve(keys_file=file))) as later:
            assert status(server=later) == 401
        monkeypatch.setattr(time, "time", lambda: now + TICKET_S + 1)
        assert status() == 401
        assert open_to_all.post("/v1/stream/tickets?user=u").json()["ticket"] == ""
        assert status(ticket="", server=open_to_all) == status(server=open_to_all) == 200


def test_a_route_that_names_no_scope_is_closed(file: Path, of: dict[str, str]) -> None:
    @get("/forgotten", sync_to_thread=False)
    def forgotten() -> str:
        return "?"

    app = Litestar([forgotten], middleware=[Gate(Serve(), load_keys(Serve(keys_file=file)))])
    with TestClient(app) as api:
        for key in of.values():
            assert api.get("/forgotten", headers={"Authorization": f"Bearer {key}"}).status_code == 403


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "no key"),
        ("a read", "expected NAME SCOPE"),
        ("a write " + "0" * 64, "no scope write"),
        (f"a read {'0' * 64}\na read {'1' * 64}", "two keys have one name"),
    ],
)
def test_a_bad_key_file_is_refused(text: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=rf"serve\.keys_file.*{cause}"):
        load_keys(Serve(keys_file=tmp_path / "keys"))


def test_the_server_does_not_start_open_to_others(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert not load_keys(Serve(host=host)).required
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        with pytest.raises(ConfigError, match=r"serve\.keys_file"):
            load_keys(Serve(host=host))
    nowhere = f"127.0.0.1:{free_port()}"
    refused = upwell("serve", UPWELL_SERVE__HOST="0.0.0.0", UPWELL_KAFKA__BOOTSTRAP=nowhere)
    assert refused.returncode == 2
    assert refused.stderr.startswith("configuration:\nserve.keys_file (UPWELL_SERVE__KEYS_FILE)")


def test_the_server_that_is_started_wants_a_key_and_speaks_https(
    of: dict[str, str], file: Path, tmp_path: Path
) -> None:
    """`upwell serve`, which answers while Kafka is away."""
    authority, trusting = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(trusting)
    certificate, pem, key = authority.issue_cert("127.0.0.1"), tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(str(pem))
    certificate.private_key_pem.write_to_path(str(key))
    settings = Settings(
        kafka=Kafka(bootstrap=f"127.0.0.1:{free_port()}"),
        serve=Serve(port=free_port(), keys_file=file, cert_file=pem, key_file=key),
    )
    api = HttpxClient(base_url=f"https://127.0.0.1:{settings.serve.port}", verify=trusting)

    def status(**headers: str) -> int:
        try:
            return api.get("/v1/items", headers=headers).status_code
        except ConnectError:  # it starts
            return 0

    command = [sys.executable, "-m", "workers.cli", "serve"]
    with subprocess.Popen(command, env=os.environ | environment(settings), stderr=subprocess.DEVNULL) as server, api:
        try:
            until(lambda: status() > 0, "it answers over HTTPS")
            assert (status(), status(Authorization=f"Bearer {of['read']}")) == (401, 200)
        finally:
            server.kill()


def test_keys_new_prints_a_key_whose_line_opens(tmp_path: Path) -> None:
    made = upwell("keys", "new", "--scope", "read", "--scope", "ingest", "--name", "x")
    key, _, line = made.stdout.splitlines()
    (tmp_path / "keys").write_text(line)
    found = load_keys(Serve(keys_file=tmp_path / "keys")).find(f"Bearer {key}")
    assert found is not None and found.name == "x" and found.scopes == {"read", "ingest"}
    assert key not in line
    assert upwell("keys", "new", "--scope", "root").returncode == 2


def test_a_bucket_fills_at_its_rate() -> None:
    buckets = Buckets(rate=10, burst=3)
    assert [buckets.wait_s("a", 0.0) for _ in range(4)] == pytest.approx([0, 0, 0, 0.1])
    assert buckets.wait_s("b", 0.0) == 0
    assert buckets.wait_s("a", 0.05) == pytest.approx(0.05)
    assert buckets.wait_s("a", 0.1) == 0
    assert [buckets.wait_s("a", 9.0) for _ in range(4)] == pytest.approx([0, 0, 0, 0.1])


def test_of_so_many_callers_the_longest_silent_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who calls from ever new addresses fills no memory, and gets no fresh bucket for it."""
    monkeypatch.setattr("workers.limits.MAX_CALLERS", 3)
    buckets = Buckets(rate=1, burst=1)
    assert [buckets.wait_s(caller, 0.0) for caller in "abc"] == [0, 0, 0]
    assert buckets.wait_s("a", 0.1) > 0  # b is the longest silent now
    assert buckets.wait_s("d", 0.2) == 0
    assert len(buckets._left) == 3
    assert all(buckets.wait_s(caller, 0.3) > 0 for caller in "acd")


def test_one_caller_is_slowed_and_the_other_is_not(of: dict[str, str], file: Path) -> None:
    with client(load_keys(Serve(keys_file=file)), rate=0.01, burst=3) as api:
        read = {"Authorization": f"Bearer {of['read']}"}
        statuses = [api.get("/v1/items", headers=read) for _ in range(5)]
        assert [answer.status_code for answer in statuses] == [200, 200, 200, 429, 429]
        assert int(statuses[-1].headers["Retry-After"]) > 1
        assert api.get("/metrics", headers={"Authorization": f"Bearer {of['metrics']}"}).status_code == 200
        guesses = [api.get("/v1/items", headers={"Authorization": "Bearer guess"}).status_code for _ in range(5)]
        assert guesses == [401, 401, 401, 429, 429]
        assert api.get("/livez").status_code == 200


async def test_each_address_has_a_bucket_of_its_own() -> None:
    """Where no keys are asked for, one busy caller does not shut the others out."""

    @get("/quick", sync_to_thread=False, **route("read"))
    def quick() -> str:
        return "done"

    app = Litestar([quick], middleware=[Gate(Serve(rate=0.01, burst=2), OPEN)])
    found = {}
    for host in ("10.0.0.1", "10.0.0.2"):
        transport = ASGITransport(app, client=(host, 1))  # type: ignore[arg-type]
        async with AsyncClient(transport=transport, base_url="http://localhost") as api:
            found[host] = [(await api.get("/quick")).status_code for _ in range(3)]
    assert [*found.values()] == [[200, 200, 429]] * 2


def test_too_much_at_once_is_refused_and_what_takes_too_long_is_ended() -> None:
    released = asyncio.Event()

    @get("/slow", **route("read"))
    async def slow() -> str:
        await released.wait()
        return "done"

    async def at_once() -> None:
        gate = Gate(Serve(max_requests=2, timeout_s=3.0, wait_s=0.1), OPEN)
        app = Litestar([slow], middleware=[gate])
        async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as api:  # type: ignore[arg-type]
            first = [asyncio.create_task(api.get("/slow")) for _ in range(2)]
            await asyncio.sleep(0.1)
            third = await api.get("/slow")
            assert (third.status_code, third.json()["detail"]) == (503, "2 requests are being answered")
            assert third.headers["Retry-After"] == "1"
            for late in await asyncio.gather(*first):
                assert late.status_code == 503 and "within 3 s" in late.json()["detail"]
            released.set()
            assert (await api.get("/slow")).status_code == 200

    asyncio.run(at_once())


async def test_probes_and_scrapes_are_answered_while_all_requests_are_taken() -> None:
    """Else Kubernetes ends a server for being busy, and the alerts that would say so see nothing of it."""
    begun, released = asyncio.Event(), asyncio.Event()

    @get("/slow", **route("read"))
    async def slow() -> str:
        begun.set()
        await released.wait()
        return "done"

    @get("/alive", sync_to_thread=False, **route(None))
    def alive() -> str:
        return "alive"

    @get("/scraped", sync_to_thread=False, **route("metrics"))
    def scraped() -> str:
        return "upwell_up 1"

    gate = Gate(Serve(max_requests=1, rate=0.01, burst=2), OPEN)
    app = Litestar([slow, alive, scraped], middleware=[gate])
    async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as api:  # type: ignore[arg-type]
        busy = asyncio.create_task(api.get("/slow"))
        await begun.wait()
        statuses = [(await api.get(path)).status_code for path in ("/slow", "/slow", "/alive", "/scraped")]
        released.set()
        assert statuses == [503, 429, 200, 200] and (await busy).status_code == 200


def test_bodies_batches_and_streams_are_bounded() -> None:
    with client(OPEN, max_body_bytes=1024, max_batch=2, max_streams=0) as api:
        event = {"user_id": "u", "item_id": "i"}
        for path in ("/v1/events", "/v1/items", "/v1/recommendations"):
            for body in (b"{" + b" " * 1024, iter([b"{", b" " * 1024])):  # with its length, and without
                assert api.post(path, content=body).status_code == 413, path
            assert api.post(path, content=b"{" + b" " * 1000).status_code == 400, path
        many = api.post("/v1/events", json=[event] * 3)
        assert many.status_code == 413 and "serve.max_batch is 2" in many.json()["detail"]
        stream = api.get("/v1/stream?user=u")
        assert (stream.status_code, stream.json()["detail"]) == (503, "0 streams are open")


def test_streams_up_to_the_bound_are_opened() -> None:
    service = Still(Settings(serve=Serve(max_streams=2)))
    with TestClient(build_app(service, OPEN), base_url="http://127.0.0.1") as api, service.updates.place():
        assert api.get("/v1/stream?user=u").status_code == 200
        with service.updates.place():
            refused = api.get("/v1/stream?user=u")
        assert (refused.status_code, refused.json()["detail"]) == (503, "2 streams are open")
        assert api.get("/v1/stream?user=u").status_code == 200


async def test_of_streams_that_come_at_once_no_more_than_the_bound_are_opened() -> None:
    """After a restart all pages come back within a second."""
    service, statuses = Still(Settings(serve=Serve(max_streams=2))), list[int]()
    service.updates._loop = asyncio.get_running_loop()
    app = build_app(service, OPEN)

    async def receive() -> Any:
        await asyncio.sleep(0.3)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await asyncio.gather(*(app(asked_of(app, "GET", "/v1/stream", b"user=u"), receive, send) for _ in range(5)))
    assert sorted(statuses) == [200, 200, 503, 503, 503]
    assert service.updates.num_open == 0 and not service.updates._boxes


@pytest.mark.parametrize("path", ["/v1/events", "/v1/items", "/v1/recommendations"])
def test_a_body_nested_too_deeply_is_refused_as_any_bad_one(path: str) -> None:
    nested = b"[" * 2000 + b"]" * 2000
    with client(OPEN) as api:
        for body in (nested, b'{"x":%s}' % nested, b'[{"x":%s}]' % nested):
            assert api.post(path, content=body).status_code == 400, body[:5]


async def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    async def dripping() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    app = build_app(Still(Settings(serve=Serve(timeout_s=0.3, wait_s=0.1))), OPEN)
    async with AsyncClient(transport=ASGITransport(app), base_url="http://localhost") as api:  # type: ignore[arg-type]
        late = await api.post("/v1/events", content=dripping())
    assert (late.status_code, late.json()["detail"]) == (408, "not the whole body within 0.3 s")


async def test_a_connection_that_asks_for_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn's patience begins after an answer: whoever reached the port could take all descriptors, without a key."""
    monkeypatch.setattr("workers.server.REQUEST_S", 0.2)
    service = Still(Settings(serve=Serve(port=free_port(), wait_s=1.0)))
    server = Server(configured(service, OPEN), service)
    serving = asyncio.create_task(server.serve())
    head, rest = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n", b"\r\n"
    waiting = b"GET /v1/users/u/recommendations?min_offset=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"

    async def answers(*parts: bytes) -> bytes:
        """All that comes until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", service.settings.serve.port)
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.05)
        said = await reader.read()
        writer.close()
        return said

    async with asyncio.timeout(20):
        while not server.started:
            await asyncio.sleep(0.02)
        assert not any(await asyncio.gather(answers(), answers(head)))
        for parts in ((head + rest, head), (head, rest)):
            assert (await answers(*parts)).startswith(b"HTTP/1.1 200"), parts
        assert (await answers(waiting)).startswith(b"HTTP/1.1 503")  # no generation: after a second
        server.should_exit = True
        await serving


async def test_a_client_that_leaves_is_no_failure_of_the_server() -> None:
    """Phones lose their connection amid a POST: of such 500s an alert that pages would be made."""
    app, said = build_app(Still(Settings()), OPEN), list[Any]()
    before = {status: counted("/v1/events", status) for status in ("499", "500")}
    messages = iter([{"type": "http.request", "body": b"[", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        said.append(message)

    await app(asked_of(app, "POST", "/v1/events"), receive, send)
    after = {status: counted("/v1/events", status) for status in ("499", "500")}
    assert after == {"499": before["499"] + 1, "500": before["500"]}


def asked_of(app: Litestar, method: str, path: str, query: bytes = b"") -> Any:
    return {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": query,
        "headers": [(b"host", b"localhost"), (b"content-length", b"9")], "client": ("127.0.0.1", 1), "app": app,
        "server": ("127.0.0.1", 8080), "scheme": "http", "http_version": "1.1", "root_path": "", "state": {},
    }  # fmt: skip


def counted(route: str, status: str) -> float:
    return float(metrics.requests.labels(route, status)._value.get())


@pytest.mark.parametrize(
    "user_id",
    ["a/b", "https://shop.example/u?x=1", "%2F", "a%2Fb", "ü/日", "/", "alice\ue001", "a\ue000b", "\ue001/", "\ufffd"],
)
async def test_an_id_may_hold_a_slash_and_is_no_other_s(user_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def erase(_: Still, user: str) -> Erased:
        asked.append(user)
        return Erased(receipt="0-1", partition=0, offset=1, requested_ms=1)

    monkeypatch.setattr(Still, "erase", erase)
    transport = ASGITransport(build_app(Still(Settings()), OPEN))  # type: ignore[arg-type]
    async with AsyncClient(transport=transport, base_url="http://localhost") as api:
        assert (await api.delete(f"/v1/users/{quote(user_id, safe='')}")).status_code == 202
        assert (await api.get("/v1%2Fitems")).status_code == 404
        assert (await api.delete("/v1/users/alice%ED%A0%81")).status_code == 202  # what stands for an empty id
    assert asked == [user_id, "alice\ufffd\ufffd\ufffd"]


def test_an_item_is_taken_out_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has no Kafka client could only hide it."""
    removed, place = list[str](), Future[Place]()
    place.set_result(Place(1, 7))

    def remove(item_id: str) -> Future[Place]:
        removed.append(item_id)
        if item_id == "away":
            raise BufferFull("nobody answers")
        return place

    monkeypatch.setattr(Still, "producer", SimpleNamespace(remove_item=remove))
    with client(OPEN) as api:
        answer = api.delete("/v1/items/a%2Fb")
        assert (answer.status_code, answer.json()) == (202, {"index": 0, "partition": 1, "offset": 7, "item_id": "a/b"})
        assert api.delete("/v1/items/away").status_code == 503
    assert removed == ["a/b", "away"]


def test_who_meets_another_encoder_is_asked_to_come_back_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def recommend_guest(*_: Any) -> None:
        raise OtherEncoder("text: the generation stands on another")

    monkeypatch.setattr(Still, "recommend_guest", recommend_guest)
    with client(OPEN) as api:
        answer = api.post("/v1/recommendations", json={"text": "rivers"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "60")
    assert answer.json()["detail"] == "text: the generation stands on another"


def test_without_keys_no_page_of_another_site_is_answered() -> None:
    """A browser on this machine sends what any page asks it to: a POST without CORS, or a name that was bound anew."""
    with client(OPEN, cors_origins=["https://mine.example"]) as api:
        for headers, status in (
            ({}, 200),
            ({"Host": "127.0.0.1:8080", "Sec-Fetch-Site": "same-origin"}, 200),
            ({"Host": "[::1]:8080"}, 200),
            ({"Sec-Fetch-Site": "cross-site", "Origin": "https://mine.example"}, 200),
            ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
            ({"Host": "evil.example"}, 403),
            ({"Host": "127.0.0.1.evil.example"}, 403),
        ):
            assert api.get("/v1/items", headers=headers).status_code == status, headers


async def test_a_stream_that_nobody_reads_is_cut_off() -> None:
    """And gives its slot back at once, with one line in the log."""
    service = Still(Settings(serve=Serve(timeout_s=0.2, wait_s=0.1)))
    service.updates._loop = asyncio.get_running_loop()
    app = build_app(service, OPEN)

    async def connected() -> Any:
        return await asyncio.Event().wait()

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    gc.disable()
    try:
        with structlog.testing.capture_logs() as lines:
            async with asyncio.timeout(10):
                await app(asked_of(app, "GET", "/v1/stream", b"user=u"), connected, stuck)
        assert service.updates.num_open == 0
    finally:
        gc.enable()
    assert [(line["event"], line["log_level"]) for line in lines] == [("stream cut off", "warning")]


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither how far a hash is right nor which key it is shows in the time."""
    made = [new_key(f"k{number}", ["read"]) for number in range(3)]
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr("workers.keys.hmac.compare_digest", compare)
    keys = Keys([_parsed(line) for _, line in made])
    hashes = [sha256(key.encode()).digest() for key, _ in made]
    for given, found in [(key, f"k{number}") for number, (key, _) in enumerate(made)] + [("upwell_guess", None)]:
        compared.clear()
        key = keys.find(f"Bearer {given}")
        assert (key and key.name) == found
        assert compared == [(kept, sha256(given.encode()).digest()) for kept in hashes]


def test_a_key_has_256_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the one round of SHA-256 rests on."""
    asked: list[int] = []

    def token(num_bytes: int) -> str:
        asked.append(num_bytes)
        return "x" * 43

    monkeypatch.setattr("workers.keys.secrets.token_urlsafe", token)
    assert new_key("k", ["read"])[0] == "upwell_" + "x" * 43
    assert asked == [32]


def test_a_ticket_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far a forged MAC is right does not show in the time."""
    compared: list[tuple[str, str]] = []

    def compare(one: str, other: str) -> bool:
        compared.append((one, other))
        return one == other

    key = _parsed(new_key("k", ["read"])[1])
    ticket = key.ticket("u", 100)
    forged = ticket[:-1] + ("0" if ticket[-1] != "0" else "1")
    monkeypatch.setattr("workers.keys.hmac.compare_digest", compare)
    assert [Keys([key]).redeem(given, "u", 99) for given in (ticket, forged)] == [key, None]
    assert compared == [(ticket, ticket), (ticket, forged)]


def test_headers_and_origins(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("workers.updates.Updates.latencies_ms", property(broken))
    with client(OPEN, cors_origins=["https://shop.example"]) as api:
        for path, status in {"/": 200, "/console/app.js": 200, "/livez": 200, "/v1/items": 200, "/nowhere": 404,
                             "/v1/items?limit=0": 400, "/readyz": 503, "/v1/figures": 500}.items():  # fmt: skip
            answer = api.get(path, headers={"Origin": "https://shop.example"})
            headers = answer.headers
            assert (answer.status_code, headers["x-content-type-options"]) == (status, "nosniff"), path
            policy = dict(one.split(maxsplit=1) for one in headers["content-security-policy"].split(";"))
            nobody = {"default-src", "base-uri", "form-action", "frame-ancestors"}
            assert policy == dict.fromkeys(nobody, "'none'") | dict.fromkeys(policy.keys() - nobody, "'self'"), path
            assert headers["referrer-policy"] == "no-referrer" and "secret" not in answer.text
            assert headers["cache-control"] == "no-store", path  # lists and states are a user's own
        assert headers["access-control-allow-origin"] == "https://shop.example"
    with client(OPEN) as api:
        assert "access-control-allow-origin" not in api.get("/livez", headers={"Origin": "https://x.example"}).headers


@pytest.mark.parametrize("path", ["x%00", "app.js/x", "x" * 300, "vendor", "..%2Fservice.py", "%2Fetc%2Fpasswd"])
def test_what_is_no_file_of_the_console_is_not_found(path: str) -> None:
    with client(OPEN) as api:
        answer = api.get(f"/console/{path}")
        assert (answer.status_code, answer.json()["detail"]) == (404, "no such file")
        assert api.get("/console/vendor/uPlot.min.css").headers["content-type"].startswith("text/css")


def test_bad_parameters_are_named() -> None:
    bad = {
        "k=0": "k", "k=x": "k", "k=201": "k", "diversity=2": "diversity", "diversity=nan": "diversity",
        "explore=-1": "explore", "max_age=-1": "max_age", "min_offset=-1": "min_offset", "explain=perhaps": "explain",
        "categories=": "categories", "exclude=" + "x" * 257: "exclude", "exlude=a": "exlude",
        "&".join(["exclude=a"] * 1001): "exclude",
    }  # fmt: skip
    with client(OPEN) as api:
        for query, name in bad.items():
            answer = api.get(f"/v1/users/u1/recommendations?{query}")
            assert answer.status_code == 400, query
            assert answer.json()["detail"].startswith(name), answer.json()
        for method, path in NEEDED:
            answer = api.request(method, f"{path}{'&' if '?' in path else '?'}surprise=1")
            assert answer.status_code == 400 and answer.json()["detail"].startswith("surprise: no such"), path
        for name in ("explain", "exclude_seen", "min_offset"):  # mean nothing without a user
            answer = api.get(f"/v1/items/i1/similar?{name}=1")
            assert (answer.status_code, answer.json()["detail"].split(":")[0]) == (400, name)
        for path in ("/v1/users/{}", "/v1/users/{}/recommendations", "/v1/items/{}/similar", "/v1/stream?user={}"):
            answer = api.get(path.format("u" * 257))
            assert answer.status_code == 400 and answer.json()["detail"].endswith("of length <= 256"), path
        assert api.get("/v1/stream?user=").json()["detail"] == "user: Expected `str` of length >= 1"
        assert api.post("/v1/recommendations").json()["detail"] == "body: missing"
        wrong = api.post("/v1/events", json={"user_id": "u", "item_id": "i", "event_type": "x"})
        assert wrong.json()["detail"] == "event_type: Invalid enum value 'x'"
        for body, name in (({"k": 0}, "k"), ({"texts": ""}, "texts"), ({"history": [{}]}, "item_id")):
            answer = api.post("/v1/recommendations", json=body)
            assert answer.status_code == 400 and name in answer.json()["detail"], answer.json()
        good = api.get("/v1/users/u1/recommendations?k=5&diversity=0.5&categories=a&categories=b&explain=true")
        assert (good.status_code, good.json()["detail"]) == (503, "no generation serves yet")
        assert good.headers["Retry-After"] == "1"


def test_a_partition_is_as_far_as_whole_micro_batches_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read can bring a part of one: its newest state says nothing of the others."""
    users = UserStates(Settings())

    def record(user_id: str, offset: int, *headers: tuple[str, bytes]) -> Any:
        value = encode_state(UserState(applied=1, offset=offset))
        return SimpleNamespace(key=user_id.encode(), value=value, partition=3, headers=headers, timestamp=0)

    one, other, *_ = (u for u in map("u{}".format, range(99)) if users.partition(u) == 3)
    reached: list[bool] = []

    def reads(*_: Any) -> Iterator[list[Any]]:
        yield [record(one, 10)]
        reached.append(users.reached(one, 10) and not users.reached(other, 5))
        yield [record(other, 12, LAST)]
        reached.append(users.reached(other, 5) and users.reached(one, 12))
        users.erase(one, 100)  # the worker is far behind: what it still writes of this user is passed over
        yield [record(one, 20, LAST)]
        reached.append(users.reached(other, 20) and not users.reached(other, 21))

    monkeypatch.setattr("workers.user_states.tail", reads)
    users._follow()
    assert reached == [True, True, True]


def test_an_older_null_says_nothing_of_a_newer_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mark ran out while the worker was behind, and what the user did before the wish was served again."""
    users, pending = UserStates(Settings()), list[float]()

    def record(offset: int, value: bytes | None = None, *headers: tuple[str, bytes]) -> Any:
        headers = (*headers, (OFFSET_HEADER, b"%d" % offset))
        return SimpleNamespace(
            key=b"u", value=value, partition=users.partition("u"), headers=headers, timestamp=0, topic="", offset=0
        )

    def reads(*_: Any) -> Iterator[list[Any]]:
        users.erase("u", 5)
        users.erase("u", 50)
        yield [record(5)]
        pending.append(metrics.pending_erasures._value.get())
        monkeypatch.setattr("workers.user_states.MARKED_S", -1.0)
        yield [record(40, encode_state(UserState(applied=3, offset=40)))]
        assert users.of("u") is EMPTY
        yield [record(50, None, LAST)]
        pending.append(metrics.pending_erasures._value.get())
        assert "u" not in users.states
        users.erase("u", 50)  # a worker was given the wish again: no state follows
        yield []
        pending.append(metrics.pending_erasures._value.get())

    monkeypatch.setattr("workers.user_states.tail", reads)
    users._follow()
    assert pending == [1, 0, 0]


def test_a_state_that_does_not_come_is_waited_for_no_longer_than_the_bound() -> None:
    service = Still(Settings(serve=Serve(wait_s=0.2)))
    service.users.progress[service.users.partition("u1")] = 7
    assert service.users.reached("u1", 7) and not service.users.reached("u1", 8)
    from workers.routes_recommend import _reach

    began = time.monotonic()
    assert asyncio.run(_reach(service, "u1", 7))
    assert not asyncio.run(_reach(service, "u1", 8))
    assert time.monotonic() - began >= 0.2
    assert Wishes().k == 20


def test_who_waits_for_a_state_leaves_room_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's pause was the server's: each request with a min_offset kept its place for the two seconds."""

    def recommend(_: Still, user_id: str, __: Wishes, reached: bool = True) -> Answer:
        items, stale = list[RankedItem](), not reached
        return Answer(user_id=user_id, items=items, generation="g", source="popular", as_of=None, age_ms=0, stale=stale)

    monkeypatch.setattr(Still, "recommend", recommend)
    path, released = "/v1/users/u/recommendations", threading.Event()
    monkeypatch.setattr(UserStates, "reached", lambda *_: released.is_set())
    with client(OPEN, max_requests=4, wait_s=60, timeout_s=90) as api, ThreadPoolExecutor(4) as callers:
        waiting = [callers.submit(api.get, f"{path}?min_offset=9") for _ in range(4)]
        done = islice(as_completed(waiting, timeout=20), 2)
        assert [one.result().json()["stale"] for one in done] == [True, True]
        assert api.get(path).json()["stale"] is False
        released.set()
        assert sorted(one.result().json()["stale"] for one in waiting) == [False, False, True, True]


async def test_an_event_that_kafka_did_not_take_is_no_failure_of_the_shutdown() -> None:
    """Its client has had its 503; the log had a trace for it, perhaps hours later."""
    service: Any = Service(Settings())
    service.live = service.users = service.updates = SimpleNamespace(stop=lambda: None)

    def close() -> None:
        raise DeliveryError("1 events were not delivered")

    service._producer = SimpleNamespace(close=close)
    await service.stop()


@pytest.mark.parametrize(
    ("path", "body", "cause"),
    [
        ("/v1/items", {"item_id": "i", "title": "t", "avaliable": False}, "unknown field `avaliable`"),
        (
            "/v1/items",
            {"item_id": "i", "title": "t", "published_ms": 1_795_500_000},
            "published_ms: Expected `int` >= ",
        ),
        ("/v1/events", {"user_id": "u", "item_id": "i", "ts_ms": 1_795_500_000}, "ts_ms: Expected `int` >= "),
        ("/v1/recommendations", {"history": [{"item_id": "i", "ts_ms": 1_795_500_000}]}, "ts_ms: Expected `int` >= "),
    ],
)
def test_what_passed_in_silence_and_meant_something_else_is_refused(path: str, body: Any, cause: str) -> None:
    """A misspelt field, and seconds in place of milliseconds: a click of 1970 that moves no list."""
    with client(OPEN) as api:
        answer = api.post(path, json=body)
        assert (answer.status_code, cause in answer.json()["detail"]) == (400, True), answer.json()


def test_a_refusal_is_json_wherever_it_comes_from_and_says_what_to_mend(of: dict[str, str], file: Path) -> None:
    with client(load_keys(Serve(keys_file=file)), max_body_bytes=1024) as api:

        def said(path: str, scope: str, **request: Any) -> tuple[int, str]:
            headers = {"Authorization": f"Bearer {of[scope]}"} | request.pop("headers", {})
            answer = api.request("POST" if request else "GET", path, headers=headers, **request)
            assert answer.headers["Content-Type"] == "application/json"
            return answer.status_code, answer.json()["detail"]

        assert said("/v1/stream?user=u&k=5", "read")[0] == said("/metrics?k=5", "metrics")[0] == 400
        assert said("/v1/stream?user=u", "ingest")[0] == said("/metrics", "read")[0] == 403
        assert said("/nowhere", "read")[0] == 404
        large = said("/v1/events", "ingest", content=b" " * 1025)
        assert large == (413, "body: serve.max_body_bytes is 1024")
        packed = said("/v1/events", "ingest", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"})
        assert packed == (400, "Content-Encoding: gzip is not read, send the body as it is")
        assert said("/v1/events", "ingest", content=b" ") == (400, "body: empty")


def test_an_empty_id_is_no_other_route() -> None:
    """Two slashes were one: a list asked for nobody was the state of a user named `recommendations`."""
    with client(OPEN) as api:
        answer = api.get("/v1/users//recommendations")
        assert (answer.status_code, answer.json()["detail"]) == (400, "user_id: Expected `str` of length >= 1")
