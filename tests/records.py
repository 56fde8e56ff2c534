"""What a consumer gives, without a Kafka, and what is announced of a generation."""

from pathlib import Path
from typing import NamedTuple

from model.manifest import manifest_sha256
from stream.events import Artifact


class Record(NamedTuple):
    key: bytes | None
    value: bytes | None
    offset: int = 0
    topic: str = "clicks"
    partition: int = 0
    timestamp: int = 0
    headers: tuple[tuple[str, bytes], ...] = ()


def announced(folder: Path, created_ms: int = 0, url: str | None = None) -> Artifact:
    """Of the generation that is built there."""
    digest = manifest_sha256(folder)
    return Artifact(
        name=folder.name, url=url or str(folder), manifest_sha256=digest, created_ms=created_ms, encoder="e"
    )
