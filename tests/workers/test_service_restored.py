"""What `upwell export` and a copy of the artifact store bring back, in another place, answers as before."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stream.answers import Wishes
from stream.topics import ensure
from tests.workers.service import Service, clicks, until, upwell
from workers.announcements import newest_model, read_announcements
from workers.backup import read_backup, restore
from workers.lag import read_offsets
from workers.service import Service as Server
from workers.settings import Settings, load_settings

USERS = 40


@contextmanager
def server(settings: Settings) -> Iterator[Server]:
    """What answers requests, in process, once it serves and knows the users."""
    server = Server(settings)
    server.live.start()
    server.users.start()
    try:
        until(lambda: server.live.snapshot is not None and server.users.caught_up.is_set(), "it serves")
        yield server
    finally:
        server.users.stop()
        server.live.stop()


def answers(server: Server, exclude: list[str]) -> list[tuple[str, str, list[tuple[str, float]]]]:
    lists = [server.recommend(f"u{number}", Wishes(k=10, exclude=exclude)) for number in range(USERS)]
    return [(one.generation, one.source, [(place.item_id, place.score) for place in one.items]) for one in lists]


def test_a_restored_service_answers_the_same(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, file = service.settings, str(tmp_path / "all.jsonl.gz")
    service.send(clicks(400, USERS))

    def settled() -> bool:
        model, serving = newest_model(old), read_announcements(old).wanted()
        return (
            model is not None
            and serving[0].parent == model.name
            and not any(p.lag for p in read_offsets(old).clicks.values())
        )

    until(settled, "all clicks are committed and what was learned serves")
    shutil.copytree(old.artifacts, tmp_path / "artifacts")
    assert upwell("export", file).returncode == 0
    place = {"UPWELL_KAFKA__PREFIX": f"r{secrets.token_hex(4)}", "UPWELL_KAFKA__PARTITIONS": "2"}
    place["UPWELL_ARTIFACTS"] = str(tmp_path / "artifacts")
    done = upwell("import", file, **place)
    assert done.returncode == 0 and done.stdout.endswith("announced\n") and not done.stderr, done
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    new = load_settings()
    urls = [artifact.url for artifact in (newest_model(new), *read_announcements(new).wanted()) if artifact]
    assert len(urls) == 2 and all(url.startswith(new.artifacts) for url in urls)
    with server(old) as before, server(new) as after:
        snapshot = before.live.snapshot
        assert snapshot is not None
        fresh = snapshot.model.ids[snapshot.num_indexed :]  # an indexer has to encode them again: there is none here
        until(lambda: answers(before, fresh) == answers(after, fresh), "both answer the same")  # at the same moment
        assert {source for _, source, _ in answers(after, fresh)} == {"personal"}
    monkeypatch.setenv("UPWELL_KAFKA__PREFIX", f"r{secrets.token_hex(4)}")
    monkeypatch.setenv("UPWELL_ARTIFACTS", str(tmp_path / "lost"))
    lost = load_settings()
    ensure(lost.topics, lost.connection)
    assert restore(lost, read_backup(Path(file))) == []  # rather than names that lead nowhere
