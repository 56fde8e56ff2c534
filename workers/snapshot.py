"""One generation as it is served: its search process, its model, and the items newer than it."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from model.explain import contributions, reasons
from model.index import EXACT_SHARE, ExactIndex
from model.model import History, Model
from model.queries import Rows, Vectors
from model.rules import chances, diversify, explore
from model.user_state import Entry, digest, unpack
from stream.events import Artifact, Because, ItemVector, Ranked
from workers.catalogue import Catalogue, Filters
from workers.search import SearchProcess
from workers.settings import SCORED_K

POOL = 5  # times k: the candidates among which diversity and exploration choose
MOST_REASONS = 3
SCANNED_AT_ONCE = 65_536  # item vectors gathered for one block of a scan: some 50 MB


def _digests(ids: Sequence[str]) -> NDArray[np.uint64]:
    """(N,) of item ids."""
    return unpack(b"".join(map(digest, ids)))


def _six_digits(chance: float) -> float:
    """Significant ones: estimates divide by it, and of an exploration of 1e-6 six decimals leave nothing."""
    return float(f"{chance:.6g}")


def _three_decimals(shares: Vectors) -> list[Any]:
    """As Python's floats: one by one, `round` took a tenth of a list's time."""
    return shares.astype(np.float64).round(3).tolist()  # type: ignore[no-any-return]


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
NOBODY: Mapping[str, Rules] = MappingProxyType({})


class Query(NamedTuple):
    """What a list is made from: a user's history, what is seen (packed digests), the moment, the rules."""

    history: Sequence[Entry]
    seen: bytes
    now_ms: int
    rules: Rules = PLAIN
    others: Mapping[str, Rules] = NOBODY  # of which the list says by `Ranked.under` what they would have shown


@dataclass(frozen=True, repr=False)
class Snapshot:
    """One generation and the items newer than it. Immutable: an answer never mixes two."""

    announced: Artifact
    search: SearchProcess
    indexed: Model  # the generation's own
    own: dict[str, int]  # rows of its items
    beside: dict[str, ItemVector]  # of the fresh items, which came after it
    model: Model  # the generation's with the fresh items behind: rows from num_indexed on
    rows: dict[str, int]
    filters: Filters
    fresh: NDArray[np.float32]  # (F, D)
    digests: NDArray[np.uint64]  # (N,) of the item ids, sorted
    digest_rows: Rows  # (N,) rows in the order of `digests`
    renewals: int = 0  # lists of one renewal are made from the same items

    @staticmethod
    def of(announced: Artifact, search: SearchProcess, indexed: Model, catalogue: Catalogue) -> "Snapshot":
        """The generation with the items that came after it, and without those that may not be recommended."""
        own = {item_id: row for row, item_id in enumerate(indexed.ids)}
        digests = _digests(indexed.ids)
        order = np.argsort(digests)
        alone = Snapshot(
            announced=announced,
            search=search,
            indexed=indexed,
            own=own,
            beside={},
            model=indexed,
            rows=own,
            filters=Filters({}, {}),
            fresh=np.zeros((0, indexed.dim), np.float32),
            digests=digests[order],
            digest_rows=order,
        )
        return alone.renewed(catalogue)

    def renewed(self, catalogue: Catalogue) -> "Snapshot":
        """The same generation with the items as they are now."""
        beside = catalogue.encoded_beside(self.own.keys(), self.announced.encoder)
        same = self if beside == self.beside else self._with(beside)  # copies the item arrays
        filters = Filters(same.rows, dict(catalogue.items))
        return dataclasses.replace(same, filters=filters, renewals=self.renewals + 1)

    def _with(self, beside: dict[str, ItemVector]) -> "Snapshot":
        end, ids, model = self.num_indexed, list(beside), self.indexed
        if ids:
            text = [np.frombuffer(vector.vector, "<f2") for vector in beside.values()]
            model = model.extended(ids, np.stack(text).astype(np.float32))
        new = np.arange(end, len(model.ids))
        own = self.digest_rows < end  # sorted already: not hashed again
        digests = np.concatenate([self.digests[own], _digests(ids)])
        order = np.argsort(digests, kind="stable")
        return dataclasses.replace(
            self,
            beside=beside,
            model=model,
            rows=self.own | dict(zip(ids, new.tolist(), strict=True)),
            fresh=model.item_vectors(new),
            digests=digests[order],
            digest_rows=np.concatenate([self.digest_rows[own], new])[order],
        )

    @property
    def name(self) -> str:
        return self.announced.name

    @property
    def num_indexed(self) -> int:
        return len(self.indexed.ids)

    @cached_property
    def strangers(self) -> tuple[str, ...]:
        """The SCORED_K best item ids for one of whom nothing is known, by the plain rules. Raises SearchProcessDied."""
        return tuple(place.item_id for place in self.recommend([Query((), b"", 0)], SCORED_K)[0])

    def recommend(self, queries: Sequence[Query], k: int, explain: bool = False) -> list[list[Ranked]]:
        """k items a query, best first; fewer only when fewer are eligible. Raises SearchProcessDied."""
        histories = self.histories(queries)
        lists = self.ranked(queries, histories, k)
        return self.explain(queries, histories, lists) if explain else lists

    def ranked(self, queries: Sequence[Query], histories: Sequence[History], k: int) -> list[list[Ranked]]:
        """`recommend` for queries whose histories have been looked up."""
        if not queries:
            return []
        users = self.model.user_vectors(histories, [query.now_ms for query in queries])  # (B, D)
        return self._lists(users, queries, k)

    def similar(self, item_id: str, k: int, rules: Rules = PLAIN) -> list[Ranked]:
        """k items for one who has just clicked this one and nothing else, whatever is popular; never itself.

        Raises KeyError for an item that this generation does not know, SearchProcessDied.
        """
        like = self.model.neighbour_vectors(np.array([self.rows[item_id]]))  # (1, D)
        others = rules._replace(exclude=rules.exclude | {item_id})
        (ranked,) = self._lists(like, [Query((), b"", time.time_ns() // 1_000_000, others)], k)
        return ranked

    def told(self, text: Vectors, k: int, rules: Rules = PLAIN) -> list[Ranked]:
        """k items whose text is nearest to this one (E,), as the generation's encoder reads it.

        Raises SearchProcessDied.
        """
        (ranked,) = self._lists(self.model.text_query(text), [Query((), b"", time.time_ns() // 1_000_000, rules)], k)
        return ranked

    def explain(
        self, queries: Sequence[Query], histories: Sequence[History], lists: Sequence[list[Ranked]], places: int = 200
    ) -> list[list[Ranked]]:
        """The lists of these queries, each with the reasons of its first places."""
        width = min(places, max(map(len, lists), default=0))
        items, scores = np.zeros((len(lists), width), np.int64), np.zeros((len(lists), width), np.float32)  # (B, M)
        for at, ranked in enumerate(lists):
            for place, item in enumerate(ranked[:width]):
                items[at, place], scores[at, place] = self.rows[item.item_id], item.score
        if not items.size:
            return list(lists)
        found = contributions(self.model, histories, [query.now_ms for query in queries], items)
        rows, shares, explained = reasons(found, scores, MOST_REASONS)
        told = zip(rows.tolist(), _three_decimals(shares), _three_decimals(explained), strict=True)
        return [
            [*map(self._because, ranked, *columns), *ranked[width:]]
            for ranked, columns in zip(lists, told, strict=True)
        ]

    def _because(self, place: Ranked, rows: list[int], shares: list[float], explained: float) -> Ranked:
        ids = self.model.ids
        because = [Because(ids[row], share) for row, share in zip(rows, shares, strict=True) if row >= 0]
        return replace(place, because=because, explained=explained)

    def histories(self, queries: Sequence[Query]) -> list[History]:
        return [self.history(query.history) for query in queries]

    def history(self, entries: Sequence[Entry]) -> History:
        """The entries whose items this generation knows. Among many users' ids the lookups cost more than the model."""
        rows = np.array([self.rows.get(entry.item_id, -1) for entry in entries], np.int64)  # (T,) each
        weights = np.array([entry.weight for entry in entries], np.float32)
        stamps = np.array([entry.ts_ms for entry in entries], np.int64)
        known = rows >= 0
        return History(rows[known], weights[known], stamps[known])

    def knows(self, entries: Sequence[Entry]) -> bool:
        """Whether a list made from this history is personal: of other items this generation has learned nothing."""
        return any(entry.item_id in self.rows for entry in entries)

    def _lists(self, users: Vectors, queries: Sequence[Query], k: int) -> list[list[Ranked]]:
        """Queries that ask for the same kind of search are searched together: without rules that is all of them."""
        together: dict[tuple[int, bool, bool], list[int]] = defaultdict(list)
        for at, (_, _, _, rules, _) in enumerate(queries):
            width = POOL * k if rules.diversity or rules.explore else k
            filtered = bool(rules.categories) or rules.max_age_ms is not None
            together[width, rules.available_only, filtered].append(at)
        lists: list[list[Ranked]] = [[]] * len(queries)
        for (width, available_only, filtered), chosen in together.items():
            hidden = self.filters.hidden if available_only else self.filters.removed
            excluded = [self._excluded(queries[at]) for at in chosen]
            if filtered:
                found = [
                    self._filtered(users[at], queries[at], width, out, hidden)
                    for at, out in zip(chosen, excluded, strict=True)
                ]
            else:
                found = list(zip(*self._open(users[chosen], width, excluded, hidden), strict=True))
            for at, (rows, scores) in zip(chosen, found, strict=True):
                lists[at] = self._places(queries[at], rows, scores, k)
        return lists

    def _excluded(self, query: Query) -> Rows:
        """Rows that only this query must not get."""
        rows = self._rows_of(query.seen if query.rules.exclude_seen else b"")
        named = [self.rows[item_id] for item_id in query.rules.exclude if item_id in self.rows]
        return np.concatenate([rows, np.array(named, np.int64)]) if named else rows

    def _rows_of(self, seen: bytes) -> Rows:
        """Rows of those packed digests that this generation knows."""
        wanted = unpack(seen)
        at = np.minimum(np.searchsorted(self.digests, wanted), len(self.digests) - 1)
        rows: Rows = self.digest_rows[at[self.digests[at] == wanted]]
        return rows

    def _open(self, users: Vectors, width: int, excluded: Sequence[Rows], hidden: Rows) -> tuple[Rows, Vectors]:
        """The best rows (B, width) and their scores, without those excluded; row -1 where there are no more."""
        end = self.num_indexed
        rows, scores = self.search.search(users, width, [out[out < end] for out in excluded], hidden[hidden < end])
        if not len(self.fresh):
            return rows, scores
        own = [out[out >= end] - end for out in excluded]
        fresh, values = ExactIndex(self.fresh).search(users, width, own, hidden[hidden >= end] - end)
        rows = np.concatenate([rows, np.where(fresh < 0, -1, fresh + end)], axis=1)  # (B, 2 width)
        scores = np.concatenate([scores, values], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :width]
        return np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)

    def _filtered(self, user: Vectors, query: Query, width: int, excluded: Rows, hidden: Rows) -> tuple[Rows, Vectors]:
        """The best rows (width,) that pass the filters: of more than needed, or of a scan where few pass."""
        age_ms = query.rules.max_age_ms
        passing = self.filters.passing(query.rules.categories, None if age_ms is None else query.now_ms - age_ms)
        passing[hidden] = passing[excluded] = False
        fetch = 2 * width * len(passing) // max(1, int(np.count_nonzero(passing)))
        if fetch * EXACT_SHARE <= self.num_indexed:
            (rows,), (scores,) = self._open(user[None], fetch, [excluded], hidden)
            kept = np.flatnonzero((rows >= 0) & passing[rows])[:width]
            if len(kept) == width:
                return rows[kept], scores[kept]
        rows = np.flatnonzero(passing)
        blocks = [rows[at : at + SCANNED_AT_ONCE] for at in range(0, len(rows), SCANNED_AT_ONCE)]
        scores = np.concatenate([np.zeros(0, np.float32), *(self.model.item_vectors(some) @ user for some in blocks)])
        best = np.argsort(-scores, kind="stable")[:width]
        return rows[best], scores[best]

    def _places(self, query: Query, rows: Rows, scores: Vectors, k: int) -> list[Ranked]:
        """The list, chosen from candidates (M,) by the rules."""
        ids, rules = self.model.ids, query.rules
        if not (rules.diversity or rules.explore):
            places = zip(rows.tolist(), np.asarray(scores, np.float64).round(5).tolist(), strict=True)
            return [Ranked(ids[row], score) for row, score in places if row >= 0]
        rows, scores = rows[rows >= 0], scores[rows >= 0]
        tastes = self.model.tastes(rows)  # (M, d)
        order = diversify(scores, tastes, rules.diversity, k)
        chosen = explore(order, k, rules.explore, np.random.default_rng(rules.seed))
        chance = chances(order, k, rules.explore)
        under = {
            name: chances(diversify(scores, tastes, other.diversity, k), k, other.explore)
            for name, other in query.others.items()
        }
        return [
            Ranked(
                item_id=ids[rows[at]],
                score=round(float(scores[at]), 5),
                propensity=_six_digits(chance[at]),
                under={name: _six_digits(other[at]) for name, other in under.items()},
            )
            for at in chosen
        ]
