"""Scenario 7: SIGKILL between every two file operations of publishing, pruning and loading.

The indexer, the trainer and the server do nothing with files but these functions; the announcement, which follows
`publish`, is one record in Kafka. Each runs in a fork that kills itself before its n-th file operation, for every n.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from model.checkpoint import fetch_model, prune_models, publish_model
from model.config import ModelConfig
from model.generation import build_generation, fetch, prune, publish
from model.learner import Learner
from model.manifest import manifest_sha256
from model.model import Model

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
MAX_OPERATIONS = 1000


def killed_before_each(work: Callable[[], object]) -> Iterator[int]:
    """After each death of `work`, the number of the operation that it did not come to; ends when it gets through."""
    for nth in range(1, MAX_OPERATIONS):
        pid = os.fork()
        if pid == 0:
            _work_until(nth, work)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "the work failed: see its traceback"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield nth
    raise AssertionError(f"more than {MAX_OPERATIONS} operations")


def _work_until(nth: int, work: Callable[[], object]) -> None:
    passed = 0

    def count(event: str, _: object) -> None:
        nonlocal passed
        if event in OPERATIONS:
            passed += 1
            if passed == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)  # a fork inherits no thread pool
    learner = Learner(ModelConfig(text_dim=8, projected_text_dim=4, tower_dim=4, covisitation_rank=4, hidden=8))
    text = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    learner.add_items([f"item-{row}" for row in range(50)], text)
    return learner.model()


def built(folder: Path, model: Model) -> str:
    build_generation(folder, model, version=folder.name, encoder="e", offsets={})
    return manifest_sha256(folder)


def test_the_indexer_killed_while_it_builds_and_publishes(model: Model, tmp_path: Path) -> None:
    """The generation before stays whole; the new one is whole or refused; the indexer's next one serves."""
    store = tmp_path / "store"
    old = built(tmp_path / "g0", model)
    publish(tmp_path / "g0", str(store))
    new = built(tmp_path / "g1", model)
    deaths = 0

    def work() -> None:
        built(tmp_path / f"again{deaths}" / "g1", model)
        publish(tmp_path / "g1", str(store))
        prune(str(store), keep=2)

    (tmp_path / "again0").mkdir()
    for deaths in killed_before_each(work):
        (tmp_path / f"again{deaths}").mkdir()
        fetch(str(store / "g0"), tmp_path / "cache", old)
        assert whole_or_absent(store / "g1", new)
        for folder in tmp_path.glob("again*/g1"):
            assert whole_or_absent(folder, manifest_sha256(folder))
        assert prune(str(store), keep=2) == []
    assert deaths > 20
    fetch(str(store / "g1"), tmp_path / "cache", new)


def whole_or_absent(folder: Path, digest: str) -> bool:
    """Without a manifest it is nobody's; with one it has to be all there."""
    if not (folder / "manifest.json").exists():
        return True
    return Model.load(fetch(str(folder), folder.parent, digest) / "model").ids[0] == "item-0"


def test_the_indexer_killed_while_it_prunes(model: Model, tmp_path: Path) -> None:
    """What is half deleted never looks whole, and goes next time; what is to be kept is whole."""
    store, names = tmp_path / "store", [f"g20260101T00000{second}-000" for second in range(3)]
    digests = {name: built(tmp_path / name, model) for name in names}

    def fill() -> None:
        for name in names:
            publish(tmp_path / name, str(store))

    fill()
    deaths = 0
    for _ in killed_before_each(lambda: prune(str(store), keep=1, spare={names[1]})):
        deaths += 1
        assert whole_or_absent(store / names[0], digests[names[0]])
        prune(str(store), keep=1, spare={names[1]})
        assert sorted(path.name for path in store.iterdir()) == names[1:]
        for name in names[1:]:
            fetch(str(store / name), tmp_path / "cache", digests[name])
        fill()
    assert deaths > 10 and not (store / names[0]).exists()


def test_the_server_killed_while_it_fetches(model: Model, tmp_path: Path) -> None:
    """Its successor has the whole generation, whatever lies in the cache."""
    new, cache = built(tmp_path / "g1", model), tmp_path / "cache"
    url = publish(tmp_path / "g1", "memory://chaos")
    deaths = 0
    for deaths in killed_before_each(lambda: Model.load(fetch(url, cache, new) / "model")):
        assert all(whole_or_absent(folder, new) for folder in cache.glob("g1-*")), deaths
    assert deaths > 20
    Model.load(fetch(url, cache, new) / "model")
    fsspec.filesystem("memory").rm("/chaos", recursive=True)


def test_the_trainer_killed_while_it_stores(model: Model, tmp_path: Path) -> None:
    """The models announced before stay whole. The one on its way is not announced, so nobody asks for it."""
    store = str(tmp_path / "models")
    digest = publish_model(model, f"{store}/m0", "first")

    def work() -> None:
        publish_model(model, f"{store}/m1", "better")
        prune_models(store, keep=5)

    deaths = 0
    for _ in killed_before_each(work):
        deaths += 1
        fetch_model(f"{store}/m0", digest)
        prune_models(store, keep=5)
    assert deaths > 10
    fetch_model(f"{store}/m1", digest)
