"""What a consumer of the clicks topic gives, without a Kafka."""

from typing import NamedTuple


class Record(NamedTuple):
    key: bytes
    value: bytes
    offset: int
    topic: str = "clicks"
    partition: int = 0
    timestamp: int = 0
