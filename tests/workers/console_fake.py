"""The HTTP API as the console and the client see it, in one thread, with faults on demand: no Kafka, no model.

A list ranks what shares a category with the user's clicks; everything else is the contract of docs/api.
"""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Condition, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from stream.events import Item
from stream.producer import partition_of
from tests.workers.service import ITEMS

CONSOLE = Path(__file__).parents[2] / "workers" / "console"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:"
RECEIPT: dict[str, Any] = {"receipt": "3-7", "partition": 3, "offset": 7, "requested_ms": 0, "gone_by_ms": 86_400_000}
CATALOGUE = {item.item_id: item for item in ITEMS}


class Fake:
    """State and faults; `changed` guards them and wakes the streams."""

    def __init__(self) -> None:
        self.clicks: dict[str, list[str]] = {}
        self.paths: dict[str, dict[str, Any]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.events_total = self.swaps = self.refusals = 0
        self.connected, self.stale, self.key = True, False, ""
        self.tickets = set[str]()  # that have not run out
        self.requests, self.attempts, self.last_ids = 0, set[str | None](), list[str]()
        self.ahead_ms = 0  # of the browser's clock
        self.streams_closed = 0  # streams opened before the number of this close are ended
        self.changed = Condition()

    def set(self, **faults: Any) -> None:
        with self.changed:
            for name, value in faults.items():
                setattr(self, name, value)
            self.changed.notify_all()

    def close_streams(self) -> None:
        self.set(streams_closed=self.streams_closed + 1)

    def take(self, event: dict[str, Any]) -> dict[str, Any]:
        with self.changed:
            own = self.clicks.setdefault(event["user_id"], [])
            own.append(event["item_id"])
            self.bodies.append(event)
            self.events_total += 1
            now = time.time_ns() // 1_000_000 + self.ahead_ms
            place = {"partition": partition_of(event["user_id"], 8), "offset": len(own) - 1}
            stamps = {
                "clicked_ms": now,
                "updated_ms": now + 2,
                "sent_ms": now + 6,
                "published_ms": now + 7,
                "seen_ms": now + 8,
                "pushed_ms": now + 9,
            }
            self.paths[event["user_id"]] = {"event_id": event["event_id"]} | place | stamps
            self.changed.notify_all()
            return {"event_id": event["event_id"]} | place

    def answer(self, user_id: str, k: int) -> dict[str, Any]:
        clicked = self.clicks.get(user_id, [])
        place = self.paths.get(user_id, {"partition": -1, "offset": -1})
        ranked = sorted((-self.score(item, clicked), at, item) for at, item in enumerate(ITEMS))
        best = [(score, item) for score, _, item in ranked if item.item_id not in clicked][:k]
        return {
            "user_id": user_id,
            "items": [
                {
                    "item_id": item.item_id,
                    "score": -score,
                    "title": item.title,
                    "propensity": 1.0,
                    "because": self.because(item, clicked),
                    "explained": 0.72,
                }
                for score, item in best
            ],
            "generation": "g-20261125-0731",
            "source": "personal" if clicked else "popular",
            "fallback": None if clicked else "no clicks yet",
            "as_of": {"partition": place["partition"], "offset": place["offset"]},
            "age_ms": 12,
            "stale": self.stale,
            "arm": "default",
        }

    def score(self, item: Item, clicked: list[str]) -> float:
        taste = sum(0.5**age for age, other in enumerate(reversed(clicked)) if kin(other, item))
        return taste + int(item.item_id[1:]) * 37 % 101 / 1000  # an order of its own within what is alike

    def because(self, item: Item, clicked: list[str]) -> list[dict[str, Any]]:
        reasons = [other for other in reversed(clicked) if kin(other, item)][:2]
        return [{"item_id": i, "title": CATALOGUE[i].title, "share": 0.61 - 0.3 * n} for n, i in enumerate(reasons)]

    def figures(self) -> dict[str, Any]:
        now_ms = time.time_ns() // 1_000_000
        wave = (now_ms // 1000) % 7
        return {
            "now_ms": now_ms,
            "generation": {
                "name": "g-20261125-0731",
                "created_ms": now_ms - 60_000,
                "items": len(ITEMS),
                "swaps": self.swaps,
            },
            "events_total": self.events_total,
            "click_to_recommendation_ms": {"p50": 14.0 + wave, "p99": 31.0 + 3 * wave},
            "hit_rate": {"served": 0.151 + wave / 500, "popularity": 0.062},
        }


def kin(item_id: str, item: Item) -> bool:
    return CATALOGUE[item_id].categories == item.categories


class Handler(BaseHTTPRequestHandler):
    fake: Fake

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        match [unquote(part) for part in url.path.strip("/").split("/")]:
            case [""]:
                self.file("index.html")
            case ["console", *parts]:
                self.file("/".join(parts))
            case ["v1", "stream"] if query.get("ticket") in self.fake.tickets:
                self.stream(query["user"])
            case _ if not self.allowed():
                self.reply(401, {"detail": "Authorization: Bearer KEY is missing or unknown"})
            case ["v1", "users", user, "recommendations"]:
                self.reply(200, self.fake.answer(user, int(query.get("k", 20))))
            case ["v1", "users", user]:
                clicked = [CATALOGUE[item_id] for item_id in reversed(self.fake.clicks.get(user, []))]
                past = [{"item_id": item.item_id, "title": item.title, "weight": 1.0, "ts_ms": 0} for item in clicked]
                counts = {"clicks": len(past), "seen": len(past), "as_of": self.fake.answer(user, 0)["as_of"]}
                self.reply(200, {"user_id": user, "history": past, "arm": "default"} | counts)
            case ["v1", "items", item_id, "similar"] if item_id in CATALOGUE:
                like = self.fake.answer("", 20) | {"item_id": item_id}
                self.reply(200, {name: like[name] for name in ("item_id", "items", "generation")})
            case ["v1", "items"]:
                found = [item for item in ITEMS if query.get("q", "").lower() in item.title.lower()]
                page = [
                    {"item_id": i.item_id, "title": i.title, "categories": i.categories, "available": i.available}
                    for i in found[: int(query.get("limit", 50))]
                ]
                self.reply(200, {"items": page})
            case ["v1", "erasures", "3-7"]:
                self.reply(200, RECEIPT)
            case ["v1", "figures"]:
                self.reply(200, self.fake.figures())
            case ["v1", "stream"]:
                self.stream(query["user"])
            case _:
                self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "[]")
        entries = body if isinstance(body, list) else [body]
        self.fake.requests += 1
        self.fake.attempts |= {entry["event_id"] for entry in entries if "event_id" in entry}
        if not self.allowed():
            self.reply(401, {"detail": "Authorization: Bearer KEY is missing or unknown"})
        elif self.path.startswith("/v1/stream/tickets"):
            ticket = secrets.token_hex(4) if self.fake.key else ""
            self.fake.tickets.add(ticket)
            self.reply(200, {"ticket": ticket, "until_ms": 0})
        elif not self.fake.connected or self.fake.refusals > 0:
            self.fake.refusals -= 1
            self.reply(503, {"detail": "Kafka did not take the events"}, {"Retry-After": "1"})
        elif self.path == "/v1/recommendations":
            self.reply(200, self.fake.answer("", body["k"]) | {"user_id": None, "source": "session"})
        else:
            bad = [n for n, entry in enumerate(entries) if entry["item_id"] not in CATALOGUE]
            results = [self.fake.take(entry) | {"index": n} for n, entry in enumerate(entries) if n not in bad]
            rejected = [{"index": n, "cause": "item_id: unknown to the fake"} for n in bad]
            answer = {"accepted": len(results), "rejected": rejected, "results": results, "detail": "all are bad"}
            self.reply(202 if results else 400, answer)

    def do_DELETE(self) -> None:
        user = unquote(self.path.rsplit("/", 1)[-1])
        if self.path.startswith("/v1/items/"):
            self.reply(202, {"index": 0, "partition": 1, "offset": 7, "item_id": user})
            return
        with self.fake.changed:
            self.fake.clicks.pop(user, None)
            self.fake.paths.pop(user, None)
        self.reply(202, RECEIPT)

    def allowed(self) -> bool:
        return not self.fake.key or self.headers["Authorization"] == f"Bearer {self.fake.key}"

    def stream(self, user_id: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.write(": open\r\n\r\n")
        self.fake.last_ids.append(self.headers["Last-Event-ID"] or "")
        fake, opened, told, connected = self.fake, self.fake.streams_closed, self.fake.paths.get(user_id), None
        with fake.changed:
            while fake.streams_closed == opened:
                if fake.connected is not connected:
                    connected = fake.connected
                    self.event("status", {"connected": connected, "generation": "g-20261125-0731"})
                if fake.paths.get(user_id) != told:
                    told = fake.paths.get(user_id)
                    self.event("recommendations", fake.answer(user_id, 20) | {"path": told})
                fake.changed.wait(1)

    def event(self, name: str, data: dict[str, Any]) -> None:
        self.write(f"event: {name}\r\nid: {time.time_ns()}\r\ndata: {json.dumps(data)}\r\n\r\n")

    def write(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def file(self, name: str) -> None:
        path = CONSOLE / name
        if not path.is_file():
            return self.reply(404, {"detail": "Not Found"})
        return self.send(
            200, path.read_bytes(), {"Content-Type": TYPES[path.suffix], "Content-Security-Policy": POLICY}
        )

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def send(self, status: int, raw: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(raw))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def handle(self) -> None:
        try:
            super().handle()
        except (BrokenPipeError, ConnectionResetError):
            return

    def log_message(self, *_: Any) -> None:
        """Nothing: tests read answers."""


@contextmanager
def fake_api(port: int = 0) -> Iterator[tuple[Fake, str]]:
    """The fake and its URL."""
    fake = Fake()
    handler = type("FakeHandler", (Handler,), {"fake": fake})
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as http:
        http.daemon_threads = True
        thread = Thread(target=http.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield fake, f"http://127.0.0.1:{http.server_port}"
        finally:
            fake.close_streams()
            http.shutdown()
            thread.join()
