"""Catalogue, user states and what serves in one file of JSON lines, and back; *.gz is compressed.

{"model": Artifact}, {"generation": Artifact} or, where one is pinned, {"pin": Artifact} (their files stay in the
artifact store), {"item": Item} and {"user_id": ..., "state": [history, seen, event_ids, applied, offset]}, bytes as
base64; the last line counts items and users, so that a file cut short is refused. It holds what users did: only its
owner may read the file.
"""

import fcntl
import gzip
import os
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, NamedTuple

import fsspec
import msgspec

from model.store import reaching
from model.user_state import UserState, decode_state, encode_state
from stream.consumer import committed_offsets, end_offsets, read_window
from stream.events import Artifact, BadEvent, Item, decode_item, encode
from stream.producer import ClickProducer
from workers.announcements import PIN, newest_model, read_announcements
from workers.settings import Settings
from workers.states import raw_states

BEGUN, PART = "upwell-export-", ".part"  # between them what makes it one export's: another may be writing beside it
NOWHERE = -1  # offset of a state before any click of this topic
BLOCK_S = 60.0  # an import waits for a broker that starts again


class BadBackup(ValueError):
    """The file is not one that `upwell export` has written whole, or it must not be read into this installation."""


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    items: int
    users: int


class Line(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    model: Artifact | None = None
    generation: Artifact | None = None
    pin: Artifact | None = None
    item: Item | None = None
    user_id: str | None = None
    state: UserState | None = None
    end: Counts | None = None


class Backup(NamedTuple):
    items: list[Item]
    users: dict[str, UserState]
    announced: dict[str, Artifact]  # by kind: "model", "generation" or "pin"


def write_backup(settings: Settings, path: Path) -> Counts:
    """The catalogue and the states as Kafka holds them now; the file appears when it is whole. Raises OSError.

    What killed exports have left in its folder is deleted.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    for begun in path.parent.glob(f"{BEGUN}*{PART}"):
        with suppress(OSError), begun.open("r+b") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by an export that runs
            begun.unlink()
    descriptor, part = tempfile.mkstemp(PART, BEGUN, path.parent)  # 0600
    try:
        with os.fdopen(descriptor, "wb") as raw:
            fcntl.flock(raw, fcntl.LOCK_EX)
            if not os.fstat(descriptor).st_nlink:  # another export has deleted it before it was locked
                return write_backup(settings, path)
            with gzip.open(raw, "wb") if path.suffix == ".gz" else nullcontext(raw) as out:
                counts = _write(settings, out)
            raw.flush()
            os.rename(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)  # half of what users did
        raise
    return counts


def _write(settings: Settings, out: IO[bytes] | gzip.GzipFile) -> Counts:
    items: dict[bytes, Item] = {}
    for record in read_window(settings.connection, settings.topics.items.name):
        try:
            _, item = decode_item(record.value, record.key, Item)
        except BadEvent:
            continue  # readers pass it over, and go on with what they had
        items.pop(record.key or b"", None)
        if item is not None:
            items[record.key or b""] = item
    states, announced = raw_states(settings), read_announcements(settings)
    if (model := newest_model(settings)) is not None:
        _put(out, Line(model=model))
    for serving in announced.wanted()[:1]:
        _put(out, Line(pin=serving) if announced.pinned else Line(generation=serving))
    for item in items.values():
        _put(out, Line(item=item))
    for user_id, state in states.items():
        _put(out, Line(user_id=user_id, state=decode_state(state)))
    counts = Counts(len(items), len(states))
    _put(out, Line(end=counts))
    return counts


def _put(out: IO[bytes] | gzip.GzipFile, line: Line) -> None:
    out.write(msgspec.json.encode(line) + b"\n")


def read_backup(path: Path) -> Backup:
    """Raises BadBackup naming the line, OSError."""
    backup = Backup([], {}, {})
    end: Counts | None = None
    for number, line in enumerate(_lines(path), start=1):
        if end is not None:
            raise BadBackup(f"{path}: line {number}: something after the end")
        try:
            match msgspec.json.decode(line, type=Line):
                case Line(model=Artifact() as artifact):
                    backup.announced["model"] = artifact
                case Line(generation=Artifact() as artifact):
                    backup.announced["generation"] = artifact
                case Line(pin=Artifact() as artifact):
                    backup.announced["pin"] = artifact
                case Line(item=Item() as item):
                    backup.items.append(item)
                case Line(user_id=str(user_id), state=UserState() as state):
                    backup.users[user_id] = state
                case Line(end=Counts() as counts):
                    end = counts
                case _:
                    raise BadBackup(f"{path}: line {number}: none of item, user, model, generation, pin and end")
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BadBackup(f"{path}: line {number}: {error}") from error
    if end != Counts(len(backup.items), len(backup.users)):
        raise BadBackup(
            f"{path}: cut short: {len(backup.items)} items and {len(backup.users)} users, its end says {end}"
        )
    return backup


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadBackup(f"{path}: {error}") from error


def restore(settings: Settings, backup: Backup) -> list[str]:
    """Items and states into an installation that has no states yet (or those of an import that broke off), and of model
    and generation those whose files are in its artifact store: their names. Raises BadBackup, DeliveryError, OSError.

    Offsets are of another clicks topic and start anew; what is clicked from now on comes on top.
    """
    users = settings.topics.users.name
    if backup.users and any(end_offsets(settings.connection, users).values()) and not _only_imported(settings):
        raise BadBackup(f"{users} holds states already: a worker may be writing them; import into a new kafka.prefix")
    with ClickProducer(settings.connection, settings.topics, block_s=BLOCK_S) as producer:
        for item in backup.items:
            producer.send_item(item)
        for user_id, state in backup.users.items():
            value = encode_state(msgspec.structs.replace(state, offset=NOWHERE))
            producer.send_raw(users, user_id.encode(), value)
        found, newest_ms = [], max((one.created_ms for one in backup.announced.values()), default=0)
        for kind, artifact in backup.announced.items():
            if (url := _placed(settings, artifact)) is None:
                continue
            found.append(artifact.name)
            moved = msgspec.structs.replace(artifact, url=url, offsets={})
            if kind == "model":
                producer.send_raw(settings.topics.models.name, b"model", encode(moved))
            else:
                # No older than the model: the indexer would take that for one not built yet, and what had been
                # rolled back would come again.
                moved = msgspec.structs.replace(moved, created_ms=newest_ms)
                for key in [artifact.name, PIN] if kind == "pin" else [artifact.name]:
                    producer.send_raw(settings.topics.generations.name, key.encode(), encode(moved))
    return found


def _only_imported(settings: Settings) -> bool:
    """Whether the states are what an import has left that broke off: no worker has committed or folded anything yet."""
    committed = committed_offsets(settings.connection, settings.group, settings.topics.clicks.name)
    return not committed and all(decode_state(raw).offset == NOWHERE for raw in raw_states(settings).values())


@reaching()
def _placed(settings: Settings, artifact: Artifact) -> str | None:
    """The URL of its files in this installation's own folder; None: they are not in the store. Raises OSError.

    They lie as in the store that was exported, PREFIX/KIND/NAME. Those of another prefix are copied: its roles delete
    them there when they have newer ones.
    """
    store, root = fsspec.core.url_to_fs(settings.artifacts)
    prefix, *place = artifact.url.split("/")[-3:]
    source, own = ("/".join([root, folder, *place]) for folder in (prefix, settings.kafka.prefix))
    if not store.exists(source):
        return None
    for path in store.find(source) if source != own else ():
        copy = own + path.removeprefix(source)
        store.makedirs(copy.rpartition("/")[0], exist_ok=True)
        store.cp_file(path, copy)
    return "/".join([settings.store, *place])
