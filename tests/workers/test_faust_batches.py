"""Faust's private names that the partition batches stand on, and its settings that would break them."""

import inspect
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faust
import pytest
from faust.transport.drivers.aiokafka import Consumer
from faust.types import TP

from stream.connection import Connection
from workers.faust_batches import PartitionBatchConsumer, PartitionBatchTransport, batch_app


async def nothing() -> None: ...


def test_faust_still_calls_what_we_override() -> None:
    assert list(inspect.signature(Consumer._wait_next_records).parameters) == ["self", "timeout"]
    assert "_wait_next_records" in inspect.getsource(Consumer.getmany)
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


def test_the_app_opens_no_port_and_makes_no_topic() -> None:
    app = batch_app("group", Connection("127.0.0.1:9092,127.0.0.1:9093"), nothing, nothing)
    assert isinstance(app.transport, PartitionBatchTransport)
    assert app.conf.web_enabled is False
    assert app.conf.topic_allow_declare is False
    assert [str(url) for url in app.conf.broker] == ["kafka://127.0.0.1:9092", "kafka://127.0.0.1:9093"]


class Group:
    """Workers of one consumer group; the first is its leader, as Kafka has it."""

    def __init__(self, num_partitions: int) -> None:
        self._cluster = SimpleNamespace(partitions_for_topic=lambda _: set(range(num_partitions)))
        self._assignors: dict[str, Any] = {}

    def join(self, member: str, frozen: str = "") -> dict[str, set[int]]:
        self._assignors[member] = batch_app("group", Connection("127.0.0.1:9092"), nothing, nothing).assignor
        return self.rebalance(frozen)

    def leave(self, member: str) -> dict[str, set[int]]:
        del self._assignors[member]
        return self.rebalance()

    def rebalance(self, frozen: str = "") -> dict[str, set[int]]:
        """The frozen one does not hear of it."""
        members = {member: assignor.metadata({"clicks"}) for member, assignor in self._assignors.items()}
        assigned = next(iter(self._assignors.values())).assign(self._cluster, members)
        for member, assignor in self._assignors.items():
            if member != frozen:
                assignor.on_assignment(assigned[member])
        return {member: {p for _, ps in one.assignment for p in ps} for member, one in assigned.items()}


@pytest.mark.parametrize("num_partitions", [3, 8, 12])
def test_no_worker_has_two_partitions_more_than_another(num_partitions: int) -> None:
    group, names = Group(num_partitions), [f"w{number:02d}" for number in range(11)]
    shares = [group.join(name) for name in names] + [group.leave(name) for name in names[1:]]
    shares += [group.join("w11"), group.join("w12", frozen="w00"), group.leave("w11"), group.join("w13")]
    for share in shares:
        assert sorted(p for held in share.values() for p in held) == list(range(num_partitions))
        sizes = [len(held) for held in share.values()]
        assert max(sizes) - min(sizes) <= 1, share
    assert shares[-1] == group.rebalance()  # nothing has changed, nothing moves
    for before, after in pairwise(shares[: len(names)]):  # what moves is the newcomer's share alone
        kept = sum(len(held & after[name]) for name, held in before.items())
        assert num_partitions - kept == num_partitions // len(after)


async def test_the_app_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = batch_app("group", Connection("127.0.0.1:9092"), nothing, nothing)
    await app.on_first_start()
    assert not list(tmp_path.iterdir())
    await faust.App.on_first_start(app)
    assert list(tmp_path.iterdir())  # Faust's own; else this test would see nothing


def test_a_login_reaches_faust_with_tls() -> None:
    """FACTS.md: SASLCredentials without an SSL context would be plaintext in silence."""
    connection = Connection("127.0.0.1:9092", tls=True, username="me", password="hush")
    credentials = batch_app("group", connection, nothing, nothing).conf.broker_credentials
    assert credentials.ssl_context is not None
    assert (credentials.protocol.value, credentials.username) == ("SASL_SSL", "me")
