"""Reading and replaying what could not be applied."""

from collections.abc import Sequence

from stream.consumer import read_window
from stream.events import DeadLetter, decode
from stream.producer import Producer
from workers.settings import Settings

SHOWN_BYTES = 80
MAX_LETTER_BYTES = 2 * 1024 * 1024


def read(settings: Settings) -> list[tuple[int, DeadLetter]]:
    """All that are kept, oldest first, each with its number in the dead-letter topic."""
    batches = read_window(settings.connection, settings.topics.dead_letters.name)
    return [
        (record.offset, decode(record.value, DeadLetter, MAX_LETTER_BYTES)) for batch in batches for record in batch
    ]


def describe(number: int, letter: DeadLetter) -> str:
    """One line: number, place, cause, the beginning of the message."""
    payload = (letter.payload or b"")[:SHOWN_BYTES]
    return f"{number}  {letter.topic}[{letter.partition}]@{letter.offset}  {letter.cause}  {payload!r}"


def resend(settings: Settings, letters: Sequence[DeadLetter]) -> tuple[int, int]:
    """Sends each to the topic it came from; how many were sent, and how many could not be."""
    whole = [letter for letter in letters if not letter.truncated]
    producer = Producer(settings.connection)
    for letter in whole:
        producer.send_raw(letter.topic, letter.key, letter.payload)
    producer.close()
    return len(whole), len(letters) - len(whole)
