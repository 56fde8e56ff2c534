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
    item_id: str
    weight: float
    ts_ms: int


class UserState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """history: oldest first by event time, ties in order of arrival.
    seen, event_ids: packed digests, oldest first, so that an earlier seen set is a prefix of a later one.
    """

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
    history: int = 50  # MODEL.md: the tower reads the last 50
    event_ids: int = 1024  # an event sent again within a user's last 1,024 is dropped; 8 KiB at most a user


EMPTY = UserState()


@lru_cache(maxsize=1 << 17)
def digest(identifier: str) -> bytes:
    """8 bytes that stand for an id."""
    return blake2b(identifier.encode(), digest_size=DIGEST_BYTES).digest()


def unpack(digests: bytes) -> NDArray[np.uint64]:
    """Packed digests -> (n,) uint64."""
    return np.frombuffer(digests, dtype="<u8")


def split(digests: bytes) -> list[bytes]:
    """Packed digests -> one bytes object each."""
    return [digests[at : at + DIGEST_BYTES] for at in range(0, len(digests), DIGEST_BYTES)]


class Fold:
    """Folds clicks, in offset order, into one user's state.

    A click whose offset is not above the state's was applied before (redelivery) and changes nothing; one
    whose event id is remembered was sent twice: it moves the offset and nothing else.
    """

    def __init__(self, state: UserState, limits: Limits) -> None:
        self.before, self.limits = state, limits
        self.history, self.applied, self.offset = list(state.history), state.applied, state.offset
        self._seen, self._event_ids = _Digests(state.seen), _Digests(state.event_ids)

    @property
    def num_seen(self) -> int:
        return len(self._seen)

    def has_seen(self, item_id: str) -> bool:
        return digest(item_id) in self._seen

    def is_new(self, click: Applied) -> bool:
        return click.offset > self.offset and digest(click.click.event_id) not in self._event_ids

    def apply(self, click: Applied) -> bool:
        """Whether it was new."""
        new, self.offset = self.is_new(click), max(self.offset, click.offset)
        if not new:
            return False
        self.applied += 1
        self._event_ids.add(digest(click.click.event_id), self.limits.event_ids)
        self._seen.add(digest(click.click.item_id))
        entry = Entry(click.click.item_id, click.weight, click.click.ts_ms)
        _insert(self.history, entry, self.limits.history)
        return True

    def erase(self, offset: int) -> None:
        """Forgets everything up to this offset; an erasure read again forgets nothing that came after it."""
        if offset > self.offset:
            self.history, self.applied, self.offset = [], 0, offset
            self._seen, self._event_ids = _Digests(b""), _Digests(b"")

    def state(self) -> UserState:
        """The same object comes back when nothing was folded in."""
        if self.offset == self.before.offset:
            return self.before
        history, seen, event_ids = tuple(self.history), self._seen.packed(), self._event_ids.packed()
        return UserState(history, seen, event_ids, self.applied, self.offset)


def apply_clicks(state: UserState, clicks: Iterable[Applied], limits: Limits) -> UserState:
    """The state after these clicks of its user."""
    fold = Fold(state, limits)
    for click in clicks:
        fold.apply(click)
    return fold.state()


def _insert(history: list[Entry], entry: Entry, limit: int) -> None:
    """Keep the newest `limit` entries by event time; a late event takes its own place."""
    place = len(history)
    while place and history[place - 1].ts_ms > entry.ts_ms:
        place -= 1
    history.insert(place, entry)
    if len(history) > limit:
        del history[0]


class _Digests:
    """An insertion-ordered set of digests; adding past the limit forgets the oldest.

    Searched as the packed bytes they are: 2.5 us among 1,024, where to make a set of them first takes 190.
    """

    def __init__(self, packed: bytes) -> None:
        self._packed = bytearray(packed)

    def __contains__(self, key: bytes) -> bool:
        at = self._packed.find(key)
        while at > 0 and at % DIGEST_BYTES:  # across two of them
            at = self._packed.find(key, at + 1)
        return at >= 0

    def __len__(self) -> int:
        return len(self._packed) // DIGEST_BYTES

    def add(self, key: bytes, limit: int | None = None) -> None:
        if key not in self:
            self._packed += key
        if limit is not None and len(self) > limit:
            del self._packed[:DIGEST_BYTES]

    def packed(self) -> bytes:
        return bytes(self._packed)


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
