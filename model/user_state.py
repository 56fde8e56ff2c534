"""User state: a deterministic fold of one user's clicks. Ids and weights, never a vector.

The last applied offset of the user's partition orders all versions of a state, so a record read again
changes nothing; the digests of recent event ids drop an event that was *sent* again.

Ids are remembered as 64-bit digests (8 bytes each): with 10,000 seen items the chance that an unseen one
shares a digest with any of them is 10,000 / 2^64, five in 10^16.
"""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

DIGEST_BYTES = 8


class ClickLike(Protocol):
    """What a fold reads of a click; ts_ms is the event's own, since the epoch."""

    @property
    def event_id(self) -> str: ...
    @property
    def item_id(self) -> str: ...
    @property
    def ts_ms(self) -> int: ...


class Applied(NamedTuple):
    """A click with the weight of its type and its offset in the user's partition."""

    click: ClickLike
    weight: float
    offset: int


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A past event as a history keeps it; a negative weight speaks against the item."""

    item_id: str
    weight: float
    ts_ms: int


class UserState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """history: oldest first by event time, ties in order of arrival. seen, event_ids: packed digests, oldest first."""

    history: tuple[Entry, ...] = ()
    seen: bytes = b""
    event_ids: bytes = b""
    applied: int = 0
    offset: int = -1

    @property
    def erased(self) -> bool:
        """Nothing is known but where the user was forgotten: the first click that counts is after it."""
        return self.applied == 0 and self.offset >= 0


class Limits(msgspec.Struct, frozen=True):
    """What is kept of a user at most."""

    history: int = 50  # entries: as many as a model reads by default
    event_ids: int = 1024  # an event sent again within a user's last 1,024 is dropped; 8 KiB at most a user
    seen: int = 20_000  # items kept out of the lists, newest first seen; 160 KB at most a user, in each of its records


EMPTY = UserState()


def digest(identifier: str) -> bytes:
    """8 bytes that stand for an id."""
    return blake2b(identifier.encode(), digest_size=DIGEST_BYTES).digest()


item_digest = lru_cache(maxsize=1 << 17)(digest)  # an event's id comes once, an item's often


def unpack(digests: bytes) -> NDArray[np.uint64]:
    """Packed digests -> (n,) uint64."""
    return np.frombuffer(digests, dtype="<u8")


def split(digests: bytes) -> list[bytes]:
    """Packed digests -> one bytes object each."""
    return [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]


def holds(digests: bytes, one: bytes) -> bool:
    """Whether it is among packed digests: 2.5 us among 1,024, where to make a set of them first takes 190."""
    at = digests.find(one)
    while at > 0 and at % DIGEST_BYTES:  # across two of them
        at = digests.find(one, at + 1)
    return at >= 0


class Fold:
    """Folds clicks, in offset order, into one user's state.

    A click whose offset is not above the state's was applied before (redelivery) and changes nothing; one
    whose event id is remembered was sent twice: it moves the offset and nothing else.
    """

    def __init__(self, state: UserState, limits: Limits) -> None:
        self.before, self.limits = state, limits
        self.history, self.seen, self.event_ids = state.history, state.seen, state.event_ids
        self.applied, self.offset = state.applied, state.offset

    def has_seen(self, item_id: str) -> bool:
        return holds(self.seen, item_digest(item_id))

    def is_new(self, click: Applied, event: bytes) -> bool:
        return click.offset > self.offset and not holds(self.event_ids, event)

    def apply(self, applied: Applied) -> bool:
        """Whether it was new."""
        click, weight, offset = applied
        event, item = digest(click.event_id), item_digest(click.item_id)
        new, self.offset = self.is_new(applied, event), max(self.offset, offset)
        if not new:
            return False
        self.applied += 1
        self.event_ids = (self.event_ids + event)[-DIGEST_BYTES * self.limits.event_ids :]
        if not holds(self.seen, item):
            self.seen = (self.seen + item)[-DIGEST_BYTES * self.limits.seen :]
        self.history = _inserted(self.history, Entry(click.item_id, weight, click.ts_ms), self.limits.history)
        return True

    def erase(self, offset: int) -> None:
        """Forgets everything up to this offset; an erasure read again forgets nothing that came after it."""
        if offset > self.offset:
            self.history, self.seen, self.event_ids, self.applied, self.offset = (), b"", b"", 0, offset

    def state(self) -> UserState:
        """The same object comes back when nothing was folded in."""
        if self.offset == self.before.offset:
            return self.before
        return UserState(self.history, self.seen, self.event_ids, self.applied, self.offset)


def apply_clicks(state: UserState, clicks: Iterable[Applied], limits: Limits) -> UserState:
    """The state after these clicks of its user."""
    fold = Fold(state, limits)
    for click in clicks:
        fold.apply(click)
    return fold.state()


def _inserted(history: tuple[Entry, ...], entry: Entry, limit: int) -> tuple[Entry, ...]:
    """The newest `limit` entries by event time; a late event takes its own place."""
    place = len(history)
    while place and history[place - 1].ts_ms > entry.ts_ms:
        place -= 1
    return (*history[:place], entry, *history[place:])[-limit:]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(UserState)


def encode_state(state: UserState) -> bytes:
    """Deterministic MessagePack bytes: equal states are equal bytes."""
    return _encoder.encode(state)


def decode_state(raw: bytes) -> UserState:
    """Raises msgspec.DecodeError on bytes that are no state."""
    try:
        return _decoder.decode(raw)
    except UnicodeDecodeError as error:  # what msgspec raises for bytes in a string that are no UTF-8
        raise msgspec.DecodeError(str(error)) from error
