"""What a generation is made of, whatever is announced, damaged or rolled back: on a real Kafka, without an encoder."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from model.checkpoint import publish_model
from model.config import ModelConfig
from model.learner import Learner
from model.model import Model
from model.probes import RecallTooLow
from model.sampling import Events
from stream.events import Artifact, Item, ItemVector, encode
from stream.producer import Producer
from workers import indexer
from workers.announcements import read_announcements
from workers.indexer import Indexer
from workers.settings import Indexer as IndexerSettings
from workers.settings import Settings

ITEMS = [f"i{row}" for row in range(30)]
TEXT = np.random.default_rng(5).normal(size=(30, 64)).astype(np.float32)
CONFIG = ModelConfig(text_dim=64, warmup_steps=0, replay=2)


@pytest.fixture
def settings(settings: Settings, monkeypatch: pytest.MonkeyPatch, closed_producers: None) -> Settings:
    monkeypatch.setattr(indexer, "Encoder", lambda *_, **__: SimpleNamespace(name="e", dim=64, device="cpu"))
    return settings.model_copy(update={"indexer": IndexerSettings(fresh_items=5)})


def started(settings: Settings, items: int = 20, *models: Artifact) -> Indexer:
    """It knows so many items and these announcements of models; what was due after its start is done."""
    one = Indexer(settings)
    for model in models:
        announce(settings, one, model)
    one._vectors = dict(zip(ITEMS[:items], TEXT, strict=False))
    for _ in range(3):
        one._not_before = 0.0
        one._build_if_due()
    return one


def more(one: Indexer, items: int) -> None:
    one._vectors = dict(zip(ITEMS[:items], TEXT, strict=False))
    one._not_before = 0.0
    one._build_if_due()


def trained(settings: Settings, name: str, created_ms: int) -> Artifact:
    learner = Learner(CONFIG, seed=created_ms)
    learner.add_items(ITEMS[:20], TEXT[:20])
    learner.learn(Events(["u"] * 20, ITEMS[:20], np.ones(20, np.float32), np.arange(20)))
    url = f"{settings.store}/models/{name}"
    digest = publish_model(learner.model(), url, "better")
    figures = {"candidate_ndcg@10": created_ms / 100}
    return Artifact(
        name=name, url=url, manifest_sha256=digest, created_ms=created_ms, encoder="e", metrics=figures, offsets={0: 7}
    )


def announce(settings: Settings, one: Indexer, model: Artifact) -> None:
    one._take(SimpleNamespace(topic=settings.topics.models.name, key=b"model", value=encode(model), offset=0))


def published(settings: Settings) -> list[Artifact]:
    return list(read_announcements(settings).generations.values())


def folder(artifact: Artifact) -> Path:
    return Path(artifact.url.removeprefix("file://"))


def damage(model: Artifact) -> None:
    Path(model.url, "weights.safetensors").write_bytes(b"damaged")


def delete(model: Artifact) -> None:
    shutil.rmtree(model.url)


def ids(artifact: Artifact) -> tuple[str | None, int]:
    """The model that it says it holds, and how many items."""
    return artifact.parent, len(Model.load(Path(artifact.url.removeprefix("file://")) / "model").ids)


def weights(artifact: Artifact) -> np.ndarray:
    model = Model.load(Path(artifact.url.removeprefix("file://")) / "model")
    return np.asarray(model.arrays["tower.ids"].numpy()[:20])


def test_texts_then_a_model_then_new_items(settings: Settings) -> None:
    one, model = started(settings), trained(settings, "m1", 10**14)
    assert [ids(generation) for generation in published(settings)] == [(None, 20)]
    announce(settings, one, model)
    more(one, 22)
    more(one, 26)  # four more than are indexed: not yet
    more(one, 27)
    assert [ids(generation) for generation in published(settings)] == [(None, 20), ("m1", 22), ("m1", 27)]
    _, second, third = published(settings)
    assert (
        second.metrics["candidate_ndcg@10"] == third.metrics["candidate_ndcg@10"] == model.metrics["candidate_ndcg@10"]
    )
    assert third.offsets == {0: 7} and np.array_equal(weights(second), weights(third)) and weights(third).any()


def test_a_restart_makes_nothing_that_is_there_already(settings: Settings) -> None:
    model = trained(settings, "m1", 10**14)
    started(settings, 20, model)
    again = started(settings, 20, model)
    assert [ids(generation) for generation in published(settings)] == [("m1", 20)]
    more(again, 25)
    first, second = published(settings)
    assert ids(second) == ("m1", 25) and np.array_equal(weights(first), weights(second))


@pytest.mark.parametrize("restarted", [True, False])
def test_what_was_rolled_back_does_not_come_back_with_new_items(settings: Settings, restarted: bool) -> None:
    m1, m2 = trained(settings, "m1", 1), trained(settings, "m2", 2)
    one = started(settings, 20, m1)
    announce(settings, one, m2)
    more(one, 20)
    good, bad = published(settings)
    one._producer.send_raw(settings.topics.generations.name, good.name.encode(), encode(good))  # a rollback
    one._producer.flush()
    if restarted:
        one = started(settings, 20, m2)
        assert [generation.name for generation in published(settings)] == [bad.name, good.name]
    more(one, 25)
    newest = published(settings)[-1]
    assert ids(newest) == ("m1", 25) and np.array_equal(weights(newest), weights(good))


@pytest.mark.parametrize("restarted", [True, False])
@pytest.mark.parametrize("spoil", [damage, delete])
def test_a_model_that_cannot_be_loaded_changes_nothing(
    settings: Settings, restarted: bool, spoil: Callable[[Artifact], None]
) -> None:
    """Nor does its name stand on what is built next: on the model before it, and never on none."""
    m1, m2 = trained(settings, "m1", 1), trained(settings, "m2", 10**14)
    spoil(m2)
    one = started(settings, 20, m1)
    (first,) = published(settings)
    if restarted:
        one = started(settings, 20, m2)
    else:
        announce(settings, one, m2)
        more(one, 20)
    assert [generation.name for generation in published(settings)] == [first.name]
    more(one, 25)
    newest = published(settings)[-1]
    assert ids(newest) == ("m1", 25) and newest.metrics.items() >= m1.metrics.items()
    assert np.array_equal(weights(newest), weights(first))


def test_a_damaged_generation_is_passed_over_for_the_one_before_it(settings: Settings) -> None:
    one = started(settings, 20, trained(settings, "m1", 1))
    announce(settings, one, trained(settings, "m2", 2))
    more(one, 20)
    first, damaged = published(settings)
    (Path(damaged.url.removeprefix("file://")) / "items.npy").write_bytes(b"")
    more(started(settings, 20), 25)
    newest = published(settings)[-1]
    assert ids(newest) == ("m1", 25) and np.array_equal(weights(newest), weights(first))


def test_a_release_that_reads_no_generation_builds_the_model_that_it_can_read(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(settings, 20, trained(settings, "m1", 1))
    load = Model.load

    def of_another_release(folder: Path, device: str = "cpu") -> Model:
        if "generations" in str(folder):
            raise ValueError("arrays differ")
        return load(folder, device)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "load", of_another_release)
        started(settings, 20, trained(settings, "m2", 10**14))
    assert ids(published(settings)[-1]) == ("m2", 20)


def test_texts_alone_are_taken_anew_each_time(settings: Settings) -> None:
    """Their mean and directions are the catalogue's, not those of the first few items."""
    more(started(settings, 2), 30)
    few, all_of_them = published(settings)
    model = Model.load(Path(all_of_them.url.removeprefix("file://")) / "model")
    np.testing.assert_allclose(model.arrays["text.mean"].numpy(), TEXT.mean(axis=0), atol=1e-5)
    assert ids(few) == (None, 2) and ids(all_of_them) == (None, 30)


def test_an_encoder_that_comes_back_builds_at_once(settings: Settings) -> None:
    started(settings, 20, trained(settings, "m1", 1))
    (mine,) = published(settings)
    other = msgspec.structs.replace(mine, name="other", encoder="another")
    with Producer(settings.connection) as producer:
        producer.send_raw(settings.topics.generations.name, b"other", encode(other))
    started(settings, 20)
    assert [(one.name == "other", one.encoder) for one in published(settings)][1:] == [(True, "another"), (False, "e")]


@pytest.mark.parametrize("spoil", [damage, delete])
def test_where_nothing_is_whole_texts_serve_under_no_model_s_name(
    settings: Settings, spoil: Callable[[Artifact], None]
) -> None:
    model = trained(settings, "m1", 1)
    spoil(model)
    started(settings, 20, model)
    (only,) = published(settings)
    assert ids(only) == (None, 20) and "candidate_ndcg@10" not in only.metrics


def test_a_store_that_is_not_mounted_says_nothing_of_the_model(settings: Settings) -> None:
    one, model = started(settings), trained(settings, "m1", 10**14)
    away = Path(settings.store, "models").rename(Path(settings.artifacts, "away"))
    announce(settings, one, model)
    more(one, 25)
    assert len(published(settings)) == 1
    away.rename(Path(settings.store, "models"))
    more(one, 25)
    assert ids(published(settings)[-1]) == ("m1", 25)


@pytest.mark.parametrize("pinned", [True, False])
def test_what_serves_while_the_new_one_is_on_trial_is_kept(
    settings: Settings, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However old it is: it was pinned or rolled back to. So is the new one where the clock has been set back."""
    one = started(settings.model_copy(update={"indexer": IndexerSettings(fresh_items=5, keep=2)}), 5)
    more(one, 10)
    old, topic = published(settings)[0], settings.topics.generations.name
    one._producer.send_raw(topic, b"pin" if pinned else old.name.encode(), encode(old))
    one._producer.flush()
    more(one, 15)
    assert folder(old).exists() and len(published(settings)) == 3
    monkeypatch.setattr("model.generation.time", SimpleNamespace(time_ns=lambda: 0))
    more(one, 20)
    assert len(published(settings)) == 3 + pinned and folder(old).exists() == pinned


def test_another_installation_s_generations_are_not_deleted(settings: Settings, tmp_path: Path) -> None:
    other = tmp_path / "other" / "generations" / "g1"
    other.mkdir(parents=True)
    one = started(settings, 5)
    for items in (10, 15, 20, 25, 30):
        more(one, items)
    names = {generation.name for generation in published(settings)}
    assert len(names) == settings.indexer.keep == len(list(Path(settings.store, "generations").iterdir()))
    assert other.exists() and str(Path(settings.store).parent) == settings.artifacts


def take(settings: Settings, one: Indexer, topic: str, item_id: str, value: bytes | None) -> None:
    one._take(SimpleNamespace(topic=getattr(settings.topics, topic).name, key=item_id.encode(), value=value, offset=0))


class Encodes:
    """An encoder that gives every text the same vector, and says which texts it was given."""

    name, dim, device = "e", 64, "cpu"

    def __init__(self) -> None:
        self.given: list[str] = []

    def encode(self, texts: list[str]) -> np.ndarray:
        self.given += texts
        return np.ones((len(texts), 64), np.float32)


@pytest.mark.parametrize("items_first", [True, False])
def test_a_removed_item_comes_back_after_a_restart(settings: Settings, items_first: bool) -> None:
    """In whatever order the two topics are read, and both may hold what was there before the nulls."""
    one, encoder, item = Indexer(settings), Encodes(), encode(Item(item_id="x", title="X"))
    one._encoder = encoder  # type: ignore[assignment]
    take(settings, one, "items", "x", item)
    one._encode(threading.Event())
    text_hash = one._hashes["x"]
    vector = ItemVector(item_id="x", encoder="e", text_hash=text_hash, vector=bytes(128))
    again = Indexer(settings)
    again._encoder = encoder  # type: ignore[assignment]
    for topic, value in [("items", item), ("vectors", encode(vector))][:: 1 if items_first else -1]:
        take(settings, again, topic, "x", value)
        take(settings, again, topic, "x", None)
    assert not again._vectors and not again._hashes
    take(settings, again, "items", "x", item)
    again._encode(threading.Event())
    assert len(encoder.given) == 2 and set(again._vectors) == {"x"}


def test_an_encoder_that_comes_back_sends_its_vectors_again(settings: Settings) -> None:
    """At its start; not in answer to those of another that still runs."""
    one, again, item = Indexer(settings), Indexer(settings), encode(Item(item_id="x", title="X"))
    one._encoder = again._encoder = encoder = Encodes()  # type: ignore[assignment]
    take(settings, one, "items", "x", item)
    one._encode(threading.Event())
    mine = ItemVector(item_id="x", encoder="e", text_hash=one._hashes["x"], vector=bytes(128))
    other = encode(msgspec.structs.replace(mine, encoder="another"))
    for topic, value in [("items", item), ("vectors", encode(mine)), ("vectors", other)]:
        take(settings, again, topic, "x", value)
    again._encode(threading.Event())
    assert len(encoder.given) == 2
    take(settings, again, "vectors", "x", other)
    again._encode(threading.Event())
    assert len(encoder.given) == 2 and set(again._vectors) == {"x"}


def test_an_import_leaves_builds_their_turn(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """And they do not follow each 5 items of it: as many as there are."""
    monkeypatch.setattr(indexer, "ENCODE_S", 0.0)
    monkeypatch.setattr(indexer, "ENCODE_AT_ONCE", 6)
    one = Indexer(settings)
    correct(settings, one, 10)
    assert not one._pending  # what is there at its start: all of it
    sizes = list[int]()
    for step in range(6):
        correct(settings, one, 30 if step == 2 else 0)
        one._build_if_due()
        sizes.append(len(published(settings)) and ids(published(settings)[-1])[1])
    assert sizes == [0, 10, 10, 22, 22, 30] and not one._pending


def test_it_looks_for_what_is_due_only_where_something_has_changed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes all ids, and an idle indexer polls five times a second. What failed is tried again all the same."""
    item = SimpleNamespace(
        topic=settings.topics.items.name, key=b"i", value=encode(Item(item_id="i", title="")), offset=0
    )
    looked, began, state = list[int](), time.monotonic(), SimpleNamespace(poll=0, fails=1)
    due, build = Indexer._due, Indexer._build

    def tail(*given: Any) -> Iterator[list[Any]]:
        given[-1]()
        for state.poll in range(40):
            yield [item] if state.poll in (0, 20) else []

    def looks(self: Indexer, base: Any) -> bool:
        looked.append(state.poll)
        return due(self, base)

    def full_once(self: Indexer) -> None:
        if state.fails:
            state.fails -= 1
            raise OSError("full")
        build(self)

    monkeypatch.setattr(indexer, "tail", tail)
    monkeypatch.setattr(indexer, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: began + state.poll}))
    monkeypatch.setattr(Indexer, "_due", looks)
    monkeypatch.setattr(Indexer, "_build", full_once)
    one = Indexer(settings)
    one._encoder = Encodes()  # type: ignore[assignment]
    one.run(threading.Event())
    assert looked == [1, 6, 20] and len(published(settings)) == 1


def correct(settings: Settings, one: Indexer, items: int) -> None:
    one._encoder = Encodes()  # type: ignore[assignment]
    for item_id in ITEMS[:items]:
        take(settings, one, "items", item_id, encode(Item(item_id=item_id, title="Corrected")))
    one._encode(threading.Event())


@pytest.mark.parametrize("restarted", [True, False])
def test_where_texts_alone_serve_corrected_ones_are_as_good_as_new(settings: Settings, restarted: bool) -> None:
    one = started(settings)
    if restarted:
        one = Indexer(settings)
        one._vectors = dict(zip(ITEMS[:20], TEXT, strict=False))
    correct(settings, one, 5)
    for _ in range(3):
        one._build_if_due()
    assert [ids(generation) for generation in published(settings)] == [(None, 20)] * 2
    model = Model.load(Path(published(settings)[-1].url.removeprefix("file://")) / "model")
    corrected = model.arrays["text.items"].numpy()[[model.ids.index(item_id) for item_id in ITEMS[:6]]]
    assert np.allclose(corrected[:5], corrected[0]) and not np.allclose(corrected[5], corrected[0])


def test_a_model_s_corrected_texts_come_with_the_next_model(settings: Settings) -> None:
    one = started(settings, 20, trained(settings, "m1", 1))
    correct(settings, one, 20)
    one._build_if_due()
    assert [ids(generation) for generation in published(settings)] == [("m1", 20)]


@pytest.mark.parametrize(("took_s", "wait_s"), [(600.0, 600.0), (0.1, indexer.RETRY_S)])
@pytest.mark.parametrize("error", [RecallTooLow("recall@20"), OSError("full")])
def test_a_build_that_fails_is_tried_again_after_as_long_as_it_took(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception, took_s: float, wait_s: float
) -> None:
    one, now = started(settings), [time.monotonic()]

    def failing(*_: object, **__: object) -> None:
        now[0] += took_s
        raise error

    monkeypatch.setattr(indexer, "build_generation", failing)
    monkeypatch.setattr(indexer, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: now[0]}))
    more(one, 30)
    assert one._not_before - now[0] == pytest.approx(wait_s)
