"""One generation's index in a child process: a damaged file or a crash in hnswlib ends the child alone.

    parent -> child   B, k, E, H | counts (B,), rows (E,), hidden (H,) int64 | queries (B, D) float32
    child -> parent   N, D once ready, or -1 (refused) or -2 (out of reach), length and the reason; then for each call
                      rows (B, k) int64 | scores (B, k) float32

Both sides know every length, so arrays travel as raw bytes over one socket pair, checked by the parent alone.
The child is forked from a server that imports numpy and hnswlib alone.
"""

import signal
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.ma  # np.unique imports it when first called: 45 ms of every child

from model.index import HnswIndex
from model.manifest import DamagedGeneration, MissingGeneration, load_index, verify
from model.queries import Excluded, Rows, Vectors, check_excluded, check_queries
from stream.closing import Closing
from workers.fork_server import ForkServer, serve

_READY = struct.Struct("<2q")  # N, D; or one of these and the length of the reason
_REFUSED, _OUT_OF_REACH = -1, -2
_LATE = "no answer in time"
_FOREIGN = _LATE, "ended by SIGKILL", "ended by SIGTERM"  # of a busy machine, of one without memory, of the fork server
_CALL = struct.Struct("<4q")  # B, k, E, H
_LOADED_PER_S = 20_000_000  # bytes, at least: verified, checked and loaded at 100 MB/s on a busy core
_END_S = 5.0  # from the end of its socket a child needs milliseconds to leave

_FORKS = ForkServer("workers.search")


class GenerationRefused(RuntimeError):
    """The generation is damaged, its probes are answered otherwise, or it crashed the child. The message says why."""


class SearchProcessDied(RuntimeError):
    """The child has ended or was closed: start another one."""


class SearchProcessKilled(SearchProcessDied):
    """For what says nothing about the generation: a machine out of memory, one too busy, the end of the fork server."""


class SearchProcess(Closing):
    """A child that has verified, loaded and probed one generation. Thread-safe: calls queue up.

    `manifest_sha256` is the announced one. `timeout_s` is the longest wait for one answer, and for readiness beside the
    time that so many bytes take. Raises GenerationRefused, and OSError where the files or the memory are out of
    reach, which says nothing about the generation.
    """

    def __init__(self, folder: Path, manifest_sha256: str, *, timeout_s: float = 60.0) -> None:
        self.num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        self._lock, self.size = threading.Lock(), _REFUSED
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(timeout_s + self.num_bytes / _LOADED_PER_S)
        with theirs:
            self._child = _FORKS.fork(theirs, str(folder.resolve()), manifest_sha256)
        try:
            self.size, self.dim = _READY.unpack(_receive(self._socket, _READY.size))
            self._socket.settimeout(timeout_s)
            reason = "" if self.size >= 0 else _receive(self._socket, self.dim).decode()
        except (EOFError, OSError) as error:
            reason = self._end(error)
            if reason in _FOREIGN:
                self.size = _OUT_OF_REACH
        if reason:
            self._end()
            raise (OSError if self.size == _OUT_OF_REACH else GenerationRefused)(f"{folder.name}: {reason}")

    @property
    def pid(self) -> int:
        return self._child.pid

    def search(
        self, queries: Vectors, k: int, excluded: Sequence[Rows] | None = None, hidden: Rows | None = None
    ) -> tuple[Rows, Vectors]:
        """As `HnswIndex.search`: rows (B, k), scores (B, k). Raises SearchProcessDied, ValueError."""
        queries = check_queries(queries, self.dim, k)
        out = check_excluded(excluded, hidden, len(queries), self.size)
        call = _CALL.pack(len(queries), k, len(out.flat), len(out.hidden))
        request = b"".join([call, *(array.data for array in (out.counts, out.flat, out.hidden, queries))])
        num_results = len(queries) * k
        with self._lock:
            if self._socket.fileno() < 0:
                raise SearchProcessDied("closed")
            try:
                self._socket.sendall(request)
                answer = _receive(self._socket, 12 * num_results)
            except (EOFError, OSError) as error:
                reason = self._end(error)
                raise (SearchProcessKilled if reason in _FOREIGN else SearchProcessDied)(reason) from error
            except BaseException:  # an answer half read must not become the next call's
                self._end()
                raise
        return (
            np.frombuffer(answer, np.int64, num_results).reshape(len(queries), k),
            np.frombuffer(answer, np.float32, num_results, 8 * num_results).reshape(len(queries), k),
        )

    def close(self) -> None:
        """Wait for the call in flight, then end the child. A second call does nothing."""
        with self._lock:  # not while the child leaves (30 ms): a caller that waits here is to ask the next generation
            self._socket.close()
        self._end()

    def _end(self, error: Exception | None = None) -> str:
        """Close the socket, reap the child, and say how it ended."""
        if isinstance(error, TimeoutError):
            self._child.kill()
        self._socket.close()
        try:
            code = self._child.wait(_END_S)
        except TimeoutError:
            self._child.kill()
            code = self._child.wait(_END_S)
        if isinstance(error, TimeoutError):
            return _LATE
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _receive(connection: socket.socket, size: int) -> bytearray:
    """Exactly `size` bytes. Raises EOFError where the other side has gone."""
    data = bytearray(size)
    view = memoryview(data)
    while len(view):
        if not (count := connection.recv_into(view)):
            raise EOFError
        view = view[count:]
    return data


def _answer(connection: socket.socket, index: HnswIndex) -> None:
    """Calls one after the other, until the other side has gone (EOFError, or OSError as it reads no more)."""

    while True:
        num_queries, k, *lengths = _CALL.unpack(_receive(connection, _CALL.size))
        ends = np.cumsum([num_queries, *lengths])  # of counts, rows, hidden
        call = _receive(connection, int(8 * ends[-1] + 4 * num_queries * index.dim))
        counts, flat, hidden = np.split(np.frombuffer(call, np.int64, ends[-1]), ends[:-1])
        queries = np.frombuffer(call, np.float32, offset=8 * ends[-1]).reshape(num_queries, index.dim)
        rows, scores = index.answer(queries, k, Excluded(flat, counts, hidden))  # (B, k) each
        connection.sendall(b"".join([rows.data, scores.data]))


def _load_and_answer(connection: socket.socket, folder: str, manifest_sha256: str) -> None:
    try:
        manifest = verify(Path(folder), manifest_sha256)
        index = load_index(Path(folder), manifest)
    except (DamagedGeneration, OSError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}".encode()
        says_nothing = isinstance(error, MissingGeneration | OSError | MemoryError)
        code = _OUT_OF_REACH if says_nothing else _REFUSED
        connection.sendall(_READY.pack(code, len(reason)) + reason)
        return
    try:
        connection.sendall(_READY.pack(index.size, index.dim))
        _answer(connection, index)
    except (EOFError, OSError):
        return


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), _load_and_answer)
