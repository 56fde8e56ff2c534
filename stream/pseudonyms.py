"""User ids replaced at the edge by a keyed hash: HMAC-SHA-256 (RFC 2104), the key's id in front.

The hash cannot be turned back without the key and the ids, nor re-keyed: docs/privacy.md says how a key is changed.
"""

import base64
import hashlib
import hmac
from pathlib import Path
from typing import Self

MIN_KEY_BYTES = 32  # of SHA-256's own length: a shorter key is what an attacker would guess at


class Pseudonyms:
    """`of(user_id)` -> "KEY.HASH": 8 hexadecimal digits that name the key, 43 of URL-safe base64.

    What already is a pseudonym of this key stays as it is, so that an id read from a list can be asked for.
    Raises ValueError for a key shorter than MIN_KEY_BYTES.

    >>> Pseudonyms(b"0123456789abcdef0123456789abcdef").of("u-42")
    '20f060dc._8ME3IzLyoYu2OTfzyruf7KCXKdvx6vG4_JqgT7F3GM'
    """

    def __init__(self, key: bytes) -> None:
        if len(key) < MIN_KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes, at least {MIN_KEY_BYTES}: openssl rand -hex 32 makes one")
        self._key = key
        self.key_id = hmac.new(key, b"upwell key id", hashlib.sha256).hexdigest()[:8]

    @classmethod
    def read(cls, path: Path) -> Self:
        """The key is the file's bytes without white space at its ends. Raises OSError, ValueError."""
        return cls(path.read_bytes().strip())

    def of(self, user_id: str) -> str:
        """What is sent in the id's place. Any string is taken: whether it can be an id is for the caller to say."""
        if self._is_one(user_id):
            return user_id
        digest = hmac.new(self._key, user_id.encode(), hashlib.sha256).digest()
        return f"{self.key_id}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"

    def _is_one(self, user_id: str) -> bool:
        key_id, _, digest = user_id.partition(".")
        return key_id == self.key_id and len(digest) == 43
