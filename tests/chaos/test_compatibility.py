"""Scenario 17: docs/compatibility.md, held: bytes of every released form, and what a release does with the next one's.

GOLDEN is never edited: a release that changes a form adds its own bytes under its version and goes on reading these.
"""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from model.config import ModelConfig
from model.learner import Learner
from model.manifest import MANIFEST, DamagedGeneration, FileEntry, Manifest, decode_manifest
from model.model import Model
from model.user_state import EMPTY, Applied, Entry, Limits, UserState, apply_clicks, decode_state, encode_state
from stream.events import (
    VERSION,
    WIRE_TYPES,
    Artifact,
    BadEvent,
    Because,
    Click,
    DeadLetter,
    Erasure,
    Event,
    Item,
    ItemVector,
    Ranked,
    Recommendations,
    decode,
    encode,
)
from stream.producer import Producer
from stream.topics import Topics
from tests.records import Record
from workers.announcements import Announcements, newest_model
from workers.backup import BadBackup, read_backup
from workers.live import Live
from workers.settings import Settings
from workers.states import keep_newest
from workers.training_input import Texts
from workers.user_worker import UserWorker

CLICK = Click(
    event_id="e1",
    user_id="u1",
    item_id="i1",
    event_type="like",
    ts_ms=1700000000000,
    value=0.5,
    context={"page": "home"},
)
EARLIER: dict[bytes, Event] = {  # read still, written no more
    b'{"version":1,"user_id":"u1","items":[{"item_id":"i2","score":0.25}],"generation":"g1","source":"personal",'
    b'"partition":3,"offset":7,"event_id":"e1","clicked_ms":1,"sent_ms":2}': Recommendations(
        user_id="u1", items=[Ranked("i2", 0.25)], generation="g1", source="personal", partition=3, offset=7,
        event_id="e1", clicked_ms=1, sent_ms=2,
    ),
    b'{"version":1,"user_id":"u1","items":[{"item_id":"i2","score":0.25},{"item_id":"i3","score":0.125,'
    b'"propensity":0.5,"because":[{"item_id":"i1","share":0.75}],"explained":0.25,"under":{"default":0.0}}],'
    b'"generation":"g1","source":"personal","partition":3,"offset":7,"event_id":"e1","clicked_ms":1,"sent_ms":2,'
    b'"arm":"wide"}': Recommendations(
        user_id="u1", generation="g1", source="personal", partition=3, offset=7, event_id="e1", clicked_ms=1,
        items=[Ranked("i2", 0.25), Ranked("i3", 0.125, 0.5, [Because("i1", 0.75)], 0.25, {"default": 0.0})],
        sent_ms=2, arm="wide",
    ),
}  # fmt: skip
GOLDEN: dict[bytes, Event] = {
    b'{"version":1,"event_id":"e1","user_id":"u1","item_id":"i1","event_type":"like","ts_ms":1700000000000,"value":0.5,'
    b'"context":{"page":"home"}}': CLICK,
    b'{"version":1,"item_id":"i1","title":"Tides","text":"On tides.","categories":["sea"],"attributes":{"lang":"en"},'
    b'"published_ms":1700000000000,"available":false}': Item(
        item_id="i1", title="Tides", text="On tides.", categories=["sea"], attributes={"lang": "en"},
        published_ms=1700000000000, available=False,
    ),
    b'{"version":1,"item_id":"i1","encoder":"minilm","text_hash":"ab","vector":"ADwAvA=="}': ItemVector(
        item_id="i1", encoder="minilm", text_hash="ab", vector=b"\x00\x3c\x00\xbc"
    ),
    b'{"version":1,"user_id":"u1","items":[{"item_id":"i2","score":0.25},{"item_id":"i3","score":0.125,'
    b'"propensity":0.5,"because":[{"item_id":"i1","share":0.75}],"explained":0.25,"under":{"default":0.0}}],'
    b'"generation":"g1","source":"personal","partition":3,"offset":7,"event_id":"e1","clicked_ms":1,"sent_ms":2,'
    b'"arm":"wide","updated_ms":1}': Recommendations(
        user_id="u1", generation="g1", source="personal", partition=3, offset=7, event_id="e1", clicked_ms=1,
        items=[Ranked("i2", 0.25), Ranked("i3", 0.125, 0.5, [Because("i1", 0.75)], 0.25, {"default": 0.0})],
        sent_ms=2, arm="wide", updated_ms=1,
    ),
    b'{"version":1,"name":"g1","url":"s3://b/g1","manifest_sha256":"ff","created_ms":1,"encoder":"minilm",'
    b'"metrics":{"ndcg@10":0.125},"offsets":{"0":5},"parent":"m1"}': Artifact(
        name="g1", url="s3://b/g1", manifest_sha256="ff", created_ms=1, encoder="minilm", metrics={"ndcg@10": 0.125},
        offsets={0: 5}, parent="m1",
    ),
    b'{"version":1,"topic":"upwell.clicks","partition":1,"offset":2,"cause":"version: no","key":"dTE=",'
    b'"payload":"e30=","truncated":false,"ts_ms":3}': DeadLetter(
        topic="upwell.clicks", partition=1, offset=2, cause="version: no", key=b"u1", payload=b"{}", ts_ms=3
    ),
    b'{"version":1,"event_type":"erase","user_id":"u1","requested_ms":4}': Erasure(
        event_type="erase", user_id="u1", requested_ms=4
    ),
}  # fmt: skip
GOLDEN_STATE = bytes.fromhex(
    "959193a26931cb3ff8000000000000cf0000018bcfe56800c408ae2a1effba11cf0ac4081b5d5e51f54f0f040104"
)
GOLDEN_MANIFEST = b"""{"format":1,"version":"g1","parent":"m1","created_ms":1,"encoder":"minilm","items":2,"dim":3,
"ef_search":20,"model_sha256":"aa","metrics":{"recall@20":1.0},"offsets":{"0":5},"files":{
"index.hnsw":{"size_bytes":1,"sha256":"bb"},"items.npy":{"size_bytes":2,"sha256":"cc"},
"model/config.json":{"size_bytes":3,"sha256":"dd"},"probes.safetensors":{"size_bytes":4,"sha256":"ee"}}}"""
KINDS = sorted(GOLDEN, key=lambda raw: type(GOLDEN[raw]).__name__)
names = [type(GOLDEN[raw]).__name__ for raw in KINDS]


def changed(raw: bytes, **fields: Any) -> bytes:
    return msgspec.json.encode(json.loads(raw) | fields)


def test_every_wire_type_has_its_bytes() -> None:
    assert {type(event) for event in GOLDEN.values()} == set(WIRE_TYPES) and VERSION == 1


@pytest.mark.parametrize("raw", KINDS, ids=names)
def test_wire_bytes_stay(raw: bytes) -> None:
    event = GOLDEN[raw]
    assert encode(event) == raw
    assert decode(raw, type(event)) == event


@pytest.mark.parametrize("raw", EARLIER)
def test_what_was_written_before_is_read(raw: bytes) -> None:
    assert decode(raw, type(EARLIER[raw])) == EARLIER[raw]


@pytest.mark.parametrize("raw", KINDS, ids=names)
def test_the_release_before_reads_a_new_field_and_refuses_a_new_version(raw: bytes) -> None:
    event = GOLDEN[raw]
    assert decode(changed(raw, mood="good"), type(event)) == event
    with pytest.raises(BadEvent, match="version: Expected `int` <= 1"):
        decode(changed(raw, version=2), type(event))


@pytest.mark.parametrize("raw", KINDS, ids=names)
def test_a_field_added_with_a_default_is_read_where_it_is_missing(raw: bytes) -> None:
    """What version 1 already does with its own optional fields: the way in which a release may add one."""
    kind = type(GOLDEN[raw])
    optional = {field.name for field in msgspec.structs.fields(kind) if not field.required}
    short = {name: value for name, value in json.loads(raw).items() if name not in optional}
    read = decode(msgspec.json.encode(short), kind)
    assert all(getattr(read, name) == getattr(GOLDEN[raw], name) for name in short)


@pytest.mark.parametrize("later", [{"version": 2}, {"event_type": "stare"}])
def test_a_later_releases_click_is_a_dead_letter_that_can_be_sent_again(later: dict[str, Any]) -> None:
    worker = UserWorker.__new__(UserWorker)  # decoding needs nothing of it
    raw = changed(KINDS[names.index("Click")], **later)
    reads, _, (letter,) = worker._decode([Record(b"u1", raw)], ())
    assert reads == [] and (letter.payload, letter.key, letter.truncated) == (raw, b"u1", False)
    assert letter.cause.startswith(next(iter(later)))


def test_states_stay_and_a_field_more_is_passed_over() -> None:
    state = apply_clicks(EMPTY, [Applied(CLICK, 1.5, 4)], Limits())
    assert encode_state(state) == GOLDEN_STATE and decode_state(GOLDEN_STATE) == state
    assert (state.applied, state.offset) == (1, 4)  # by name: what is in which place of the array stays too
    later = msgspec.msgpack.encode([*msgspec.msgpack.decode(GOLDEN_STATE), "a field more"])
    assert decode_state(later) == state
    assert decode_state(msgspec.msgpack.encode([[["i1", 1.5, 5, "more"]]])) == UserState((Entry("i1", 1.5, 5),))


def test_a_state_of_another_form_stops_the_worker() -> None:
    """Going on would fold into an empty state and overwrite the real one."""
    with pytest.raises(msgspec.DecodeError):
        keep_newest({}, Record(b"u1", msgspec.msgpack.encode({"version": 2})))


def test_manifests_stay_and_a_later_one_is_refused_by_name() -> None:
    files = {"index.hnsw": "bb", "items.npy": "cc", "model/config.json": "dd", "probes.safetensors": "ee"}
    assert decode_manifest(GOLDEN_MANIFEST) == Manifest(
        format=1, version="g1", parent="m1", created_ms=1, encoder="minilm", items=2, dim=3, ef_search=20,
        model_sha256="aa", metrics={"recall@20": 1.0}, offsets={0: 5},
        files={name: FileEntry(size, sha256) for size, (name, sha256) in enumerate(files.items(), 1)},
    )  # fmt: skip
    with pytest.raises(DamagedGeneration, match=r"manifest\.json: format 2, this release reads 1"):
        decode_manifest(changed(GOLDEN_MANIFEST, format=2))
    with pytest.raises(DamagedGeneration, match=r"manifest\.json: .*unknown field `mood`"):
        decode_manifest(changed(GOLDEN_MANIFEST, mood="good"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    learner = Learner(ModelConfig(text_dim=4, projected_text_dim=4, tower_dim=4, covisitation_rank=4, hidden=8))
    learner.add_items(["a", "b"], np.eye(2, 4, dtype=np.float32))
    learner.model().save(folder)
    return folder


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"mood": 1}, "unexpected keyword argument 'mood'"), ({"tower_dim": 5}, "tower.ids is torch.float32")],
)
def test_a_model_of_another_making_is_refused(saved: Path, tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "m")
    config = folder / "config.json"
    config.write_bytes(changed(config.read_bytes(), **fields))
    with pytest.raises(ValueError, match=reason):
        Model.load(folder)


def test_a_model_from_before_a_setting_existed_is_read(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "m")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "mix_half_life"}))
    assert Model.load(folder).config.mix_half_life == ModelConfig().mix_half_life


def test_followers_pass_over_what_a_later_release_wrote() -> None:
    """The thread behind each goes on with the next record."""
    settings = Settings()
    texts, live = Texts(settings, threading.Event()), Live(settings)
    for kind, topic, follower in (
        ("ItemVector", settings.topics.vectors.name, texts._take),
        ("ItemVector", settings.topics.vectors.name, live._take),
        ("Item", settings.topics.items.name, live._take),
        ("Artifact", settings.topics.generations.name, live._take),
    ):
        raw = KINDS[names.index(kind)]
        for value in (changed(raw, version=2), raw):
            follower(Record(b"i1", value, topic=topic))
    assert list(texts.take()[1]) == ["i1"]
    assert list(live.catalogue.items) == list(live.catalogue.vectors) == ["i1"]
    assert [artifact.name for artifact in live._announcements.wanted()] == ["g1"]


def test_the_trainer_resumes_from_the_newest_model_that_it_can_read(settings: Settings, topics: Topics) -> None:
    raw = KINDS[names.index("Artifact")]
    with Producer(settings.connection) as producer:
        for value in (raw, changed(raw, version=2, name="later")):
            producer.send_raw(topics.models.name, b"model", value)
    assert newest_model(settings) == GOLDEN[raw]


def test_an_announcement_that_cannot_be_read_changes_nothing() -> None:
    announcements, raw = Announcements(), KINDS[names.index("Artifact")]
    announcements.take("g1", raw)
    with pytest.raises(BadEvent, match="version"):
        announcements.take("g1", changed(raw, version=2))
    assert announcements.wanted() == [GOLDEN[raw]]


def test_the_page_names_every_form() -> None:
    page = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    forms = [*(kind.__name__ for kind in WIRE_TYPES), "UserState", MANIFEST, "config.json"]
    assert [form for form in forms if f"`{form}`" not in page] == []


def test_a_file_of_the_first_export_is_read_and_a_line_of_a_later_one_is_refused(tmp_path: Path) -> None:
    first = b'{"item":{"version":1,"item_id":"a","title":"A"}}\n{"end":{"items":1,"users":0}}\n'
    (tmp_path / "all").write_bytes(first)
    assert read_backup(tmp_path / "all") == ([Item(item_id="a", title="A")], {}, {})
    (tmp_path / "all").write_bytes(b'{"later":1}\n' + first)
    with pytest.raises(BadBackup, match=r"line 1: .*later"):
        read_backup(tmp_path / "all")
