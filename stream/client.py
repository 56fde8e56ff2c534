"""The HTTP API for Python programs: typed answers, clear errors, patience with a service that starts or is busy.

ApiError(RuntimeError)     the request was refused
  Unavailable              nobody was there to take it
"""

import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx
import msgspec

from stream.answers import (
    Answer,
    Delivered,
    Erased,
    EventIn,
    Guest,
    ItemOut,
    ItemsOut,
    Receipt,
    Similar,
    Status,
    Ticket,
    Update,
    UserOut,
)
from stream.closing import Closing
from stream.events import Item

BUSY = (429, 502, 503, 504)  # 502, 504: a proxy before a server that starts
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
REQUEST_ENTRIES, REQUEST_BYTES = 1000, 1_000_000  # within the defaults of serve.max_batch and serve.max_body_bytes
LOOPBACK = re.compile(r"(.+\.)?localhost|127(\.\d+){3}|::1")
SILENCE_S = 40.0  # an open stream says something every 15 s


class ApiError(RuntimeError):
    """The service has refused the request: its own words, and `status`, that of HTTP."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class Unavailable(ApiError):
    """Out of reach (`status` 0), or busy or starting (429, 502, 503, 504), until `patience_s` was over."""


T = TypeVar("T")


class Rules(TypedDict, total=False):
    """What may stand in a list, and how it is chosen: as the API's parameters of these names."""

    categories: list[str]
    exclude: list[str]
    available_only: bool
    max_age: int
    diversity: float
    explore: float


class UserRules(Rules, total=False):
    """The same, and what only a user's list can be asked."""

    exclude_seen: bool
    min_offset: int
    explain: bool


class Client(Closing):
    """A context manager; one a thread. `timeout_s`: for an answer; `patience_s`: how long a request is tried again.

    `key`: as a file holds it, with or without a line end. Raises ValueError for one that no header can carry, and for a
    URL without http:// or https://. Every call raises ApiError for what is refused (400 a wrong value, 401 no valid
    key, 403 a key that may not, 404 where said below) and, but for `updates`, Unavailable when patience ends.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout_s: float = 10.0, patience_s: float = 30.0) -> None:
        key, base_url = (key or "").strip(), httpx.URL(url.rstrip("/"))
        if not (key.isascii() and key.isprintable()):
            raise ValueError("key: not one line of ASCII")  # httpx would say it, with the key in its words
        if base_url.scheme not in ("http", "https"):
            raise ValueError(f"url: {url}: neither http:// nor https://")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        near = LOOPBACK.fullmatch(base_url.host) is not None  # no proxy of the environment's leads there
        mounts = dict.fromkeys(("http://", "https://", "all://")) if near else None
        self._open = partial(httpx.Client, base_url=base_url, headers=headers, timeout=timeout_s, mounts=mounts)
        self._opened, self._pid = self._open(), os.getpid()
        self._timeout_s, self._patience_s = timeout_s, patience_s

    def recommendations(self, user_id: str, k: int = 20, **rules: Unpack[UserRules]) -> Answer:
        """The user's k best items now."""
        return self._get(f"/v1/users/{_segment(user_id)}/recommendations", Answer, k=k, **rules)

    def recommend(self, guest: Guest) -> Answer:
        """For a guest, of whom nothing is stored."""
        return self._call("POST", "/v1/recommendations", Answer, content=msgspec.json.encode(guest))

    def similar(self, item_id: str, k: int = 20, **rules: Unpack[Rules]) -> Similar:
        """The k items that go best with this one. Raises ApiError 404 where the serving generation does not know it."""
        return self._get(f"/v1/items/{_segment(item_id)}/similar", Similar, k=k, **rules)

    def items(self, q: str = "", limit: int = 50) -> list[ItemOut]:
        """Items of the catalogue with `q` in title or id, whatever the case; `limit` at most, 200 at most."""
        return self._get("/v1/items", ItemsOut, limit=limit, **({"q": q} if q else {})).items

    def user(self, user_id: str) -> UserOut:
        """What is kept of a user, in readable form. Raises ApiError 404 where that is nothing."""
        return self._get(f"/v1/users/{_segment(user_id)}", UserOut)

    def send(self, *clicks: EventIn) -> Receipt:
        """In Kafka when this returns, but for those in `rejected`; many of them in several requests.

        Raises ApiError 400 where all of a request are refused: what was in the requests before it is sent.
        """
        named = [msgspec.structs.replace(click, event_id=click.event_id or uuid.uuid4().hex) for click in clicks]
        return self._post("/v1/events", named)  # safe to try again: named

    def send_items(self, *items: Item) -> Receipt:
        """Adds items or replaces them; answers and raises as `send`."""
        return self._post("/v1/items", items)

    def remove_item(self, item_id: str) -> Delivered:
        """Takes an item out of the catalogue, known or not: no list shows it again."""
        return self._call("DELETE", f"/v1/items/{_segment(item_id)}", Delivered)

    def forget(self, user_id: str) -> Erased:
        """Erases a user; keep the receipt, not the id."""
        return self._call("DELETE", f"/v1/users/{_segment(user_id)}", Erased)

    def erasure(self, receipt: str) -> Erased:
        """Where an erasure stands. Raises ApiError 404 for a receipt of none."""
        return self._get(f"/v1/erasures/{_segment(receipt)}", Erased)

    def updates(self, user_id: str) -> Iterator[Update | Status]:
        """The user's lists as they change, for ever: what breaks is opened again. Raises ApiError for a refusal."""
        last_id, pause_s = "", FIRST_PAUSE_S
        while True:
            try:
                headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
                timeout = httpx.Timeout(self._timeout_s, read=SILENCE_S)
                asked = {"user": user_id}
                with self._http.stream("GET", "/v1/stream", params=asked, headers=headers, timeout=timeout) as answer:
                    if answer.status_code not in BUSY:
                        _check(answer)
                        for name, data, event_id in _events(answer):
                            last_id, pause_s = event_id or last_id, FIRST_PAUSE_S
                            if name in KINDS:
                                yield msgspec.json.decode(data, type=KINDS[name])
            except httpx.TransportError:
                pass
            yield Status(connected=False, generation=None)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def ticket(self, user_id: str) -> Ticket:
        """For a page of yours that follows this user's stream by EventSource and must not hold the key."""
        return self._call("POST", "/v1/stream/tickets", Ticket, params={"user": user_id})

    def close(self) -> None:
        """Closes the connections: nothing can be asked after it."""
        self._http.close()

    @property
    def _http(self) -> httpx.Client:
        """Of this process: on the connections of its parent a forked child would read answers that are not its own."""
        if self._pid != os.getpid():
            self._opened, self._pid = self._open(), os.getpid()
        return self._opened

    def _post(self, path: str, entries: Sequence[EventIn] | Sequence[Item]) -> Receipt:
        whole = Receipt(0, [], [])
        for first, content in _requests(entries):
            part = self._call("POST", path, Receipt, content=content)
            for refused in part.rejected:
                refused.index += first
            for delivered in part.results:
                delivered.index += first
            whole.accepted += part.accepted
            whole.rejected += part.rejected
            whole.results += part.results
        return whole

    def _get(self, path: str, kind: type[T], **query: Any) -> T:
        return self._call("GET", path, kind, params=query)

    def _call(self, method: str, path: str, kind: type[T], **options: Any) -> T:
        headers = {"Content-Type": "application/json"} if "content" in options else {}
        deadline, pause_s = time.monotonic() + self._patience_s, FIRST_PAUSE_S
        while True:
            try:
                answer = self._http.request(method, path, headers=headers, **options)
                failure = Unavailable(answer.status_code, _detail(answer)) if answer.status_code in BUSY else None
                asked_s = answer.headers.get("Retry-After", "")
            except httpx.TransportError as error:
                failure, asked_s = Unavailable(0, f"{self._http.base_url}: {error}"), ""
            if failure is None:
                _check(answer)
                return msgspec.json.decode(answer.content, type=kind)
            wait_s = float(asked_s) if asked_s.isdigit() else pause_s
            if time.monotonic() + wait_s > deadline:
                raise failure
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


KINDS: dict[str, type[Update] | type[Status]] = {"recommendations": Update, "status": Status}


def _segment(identifier: str) -> str:
    """An id in a path. httpx resolves `.` and `..`, and one without a character names another route."""
    if not identifier:
        raise ApiError(400, "an id is empty")
    return quote(identifier, safe="") if identifier.strip(".") else identifier.replace(".", "%2E")


def _requests(entries: Sequence[EventIn] | Sequence[Item]) -> Iterator[tuple[int, bytes]]:
    """Bodies that a server takes by default, each with the number of its first entry."""
    first, held, size = 0, list[bytes](), 0
    for raw in map(msgspec.json.encode, entries):
        if held and (len(held) == REQUEST_ENTRIES or size + len(raw) > REQUEST_BYTES):
            yield first, b"[%b]" % b",".join(held)
            first, held, size = first + len(held), [], 0
        held.append(raw)
        size += len(raw) + 1
    if held:
        yield first, b"[%b]" % b",".join(held)


def _check(answer: httpx.Response) -> None:
    if not answer.is_success:  # a redirect is followed by nobody
        answer.read()
        raise ApiError(answer.status_code, _detail(answer))


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.reason_phrase


def _events(answer: httpx.Response) -> Iterator[tuple[str, str, str]]:
    """(event, data, id) of a server-sent stream: https://html.spec.whatwg.org/multipage/server-sent-events.html."""
    fields: dict[str, list[str]] = {}
    for line in _lines(answer):
        name, _, value = line.partition(":")
        if name:
            fields.setdefault(name, []).append(value.removeprefix(" "))
        elif not line:
            if "data" in fields:
                yield fields.get("event", ["message"])[-1], "\n".join(fields["data"]), fields.get("id", [""])[-1]
            fields = {}


def _lines(answer: httpx.Response) -> Iterator[str]:
    """Ended by a line feed alone: httpx's own also end at U+2028 and others that stand in titles."""
    rest = ""
    for text in answer.iter_text():
        *lines, rest = (rest + text).split("\n")
        yield from (line.removesuffix("\r") for line in lines)
