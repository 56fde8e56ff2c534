"""The generation that serves now: taken in beside the old one, then one assignment.

upwell.generations -> fetch, verify -> search process (probes) -> Snapshot -> swap -> old one drained, closed
upwell.items, upwell.vectors -> fresh items: searched exactly beside the sealed index
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray

from model.generation import DamagedGeneration, fetch
from model.model import History, Model
from model.user_state import Entry, digest, unpack
from stream.consumer import tail
from stream.events import Artifact, BadEvent, Item, ItemVector, Ranked, decode
from workers import metrics
from workers.search import GenerationRefused, SearchProcess, SearchProcessDied
from workers.settings import Settings

log = structlog.get_logger()

FRESH_INTERVAL_S = 0.5  # new items join in groups: each joining copies the item arrays
RESTART_S = 15.0  # a search process starts within a second or two; a large index takes longer


class NotReady(RuntimeError):
    """There is nothing to answer from yet: 503, not a failure."""


class Query(NamedTuple):
    """What a list is made from: a user's history, what is excluded (packed digests), and the moment."""

    history: Sequence[Entry]
    seen: bytes
    now_ms: int


@dataclass(frozen=True)
class Snapshot:
    """One generation and the items newer than it. Immutable: an answer never mixes two."""

    announced: Artifact
    indexed: Model  # the generation's own
    model: Model  # the same with the fresh items behind: rows from num_indexed on
    search: SearchProcess
    rows: dict[str, int]
    fresh: NDArray[np.float32]  # (F, D)
    digests: NDArray[np.uint64]  # (N,) sorted
    digest_rows: NDArray[np.int64]  # (N,) rows in the order of `digests`
    hidden: NDArray[np.int64]  # rows of items removed or unavailable

    @property
    def name(self) -> str:
        return self.announced.name

    @property
    def num_indexed(self) -> int:
        return len(self.indexed.ids)

    def recommend(self, queries: Sequence[Query], k: int) -> list[list[Ranked]]:
        """k items a query, best first; fewer only when fewer are eligible. Raises SearchProcessDied."""
        if not queries:
            return []
        histories = [self.history(query.history) for query in queries]
        users = self.model.user_vectors(histories, [query.now_ms for query in queries])  # (B, D)
        excluded = [self._rows_of(query.seen) for query in queries]
        indexed = [rows[rows < self.num_indexed] for rows in excluded]
        hidden = self.hidden[self.hidden < self.num_indexed]
        rows, scores = self.search.search(users, k, indexed, hidden)  # (B, k), (B, k)
        if len(self.fresh):
            rows, scores = self._merge_fresh(users, excluded, rows, scores, k)
        ids = self.model.ids
        return [
            [Ranked(ids[row], round(float(score), 5)) for row, score in zip(r, s, strict=True) if row >= 0]
            for r, s in zip(rows, scores, strict=True)
        ]

    def history(self, entries: Sequence[Entry]) -> History:
        """The entries whose items this generation knows."""
        known = [(self.rows[e.item_id], e.weight, e.ts_ms) for e in entries if e.item_id in self.rows]
        rows, weights, stamps = zip(*known, strict=True) if known else ((), (), ())
        return History(np.array(rows, np.int64), np.array(weights, np.float32), np.array(stamps, np.int64))  # (T,) each

    def _rows_of(self, seen: bytes) -> NDArray[np.int64]:
        """Rows of those packed digests that this generation knows."""
        wanted = unpack(seen)
        at = np.minimum(np.searchsorted(self.digests, wanted), len(self.digests) - 1)
        rows: NDArray[np.int64] = self.digest_rows[at[self.digests[at] == wanted]]
        return rows

    def _merge_fresh(
        self,
        users: NDArray[np.float32],
        excluded: Sequence[NDArray[np.int64]],
        rows: NDArray[np.int64],
        scores: NDArray[np.float32],
        k: int,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        fresh = users @ self.fresh.T  # (B, F)
        fresh[:, self.hidden[self.hidden >= self.num_indexed] - self.num_indexed] = -np.inf
        for query, out in enumerate(excluded):
            fresh[query, out[out >= self.num_indexed] - self.num_indexed] = -np.inf
        fresh_rows = np.arange(self.num_indexed, self.num_indexed + len(self.fresh))
        all_rows = np.concatenate([rows, np.broadcast_to(fresh_rows, fresh.shape)], axis=1)  # (B, k + F)
        all_scores = np.concatenate([scores, fresh], axis=1)
        best = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]
        scores = np.take_along_axis(all_scores, best, axis=1)
        rows = np.take_along_axis(all_rows, best, axis=1)
        return np.where(np.isneginf(scores), -1, rows), scores


class Live:
    """Follows the announcements in a thread of its own; `snapshot` is the generation to use for one answer."""

    def __init__(self, settings: Settings) -> None:
        self.snapshot: Snapshot | None = None
        self.items: dict[str, Item] = {}
        self._settings = settings
        self._text: dict[str, NDArray[np.float16]] = {}
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
        topics, refreshed = self._settings.topics, 0.0
        names = [topics.generations.name, topics.vectors.name, topics.items.name]
        for records in tail(self._settings.connection, names, self._stop, self.caught_up.set):
            for record in records:
                self._take(record, topics.generations.name, topics.vectors.name)
            if self.caught_up.is_set():
                self._swap_to_newest()
            if self._stale and self.snapshot and time.monotonic() - refreshed > FRESH_INTERVAL_S:
                self.snapshot, self._stale = self._with_fresh(self.snapshot), False
                refreshed = time.monotonic()

    def _take(self, record: Any, generations: str, vectors: str) -> None:
        try:
            if record.topic == generations:
                self._announced += [decode(record.value, Artifact)] if record.value is not None else []
            elif record.value is None:
                self.items.pop(record.key.decode(), None)
                self._stale = True
            elif record.topic == vectors:
                vector = decode(record.value, ItemVector)
                self._text[vector.item_id] = np.frombuffer(vector.vector, "<f2")  # (E,)
                self._stale |= self.snapshot is None or vector.item_id not in self.snapshot.rows
            else:
                item = decode(record.value, Item)
                known = self.items.get(item.item_id)
                self.items[item.item_id] = item
                self._stale |= known is None or known.available != item.available
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
            new = self._with_fresh(self._load(announced))
        except (DamagedGeneration, GenerationRefused, ValueError, OSError) as error:
            metrics.swaps.labels("refused").inc()
            log.warning("generation refused", generation=announced.name, reason=str(error))
            return False
        old, self.snapshot, self._stale = self.snapshot, new, False
        metrics.swaps.labels("served").inc()
        metrics.swap_s.observe(time.monotonic() - began)
        metrics.generation.clear()
        metrics.generation.labels(announced.name).set(1)
        metrics.generation_created_s.set(announced.created_ms / 1000)
        log.info("generation serves", generation=announced.name, items=new.num_indexed, fresh=len(new.fresh))
        if old is not None:
            old.search.close()
        return True

    def _load(self, announced: Artifact) -> Snapshot:
        folder = fetch(announced.url, self._settings.cache / "generations", announced.manifest_sha256)
        model = Model.load(folder / "model")
        search = SearchProcess(folder, announced.manifest_sha256)
        empty = np.empty(0, np.int64)
        return Snapshot(
            announced=announced,
            indexed=model,
            model=model,
            search=search,
            rows={},
            fresh=np.empty((0, model.dim), np.float32),
            digests=np.empty(0, np.uint64),
            digest_rows=empty,
            hidden=empty,
        )

    def _with_fresh(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the items that came after it, and without those that were removed."""
        model, known = snapshot.indexed, set(snapshot.indexed.ids)
        new = [item_id for item_id in self._text if item_id not in known and item_id in self.items]
        if new:
            model = model.extended(new, np.stack([self._text[i] for i in new]).astype(np.float32))
        keys = np.array([int.from_bytes(digest(i), "little") for i in model.ids], np.uint64)
        order = np.argsort(keys)
        hidden = [r for r, i in enumerate(model.ids) if i not in self.items or not self.items[i].available]
        metrics.generation_items.labels("indexed").set(snapshot.num_indexed)
        metrics.generation_items.labels("fresh").set(len(new))
        return replace(
            snapshot,
            model=model,
            rows={item_id: row for row, item_id in enumerate(model.ids)},
            fresh=model.item_vectors()[snapshot.num_indexed :],
            digests=keys[order],
            digest_rows=order.astype(np.int64),
            hidden=np.array(hidden, np.int64),
        )
