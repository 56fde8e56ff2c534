"""`upwell generations`: what has been announced, and the way back."""

from contextlib import suppress

from model.generation import fetch
from model.manifest import MANIFEST, Manifest, decode_manifest
from stream.events import Artifact, encode
from stream.producer import Producer
from workers.announcements import PIN, read_announcements
from workers.settings import Settings


class UnknownGeneration(ValueError):
    """No generation of that name is announced and kept."""


class NothingMoves(ValueError):
    """What is pinned serves on."""


def listed(settings: Settings) -> list[tuple[Artifact, str]]:
    """All that are kept, the newest announced last, each with its mark: serves, pinned or nothing."""
    announcements = read_announcements(settings)
    wanted = announcements.wanted()
    marks = {wanted[0].name: "pinned" if announcements.pinned else "serves"} if wanted else {}
    return [(artifact, marks.get(name, "")) for name, artifact in announcements.generations.items()]


def find(settings: Settings, name: str) -> Artifact:
    """Raises UnknownGeneration."""
    generations = read_announcements(settings).generations
    if name not in generations:
        raise UnknownGeneration(f"no generation {name}; there are: {', '.join(generations) or 'none'}")
    return generations[name]


def manifest(settings: Settings, artifact: Artifact) -> Manifest:
    """Fetched and verified. Raises DamagedGeneration, OSError where the store is out of reach."""
    folder = fetch(artifact.url, settings.cache / "generations", artifact.manifest_sha256)
    return decode_manifest((folder / MANIFEST).read_bytes())


def roll_back(settings: Settings, name: str | None) -> Artifact:
    """Announce a generation again, which makes it the newest; by default the one built before what was announced last.

    By when they were built: in the order of announcements a second rollback would go forward again. The next one that
    wins at the gate serves after it: pin, to stay. Raises UnknownGeneration, NothingMoves, DamagedGeneration.
    """
    announcements = read_announcements(settings)
    if announcements.pinned:
        raise NothingMoves(f"{announcements.pinned.name} is pinned and serves whatever is announced")
    if name is None:
        *_, newest = [None, *announcements.generations.values()]
        older = [one for one in announcements.generations.values() if newest and one.created_ms < newest.created_ms]
        if not older:
            raise UnknownGeneration("there is none before the newest")
        name = max(older, key=lambda one: one.created_ms).name
    artifact = find(settings, name)
    _check_files(settings, artifact)
    _announce(settings, artifact.name, artifact)
    return artifact


def pin(settings: Settings, name: str | None) -> None:
    """Serve this one whatever comes after it; None ends that. Raises UnknownGeneration, DamagedGeneration."""
    artifact = find(settings, name) if name else None
    if artifact:
        _check_files(settings, artifact)
    _announce(settings, PIN, artifact)


def _check_files(settings: Settings, artifact: Artifact) -> None:
    """Raises DamagedGeneration for what no role would serve. A store out of reach from here says nothing."""
    with suppress(OSError):
        manifest(settings, artifact)


def _announce(settings: Settings, key: str, artifact: Artifact | None) -> None:
    raw = None if artifact is None else encode(artifact)
    with Producer(settings.connection) as producer:
        producer.send_raw(settings.topics.generations.name, key.encode(), raw)
