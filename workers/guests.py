"""Lists for nobody that is known: a history, items or words, as one query."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.user_state import Entry, digest
from stream.answers import Guest
from workers.live import NotReady
from workers.settings import Settings
from workers.snapshot import Query, Rules

if TYPE_CHECKING:
    from model.encoder import Encoder

LOADED_S = 1.0  # that a request waits for the encoder


class OtherEncoder(NotReady):
    """The generation stands on another encoder than `indexer.encoder` of this server: words mean nothing to it."""

    retry_s = 60


class TextEncoder:
    """The encoder of the item texts, loaded beside the requests at the first text: seconds and, for MiniLM, 90 MB."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._opening = settings.indexer, threading.Lock()
        self._loading: Future[Encoder] | None = None

    def __call__(self, text: str, name: str) -> NDArray[np.float32]:
        """(E,) unit vector. Raises OtherEncoder where `name` is not its own, NotReady while it is loaded."""
        with self._opening:
            if self._loading is None:
                self._loading = ThreadPoolExecutor(1, thread_name_prefix="encoder").submit(self._load)
            loading = self._loading
        if not wait([loading], LOADED_S).done:
            raise NotReady("text: the encoder is being loaded")
        try:
            encoder = loading.result()
        except Exception as error:  # of damaged files: SafetensorError, and from tokenizers a plain Exception
            with self._opening:
                if self._loading is loading:
                    self._loading = None  # the next request tries again
            raise NotReady(f"text: the encoder is not there: {error}") from error
        if encoder.name != name:
            raise OtherEncoder(f"text: the generation stands on {name}, this server on {encoder.name}")
        vector: NDArray[np.float32] = encoder.encode([text])[0]
        return vector

    def _load(self) -> Encoder:
        from model.encoder import Encoder  # imports transformers: seconds that most servers never need

        return Encoder(self._settings.encoder, pooling=self._settings.pooling)


def session(guest: Guest, settings: Settings, rules: Rules) -> Query:
    """History and items of the guest, as a query: what has no time is as recent as its place says."""
    now_ms = time.time_ns() // 1_000_000
    first = now_ms - len(guest.history) - len(guest.items)
    entries = [
        Entry(visit.item_id, settings.weight(visit), first + at if visit.ts_ms is None else visit.ts_ms)
        for at, visit in enumerate(guest.history)
    ]
    entries.sort(key=lambda entry: entry.ts_ms)
    entries += [Entry(item_id, 1.0, now_ms) for item_id in guest.items]
    seen = b"".join(dict.fromkeys(digest(entry.item_id) for entry in entries))
    return Query(entries, seen, now_ms, rules)
