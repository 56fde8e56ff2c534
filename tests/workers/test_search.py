import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from model.generation import build_generation
from model.index import HnswIndex
from model.manifest import Manifest, file_entry, load_index, manifest_sha256, model_sha256, verify
from model.queries import Vectors
from model.sampling import History
from workers.fork_server import ForkServer
from workers.search import GenerationRefused, SearchProcess, SearchProcessDied, SearchProcessKilled

N, D, PAGE = 4500, 8, 4096


class Vectored:
    """A model that is nothing but its item vectors."""

    def __init__(self, seed: int) -> None:
        generator = np.random.default_rng(seed)
        vectors = generator.normal(size=(N, D)) * generator.lognormal(0, 0.3, (N, 1))
        self.ids, self._vectors = [f"item-{i}" for i in range(N)], vectors.astype(np.float32)

    def item_vectors(self) -> Vectors:
        return self._vectors

    def user_vectors(self, histories: Sequence[History], now_ms: Sequence[int]) -> Vectors:
        return np.stack([self._vectors[history.rows].sum(axis=0) for history in histories])

    def save(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "ids.json").write_bytes(msgspec.json.encode(self.ids))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "g1"
    build_generation(folder, Vectored(0), version="g1", encoder="none", offsets={})
    return folder


@pytest.fixture(scope="module")
def index(built: Path) -> HnswIndex:
    return load_index(built, verify(built))


@pytest.fixture
def search(built: Path) -> Iterator[SearchProcess]:
    with SearchProcess(built, manifest_sha256(built)) as process:
        yield process


def queries(num: int, seed: int = 1) -> Vectors:
    return np.random.default_rng(seed).normal(size=(num, D)).astype(np.float32)


def has_ended(pid: int) -> bool:
    """Waits for the end of a process that need not be our child."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    ended = bool(poll.poll(20_000))
    os.close(handle)
    return ended


def test_it_answers_as_the_index_does(search: SearchProcess, index: HnswIndex) -> None:
    assert (search.size, search.dim) == (N, D)
    hidden = np.arange(0, N, 10)
    for num in (1, 16, 300):
        excluded = [np.arange(at, at + at % 50) for at in range(num)]
        calls: list[tuple[Any, ...]] = [(7,), (20, excluded), (20, None, hidden), (50, excluded, hidden)]
        for call in calls:
            (rows, scores), (same_rows, same_scores) = (
                search.search(queries(num), *call),
                index.search(queries(num), *call),
            )
            assert rows.dtype == np.int64 and (rows == same_rows).all()
            assert scores.dtype == np.float32 and (scores == same_scores).all()
    assert search.search(queries(0), 5)[0].shape == (0, 5)
    everything = [np.arange(N)]
    assert (search.search(queries(1), 5, everything)[0] == -1).all()


def test_what_lies_in_the_working_directory_is_not_imported(
    tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.py").touch()
    monkeypatch.chdir(tmp_path)
    with closing(ForkServer("workers.search")) as forks:
        monkeypatch.setattr("workers.search._FORKS", forks)
        with SearchProcess(built, manifest_sha256(built)) as process:
            assert process.size == N


def test_a_bad_question_is_the_callers_error(search: SearchProcess) -> None:
    for call in ((queries(3)[:, 1:], 5), (queries(3) * np.nan, 5), (queries(3), 0), (queries(1), 5, [np.array([N])])):
        with pytest.raises(ValueError, match="must"):
            search.search(*call)
    assert search.search(queries(3), 5)[0].shape == (3, 5)


def test_threads_get_their_own_answers(search: SearchProcess, index: HnswIndex) -> None:
    def ask(seed: int) -> bool:
        return bool((search.search(queries(1 + seed % 40, seed), 10)[0] == expected[seed]).all())

    expected = [index.search(queries(1 + seed % 40, seed), 10)[0] for seed in range(200)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


@pytest.mark.parametrize("_", range(3))
def test_close_lets_the_call_in_flight_finish(_: int, search: SearchProcess, index: HnswIndex) -> None:
    """Whoever comes first is answered rightly, whoever comes later is told; nobody gets half an answer."""
    many, started = queries(1000), threading.Event()
    expected = index.search(many, 20)[0]

    def ask() -> int:
        answered = 0
        while True:
            try:
                rows, _ = search.search(many, 20)
            except SearchProcessDied as end:
                assert "closed" in str(end)
                return answered
            assert (rows == expected).all()
            answered += 1
            started.set()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask)
        started.wait()
        search.close()
        assert future.result() >= 1
    assert has_ended(search.pid)
    search.close()


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGKILL, SearchProcessKilled), (signal.SIGSEGV, SearchProcessDied)]
)
def test_a_child_that_dies_is_reported(number: signal.Signals, error: type, search: SearchProcess) -> None:
    """Killed by a machine without memory it says nothing about its generation, which is not refused for it."""
    os.kill(search.pid, number)
    with pytest.raises(SearchProcessDied, match=number.name) as died:
        search.search(queries(3), 5)
    assert died.type is error
    with pytest.raises(SearchProcessDied):
        search.search(queries(3), 5)


def test_a_child_that_hangs_is_killed(search: SearchProcess) -> None:
    search._socket.settimeout(0.2)  # timeout_s bounds the start as well
    os.kill(search.pid, signal.SIGSTOP)
    with pytest.raises(SearchProcessDied, match="in time"):
        search.search(queries(3), 5)
    assert has_ended(search.pid)


def test_signals_for_the_whole_service_do_not_end_it(search: SearchProcess) -> None:
    """Ctrl-C and SIGTERM reach the process group; the parent still drains, and closes when it is done."""
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(search.pid, number)
        assert search.search(queries(3), 5)[0].shape == (3, 5)


def test_it_outlives_the_thread_that_started_it(built: Path) -> None:
    """The kernel's parent-death signal is sent when the starting thread ends."""
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(SearchProcess, built, manifest_sha256(built)).result()
    with search:
        assert search.search(queries(3), 5)[0].shape == (3, 5)


PARENT = """
import os, sys, signal
from pathlib import Path
from workers.search import SearchProcess
search = SearchProcess(Path(sys.argv[1]), sys.argv[2])
keeper = 0
if sys.argv[3] == "socket kept":
    keeper = os.fork()  # holds the socket open, so that its end tells the child nothing
    if not keeper:
        signal.pause()
print(search.pid, keeper, flush=True)
signal.pause()
"""


@pytest.mark.parametrize("case", ["socket closed", "socket kept"])
def test_it_does_not_outlive_its_parent(case: str, built: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(built), manifest_sha256(built), case]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    with parent.stdout:
        child, keeper = map(int, parent.stdout.readline().split())
    parent.kill()
    parent.wait()
    try:
        assert has_ended(child)
    finally:
        if keeper:
            os.kill(keeper, signal.SIGKILL)


def test_the_child_starts_light() -> None:
    script = "import sys, workers.search; print({'torch', 'transformers', 'fsspec', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


def test_what_is_not_as_announced_is_refused(built: Path, tmp_path: Path) -> None:
    with pytest.raises(GenerationRefused, match="announced"):
        SearchProcess(built, "0" * 64)
    with pytest.raises(OSError, match="missing"):  # a store that is not mounted looks so
        SearchProcess(tmp_path / "nowhere", "0" * 64)
    with pytest.raises(GenerationRefused, match="missing"):
        SearchProcess(tmp_path, "0" * 64)
    folder = shutil.copytree(built, tmp_path / "g1")
    (folder / "index.hnsw").write_bytes((folder / "index.hnsw").read_bytes()[:-1])
    with pytest.raises(GenerationRefused, match=r"index\.hnsw"):
        SearchProcess(folder, manifest_sha256(built))


def test_what_cannot_be_read_is_not_refused(tmp_path: Path) -> None:
    """A refusal is for good: a store that is away for a minute must not cost a generation."""
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(OSError, match="IsADirectoryError"):
        SearchProcess(tmp_path, "0" * 64)


def test_a_crash_while_loading_is_a_refusal(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(SearchProcess, tmp_path, "0" * 64)
        with (tmp_path / "manifest.json").open("wb"):  # opens when the child does
            os.kill(child_of(child_of(os.getpid())), signal.SIGSEGV)
            with pytest.raises(GenerationRefused, match="ended by SIGSEGV"):
                future.result()


def test_a_machine_without_memory_says_nothing_about_the_generation(tmp_path: Path) -> None:
    """The kernel's killer, in the moment when two indexes are in memory: it is to be tried again."""
    os.mkfifo(tmp_path / "manifest.json")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(SearchProcess, tmp_path, "0" * 64)
        with (tmp_path / "manifest.json").open("wb"):
            os.kill(child_of(child_of(os.getpid())), signal.SIGKILL)
            with pytest.raises(OSError, match="ended by SIGKILL"):
                future.result()


def test_when_the_fork_server_dies_its_children_go_and_the_next_search_has_another(built: Path) -> None:
    with SearchProcess(built, manifest_sha256(built)) as search:
        os.kill(child_of(os.getpid()), signal.SIGKILL)
        assert has_ended(search.pid)
        with pytest.raises(SearchProcessDied, match="SIGTERM"):
            search.search(queries(3), 5)
    with SearchProcess(built, manifest_sha256(built)) as search:
        assert search.search(queries(3), 5)[0].shape == (3, 5)


def test_a_child_that_has_gone_is_known_whoever_else_was_forked(built: Path) -> None:
    """A copy of its socket in a sibling would hide its end."""
    with SearchProcess(built, manifest_sha256(built)) as first, SearchProcess(built, manifest_sha256(built)) as second:
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(SearchProcessDied, match="SIGKILL"):
            first.search(queries(3), 5)
        assert second.search(queries(3), 5)[0].shape == (3, 5)


def child_of(parent: int) -> int:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    (pid,) = (int(pid) for pid, ppid, args in rows if int(ppid) == parent and "workers.search" in args)
    return pid


def forged(built: Path, folder: Path, damage: Callable[[bytearray], Any], name: str) -> str:
    """A copy with one file damaged and a manifest that agrees with it: all checksums hold."""
    shutil.copytree(built, folder)
    data = bytearray((folder / name).read_bytes())
    damage(data)
    (folder / name).write_bytes(data)
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
    files = manifest.files | {name: file_entry(folder / name)}
    edited = msgspec.structs.replace(manifest, files=files, model_sha256=model_sha256(files))
    (folder / "manifest.json").write_bytes(msgspec.json.encode(edited))
    verify(folder)
    return manifest_sha256(folder)


def page(number: int, content: bytes) -> Callable[[bytearray], Any]:
    def damage(data: bytearray) -> None:
        data[number * PAGE : (number + 1) * PAGE] = content

    return damage


DAMAGES: list[tuple[str, Callable[[bytearray], Any]]] = [
    *(("index.hnsw", page(number, bytes(PAGE))) for number in (0, 20, 60)),
    *(("index.hnsw", page(number, np.random.default_rng(number).bytes(PAGE))) for number in (0, 20, 60)),
    *(("index.hnsw", lambda data, at=at: data.__delitem__(slice(at, None))) for at in (40, 9999, 200_000)),
    *(("index.hnsw", lambda data, at=at: data.__setitem__(at, data[at] ^ 64)) for at in (1, 16, 25, 33, 41, 50)),
    ("items.npy", page(2, bytes(PAGE))),
    ("probes.safetensors", page(2, bytes(PAGE))),
    ("probes.safetensors", lambda data: data.__setitem__(slice(0, 8), b"\xff" * 8)),
]


@pytest.mark.parametrize("case", range(len(DAMAGES)))
def test_with_checksums_that_hold_the_child_still_refuses(case: int, built: Path, tmp_path: Path) -> None:
    """A refusal, SIGSEGV or SIGABRT in the child; never an answer, never the end of this process."""
    name, damage = DAMAGES[case]
    announced = forged(built, tmp_path / "g1", damage, name)
    with pytest.raises(GenerationRefused, match="g1"):
        SearchProcess(tmp_path / "g1", announced, timeout_s=20)


def test_files_of_another_generation_are_refused(built: Path, tmp_path: Path) -> None:
    build_generation(tmp_path / "g2", Vectored(1), version="g2", encoder="none", offsets={})
    other = (tmp_path / "g2" / "index.hnsw").read_bytes()
    announced = forged(built, tmp_path / "mixed", lambda data: data.__setitem__(slice(None), other), "index.hnsw")
    with pytest.raises(GenerationRefused, match="other points"):
        SearchProcess(tmp_path / "mixed", announced)
