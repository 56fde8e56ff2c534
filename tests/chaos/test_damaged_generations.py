"""Scenario 8: damaged generations are announced, one after the other, to what worker and server load them with.

Each is refused for good, with a reason, while the old one goes on answering as before, from the same search process.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import msgspec
import numpy as np
import psutil
import pytest

from model.config import ModelConfig
from model.generation import build_generation
from model.learner import Learner
from model.manifest import MANIFEST, Manifest, decode_manifest, file_names
from model.sampling import Events
from model.user_state import Entry
from stream.events import Artifact, Item, Ranked, encode
from tests.model.test_generation import PAGE, flip, spoil_page, truncate
from tests.records import Record, announced
from workers import live, metrics
from workers.live import Live
from workers.search import SearchProcess
from workers.settings import Settings
from workers.snapshot import Query

SEED, SHORT, LONG, N = 8, 24, 1000, 300
ITEMS = [f"i{row}" for row in range(N)]
Draw = np.random.Generator


class Built(NamedTuple):
    old: Path
    new: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    learner = Learner(ModelConfig(text_dim=16, tower_dim=8, covisitation_rank=8, projected_text_dim=8, hidden=16))
    learner.add_items(ITEMS, np.random.default_rng(0).normal(size=(N, 16)).astype(np.float32))
    draw = np.random.default_rng(SEED)
    for name in ("g0", "g1"):
        rows = draw.integers(0, N, 600)
        learner.learn(Events((rows % 17).tolist(), [ITEMS[row] for row in rows], np.ones(600, np.float32), rows))
        build_generation(folder / name, learner.model(), version=name, encoder="e", offsets={0: 600})
    return Built(folder / "g0", folder / "g1")


def a_file(folder: Path, draw: Draw) -> Path:
    return folder / str(draw.choice(sorted(file_names(folder))))


def mixed(folder: Path, other: Path, draw: Draw) -> None:
    """A file of another generation in the place of its own, or a file more."""
    path = a_file(other, draw)
    target = folder / path.relative_to(other)
    shutil.copy(path, target if draw.random() < 0.8 else target.with_name(f"{target.name}.old"))


def manifest_edited(folder: Path, _: Path, draw: Draw) -> None:
    """One field changed to something of its own type, or a file struck off the list."""
    said = json.loads((folder / MANIFEST).read_bytes())
    field = str(draw.choice(sorted(said)))
    value = said[field]
    if isinstance(value, dict):
        value.pop(str(draw.choice(sorted(value))))
    else:
        said[field] = value + 1 if isinstance(value, int) else f"{value}x"
    (folder / MANIFEST).write_text(json.dumps(said, indent=2))


KINDS: dict[str, Callable[[Path, Path, Draw], None]] = {
    "truncated": lambda folder, _, draw: truncate(a_file(folder, draw), draw),
    "one bit": lambda folder, _, draw: flip(a_file(folder, draw), draw),
    "zero page": lambda folder, _, draw: spoil_page(a_file(folder, draw), draw, bytes(PAGE)),
    "random page": lambda folder, _, draw: spoil_page(a_file(folder, draw), draw, draw.bytes(PAGE)),
    "mixed": mixed,
    "manifest edited": manifest_edited,
}


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in file_names(folder)}


class Follower:
    """Live without Kafka: what its thread does with a record, done here."""

    def __init__(self, cache: Path, keep_previous: bool = False) -> None:
        self.settings = Settings(cache=cache)
        self.live = Live(self.settings, keep_previous)
        for item_id in ITEMS:
            self.live.catalogue.take_item(item_id, Item(item_id=item_id, title=item_id))

    def close(self) -> None:
        self.live.release_previous()
        if self.live.snapshot is not None:
            self.live.snapshot.search.close()

    def announce(self, artifact: Artifact) -> None:
        topic = self.settings.topics.generations.name
        self.live._take(Record(artifact.name.encode(), encode(artifact), topic=topic))
        self.live._serve_wanted()

    def answers(self) -> tuple[str, list[list[Ranked]]]:
        history = [Entry("i1", 1.0, 1000), Entry("i7", -1.0, 2000)]
        snapshot, lists = self.live.recommend([Query(history, b"", 3000), Query([], b"", 3000)], 20)
        return snapshot.name, lists


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Follower]:
    made = Follower(tmp_path / "cache")
    yield made
    made.close()


def refused() -> float:
    return float(metrics.swaps.labels("refused")._value.get())


def test_none_serves_and_the_old_one_does(built: Built, follower: Follower, long: bool, tmp_path: Path) -> None:
    draw, count = np.random.default_rng(SEED), LONG if long else SHORT
    memory = fsspec.filesystem("memory")
    follower.announce(announced(built.old, 0))
    assert follower.live.snapshot is not None
    child, before, refusals = follower.live.snapshot.search._child.pid, follower.answers(), refused()
    assert before[0] == "g0" and all(len(ranked) == 20 for ranked in before[1])
    found: Counter[str] = Counter()
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        folder = shutil.copytree(built.new, tmp_path / f"g{number + 1}")
        manifest = decode_manifest((folder / MANIFEST).read_bytes())
        one_of_a_kind(folder, manifest, number)
        artifact, whole = announced(folder, number + 1), content(folder)
        while content(folder) == whole:  # a page may have been zero already
            KINDS[kind](folder, built.old, draw)
        if number % 2:  # over a store that has to be fetched from
            memory.put(str(folder), f"/damaged/{folder.name}", recursive=True)
            artifact = msgspec.structs.replace(artifact, url=f"memory://damaged/{folder.name}")
        follower.announce(artifact)
        found[kind] += refused() == refusals + sum(found.values()) + 1
        assert follower.live.snapshot.search._child.pid == child and follower.live.snapshot.name == "g0", kind
        if number % 10 == 0:
            assert follower.answers() == before
        shutil.rmtree(folder)
    memory.rm("/damaged", recursive=True)
    print(json.dumps({"scenario": 8, "seed": SEED, "damaged": count, "refused": sum(found.values()), "by_kind": found}))
    assert sum(found.values()) == count and follower.answers() == before
    assert not list((tmp_path / "cache").rglob("*.npy")), "nothing of them stays in the cache"


def one_of_a_kind(folder: Path, manifest: Manifest, number: int) -> None:
    """A manifest of its own: what was refused once is not looked at again."""
    other = msgspec.structs.replace(manifest, version=folder.name, created_ms=number)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(other)))


def test_a_whole_one_of_the_same_making_serves(built: Built, follower: Follower, tmp_path: Path) -> None:
    """The control: what is refused above is refused for its damage."""
    folder = shutil.copytree(built.new, tmp_path / "g2")
    one_of_a_kind(folder, decode_manifest((folder / MANIFEST).read_bytes()), 2)
    fsspec.filesystem("memory").put(str(folder), "/whole/g2", recursive=True)
    for artifact in (announced(built.old, 0), announced(folder, 2), announced(folder, 3, "memory://whole/g2")):
        follower.announce(artifact)
        assert follower.live.snapshot is not None and follower.live.snapshot.announced == artifact
    fsspec.filesystem("memory").rm("/whole", recursive=True)


def test_a_damaged_copy_in_the_cache_is_fetched_anew(built: Built, follower: Follower, tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(built.new), "/again/g1", recursive=True)
    artifact = announced(built.new, 1, "memory://again/g1")
    follower.announce(artifact)
    follower.announce(announced(built.old, 2))
    (copy,) = (tmp_path / "cache" / "generations").glob("g1-*")
    KINDS["one bit"](copy, built.old, np.random.default_rng(SEED))
    follower.announce(msgspec.structs.replace(artifact, created_ms=3))
    assert follower.live.snapshot is not None and follower.live.snapshot.name == "g1"
    assert content(copy) == content(built.new)
    fsspec.filesystem("memory").rm("/again", recursive=True)


def test_two_are_in_memory_at_most(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the one before is kept for a trial; a damaged candidate does not end the trial."""
    me, alive = psutil.Process(), list[int]()

    def start(*arguments: Any) -> SearchProcess:
        process = SearchProcess(*arguments)
        (server,) = (child for child in me.children() if "workers.search" in child.cmdline())
        alive.append(len(server.children()))
        return process

    monkeypatch.setattr(live, "SearchProcess", start)
    with closing(Follower(tmp_path / "cache", keep_previous=True)) as follower:
        for number in range(5):
            folder = shutil.copytree(built.new, tmp_path / f"g{number + 1}")
            one_of_a_kind(folder, decode_manifest((folder / MANIFEST).read_bytes()), number)
            if number == 3:
                (folder / "items.npy").unlink()
            follower.announce(announced(folder, number + 1))
            if number == 3:
                assert follower.live.previous is not None and follower.live.previous.name == "g2"
        assert alive == [1, 2, 2, 2] and follower.live.snapshot is not None and follower.live.previous is not None
        assert (follower.live.previous.name, follower.live.snapshot.name) == ("g3", "g5")
