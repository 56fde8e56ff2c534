"""The items as the topics have told them so far, and what lists may be filtered by."""

from collections import defaultdict
from collections.abc import Mapping, Set
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from model.queries import Rows
from stream.events import Item, ItemVector

UNKNOWN_MS = np.iinfo(np.int64).min


def _eligibility(item: Item | None) -> tuple[object, ...]:
    return () if item is None else (item.available, item.categories, item.published_ms)


class Catalogue:
    """The items and their text vectors, as the topics have told them so far."""

    def __init__(self) -> None:
        self.items: dict[str, Item] = {}
        self.vectors: dict[str, ItemVector] = {}

    def encoded_beside(self, known: Set[str], encoder: str) -> dict[str, ItemVector]:
        """Text vectors of the items that are not among those known, as far as they are this encoder's."""
        return {
            item_id: vector
            for item_id, vector in self.vectors.items()
            if item_id not in known and item_id in self.items and vector.encoder == encoder
        }

    def take_item(self, item_id: str, item: Item | None) -> bool:
        """True if this changes what may be recommended, to whom."""
        before = self.items.get(item_id)
        if item is None:
            self.items.pop(item_id, None)
        else:
            self.items[item_id] = item
        return _eligibility(before) != _eligibility(item)

    def take_vector(self, item_id: str, vector: ItemVector | None) -> bool:
        """True if it is another than before."""
        before = self.vectors.get(item_id)
        if vector is None:
            self.vectors.pop(item_id, None)
        else:
            self.vectors[item_id] = vector
        return before != vector


class Filters:
    """What the catalogue, as it was, says of the items in the rows of a generation."""

    def __init__(self, rows: Mapping[str, int], items: Mapping[str, Item]) -> None:
        self._rows, self._items = rows, items
        removed = [row for item_id, row in rows.items() if item_id not in items]
        unavailable = [rows[item_id] for item_id, item in items.items() if not item.available and item_id in rows]
        self.removed = np.array(removed, np.int64)
        self.hidden = np.array(removed + unavailable, np.int64)

    def passing(self, categories: Set[str], since_ms: int | None) -> NDArray[np.bool_]:
        """(N,) the rows of one of the categories (none given: of any) that were published since then."""
        passing = np.full(len(self._rows), not categories)
        for category in categories & self._shelves.keys():
            passing[self._shelves[category]] = True
        if since_ms is not None:
            passing &= self._published >= since_ms
        return passing

    @cached_property  # made at the first filtered query: most snapshots never see one
    def _shelves(self) -> dict[str, Rows]:
        """Category -> its rows."""
        shelves: dict[str, list[int]] = defaultdict(list)
        for item_id, row in self._rows.items():
            for category in self._items[item_id].categories if item_id in self._items else ():
                shelves[category].append(row)
        return {category: np.array(rows, np.int64) for category, rows in shelves.items()}

    @cached_property
    def _published(self) -> Rows:
        """(N,) ms; before all time where it is not known."""
        items = (self._items.get(item_id) for item_id in self._rows)
        stamps = [UNKNOWN_MS if item is None or item.published_ms is None else item.published_ms for item in items]
        return np.array(stamps, np.int64)
