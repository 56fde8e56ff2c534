"""Build, publish and fetch generations (model/manifest.py says what one holds)."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from safetensors.numpy import save_file

from model.index import ExactIndex, Progress
from model.manifest import (
    FORMAT,
    INDEX,
    ITEMS,
    MANIFEST,
    PROBES,
    DamagedGeneration,
    Manifest,
    MissingGeneration,
    decode_manifest,
    file_entry,
    file_names,
    model_sha256,
    verify,
)
from model.probes import EF_SEARCH, PROBE_K, SHAPES, ModelLike, Shape, best_index, walk
from model.store import reaching

FEWEST_WALKS, MOST_WALKS = 256, 1024  # a graph misses whole queries: 3 of 256 are no measure of it
NUM_PROBES = 64
BUILT = re.compile(r"g\d{8}T\d{6}-\d{3}(-[0-9a-f]{12})?")  # names by the indexer, in time's order; of its copies
CACHED = 3  # copies of fetched generations kept: what serves, the one before it, the next
DEAD_S = 3600  # without a further file, and a copy begun is one that a killed role has left


def build_generation(
    folder: Path,
    model: ModelLike,
    *,
    version: str,
    encoder: str,
    offsets: Mapping[int, int],
    parent: str | None = None,
    metrics: Mapping[str, float] | None = None,
    shapes: Sequence[Shape] = SHAPES,
    ef_search: Sequence[int] = EF_SEARCH,
    threads: int = 1,
    progress: Progress | None = None,
) -> Manifest:
    """Write a generation beside `folder`, check it, flush it, rename it last: `folder` is whole or absent.

    The first `ef_search` with recall@20 of 0.975 is kept, else the best, of graphs in these shapes. Raises
    RecallTooLow under 0.95, ValueError on vectors that are empty, not finite or do not match the ids, FileExistsError.
    """
    if folder.exists():
        raise FileExistsError(f"generation {folder} exists")
    vectors = np.ascontiguousarray(model.item_vectors(), dtype=np.float32)  # (N, D)
    if vectors.ndim != 2 or len(vectors) != len(model.ids):
        raise ValueError(f"{len(model.ids)} ids for vectors {vectors.shape}")
    if not np.isfinite(vectors).all() or not vectors.size:
        raise ValueError(f"vectors {vectors.shape} must be finite and not empty")
    exact = ExactIndex(vectors)
    num_walks = min(MOST_WALKS, max(FEWEST_WALKS, len(vectors) // 16))  # a small catalogue is scanned anyway
    walks = walk(model, exact, num_walks)  # (W, D)
    rows, truth = exact.search(walks, PROBE_K)  # (W, 20)
    index, share = best_index(vectors, walks, truth, ef_search, shapes, threads, progress)
    found = index.search_graph(walks, PROBE_K)[1]
    probes: dict[str, NDArray[Any]] = {"queries": walks, "rows": rows, "scores": truth, "found": found}
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    try:
        model.save(building / "model")
        np.save(building / ITEMS, vectors)
        index.save(building / INDEX)
        arrays = {name: np.ascontiguousarray(array[:NUM_PROBES]) for name, array in probes.items()}
        save_file(arrays if index.scale is None else arrays | {"scale": index.scale}, building / PROBES)
        files = {name: file_entry(building / name) for name in sorted(file_names(building))}
        manifest = Manifest(
            format=FORMAT,
            version=version,
            parent=parent,
            created_ms=time.time_ns() // 1_000_000,
            encoder=encoder,
            items=len(vectors),
            dim=vectors.shape[1],
            ef_search=index.ef,
            model_sha256=model_sha256(files),
            metrics={**(metrics or {}), f"recall@{PROBE_K}": share},
            offsets=dict(sorted(offsets.items())),
            files=files,
        )
        (building / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        verify(building)
        _seal(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return manifest


def _seal(building: Path, folder: Path) -> None:
    """Flush every file and directory, then rename: after a power cut the folder is whole or absent."""
    for path in [*building.rglob("*"), building]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # mkdtemp's and safetensors' are for one user alone
        _sync(path)
    building.rename(folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(folder: Path, url: str) -> str:
    """Copy a whole generation into the store at `url` (a folder or any fsspec URL), its manifest last.

    Returns the generation's own URL, `url`/version. A generation built in the store stays where it is.
    Raises DamagedGeneration, FileExistsError where another generation has this version, OSError where the store is
    full or out of reach.
    """
    manifest = verify(folder)
    store, root = fsspec.core.url_to_fs(url)
    target = f"{root.rstrip('/')}/{manifest.version}"
    address = str(store.unstrip_protocol(target))
    with reaching():
        if store.exists(f"{target}/{MANIFEST}"):
            if store.cat_file(f"{target}/{MANIFEST}") != (folder / MANIFEST).read_bytes():
                raise FileExistsError(f"{address} is another generation")
            return address
        try:
            for name in [*sorted(manifest.files), MANIFEST]:
                store.makedirs(f"{target}/{name}".rpartition("/")[0], exist_ok=True)
                store.put_file(str(folder / name), f"{target}/{name}")
        except Exception:  # a full store: the next try has another name, and needs the room
            with suppress(Exception):
                store.rm(target, recursive=True)
            raise
    return address


def fetch(url: str, cache_dir: Path, manifest_sha256: str, *, verified: bool = True) -> Path:
    """The folder of a verified generation: in place where `url` is local, else a copy under `cache_dir`, where older
    copies are deleted.

    verified=False leaves the one in place to a caller that verifies it anyway. Raises DamagedGeneration on anything
    but what was announced, OSError where the store is out of reach.
    """
    store, root = fsspec.core.url_to_fs(url)
    if isinstance(store, LocalFileSystem):
        if not Path(root).parent.is_dir():
            raise FileNotFoundError(f"{url}: not even the folder around it is there: is the store mounted?")
        if verified:
            verify(Path(root), manifest_sha256)
        return Path(root)
    folder = cache_dir / f"{Path(root).name}-{manifest_sha256[:12]}"
    if folder.exists():
        try:
            verify(folder, manifest_sha256)
            return folder
        except DamagedGeneration:
            shutil.rmtree(folder)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # another role on this machine may be deleting the same one
        for begun in cache_dir.glob(".fetching-*"):  # first: they may be what fills the disk
            if begun.stat().st_mtime < time.time() - DEAD_S:
                shutil.rmtree(begun)
    copy = Path(tempfile.mkdtemp(prefix=".fetching-", dir=cache_dir))
    try:
        _download(store, root, copy, manifest_sha256)
        verify(copy, manifest_sha256)
        _seal(copy, folder)
    except OSError:
        if not folder.exists():
            raise
        verify(folder, manifest_sha256)  # another role on this machine was faster
    finally:
        shutil.rmtree(copy, ignore_errors=True)  # not there any more where it is `folder` now
    with suppress(OSError):  # as above
        prune(str(cache_dir), CACHED, {folder.name})
    return folder


@reaching()
def _download(store: Any, root: str, copy: Path, sha256: str) -> None:
    try:
        raw = store.cat_file(f"{root}/{MANIFEST}")
        (copy / MANIFEST).write_bytes(raw)
        for name in decode_manifest(raw, sha256).files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{root}/{name}", str(copy / name))
    except FileNotFoundError as error:
        kind = DamagedGeneration if store.exists(root) else MissingGeneration
        raise kind(f"{error}: missing in the store") from error


@reaching()
def prune(url: str, keep: int, spare: Set[str] = frozenset()) -> list[str]:
    """Delete all but the `keep` newest generations of a store (or cache) and those to spare; the names of the deleted.

    What has no manifest is deleted, too, where its name says that the indexer built it before the newest: it died over
    it. Else what has no readable one is left alone: it may be on its way in, or kept for inspection.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    store, root = fsspec.core.url_to_fs(url)
    found, dead = [], []
    for path in store.ls(root, detail=False):
        try:
            manifest = decode_manifest(store.cat_file(f"{path}/{MANIFEST}"))
        except FileNotFoundError:
            if BUILT.fullmatch(Path(path).name):
                dead.append(path)
            continue
        except (OSError, DamagedGeneration):
            continue
        if not Path(path).name.startswith("."):
            found.append((manifest.created_ms, manifest.version, path))
    newest = max(found, default=(0, "", ""))[2]
    old = [path for _, _, path in sorted(found)[:-keep] if Path(path).name not in spare]
    for path in old:
        store.rm_file(f"{path}/{MANIFEST}")  # first: a half deleted generation must not look whole
    old += [path for path in dead if path < newest and Path(path).name not in spare]
    for path in old:
        store.rm(path, recursive=True)
    return [Path(path).name for path in old]
