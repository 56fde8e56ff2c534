"""Text vectors by content hash, so that no text is encoded twice."""

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

_KEYS_AT_ONCE = 500  # sqlite took 999 parameters at most before 3.32


class VectorCache:
    """SHA-256 -> float16 vector, in one sqlite file. Threads and processes of one machine may share it.

    Where the file cannot be used (its disk is full or damaged) less is known, nothing kept, and one warning says so.
    """

    def __init__(self, path: Path, dim: int) -> None:
        self._path, self._dim, self._lock, self._told = path, dim, threading.Lock(), False
        self._db: sqlite3.Connection | None = None
        with self._going_on():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._db = self._open()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                path.replace(f"{path}.damaged")  # no database
                for beside in ("-wal", "-shm"):
                    Path(f"{path}{beside}").unlink(missing_ok=True)
                self._db = self._open()

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if not self._told:
                log.warning("the vector cache %s cannot be used: %s: %s", self._path, type(error).__name__, error)
            self._told = True

    def _open(self) -> sqlite3.Connection:
        db = sqlite3.connect(self._path, timeout=60.0, check_same_thread=False)
        try:
            _use_wal(db)
            db.execute("PRAGMA synchronous = NORMAL")  # a power cut may lose vectors: they can be made again
            with db:
                db.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        except BaseException:
            db.close()
            raise
        return db

    def get(self, keys: list[bytes]) -> dict[bytes, NDArray[Any]]:
        """Those that are known: key -> (E,) float16."""
        known: dict[bytes, NDArray[Any]] = {}
        if self._db is None:
            return known
        with self._lock, self._going_on():
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                part = keys[start : start + _KEYS_AT_ONCE]
                marks = ",".join("?" * len(part))
                found = self._db.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", part)
                known.update({key: np.frombuffer(vector, "<f2", self._dim) for key, vector in found})
        return known

    def put(self, vectors: dict[bytes, NDArray[Any]]) -> None:
        rows = [(key, vector.astype("<f2").tobytes()) for key, vector in vectors.items()]
        if self._db is None:
            return
        with self._lock, self._going_on(), self._db:
            self._db.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", rows)


def _use_wal(db: sqlite3.Connection) -> None:
    """Two processes that open a new file at once: sqlite does not wait for this lock by itself."""
    for _ in range(600):
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:  # the low byte: the rest says of what kind
                raise
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("the vector cache stays locked")
