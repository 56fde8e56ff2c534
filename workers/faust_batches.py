"""Faust, one event a fetched partition batch: the value is the list of records.

Faust's own path costs 0.1-0.2 ms an event whatever the codec, because `Consumer._drain_messages` makes two
tasks for each (FACTS.md: 31 to 33 times the rate this way). Group, assignment and commits stay Faust's.

The synthetic record stands at the last offset that the fetch has passed, which may hold no click but the marker of a
producer's transaction, and acks come in order (one agent, concurrency 1): so all up to the last acked one is done.
Faust's own bookkeeping of gaps sticks for good where offset 0 was read alone and more than one record after it
(`if gap > 1 and r_offset`, seen: 268 applied, 1 committed); ours takes its place. An agent that raises still acks its
event, here a whole batch: so the agent takes its events unacked, acks each when all of it is in Kafka, and ends the
process where it cannot go on (`die`). The overridden names are private; pyproject.toml pins the minor version and
tests/workers/test_faust_batches.py fails when they move.
"""

import math
from collections.abc import Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import faust
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer, Transport

from stream.connection import REQUEST_S, Connection

# What a worker that is behind holds of its lag beside workers/partitions.py: POLL * BUFFER clicks at most, 1 KB each.
# Faust's default, 4,096 events, is of single records: of batches, memory followed the lag (docs/reliability.md).
POLL = 2000  # records a fetch, of all partitions together
BUFFER = 4  # batches that wait for the agent
# What may pass until what is folded is acknowledged, an outage of Kafka and a long look through the dead letters
# included: a rebalance waits for it. Faust's default is a minute.
REBALANCE_S = 1800.0
LOOK_S = 0.2  # while a partition cannot be read yet, so often whether it can
NOWHERE = {None}  # fetched from where there is nothing to fetch from: aiokafka takes an empty set for all


class Fetched(NamedTuple):
    """All of a partition from offset `first` up to but not `next`: markers and aborted clicks are passed over."""

    first: int
    next: int
    records: list[Any]


class PartitionBatchThread(AIOKafkaConsumerThread):  # type: ignore[misc]
    """Owns aiokafka's consumer. Reads what is committed: a click that its producer has taken back never was one."""

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"  # Faust reads so only where it writes in transactions itself
        return consumer

    def highwater(self, tp: Any) -> int | None:
        """The end of what is committed; None before the first fetch."""
        end: int | None = self._ensure_consumer().last_stable_offset(tp)
        return end

    async def _fetch_records(
        self, consumer: Any, active_partitions: set[Any], timeout: float, max_records: int
    ) -> dict[Any, list[Any]]:
        """Of the partitions that can be worked off: else their clicks would take the room of the others' for as long
        as it takes, and a rebalance would wait for them."""
        active = set(active_partitions)  # Faust's own, which a rebalance changes meanwhile
        readable = {tp for tp in active if self.consumer.app.readable(tp)}
        timeout_s = timeout if readable == active else LOOK_S
        before = _positions(consumer)
        fetched = await super()._fetch_records(consumer, readable or NOWHERE, timeout_s, max_records)
        after = _positions(consumer)
        passed = [tp for tp in readable if after.get(tp, 0) > before.get(tp, math.inf)]  # maybe markers alone
        return {tp: [_batch(tp, before.get(tp), after.get(tp), fetched.get(tp, []))] for tp in {*fetched, *passed}}


class PartitionBatchConsumer(Consumer):  # type: ignore[misc]
    def _new_consumer_thread(self) -> PartitionBatchThread:
        return PartitionBatchThread(self, loop=self.loop, beacon=self.beacon)

    async def _add_gap(self, tp: Any, offset_from: int, offset_to: int) -> None:
        """Nothing is missing between two batches: workers/handed.py sees to it."""

    def _new_offset(self, tp: Any) -> int | None:
        """What can be committed: one past the last acked, None where nothing was acked since the last call."""
        acked: list[int] = self._acked[tp]
        if not acked:
            return None
        done = max(acked) + 1
        acked.clear()
        self._acked_index[tp].clear()
        return done


def _positions(consumer: Any) -> Mapping[Any, int]:
    """Of each assigned partition that has one: the offset to be read next."""
    assignment = getattr(consumer._subscription.subscription, "assignment", None)
    states = {tp: assignment.state_value(tp) for tp in assignment.tps} if assignment else {}
    return {tp: state.position for tp, state in states.items() if state.has_valid_position}


def _batch(tp: Any, before: int | None, after: int | None, records: list[Any]) -> SimpleNamespace:
    """`before` and `after` are the reader's positions; of another assignment, maybe, which the records are not."""
    first = min(at for at in (before, *(record.offset for record in records[:1])) if at is not None)
    next_ = max((after or 0, *(record.offset + 1 for record in records[-1:])))
    return SimpleNamespace(
        topic=tp.topic,
        partition=tp.partition,
        offset=next_ - 1,
        timestamp=records[-1].timestamp if records else 0,
        timestamp_type=0,
        headers=(),
        key=None,
        value=Fetched(first, next_, records),
        checksum=None,
        serialized_key_size=0,
        serialized_value_size=sum(record.serialized_value_size for record in records),
    )


class PartitionBatchTransport(Transport):  # type: ignore[misc]
    Consumer = PartitionBatchConsumer


class BatchApp(faust.App):  # type: ignore[misc]
    before: Callable[[], Awaitable[None]]  # runs before the first event is read
    after: Callable[[], Awaitable[None]]  # runs when the agents have ended
    readable: Callable[[Any], bool]  # asked of an assigned partition, by another thread, before each fetch

    def _new_transport(self) -> PartitionBatchTransport:
        return PartitionBatchTransport(self.conf.broker_consumer, self)

    async def on_first_start(self) -> None:
        """Without Faust's folders: empty, one for each group, and in the working directory, which may be read-only."""

    async def on_start(self) -> None:
        await super().on_start()
        await self.before()

    async def on_shutdown(self) -> None:
        await super().on_shutdown()
        await self.after()


def batch_app(
    group: str,
    connection: Connection,
    before: Callable[[], Awaitable[None]],
    after: Callable[[], Awaitable[None]],
    readable: Callable[[Any], bool],
) -> BatchApp:
    """A Faust app without web server, tables, leader topic or topic creation."""
    brokers = [f"kafka://{address}" for address in connection.bootstrap.split(",")]
    app = BatchApp(
        group,
        broker=brokers,
        broker_credentials=_credentials(connection),
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        stream_wait_empty=True,
        broker_max_poll_records=POLL,
        stream_buffer_maxsize=BUFFER,
        broker_commit_interval=1.0,
        broker_request_timeout=REQUEST_S,
        broker_session_timeout=10.0,  # a killed worker's partitions move after it; Faust's default is a minute
        broker_heartbeat_interval=3.0,
        # Faust answers a rebalance when what it has handed on is done, and reads on when there is room. What has died
        # is found by the session, what stands still by UpwellPartitionStalled.
        broker_rebalance_timeout=REBALANCE_S,
        broker_max_poll_interval=REBALANCE_S,
        consumer_auto_offset_reset="earliest",
        store="memory://",
        table_standby_replicas=0,  # so partitions are dealt round robin; Faust's own way left workers without any
    )
    app.before, app.after, app.readable = before, after, readable
    return app


def _credentials(connection: Connection) -> Any:
    """One security setting for both clients (FACTS.md: SASL without an SSL context would be plaintext)."""
    context = connection.ssl_context()
    if context is None:
        return None
    if connection.username is None:
        return faust.SSLCredentials(context)
    return faust.SASLCredentials(
        mechanism=connection.mechanism, username=connection.username, password=connection.password, ssl_context=context
    )


def execute(app: BatchApp) -> int:
    """Run the app from our own code until a signal: the command line would start the web server (FACTS.md)."""
    worker = faust.Worker(app, loglevel="WARNING", redirect_stdouts=False, override_logging=False)
    try:
        worker.execute_from_commandline()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0
