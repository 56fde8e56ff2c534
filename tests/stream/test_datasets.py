import gzip
import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from stream.datasets import ML_100K, WHEELS, load_dataset
from stream.events import Item, decode, decode_click, encode

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def write(folder: Path, events: list[dict[str, object]], items: list[dict[str, object]]) -> Path:
    for name, rows in (("events", events), ("items", items)):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def event(ts: float, kind: str = "view", user: str = "u", **rest: object) -> dict[str, object]:
    return {"user_id": user, "item_id": "i", "event_type": kind, "ts": ts, **rest}


def test_a_folder_becomes_our_events(tmp_path: Path) -> None:
    events = [event(2, "boo"), event(1, "view", "late"), event(1, "purchase", value=3), event(3, "sniff")]
    items: list[dict[str, object]] = [
        {"item_id": "i", "title": "A &amp; B", "text": "<b>bold</b>", "categories": ["c"]}
    ]
    data = load_dataset(write(tmp_path, events, items))
    assert data.items == [Item(item_id="i", title="A & B", text="bold", categories=["c"])]
    seen = [(e.user_id, e.event_type, e.ts_ms, e.value) for e in data.events]
    assert seen == [  # by time, the recorder's order within a stamp
        ("late", "view", 1000, None),
        ("u", "purchase", 1000, 3.0),
        ("u", "dislike", 2000, None),
        ("u", "click", 3000, None),
    ]
    assert data.events[3].context == {"event_type": "sniff"}
    assert [e.event_id for e in data.events] == [f"{tmp_path.name}-{n:06d}" for n in (1, 2, 3, 4)]
    assert data == load_dataset(tmp_path)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no items.jsonl"):
        load_dataset(tmp_path)
    write(tmp_path, [event(1), {"user_id": "u"}], [])
    with pytest.raises(ValueError, match=r"events.jsonl.gz, line 2: .*item_id"):
        load_dataset(tmp_path)
    write(tmp_path, [event(1, user="")], [])  # all who have no id would be one user
    with pytest.raises(ValueError, match=r"line 1: .*length >= 1 - at `\$.user_id`"):
        load_dataset(tmp_path)


def test_ml_100k_is_read_inside_the_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "recbole-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{ML_100K}.item",
            "item_id:token\tmovie_title\trelease_year\tclass\n7\tÅ\t1995\tDrama War\n8\tunknown\t\tDrama\n",
        )
        archive.writestr(f"{ML_100K}.inter", "user_id:token\t...\n3\t7\t4\t20\n5\t7\t1\t10\n")
    data = load_dataset("ml-100k", wheel)
    assert data.items == [
        Item(item_id="7", title="Å (1995)", text="Å (1995). Drama War", categories=["Drama", "War"]),
        Item(item_id="8", title="unknown", text="unknown. Drama", categories=["Drama"]),
    ]
    assert [(e.event_id, e.user_id, e.value) for e in data.events] == [
        ("ml-100k-000001", "5", 1.0),
        ("ml-100k-000002", "3", 4.0),
    ]


def check(name: str | Path, users: int, items: int, events: int) -> None:
    """Sizes as published, all of it valid on the wire, in order, ids unique."""
    data = load_dataset(name)
    assert (len(data.items), len(data.events)) == (items, events)
    assert len({e.user_id for e in data.events}) == users
    assert len({e.event_id for e in data.events}) == events
    assert all(a.ts_ms <= b.ts_ms for a, b in zip(data.events, data.events[1:], strict=False))
    for item in data.items:
        decode(encode(item), Item)
    for click in data.events[:: max(1, events // 2000)]:
        assert decode_click(encode(click)) == click


@pytest.mark.skipif(not list(WHEELS.glob("recbole-*.whl")), reason="no recbole wheel: make venv fetches it")
def test_the_real_ml_100k() -> None:
    check("ml-100k", 943, 1682, 100_000)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not on this machine")
@pytest.mark.parametrize(
    ("name", "users", "items", "events"),
    [("movietweetings-100k", 16_554, 10_506, 100_000), ("ptt-r-zh", 1_182, 2_883, 20_218)],
)
def test_real_folders(name: str, users: int, items: int, events: int) -> None:
    check(SHARED / name, users, items, events)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared data sets are not on this machine")
def test_a_return_stays_a_return() -> None:
    kinds: Counter[str] = Counter(e.event_type for e in load_dataset(SHARED / "online-retail").events)
    assert kinds == {"purchase": 386_326, "return": 8_475}
