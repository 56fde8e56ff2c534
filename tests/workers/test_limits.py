"""Keys, rates and bounds of the API, on the real app without Kafka behind it."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar, get
from litestar.testing import TestClient

from stream.answers import Wishes
from tests.workers.service import upwell
from workers.keys import OPEN, SCOPES, Keys, load_keys, new_key
from workers.limits import Buckets, Gate
from workers.processes import free_port
from workers.routes import route
from workers.server import ROUTES, build_app
from workers.service import Service
from workers.settings import ConfigError, Serve, Settings

NEEDED = {
    ("GET", "/v1/users/u1/recommendations"): "read",
    ("POST", "/v1/recommendations"): "read",
    ("GET", "/v1/items/i1/similar"): "read",
    ("GET", "/v1/stream?user=u1"): "read",
    ("GET", "/v1/items"): "read",
    ("GET", "/v1/figures"): "read",
    ("GET", "/v1/users"): "admin",
    ("GET", "/v1/users/u1"): "admin",
    ("DELETE", "/v1/users/" + "u" * 257): "admin",
    ("GET", "/v1/erasures/unknown"): "admin",
    ("POST", "/v1/events"): "ingest",
    ("POST", "/v1/items"): "ingest",
    ("GET", "/metrics"): "metrics",
}


class Still(Service):
    """Nothing is followed, and no event goes anywhere."""

    async def start(self) -> None:
        self.taken: list[Any] = []

    async def stop(self) -> None:
        self.sending.shutdown()


@contextmanager
def client(keys: Keys, **serve: Any) -> Iterator[TestClient[Litestar]]:
    with TestClient(build_app(Still(Settings(serve=Serve(**serve))), keys), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def of() -> dict[str, str]:
    return {scope: new_key(scope, [scope])[0] for scope in SCOPES}


@pytest.fixture
def file(of: dict[str, str], tmp_path: Path) -> Path:
    from hashlib import sha256

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
                if scope == needed == "read" and "stream" in path:
                    continue  # it would not end
                status = api.request(method, path, headers={"Authorization": f"Bearer {key}"}).status_code
                assert (status == 403) == (scope != needed) and status != 401, (path, scope)
        assert api.get("/livez").status_code == 200
        assert api.get("/schema/openapi.json").status_code == 200
        assert api.get("/").status_code == 200


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


def test_too_much_at_once_is_refused_and_what_takes_too_long_is_ended() -> None:
    released = asyncio.Event()

    @get("/slow", **route("read"))
    async def slow() -> str:
        await released.wait()
        return "done"

    async def at_once() -> None:
        gate = Gate(Serve(max_requests=2, timeout_s=0.5, wait_s=0.1), OPEN)
        app = Litestar([slow], middleware=[gate])
        from httpx import ASGITransport, AsyncClient

        async with AsyncClient(transport=ASGITransport(app), base_url="http://x") as api:  # type: ignore[arg-type]
            first = [asyncio.create_task(api.get("/slow")) for _ in range(2)]
            await asyncio.sleep(0.1)
            third = await api.get("/slow")
            assert (third.status_code, third.headers["Retry-After"]) == (503, "1")
            for late in await asyncio.gather(*first):
                assert late.status_code == 503 and "within 0.5 s" in late.json()["detail"]
            released.set()
            assert (await api.get("/slow")).status_code == 200

    asyncio.run(at_once())


def test_headers_and_origins() -> None:
    with client(OPEN, cors_origins=["https://shop.example"]) as api:
        for path in ("/livez", "/v1/items", "/nowhere", "/v1/items?limit=0"):
            headers = api.get(path, headers={"Origin": "https://shop.example"}).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "unsafe" not in headers["content-security-policy"]
        assert headers["access-control-allow-origin"] == "https://shop.example"
    with client(OPEN) as api:
        assert "access-control-allow-origin" not in api.get("/livez", headers={"Origin": "https://x.example"}).headers


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
        for body, name in (({"k": 0}, "k"), ({"texts": ""}, "texts"), ({"history": [{}]}, "item_id")):
            answer = api.post("/v1/recommendations", json=body)
            assert answer.status_code == 400 and name in answer.json()["detail"], answer.json()
        good = api.get("/v1/users/u1/recommendations?k=5&diversity=0.5&categories=a&categories=b&explain=true")
        assert (good.status_code, good.json()["detail"]) == (503, "no generation serves yet")
        assert good.headers["Retry-After"] == "1"


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
