"""Following the recommendations as they are made."""

import logging
from collections.abc import Callable, Iterator

from stream.closing import Closing
from stream.connection import Connection
from stream.consumer import Record, open_consumer, partitions_of
from stream.events import OFFSET_HEADER, BadEvent, Recommendations, decode
from stream.topics import Topics

log = logging.getLogger(__name__)


class Subscriber(Closing):
    """Iterates over decoded recommendations, for ever; from now, or from the oldest that are kept.

    A list behind one of the same user with a larger `offset` is older (see Recommendations): pass it over where you
    keep lists. To do that here would take memory for each user.

    on_erased: told the id of each erased user, whose lists are to be forgotten wherever you keep them.

    "Now" is fixed when this is made: what is sent afterwards is seen, however late the iteration starts.
    """

    def __init__(
        self,
        connection: Connection,
        topics: Topics,
        *,
        from_beginning: bool = False,
        on_erased: Callable[[str], None] = lambda user_id: None,
    ) -> None:
        self._on_erased = on_erased
        self._erased: dict[str, int] = {}  # user -> offset of a wish that the worker has not got to
        self._consumer = open_consumer(connection)
        partitions = partitions_of(self._consumer, [topics.recommendations.name])
        self._consumer.assign(partitions)
        if from_beginning:
            self._consumer.seek_to_beginning(*partitions)
        else:
            for partition, end in self._consumer.end_offsets(partitions).items():
                self._consumer.seek(partition, end)

    @property
    def connected(self) -> bool:
        """Whether a broker has answered within the last five seconds; a question for more records waits half of one.

        An open connection says nothing: where the network swallows what is sent it stays open.
        """
        return bool(self._consumer.metrics()["consumer-metrics"]["response-rate"])

    def records(self, timeout_s: float = 1.0) -> list[Record]:
        """As `poll`, not decoded."""
        polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000))
        return [record for records in polled.values() for record in records]

    def poll(self, timeout_s: float = 1.0) -> list[Recommendations]:
        """What has come since the last poll, waiting up to timeout_s for the first.

        A list from before an erased user's wish, which a worker that is behind still sends, is passed over. So is, with
        a warning, one that cannot be read, of a later release perhaps: the others and the erasures beside it are not
        to be lost for it.
        """
        found = []
        for record in self.records(timeout_s):
            try:
                if record.value is not None:
                    answer = decode(record.value, Recommendations)
                    if answer.offset > self._erased.get(answer.user_id, -1):
                        self._erased.pop(answer.user_id, None)  # the worker has got there
                        found.append(answer)
                elif record.key is not None:
                    self._forget(record.key.decode(), int(dict(record.headers).get(OFFSET_HEADER, -1)))
            except (BadEvent, ValueError) as error:
                log.warning("%s[%d]@%d passed over: %s", record.topic, record.partition, record.offset, error)
        return found

    def _forget(self, user_id: str, offset: int) -> None:
        """The wish's null comes from who asks, and again from the worker, which sends nothing older behind it."""
        before = self._erased.get(user_id, -1)
        if offset > before:
            self._erased[user_id] = offset
        elif offset == before:
            self._erased.pop(user_id, None)
        self._on_erased(user_id)

    def __iter__(self) -> Iterator[Recommendations]:
        while True:
            yield from self.poll()

    def close(self) -> None:
        self._consumer.close()
