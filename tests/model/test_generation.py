import errno
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import generation, probes
from model.config import ModelConfig
from model.generation import build_generation, fetch, prune, publish
from model.index import ExactIndex, HnswIndex
from model.learner import Learner
from model.manifest import (
    DamagedGeneration,
    Manifest,
    MissingGeneration,
    decode_manifest,
    file_entry,
    load_index,
    load_items,
    manifest_sha256,
    verify,
)
from model.model import Model
from model.probes import ModelLike, RecallTooLow
from model.queries import Rows, Vectors, unit
from model.sampling import History

N, E = 2500, 24
PAGE = 4096


def build(folder: Path, model: ModelLike, **changes: Any) -> Manifest:
    facts: dict[str, Any] = {"version": folder.name, "encoder": "test", "offsets": {1: 20, 0: 10}} | changes
    return build_generation(folder, model, **facts)


@pytest.fixture(scope="module")
def model() -> Model:
    learner = Learner(ModelConfig(text_dim=E, projected_text_dim=16, tower_dim=8, covisitation_rank=8))
    text = np.random.default_rng(0).normal(size=(N, E)).astype(np.float32)
    learner.add_items([f"item-{i}" for i in range(N)], text / np.linalg.norm(text, axis=1, keepdims=True))
    return learner.model()


@pytest.fixture(scope="module")
def built(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "g1"
    build(folder, model, metrics={"hit_rate": 0.2}, parent="g0")
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "g1")


def test_what_is_built_is_whole(built: Path, model: Model) -> None:
    manifest = verify(built, manifest_sha256(built))
    assert (manifest.version, manifest.parent, manifest.encoder) == ("g1", "g0", "test")
    assert (manifest.items, manifest.dim, manifest.offsets) == (N, model.dim, {0: 10, 1: 20})
    assert manifest.metrics["hit_rate"] == 0.2 and manifest.metrics["recall@20"] >= 0.95
    assert [path.name for path in built.parent.iterdir()] == ["g1"]
    assert (load_items(built, manifest) == model.item_vectors()).all()
    assert Model.load(built / "model").ids == model.ids
    queries = model.item_vectors()[:50]
    rows, _ = load_index(built, manifest).search(queries, 10)
    assert (rows == ExactIndex(model.item_vectors()).search(queries, 10)[0]).mean() > 0.9


def test_the_same_model_builds_the_same_files(built: Path, model: Model, tmp_path: Path) -> None:
    manifest = build(tmp_path / "g2", model)
    assert manifest.files == verify(built).files and manifest.model_sha256 == verify(built).model_sha256


def test_the_figure_of_the_index_is_its_own(model: Model, tmp_path: Path) -> None:
    """Not that of the generation before, whose figures an index of the same model takes over."""
    manifest = build(tmp_path / "g", model, metrics={"recall@20": 0.5, "ndcg@10": 0.125})
    assert manifest.metrics["recall@20"] >= 0.95 and manifest.metrics["ndcg@10"] == 0.125


def test_all_of_it_is_on_the_disk_before_its_name_is(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut must leave no folder that only looks whole."""
    synced, left = list[Path](), list[set[Path]]()
    sync, rename = generation._sync, Path.rename

    def noted(path: Path) -> None:
        synced.append(path)
        sync(path)

    def renamed(building: Path, to: Path) -> Path:
        left.append({building, *building.rglob("*")} - set(synced))
        synced.clear()
        return rename(building, to)

    monkeypatch.setattr(generation, "_sync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    build(tmp_path / "g", model)
    assert left == [set()] and synced == [tmp_path]


def test_a_generation_can_be_read_by_other_users(built: Path) -> None:
    """mkdtemp's folder and the files of safetensors are for their owner alone: roles need not run as one user."""
    for path in (built, *built.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


class Changed:
    """A model with other vectors or ids."""

    def __init__(self, model: Model, vectors: np.ndarray[Any, Any]) -> None:
        self.ids, self._model, self._vectors = model.ids, model, vectors

    def item_vectors(self) -> np.ndarray[Any, Any]:
        return self._vectors

    def user_vectors(self, histories: Sequence[History], now_ms: Sequence[int]) -> np.ndarray[Any, Any]:
        return self._model.user_vectors(histories, now_ms)

    def save(self, folder: Path) -> None:
        self._model.save(folder)


def test_a_model_that_cannot_be_indexed_leaves_nothing(model: Model, tmp_path: Path) -> None:
    vectors = model.item_vectors().copy()
    vectors[5, 3] = np.nan
    with pytest.raises(ValueError, match="finite"):
        build(tmp_path / "g", Changed(model, vectors))
    with pytest.raises(ValueError, match="2500 ids"):
        build(tmp_path / "g", Changed(model, vectors[1:]))
    with pytest.raises(DamagedGeneration, match=r"manifest\.json"):  # NaN is no JSON
        build(tmp_path / "g", model, metrics={"loss": float("nan")})
    with pytest.raises(DamagedGeneration, match="bad name"):
        build(tmp_path / "g", model, version="../g")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_misses_too_much_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(RecallTooLow, match=r"under 0\.95"):
        build(tmp_path / "g", model, shapes=((4, 10),), ef_search=(20,))
    assert not list(tmp_path.iterdir())


def test_ef_grows_until_recall_is_good(model: Model, tmp_path: Path) -> None:
    narrow = build(tmp_path / "a", model, shapes=((4, 20),), ef_search=(20, 40, 80, 160, 320, 640))
    assert narrow.ef_search > 20 and narrow.metrics["recall@20"] >= 0.98


def test_another_shape_is_built_where_the_first_does_not_do(model: Model, tmp_path: Path) -> None:
    """At an ef where one query is not scanned: a batch of all probes would be, and find all."""
    wide = build(tmp_path / "a", model, shapes=((2, 4), (24, 400)), ef_search=(60,))
    assert wide.metrics["recall@20"] >= 0.99
    with pytest.raises(RecallTooLow):
        build(tmp_path / "b", model, shapes=((2, 4),), ef_search=(60,))


def test_the_scale_of_the_columns_goes_with_the_graph(folder: Path) -> None:
    """Twice the right one: another order of points, which no inner product shows."""
    stored = load_file(folder / "probes.safetensors")
    assert (stored["scale"] > 0).all() and np.ptp(stored["scale"]) > 0
    save_file(stored | {"scale": 2 * stored["scale"]}, folder / "probes.safetensors")
    rewrite(folder, files=verify_files(folder))
    with pytest.raises(DamagedGeneration, match="other points"):
        load_index(folder, verify(folder))


def test_a_generation_from_before_scales_is_read(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "column_scale", lambda _: None)
    manifest = build(tmp_path / "g0", model)
    assert "scale" not in load_file(tmp_path / "g0" / "probes.safetensors")
    assert load_index(tmp_path / "g0", manifest).scale is None


def test_made_up_users_have_short_and_long_pasts_and_pauses(model: Model) -> None:
    """As many kinds as a mix has situations: what it weighs in each decides what a graph must find."""
    asked: list[tuple[int, int]] = []

    class Asked(Changed):
        def user_vectors(self, histories: Sequence[History], now_ms: Sequence[int]) -> np.ndarray[Any, Any]:
            pasts = zip(histories, now_ms, strict=True)
            asked.extend((len(past.rows), now - past.ts_ms[-1]) for past, now in pasts if len(past.rows))
            assert all(len(set(past.rows.tolist())) == len(past.rows) for past in histories)
            return super().user_vectors(histories, now_ms)

    walks = probes.walk(Asked(model, model.item_vectors()), ExactIndex(model.item_vectors()), 60)
    assert walks.shape == (60, model.dim) and np.isfinite(walks).all()
    lengths, pauses = map(np.array, zip(*asked[-60:], strict=True))
    assert 2 <= (lengths == 1).sum() <= 20  # users are met on their way: some have just come
    assert set(pauses) == set(probes.PAUSES_MS)
    for pause in probes.PAUSES_MS:
        assert lengths[pauses == pause].min() < 10 and lengths[pauses == pause].max() >= 20


class MissesWhoHasJustCome(HnswIndex):
    """Finds all, but at a narrow ef nothing for a query as short as one item: misses come as whole queries."""

    def search(self, queries: Vectors, k: int, *_: Any) -> tuple[Rows, Vectors]:
        rows, scores = self.exact.search(queries, k)
        missed = (np.square(queries).sum(axis=1) < 1.5) & (self.ef < 128)
        return rows, np.where(missed[:, None], -np.inf, scores)


class Summed:
    """Items of length 1, far apart; a user is the sum of theirs."""

    def __init__(self) -> None:
        self.ids = [f"item-{row}" for row in range(400)]
        self._vectors = unit(np.random.default_rng(0).normal(size=(400, 64)).astype(np.float32))

    def item_vectors(self) -> Vectors:
        return self._vectors

    def user_vectors(self, histories: Sequence[History], now_ms: Sequence[int]) -> Vectors:
        return np.stack([self._vectors[past.rows].sum(axis=0) for past in histories])

    def save(self, folder: Path) -> None:
        folder.mkdir()


def test_ef_grows_until_who_has_just_come_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "HnswIndex", MissesWhoHasJustCome)
    model = Summed()
    exact = ExactIndex(model.item_vectors())
    walks = probes.walk(model, exact, generation.MOST_WALKS)
    _, truth = exact.search(walks, probes.PROBE_K)
    index, share = probes.best_index(exact.vectors, walks, truth, probes.EF_SEARCH, probes.SHAPES, 1)
    assert (index.ef, share) == (128, 1.0)


def test_a_generation_is_never_overwritten(folder: Path, model: Model) -> None:
    with pytest.raises(FileExistsError):
        build(folder, model)
    verify(folder)


def flip(path: Path, generator: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[generator.integers(len(data))] ^= 1 << generator.integers(8)
    path.write_bytes(data)


def truncate(path: Path, generator: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: generator.integers(path.stat().st_size)])


def spoil_page(path: Path, generator: np.random.Generator, content: bytes) -> None:
    data = path.read_bytes()
    start = int(generator.integers(-(-len(data) // PAGE))) * PAGE
    path.write_bytes(data[:start] + content[: len(data) - start] + data[start + PAGE :])


DAMAGES: dict[str, Callable[[Path, np.random.Generator], Any]] = {
    "truncated": truncate,
    "bit flipped": flip,
    "page of zeros": lambda path, generator: spoil_page(path, generator, bytes(PAGE)),
    "page of noise": lambda path, generator: spoil_page(path, generator, generator.bytes(PAGE)),
    "grown": lambda path, generator: path.write_bytes(path.read_bytes() + generator.bytes(9)),
    "removed": lambda path, _: path.unlink(),
    "a file beside it": lambda path, _: path.with_name("more").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused(damage: str, built: Path, tmp_path: Path) -> None:
    """Every file in turn. A bit of the manifest that changes no meaning is caught by its announced SHA-256."""
    announced = manifest_sha256(built)
    names = sorted(path.relative_to(built) for path in built.rglob("*") if path.is_file())
    assert len(names) >= 6
    for seed, name in enumerate(names):
        folder = shutil.copytree(built, tmp_path / f"{seed}")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        DAMAGES[damage](folder / name, np.random.default_rng(seed))
        assert before != {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(DamagedGeneration) as refusal:
            verify(folder, announced)
        assert ("more" if damage == "a file beside it" else name.name) in str(refusal.value)


def test_files_of_two_generations_do_not_mix(folder: Path, model: Model, tmp_path: Path) -> None:
    other = build(tmp_path / "g2", Changed(model, model.item_vectors()[::-1].copy()))
    for name in ("items.npy", "index.hnsw", "probes.safetensors"):
        mixed = shutil.copytree(folder, tmp_path / name)
        shutil.copy(tmp_path / "g2" / name, mixed / name)
        with pytest.raises(DamagedGeneration, match=name):
            verify(mixed)
        manifest = verify(folder)
        shutil.copy(tmp_path / "g2" / name, mixed / name)
        rewrite(mixed, files=manifest.files | {name: other.files[name]})
        with pytest.raises(DamagedGeneration, match=r"probes are answered otherwise|other points"):
            load_index(mixed, verify(mixed))


def test_a_graph_without_links_is_seen_by_the_probes(folder: Path) -> None:
    """Right in form, in every point and label; and probed though so few items are served by the scan."""
    data = bytearray((folder / "index.hnsw").read_bytes())
    (size,) = struct.unpack_from("<Q", data, 24)
    for start in range(96, 96 + N * size, size):
        data[start : start + 4] = bytes(4)
    (folder / "index.hnsw").write_bytes(data)
    rewrite(folder, files=verify_files(folder))
    with pytest.raises(DamagedGeneration, match="probes are answered otherwise"):
        load_index(folder, verify(folder))


def test_probes_that_are_off_by_a_hundredth_are_not_the_processor_s_rounding(folder: Path) -> None:
    stored = load_file(folder / "probes.safetensors")
    for name, file in (("scores", "items.npy"), ("found", "index.hnsw")):
        save_file(stored | {name: stored[name] * np.float32(1.01)}, folder / "probes.safetensors")
        rewrite(folder, files=verify_files(folder))
        with pytest.raises(DamagedGeneration, match=rf"{file}: .* answered otherwise"):
            load_index(folder, verify(folder))


def rewrite(folder: Path, **changes: Any) -> None:
    """An edited manifest that is right in itself."""
    path = folder / "manifest.json"
    edited = msgspec.structs.replace(msgspec.json.decode(path.read_bytes(), type=Manifest), **changes)
    path.write_bytes(msgspec.json.encode(edited))


def test_an_edited_manifest_is_not_the_announced_one(folder: Path) -> None:
    announced = manifest_sha256(folder)
    rewrite(folder, encoder="another")
    assert verify(folder).encoder == "another"
    with pytest.raises(DamagedGeneration, match="announced"):
        verify(folder, announced)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format 2"),
        ({"items": N + 1}, r"items\.npy"),
        ({"dim": 3}, r"items\.npy"),
        ({"version": "../../g1"}, "bad name"),
        ({"version": "/etc"}, "bad name"),
        ({"model_sha256": "0" * 64}, "model_sha256"),
        ({"files": {}}, "not in the manifest"),
    ],
)
def test_a_manifest_that_does_not_fit(change: dict[str, Any], reason: str, folder: Path) -> None:
    rewrite(folder, **change)
    with pytest.raises(DamagedGeneration, match=reason):
        verify(folder)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "model/../../evil", ".hidden", "a//b", "", "a\\b"])
def test_a_name_never_leaves_the_folder(name: str, folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_bytes())
    raw["files"][name] = raw["files"]["items.npy"]
    with pytest.raises(DamagedGeneration, match="bad name"):
        decode_manifest(json.dumps(raw).encode())


def test_vectors_that_are_not_finite_are_refused(folder: Path) -> None:
    items = np.load(folder / "items.npy")
    items[700, 1] = np.inf
    np.save(folder / "items.npy", items)
    rewrite(folder, files=verify_files(folder))
    with pytest.raises(DamagedGeneration, match=r"items\.npy: not finite"):
        verify(folder)


def verify_files(folder: Path) -> dict[str, Any]:
    names = json.loads((folder / "manifest.json").read_bytes())["files"]
    return {name: file_entry(folder / name) for name in names}


@pytest.fixture
def store(request: pytest.FixtureRequest) -> str:
    return f"memory://{request.node.originalname}"


def test_published_and_fetched(built: Path, store: str, tmp_path: Path) -> None:
    url = publish(built, store)
    assert url.endswith("/g1") and publish(built, store) == url
    copy = fetch(url, tmp_path / "cache", manifest_sha256(built))
    assert copy.parent == tmp_path / "cache" and verify(copy) == verify(built)
    modified = (copy / "items.npy").stat().st_mtime_ns
    assert fetch(url, tmp_path / "cache", manifest_sha256(built)) == copy
    assert (copy / "items.npy").stat().st_mtime_ns == modified  # from the cache
    truncate(copy / "items.npy", np.random.default_rng(0))
    assert verify(fetch(url, tmp_path / "cache", manifest_sha256(built))) == verify(built)  # fetched anew
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_two_roles_of_a_machine_fetch_the_same_at_once(
    built: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache, sha256 = publish(built, store), tmp_path / "cache", manifest_sha256(built)
    download = generation._download

    def slow(*args: Any) -> None:
        monkeypatch.undo()
        fetch(url, cache, sha256)  # the other one's: done before this one's
        download(*args)

    monkeypatch.setattr(generation, "_download", slow)
    copy = fetch(url, cache, sha256)
    assert verify(copy) == verify(built) and list(cache.iterdir()) == [copy]


def test_a_cache_keeps_the_newest_copies_and_the_one_just_asked_for(folder: Path, store: str, tmp_path: Path) -> None:
    cache, there = tmp_path / "cache", list[tuple[str, str]]()
    for number in range(6):
        rewrite(folder, version=f"v{number}", created_ms=number)
        there.append((publish(folder, store), manifest_sha256(folder)))
        fetch(there[-1][0], cache, there[-1][1])
    assert sorted(copy.name[:2] for copy in cache.iterdir()) == ["v3", "v4", "v5"]
    fetch(there[0][0], cache, there[0][1])  # rolled back to
    assert sorted(copy.name[:2] for copy in cache.iterdir()) == ["v0", "v3", "v4", "v5"]


def test_a_local_generation_is_used_where_it_lies(built: Path, tmp_path: Path) -> None:
    assert fetch(publish(built, str(built.parent)), tmp_path, manifest_sha256(built)) == built
    url = publish(built, f"file://{tmp_path}/elsewhere")
    assert fetch(url, tmp_path / "cache", manifest_sha256(built)) == tmp_path / "elsewhere" / "g1"
    assert not (tmp_path / "cache").exists()


def test_a_damaged_store_is_refused(built: Path, store: str, tmp_path: Path) -> None:
    url, memory = publish(built, store), fsspec.filesystem("memory")
    with pytest.raises(DamagedGeneration, match="announced"):
        fetch(url, tmp_path, "0" * 64)
    whole = memory.cat_file(f"{url}/items.npy")
    memory.pipe_file(f"{url}/items.npy", whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(DamagedGeneration, match=r"items\.npy"):
        fetch(url, tmp_path, manifest_sha256(built))
    memory.rm_file(f"{url}/index.hnsw")
    with pytest.raises(DamagedGeneration, match=r"index\.hnsw"):
        fetch(url, tmp_path, manifest_sha256(built))
    memory.rm_file(f"{url}/manifest.json")  # as while it is being published
    with pytest.raises(DamagedGeneration, match=r"manifest\.json") as refused:
        fetch(url, tmp_path, manifest_sha256(built))
    assert not isinstance(refused.value, MissingGeneration)
    assert not list(tmp_path.iterdir())


def test_a_store_that_is_not_mounted_says_nothing_of_the_generation(store: str, tmp_path: Path) -> None:
    """It holds no folder of this name: live roles ask again, and refuse for good what is damaged."""
    with pytest.raises(MissingGeneration):
        fetch(f"{store}/g1", tmp_path, "0" * 64)
    with pytest.raises(FileNotFoundError, match="mounted"):
        fetch(str(tmp_path / "store" / "g1"), tmp_path, "0" * 64)
    assert not list(tmp_path.iterdir())


def test_a_version_is_published_once(built: Path, folder: Path, store: str) -> None:
    publish(built, store)
    rewrite(folder, encoder="another")
    with pytest.raises(FileExistsError, match="another generation"):
        publish(folder, store)


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("no endpoint answers")])
def test_what_the_store_has_no_room_for_leaves_nothing_there(
    error: Exception, built: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    put = memory.put_file

    def full(source: str, target: str) -> None:
        if target.endswith("items.npy"):
            raise error
        put(source, target)

    monkeypatch.setattr(memory, "put_file", full)
    with pytest.raises(OSError, match=str(error)):
        publish(built, store)
    assert memory.find(store) == []


def test_damage_is_not_published(folder: Path, store: str) -> None:
    flip(folder / "index.hnsw", np.random.default_rng(0))
    with pytest.raises(DamagedGeneration):
        publish(folder, store)
    assert not fsspec.filesystem("memory").exists(store)


def test_the_newest_are_kept(folder: Path, store: str) -> None:
    for version, created_ms in (("b", 3000), ("c", 1000), ("a", 2000), ("d", 1500)):
        rewrite(folder, version=version, created_ms=created_ms)
        publish(folder, store)
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{store}/coming/items.npy", b"")  # no manifest yet
    assert prune(store, keep=4) == []
    assert prune(store, keep=2) == ["c", "d"]
    assert sorted(Path(path).name for path in memory.ls(store, detail=False)) == ["a", "b", "coming"]
    with pytest.raises(ValueError, match="at least 1"):
        prune(store, keep=0)


def test_what_a_dead_indexer_left_is_deleted_once_a_newer_one_is_whole(folder: Path, store: str) -> None:
    memory, times = fsspec.filesystem("memory"), [f"g20260101T00000{second}-000" for second in range(4)]
    for number, version in enumerate(times[:3]):
        rewrite(folder, version=version, created_ms=number)
        publish(folder, store)
    memory.rm_file(f"{store}/{times[0]}/manifest.json")  # died while it deleted it
    for half in (times[3], "backup"):  # on its way in; not the indexer's
        memory.pipe_file(f"{store}/{half}/items.npy", b"")
    assert prune(store, keep=2, spare={times[0]}) == []
    assert prune(store, keep=2) == [times[0]]
    assert sorted(Path(path).name for path in memory.ls(store, detail=False)) == ["backup", *times[1:]]


def test_a_copy_that_a_dead_role_began_is_deleted_before_room_is_needed(
    built: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be what has filled the disk, on which no fetch ends well."""
    for name, age_s in (("old", 4000), ("new", 3000)):
        (began := tmp_path / f".fetching-{name}").mkdir()
        os.utime(began, (time.time() - age_s,) * 2)
    monkeypatch.setattr(generation, "_download", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        fetch(publish(built, store), tmp_path, manifest_sha256(built))
    assert [path.name for path in tmp_path.glob(".fetching-*")] == [".fetching-new"]


def test_what_is_no_whole_generation_is_neither_counted_nor_deleted(folder: Path, store: str) -> None:
    memory = fsspec.filesystem("memory")
    for version, created_ms in (("a", 1000), ("b", 2000)):
        rewrite(folder, version=version, created_ms=created_ms)
        publish(folder, store)
    rewrite(folder, version="c", created_ms=0)
    memory.put(str(folder), f"{store}/.building-c", recursive=True)  # about to be renamed
    memory.pipe_file(f"{store}/damaged/manifest.json", b"{")
    assert prune(store, keep=2) == []
    assert memory.exists(f"{store}/.building-c/manifest.json") and memory.exists(f"{store}/damaged/manifest.json")
