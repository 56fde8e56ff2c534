"""Fresh items beside the index, hidden ones out, and a snapshot renewed; lists against a scan: test_rules.py."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from model.config import ModelConfig
from model.generation import build_generation
from model.learner import Learner
from model.manifest import manifest_sha256
from model.sampling import Events
from model.user_state import Entry, digest
from stream.events import Artifact, Item, ItemVector
from workers.catalogue import Catalogue
from workers.search import SearchProcess, SearchProcessDied
from workers.snapshot import Query, Snapshot

NUM_INDEXED, NUM_FRESH, WIDTH = 150, 12, 16
IDS = [f"i{number}" for number in range(NUM_INDEXED + NUM_FRESH)]
HIDDEN = {"i3", "i77", f"i{NUM_INDEXED + 1}"}


def vector(item_id: str, encoder: str = "e") -> ItemVector:
    values = np.random.default_rng(int(item_id[1:])).normal(size=WIDTH).astype("<f2")
    return ItemVector(item_id=item_id, encoder=encoder, text_hash="", vector=values.tobytes())


def filled() -> Catalogue:
    catalogue = Catalogue()
    for item_id in IDS:
        catalogue.take_item(item_id, Item(item_id=item_id, title=item_id, available=item_id not in HIDDEN))
        catalogue.take_vector(item_id, vector(item_id))
    catalogue.take_item("i999", Item(item_id="i999", title="of another encoder"))
    catalogue.take_vector("i999", vector("i999", "another"))
    return catalogue


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    learner = Learner(ModelConfig(text_dim=WIDTH, tower_dim=8, covisitation_rank=8, projected_text_dim=8, hidden=16))
    known = IDS[:NUM_INDEXED]
    text = np.stack([np.frombuffer(vector(item_id).vector, "<f2").astype(np.float32) for item_id in known])
    learner.add_items(known, text)
    draw = np.random.default_rng(0)
    items = [known[number] for number in draw.integers(0, NUM_INDEXED, 400)]
    users = [f"u{number}" for number in draw.integers(0, 20, 400)]
    learner.learn(Events(users, items, np.ones(400, np.float32), np.arange(400) * 1000))
    model, folder = learner.model(), Path(tmp_path_factory.mktemp("generations")) / "g1"
    build_generation(folder, model, version="g1", encoder="e", offsets={})
    sha = manifest_sha256(folder)
    announced = Artifact(name="g1", url=str(folder), manifest_sha256=sha, created_ms=0, encoder="e")
    with SearchProcess(folder, sha) as search:
        yield Snapshot.of(announced, search, model, filled())


def query(history: list[str], seen: set[str]) -> Query:
    past = [Entry(item_id, 1.0, 1000 * at) for at, item_id in enumerate(history)]
    return Query(past, b"".join(map(digest, sorted(seen))), 100_000)


def test_fresh_items_can_win(snapshot: Snapshot) -> None:
    """Of all eligible items every one comes, the fresh ones among them, none of another encoder's."""
    (ranked,) = snapshot.recommend([query(["i1"], set())], len(IDS))
    assert {place.item_id for place in ranked} == set(IDS) - HIDDEN


def test_what_changes_the_lists_is_told() -> None:
    catalogue, item = Catalogue(), Item(item_id="i1", title="one")
    assert catalogue.take_item("i1", item)
    assert not catalogue.take_item("i1", msgspec.structs.replace(item, title="uno"))
    assert catalogue.take_item("i1", msgspec.structs.replace(item, available=False))
    assert catalogue.take_item("i1", msgspec.structs.replace(item, available=False, categories=["sea"]))
    assert catalogue.take_item("i1", None)
    assert catalogue.take_vector("i1", vector("i1"))
    assert not catalogue.take_vector("i1", vector("i1"))
    assert catalogue.take_vector("i1", vector("i2"))  # its text was corrected


def test_renewed_is_as_made_anew(snapshot: Snapshot) -> None:
    """And what has not changed is not made again: no array is copied and no id hashed for one that is sold out."""
    catalogue, last = filled(), f"i{NUM_INDEXED + 5}"
    told, gone = vector("i6").vector, (None, None)
    changes: list[tuple[str, Item | None, ItemVector | None]] = [
        ("i5", Item(item_id="i5", title="", available=False), vector("i5")),
        ("i3", Item(item_id="i3", title=""), vector("i3")),
        ("i8", *gone),
        ("i9999", Item(item_id="i9999", title=""), vector("i9999")),
        (last, *gone),
        (last, Item(item_id=last, title=""), msgspec.structs.replace(vector(last), vector=told)),
        *((f"i{number}", *gone) for number in (9999, *range(NUM_INDEXED, NUM_INDEXED + NUM_FRESH))),
        *((item_id, *gone) for item_id in snapshot.strangers),
    ]
    asked, now = [query([], set()), query(["i1", last], {"i2", last, "i9999"})], snapshot
    for item_id, item, of_text in changes:
        before = now
        catalogue.take_item(item_id, item)
        catalogue.take_vector(item_id, of_text)
        now = before.renewed(catalogue)
        anew = Snapshot.of(now.announced, now.search, now.indexed, catalogue)
        assert now.rows == anew.rows and now.strangers == anew.strangers
        assert now.recommend(asked, len(IDS)) == anew.recommend(asked, len(IDS))
        if item_id in snapshot.own:
            assert now.model is before.model and now.digests is before.digests
    assert set(now.rows) == set(snapshot.own) and not set(now.strangers) & set(snapshot.strangers)


def test_a_closed_search_says_so(snapshot: Snapshot) -> None:
    """Live.recommend asks the next generation on this error: a swap costs no answer."""
    folder, sha = Path(snapshot.announced.url), snapshot.announced.manifest_sha256
    other = SearchProcess(folder, sha)
    other.close()
    with pytest.raises(SearchProcessDied):
        other.search(np.zeros((1, snapshot.model.dim), np.float32), 1)


def test_one_known_item_makes_a_list_personal(snapshot: Snapshot) -> None:
    """Whatever else is in the history: who came from an older catalogue is no stranger."""
    for items, known in ((["i1", "unknown"], True), (["unknown"], False), ([], False)):
        assert snapshot.knows(query(items, set()).history) == known
