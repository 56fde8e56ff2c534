"""Calls of an artifact store, whichever it is."""

from collections.abc import Iterator
from contextlib import contextmanager

from model.manifest import DamagedGeneration


@contextmanager
def reaching() -> Iterator[None]:
    """Around calls of a store: what keeps it out of reach is an OSError, whatever its backend calls it.

    Of S3's own exceptions none is one: where no endpoint answers, credentials are missing, or a reply is cut short.
    """
    try:
        yield
    except (OSError, DamagedGeneration, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
