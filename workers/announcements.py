"""Which generation is to serve, as the generations topic tells it, and what the trainer announced last.

A generation is announced under its own name; announcing it again makes it the newest (that is a rollback). The record
under the key `pin` holds the one that is to serve whatever comes after it; a null there ends that.
"""

from contextlib import suppress

import structlog

from stream.consumer import read_window
from stream.events import Artifact, BadEvent, decode
from workers.settings import Settings

log = structlog.get_logger()

PIN = "pin"


class Announcements:
    """Generations by name, the newest announced last, and the pinned one."""

    def __init__(self) -> None:
        self.generations: dict[str, Artifact] = {}
        self.pinned: Artifact | None = None

    def take(self, key: str, value: bytes | None) -> None:
        """One record of the topic. Raises BadEvent."""
        artifact = None if value is None else decode(value, Artifact)
        if key == PIN:
            self.pinned = artifact
            return
        self.generations.pop(key, None)
        if artifact is not None:
            self.generations[key] = artifact

    def wanted(self) -> list[Artifact]:
        """In the order in which they are to be tried: the pinned one, the newest, the ones before it."""
        newest_first = list(reversed(self.generations.values()))
        return newest_first if self.pinned is None else [self.pinned, *newest_first]


def read_announcements(settings: Settings) -> Announcements:
    """As the topic stands now."""
    announcements = Announcements()
    for record in read_window(settings.connection, settings.topics.generations.name):
        with suppress(BadEvent):
            announcements.take((record.key or b"").decode(errors="replace"), record.value)
    return announcements


def newest_model(settings: Settings) -> Artifact | None:
    """What the trainer announced last, as far as this release can read it."""
    newest = None
    for record in read_window(settings.connection, settings.topics.models.name):
        try:
            newest = decode(record.value, Artifact)
        except BadEvent as error:
            log.warning("record passed over", topic=record.topic, offset=record.offset, cause=str(error))
    return newest
