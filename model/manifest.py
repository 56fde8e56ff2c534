"""What a generation directory holds, the proof that it is whole, and its index, loaded and probed.

    model/               what Model.save wrote, the item ids among it
    items.npy            item vectors (N, D) float32; a row is the item's place in the model's ids
    index.hnsw           their graph
    probes.safetensors   queries (P, D), their exact top 20 (rows, scores), the scores found through the graph; and,
                         where the graph has one, the scale of its columns (D,)
    manifest.json        Manifest; its own SHA-256 travels in the announcement

The search process imports this file and must start in well under a second: no torch, no fsspec.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from model.index import HnswIndex
from model.queries import Vectors

FORMAT = 1
MANIFEST, ITEMS, INDEX, PROBES = "manifest.json", "items.npy", "index.hnsw", "probes.safetensors"
PROBE_SLACK = 1e-4  # of the largest score: another processor sums in another order
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", re.ASCII)  # no "..", no leading "/"
_ROWS_AT_ONCE = 65_536


class DamagedGeneration(RuntimeError):
    """This directory is not the generation that was built. The message names the file."""


class MissingGeneration(DamagedGeneration):
    """Nothing is there. It has been deleted, or the store is not mounted, which looks the same and passes."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file has to be; sha256 in hexadecimal."""

    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the directory holds and where it comes from."""

    format: int
    version: str
    parent: str | None  # version that it was trained on from
    created_ms: int
    encoder: str
    items: int  # N
    dim: int  # D
    ef_search: int
    model_sha256: str  # over names and hashes of the model's files
    metrics: dict[str, float]  # "recall@20", and what the builder measured
    offsets: dict[int, int]  # partition -> offset of the clicks it was trained to
    files: dict[str, FileEntry]  # every file but the manifest


def manifest_sha256(folder: Path) -> str:
    """What the announcement of a generation carries."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def decode_manifest(raw: bytes, sha256: str | None = None) -> Manifest:
    """Raises DamagedGeneration on another SHA-256, another format, or names that leave the directory."""
    if sha256 is not None and hashlib.sha256(raw).hexdigest() != sha256:
        raise DamagedGeneration(f"{MANIFEST}: not the one that was announced")
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedGeneration(f"{MANIFEST}: {error}") from error
    if manifest.format != FORMAT:
        raise DamagedGeneration(f"{MANIFEST}: format {manifest.format}, this release reads {FORMAT}")
    for name in (manifest.version, *manifest.files):
        if not _NAME.fullmatch(name):
            raise DamagedGeneration(f"{MANIFEST}: bad name {name!r}")
    for name in {ITEMS, INDEX, PROBES} - manifest.files.keys():
        raise DamagedGeneration(f"{name}: not in the manifest")
    return manifest


def verify(folder: Path, manifest_sha256: str | None = None) -> Manifest:
    """The manifest of a whole generation. Raises DamagedGeneration on anything missing, added or changed.

    Without the announced `manifest_sha256` a manifest edited in step with its files goes unnoticed.
    """
    try:
        manifest = decode_manifest((folder / MANIFEST).read_bytes(), manifest_sha256)
    except FileNotFoundError as error:
        kind = DamagedGeneration if folder.exists() else MissingGeneration
        raise kind(f"{MANIFEST}: missing in {folder.name}") from error
    found = file_names(folder)
    for name in sorted(found ^ {*manifest.files, MANIFEST}):
        raise DamagedGeneration(f"{name}: {'not in the manifest' if name in found else 'missing'}")
    for name, expected in manifest.files.items():
        if (actual := file_entry(folder / name)) != expected:
            raise DamagedGeneration(f"{name}: {actual} instead of {expected}")
    if manifest.model_sha256 != model_sha256(manifest.files):
        raise DamagedGeneration(f"{MANIFEST}: model_sha256 is not that of its files")
    load_items(folder, manifest)
    return manifest


def file_names(folder: Path) -> set[str]:
    """Every file under a folder, by its path from there."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def file_entry(path: Path) -> FileEntry:
    """Of a file as it is now. Raises OSError."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def model_sha256(files: Mapping[str, FileEntry]) -> str:
    """One name for the model alone: two generations of one model share it."""
    lines = (f"{name} {entry.sha256}\n" for name, entry in sorted(files.items()) if name.startswith("model/"))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_items(folder: Path, manifest: Manifest) -> Vectors:
    """Item vectors (N, D), memory-mapped. Raises DamagedGeneration on another shape or dtype, or NaN."""
    try:
        items: Vectors = np.load(folder / ITEMS, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DamagedGeneration(f"{ITEMS}: {error}") from error
    if items.dtype != np.float32 or items.shape != (manifest.items, manifest.dim) or not items.flags.c_contiguous:
        raise DamagedGeneration(f"{ITEMS}: {items.dtype} {items.shape} for {manifest.items} x {manifest.dim}")
    for start in range(0, len(items), _ROWS_AT_ONCE):
        if not np.isfinite(items[start : start + _ROWS_AT_ONCE]).all():
            raise DamagedGeneration(f"{ITEMS}: not finite in rows from {start}")
    return items


def load_index(folder: Path, manifest: Manifest) -> HnswIndex:
    """The index of a verified generation, asked its probes. Raises DamagedGeneration on a wrong answer.

    A damaged graph can crash the process (FACTS.md, hnswlib): do it in a child.
    """
    items = load_items(folder, manifest)
    try:
        probes = load_file(folder / PROBES)
        index = HnswIndex.load(folder / INDEX, items, manifest.ef_search, probes.get("scale"))
        queries, rows, scores, found = (probes[name] for name in ("queries", "rows", "scores", "found"))
        _, found_now = index.search_graph(queries, scores.shape[1])  # (P, 20)
        exact_now = np.einsum("pkd,pd->pk", items[rows], queries)  # (P, 20)
    except (ValueError, RuntimeError, KeyError, IndexError, SafetensorError) as error:
        raise DamagedGeneration(f"{INDEX} or {PROBES}: {error}") from error
    for name, now, then in ((ITEMS, exact_now, scores), (INDEX, found_now, found)):
        known = np.isfinite(then)  # else a catalogue of fewer than 20
        differ = ~np.isclose(now, then, rtol=0, atol=PROBE_SLACK * np.abs(then[known]).max(initial=1e-6)) & known
        if wrong := int(differ.any(axis=1).sum()):
            raise DamagedGeneration(f"{name}: {wrong} of {len(queries)} probes are answered otherwise")
    return index
