"""Text vectors by content hash, so that no text is encoded twice."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEYS_AT_ONCE = 500  # sqlite took 999 parameters at most before 3.32


class VectorCache:
    """SHA-256 -> float16 vector, in one sqlite file. Threads and processes of one machine may share it."""

    def __init__(self, path: Path, dim: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._dim, self._lock = dim, threading.Lock()
        self._db = sqlite3.connect(path, timeout=60.0, check_same_thread=False)
        self._use_wal()
        self._db.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose vectors: they can be made again
        with self._db:
            self._db.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")

    def _use_wal(self) -> None:
        """Two processes that open a new file at once: sqlite does not wait for this lock by itself."""
        for _ in range(600):
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                time.sleep(0.1)
            else:
                return
        raise TimeoutError("the vector cache stays locked")

    def get(self, keys: list[bytes]) -> dict[bytes, NDArray[Any]]:
        """Those that are known: key -> (E,) float16."""
        known = {}
        with self._lock:
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                part = keys[start : start + _KEYS_AT_ONCE]
                marks = ",".join("?" * len(part))
                found = self._db.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", part)
                known.update({key: np.frombuffer(vector, "<f2", self._dim) for key, vector in found})
        return known

    def put(self, vectors: dict[bytes, NDArray[Any]]) -> None:
        rows = [(key, vector.astype("<f2").tobytes()) for key, vector in vectors.items()]
        with self._lock, self._db:
            self._db.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)
