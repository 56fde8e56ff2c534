"""API keys: 256 random bits each; the file holds their SHA-256 and what each may do.

A key is no password: nobody can try 2^256 of them, so one round of SHA-256 is enough and costs a request 1 µs.

A ticket opens one user's stream for a minute, for who can send no header (a browser's EventSource) or should not have
the key (a shop's page). It is signed with the key's hash, so that every server knows it and keeps none.
"""

import hmac
import ipaddress
import re
import secrets
from collections.abc import Sequence
from hashlib import sha256
from typing import Literal, NamedTuple, get_args

from workers.settings import ConfigError, Serve

Scope = Literal["ingest", "read", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
TICKET_S = 60  # to open a stream, and to open it again after a short break; an open one stays open

_LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}) +(?P<scopes>[a-z,]+) +(?P<hash>[0-9a-f]{64})")
_TICKET = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64})\.(?P<until>[0-9]{1,12})\.[0-9a-f]{64}")


class Key(NamedTuple):
    name: str
    scopes: frozenset[str]
    sha256: bytes

    def ticket(self, user_id: str, until_s: int) -> str:
        """until_s: of the Unix clock."""
        mac = hmac.digest(self.sha256, f"{until_s} {user_id}".encode(), "sha256").hex()
        return f"{self.name}.{until_s}.{mac}"


def new_key(name: str, scopes: Sequence[str]) -> tuple[str, str]:
    """A key, which nothing keeps, and its line for the file. Raises ValueError for a name or scope that cannot be."""
    key = f"upwell_{secrets.token_urlsafe(32)}"
    line = f"{name} {','.join(scopes)} {sha256(key.encode()).hexdigest()}"
    _parsed(line)
    return key, line


def _parsed(line: str) -> Key:
    found = _LINE.fullmatch(line.strip())
    if not found:
        raise ValueError("expected NAME SCOPE[,SCOPE] SHA256")
    scopes = frozenset(found["scopes"].split(","))
    if unknown := scopes - set(SCOPES):
        raise ValueError(f"no scope {', '.join(sorted(unknown))}: there are {', '.join(SCOPES)}")
    return Key(found["name"], scopes, bytes.fromhex(found["hash"]))


class Keys:
    """The keys of a file; `required` is False where there is none: then everyone may do everything."""

    def __init__(self, keys: Sequence[Key] | None) -> None:
        self.required = keys is not None
        self._keys = tuple(keys or ())

    def find(self, authorization: str) -> Key | None:
        """The key of an Authorization header. Every key is compared, each in constant time."""
        kind, _, given = authorization.partition(" ")
        digest = sha256(given.strip().encode()).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found if kind.lower() == "bearer" else None

    def redeem(self, ticket: str, user_id: str, now_s: float) -> Key | None:
        """The key behind a ticket of this user that has not run out; None of any other."""
        found = _TICKET.fullmatch(ticket)
        key = next((key for key in self._keys if found and key.name == found["name"]), None)
        if not found or not key or now_s >= (until_s := int(found["until"])):
            return None
        return key if hmac.compare_digest(key.ticket(user_id, until_s), ticket) else None


OPEN = Keys(None)


def load_keys(serve: Serve) -> Keys:
    """Raises ConfigError naming the setting: a file that cannot be used, or none where others than us can call."""
    path = serve.keys_file
    if path is None:
        if not _is_loopback(serve.host):
            raise ConfigError(
                f"serve.keys_file (UPWELL_SERVE__KEYS_FILE): needed where serve.host is not loopback but {serve.host}: "
                "`upwell keys new --scope read` prints a key and its line for the file"
            )
        return OPEN
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and line[0] != "#"]
        keys = [_parsed(line) for line in lines]
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("two keys have one name")
        if not keys:
            raise ValueError("no key in it")
    except (OSError, ValueError) as error:
        raise ConfigError(f"serve.keys_file (UPWELL_SERVE__KEYS_FILE): {path}: {error}") from error
    return Keys(keys)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
