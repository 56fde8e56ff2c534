"""One generation as it is served: its search process, its model, and the items newer than it."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.model import History, Model
from model.user_state import Entry, digest, unpack
from stream.events import Artifact, Item, ItemVector, Ranked
from workers.search import SearchProcess


class Catalogue:
    """The items and their text vectors, as the topics have told them so far."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.vectors: dict[str, ItemVector] = {}

    def offers(self, item_id: str) -> bool:
        """Whether the item is there and available."""
        item = self.items.get(item_id)
        return item is not None and item.available

    def encoded_beside(self, known: Set[str], encoder: str) -> dict[str, NDArray[np.float32]]:
        """Text vectors (E,) of the items that are not among those known, as far as they are this encoder's."""
        return {
            item_id: np.frombuffer(vector.vector, "<f2").astype(np.float32)
            for item_id, vector in self.vectors.items()
            if item_id not in known and item_id in self.items and vector.encoder == encoder
        }

    def take_item(self, item_id: str, item: Item | None) -> bool:
        """True if this changes what may be recommended."""
        before = self.offers(item_id)
        if item is None:
            self.items.pop(item_id, None)
        else:
            self.items[item_id] = item
        return before != self.offers(item_id)

    def take_vector(self, item_id: str, vector: ItemVector | None) -> bool:
        """True if the item had none before."""
        new = item_id not in self.vectors
        if vector is None:
            self.vectors.pop(item_id, None)
        else:
            self.vectors[item_id] = vector
        return new


class Rules(NamedTuple):
    """What may stand in a list, and how it is chosen among that. Items that were removed never come."""

    categories: frozenset[str] = frozenset()  # one of them; empty: any
    exclude: frozenset[str] = frozenset()  # item ids
    exclude_seen: bool = True
    available_only: bool = True
    max_age_ms: int | None = None  # since Item.published_ms; an item without that stamp is not known to be young
    diversity: float = 0.0  # 0..1: the best, to the most different (model.rules.diversify)
    explore: float = 0.0  # 0..1: share of the places that are drawn (model.rules.explore); says the propensities
    seed: int = 0  # of the draw: another one for each list


PLAIN = Rules()


class Query(NamedTuple):
    """What a list is made from: a user's history, what is seen (packed digests), the moment, the rules."""

    history: Sequence[Entry]
    seen: bytes
    now_ms: int
    rules: Rules = PLAIN


@dataclass(frozen=True)
class Snapshot:
    """One generation and the items newer than it. Immutable: an answer never mixes two."""

    announced: Artifact
    search: SearchProcess
    indexed: Model  # the generation's own
    model: Model  # the same with the fresh items behind: rows from num_indexed on
    rows: dict[str, int]
    fresh: NDArray[np.float32]  # (F, D)
    digests: NDArray[np.uint64]  # (N,) of the item ids, sorted
    digest_rows: NDArray[np.int64]  # (N,) rows in the order of `digests`
    hidden: NDArray[np.int64]  # rows of items removed or unavailable

    @staticmethod
    def of(announced: Artifact, search: SearchProcess, indexed: Model, catalogue: Catalogue) -> "Snapshot":
        """The generation with the items that came after it, and without those that may not be recommended."""
        new = catalogue.encoded_beside(set(indexed.ids), announced.encoder)
        model = indexed.extended(list(new), np.stack(list(new.values()))) if new else indexed
        keys = np.array([int.from_bytes(digest(item_id), "little") for item_id in model.ids], np.uint64)
        order = np.argsort(keys)
        hidden = [row for row, item_id in enumerate(model.ids) if not catalogue.offers(item_id)]
        return Snapshot(
            announced=announced,
            search=search,
            indexed=indexed,
            model=model,
            rows={item_id: row for row, item_id in enumerate(model.ids)},
            fresh=model.item_vectors()[len(indexed.ids) :],
            digests=keys[order],
            digest_rows=order.astype(np.int64),
            hidden=np.array(hidden, np.int64),
        )

    @property
    def name(self) -> str:
        return self.announced.name

    @property
    def num_indexed(self) -> int:
        return len(self.indexed.ids)

    def recommend(self, queries: Sequence[Query], k: int, explain: bool = False) -> list[list[Ranked]]:
        """k items a query, best first; fewer only when fewer are eligible. Raises SearchProcessDied."""
        if not queries:
            return []
        if explain or any(query.rules != PLAIN for query in queries):
            raise NotImplementedError("rules and explanations come with the next commit")
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

    def similar(self, item_id: str, k: int, rules: Rules = PLAIN) -> list[Ranked]:
        """KeyError for an item that this generation does not know."""
        raise NotImplementedError("rules and explanations come with the next commit")

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
