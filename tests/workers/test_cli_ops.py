"""What an operator's commands find and change, on a real Kafka."""

import gzip
import os
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import kafka
import msgspec
import pytest
from kafka.admin import ConfigResource
from kafka.structs import OffsetAndMetadata
from typer.testing import CliRunner

from model.manifest import DamagedGeneration
from model.user_state import Applied, Fold, Limits, UserState, decode_state, encode_state
from stream.connection import Connection
from stream.events import Artifact, DeadLetter, encode
from stream.ports import free_port
from stream.producer import ClickProducer, Producer, partition_of
from stream.topics import Topics, WrongTopic, describe, ensure, fix
from tests.workers.service import ITEMS, clicks, until, upwell, upwell_here
from workers import metrics
from workers.announcements import newest_model, read_announcements
from workers.backup import NOWHERE, BadBackup, Counts, read_backup, restore, write_backup
from workers.bench.stage import environment
from workers.cli import app
from workers.dead_letters import DeadLetters, place, read, resend
from workers.doctor import _artifacts, _disks, examine
from workers.generations import NothingMoves, UnknownGeneration, pin, roll_back
from workers.lag import LagFollower, read_offsets
from workers.preflight import check_keyed
from workers.settings import Kafka, Settings, Trainer
from workers.states import raw_states

OLD_POLICY = {"cleanup.policy": "delete"}


def settings_of(connection: Connection, prefix: str = "", partitions: int = 3) -> Settings:
    prefix = prefix or f"o{secrets.token_hex(4)}"
    return Settings(kafka=Kafka(bootstrap=connection.bootstrap, prefix=prefix, partitions=partitions))


def test_topics_are_described_and_mended(connection: Connection) -> None:
    settings = settings_of(connection)
    ours = settings.topics, settings.connection
    assert {fault for found in describe(*ours) for fault in found.faults()} == {"missing"}
    assert (False, f"topics: {settings.topics.clicks.name}: missing") in [
        (good, told.partition(";")[0]) for good, told in examine(settings)
    ]
    assert {fault for found in describe(*ours) for fault in found.faults()} == {"missing"}  # looking creates nothing
    assert len(fix(*ours)) == len(settings.topics.all())
    assert [fault for found in describe(*ours) for fault in found.faults()] == []
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        users = settings.topics.users.name
        admin.alter_configs([ConfigResource("TOPIC", users, {"cleanup.policy": "delete"})])
    # The controller answers before the broker has taken it over.
    until(lambda: any(each.differing for each in describe(*ours)), "the change is seen")
    faults = [fault for found in describe(*ours) for fault in found.faults()]
    assert faults == ["cleanup.policy is delete, should be compact"]
    assert fix(*ours) == [f"{users}: cleanup.policy = compact"]
    until(lambda: fix(*ours) == [], "the mended one is seen")


def test_topics_that_keep_longer_than_the_settings_say_are_named(topics: Topics, connection: Connection) -> None:
    settings = settings_of(connection, topics.prefix)
    assert upwell_here(settings, "topics").stderr == ""
    done = upwell_here(settings.model_copy(update={"trainer": Trainer(window_days=7)}), "topics")
    assert done.exit_code == 0
    assert f"{topics.clicks.name}: retention.ms is 2592000000, should be 604800000" in done.stderr.splitlines()
    assert done.stderr.count("upwell topics fix") == 1


def test_the_number_of_partitions_is_never_changed(topics: Topics, connection: Connection) -> None:
    other = settings_of(connection, topics.prefix, partitions=5)
    assert "3 partitions, the settings say 5" in [
        fault for found in describe(other.topics, connection) for fault in found.faults()
    ]
    for refuses in (partial(fix, other.topics, other.connection), partial(check_keyed, other)):
        with pytest.raises(WrongTopic, match="has 3 partitions, the settings say 5"):
            refuses()
    check_keyed(settings_of(connection, topics.prefix))
    check_keyed(settings_of(connection))  # not made yet


@pytest.mark.parametrize("role", ["worker", "serve"])
def test_a_role_does_not_start_where_users_would_move(topics: Topics, connection: Connection, role: str) -> None:
    done = CliRunner().invoke(app, role, env=environment(settings_of(connection, topics.prefix, partitions=5)))
    assert done.exit_code == 2 and "3 partitions, the settings say 5" in done.stderr


def test_a_command_does_not_wait_for_a_kafka_that_is_away() -> None:
    away = {"UPWELL_KAFKA__BOOTSTRAP": f"127.0.0.1:{free_port()}"}
    told = f"no Kafka answers at {away['UPWELL_KAFKA__BOOTSTRAP']}\n"
    for command in (["topics"], ["generations", "list"], ["replay", "ml-100k"]):
        done = CliRunner().invoke(app, command, env=away)
        assert (done.exit_code, done.stdout, done.stderr) == (1, "", told), command
    process = upwell("lag", **away)
    assert (process.returncode, process.stdout, process.stderr) == (1, "", told)


def test_the_dead_letters_of_a_release_without_erasure(connection: Connection) -> None:
    """Its topic is not compacted and its letters are keyed as their messages: refused with the way out, none lost."""
    settings = settings_of(connection)
    topic = settings.topics.dead_letters
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        admin.create_topics({topic.name: {"num_partitions": 1, "configs": topic.config() | OLD_POLICY}})
    letters = [
        DeadLetter(topic="clicks", partition=0, offset=at, cause="", key=key, payload=b"{", ts_ms=0)
        for at, key in enumerate((b"u1", b"u1", None, None))
    ]
    with Producer(connection) as producer:
        for letter in letters:
            producer.send_raw(topic.name, letter.key, encode(letter))
    refused = upwell_here(settings, "topics")
    assert refused.exit_code == 2, refused.stderr
    assert refused.stderr.splitlines()[1:] == [
        f"{topic.name} is 'delete', it has to be 'compact,delete': `upwell topics fix` makes it so"
    ]
    change = f"{topic.name}: cleanup.policy = compact,delete"
    with pytest.MonkeyPatch.context() as patch:  # the controller answers before the broker has taken it over
        patch.setattr("kafka.KafkaAdminClient.alter_configs", lambda *_: None)
        assert change in upwell_here(settings, "topics", "fix").stdout
    assert change in upwell_here(settings, "topics", "fix").stdout
    until(lambda: upwell_here(settings, "topics").exit_code == 0, "the mended one is seen")
    assert [letter for _, letter in read(settings)] == letters
    assert set(DeadLetters(settings, None)._of({"u1"})) == {place(letter) for letter in letters[:2]}  # type: ignore[arg-type]


def test_a_dead_letter_that_cannot_be_read_or_sent_stops_nothing(topics: Topics, connection: Connection) -> None:
    """Else the first erasure ends the worker, and does so again after every restart."""
    settings = settings_of(connection, topics.prefix)
    letters = [
        DeadLetter(topic=topics.clicks.name, partition=0, offset=at, cause="", key=key, payload=payload, ts_ms=0)
        for at, (key, payload) in enumerate([(b"u1", b"{"), (None, None), (b"u1", b"{"), (b"u2", b"{")])
    ]
    with Producer(connection) as producer:
        for letter in letters:
            producer.send_raw(topics.dead_letters.name, place(letter), encode(letter))
            later = encode(letter).replace(b'"version":1', b'"version":9')
            producer.send_raw(topics.dead_letters.name, b"later", later)
        producer.send_raw(topics.dead_letters.name, place(letters[2]), None)
    kept = [letters[0], letters[1], letters[3]]
    assert [letter for _, letter in read(settings)] == kept
    assert DeadLetters(settings, None)._of({"u1"}) == [place(letters[0])]  # type: ignore[arg-type]
    assert resend(settings, kept) == (2, 1)  # Kafka takes nothing under no key
    assert [letter for _, letter in read(settings)] == [letters[1]]  # each replay would send all of before again


def follow_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: float) -> None:
        raise StopIteration

    monkeypatch.setattr("workers.lag.time", SimpleNamespace(sleep=end))
    with pytest.raises(StopIteration):
        LagFollower(settings).run()


def test_lag_is_what_the_group_has_not_committed(
    topics: Topics, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(connection, topics.prefix)
    sent = clicks(30)
    with ClickProducer(connection, topics) as producer:
        for click in sent:
            producer.send(click)
    own = [sum(partition_of(click.user_id, 3) == part for click in sent) for part in range(3)]
    assert [place.lag for place in read_offsets(settings).clicks.values()] == own
    consumer = kafka.KafkaConsumer(**connection.kafka_python(), group_id=settings.group)
    part = kafka.TopicPartition(topics.clicks.name, 1)
    consumer.assign([part])
    consumer.commit({part: OffsetAndMetadata(2, "", -1)})
    consumer.close()
    offsets = read_offsets(settings)
    assert offsets.clicks[1] == (2, own[1], own[1] - 2)
    assert offsets.clicks[0] == (None, own[0], own[0])
    assert offsets.ends[topics.clicks.name, 1] == own[1]
    follow_once(settings, monkeypatch)
    assert [metrics.group_lag_clicks.labels(str(part))._value.get() for part in range(3)] == [
        own[0],
        own[1] - 2,
        own[2],
    ]
    assert metrics.topic_end_offset.labels(topics.clicks.name, "1")._value.get() == own[1]


def test_what_cannot_be_read_has_no_old_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Settings) -> None:
        raise kafka.errors.KafkaConnectionError

    metrics.group_lag_clicks.labels("0").set(7)
    metrics.topic_end_offset.labels("clicks", "0").set(7)
    monkeypatch.setattr("workers.lag.read_offsets", fail)
    follow_once(Settings(), monkeypatch)
    assert [
        sample for gauge in (metrics.group_lag_clicks, metrics.topic_end_offset) for sample in gauge._samples()
    ] == []


def _states() -> dict[str, UserState]:
    folds: dict[str, Fold] = {}
    for offset, click in enumerate(clicks(60, users=7)):
        folds.setdefault(click.user_id, Fold(UserState(), Limits())).apply(Applied(click, 1.0, 100 + offset))
    return {user_id: fold.state() for user_id, fold in folds.items()}


STATES = _states()
WHOLE = b'{"end":{"items":0,"users":0}}\n'


def fill(settings: Settings) -> None:
    """The small catalogue, one item removed again; seven users, one erased."""
    ensure(settings.topics, settings.connection)
    with ClickProducer(settings.connection, settings.topics) as producer:
        for item in ITEMS:
            producer.send_item(item)
        producer.remove_item("i5")
    with Producer(settings.connection) as producer:
        producer.send_raw(settings.topics.items.name, b"i7", b"of a later release")  # i7 is served as it was before
        for user_id, state in STATES.items():
            producer.send_raw(settings.topics.users.name, user_id.encode(), encode_state(state))
        producer.send_raw(settings.topics.users.name, b"u3", None)


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz"])
def test_what_is_exported_can_be_imported_elsewhere(connection: Connection, tmp_path: Path, name: str) -> None:
    old, new, again = settings_of(connection), settings_of(connection, partitions=2), tmp_path / f"again-{name}"
    fill(old)
    assert write_backup(old, tmp_path / name) == Counts(119, 6)
    assert (tmp_path / name).stat().st_mode & 0o077 == 0
    ensure(new.topics, new.connection)
    with Producer(connection) as producer:  # an import that broke off: what it sent is sent again
        begun = encode_state(msgspec.structs.replace(STATES["u1"], offset=NOWHERE))
        producer.send_raw(new.topics.users.name, b"u1", begun)
    restore(new, read_backup(tmp_path / name))
    found = {user_id: decode_state(raw) for user_id, raw in raw_states(new).items()}
    wanted = {user: state for user, state in STATES.items() if user != "u3"}
    assert found == {user: msgspec.structs.replace(state, offset=NOWHERE) for user, state in wanted.items()}
    fold = Fold(found["u1"], Limits())
    fold.apply(Applied(clicks(1, first=1000)[0], 1.0, 0))  # the first click of the new topic
    assert fold.state().applied == wanted["u1"].applied + 1
    assert write_backup(new, again) == Counts(119, 6)
    assert {item.item_id for item in read_backup(again).items} == {item.item_id for item in ITEMS} - {"i5"}
    with Producer(connection) as producer:  # and then a worker has folded
        producer.send_raw(new.topics.users.name, b"u1", encode_state(fold.state()))
    with pytest.raises(BadBackup, match="holds states already"):
        restore(new, read_backup(again))


def test_two_exports_to_one_file_do_not_write_into_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(settings: Settings, out: IO[bytes]) -> Counts:
        with monkeypatch.context() as context:
            context.setattr("workers.backup._write", lambda _, out: (out.write(WHOLE), Counts(0, 0))[1])
            write_backup(settings, tmp_path / "all.gz")
        assert read_backup(tmp_path / "all.gz") == ([], {}, {})
        out.write(WHOLE)
        return Counts(0, 0)

    monkeypatch.setattr("workers.backup._write", slow)
    write_backup(Settings(), tmp_path / "all.gz")
    assert read_backup(tmp_path / "all.gz") == ([], {}, {})
    assert [file.name for file in tmp_path.iterdir()] == ["all.gz"]


EXPORTS = """
import signal, sys
from pathlib import Path
from workers import backup
from workers.settings import Settings
def stand(settings, out):
    out.write(b"what a user did")
    out.flush()
    print(flush=True)
    signal.pause()
backup._write = stand
backup.write_backup(Settings(), Path(sys.argv[1]))
"""


def test_what_a_killed_export_left_is_deleted_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another day's name; it holds everybody's histories. That of one that runs is left to it."""
    monkeypatch.setattr("workers.backup._write", lambda *_: Counts(0, 0))
    command = [sys.executable, "-c", EXPORTS, str(tmp_path / "all-1")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as export:
        try:
            assert export.stdout and export.stdout.readline()
            write_backup(Settings(), tmp_path / "all-2")
            assert len(list(tmp_path.iterdir())) == 2
        finally:
            export.kill()
    write_backup(Settings(), tmp_path / "all-2")
    assert [file.name for file in tmp_path.iterdir()] == ["all-2"]


def test_an_export_taken_for_a_dead_one_before_it_is_locked_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deleted(*arguments: Any) -> tuple[int, str]:
        descriptor, part = make(*arguments)
        os.unlink(part)
        monkeypatch.setattr("tempfile.mkstemp", make)
        return descriptor, part

    make = tempfile.mkstemp
    monkeypatch.setattr("tempfile.mkstemp", deleted)
    monkeypatch.setattr("workers.backup._write", lambda *_: Counts(0, 0))
    write_backup(Settings(), tmp_path / "all")
    assert [file.name for file in tmp_path.iterdir()] == ["all"]


def test_a_file_is_not_imported_where_a_worker_has_begun(connection: Connection, tmp_path: Path) -> None:
    """It may have given a user a state that is not in the topic yet, or none at all."""
    old, new = settings_of(connection), settings_of(connection)
    fill(old)
    write_backup(old, tmp_path / "all")
    ensure(new.topics, new.connection)
    restore(new, backup := read_backup(tmp_path / "all"))
    with closing(kafka.KafkaConsumer(**connection.kafka_python(), group_id=new.group)) as consumer:
        consumer.assign([part := kafka.TopicPartition(new.topics.clicks.name, 1)])
        consumer.commit({part: OffsetAndMetadata(0, "", -1)})
    with pytest.raises(BadBackup, match="holds states already"):
        restore(new, backup)


def test_what_was_rolled_back_stays_back_in_a_restored_installation(connection: Connection, tmp_path: Path) -> None:
    """The indexer builds of a model that is newer than every generation; here g1 serves, and m2 had lost."""
    old, new = (settings_of(connection).model_copy(update={"artifacts": str(tmp_path)}) for _ in range(2))
    for settings in (old, new):
        ensure(settings.topics, settings.connection)
    model, generation = (
        Artifact(name=name, url=f"{tmp_path}/p/{name}/x", manifest_sha256="", created_ms=at, encoder="e", parent=parent)
        for name, at, parent in (("m2", 20, None), ("g1", 10, "m1"))
    )
    for artifact in (model, generation):
        (tmp_path / "p" / artifact.name / "x").mkdir(parents=True)
    with Producer(connection) as producer:
        producer.send_raw(old.topics.models.name, b"model", encode(model))
        producer.send_raw(old.topics.generations.name, b"g1", encode(generation))
    write_backup(old, tmp_path / "all.jsonl")
    assert restore(new, read_backup(tmp_path / "all.jsonl")) == ["m2", "g1"]
    (serving,), newest = read_announcements(new).wanted(), newest_model(new)
    assert newest and serving.name == "g1" and not serving.created_ms < newest.created_ms


@pytest.mark.parametrize("pinned", [False, True])
def test_an_imported_installation_has_files_of_its_own(connection: Connection, tmp_path: Path, pinned: bool) -> None:
    """The roles of the old prefix prune its folder, or the operator deletes it."""
    old, new = (settings_of(connection).model_copy(update={"artifacts": str(tmp_path)}) for _ in range(2))
    for settings in (old, new):
        ensure(settings.topics, settings.connection)
    urls = {name: f"{old.store}/{name}" for name in ("models/m2", "generations/g1")}
    for url in urls.values():
        Path(url, "model").mkdir(parents=True)
        Path(url, "model", "ids.json").write_text(url)
    model, generation = (
        Artifact(name=url[-2:], url=url, manifest_sha256="", created_ms=1, encoder="e") for url in urls.values()
    )
    with Producer(connection) as producer:
        producer.send_raw(old.topics.models.name, b"model", encode(model))
        producer.send_raw(old.topics.generations.name, b"pin" if pinned else b"g1", encode(generation))
    write_backup(old, tmp_path / "all.jsonl")
    for _ in range(2):  # again, after one that broke off
        assert restore(new, read_backup(tmp_path / "all.jsonl")) == ["m2", "g1"]
    shutil.rmtree(old.store)
    announced, found = newest_model(new), read_announcements(new)
    assert announced and [announced.url, found.generations["g1"].url] == [f"{new.store}/{name}" for name in urls]
    for name, url in urls.items():
        assert Path(new.store, name, "model", "ids.json").read_text() == url
    assert found.pinned == (found.generations["g1"] if pinned else None)


def announce(settings: Settings, store: Path, *times: int) -> None:
    with Producer(settings.connection) as producer:
        for at in times:
            one = Artifact(name=f"g{at}", url=f"{store}/g{at}", manifest_sha256="", created_ms=at, encoder="e")
            producer.send_raw(settings.topics.generations.name, one.name.encode(), encode(one))


def test_what_no_role_would_serve_is_neither_gone_back_to_nor_pinned(connection: Connection, tmp_path: Path) -> None:
    settings = settings_of(connection)
    ensure(settings.topics, settings.connection)
    announce(settings, tmp_path, 1, 2)
    with Producer(settings.connection) as producer:
        producer.send_raw(settings.topics.generations.name, b"\xff", None)  # a key of somebody else's: no text
    with pytest.raises(DamagedGeneration, match="g1"):
        roll_back(settings, "g1")
    with pytest.raises(DamagedGeneration, match="g1"):
        pin(settings, "g1")
    found = read_announcements(settings)
    assert found.pinned is None and found.wanted()[0].name == "g2"


def test_a_second_rollback_goes_further_back(connection: Connection, tmp_path: Path) -> None:
    settings = settings_of(connection)
    ensure(settings.topics, settings.connection)
    announce(settings, tmp_path / "not mounted here", 1, 2, 3)
    assert [roll_back(settings, None).name for _ in range(2)] == ["g2", "g1"]
    with pytest.raises(UnknownGeneration):
        roll_back(settings, None)
    pin(settings, "g3")
    for name in (None, "g2"):
        with pytest.raises(NothingMoves, match="g3 is pinned"):
            roll_back(settings, name)
    assert read_announcements(settings).wanted()[1].name == "g1"


def test_the_doctor_looks_for_what_is_announced_and_makes_no_store_beside_it(
    connection: Connection, tmp_path: Path
) -> None:
    """A store that is not mounted is an empty folder, or none: it could be written."""
    settings = settings_of(connection).model_copy(update={"artifacts": str(tmp_path / "store")})
    ensure(settings.topics, settings.connection)

    def told() -> tuple[bool, str]:
        return next((good, told) for good, told in examine(settings) if told.startswith("artifacts: "))

    assert told() == (True, f"artifacts: {settings.artifacts} can be written")  # before the first generation
    assert not list((tmp_path / "store").iterdir())
    announce(settings, tmp_path / "store", 1)
    assert told() == (False, f"artifacts: g1 is announced, and nothing is at {settings.artifacts}/g1")
    (tmp_path / "store" / "g1").mkdir()
    assert told() == (True, f"artifacts: {settings.artifacts} can be written, and what serves is there")
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    good, _ = told()
    assert not good and not (tmp_path / "store").exists()


def test_the_doctor_sees_a_full_disk(tmp_path: Path) -> None:
    """It takes an empty file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        good, _ = _artifacts(str(tmp_path), [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not good and not list(tmp_path.iterdir())
    assert [told for _, told in _disks(Settings(artifacts=str(tmp_path))) if "GB free for the artifact store" in told]


def test_the_doctor_without_a_kafka_blames_no_store(tmp_path: Path) -> None:
    """Nothing says whether it should be there."""
    settings = Settings(kafka=Kafka(bootstrap=f"127.0.0.1:{free_port()}"), artifacts=str(tmp_path / "new"))
    ((good, told),) = (finding for finding in examine(settings) if finding[1].startswith("artifacts: "))
    assert good and "is not there" in told and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b'{"item":{"item_id":"a","title":"b"}}\n', "cut short"),
        (b'{"end":{"items":1,"users":0}}\n', "cut short"),
        (b'{"end":{"items":0,"users":0}}\n{}\n', "line 2: something after the end"),
        (b"{}\n", "line 1: none of"),
        (b'{"surprise":1}\n', "line 1: .*surprise"),
        (b'{"user_id":"u","state":[[], "", "", "x", 1]}\n', "line 1"),
        (b'{"item":{"item_id":"\xff","title":"b"}}\n', "line 1: .*utf-8"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: bytes, cause: str) -> None:
    (tmp_path / "all").write_bytes(text)
    with pytest.raises(BadBackup, match=cause):
        read_backup(tmp_path / "all")


def test_a_compressed_file_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "all.gz").write_bytes(gzip.compress(b'{"end":{"items":0,"users":0}}\n' * 50)[:-12])
    with pytest.raises(BadBackup):
        read_backup(tmp_path / "all.gz")


def test_a_compressed_file_that_is_damaged_is_refused(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(bytes(range(256)) * 50))
    whole[20:30] = b"\xff" * 10
    (tmp_path / "all.gz").write_bytes(whole)
    with pytest.raises(BadBackup, match=r"all\.gz"):
        read_backup(tmp_path / "all.gz")
