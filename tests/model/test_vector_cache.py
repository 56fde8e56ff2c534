import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import model.vector_cache
from model.vector_cache import VectorCache

WRITER = """
import sys, numpy as np
from pathlib import Path
from model.vector_cache import VectorCache
cache = VectorCache(Path(sys.argv[1]), 4)
for i in range(200):
    cache.put({f"{sys.argv[2]}{i}".encode(): np.full(4, i, np.float16), b"both": np.full(4, 7, np.float16)})
"""


def test_what_was_put_is_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.vector_cache, "_KEYS_AT_ONCE", 3)
    vectors = {bytes([i]): np.arange(i, i + 4).astype(np.float16) for i in range(10)}
    VectorCache(tmp_path / "new" / "vectors.sqlite", 4).put(vectors)
    found = VectorCache(tmp_path / "new" / "vectors.sqlite", 4).get([*vectors, b"unknown"])
    assert found.keys() == vectors.keys()
    assert all((found[key] == vectors[key]).all() for key in vectors)


def test_two_processes_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "vectors.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    keys = [f"{name}{i}".encode() for name in "ab" for i in range(200)]
    assert VectorCache(path, 4).get([*keys, b"both"]).keys() == {*keys, b"both"}


def test_a_full_disk_costs_the_cache_and_no_vector(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, first = VectorCache(tmp_path / "vectors.sqlite", 4), {b"first": np.ones(4, np.float16)}
    cache.put(first)
    assert cache._db is not None
    cache._db.execute("PRAGMA max_page_count = 3")
    for row in range(500):
        cache.put({row.to_bytes(32, "big"): np.ones(4, np.float16)})
    assert cache.get([*first, (499).to_bytes(32, "big")]).keys() == first.keys()
    cache._db.close()
    assert cache.get([*first]) == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "full" in caplog.text


def test_a_file_that_is_no_database_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "vectors.sqlite"
    path.write_bytes(b"garbage" * 1000)
    (tmp_path / "vectors.sqlite-wal").write_bytes(b"garbage" * 1000)
    VectorCache(path, 4).put({b"first": np.ones(4, np.float16)})
    assert VectorCache(path, 4).get([b"first"]).keys() == {b"first"}
    assert (tmp_path / "vectors.sqlite.damaged").read_bytes() == b"garbage" * 1000


def test_a_place_that_cannot_be_written_is_no_reason_to_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "vectors.sqlite").mkdir()
    cache = VectorCache(tmp_path / "vectors.sqlite", 4)
    cache.put({b"first": np.ones(4, np.float16)})
    assert cache.get([b"first"]) == {} and len(caplog.records) == 1
