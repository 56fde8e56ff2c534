"""Recorded event streams, read as Upwell's own events: for replay, benchmarks and evaluation.

A folder holds events.jsonl (user_id, item_id, event_type, ts in unix seconds, optional value) and items.jsonl
(item_id, title, text, categories), plain or as .jsonl.gz. `ml-100k` (GroupLens, MovieLens 100K) is read out of the
`recbole` wheel as it came from PyPI: fetched once by pip, neither unpacked nor committed.
"""

import gzip
import io
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from stream.downloads import DOWNLOADS
from stream.events import EVENT_TYPES, MAX_ID, Click, Item
from stream.text import clean

WHEELS = DOWNLOADS / "datasets"
LOCK = Path(__file__).with_name("requirements-data.lock")
ML_100K = "recbole/dataset_example/ml-100k/ml-100k"

# What other recorders call our event types. A type of neither list becomes a click and keeps its name in
# the context.
ALIASES = {
    "impression": "view", "pageview": "view",
    "arrow": "click", "comment": "click", "open": "click", "read": "click",
    "favorite": "like", "push": "like", "upvote": "like",
    "add_to_cart": "cart", "addtocart": "cart",
    "buy": "purchase", "order": "purchase", "transaction": "purchase",
    "refund": "return",
    "listen": "play", "watch": "play", "finish": "complete",
    "rating": "rate", "review": "rate",
    "post": "share",
    "boo": "dislike", "downvote": "dislike",
}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """A catalogue and its events in order of time; events of one stamp in the recorder's order."""

    name: str
    items: list[Item]
    events: list[Click]


class NoDataset(ValueError):
    """It is not there, and what would be; or a line of it is not of the form."""


Id = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID)] | int


class EventLine(msgspec.Struct):
    """An event as a recorder has it; `ts` in unix seconds."""

    user_id: Id
    item_id: Id
    event_type: str
    ts: float
    value: float | None = None


class _ItemLine(msgspec.Struct):
    item_id: Id
    title: str
    text: str = ""
    categories: list[str] = []


L = TypeVar("L", EventLine, _ItemLine)


def load_dataset(name_or_folder: str | Path, wheel: Path | None = None) -> Dataset:
    """The dataset of a folder, or "ml-100k" out of `wheel` (by default fetched once).

    Raises NoDataset for a name that is neither, a missing file and a line that is not of the form.
    """
    if str(name_or_folder) == "ml-100k":
        return _ml_100k(wheel or _fetched_wheel())
    folder = Path(name_or_folder)
    items = [_item(line) for line in _lines(_file(folder, "items.jsonl"), _ItemLine)]
    return Dataset(folder.name, items, numbered(folder.name, _lines(_file(folder, "events.jsonl"), EventLine)))


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.exists():
            return path
    raise NoDataset(f"{folder}: no {name} or {name}.gz there; a dataset is such a folder, or 'ml-100k'")


def _lines(path: Path, kind: type[L]) -> Iterator[L]:
    decoder = msgspec.json.Decoder(kind)
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield decoder.decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise NoDataset(f"{path.name}, line {number}: {error}") from error


def _item(line: _ItemLine) -> Item:
    return Item(
        item_id=str(line.item_id), title=clean(line.title)[:1000], text=clean(line.text), categories=line.categories
    )


def numbered(name: str, lines: Iterable[EventLine]) -> list[Click]:
    """Our events, by time. Numbered after a stable sort, so that an event's id is the same at every replay."""
    ordered = sorted(lines, key=lambda line: line.ts)
    return [_click(f"{name}-{number:06d}", line) for number, line in enumerate(ordered, 1)]


def _click(event_id: str, line: EventLine) -> Click:
    kind = ALIASES.get(line.event_type, line.event_type)
    known = kind in EVENT_TYPES
    return Click(
        event_id=event_id,
        user_id=str(line.user_id),
        item_id=str(line.item_id),
        event_type=kind if known else "click",  # type: ignore[arg-type]
        ts_ms=int(line.ts * 1000),
        value=line.value,
        context={} if known else {"event_type": line.event_type},
    )


def _fetched_wheel() -> Path:
    """The locked wheel. Raises NoDataset with the command where pip is missing or fails."""
    if not list(WHEELS.glob("recbole-*.whl")):
        fetch = ["pip", "download", "--quiet", "--no-deps", "--require-hashes", "-r", str(LOCK), "-d", str(WHEELS)]
        if subprocess.run([sys.executable, "-P", "-m", *fetch]).returncode != 0:
            raise NoDataset(f"ml-100k is not in {WHEELS}, and could not be fetched: {' '.join(fetch)}")
    return max(WHEELS.glob("recbole-*.whl"))


def _ml_100k(wheel: Path) -> Dataset:
    with zipfile.ZipFile(wheel) as archive:
        items = [_film(*row) for row in _rows(archive, f"{ML_100K}.item")]
        ratings = [
            EventLine(user, item, "rate", float(stamp), float(rating))
            for user, item, rating, stamp in _rows(archive, f"{ML_100K}.inter")
        ]
    return Dataset("ml-100k", items, numbered("ml-100k", ratings))


def _rows(archive: zipfile.ZipFile, path: str) -> Iterator[list[str]]:
    """Tab-separated, under one line of typed headers."""
    with archive.open(path) as raw, io.TextIOWrapper(raw, "utf-8") as file:
        next(file)
        yield from (line.rstrip("\n").split("\t") for line in file)


def _film(item_id: str, title: str, year: str, genres: str) -> Item:
    if year.isdigit():
        title = f"{title} ({year})"  # as MovieLens has it; text alone ranks unseen films badly without
    return Item(item_id=item_id, title=title, text=f"{title}. {genres}", categories=genres.split())
