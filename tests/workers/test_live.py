"""Which generation serves and which is kept beside it, whatever is announced and whatever dies."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.manifest import DamagedGeneration, MissingGeneration
from model.model import Model
from stream.events import Artifact, ItemVector, encode
from tests.workers.service import until
from workers import live as live_module
from workers.live import Live, NotReady
from workers.search import SearchProcessDied, SearchProcessKilled
from workers.service import Service
from workers.settings import Serve, Settings
from workers.snapshot import Snapshot


def generation(number: int) -> Artifact:
    return Artifact(name=f"g{number}", url="u", manifest_sha256=f"of g{number}", created_ms=number, encoder="e")


class Loaded(SimpleNamespace):
    """A snapshot whose search process is closed or dead, or not."""

    def __init__(self, announced: Artifact) -> None:
        search = SimpleNamespace(closed=False, num_bytes=1)
        search.close = lambda: setattr(search, "closed", True)
        super().__init__(announced=announced, name=announced.name, search=search, num_indexed=1, fresh=(), of=None)

    def renewed(self, catalogue: Any) -> "Loaded":
        other = Loaded(self.announced)
        other.search, other.of = self.search, catalogue
        return other


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Keeps the generation before, as the worker does; loading is left out."""
    live: Any = Live(Settings(), keep_previous=True)
    live.loads, live._moved = [], False

    def load(announced: Artifact) -> Loaded:
        live.loads.append(announced.name)
        return Loaded(announced)

    monkeypatch.setattr(live, "_load", load)
    return live


def test_an_end_does_not_wait_for_a_download(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store that does not answer: whoever sent SIGTERM sends SIGKILL after 30 s."""
    monkeypatch.setattr(live_module, "STOP_S", 0.1)
    goes_on = threading.Event()
    live._thread = threading.Thread(target=goes_on.wait, daemon=True)
    live.start()
    announce(live, 1)
    live.stop()
    assert live._thread.is_alive() and live.snapshot.search.closed
    goes_on.set()
    live._thread.join()


def announce(live: Any, *numbers: int) -> None:
    for number in numbers:
        live._announcements.generations.pop(f"g{number}", None)
        live._announcements.generations[f"g{number}"] = generation(number)
        live._serve_wanted()


def names(live: Any) -> tuple[str | None, ...]:
    return tuple(one and one.name for one in (live.snapshot, live.previous))


def test_one_dead_search_process_is_replaced_once_and_keeps_the_trial(live: Any) -> None:
    announce(live, 1, 2)
    assert names(live) == ("g2", "g1")
    dead, asked = live.snapshot, threading.Semaphore(0)

    def ask(snapshot: Loaded) -> str:
        if snapshot is dead:
            asked.release()
            raise SearchProcessDied("dead")
        return str(snapshot.name)

    def slow_load(announced: Artifact) -> Any:
        for _ in range(3):  # the caller finds it dead again and again meanwhile
            assert asked.acquire(timeout=20)
        return load(announced)

    load, live._load = live._load, slow_load
    with ThreadPoolExecutor(1) as caller:
        answer = caller.submit(live.use, ask)
        assert asked.acquire(timeout=20)
        until(lambda: live.due, "it is found dead")
        live._serve_wanted()
        assert answer.result(timeout=20)[1] == "g2"
    assert live.loads == ["g1", "g2", "g2"] and dead.search.closed and not live.due
    assert names(live) == ("g2", "g1") and not live.previous.search.closed


def test_both_sides_of_a_trial_have_the_items_of_now(live: Any) -> None:
    announce(live, 1, 2)
    live._renew(live.snapshot)
    assert names(live) == ("g2", "g1") and live.snapshot.of is live.previous.of is live.catalogue


def test_what_is_released_while_its_items_are_renewed_does_not_come_back(live: Any) -> None:
    announce(live, 1, 2)
    old = live.previous

    def slowly(catalogue: Any) -> Loaded:
        live.release_previous()
        return Loaded.renewed(old, catalogue)

    old.renewed = slowly
    live._renew(live.snapshot)
    assert names(live) == ("g2", None) and old.search.closed


@pytest.mark.parametrize(("item_id", "renewed"), [("fresh", True), ("own", False)])
def test_a_corrected_text_is_taken_up_where_the_generation_has_none(live: Any, item_id: str, renewed: bool) -> None:
    """The item kept its old place in the lists until something else changed."""
    announce(live, 1)
    live.snapshot.own = {"own": 0}
    for text in (b"aa", b"bb"):
        live._stale = False
        vector = ItemVector(item_id=item_id, encoder="e", text_hash="", vector=text)
        topic = live._topics.vectors.name
        live._take(SimpleNamespace(topic=topic, key=item_id.encode(), value=encode(vector), offset=0))
        assert live._stale == renewed


def test_what_is_pinned_is_not_on_trial(live: Any) -> None:
    announce(live, 1)
    live._announcements.pinned = generation(2)
    live._serve_wanted()
    assert names(live) == ("g2", None)


def test_what_is_rolled_back_to_is_not_on_trial(live: Any) -> None:
    """Against the one that was taken back it would lose, perhaps, and bring it back."""
    announce(live, 1, 2)
    taken_back = live.snapshot
    announce(live, 1)
    assert names(live) == ("g1", None) and taken_back.search.closed
    announce(live, 3)
    assert names(live) == ("g3", "g1")


def failing(live: Any, monkeypatch: pytest.MonkeyPatch, *errors: Exception) -> None:
    """The next loads raise these."""
    load, left = live._load, list(errors)

    def one(announced: Any) -> Any:
        if left:
            live.loads.append(announced.name)
            raise left.pop(0)
        return load(announced)

    monkeypatch.setattr(live, "_load", one)


def test_what_was_refused_is_not_loaded_again(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each load reads all of it: the next announcement, of another one, would begin with the bad one again."""
    announce(live, 1)
    failing(live, monkeypatch, DamagedGeneration("bad"))
    announce(live, 2)
    live._serve_wanted()
    assert live.loads == ["g1", "g2"] and names(live) == ("g1", None)
    assert live.wanted == "g1"  # the bad one is no reason to keep one that loses its trial
    live._announcements.generations["g3"] = generation(3)
    assert live.wanted == "g3"


@pytest.mark.parametrize(
    "error", [OSError("away"), MissingGeneration("not mounted"), SearchProcessKilled("ended by SIGKILL")]
)
def test_a_store_out_of_reach_is_asked_again_after_a_while(
    live: Any, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing of the generation: which is served as soon as the store is back, and not asked for in a loop."""
    announce(live, 1)
    failing(live, monkeypatch, error)
    now = [1000.0]
    monkeypatch.setattr("workers.live.time.monotonic", lambda: now[0])
    announce(live, 2)
    assert names(live) == ("g1", None) and not live.due
    now[0] += live_module.RETRY_S + 1
    assert live.due
    live._serve_wanted()
    assert names(live) == ("g2", "g1") and not live.due


def test_a_generation_that_hangs_on_load_takes_a_tenth_of_the_time(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next announcement is not kept waiting: fresh items and it come in by the same thread."""
    now = [1000.0]
    monkeypatch.setattr("workers.live.time.monotonic", lambda: now[0])
    announce(live, 1)
    load = live._load

    def hangs(announced: Artifact) -> Any:
        if announced.name != "g2":
            return load(announced)
        live.loads.append(announced.name)
        now[0] += 60
        raise OSError("no answer in time")

    monkeypatch.setattr(live, "_load", hangs)
    announce(live, 2)
    now[0] += 500
    live._serve_wanted()
    assert live.loads == ["g1", "g2"] and not live.due
    now[0] += 50
    assert live.due
    live._serve_wanted()
    assert live.loads == ["g1", "g2", "g2"] and names(live) == ("g1", None)
    announce(live, 3)
    assert names(live) == ("g3", "g1")


def test_where_nothing_serves_it_is_tried_again_soon(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("workers.live.time.monotonic", lambda: now[0])

    def hangs(announced: Artifact) -> Any:
        now[0] += 60
        raise OSError("no answer in time")

    load, live._load = live._load, hangs
    announce(live, 1)
    assert not live.due
    now[0] += live_module.RETRY_S + 1
    assert live.due
    live._load = load
    live._serve_wanted()
    assert names(live) == ("g1", None) and not live.due


def test_a_role_without_a_trial_keeps_no_second_generation(live: Any) -> None:
    live._keep_previous = False
    announce(live, 1)
    before = live.snapshot
    announce(live, 2)
    assert names(live) == ("g2", None) and before.search.closed


def test_a_search_that_never_comes_back_is_said_to_be_away(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_module, "RESTART_S", 0.1)
    announce(live, 1)

    def dead(_: Loaded) -> None:
        raise SearchProcessDied("dead")

    with pytest.raises(NotReady, match="search of g1: dead"):
        live.use(dead)


def test_a_generation_that_cannot_be_used_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Search:
        def __init__(self, *_: Any) -> None: ...

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(live_module, "SearchProcess", Search)
    monkeypatch.setattr(live_module, "fetch", lambda *_, **__: Path("nowhere"))
    made: Any = Live(Settings())
    assert not made._swap(generation(1)) and closed == [True]


def test_users_are_embedded_on_the_device_of_the_role(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(live_module, "SearchProcess", lambda *_: SimpleNamespace())
    monkeypatch.setattr(live_module, "fetch", lambda *_, **__: Path("g1"))
    monkeypatch.setattr(Model, "load", lambda *asked: loaded.append(asked))
    monkeypatch.setattr(Snapshot, "of", lambda *_: SimpleNamespace(recommend=lambda *_: None))
    Service(Settings(serve=Serve(device="cuda"))).live._load(generation(1))
    Live(Settings())._load(generation(1))
    assert loaded == [(Path("g1/model"), "cuda"), (Path("g1/model"), "cpu")]
