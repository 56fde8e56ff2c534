"""Batches on the real broker: everything arrives, in order, however it is cut."""

import pytest

from stream.connection import Connection
from stream.consumer import read_window
from stream.topics import Topics
from workers.sender import MAX_RECORD_BYTES, BatchSender


async def test_more_than_a_batch_arrives_in_order(connection: Connection, topics: Topics) -> None:
    records = [(f"k{number}".encode(), number.to_bytes(4, "big") * 25_000) for number in range(40)]  # 4 MB
    sender = BatchSender(connection)
    await sender.start()
    try:
        await sender.send(topics.users.name, 1, records)
        await sender.send(topics.users.name, 1, [])
        await sender.send(topics.users.name, 1, [(b"gone", None)])
        with pytest.raises(ValueError, match=f"at most {MAX_RECORD_BYTES}"):
            await sender.send(topics.users.name, 1, [(b"k", b"x" * (MAX_RECORD_BYTES + 1))])
    finally:
        await sender.stop()
    found = [record for batch in read_window(connection, topics.users.name) for record in batch]
    assert [(record.key, record.value) for record in found] == [*records, (b"gone", None)]
    assert {record.partition for record in found} == {1}
