"""The generation that serves now: taken in beside the old one, then one assignment.

upwell.generations -> fetch, verify -> search process (probes) -> Snapshot -> swap -> old one drained, closed
upwell.items, upwell.vectors -> fresh items: searched exactly beside the sealed index
"""

import threading
import time
from collections.abc import Sequence
from typing import Any

import structlog

from model.generation import DamagedGeneration, fetch
from model.model import Model
from stream.consumer import tail
from stream.events import Artifact, BadEvent, Item, ItemVector, Ranked, decode
from workers import metrics
from workers.search import GenerationRefused, SearchProcess, SearchProcessDied
from workers.settings import Settings
from workers.snapshot import Catalogue, Query, Snapshot

log = structlog.get_logger()

FRESH_INTERVAL_S = 0.5  # new items join in groups: each joining copies the item arrays
RESTART_S = 15.0  # a search process starts within a second or two; a large index takes longer


class NotReady(RuntimeError):
    """There is nothing to answer from yet: 503, not a failure."""


class Live:
    """Follows the announcements in a thread of its own; `snapshot` is the generation to use for one answer."""

    def __init__(self, settings: Settings) -> None:
        self.snapshot: Snapshot | None = None
        self.catalogue = Catalogue()
        self._settings, self._topics = settings, settings.topics
        self._announced: list[Artifact] = []  # not tried yet, oldest first
        self._restart = False  # the search process has died
        self._stale = False  # the fresh items or the hidden ones have changed since the snapshot
        self._stop, self.caught_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="live", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if self.snapshot is not None:
            self.snapshot.search.close()

    @property
    def ready(self) -> bool:
        return self.snapshot is not None and self.caught_up.is_set()

    def recommend(self, queries: Sequence[Query], k: int) -> tuple[Snapshot, list[list[Ranked]]]:
        """Lists and the one generation they come from. Raises NotReady before the first generation serves.

        A caller that picked the old generation just before a swap finds its search closed and asks the new
        one; when a search process dies of itself, the caller waits while its successor starts.
        """
        deadline = time.monotonic() + RESTART_S
        while (snapshot := self.snapshot) is not None:
            try:
                return snapshot, snapshot.recommend(queries, k)
            except SearchProcessDied as error:
                if time.monotonic() > deadline:
                    raise NotReady(f"search of {snapshot.name}: {error}") from error
                if self.snapshot is snapshot:
                    self._restart = True
                    time.sleep(0.05)
        raise NotReady("no generation serves yet")

    def _follow(self) -> None:
        topics, refreshed = self._topics, 0.0
        names = [topics.generations.name, topics.vectors.name, topics.items.name]
        for records in tail(self._settings.connection, names, self._stop, self.caught_up.set):
            for record in records:
                self._take(record)
            if self.caught_up.is_set():
                self._swap_to_newest()
            if self._stale and self.snapshot and time.monotonic() - refreshed > FRESH_INTERVAL_S:
                self._stale, refreshed = False, time.monotonic()
                old = self.snapshot
                self.snapshot = Snapshot.of(old.announced, old.search, old.indexed, self.catalogue)
                self._gauge(self.snapshot)

    def _take(self, record: Any) -> None:
        key, value = record.key.decode(), record.value
        try:
            if record.topic == self._topics.generations.name:
                self._announced += [decode(value, Artifact)] if value is not None else []
            elif record.topic == self._topics.vectors.name:
                self._stale |= self.catalogue.take_vector(key, decode(value, ItemVector) if value is not None else None)
            else:
                self._stale |= self.catalogue.take_item(key, decode(value, Item) if value is not None else None)
        except BadEvent as error:
            log.warning("record passed over", topic=record.topic, offset=record.offset, cause=str(error))

    def _swap_to_newest(self) -> None:
        """The newest announced generation that can be served; at a start also the ones before it."""
        if self._restart and self.snapshot and not self._announced:
            self._announced = [self.snapshot.announced]
        self._restart = False
        while self._announced:
            if self._swap(self._announced.pop()):
                self._announced.clear()

    def _swap(self, announced: Artifact) -> bool:
        """Verify and load beside the serving generation, then move one reference; a bad one changes nothing."""
        began = time.monotonic()
        try:
            new = self._load(announced)
        except (DamagedGeneration, GenerationRefused, ValueError, OSError) as error:
            metrics.swaps.labels("refused").inc()
            log.warning("generation refused", generation=announced.name, reason=str(error))
            return False
        old, self.snapshot, self._stale = self.snapshot, new, False
        metrics.swaps.labels("served").inc()
        metrics.swap_s.observe(time.monotonic() - began)
        self._gauge(new)
        log.info("generation serves", generation=announced.name, items=new.num_indexed, fresh=len(new.fresh))
        if old is not None:
            old.search.close()
        return True

    def _load(self, announced: Artifact) -> Snapshot:
        folder = fetch(announced.url, self._settings.cache / "generations", announced.manifest_sha256)
        model = Model.load(folder / "model")
        search = SearchProcess(folder, announced.manifest_sha256)
        try:
            return Snapshot.of(announced, search, model, self.catalogue)
        except BaseException:
            search.close()
            raise

    def _gauge(self, snapshot: Snapshot) -> None:
        metrics.generation.clear()
        metrics.generation.labels(snapshot.name).set(1)
        metrics.generation_created_s.set(snapshot.announced.created_ms / 1000)
        metrics.generation_items.labels("indexed").set(snapshot.num_indexed)
        metrics.generation_items.labels("fresh").set(len(snapshot.fresh))
