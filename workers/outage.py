"""What is asked of Kafka again while it is away: a worker that ended would be started into the same."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import aiokafka.errors
import kafka.errors
import structlog

log = structlog.get_logger()
T = TypeVar("T")

RETRY_S = 1.0


async def outlasting(attempt: Callable[[], Awaitable[T]]) -> T:
    """What the first attempt returns that Kafka answers. Raises what another attempt would not mend."""
    while True:
        try:
            return await attempt()
        except (kafka.errors.KafkaError, aiokafka.errors.KafkaError, TimeoutError) as error:
            if not getattr(error, "retriable", True):
                raise
            log.warning("Kafka did not answer, asked again", reason=repr(error))
            await asyncio.sleep(RETRY_S)


async def in_thread(read: Callable[..., T], *arguments: Any) -> T:
    """A read that waits for Kafka, in a thread, outlasting it."""
    return await outlasting(partial(asyncio.to_thread, read, *arguments))
