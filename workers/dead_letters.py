"""Reading, replaying and erasing what could not be applied.

A dead letter is keyed by the place of its message, so that the one message can be taken back by a null record.
"""

import asyncio
import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec
import structlog

from model.user_state import EMPTY
from stream.consumer import read_window
from stream.events import MAX_ID, BadEvent, Click, DeadLetter, decode
from stream.producer import Producer
from stream.text import shown
from workers import metrics
from workers.outage import in_thread
from workers.sender import BatchSender
from workers.settings import Settings
from workers.state_writer import Acknowledge
from workers.states import States

log = structlog.get_logger()

SHOWN_BYTES, SHOWN_CAUSE = 80, 200
MAX_LETTER_BYTES = 2 * 1024 * 1024
MAX_DEAD_PAYLOAD = 512 * 1024  # base64 and the other fields must fit one record
MAX_DEAD_KEY = 4 * MAX_ID  # bytes of the longest valid one in UTF-8
FIELDS = {field.name for field in msgspec.structs.fields(Click)}
NUMBERS = ("version", "ts_ms", "value")  # of those
OWN_NUMBER = re.compile(rb"""(["'])(?:%s)\1\s*:\s*-?[\d.]+""" % "|".join(NUMBERS).encode())
ESCAPE = re.compile(rb"\\u[0-9a-fA-F]{4}")


def dead_letter(record: Any, cause: str) -> DeadLetter:
    """A consumed record as a dead letter; of an oversized key or payload the first part is kept."""
    key, payload = record.key and record.key[:MAX_DEAD_KEY], record.value and record.value[:MAX_DEAD_PAYLOAD]
    return DeadLetter(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        cause=cause,
        key=key,
        payload=payload,
        truncated=(key, payload) != (record.key, record.value),
        ts_ms=record.timestamp,
    )


def place(letter: DeadLetter) -> bytes:
    """Key of a dead letter: no user id, and the same when the message is read again."""
    return f"{letter.topic}-{letter.partition}-{letter.offset}".encode()


def read(settings: Settings) -> list[tuple[int, DeadLetter]]:
    """All that are kept, oldest first, each with its number in the dead-letter topic."""
    found: dict[bytes, tuple[int, DeadLetter]] = {}
    for key, number, letter in _kept(settings):
        found.pop(key, None)
        if letter:
            found[key] = number, letter
    return list(found.values())


def _kept(settings: Settings) -> Iterator[tuple[bytes, int, DeadLetter | None]]:
    """Place, number and letter, or None where it has been taken back; what cannot be read is passed over.

    By place and not by record key: before erasure they had their message's, many the same or none.
    """
    for record in read_window(settings.connection, settings.topics.dead_letters.name):
        if record.value is None:
            yield record.key or b"", record.offset, None
            continue
        try:
            letter = decode(record.value, DeadLetter, MAX_LETTER_BYTES)
        except BadEvent as error:  # of a later release, or not ours
            log.warning("dead letter passed over", number=record.offset, cause=str(error))
        else:
            yield place(letter), record.offset, letter


def describe(number: int, letter: DeadLetter) -> str:
    """One line: number, place, the beginnings of cause and message. Strangers' characters do nothing to a terminal."""
    payload = (letter.payload or b"")[:SHOWN_BYTES]
    at = f"{letter.topic}[{letter.partition}]@{letter.offset}"
    return shown(f"{number}  {at}  {letter.cause[:SHOWN_CAUSE]}  {payload!r}")


def resend(settings: Settings, letters: Sequence[DeadLetter]) -> tuple[int, int]:
    """Sends each to the topic it came from, and takes it back: what is refused again is another letter. How many were
    sent, and how many could not be."""
    whole = [one for one in letters if not one.truncated and (one.key is not None or one.payload is not None)]
    with Producer(settings.connection) as producer:
        for letter in whole:
            producer.send_raw(letter.topic, letter.key, letter.payload)
        producer.flush()
        for letter in whole:
            producer.send_raw(settings.topics.dead_letters.name, place(letter), None)
    return len(whole), len(letters) - len(whole)


def names_one(letter: DeadLetter, user_ids: Collection[str]) -> bool:
    """Whether a dead letter is of one of these users: by its key, a string, number or name in its JSON, else a word."""
    if letter.key is not None and letter.key.decode(errors="replace") in user_ids:
        return True
    payload = letter.payload or b""
    try:
        return any(text in user_ids for text in _strings(msgspec.json.decode(payload)))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = ESCAPE.sub(lambda found: found[0].lower(), OWN_NUMBER.sub(b"", payload))
        forms = {
            form
            for user_id in user_ids
            for form in (user_id.encode(), msgspec.json.encode(user_id)[1:-1], json.dumps(user_id)[1:-1].encode())
        }
        return any(re.search(rb"(?<![\w-])%s(?![\w-])" % re.escape(form), text) for form in forms)


def _strings(value: Any) -> Iterator[str]:
    """What could be an id: no name of a field of ours, nor its number. "version": 1 is not the user 1."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int | float):
        yield str(int(value) if isinstance(value, float) and value.is_integer() else value)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
    elif isinstance(value, dict):
        yield from value.keys() - FIELDS
        for name, part in value.items():
            if not (name in NUMBERS and isinstance(part, int | float)):
                yield from _strings(part)


class DeadLetters:
    """Takes back the dead letters of erased users, of all that wait in one reading of the topic."""

    def __init__(self, settings: Settings, sender: BatchSender) -> None:
        self._settings, self._sender = settings, sender
        self._waiting: set[str] = set()
        self._reading = asyncio.Lock()

    def cleared_of(self, user_ids: Collection[str], acknowledge: Acknowledge, states: States) -> Acknowledge:
        """Acknowledges when that is done: a worker that dies before reads the wish again. Then, too, no mark of the
        users is needed in the states any more: no click from before the wish will come again.
        """
        self._waiting |= set(user_ids)
        metrics.pending_erasures.inc(len(user_ids))

        async def cleared() -> None:
            async with self._reading:  # who finds nothing waiting has waited for the reading that took its users along
                users, self._waiting = self._waiting, set()
                if users:
                    found = await in_thread(self._of, users)
                    await self._sender.send(self._settings.topics.dead_letters.name, 0, [(key, None) for key in found])
            metrics.pending_erasures.dec(len(user_ids))
            metrics.erasures.labels("cleared").inc(len(user_ids))
            await acknowledge()
            for user_id in user_ids:
                if states.get(user_id, EMPTY).erased:
                    del states[user_id]

        return cleared

    def _of(self, user_ids: Collection[str]) -> list[bytes]:
        """Places of their letters. Only these are held: there may be millions beside them."""
        found: dict[bytes, None] = {}
        for key, _, letter in _kept(self._settings):
            if letter is None:
                found.pop(key, None)
            elif names_one(letter, user_ids):
                found[key] = None
        return list(found)
