"""The generation that serves now: taken in beside the old one, then one assignment.

upwell.generations -> fetch, verify -> search process (probes) -> Snapshot -> swap -> old one drained, closed
upwell.items, upwell.vectors -> fresh items: searched exactly beside the sealed index
"""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import structlog

from model.generation import fetch
from model.manifest import DamagedGeneration, MissingGeneration
from model.model import Model
from stream.consumer import tail
from stream.events import Artifact, BadEvent, Item, ItemVector, Ranked, decode_item
from workers import metrics
from workers.announcements import Announcements
from workers.catalogue import Catalogue
from workers.processes import settle
from workers.search import GenerationRefused, SearchProcess, SearchProcessDied, SearchProcessKilled
from workers.settings import Settings
from workers.snapshot import Query, Snapshot

log = structlog.get_logger()
T = TypeVar("T")

FRESH_INTERVAL_S = 0.5  # new items join in groups: each joining copies the item arrays
RETRY_S = 5.0
PAUSE = 9  # times what a try in vain took: no more than a tenth of the time is lost to it, in which fresh items wait
STOP_S = 2.0  # its thread looks up every 0.2 s, but for a download, which ends with the process
RESTART_S = 15.0  # a search process starts within a second or two; a large index takes longer


class NotReady(RuntimeError):
    """There is nothing to answer from yet: 503, not a failure."""

    retry_s = 1


class Live:
    """Follows the announcements in a thread of its own; `snapshot` is the generation to use for one answer."""

    def __init__(self, settings: Settings, keep_previous: bool = False, device: str = "cpu") -> None:
        self.snapshot: Snapshot | None = None
        self.catalogue = Catalogue()
        self._settings, self._topics, self._keep_previous = settings, settings.topics, keep_previous
        self._device = device  # that embeds users; the search process knows none
        self.previous: Snapshot | None = None  # kept beside for the trial of the new one
        self._announcements = Announcements()
        self._refused: set[str] = set()  # SHA-256 of manifests that could not be served
        self._moved = False  # there has been an announcement since the last swap
        self._not_before: dict[str, float] = {}  # SHA-256 -> monotonic time of the next try, after one in vain
        self._dead: SearchProcess | None = None  # has died of itself
        self._stale = False  # the fresh items or the hidden ones have changed since the snapshot
        self._stop, self.caught_up, self._releasing = threading.Event(), threading.Event(), threading.Lock()
        self.looked = threading.Event()  # what was announced at the start serves now, if it can
        self._thread = threading.Thread(target=self._follow, name="live", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(STOP_S)
        for snapshot in (self.snapshot, self.previous):
            if snapshot is not None:
                snapshot.search.close()

    def recommend(self, queries: Sequence[Query], k: int, explain: bool = False) -> tuple[Snapshot, list[list[Ranked]]]:
        """Lists and the one generation they come from. Raises NotReady."""
        return self.use(lambda snapshot: snapshot.recommend(queries, k, explain))

    def use(self, ask: Callable[[Snapshot], T]) -> tuple[Snapshot, T]:
        """What the serving generation answers, and which one it is. Raises NotReady before the first one serves.

        A caller that picked the old generation just before a swap finds its search closed and asks the new
        one; when a search process dies of itself, the caller waits while its successor starts.
        """
        deadline = time.monotonic() + RESTART_S
        while (snapshot := self.snapshot) is not None:
            try:
                return snapshot, ask(snapshot)
            except SearchProcessDied as error:
                if time.monotonic() > deadline:
                    raise NotReady(f"search of {snapshot.name}: {error}") from error
                if self.snapshot is snapshot:
                    self._dead = snapshot.search
                    time.sleep(0.05)
        raise NotReady("no generation serves yet")

    def release_previous(self) -> None:
        """The generation before the serving one is needed no more."""
        with self._releasing:
            previous, self.previous = self.previous, None
        if previous is not None:
            previous.search.close()

    def _follow(self) -> None:
        topics, refreshed = self._topics, 0.0
        names = [topics.generations.name, topics.vectors.name, topics.items.name]
        for records in tail(self._settings.connection, names, self._stop, self._caught_up):
            for record in records:
                self._take(record)
            if self.caught_up.is_set():
                if self.due:
                    self._serve_wanted()
                self.looked.set()
            if self._stale and self.snapshot and time.monotonic() - refreshed > FRESH_INTERVAL_S:
                self._stale, refreshed = False, time.monotonic()
                self._renew(self.snapshot)

    def _renew(self, serving: Snapshot) -> None:
        """The items as they are now, for both sides of a trial."""
        self.snapshot, old = serving.renewed(self.catalogue), self.previous
        self._gauge(self.snapshot)
        if old is not None:
            renewed = old.renewed(self.catalogue)
            with self._releasing:
                if self.previous is old:  # the worker has not released it meanwhile
                    self.previous = renewed

    def _caught_up(self) -> None:
        settle()  # without it a full round goes through the catalogue: 65 ms for 100,000 items
        self.caught_up.set()

    def _take(self, record: Any) -> None:
        key, value = record.key, record.value
        try:
            if record.topic == self._topics.generations.name:
                self._announcements.take((key or b"").decode(errors="replace"), value)
                self._moved = True
            elif record.topic == self._topics.vectors.name:
                item_id, vector = decode_item(value, key, ItemVector)
                changed, serving = self.catalogue.take_vector(item_id, vector), self.snapshot
                # The generation's own items keep its text until the next one.
                self._stale |= changed and (serving is None or item_id not in serving.own)
            else:
                self._stale |= self.catalogue.take_item(*decode_item(value, key, Item))
        except BadEvent as error:
            log.warning("record passed over", topic=record.topic, offset=record.offset, cause=str(error))

    def _serve_wanted(self) -> None:
        """Swap to the first of the wanted generations that can be served: none that was refused, none twice."""
        now, self._moved = time.monotonic(), False
        self._not_before = {sha256: at for sha256, at in self._not_before.items() if now <= at}
        for announced in self._announcements.wanted():
            if self.snapshot is not None and self.snapshot.announced == announced and not self.search_died:
                return
            if announced.manifest_sha256 not in self._refused | self._not_before.keys() and self._swap(announced):
                return

    @property
    def wanted(self) -> str | None:
        """Name of the generation that is to serve, though it may not yet: of those not refused the first."""
        usable = (one.name for one in self._announcements.wanted() if one.manifest_sha256 not in self._refused)
        return next(usable, None)

    @property
    def due(self) -> bool:
        """Whether another generation may be wanted, or the one that serves has to be loaded anew."""
        return self.search_died or self._moved or time.monotonic() > min(self._not_before.values(), default=math.inf)

    @property
    def search_died(self) -> bool:
        """Until its successor serves, callers wait, and are told NotReady in the end."""
        return self.snapshot is not None and self.snapshot.search is self._dead

    def _swap(self, announced: Artifact) -> bool:
        """Verify and load beside the serving generation, then move one reference; a bad one changes nothing."""
        began, old = time.monotonic(), self.snapshot
        try:
            new = self._load(announced)
        except (OSError, MissingGeneration, SearchProcessKilled) as error:  # says nothing about the generation
            now, serving = time.monotonic(), old is not None and not self.search_died
            pause_s = max(RETRY_S, PAUSE * (now - began)) if serving else RETRY_S
            self._not_before[announced.manifest_sha256] = now + pause_s
            log.warning("generation not loaded", generation=announced.name, reason=str(error), again_s=round(pause_s))
            return False
        except (DamagedGeneration, GenerationRefused, SearchProcessDied, ValueError) as error:
            self._refused.add(announced.manifest_sha256)
            metrics.swaps.labels("refused").inc()
            log.warning("generation refused", generation=announced.name, reason=str(error))
            return False
        self.snapshot = new  # what is stale stays so: the one before is renewed with it
        if old is not None and old.search is self._dead:
            old.search.close()  # its successor is on trial against the same one as before
        else:
            self.previous = old
        metrics.swaps.labels("served").inc()
        metrics.swap_s.observe(time.monotonic() - began)
        self._gauge(new)
        log.info("generation serves", generation=announced.name, items=new.num_indexed, fresh=len(new.fresh))
        back = old is not None and announced.created_ms < old.announced.created_ms
        if not self._keep_previous or back or announced == self._announcements.pinned:
            self.release_previous()  # neither what is rolled back to nor what is pinned is on trial: it has to serve
        return True

    def _load(self, announced: Artifact) -> Snapshot:
        cache, sha256 = self._settings.cache / "generations", announced.manifest_sha256
        # The search process verifies all of it, too: twice only where a damaged one would end a trial.
        folder = fetch(announced.url, cache, sha256, verified=self.previous is not None)
        if not self.search_died:
            self.release_previous()  # two are in memory at most
        search = SearchProcess(folder, sha256)
        try:
            snapshot = Snapshot.of(announced, search, Model.load(folder / "model", self._device), self.catalogue)
            snapshot.recommend([Query((), b"", 0)], 1)  # the first call is the slowest: not one that somebody waits for
            return snapshot
        except BaseException:
            search.close()
            raise

    def _gauge(self, snapshot: Snapshot) -> None:
        metrics.generation.clear()
        metrics.generation.labels(snapshot.name).set(1)
        metrics.generation_created_s.set(snapshot.announced.created_ms / 1000)
        metrics.generation_bytes.set(snapshot.search.num_bytes)
        metrics.generation_items.labels("indexed").set(snapshot.num_indexed)
        metrics.generation_items.labels("fresh").set(len(snapshot.fresh))
