"""hnswlib 0.8.0's file, read with suspicion: hnswlib itself believes every byte of it and crashes or answers wrongly.

G points of width W. The file: a header, the lowest layer as G records (links, point, label), the upper layers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.queries import Rows, Vectors

# offset of layer 0, most points, G, bytes of a record, offsets of label and point in it; top level, entry point;
# most links above, in layer 0, M; level multiplier; ef_construction
_HEADER = struct.Struct("<6QiI3QdQ")
_POINTS_AT_ONCE = 16_384


def width(path: Path) -> int:
    """W of the points in a file; ValueError where it has no header."""
    _, _, _, _, label_at, point_at, *_ = _header(path)
    return (label_at - point_at) // 4


def check(path: Path, shape: tuple[int, int], points: Callable[[Rows], Vectors], lifted: bool) -> None:
    """ValueError unless the lowest layer holds `points` of the labels 0..G-1, once each, and links lead to points.

    shape: (G, W). Where the points are lifted, the last column may differ by rounding: another processor lifts
    otherwise. The upper layers, a twentieth of the file, are not looked at.
    """
    num_points, width = shape
    _, _, count, size, label_at, point_at, _, entry, _, most_links, *_ = _header(path)
    expected = (num_points, 4 * width, point_at + 4 * width + 8, 4 + 4 * most_links)
    if (count, label_at - point_at, size, point_at) != expected or entry >= count:
        raise ValueError(f"{path.name}: its header is not one of {num_points} points of {width}")
    if path.stat().st_size < _HEADER.size + count * size:
        raise ValueError(f"{path.name}: ends in the middle of its points")
    formats = ["<u4", ("<u4", most_links), ("<f4", width), "<u8"]
    offsets = [0, 4, point_at, label_at]
    names = ["num_links", "links", "point", "label"]
    record = np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": size})
    layer = np.memmap(path, record, "r", _HEADER.size, count)
    if not np.array_equal(np.sort(layer["label"]), np.arange(count)):
        raise ValueError(f"{path.name}: its labels are not one for each point")
    for start in range(0, count, _POINTS_AT_ONCE):
        _check_records(path.name, layer[start : start + _POINTS_AT_ONCE], count, points, lifted)


def _check_records(
    name: str, part: NDArray[np.void], count: int, points: Callable[[Rows], Vectors], lifted: bool
) -> None:
    found, truth = part["point"], points(part["label"].astype(np.int64))  # (b, W)
    if not np.array_equal(found[:, :-1], truth[:, :-1]) or not _same_last(found, truth, lifted):
        raise ValueError(f"{name}: holds other points")
    linked = np.arange(part["links"].shape[1]) < part["num_links"][:, None]  # (b, L)
    if (part["num_links"] > part["links"].shape[1]).any() or (part["links"][linked] >= count).any():
        raise ValueError(f"{name}: a link leads nowhere")


def _same_last(found: Vectors, truth: Vectors, lifted: bool) -> bool:
    """Whether points (b, W) have the same last column. Lifted, it is the root of a difference: of the longest vectors
    the root of rounding alone. So squares are compared, signed, by the squared length that all points share."""
    if not lifted:
        return np.array_equal(found[:, -1], truth[:, -1])
    last, longest = found[:, -1].astype(np.float64), np.square(truth).sum(axis=1).max()
    return np.allclose(last * np.abs(last), truth[:, -1] ** 2, rtol=0, atol=1e-4 * longest)


def _header(path: Path) -> tuple[int, ...]:
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError(f"{path.name}: {len(header)} bytes are no HNSW file")
    return _HEADER.unpack(header)
