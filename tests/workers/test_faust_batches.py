"""Faust's private names that the partition batches stand on, and its settings that would break them."""

import inspect
from collections import defaultdict
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import faust
import pytest
from aiokafka import AIOKafkaConsumer
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread, Consumer
from faust.types import TP

from stream.connection import Connection
from workers.faust_batches import Fetched, PartitionBatchConsumer, PartitionBatchTransport, _batch, batch_app


async def nothing() -> None: ...


def test_faust_still_calls_what_we_override() -> None:
    assert "AIOKafkaConsumerThread(self, loop=self.loop, beacon=self.beacon)" in inspect.getsource(Consumer)
    for caller, name in (
        ("getmany", "_fetch_records"),
        ("on_start", "_create_consumer"),
        ("_create_consumer", "_create_worker_consumer"),
    ):
        assert f"self.{name}" in inspect.getsource(getattr(AIOKafkaConsumerThread, caller))
    fetch = inspect.signature(AIOKafkaConsumerThread._fetch_records).parameters
    assert list(fetch) == ["self", "consumer", "active_partitions", "timeout", "max_records"]
    assert "isolation_level=self._isolation_level" in inspect.getsource(AIOKafkaConsumer.start)
    assert list(inspect.signature(Consumer._add_gap).parameters) == ["self", "tp", "offset_from", "offset_to"]
    assert "_add_gap" in inspect.getsource(Consumer._drain_messages)
    assert "self._new_offset(tp)" in inspect.getsource(Consumer._filter_committable_offsets)
    assert "_new_transport" in inspect.getsource(faust.App.transport.fget)


def test_all_up_to_the_last_acked_batch_is_committed() -> None:
    """Offset 0 read alone, then a batch: Faust's own bookkeeping would never commit again."""
    consumer, tp = object.__new__(PartitionBatchConsumer), TP("clicks", 3)
    consumer._acked, consumer._acked_index = defaultdict(list), defaultdict(set)
    consumer._committed_offset = defaultdict(lambda: None)
    for last, committed in ((0, 1), (17, 18), (18, 19)):
        consumer._acked[tp].append(last)
        consumer._acked_index[tp].add(last)
        assert consumer._filter_committable_offsets([tp]) == {tp: committed}
        consumer._committed_offset[tp] = committed
        assert consumer._filter_committable_offsets([tp]) == {}


@pytest.mark.parametrize(
    "before, after, offsets, first, next_",
    [
        (5, 9, [5, 6, 7], 5, 9),  # a marker at 8
        (5, 9, [6, 7, 8], 5, 9),  # a marker at 5
        (5, 6, [], 5, 6),  # nothing but a marker
        (None, 9, [7, 8], 7, 9),  # just assigned
        (9, 4, [2, 3], 2, 4),  # sent back meanwhile
        (5, None, [5, 6], 5, 7),  # taken away meanwhile
    ],
)
def test_a_batch_says_what_the_fetch_has_passed(
    before: int | None, after: int | None, offsets: list[int], first: int, next_: int
) -> None:
    records = [SimpleNamespace(offset=offset, timestamp=1, serialized_value_size=3) for offset in offsets]
    batch = _batch(TP("clicks", 3), before, after, records)
    assert batch.value == Fetched(first, next_, records) and batch.offset == next_ - 1
    assert batch.serialized_value_size == 3 * len(offsets)


def test_the_app_opens_no_port_and_makes_no_topic() -> None:
    app = batch_app("group", Connection("127.0.0.1:9092,127.0.0.1:9093"), nothing, nothing, bool)
    assert isinstance(app.transport, PartitionBatchTransport)
    assert app.conf.web_enabled is False
    assert app.conf.topic_allow_declare is False
    assert [str(url) for url in app.conf.broker] == ["kafka://127.0.0.1:9092", "kafka://127.0.0.1:9093"]


@pytest.mark.parametrize("num_partitions", [3, 8, 12])
@pytest.mark.parametrize("num_workers", range(1, 12))
async def test_no_worker_has_two_partitions_more_than_another(num_partitions: int, num_workers: int) -> None:
    """By what the consumer is made with: Faust takes its own assignor, or another, by the app's settings."""
    app = batch_app("group", Connection("127.0.0.1:9092"), nothing, nothing, bool)
    thread = app.consumer._thread
    consumer = thread._create_worker_consumer(app.transport)
    (assignor,) = consumer._partition_assignment_strategy
    consumer._closed = True  # neither it nor its thread was started
    thread.loop.close()
    cluster = SimpleNamespace(partitions_for_topic=lambda _: set(range(num_partitions)))
    members = {f"w{number:02d}": assignor.metadata({"clicks"}) for number in range(num_workers)}
    held = [[p for _, ps in one.assignment for p in ps] for one in assignor.assign(cluster, members).values()]
    assert sorted(chain.from_iterable(held)) == list(range(num_partitions))
    assert max(map(len, held)) - min(map(len, held)) <= 1, held


async def test_the_app_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = batch_app("group", Connection("127.0.0.1:9092"), nothing, nothing, bool)
    await app.on_first_start()
    assert not list(tmp_path.iterdir())
    await faust.App.on_first_start(app)
    assert list(tmp_path.iterdir())  # Faust's own; else this test would see nothing


def test_a_login_reaches_faust_with_tls() -> None:
    """FACTS.md: SASLCredentials without an SSL context would be plaintext in silence."""
    connection = Connection("127.0.0.1:9092", tls=True, username="me", password="hush")
    credentials = batch_app("group", connection, nothing, nothing, bool).conf.broker_credentials
    assert credentials.ssl_context is not None
    assert (credentials.protocol.value, credentials.username) == ("SASL_SSL", "me")
