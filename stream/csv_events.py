"""Events out of somebody's CSV file, by a map from our names to its columns."""

import csv
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

from stream.datasets import Dataset, EventLine, numbered
from stream.events import Item
from stream.text import clean

REQUIRED = ("user", "item", "ts")
OPTIONAL = ("type", "value", "title")


def parse_columns(text: str) -> dict[str, str]:
    """The map of "user=…,item=…,ts=…[,type=…,value=…,title=…]". Raises ValueError naming what is wrong.

    >>> parse_columns("user=visitorid,item=itemid,ts=timestamp")
    {'user': 'visitorid', 'item': 'itemid', 'ts': 'timestamp'}
    """
    columns = dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)
    unknown = columns.keys() - {*REQUIRED, *OPTIONAL}
    missing = [name for name in REQUIRED if name not in columns]
    if unknown or missing:
        raise ValueError(f"columns {text!r}: missing {missing}, unknown {sorted(unknown)}")
    return columns


def load_csv(path: Path, columns: Mapping[str, str]) -> Dataset:
    """ts in unix seconds, in milliseconds (above 1e11) or ISO 8601 (UTC where it names no zone); an event
    without a type is a click. Raises ValueError with the line that cannot be read."""
    titles: dict[str, str] = {}  # of the items, in order of appearance: the first that is not empty
    events = numbered(path.stem, _lines(path, columns, titles))
    return Dataset(path.stem, [Item(item_id=i, title=clean(t)[:1000]) for i, t in titles.items()], events)


def _lines(path: Path, columns: Mapping[str, str], titles: dict[str, str]) -> Iterator[EventLine]:
    reader = csv.DictReader(_text(path))
    try:
        absent = [column for column in columns.values() if column not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(f"{path}: no column {', '.join(absent)}; there are {', '.join(reader.fieldnames or ())}")
        for row in reader:
            said = {name: (row[column] or "").strip() for name, column in columns.items()}
            try:
                if not (said["user"] and said["item"]):
                    raise ValueError(f"{'item' if said['user'] else 'user'} is empty")
                value = float(said["value"]) if said.get("value") else None
                yield EventLine(said["user"], said["item"], said.get("type") or "click", _seconds(said["ts"]), value)
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
            titles[said["item"]] = titles.get(said["item"]) or said.get("title", "")
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}") from error


def _text(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:  # Excel begins with a mark
        for number, line in enumerate(file, 1):
            try:
                line.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{path}, line {number}: not UTF-8") from None
            yield line


def _seconds(text: str) -> float:
    try:
        stamp = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(stamp):
        raise ValueError(f"{text} is no time")
    return stamp / 1000 if stamp > 1e11 else stamp
